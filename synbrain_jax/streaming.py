"""Many stimuli to fMRI: from pictures or tokens, into an array or onto the disk with constant memory.

While the devices compute batch n + 1, batch n is copied to the host and written by a thread of its own, and pictures
of later batches are read. At most three batches of responses exist at a time.

Shape letters: s stimuli, t tokens, d token width, k samples, v voxels.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray
from tqdm import tqdm

from synbrain_jax.data.pictures import Pictures
from synbrain_jax.data.tokens import StoredTokens
from synbrain_jax.encoding import EncodedBatch, PictureEncoder, encoded_batches
from synbrain_jax.errors import InputError
from synbrain_jax.response_files import ResponseFolder
from synbrain_jax.synthesis import Sampler, SynBrain, Variability, one_ahead

_LOOKED_AT = 256  # rows of tokens on disk, which may be too many to be compared


@dataclasses.dataclass(frozen=True, eq=False)
class Responses:
    """Synthetic responses to those stimuli that could be read."""

    stimulus_id: Sequence[str] | np.ndarray | None
    fmri: Float[np.ndarray, "s k v"]  # float32; memory-mapped where it is on disk
    unreadable: Mapping[str, str]  # name -> why


def synthesize_pictures(
    system: SynBrain,
    encoder: PictureEncoder,
    pictures: Pictures,
    key: PRNGKeyArray | None = None,
    *,
    k: int = 1,
    variability: Variability = "none",
    noise_factor: float = 1.0,
    batch_size: int = 32,
    num_threads: int | None = None,
) -> Responses:
    """`SynBrain.synthesize` of pictures; their tokens stay on the devices.

    The numbers are those of `encode_images` and then `synthesize`, up to rounding.

    Args:
        system, encoder: on the same mesh.
        num_threads: that read pictures; None: one a CPU core, at most 16.

    Raises:
        InputError: the tower's tokens are not what the system expects; as `SynBrain.synthesize` does.
    """
    _check_tower(system, encoder)
    sampler = system.sampler(key, k=k, variability=variability, noise_factor=noise_factor, batch_size=batch_size)
    names, unreadable, fmri = [], {}, [np.empty((0, *sampler.sample_shape), np.float32)]
    with _progress(len(pictures), 0) as bar:
        for batch, voxels in _from_pictures(sampler, encoder, pictures, num_threads):
            if voxels is not None:
                fmri.append(np.asarray(voxels)[: len(batch.names)])
            names += batch.names
            unreadable |= batch.unreadable
            bar.update(len(batch.names) + len(batch.unreadable))
    return Responses(names, np.concatenate(fmri), unreadable)


def stream_tokens(
    system: SynBrain,
    tokens: Float[np.ndarray, "s t d"] | StoredTokens,
    out: str | os.PathLike,
    key: PRNGKeyArray | None = None,
    *,
    stimulus_id: np.ndarray | None = None,
    k: int = 1,
    variability: Variability = "none",
    noise_factor: float = 1.0,
    batch_size: int = 32,
) -> Responses:
    """`SynBrain.synthesize`, written batch by batch to the folder `out`; all of it never is in memory.

    `fmri.npy` appears there when it is whole. Called again after a kill, it goes on behind the last batch that the disk
    has, with the bits that it would have had (on devices of the same kind and number); called again after the end, it
    computes nothing. Beside it are `stimulus_id.npy` and `voxel_ijk.npy`, if these are known, and what it was made of.

    Args:
        tokens: of tokens on disk (`open_tokens`, or an .npy that is memory-mapped) a batch is read at a time. Whether
            they are those of the call before is told by 256 rows, the file's time, and what `encode-images` noted.
        out: on a local disk.
        stimulus_id: names or numbers of the stimuli [s].

    Raises:
        InputError: as `SynBrain.synthesize`; `out` holds something else, or responses that were made otherwise.
        NotStored: the disk is full. What was written before is kept.
    """
    system.check_shape(tokens)
    draw = dict(k=k, variability=variability, noise_factor=noise_factor)
    sampler = system.sampler(key, **draw, batch_size=batch_size)
    made_of = _made_of(system, sampler, key, draw) | {"tokens": _digest_of_tokens(tokens, stimulus_id)}
    with ResponseFolder(out, made_of, sampler.sample_shape) as folder:
        if not folder.finished:
            responses = sampler.responses(_read_finite(tokens, folder.seen, sampler.rows), folder.seen)
            _write_behind(folder, ((voxels, count, {}) for count, voxels in responses), len(tokens))
            folder.finish(_known(stimulus_id=stimulus_id, voxel_ijk=system.bundle.voxels.ijk))
        return Responses(stimulus_id, folder.fmri(), {})


def stream_pictures(
    system: SynBrain,
    encoder: PictureEncoder,
    pictures: Pictures,
    out: str | os.PathLike,
    key: PRNGKeyArray | None = None,
    *,
    k: int = 1,
    variability: Variability = "none",
    noise_factor: float = 1.0,
    batch_size: int = 32,
    num_threads: int | None = None,
) -> Responses:
    """`synthesize_pictures`, written as `stream_tokens` does.

    Names and reasons of pictures that cannot be read are in `unreadable.npy` [pictures, 2]; if all are, no file is
    left. That pictures are those of the call before is told by their names.
    """
    _check_tower(system, encoder)
    draw = dict(k=k, variability=variability, noise_factor=noise_factor)
    sampler = system.sampler(key, **draw, batch_size=batch_size)
    given = {"source": os.path.abspath(pictures.where), "background": list(pictures.background)}
    given["pictures"] = f"{len(pictures)}, {_digest(pictures.names)}"
    for part, value in encoder.description.items():
        given |= {f"{part}.{name}": one for name, one in value.items()} if isinstance(value, dict) else {part: value}
    with ResponseFolder(out, _made_of(system, sampler, key, draw) | given, sampler.sample_shape) as folder:
        if not folder.finished:
            parts = _from_pictures(sampler, encoder, pictures, num_threads, folder.seen, folder.rows)
            batches = ((voxels, len(batch.names), batch.unreadable) for batch, voxels in parts)
            _write_behind(folder, batches, len(pictures))
        names = [name for name in pictures.names if name not in folder.unreadable]
        if not names:
            folder.discard()
            return Responses(names, np.empty((0, *sampler.sample_shape), np.float32), folder.unreadable)
        if not folder.finished:
            unreadable = np.array(list(folder.unreadable.items())) if folder.unreadable else None
            ijk = system.bundle.voxels.ijk
            folder.finish(_known(stimulus_id=np.array(names), voxel_ijk=ijk, unreadable=unreadable))
        return Responses(names, folder.fmri(), folder.unreadable)


# ---- batches ---------------------------------------------------------------------------------------------------------


def _from_pictures(
    sampler: Sampler,
    encoder: PictureEncoder,
    pictures: Pictures,
    num_threads: int | None,
    start: int = 0,
    first: int = 0,
) -> Iterator[tuple[EncodedBatch, Array | None]]:
    """Batches from picture `start` on, with their responses, the first of which is that of stimulus `first`."""

    def sent():
        number = first
        for batch in encoded_batches(pictures, [range(start, len(pictures))], encoder, sampler.rows, num_threads):
            yield batch, None if batch.tokens is None else sampler(batch.tokens, number)
            number += len(batch.names)

    return one_ahead(sent())


def _read_finite(tokens: np.ndarray | StoredTokens, start: int, rows: int) -> Iterator[np.ndarray]:
    for begin in range(start, len(tokens), rows):
        part = np.asarray(tokens[begin : begin + rows], np.float32)
        finite = np.isfinite(part).all(axis=(1, 2))
        if not finite.all():
            raise InputError(
                f"tokens of stimulus {begin + int(np.argmin(finite))} (from 0) hold values that are NaN or infinite"
            )
        yield part


def _write_behind(
    folder: ResponseFolder, batches: Iterable[tuple[Array | None, int, Mapping[str, str]]], total: int
) -> None:
    """Appends each batch: responses that are on their way, how many of their rows count, and what could not be read."""

    def write(voxels: Array | None, count: int, unreadable: Mapping[str, str]) -> None:
        folder.append(None if voxels is None else np.asarray(voxels)[:count], unreadable)

    with concurrent.futures.ThreadPoolExecutor(1) as writer, _progress(total, folder.seen) as bar:
        writing = writer.submit(lambda: None)
        for batch in batches:
            writing.result()
            bar.update(folder.seen - bar.n)
            writing = writer.submit(write, *batch)
        writing.result()
        bar.update(folder.seen - bar.n)


def _progress(total: int, done: int) -> tqdm:
    return tqdm(total=total, initial=done, desc="synthesize", unit="stimulus", disable=None)


# ---- what responses are made of --------------------------------------------------------------------------------------


def _check_tower(system: SynBrain, encoder: PictureEncoder) -> None:
    if encoder.token_shape != system.token_shape:
        expected, given = (
            "[" + ", ".join(map(str, shape)) + "]" for shape in (system.token_shape, encoder.token_shape)
        )
        raise InputError(
            f"the image tower gives tokens {given} but the model expects {expected}; use the weights that the model "
            "was trained with"
        )


def _made_of(system: SynBrain, sampler: Sampler, key: PRNGKeyArray | None, draw: Mapping[str, Any]) -> dict[str, Any]:
    """Of what `stream_tokens` and `stream_pictures` share; what nothing depends on is None."""
    made_of = {"model": system.digest[:16], **draw, "batch_size": sampler.rows, "key": None}
    if draw["variability"] == "none":
        return made_of | {"noise_factor": None}
    return made_of | {"key": np.asarray(jax.random.key_data(key)).tolist()}


def _digest_of_tokens(tokens: np.ndarray | StoredTokens, stimulus_id: np.ndarray | None) -> str:
    names = None if stimulus_id is None else np.asarray(stimulus_id).tolist()
    told, rows = [list(tokens.shape), str(tokens.dtype), names], np.arange(len(tokens))
    if isinstance(tokens, np.memmap):
        told.append(os.stat(tokens.filename).st_mtime_ns)
    elif isinstance(tokens, StoredTokens):
        told.append(tokens.fingerprint)
    if isinstance(tokens, np.memmap | StoredTokens):
        rows = np.unique(np.linspace(0, len(tokens) - 1, min(_LOOKED_AT, len(tokens))).astype(int))
    return _digest(told, (tokens[int(row)] for row in rows))


def _digest(told: Any, arrays: Iterable[np.ndarray] = ()) -> str:
    digest = hashlib.sha256(json.dumps(told).encode())
    for array in arrays:
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()[:16]


def _known(**fields: np.ndarray | None) -> dict[str, np.ndarray]:
    return {name: value for name, value in fields.items() if value is not None}
