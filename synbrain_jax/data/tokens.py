"""Tokens of pictures on disk: a TFDS data set of one record per picture, `stimulus_id` and `tokens` [t, d] bfloat16.

A room of its own because TFDS writes a data set in one go, and encoding pictures may take days: here the shards are
written one by one, each whole or not at all, and the metadata that TFDS reads come last. Reading needs no picture, no
tower and no JAX.

Shape letters: s pictures, t tokens, d token width.
"""

import dataclasses
import functools
import hashlib
import operator
import os
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath, epy
from jaxtyping import Float, Shaped

from synbrain_jax.errors import InputError
from synbrain_jax.files import read_npz, read_text, write_npz

# Imported when first used: models, losses and steps serve where these are not installed.
with epy.lazy_imports():
    import tensorflow_datasets as tfds
    from array_record.python import array_record_module as array_record

MANIFEST_FILE = "manifest.json"  # what the tokens are made of: pictures, tower, preprocessing
STIMULI_FILE = "stimuli.npz"  # the names in the order of the records; appears when the data set is complete
_NAME, _SPLIT = "tokens", "train"  # TFDS's name for what is not split


class StoredTokens:
    """Tokens on disk, like a float32 array [s, t, d]: an index gives [t, d], a slice or a list of indices [n, t, d]."""

    dtype = np.dtype(np.float32)
    ndim = 3

    def __init__(self, read: Callable[[int], np.ndarray], shape: tuple[int, int, int], fingerprint: str = ""):
        self._read, self.shape, self.fingerprint = read, shape, fingerprint

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> Float[np.ndarray, "t d"] | Float[np.ndarray, "n t d"]:
        if isinstance(rows, slice):
            rows = range(len(self))[rows]
        if isinstance(rows, list | range | np.ndarray):
            tokens = np.empty((len(rows), *self.shape[1:]), np.float32)
            for place, row in enumerate(rows):
                tokens[place] = self._read(range(len(self))[row])
            return tokens
        return self._read(range(len(self))[operator.index(rows)]).astype(np.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedPictures:
    """What `encode_images` wrote."""

    stimulus_id: tuple[str, ...]  # s distinct names
    tokens: StoredTokens


def open_tokens(path: str | os.PathLike) -> EncodedPictures:
    """Opens the folder of tokens that `synbrain encode-images` wrote, without reading its records.

    Raises:
        InputError: the folder is missing, incomplete, damaged, or holds something else.
    """
    path = epath.Path(path).expanduser()
    if not (path / STIMULI_FILE).exists():
        raise InputError(
            f"{path}: no complete set of tokens is here ({STIMULI_FILE} is missing). Write one with `synbrain "
            "encode-images`, or let it finish by giving the same command again."
        )
    names = tuple(str(name) for name in read_npz(path / STIMULI_FILE)["stimulus_id"])
    builder = tfds.builder_from_directory(path)
    shape = builder.info.features["tokens"].shape
    for shard in builder.info.splits[_SPLIT].filepaths:
        check_shard(epath.Path(shard))
    source = builder.as_data_source(_SPLIT)
    fingerprint = hashlib.sha256(f"{names} {read_text(path / MANIFEST_FILE)}".encode()).hexdigest()
    if len(source) != len(names):
        raise InputError(f"{path}: {len(source)} records but {len(names)} names in {STIMULI_FILE}; encode them again.")

    def read(row: int) -> np.ndarray:
        return source[row]["tokens"]

    return EncodedPictures(names, StoredTokens(read, (len(names), *shape), fingerprint))


def shard_path(folder: epath.Path, number: int, count: int) -> epath.Path:
    """The file of a shard; it exists when the shard is complete."""
    return folder / f"{_NAME}-{_SPLIT}.array_record-{number:05d}-of-{count:05d}"


def check_shard(path: epath.Path) -> None:
    """Raises InputError if the file is missing or has been cut. Reads its end only."""
    try:
        array_record.ArrayRecordReader(os.fspath(path)).close()
    # array_record has no exceptions of its own.
    except Exception as error:
        raise InputError(
            f"{path}: the shard is damaged ({' '.join(str(error).split())[:200]}). Delete it and give the command "
            "`synbrain encode-images` again, which makes this one anew."
        ) from error


def write_shard(
    path: epath.Path, stimulus_id: Sequence[str], tokens: Shaped[np.ndarray, "s t d"] | Sequence[np.ndarray]
) -> None:
    """Writes a shard beside `path` and renames it, so that it appears whole or not at all."""
    unfinished = path.with_name(path.name + ".unfinished")
    # Each record by itself, for random access.
    writer = array_record.ArrayRecordWriter(os.fspath(unfinished), "group_size:1")
    try:
        for name, record in zip(stimulus_id, tokens, strict=True):
            writer.write(_features(record.shape).serialize_example({"stimulus_id": name, "tokens": record}))
        writer.close()
        unfinished.rename(path)
    finally:
        unfinished.unlink(missing_ok=True)


def finish(folder: epath.Path, shards: Sequence[Sequence[str]], token_shape: tuple[int, int]) -> None:
    """Makes the complete shards, given by their names, a data set that TFDS and `open_tokens` read."""
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=_NAME, split=_SPLIT, filetype_suffix="array_record"
    )
    size = sum(shard_path(folder, number, len(shards)).stat().length for number in range(len(shards)))
    split = tfds.core.SplitInfo(
        name=_SPLIT, shard_lengths=[len(names) for names in shards], num_bytes=size, filename_template=template
    )
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=_features(token_shape),
        split_infos=[split],
        version="1.0.0",
        check_data=False,  # it would read with TensorFlow
    )
    write_npz(folder / STIMULI_FILE, {"stimulus_id": np.array([name for names in shards for name in names])})


@functools.cache
def _features(token_shape: tuple[int, int]) -> "tfds.features.FeaturesDict":
    # Only raw bytes can hold bfloat16.
    tokens = tfds.features.Tensor(shape=token_shape, dtype=ml_dtypes.bfloat16, encoding=tfds.features.Encoding.BYTES)
    return tfds.features.FeaturesDict({"stimulus_id": tfds.features.Text(), "tokens": tokens})
