"""TorchFile against files that PyTorch wrote, against Python's zipfile, and against hostile files.

samples/make_samples.py tells how PyTorch made the samples.
"""

import contextlib
import importlib.util
import io
import pickletools
import random
import struct
import sys
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_writer import Raw, archive, call, encode, legacy_file, named, pickled, storage, tensor, zip_file

from synbrain_jax.errors import InputError
from synbrain_jax.interop import torch_file
from synbrain_jax.interop.torch_file import StoredTensor, TorchFile

SAMPLES = Path(__file__).parent / "samples"
GOLDEN = Path(__file__).parents[1] / "golden"
EXPECTED = dict(np.load(SAMPLES / "expected.npz"))
LAYOUTS = ["zip.pt", "legacy.pt", "zip_protocol_5.pt", "legacy_protocol_4.pt"]
DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.int64]
SIX = np.arange(6, dtype=np.float32)
NUMBERS = SIX.tobytes()
many_examples = settings(max_examples=150, deadline=None, derandomize=True, database=None)


def without_type_checks(module: ModuleType) -> ModuleType:
    """The module once more, without conftest's checks of every call, which take ten times its time."""
    spec = importlib.util.spec_from_file_location(f"fast_{module.__name__.rpartition('.')[2]}", module.__file__)
    sys.modules[spec.name] = again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    return again


fast = without_type_checks(torch_file)


@pytest.fixture(scope="module")
def at(tmp_path_factory) -> Callable[[bytes], Path]:
    """A file of the given bytes, always the same one."""
    path = tmp_path_factory.mktemp("torch") / "sample.pt"

    def write(content: bytes) -> Path:
        path.write_bytes(content)
        return path

    return write


def arrays(content: Any) -> Any:
    """The content with all tensors read."""
    if isinstance(content, dict):
        return {key: arrays(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return type(content)(map(arrays, content))
    return content.read() if isinstance(content, StoredTensor | fast.StoredTensor) else content


def read(path: Path, module: ModuleType = torch_file) -> Any:
    with module.TorchFile(path) as file:
        return arrays(file.content)


def same(one: Any, other: Any) -> bool:
    """Equal values of the same types, to the bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, np.ndarray):
        return (one.shape, one.dtype, one.tobytes()) == (other.shape, other.dtype, other.tobytes())
    return repr(one) == repr(other)


# --- what PyTorch wrote ---


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_and_protocol_gives_what_was_saved(name):
    with TorchFile(SAMPLES / name) as file:
        content = file.content
        tensors = content.pop("model")
        assert type(tensors) is dict
        assert list(tensors) == list(EXPECTED)
        for key, expected in EXPECTED.items():
            array = tensors[key].read()
            kind = np.dtype(ml_dtypes.bfloat16) if key == "bfloat16" else expected.dtype
            assert array.flags.c_contiguous, key
            assert (array.dtype, tensors[key].dtype, tensors[key].shape) == (kind, kind, expected.shape), key
            np.testing.assert_array_equal(array.astype(expected.dtype), expected, err_msg=key, strict=True)
        step = content["opt"]["state"][0].pop("step")
        assert (step.shape, float(step.read())) == ((), 3)
    assert same(
        content,
        {
            "args": {
                "lr": 1e-4,
                "name": "ünicode",
                "betas": (0.9, 0.999),
                "resume": None,
                "ema": True,
                "sizes": [1, 300, 70000],
            },
            "opt": {"state": {0: {}, 1: {}}, "param_groups": [{"params": [0, 1]}]},
            "steps": -5,
            "large": 2**40,
        },
    )


def test_a_tensor_that_was_on_a_gpu():
    assert b"cuda:0" in (SAMPLES / "cuda.pt").read_bytes()
    np.testing.assert_array_equal(read(SAMPLES / "cuda.pt")["on a GPU"], EXPECTED["float32"])


@pytest.mark.parametrize(("name", "message"), [("negated.pt", "negated"), ("script.pt", "TorchScript archive")])
def test_what_pytorch_writes_but_we_do_not_read(name, message):
    with pytest.raises(InputError, match=f"{name}: .*{message}"):
        TorchFile(SAMPLES / name)


@pytest.mark.parametrize(
    ("name", "optimizer", "steps"), [("ckpt_vae/last.pth", "optimizer", 3), ("ckpt_sit/last.pt", "opt", 5)]
)
def test_checkpoints_of_the_released_system(name, optimizer, steps):
    with TorchFile(GOLDEN / name) as file, zipfile.ZipFile(GOLDEN / name) as archived:
        data = [info for info in archived.infolist() if "/data/" in info.filename]
        tensors = [*file.content["model"].values(), *file.content.get("ema", {}).values()]
        for state in file.content[optimizer]["state"].values():
            assert state["step"].read() == steps
            tensors += [state["step"], state["exp_avg"], state["exp_avg_sq"]]
        held = sorted(tensor.read().tobytes() for tensor in tensors)
        assert held == sorted(archived.read(info) for info in data)
        if "args" in file.content:
            assert (file.content["args"]["model_depth"], file.content["steps"]) == (2, 5)


# --- what a reader may rely on ---


@pytest.mark.parametrize(
    ("shape", "strides", "offset"),
    [
        ((2, 3), (3, 1), 0),
        ((3, 2), (1, 3), 0),
        ((2,), (2,), 1),
        ((), (), 5),
        ((1, 3), (999, 2), 1),
        ((2, 2), (1, 1), 2),
    ],
)
def test_views_show_the_numbers_that_their_strides_say(at, shape, strides, offset):
    path = at(zip_file(pickled([tensor(shape, strides, offset)]), {"0": NUMBERS}))
    expected = np.zeros(shape, np.float32)
    for index in np.ndindex(shape):
        expected[index] = SIX[offset + sum(i * s for i, s in zip(index, strides, strict=True))]
    [array] = read(path)
    np.testing.assert_array_equal(array, expected, strict=True)
    assert array.flags.c_contiguous
    assert array.base is None or array.base.nbytes == array.nbytes, "the array keeps more in memory than it shows"


def test_shared_storages_and_the_memo(at):
    one = Raw(tensor((3,), (1,), 3) + b"q\x00")
    path = at(zip_file(pickled([one, Raw(b"h\x00"), tensor((6,), (1,)), tensor((0, 7), (7, 1))]), {"0": NUMBERS}))
    with TorchFile(path) as file:
        assert file.content[0] is file.content[1]
    assert same(read(path), [SIX[3:], SIX[3:], SIX, np.empty((0, 7), np.float32)])


def test_metadata_of_a_state_dict_and_of_a_tensor(at):
    ordered = Raw(call("collections.OrderedDict") + encode({"_metadata": {"": {"version": 1}}}) + b"b")
    plain = tensor(rest=(None,)), tensor(rest=({},)), tensor(rest=({"conj": False},))
    path = at(zip_file(pickled([ordered, *plain]), {"0": NUMBERS}))
    assert same(read(path), [{}] + 3 * [SIX.reshape(2, 3)])


def test_only_the_storage_of_a_tensor_is_read(at):
    large = 8 * 2**20
    two = [tensor((6,), (1,)), tensor((large // 4,), (1,), key="1", size=large // 4)]
    content = bytearray(zip_file(pickled(two), {"0": NUMBERS, "1": bytes(large)}))
    content[-large // 2] ^= 1
    with TorchFile(at(bytes(content))) as file:
        tracemalloc.start()
        np.testing.assert_array_equal(file.content[0].read(), SIX)
        assert tracemalloc.get_traced_memory()[1] < 100_000
        tracemalloc.stop()
        with pytest.raises(InputError, match=r"sample\.pt: member 'sample/data/1' differs from its checksum"):
            file.content[1].read()


def test_a_closed_file(at):
    with TorchFile(at(zip_file(pickled(tensor()), {"0": NUMBERS}))) as file:
        pass
    assert repr(file.content) == "StoredTensor(shape=(2, 3), dtype=float32)"
    with pytest.raises(InputError, match=r"sample\.pt: is closed; read its tensors inside"):
        file.content.read()


def test_members_that_need_64_bits(at, monkeypatch):
    """Python's zipfile writes the wide fields if it is told that 32 bits end at 10."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 10)
    content = zip_file(pickled(tensor()), {"0": NUMBERS})
    assert content.count(b"\xff\xff\xff\xff") > 4
    assert same(read(at(content)), SIX.reshape(2, 3))


# --- what is refused ---


def zipped(value: Any, storages: dict[str, bytes] | None = None, **options: Any) -> bytes:
    return zip_file(pickled(value), {"0": NUMBERS} if storages is None else storages, **options)


def legacy(value: Any, *storages: tuple[str, int, bytes], **options: Any) -> bytes:
    return legacy_file(pickled(value), {key: (count, content) for key, count, content in storages}, **options)


def nested(levels: int) -> Raw:
    return Raw(levels * b"]" + (levels - 1) * b"a")


def doubled(levels: int) -> Raw:
    """A list of twice a list of twice a list..."""
    built = b"]q\x00"
    for level in range(levels):
        built += b"](h" + bytes([level]) * 1 + b"h" + bytes([level]) + b"eq" + bytes([level + 1])
    return Raw(b"(" + built + b"t")


def patched(content: bytes, layout: str, place: int, value: int, signature: bytes = b"PK\1\2", last=False) -> bytes:
    """A number changed in the first or last record of a zip archive that has the signature."""
    start = (content.rindex if last else content.index)(signature) + place
    return content[:start] + struct.pack(layout, value) + content[start + struct.calcsize(layout) :]


GOOD = zipped(tensor())
MEMBERS = [("sample/data.pkl", pickled(tensor())), ("sample/data/0", NUMBERS)]
REFUSED = {
    "empty": (b"", "is not a PyTorch checkpoint: it is empty. Expected a file by torch.save"),
    "text": (b"Hello, world", "is not a PyTorch checkpoint: it begins with b'Hello, w'"),
    "safetensors": (struct.pack("<Q", 2) + b"{}", "is not a PyTorch checkpoint"),
    "plain pickle": (pickled({}), "is not a PyTorch checkpoint"),
    "other zip": (archive([("word/document.xml", b"")]), "0 members NAME/data.pkl"),
    "two checkpoints": (archive([("a/data.pkl", pickled(1)), ("b/data.pkl", pickled(1))]), "2 members NAME/data.pkl"),
    "deep data.pkl": (archive([("a/b/data.pkl", pickled(1))]), "0 members NAME/data.pkl"),
    "program": (archive([*MEMBERS, ("sample/code/x.py", b"")]), "TorchScript archive"),
    "constants": (archive([*MEMBERS, ("sample/constants.pkl", b"")]), "TorchScript archive"),
    "cut short": (GOOD[:-1], "the archive's end record is not where"),
    "cut to its head": (GOOD[:10], "expected"),
    "with a tail": (GOOD + b"\0", "the archive's end record is not where"),
    "with a head": (GOOD[:4] + GOOD, "does not end at its end record"),
    "comment": (GOOD[:-2] + b"\1\0", "comment"),
    "fewer entries": (patched(GOOD, "<H", 10, 3, b"PK\5\6"), "its directory has 4 entries; expected 3"),
    "compressed": (archive(MEMBERS, zipfile.ZIP_DEFLATED), "compressed or encrypted"),
    "encrypted": (patched(GOOD, "<H", 8, 1), "compressed or encrypted"),
    "two sizes": (patched(GOOD, "<I", 20, 1), "compressed or encrypted"),
    "compressed inside": (patched(GOOD, "<H", 8, 8, b"PK\3\4"), "contradicts the archive's directory"),
    "encrypted inside": (patched(GOOD, "<H", 6, 1, b"PK\3\4"), "contradicts the archive's directory"),
    "other name inside": (GOOD.replace(b"data.pkl", b"data.pkk", 1), "contradicts the archive's directory"),
    "long extra inside": (patched(GOOD, "<H", 28, 1, b"PK\3\4"), "overlaps"),
    "overlapping unread": (
        patched(patched(GOOD, "<I", 20, 900, last=True), "<I", 24, 900, last=True),
        "member 'sample/version' overlaps with what follows",
    ),
    "overlapping": (patched(patched(GOOD, "<I", 20, 900), "<I", 24, 900), "overlaps with what follows"),
    "twice": (archive([*MEMBERS, MEMBERS[1]]), "'sample/data/0' is there twice"),
    "checksum of the pickle": (patched(GOOD, "<I", 16, 0), "'sample/data.pkl' differs from its checksum"),
    "big-endian": (zipped(1, byteorder=b"big"), "byte order b'big'; expected b'little'"),
    "missing storage": (zipped(tensor(key="1")), "'sample/data/1' is missing"),
    "short storage": (zipped(tensor(size=7)), "has 24 bytes; expected 28, for 7 numbers of float32"),
    "long storage": (zipped(tensor((5,), (1,), size=5)), "has 24 bytes; expected 20"),
    "after the pickle": (zip_file(pickled(1) + b"N", {}), "1 bytes follow the pickle"),
    "no end": (zip_file(pickled(1)[:-1], {}), "ends too early"),
    "two values": (zipped(Raw(b"NN")), "ends with 2 values"),
    "open mark": (zipped(Raw(b"(N")), "ends with 1 values"),
    "no value": (zipped(Raw(b"")), "ends with 0 values"),
    "nothing to take": (zipped(Raw(b"R")), "sample.pt: IndexError"),
    "protocol 6": (zip_file(pickled(1, protocol=6), {}), "protocol 6; expected at most 5"),
    "os.system": (zipped(call("os.system", "true")), "refers to os.system, which is refused"),
    "eval": (zipped(call("builtins.eval", "1")), "refers to builtins.eval, which is refused"),
    "DoubleStorage": (zipped(tensor(kind="DoubleStorage")), "refers to torch.DoubleStorage, which is refused"),
    "NumPy": (zipped(call("numpy.core.multiarray._reconstruct")), "refers to numpy.core.multiarray._reconstruct"),
    "dotted name": (zipped(Raw(b"ctorch\nFloatStorage.x\n")), "refers to torch.FloatStorage.x, which"),
    "on the stack": (zipped(Raw(encode("os") + encode("system") + b"\x93")), "refers to os.system, which"),
    "endless name": (zipped(Raw(b"c" + 500 * b"x" + b"\ny\n")), "has no end"),
    "class as a value": (zipped([named("torch.FloatStorage")]), "holds torch.FloatStorage by itself"),
    "storage as a value": (zipped([storage()]), "holds Storage by itself"),
    "called storage": (zipped(call("torch.FloatStorage")), "calls torch.FloatStorage"),
    "filled OrderedDict": (zipped(call("collections.OrderedDict", [])), "calls collections.OrderedDict with 1"),
    "called string": (zipped(Raw(encode("os.system") + b")R")), "calls str with 0"),
    "made OrderedDict": (zipped(Raw(named("collections.OrderedDict") + b")\x81")), "makes collections.OrderedDict"),
    "Namespace of something": (zipped(Raw(named("argparse.Namespace") + b"(Nt\x81")), "makes argparse.Namespace"),
    "filled Namespace": (
        zipped(Raw(named("argparse.Namespace") + b")\x81" + 2 * (encode({"a": 1, "b": 1}) + b"b"))),
        "sets attributes of a dict",
    ),
    "attributes": (zipped(Raw(encode({}) + encode({"__class__": 1}) + b"b")), "sets attributes of a dict"),
    "built tensor": (zipped(Raw(tensor() + encode({}) + b"b")), "has StoredTensor where dict belongs"),
    "INST": (zipped(Raw(b"(ios\nsystem\n")), "the instruction INST, which"),
    "OBJ": (zipped(Raw(b"(o")), "the instruction OBJ, which"),
    "EXT1": (zipped(Raw(b"\x82\1")), "the instruction EXT1, which"),
    "PERSID": (zipped(Raw(b"Pos\n")), "the instruction PERSID, which"),
    "INT": (zipped(Raw(b"I" + 5000 * b"1" + b"\n")), "the instruction INT, which"),
    "LONG4": (zipped(Raw(b"\x8b\xff\xff\xff\x7f")), "the instruction LONG4, which"),
    "BYTEARRAY8": (zipped(Raw(b"\x96" + 8 * b"\x7f")), "the instruction BYTEARRAY8, which"),
    "unknown instruction": (zipped(Raw(b"\xff")), r"byte b'\xff' at"),
    "string of 2**62": (zipped(Raw(b"\x8d" + struct.pack("<Q", 2**62))), "needs more than"),
    "string of 2**20": (zipped(Raw(b"X" + struct.pack("<I", 2**19))), "ends too early"),
    "not UTF-8": (zipped(Raw(b"X\1\0\0\0\xff")), "UnicodeDecodeError"),
    "tuple key": (zipped({(): 1}), "a dict has a key of type tuple; expected strings or integers below 1048576"),
    "bool key": (zipped({True: 1}), "a dict has a key of type bool"),
    "float key": (zipped({0.0: 1}), "a dict has a key of type float"),
    "negative key": (zipped({-1: 1}), "a dict has a key of type int"),
    "large key": (zipped({2**20: 1}), "a dict has a key of type int"),
    "one key set": (zipped(Raw(b"}(" + encode(1) + b"u")), "sample.pt: ValueError"),
    "list as a dict": (zipped(Raw(b"]" + encode("a") + b"Ns")), "has list where dict belongs"),
    "dict as a list": (zipped(Raw(b"}Na")), "has dict where list belongs"),
    "skipped memo": (zipped(Raw(b"Nq\1")), "stores value 1 after 0 others"),
    "empty memo": (zipped(Raw(b"h\0")), "sample.pt: IndexError"),
    "nests": (zipped(nested(40)), "nested in more than 32 levels"),
    "cycle": (zipped(Raw(b"]q\0h\0a")), "nested in more than 32 levels, or in themselves"),
    "deep nest": (zipped(nested(20_000)), "nested in more than 32 levels"),
    "blow-up": (zipped(doubled(30)), "needs more than"),
    "outside": (zipped(tensor((2, 3), (3, 1), 1)), "reaches outside its storage '0'"),
    "outside by strides": (zipped(tensor((2, 2), (4, 2))), "reaches outside its storage '0'"),
    "expanded": (zipped(tensor((7,), (0,))), "reaches outside its storage '0'"),
    "negative offset": (zipped(tensor((2,), (1,), -1)), "reaches outside its storage '0'"),
    "negative stride": (zipped(tensor((2,), (-1,), 3)), "reaches outside its storage '0'"),
    "negative size": (zipped(tensor((-1, -6), (1, 1))), "reaches outside its storage '0'"),
    "fraction": (zipped(tensor((2.0,), (1,))), "reaches outside its storage '0'"),
    "fewer strides": (zipped(tensor((2, 3), (1,))), "reaches outside its storage '0'"),
    "65 axes": (zipped(tensor(65 * (1,), 65 * (1,))), "reaches outside its storage '0'"),
    "large and empty": (zipped(tensor((0, 2**62, 2**62), (1, 1, 1))), "reaches outside its storage '0'"),
    "multiplied": (
        zip_file(pickled(10 * [tensor((2**18,), (1,), size=2**18)]), {"0": bytes(2**20)}),
        "its tensors share their numbers",
    ),
    "shape as a list": (zipped(tensor([2, 3])), "has list where tuple belongs"),
    "hooks": (
        zipped(call("torch._utils._rebuild_tensor_v2", storage(), 0, (1,), (1,), True, {"a": 1})),
        "has hooks, or is a negated",
    ),
    "five parts": (zipped(call("torch._utils._rebuild_tensor_v2", storage(), 0, (1,), (1,), True)), "made of 5 parts"),
    "tensor of a string": (
        zipped(call("torch._utils._rebuild_tensor_v2", "0", 0, (1,), (1,), True, {})),
        "has str where Storage belongs",
    ),
    "negative storage": (zipped(tensor(size=-1)), "names a storage in an unknown way"),
    "number as a key": (zipped(tensor(key=0)), "names a storage in an unknown way"),
    "fraction of storage": (zipped(tensor(size=6.0)), "names a storage in an unknown way"),
    "storage of a function": (
        zipped(Raw(encode(("storage", named("argparse.Namespace"), "0", "cpu", 6)) + b"Q")),
        "unknown way",
    ),
    "view of a storage": (zipped([storage("FloatStorage", "0", 6, "cpu", ("1", 0, 3))]), "unknown way"),
    "storage in two ways": (zipped([tensor(), tensor(kind="LongStorage")]), "'0' is described in two ways"),
    "legacy: other protocol": (legacy(1, protocol=1000), "unknown header"),
    "legacy: big-endian": (legacy(1, little_endian=False), "big-endian"),
    "legacy: cut short": (legacy(tensor(), ("0", 6, NUMBERS))[:-1], "expected"),
    "legacy: tail": (legacy(tensor(), ("0", 6, NUMBERS)) + b"\0", "1 bytes before the end of the file"),
    "legacy: wrong count": (legacy(tensor(), ("0", 5, NUMBERS)), "has 20 bytes; expected 24"),
    "legacy: negative count": (legacy(tensor(), ("0", -6, NUMBERS)), "has -24 bytes; expected 24"),
    "legacy: missing": (legacy(tensor()), "1 storages are used, 0 are there"),
    "legacy: unused": (legacy(1, ("0", 6, NUMBERS)), "storage '0' is not used, or listed twice"),
    "legacy: keys": (legacy(1)[: -len(pickled([]))] + pickled([{}]), "not a list of names"),
    "legacy: listed twice": (
        legacy(tensor())[: -len(pickled([]))] + pickled(["0", "0"]) + 2 * (struct.pack("<q", 6) + NUMBERS),
        "storage '0' is not used, or listed twice",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused_with_a_message_that_says_why(at, name):
    content, message = REFUSED[name]
    path = at(content)
    with pytest.raises(InputError) as error:
        fast.TorchFile(path)
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)
    assert len(str(error.value)) < 600


def test_no_such_file_and_a_folder(tmp_path):
    for path in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(InputError, match=r"cannot be opened .*; expected a file by torch\.save"):
            TorchFile(epath.Path(path))


@pytest.mark.parametrize("name", ["os.mkdir", "posix.mkdir", "builtins.open"])
@pytest.mark.parametrize("wrap", [zipped, legacy])
def test_nothing_is_executed(at, tmp_path, wrap, name):
    canary = str(tmp_path / "canary")
    for arguments in [(canary,), (canary, 0o777)]:
        with pytest.raises(InputError, match=f"refers to {name}"):
            TorchFile(at(wrap(call(name, *arguments))))
    assert not Path(canary).exists()


def test_memory_errors_are_not_called_damage(at, monkeypatch):
    def exhausted(*arguments):
        raise MemoryError

    with TorchFile(at(GOOD)) as file:
        monkeypatch.setattr(np, "ndarray", exhausted)
        with pytest.raises(MemoryError):
            file.content.read()


# --- time and memory ---

SLACK = 5 * 2**20  # 4 MiB of values, and the reader itself


def cost(path: Path) -> tuple[float, int]:
    """Seconds of the processor, and bytes of memory at the peak, for reading all tensors one at a time."""

    def visit(value: Any) -> None:
        if isinstance(value, fast.StoredTensor):
            value.read()
        elif isinstance(value, list | tuple | dict):
            for item in value.values() if isinstance(value, dict) else value:
                visit(item)

    start = time.process_time()
    tracemalloc.start()
    try:
        with contextlib.suppress(InputError), fast.TorchFile(path) as file:
            visit(file.content)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return time.process_time() - start, peak


SIZE = 2**18  # of the files that follow
GREEDY = {
    "lists": Raw(SIZE * b"]"),
    "dicts": Raw(SIZE * b"}"),
    "marks": Raw(SIZE * b"("),
    "nests": nested(SIZE // 2),
    "nested tuples": Raw(b"N" + SIZE * b"\x85"),
    "nones": Raw(SIZE * b"N"),
    "numbers": Raw(b"](" + SIZE // 3 * b"M\xff\xff" + b"e"),
    "large numbers": Raw(b"](" + SIZE // 9 * (b"\x8a\x07" + 7 * b"\x7f") + b"e"),
    "small dicts": Raw(b"](" + SIZE // 6 * b"}K\x01Ns" + b"e"),
    "storages": Raw(
        b"".join(encode(("storage", named("torch.FloatStorage"), f"{i}", "", 0)) + b"Q" for i in range(9999))
    ),
    "memo": Raw(b"N" + SIZE * b"\x94"),
    "wide string": Raw(b"X" + struct.pack("<I", SIZE) + (SIZE - 4) * b"a" + "\N{BRAIN}".encode()),
    "same text": Raw(encode(SIZE // 10 * "a") + b"q\0" + SIZE // 3 * b"h\0\x85"),
    "namespaces": Raw(
        encode({f"{i}": i for i in range(9999)})
        + b"q\0"
        + b"("
        + 9999 * (named("argparse.Namespace") + b")\x81h\0b")
        + b"t"
    ),
    "shared tensor": Raw(b"](" + tensor((SIZE // 4,), (1,), size=SIZE // 4) + b"q\0" + SIZE // 2 * b"h\0" + b"e"),
}


@pytest.mark.parametrize("name", GREEDY)
def test_memory_and_time_are_bounded_by_the_size(at, name):
    content = zipped(GREEDY[name], {"0": bytes(SIZE)} if name == "shared tensor" else {})
    seconds, peak = cost(at(content))
    assert peak <= 2 * len(content) + SLACK
    assert seconds < 20


def test_memory_for_many_members_is_bounded_by_the_size(at):
    content = archive([(f"{i}", b"") for i in range(30_000)])
    assert cost(at(content))[1] <= 2 * len(content) + SLACK / 2


def test_memory_for_a_large_dict_is_bounded_by_the_size(at):
    entries = b"".join(b"J" + struct.pack("<i", i) + b"N" for i in range(90_000))
    content = zipped(Raw(b"}(" + entries + b"u"), {"unused": bytes(2**21)})
    assert cost(at(content))[1] <= 2 * len(content) + SLACK


@pytest.mark.parametrize("strides", [(1, 2000), (2000, 1)])
@pytest.mark.parametrize("wrap", [0, 1])
def test_memory_for_a_large_tensor_is_bounded_by_the_size(at, strides, wrap):
    numbers = np.arange(4_000_000, dtype=np.float32)
    large = tensor((2000, 2000), strides, size=4_000_000)
    raw = numbers.tobytes()
    content = legacy(large, ("0", 4_000_000, raw)) if wrap else zipped(large, {"0": raw})
    path = at(content)
    assert cost(path)[1] <= 2 * len(content) + SLACK
    square = numbers.reshape(2000, 2000)
    np.testing.assert_array_equal(read(path), square if strides[1] == 1 else square.T)


def test_memory_for_values_and_a_large_tensor_together_is_bounded_by_the_size(at):
    numbers = Raw(b"](" + 250_000 * b"M\xff\xff" + b"e")
    content = zipped([numbers, tensor((2, 2**20), (1, 2), size=2**21)], {"0": bytes(2**23)})
    assert cost(at(content))[1] <= 2 * len(content) + SLACK


def test_long_lists_of_numbers_are_not_refused(at):
    """Losses of every iteration beside the weights of a model."""
    losses = [0.5 + i for i in range(100_000)]
    model = [tensor((2**18,), (1,), key=f"{i}", size=2**18) for i in range(8)]
    content = zipped({"losses": losses, "model": model}, {f"{i}": bytes(2**20) for i in range(8)})
    with fast.TorchFile(at(content)) as file:
        assert file.content["losses"] == losses


# --- any bytes ---

ORIGINALS = {name: (SAMPLES / name).read_bytes() for name in LAYOUTS}
RIGHT = {name: read(SAMPLES / name) for name in LAYOUTS}


@st.composite
def mutated(draw: Callable, original: bytes) -> bytes:
    """The file with up to three bytes changed, pieces taken out, put in, or copied from elsewhere; or cut short."""
    content = bytearray(original)
    for _ in range(draw(st.integers(1, 3))):
        start, stop = sorted(draw(st.tuples(st.integers(0, len(content)), st.integers(0, len(content)))))
        match draw(st.sampled_from(["flip", "set", "delete", "insert", "copy", "cut"])):
            case "flip" if start < len(content):
                content[start] ^= 1 << draw(st.integers(0, 7))
            case "set" if start < len(content):
                content[start] = draw(st.integers(0, 255))
            case "delete":
                del content[start : min(stop, start + 8)]
            case "insert":
                content[start:start] = draw(st.binary(max_size=8))
            case "copy":
                content[start : start + 16] = content[stop : stop + 16]
            case "cut":
                del content[stop:]
    return bytes(content)


def plain(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.dtype in DTYPES and value.flags.c_contiguous
    if isinstance(value, dict):
        return all(type(key) in (str, int) and plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(plain, value))
    return type(value) in (str, int, float, bool, type(None))


def outcome(path: Path) -> Any:
    """The content, or InputError; asserts that neither took much."""
    seconds, peak = cost(path)
    assert peak <= 2 * path.stat().st_size + SLACK
    assert seconds < 5
    try:
        return read(path, fast)
    except InputError as error:
        return error


@pytest.mark.parametrize("name", ["zip.pt", "zip_protocol_5.pt"])
@many_examples
@given(data=st.data())
def test_a_damaged_archive_is_refused_or_read_right(at, name, data):
    found = outcome(at(data.draw(mutated(ORIGINALS[name]))))
    assert isinstance(found, InputError) or same(found, RIGHT[name])


@pytest.mark.parametrize("name", ["legacy.pt", "legacy_protocol_4.pt"])
@many_examples
@given(data=st.data())
def test_a_damaged_older_file_is_refused_or_plain(at, name, data):
    """It has no checksums: a changed letter in a name is a valid file."""
    found = outcome(at(data.draw(mutated(ORIGINALS[name]))))
    assert isinstance(found, InputError) or plain(found)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_file_that_ends_early_is_refused(at, name):
    for end in random.Random(0).sample(range(len(ORIGINALS[name])), 150):
        with pytest.raises(InputError):
            fast.TorchFile(at(ORIGINALS[name][:end]))


@pytest.mark.parametrize("name", ["zip.pt", "zip_protocol_5.pt"])
@many_examples
@given(data=st.data())
def test_any_pickle_in_a_sound_archive_is_refused_or_plain(at, name, data):
    with zipfile.ZipFile(io.BytesIO(ORIGINALS[name])) as file:
        members = {info.filename: file.read(info) for info in file.infolist()}
    key = name.replace(".pt", "/data.pkl")
    pickle = data.draw(mutated(members[key]))
    found = outcome(at(archive([*(members | {key: pickle}).items()])))
    assert isinstance(found, InputError) or plain(found)


INSTRUCTIONS = [
    *(encode(value) for value in (None, True, 1, 6, 2**40, 0.5, "0", "storage", "cpu", (), (1,), [], {}, {"a": 1})),
    *(named(f"collections.{name}") for name in ("OrderedDict", "deque")),
    *(named(f"torch.{name}") for name in ("FloatStorage", "LongStorage", "_utils._rebuild_tensor_v2")),
    *(named("argparse.Namespace"), storage(), tensor(), tensor((3, 2), (1, 3)), call("os.mkdir", "canary")),
    *(opcode.code.encode("latin-1") for opcode in pickletools.opcodes),
    *(opcode.code.encode("latin-1") + b"\0" for opcode in pickletools.opcodes),
    *(b"q" + bytes([i]) for i in range(4)),
    *(b"h" + bytes([i]) for i in range(4)),
]


@many_examples
@given(
    program=st.lists(st.sampled_from(INSTRUCTIONS), max_size=30), ending=st.sampled_from([b"", b"t", b"e", b"u", b"R"])
)
def test_any_program_is_refused_or_plain(at, program, ending):
    path = at(zip_file(b"\x80\2(" + b"".join(program) + ending + b".", {"0": NUMBERS}))
    found = outcome(path)
    assert isinstance(found, InputError) or plain(found)
    assert not Path("canary").exists()
    assert not (path.parent / "canary").exists()


@many_examples
@given(content=st.binary(max_size=200), head=st.sampled_from([b"", b"PK\3\4", legacy(1)[:15], legacy(1)[:50]]))
def test_any_bytes_are_refused(at, content, head):
    assert isinstance(outcome(at(head + content)), InputError)
