"""Writes checkpoints like torch.save's, right or hostile, without torch: pickles put together from instructions."""

import io
import struct
import warnings
import zipfile
from typing import Any

MAGIC = 0x1950A86A20F9469CFC6C


class Raw(bytes):
    """Instructions that stand for a value."""


def encode(value: Any) -> bytes:
    """Instructions that build the value, in protocol 2 and without the memo."""
    match value:
        case Raw():
            return value
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int() if -(2**31) <= value < 2**31:
            return b"J" + struct.pack("<i", value)
        case int():
            return b"\x8a\x20" + value.to_bytes(32, "little", signed=True)
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case tuple():
            return b"(" + b"".join(map(encode, value)) + b"t"
        case list():
            return b"](" + b"".join(map(encode, value)) + b"e"
        case dict():
            return b"}(" + b"".join(encode(key) + encode(item) for key, item in value.items()) + b"u"
    raise TypeError(value)


def named(full: str) -> Raw:
    module, _, name = full.rpartition(".")
    return Raw(f"c{module}\n{name}\n".encode())


def call(function: str, *arguments: Any) -> Raw:
    return Raw(named(function) + encode(arguments) + b"R")


def storage(kind: str = "FloatStorage", key: Any = "0", size: Any = 6, location: str = "cpu", *rest: Any) -> Raw:
    return Raw(encode(("storage", named(f"torch.{kind}"), key, location, size, *rest)) + b"Q")


def tensor(shape: Any = (2, 3), strides: Any = (3, 1), offset: Any = 0, rest: tuple = (), **of_storage: Any) -> Raw:
    hooks = call("collections.OrderedDict")
    return call("torch._utils._rebuild_tensor_v2", storage(**of_storage), offset, shape, strides, False, hooks, *rest)


def pickled(value: Any, protocol: int = 2) -> bytes:
    return b"\x80" + bytes([protocol]) + encode(value) + b"."


def archive(members: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", compression) as file:
        warnings.simplefilter("ignore")  # of members that are there twice
        for name, content in members:
            file.writestr(zipfile.ZipInfo(name), content, compression)
    return buffer.getvalue()


def zip_file(pickle: bytes, storages: dict[str, bytes], byteorder: bytes = b"little") -> bytes:
    data = [(f"sample/data/{key}", content) for key, content in storages.items()]
    return archive([("sample/data.pkl", pickle), ("sample/byteorder", byteorder), *data, ("sample/version", b"3\n")])


def legacy_file(
    pickle: bytes, storages: dict[str, tuple[int, bytes]], little_endian: bool = True, protocol: int = 1001
) -> bytes:
    system = {"protocol_version": 1001, "little_endian": little_endian}
    head = pickled(MAGIC) + pickled(protocol) + pickled(system) + pickle + pickled(list(storages))
    return head + b"".join(struct.pack("<q", count) + content for count, content in storages.values())
