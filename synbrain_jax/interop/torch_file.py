"""Checkpoints that PyTorch's `torch.save` wrote, read without PyTorch and without executing anything in them.

Such a file holds a pickle, which is a program, and the raw numbers of its tensors. `TorchFile` replays the few
instructions that build plain values and refuses every other one, so a hostile file cannot do more than be refused:
opening one takes time in proportion to its size, and opening it and reading a tensor take at most twice its size of
memory and a few MiB.

Both layouts are understood, as torch/serialization.py of PyTorch 2 writes them: the zip archive (since PyTorch 1.6),
whose checksums are verified for all that is read, and the older stream of pickles, which has no checksums: there,
damage to the numbers goes unnoticed. Layout of archives: PKWARE's APPNOTE 6.3; of pickles: Python's `pickletools`.

One long room on purpose: file, bytes, archive and pickle share one budget, and are only safe together.
"""

import contextlib
import dataclasses
import enum
import io
import math
import os
import pickletools
import struct
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

from synbrain_jax.errors import InputError

_SLACK = 4 * 2**20  # bytes of memory for plain values, whatever the size of the file
_CHUNK = 2**20  # bytes read at once
_MOST_LEVELS = 32  # of containers within containers
_MOST_AXES = 64  # of a NumPy array
_MOST_INDEX = 2**20  # integer dict keys beyond could be chosen so that they collide
_LONGEST_NAME = 200  # of a module or class
_COPY_AGAIN = "The file is damaged or incomplete: copy it again"


# ---- what a file holds -------------------------------------------------------------------------------------


@dataclasses.dataclass(slots=True, eq=False)
class _Storage:
    """A run of numbers in the file; several tensors may be views of it."""

    key: str
    dtype: np.dtype
    size: int  # elements
    start: int | None = None  # place in the file, in the older layout
    member: str | None = None  # of the archive


@dataclasses.dataclass(frozen=True, slots=True, eq=False, repr=False)
class StoredTensor:
    """A tensor whose numbers are still in the file: only its shape and dtype are known."""

    shape: tuple[int, ...]
    dtype: np.dtype
    _file: "TorchFile"
    _storage: _Storage
    _offset: int  # elements, like the strides
    _strides: tuple[int, ...]

    def read(self) -> np.ndarray:
        """The numbers: a C-contiguous array of `shape` and `dtype` (float32, float16, bfloat16 or int64).

        Reads the tensor's whole storage and nothing else. Raises InputError if it is damaged (which only the zip layout
        can tell) or the file was closed.
        """
        return self._file._read(self)

    def __repr__(self) -> str:
        return f"StoredTensor(shape={self.shape}, dtype={self.dtype})"


class TorchFile:
    """An open checkpoint: a context manager, within which tensors can be read.

        with TorchFile("last.pth") as file:
            kernel = file.content["model"]["module.encoder.conv_in.weight"].read()

    Attributes:
        content: dict, list, tuple, str, int, float, bool, None or StoredTensor; an OrderedDict became a dict in the
            same order, an argparse.Namespace a dict of its fields. What is shared in the file is shared here.
    """

    content: Any

    def __init__(self, path: str | os.PathLike):
        """Opens `path` and reads all but the tensors' numbers.

        Raises:
            InputError: no such file, not written by torch.save, damaged, or holding anything but plain values and
                tensors of the four dtypes.
        """
        self._where = os.fspath(path)
        try:
            self._stream = epath.Path(path).open("rb")
        except (OSError, ValueError) as error:
            raise InputError(f"{self._where}: cannot be opened ({error}); expected a file by torch.save") from error
        try:
            with _explained(self._where):
                self._source = _Source(self._stream)
                self.content = self._parse()
        except BaseException:
            self._stream.close()
            raise

    def __enter__(self) -> "TorchFile":
        return self

    def __exit__(self, *exception) -> None:
        self._stream.close()

    def _parse(self) -> Any:
        source = self._source
        budget = _Budget(2 * source.size + _SLACK)
        head = source.at(0).read(min(source.size, 32))
        self._archive = None
        storages: dict[str, _Storage] = {}
        if head.startswith(_LOCAL_SIGNATURE):
            self._archive = _Archive(source, budget)
            content = self._parse_zip(_Pickle(self, budget, storages), storages)
        elif head.startswith(b"\x80") and _MAGIC.to_bytes(10, "little") in head:
            content = self._parse_legacy(budget, storages)
        else:
            raise InputError(
                f"is not a PyTorch checkpoint: it {f'begins with {head[:8]!r}' if head else 'is empty'}. Expected a "
                "file by torch.save, usually named .pt or .pth"
            )
        _check_content(content, _Budget(budget.left), most_bytes=budget.total)
        # Reading a tensor that is not contiguous in its storage needs the storage and a copy.
        budget.spend(2 * max((_n_bytes(storage) for storage in storages.values()), default=0))
        return content

    def _parse_zip(self, pickle: "_Pickle", storages: dict[str, _Storage]) -> Any:
        archive, source = self._archive, self._source
        tops = [name for name in archive.members if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(tops) != 1:
            raise InputError(
                f"is a zip archive with {len(tops)} members NAME/data.pkl; expected one, in a file by torch.save"
            )
        root = tops[0].removesuffix("data.pkl")
        if f"{root}byteorder" in archive.members:
            start, end = archive.verified(f"{root}byteorder")
            order = source.at(start).read(min(end - start, 16))
            if order != b"little":
                raise InputError(f"was written in byte order {order!r}; expected b'little'")
        start, end = archive.verified(tops[0])
        content = pickle.load(source.at(start, end))
        if source.position != end:
            raise InputError(f"{end - source.position} bytes follow the pickle in {_shown(tops[0])}. {_COPY_AGAIN}")
        for storage in storages.values():
            name = f"{root}data/{storage.key}"
            if name not in archive.members:
                raise InputError(f"member {_shown(name)} is missing. {_COPY_AGAIN}")
            _check_size(storage, archive.members[name].size)
            storage.member = name
        return content

    def _parse_legacy(self, budget: "_Budget", storages: dict[str, _Storage]) -> Any:
        source = self._source.at(0)

        def load(found: dict[str, _Storage]) -> Any:
            return _Pickle(self, budget, found).load(source)

        magic, protocol, system = load({}), load({}), load({})
        if magic != _MAGIC or protocol != _LEGACY_PROTOCOL or type(system) is not dict:
            raise InputError(f"unknown header of a PyTorch checkpoint. {_COPY_AGAIN}")
        if system.get("little_endian") is not True:
            raise InputError("was written on a big-endian machine; expected little-endian byte order")
        content = load(storages)
        keys = load({})
        if type(keys) is not list or any(type(key) is not str for key in keys):
            raise InputError(f"the list of storages is not a list of names. {_COPY_AGAIN}")
        for key in keys:
            storage = storages.get(key)
            if storage is None or storage.start is not None:
                raise InputError(f"storage {_shown(key)} is not used, or listed twice. {_COPY_AGAIN}")
            _check_size(storage, source.number("<q") * storage.dtype.itemsize)
            storage.start = source.position
            source.at(storage.start + _n_bytes(storage))
        if len(keys) != len(storages) or source.position != source.size:
            raise InputError(
                f"{len(storages)} storages are used, {len(keys)} are there and end {source.size - source.position} "
                f"bytes before the end of the file. {_COPY_AGAIN}"
            )
        return content

    def _read(self, tensor: StoredTensor) -> np.ndarray:
        if self._stream.closed:
            raise InputError(f"{self._where}: is closed; read its tensors inside the `with` block")
        with _explained(self._where):
            numbers = self._storage_bytes(tensor._storage)
            if 0 in tensor.shape:
                return np.empty(tensor.shape, tensor.dtype)
            width = tensor.dtype.itemsize
            strides = [width * stride for stride in tensor._strides]
            view = np.ndarray(tensor.shape, tensor.dtype, numbers, tensor._offset * width, strides)
            # A copy of a part, so that the array does not keep the whole storage in memory.
            return view if view.flags.c_contiguous and view.nbytes == numbers.nbytes else view.copy(order="C")

    def _storage_bytes(self, storage: _Storage) -> np.ndarray:
        start = storage.start if self._archive is None else self._archive.start(storage.member)
        numbers, filled, crc = np.empty(_n_bytes(storage), np.uint8), 0, 0
        for chunk in self._source.chunks(start, numbers.size):
            numbers[filled : filled + len(chunk)] = np.frombuffer(chunk, np.uint8)
            filled, crc = filled + len(chunk), zlib.crc32(chunk, crc)
        if self._archive is not None:
            self._archive.check(storage.member, crc)
        return numbers


def _n_bytes(storage: _Storage) -> int:
    return storage.size * storage.dtype.itemsize


def _check_size(storage: _Storage, found: int) -> None:
    if found != _n_bytes(storage):
        raise InputError(
            f"storage {_shown(storage.key)} has {found} bytes; expected {_n_bytes(storage)}, for "
            f"{storage.size} numbers of {storage.dtype}. {_COPY_AGAIN}"
        )


def _check_content(content: Any, budget: "_Budget", most_bytes: int) -> None:
    """Refuses what only looks small: cycles, deep nests, and shared parts that multiply when they are walked."""
    n_bytes = 0

    def visit(value: Any, level: int) -> None:
        nonlocal n_bytes
        budget.spend(_ITEM_COST)
        if level > _MOST_LEVELS:
            raise InputError(f"its values are nested in more than {_MOST_LEVELS} levels, or in themselves")
        kind = type(value)
        if kind in (dict, list, tuple):
            for item in value.values() if kind is dict else value:
                visit(item, level + 1)
        elif kind is StoredTensor:
            n_bytes += math.prod(value.shape) * value.dtype.itemsize
            if n_bytes > most_bytes:
                raise InputError(f"its tensors share their numbers and would take more than {most_bytes} bytes")
        elif kind not in (str, int, float, bool, type(None)):
            raise InputError(f"holds {_named(value)} by itself; expected plain values and tensors")

    visit(content, 0)


def _named(value: Any) -> str:
    return value.value if isinstance(value, _Global) else type(value).__name__.strip("_")


def _shown(text: str) -> str:
    return repr(text[:80])


@contextlib.contextmanager
def _explained(where: str) -> Iterator[None]:
    """Turns whatever is raised into an InputError that names the file."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    except MemoryError:
        raise
    # Damaged bytes make struct, codecs, NumPy and the file system raise almost anything.
    except Exception as error:
        raise InputError(f"{where}: {type(error).__name__}, {error}. {_COPY_AGAIN}") from error


# ---- bytes -------------------------------------------------------------------------------------------------


class _Budget:
    """Bytes of memory that the file's values may still take."""

    def __init__(self, n_bytes: int):
        self.total = self.left = n_bytes

    def spend(self, n_bytes: int) -> None:
        self.left -= n_bytes
        if self.left < 0:
            raise InputError(
                f"needs more than {self.total} bytes of memory, twice its size: it is damaged, or not to be trusted"
            )


class _Source:
    """A file from whose `position` on bytes are read, never beyond `end`."""

    def __init__(self, stream: Any):
        self._stream = stream
        self.size = stream.seek(0, io.SEEK_END)
        self.at(0)

    def at(self, position: int, end: int | None = None) -> "_Source":
        self.end = self.size if end is None else end
        if not 0 <= position <= self.end <= self.size:
            raise InputError(f"ends at byte {self.size}, expected {max(position, self.end)}. {_COPY_AGAIN}")
        self.position = self._stream.seek(position)
        return self

    def read(self, n_bytes: int) -> bytes:
        found = self._stream.read(n_bytes) if n_bytes <= self.end - self.position else b""
        if len(found) != n_bytes:
            raise InputError(f"ends too early, at byte {self.end}. {_COPY_AGAIN}")
        self.position += n_bytes
        return found

    def number(self, kind: str) -> int | float:
        """The next number, `kind` as in the module struct."""
        return struct.unpack(kind, self.read(struct.calcsize(kind)))[0]

    def line(self) -> str:
        """The next line, without its end."""
        found = self._stream.readline(min(_LONGEST_NAME, self.end - self.position))
        self.position += len(found)
        if not found.endswith(b"\n"):
            raise InputError(f"the name {found[:80]!r} has no end. {_COPY_AGAIN}")
        return found[:-1].decode()

    def chunks(self, start: int, n_bytes: int) -> Iterator[bytes]:
        self.at(start, start + n_bytes)
        while self.position < self.end:
            yield self.read(min(_CHUNK, self.end - self.position))


# ---- zip archives ------------------------------------------------------------------------------------------

_LOCAL_SIGNATURE, _LOCAL = b"PK\3\4", "<4s5H3I2H"
_ENTRY_SIGNATURE, _ENTRY = b"PK\1\2", "<4s6H3I5H2I"
_END_SIGNATURE, _END = b"PK\5\6", "<4s4H2IH"
_LOCATOR_SIGNATURE, _LOCATOR = b"PK\6\7", "<4sIQI"
_END64_SIGNATURE, _END64 = b"PK\6\6", "<4sQ2H2I4Q"
_UNCHANGED_BY = 0x0808  # flags that leave a stored member as it is: sizes repeated behind it, name in UTF-8
_WIDE, _WIDE_FIELD = 0xFFFFFFFF, 1  # such a number stands in this extra field
_MEMBER_COST = 450  # bytes of memory


class _Member(NamedTuple):
    header: int
    size: int
    crc: int
    end: int  # where the next member begins


class _Archive:
    """The members of a zip archive that does nothing but store them, one behind the other."""

    def __init__(self, source: _Source, budget: _Budget):
        self._source = source
        start, end, count = self._directory()
        entries = []
        source.at(start, end)
        while source.position < end:
            budget.spend(_MEMBER_COST)
            entries.append(self._entry(budget))
        if len(entries) != count:
            raise InputError(f"its directory has {len(entries)} entries; expected {count}. {_COPY_AGAIN}")
        entries.sort()
        self.members: dict[str, _Member] = {}
        for (header, name, size, crc), following in zip(entries, [*entries[1:], (start,)], strict=True):
            if name in self.members:
                raise InputError(f"member {_shown(name)} is there twice. {_COPY_AGAIN}")
            if header + struct.calcsize(_LOCAL) + size > following[0]:
                raise InputError(f"member {_shown(name)} overlaps with what follows it. {_COPY_AGAIN}")
            self.members[name] = _Member(header, size, crc, following[0])

    def _unpack(self, layout: str, signature: bytes, what: str) -> tuple:
        fields = struct.unpack(layout, self._source.read(struct.calcsize(layout)))
        if fields[0] != signature:
            raise InputError(f"{what} is not where it should be. {_COPY_AGAIN}")
        return fields[1:]

    def _directory(self) -> tuple[int, int, int]:
        """Start and end of the directory, and the number of its entries."""
        source = self._source
        end = source.size - struct.calcsize(_END)
        locator = end - struct.calcsize(_LOCATOR)
        source.at(end)
        *_, count, size, start, comment = self._unpack(_END, _END_SIGNATURE, "the archive's end record")
        if comment:
            raise InputError(f"the archive has a comment, which torch.save does not write. {_COPY_AGAIN}")
        if source.at(locator).read(4) == _LOCATOR_SIGNATURE:
            source.at(locator)
            _, end, _ = self._unpack(_LOCATOR, _LOCATOR_SIGNATURE, "the archive's end record")
            source.at(end)
            *_, count, size, start = self._unpack(_END64, _END64_SIGNATURE, "the archive's end record")
        if start + size != end:
            raise InputError(f"the archive's directory does not end at its end record. {_COPY_AGAIN}")
        return start, end, count

    def _entry(self, budget: _Budget) -> tuple[int, str, int, int]:
        """Place, name, size and checksum of the member that the directory names next."""
        source = self._source
        entry = self._unpack(_ENTRY, _ENTRY_SIGNATURE, "an entry of the archive's directory")
        _, _, flags, method, _, _, crc, packed, size, n_name, n_extra, n_comment, _, _, _, header = entry
        budget.spend(7 * n_name)
        name = source.read(n_name).decode()
        size, packed, header = _widened((size, packed, header), source.read(n_extra))
        source.read(n_comment)
        if name.partition("/")[2].partition("/")[0] in ("code", "constants.pkl"):
            raise InputError(
                "is a TorchScript archive, a program by torch.jit.save; expected a checkpoint by torch.save"
            )
        if method != 0 or flags & ~_UNCHANGED_BY or packed != size:
            raise InputError(f"member {_shown(name)} is compressed or encrypted; torch.save only stores. Save it again")
        return header, name, size, crc

    def start(self, name: str) -> int:
        """Where the bytes of a member begin."""
        member, source = self.members[name], self._source
        source.at(member.header, member.end)
        fields = self._unpack(_LOCAL, _LOCAL_SIGNATURE, f"the header of member {_shown(name)}")
        flags, method, n_name, n_extra = fields[1], fields[2], fields[8], fields[9]
        if source.read(n_name) != name.encode() or method != 0 or flags & ~_UNCHANGED_BY:
            raise InputError(f"the header of member {_shown(name)} contradicts the archive's directory. {_COPY_AGAIN}")
        source.read(n_extra)
        if source.position + member.size > member.end:
            raise InputError(f"member {_shown(name)} overlaps with what follows it. {_COPY_AGAIN}")
        return source.position

    def check(self, name: str, crc: int) -> None:
        if crc != self.members[name].crc:
            raise InputError(f"member {_shown(name)} differs from its checksum. {_COPY_AGAIN}")

    def verified(self, name: str) -> tuple[int, int]:
        """Start and end of a member whose checksum is right."""
        start, crc = self.start(name), 0
        end = start + self.members[name].size
        for chunk in self._source.chunks(start, end - start):
            crc = zlib.crc32(chunk, crc)
        self.check(name, crc)
        return start, end


def _widened(numbers: tuple[int, ...], extra: bytes) -> tuple[int, ...]:
    """Numbers of an entry, those that do not fit into 32 bits taken from its extra field."""
    wide, position = b"", 0
    while position < len(extra):
        kind, length = struct.unpack_from("<HH", extra, position)
        if kind == _WIDE_FIELD:
            wide = extra[position + 4 : position + 4 + length]
        position += 4 + length
    values = iter(struct.unpack(f"<{numbers.count(_WIDE)}Q", wide[: 8 * numbers.count(_WIDE)]))
    return tuple(next(values) if number == _WIDE else number for number in numbers)


# ---- pickles -----------------------------------------------------------------------------------------------

_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


class _Global(enum.Enum):
    """The names that a pickle may refer to, each an inert mark."""

    ORDERED_DICT = "collections.OrderedDict"
    NAMESPACE = "argparse.Namespace"
    TENSOR = "torch._utils._rebuild_tensor_v2"
    FLOAT32 = "torch.FloatStorage"
    FLOAT16 = "torch.HalfStorage"
    BFLOAT16 = "torch.BFloat16Storage"
    INT64 = "torch.LongStorage"


_GLOBALS = {mark.value: mark for mark in _Global}
_DTYPES = {
    _Global.FLOAT32: np.dtype(np.float32),
    _Global.FLOAT16: np.dtype(np.float16),
    _Global.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
    _Global.INT64: np.dtype(np.int64),
}

_OPCODES = {opcode.code.encode("latin-1"): opcode.name for opcode in pickletools.opcodes}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_NUMBERS = {"BININT": "<i", "BININT1": "<B", "BININT2": "<H", "BINFLOAT": ">d"}
_STRINGS = {"BINUNICODE": "<I", "SHORT_BINUNICODE": "<B", "BINUNICODE8": "<Q"}  # kind of the length
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PUTS = {"BINPUT": "<B", "LONG_BINPUT": "<I"}
_GETS = {"BINGET": "<B", "LONG_BINGET": "<I"}
# Bytes of memory that an instruction takes at most, its place on the stack included.
_COSTS = {
    **dict.fromkeys(["EMPTY_LIST", "MARK"], 150),
    **dict.fromkeys(["TUPLE", *_TUPLES, "LONG1"], 64),
    **dict.fromkeys(_STRINGS, 96),
    **dict.fromkeys(["REDUCE", "NEWOBJ", "BINPERSID"], 450),
    "EMPTY_DICT": 300,
}
_COST, _ITEM_COST, _ENTRY_COST = 40, 16, 150  # of any other instruction, of an item, of a dict entry


class _Pickle:
    """The machine that a pickle is a program for, with only the instructions that build plain values."""

    def __init__(self, file: TorchFile, budget: _Budget, storages: dict[str, _Storage]):
        """The storages that the pickle names are added to `storages`."""
        self._file, self._budget, self._storages = file, budget, storages
        self._stack: list[Any] = []
        self._outer: list[list[Any]] = []  # stacks below the marks
        self._memo: list[Any] = []
        self._namespaces: dict[int, dict] = {}  # by id

    def load(self, source: _Source) -> Any:
        """The value that the pickle at `source.position` builds; reads up to its end."""
        self._source = source
        while (name := _OPCODES.get(code := source.read(1))) != "STOP":
            if name is None:
                raise InputError(f"byte {code!r} at {source.position - 1} is no pickle instruction. {_COPY_AGAIN}")
            self._budget.spend(_COSTS.get(name, _COST))
            self._step(name)
        if len(self._stack) != 1 or self._outer:
            raise InputError(f"a pickle ends with {len(self._stack)} values; expected one. {_COPY_AGAIN}")
        return self._stack.pop()

    def _step(self, name: str) -> None:
        source, push = self._source, self._stack.append
        if name in _PUTS:
            self._put(source.number(_PUTS[name]))
        elif name in _GETS:
            push(self._memo[source.number(_GETS[name])])
        elif name in _NUMBERS:
            push(source.number(_NUMBERS[name]))
        elif name in _STRINGS:
            push(self._text(source.number(_STRINGS[name])))
        elif name in _CONSTANTS:
            push(_CONSTANTS[name])
        elif name in _TUPLES:
            items = [self._stack.pop() for _ in range(_TUPLES[name])]
            push(tuple(reversed(items)))
        elif (method := _INSTRUCTIONS.get(name)) is not None:
            method(self)
        else:
            raise InputError(
                f"its pickle has the instruction {name}, which plain values and tensors do not need. Save it again "
                "with torch.save, with nothing else in it"
            )

    def _pop(self, kind: type) -> Any:
        return self._is(self._stack.pop(), kind)

    def _top(self, kind: type) -> Any:
        return self._is(self._stack[-1], kind)

    @staticmethod
    def _is(value: Any, kind: type) -> Any:
        if type(value) is not kind:
            raise InputError(f"its pickle has {_named(value)} where {kind.__name__.strip('_')} belongs. {_COPY_AGAIN}")
        return value

    def _text(self, length: int) -> str:
        self._budget.spend(7 * length)  # a character may take four bytes, and once more while it is decoded
        return self._source.read(length).decode()

    def _put(self, place: int) -> None:
        # Python and PyTorch number from 0; free choice would let a file choose numbers that collide in a dict.
        if place != len(self._memo):
            raise InputError(f"its pickle stores value {place} after {len(self._memo)} others. {_COPY_AGAIN}")
        self._memo.append(self._stack[-1])

    def _proto(self) -> None:
        if (version := self._source.number("<B")) > 5:
            raise InputError(f"is a pickle of protocol {version}; expected at most 5")

    def _frame(self) -> None:
        self._source.read(8)

    def _memoize(self) -> None:
        self._put(len(self._memo))

    def _long1(self) -> None:
        n_bytes = self._source.number("<B")
        self._budget.spend(2 * n_bytes)
        self._stack.append(int.from_bytes(self._source.read(n_bytes), "little", signed=True))

    def _mark(self) -> None:
        self._outer.append(self._stack)
        self._stack = []

    def _since_mark(self, cost: int) -> list[Any]:
        items, self._stack = self._stack, self._outer.pop()
        self._budget.spend(cost * len(items))
        return items

    def _tuple(self) -> None:
        items = tuple(self._since_mark(_ITEM_COST))
        self._stack.append(items)

    def _empty_list(self) -> None:
        self._stack.append([])

    def _empty_dict(self) -> None:
        self._stack.append({})

    def _append(self) -> None:
        value = self._stack.pop()
        self._top(list).append(value)

    def _appends(self) -> None:
        items = self._since_mark(_ITEM_COST)
        self._top(list).extend(items)

    def _setitem(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._budget.spend(_ENTRY_COST)
        self._set(self._top(dict), key, value)

    def _setitems(self) -> None:
        items = self._since_mark(_ENTRY_COST)
        target = self._top(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            self._set(target, key, value)

    @staticmethod
    def _set(target: dict, key: Any, value: Any) -> None:
        if type(key) is not str and not (type(key) is int and 0 <= key < _MOST_INDEX):
            raise InputError(
                f"a dict has a key of type {_named(key)}; expected strings or integers below {_MOST_INDEX}"
            )
        target[key] = value

    def _global(self) -> None:
        module = self._source.line()
        self._refer(module, self._source.line())

    def _stack_global(self) -> None:
        name = self._pop(str)
        self._refer(self._pop(str), name)

    def _refer(self, module: str, name: str) -> None:
        full = f"{module}.{name}"[:_LONGEST_NAME]
        if full not in _GLOBALS:
            raise InputError(
                f"refers to {full}, which is refused. Expected plain values and tensors of float32, float16, bfloat16 "
                "or int64 alone: save it again with nothing else in it"
            )
        self._stack.append(_GLOBALS[full])

    def _newobj(self) -> None:
        arguments, kind = self._pop(tuple), self._stack.pop()
        if kind is not _Global.NAMESPACE or arguments:
            raise InputError(f"makes {_named(kind)} without a call; expected only argparse.Namespace")
        fields: dict[str, Any] = {}
        self._namespaces[id(fields)] = fields
        self._stack.append(fields)

    def _build(self) -> None:
        state, target = self._pop(dict), self._top(dict)
        if id(target) in self._namespaces and not target:
            self._budget.spend(_ENTRY_COST * len(state))
            target.update(state)
        elif len(state) > 1 or not state.keys() <= {"_metadata"}:
            raise InputError("sets attributes of a dict; expected only _metadata, which a state dict has")

    def _reduce(self) -> None:
        arguments, function = self._pop(tuple), self._stack.pop()
        if function is _Global.ORDERED_DICT and not arguments:
            self._stack.append({})
        elif function is _Global.TENSOR:
            self._stack.append(self._tensor(arguments))
        else:
            raise InputError(f"calls {_named(function)} with {len(arguments)} arguments, which is refused")

    def _binpersid(self) -> None:
        named = self._pop(tuple)
        if len(named) == 6 and named[5] is None:  # a view in the older layout; PyTorch writes none
            named = named[:5]
        if [type(part) for part in named] != [str, _Global, str, str, int] or named[1] not in _DTYPES or named[4] < 0:
            raise InputError(f"its pickle names a storage in an unknown way. {_COPY_AGAIN}")
        _, kind, key, _, size = named
        storage = self._storages.setdefault(key, _Storage(key, _DTYPES[kind], size))
        if (storage.dtype, storage.size) != (_DTYPES[kind], size):
            raise InputError(f"storage {_shown(key)} is described in two ways. {_COPY_AGAIN}")
        self._stack.append(storage)

    def _tensor(self, arguments: tuple) -> StoredTensor:
        """What `torch._utils._rebuild_tensor_v2` makes of its arguments."""
        if len(arguments) not in (6, 7):
            raise InputError(f"a tensor is made of {len(arguments)} parts; expected 6 or 7. {_COPY_AGAIN}")
        storage, offset, shape, strides, _, hooks, *metadata = arguments
        self._is(storage, _Storage)
        if self._is(hooks, dict) or (any(metadata) and any(self._is(metadata[0], dict).values())):
            raise InputError("a tensor has hooks, or is a negated or conjugated view; expected plain numbers")
        numbers = (offset, *self._is(shape, tuple)[: _MOST_AXES + 1], *self._is(strides, tuple)[: _MOST_AXES + 1])
        valid = len(shape) == len(strides) <= _MOST_AXES and all(type(n) is int and n >= 0 for n in numbers)
        if not valid or not _fits(storage, offset, shape, strides):
            raise InputError(f"a tensor reaches outside its storage {_shown(storage.key)}. {_COPY_AGAIN}")
        return StoredTensor(shape, storage.dtype, self._file, storage, offset, strides)


def _fits(storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether a view stays in its storage and shows no more numbers than there are."""
    if 0 in shape:
        return math.prod(max(n, 1) for n in shape) <= 2**32  # an array that NumPy can make
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    return last < storage.size and math.prod(shape) <= storage.size


_INSTRUCTIONS = {
    "APPEND": _Pickle._append,
    "APPENDS": _Pickle._appends,
    "BINPERSID": _Pickle._binpersid,
    "BUILD": _Pickle._build,
    "EMPTY_DICT": _Pickle._empty_dict,
    "EMPTY_LIST": _Pickle._empty_list,
    "FRAME": _Pickle._frame,
    "GLOBAL": _Pickle._global,
    "LONG1": _Pickle._long1,
    "MARK": _Pickle._mark,
    "MEMOIZE": _Pickle._memoize,
    "NEWOBJ": _Pickle._newobj,
    "PROTO": _Pickle._proto,
    "REDUCE": _Pickle._reduce,
    "SETITEM": _Pickle._setitem,
    "SETITEMS": _Pickle._setitems,
    "STACK_GLOBAL": _Pickle._stack_global,
    "TUPLE": _Pickle._tuple,
}
