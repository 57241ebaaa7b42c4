"""A folder of synthetic responses that is written batch by batch: `fmri.npy`, and one .npy beside it for whatever else
is known. It appears when it is whole; killed before, it goes on.

A room of its own because it knows files and nothing of models. On a local disk: what is under way is `fmri.npy` under
another name and a journal of the batches in it, each noted when the disk has it. At the start, what lies behind the
last noted batch is cut off.

Shape letters: s stimuli, b batch, k samples, v voxels.
"""

import contextlib
import fcntl
import io
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from synbrain_jax.errors import InputError, NotStored
from synbrain_jax.files import map_array, read_array, read_text, write_npy, write_text

FMRI_FILE = "fmri.npy"  # [s, k, v] float32; appears when it is whole
SETTINGS_FILE = "synthesis.json"  # what the responses were made of
_UNFINISHED = "fmri.npy.unfinished"
_JOURNAL = "batches.jsonl"
FIELDS = ("stimulus_id", "voxel_ijk", "unreadable")


class ResponseFolder:
    """A context manager; within it, no other process writes the folder."""

    def __init__(self, path: str | os.PathLike, made_of: Mapping[str, Any], sample_shape: tuple[int, int]):
        """Touches no file.

        Args:
            path: of the folder, which need not exist.
            made_of: all that the numbers depend on, as plain values.
            sample_shape: k, v.
        """
        self.path = pathlib.Path(path).expanduser()
        self.seen = 0  # stimuli that are done with: they have a row, or cannot be read
        self.rows = 0
        self.unreadable: dict[str, str] = {}  # name -> why
        self._made_of, self._sample_shape = json.loads(json.dumps(dict(made_of))), sample_shape
        self._row_bytes = 4 * math.prod(sample_shape)

    @property
    def finished(self) -> bool:
        """Whether `fmri.npy` is there, which is whole."""
        return (self.path / FMRI_FILE).exists()

    def fmri(self) -> Float[np.ndarray, "s k v"]:
        """The finished responses, memory-mapped. InputError if the file is damaged."""
        return map_array(self.path / FMRI_FILE)

    # ---- taking it

    def __enter__(self) -> "ResponseFolder":
        """Raises InputError if something else is there, responses that were made of something else, or a writer."""
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path}: is a file; expected a folder for the responses, which need not exist.")
        with contextlib.ExitStack() as exits:
            with self._storing():
                self.path.mkdir(parents=True, exist_ok=True)
                lock = os.open(self.path, os.O_RDONLY)
            exits.callback(os.close, lock)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(f"{self.path}: another process is writing this folder; wait for it.") from error
            self._claim()
            if self.finished:
                file = self.path / "unreadable.npy"
                self.unreadable = dict(read_array(file).tolist()) if file.exists() else {}
            else:
                with self._storing():
                    # Unbuffered, so that closing them after an error writes nothing.
                    self._fmri = exits.enter_context((self.path / _UNFINISHED).open("ab+", buffering=0))
                    self._journal = exits.enter_context((self.path / _JOURNAL).open("ab+", buffering=0))
                    self._go_back()
            self._exits = exits.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        """Leaves nothing behind where nothing was made."""
        if not self.finished and not self.seen:
            self.discard()
        self._exits.close()

    def _claim(self) -> None:
        file, journal = self.path / SETTINGS_FILE, self.path / _JOURNAL
        if not file.exists():
            theirs = [name for name in (FMRI_FILE, *(f"{name}.npy" for name in FIELDS)) if (self.path / name).exists()]
            if theirs:
                raise InputError(f"{self.path}: holds other data ({', '.join(theirs)}). Give another folder.")
        elif self.finished or (journal.exists() and journal.stat().st_size):
            there = self._settings(file)
            names = [name for name in {**there, **self._made_of} if there.get(name) != self._made_of.get(name)]
            if not names:
                return
            listed = "; ".join(f"{name}: {there.get(name)!r} there, {self._made_of.get(name)!r} here" for name in names)
            raise InputError(
                f"{self.path}: holds responses that were made otherwise ({listed}). Give another folder, delete this "
                "one, or give the options that it was made with."
            )
        with self._storing():
            write_text(file, json.dumps(self._made_of, indent=1))

    def _settings(self, file: pathlib.Path) -> dict[str, Any]:
        try:
            return dict(json.loads(read_text(file)))
        except (TypeError, ValueError) as error:
            raise InputError(
                f"{file}: is damaged ({error}). Delete the folder {self.path} and give the command again."
            ) from error

    def _go_back(self) -> None:
        """To behind the last batch that is noted, of those that are in the file from the beginning."""
        header, end = self._header(0), 0
        size = os.fstat(self._fmri.fileno()).st_size
        self._journal.seek(0)
        for line in self._journal.read().splitlines(keepends=True):
            noted = json.loads(line) if line.endswith(b"\n") else {}  # the process was killed while it wrote this
            if not noted or len(header) + noted["rows"] * self._row_bytes > size:
                break
            self.seen, self.rows, end = noted["seen"], noted["rows"], end + len(line)
            self.unreadable |= noted["unreadable"]
        self._journal.truncate(end)
        if not end:
            self._fmri.truncate(0)
            _write(self._fmri, header)
        self._fmri.truncate(len(header) + self.rows * self._row_bytes)

    # ---- writing

    def append(self, responses: Float[np.ndarray, "b k v"] | None, unreadable: Mapping[str, str] | None = None) -> None:
        """Adds rows, and the names of stimuli that have none with the reasons.

        Returns when the disk has them. Raises NotStored if it has no room.
        """
        rows, unreadable = 0 if responses is None else len(responses), dict(unreadable or {})
        seen = rows + len(unreadable)
        noted = {"seen": self.seen + seen, "rows": self.rows + rows, "unreadable": unreadable}
        with self._storing():
            if rows:
                _write(self._fmri, np.ascontiguousarray(responses, "<f4"))
                os.fsync(self._fmri.fileno())
            _write(self._journal, json.dumps(noted).encode() + b"\n")
        self.seen, self.rows = noted["seen"], noted["rows"]
        self.unreadable |= unreadable

    def finish(self, fields: Mapping[str, np.ndarray]) -> None:
        """Makes the folder whole. `fields`: arrays that belong to it, by those names of `FIELDS` that are known."""
        with self._storing():
            for name, array in fields.items():
                write_npy(self.path / f"{name}.npy", array)
            # Opened anew, because a file opened for appending is written at its end only.
            with (self.path / _UNFINISHED).open("r+b", buffering=0) as file:
                _write(file, self._header(self.rows))
                os.fsync(file.fileno())
            (self.path / _UNFINISHED).rename(self.path / FMRI_FILE)
            (self.path / _JOURNAL).unlink()

    def discard(self) -> None:
        """Removes what was written; the folder too, if nothing else is in it."""
        for name in (_UNFINISHED, _JOURNAL, SETTINGS_FILE):
            (self.path / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.path.rmdir()

    def _header(self, rows: int) -> bytes:
        """Of the .npy; NumPy leaves room in it, so that it is as long for any number of rows."""
        stream = io.BytesIO()
        about = {"descr": "<f4", "fortran_order": False, "shape": (rows, *self._sample_shape)}
        np.lib.format.write_array_header_1_0(stream, about)
        return stream.getvalue()

    @contextlib.contextmanager
    def _storing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise NotStored(
                f"{self.path}: cannot be written ({error}). What was whole before is kept: see to the disk, and give "
                "the same command again."
            ) from error


def _write(file: io.RawIOBase, content: bytes | np.ndarray) -> None:
    left = memoryview(content).cast("B")
    while left:
        left = left[file.write(left) :]
