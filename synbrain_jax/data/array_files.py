"""Reading named arrays from .npz and .npy files, with one clear error for whatever is wrong with a file.

A room of its own because it knows files and nothing of experiments.
"""

import io
import math
import os
import pathlib
import zipfile
import zlib
from collections.abc import Iterator

import numpy as np

from synbrain_jax.config import nearest
from synbrain_jax.errors import InputError

_PIECE_BYTES = 64 * 2**20


def read_fields(source: str | os.PathLike, *, known: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Reads the arrays of an .npz file, or of all FIELD.npy and .npz files of a folder; .npy files are memory-mapped.

    Raises:
        InputError: a file cannot be read, is truncated or holds Python objects; a field is empty, unknown or twice
            there.
    """
    path = pathlib.Path(source).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in (".npy", ".npz"))
        if not files:
            raise InputError(f"{path}: the folder holds no .npy or .npz file.")
    elif path.suffix == ".npz" and path.is_file():
        files = [path]
    elif path.exists():
        raise InputError(f"{path}: expected an .npz file or a folder of .npy files.")
    else:
        raise InputError(f"{path}: no such file or folder; expected an .npz file or a folder of .npy files.")

    fields: dict[str, np.ndarray] = {}
    for file in files:
        try:
            found = _read_npz(file) if file.suffix == ".npz" else {file.stem: _read_npy(file)}
        except InputError:
            raise
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise InputError(
                f"{file}: cannot be read, it is damaged or truncated ({error}). Write it again."
            ) from error
        for name, array in found.items():
            if name not in known:
                raise InputError(f"{file}: unknown field '{name}'{nearest(name, known)}")
            if name in fields:
                raise InputError(f"{file}: field '{name}' is also in another file of the folder; keep one.")
            fields[name] = array
    return fields


def pieces(array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (first row, rows) of about 64 MB each, so that a memory-mapped array is never read whole."""
    rows = max(1, _PIECE_BYTES // max(1, array[:1].nbytes))
    for start in range(0, len(array), rows):
        yield start, array[start : start + rows]


def check_finite(where: str, name: str, array: np.ndarray) -> None:
    """Raises `InputError` with the number and the first position of values that are not finite as float32."""
    count, first = 0, None
    for start, piece in pieces(array):
        with np.errstate(over="ignore"):
            bad = np.argwhere(~np.isfinite(piece.astype(np.float32, copy=False)))
        count += len(bad)
        if len(bad) and first is None:
            first = [start + int(bad[0][0]), *map(int, bad[0][1:])]
    if first is not None:
        values = "1 value that is" if count == 1 else f"{count} values that are"
        raise InputError(
            f"{where}: field '{name}' holds {values} NaN or infinite, the first at {first}. Repair those entries or "
            "leave their voxels or trials out."
        )


def _read_npy(file: pathlib.Path) -> np.ndarray:
    with file.open("rb") as stream:
        _check_header(stream, f"{file}")
    return np.load(file, mmap_mode="r", allow_pickle=False)


def _read_npz(file: pathlib.Path) -> dict[str, np.ndarray]:
    arrays = {}
    with zipfile.ZipFile(file) as archive:
        for member in archive.namelist():
            name = member.removesuffix(".npy")
            with archive.open(member) as stream:
                _check_header(stream, f"{file}: field '{name}'")
                stream.seek(0)
                arrays[name] = np.lib.format.read_array(stream, allow_pickle=False)
    return arrays


def _check_header(stream: io.BufferedIOBase, where: str) -> None:
    """Refuses what is not a NumPy array, and an array that holds objects or nothing."""
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
    except ValueError as error:
        raise InputError(f"{where}: not a whole NumPy array file ({error}).") from error
    if dtype.hasobject:
        raise InputError(
            f"{where}: holds Python objects, which are not loaded. Save plain numbers or fixed-width text."
        )
    if math.prod(shape) == 0:
        raise InputError(f"{where}: empty, its shape is {shape}.")
