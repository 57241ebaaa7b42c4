"""Small files that appear whole or not at all, on a local disk or in a bucket. A leaf: imported by every other room."""

import io
import os

import numpy as np
from etils import epath

from synbrain_jax.errors import InputError


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Writes a file beside `path` and renames it: a reader sees the old file or the whole new one."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        unfinished.write_bytes(content)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(path, text.encode())


def read_text(path: str | os.PathLike) -> str:
    """A file's UTF-8 text; InputError names the file if it cannot be read."""
    try:
        return epath.Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{os.fspath(path)}: cannot be read ({error})") from error


def write_npz(path: str | os.PathLike, arrays: dict[str, np.ndarray]) -> None:
    """`write_bytes` of the arrays as one .npz."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_bytes(path, buffer.getvalue())


def write_npy(path: str | os.PathLike, array: np.ndarray) -> None:
    """`write_bytes` of one array as .npy."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_bytes(path, buffer.getvalue())


def read_array(path: str | os.PathLike) -> np.ndarray:
    """The array of an .npy; InputError if it is missing, damaged or holds Python objects."""
    array = _load(path, ".npy")
    if not isinstance(array, np.ndarray):
        raise InputError(f"{os.fspath(path)}: is an .npz file; give it a name that ends in .npz")
    return array


def map_array(path: str | os.PathLike) -> np.ndarray:
    """`read_array`, but of what is used only: memory-mapped, for reading. On a local disk."""
    try:
        with open(path, "rb") as file:
            np.lib.format.read_magic(file)  # or NumPy takes it for a pickle or an .npz
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise InputError(f"{os.fspath(path)}: cannot be read as an .npy file ({error})") from error


def read_npz(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """All arrays of an .npz; InputError if it is missing, damaged or holds Python objects."""
    arrays = _load(path, ".npz")
    if isinstance(arrays, np.ndarray):
        raise InputError(f"{os.fspath(path)}: is an .npy file; expected an .npz")
    return arrays


def _load(path: str | os.PathLike, kind: str) -> np.ndarray | dict[str, np.ndarray]:
    try:
        content = np.load(io.BytesIO(epath.Path(path).read_bytes()), allow_pickle=False)
        return content if isinstance(content, np.ndarray) else {name: content[name] for name in content.files}
    # A damaged file makes NumPy, zipfile, zlib and the tokenizer of array headers raise almost anything.
    except Exception as error:
        raise InputError(f"{os.fspath(path)}: cannot be read as an {kind} file ({error})") from error
