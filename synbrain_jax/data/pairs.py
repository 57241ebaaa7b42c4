"""The one example format, and the seeded, sharded, resumable pipeline that reads it.

A prepared data set is a folder that TFDS wrote (`data/builder.py`), with one record per stimulus:

    stimulus_id  text
    tokens       [t, d] bfloat16, what the image encoder makes of the stimulus
    fmri         [n, v] float32, every trial of the stimulus in this split
    trial_index  [n] int32, the trial's place in the experiment
    run          [n] int32

and beside the records `voxels.npz` (`Voxels`) and `trials.npz` (stimulus and number of trials of each record, so
that trials can be counted and addressed without reading the records).

Shape letters: s stimuli (records), n trials, v voxels, t tokens, d token width, b batch.
"""

import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import SupportsIndex

import grain
import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from jaxtyping import Float, Int

from synbrain_jax.data.voxels import Voxels
from synbrain_jax.errors import InputError
from synbrain_jax.files import read_npz

FIELDS = ("fmri", "run", "stimulus_id", "tokens", "trial_index")
VOXELS_FILE = "voxels.npz"
TRIALS_FILE = "trials.npz"
_CACHED_BYTES = 256 * 2**20  # a split that decodes to less than this stays in memory


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """One stimulus with all its trials of one split."""

    stimulus_id: str
    tokens: Float[np.ndarray, "t d"]  # float32
    fmri: Float[np.ndarray, "n v"]  # float32
    trial_index: Int[np.ndarray, "n"]  # int32
    run: Int[np.ndarray, "n"]  # int32


@dataclasses.dataclass(frozen=True, eq=False)
class Trials:
    """One split in memory; the voxels are in the data set's own order."""

    stimulus_id: tuple[str, ...]  # s distinct stimuli
    tokens: Float[np.ndarray, "s t d"]  # float32
    fmri: Float[np.ndarray, "n v"]  # float32
    stimulus: Int[np.ndarray, "n"]  # int32 index into stimulus_id
    run: Int[np.ndarray, "n"]  # int32


class Records:
    """Random access to the decoded records of one split."""

    def __init__(self, source, keep: bool):
        self._source = source
        self._kept: dict[int, Record] | None = {} if keep else None

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: SupportsIndex) -> Record:
        index = range(len(self))[index]
        if self._kept is not None and index in self._kept:
            return self._kept[index]
        fields = self._source[index]
        record = Record(
            stimulus_id=fields["stimulus_id"].decode(),
            tokens=fields["tokens"].astype(np.float32),
            fmri=fields["fmri"],
            trial_index=fields["trial_index"],
            run=fields["run"],
        )
        if self._kept is not None:
            self._kept[index] = record
        return record


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A prepared data set on disk."""

    name: str  # "builder/config"
    path: epath.Path
    voxels: Voxels = dataclasses.field(repr=False)
    token_shape: tuple[int, int]  # (t, d)
    n_voxels: int
    splits: tuple[str, ...]
    _index: Mapping[str, np.ndarray] = dataclasses.field(repr=False)

    def trials_per_record(self, split: str) -> Int[np.ndarray, "s"]:
        """Number of trials (int32) of each record of `split`."""
        return self._index[f"{self._checked(split)}.n_trials"]

    def stimulus_ids(self, split: str) -> tuple[str, ...]:
        """The stimuli of `split`, in record order."""
        return tuple(str(name) for name in self._index[f"{self._checked(split)}.stimulus_id"])

    def records(self, split: str) -> Records:
        """Random access to the records of `split`; a small split stays in memory once decoded."""
        counts = self.trials_per_record(split)
        decoded_bytes = 4 * (counts.sum() * self.n_voxels + len(counts) * np.prod(self.token_shape))
        source = tfds.builder_from_directory(self.path).as_data_source(split)
        return Records(source, keep=bool(decoded_bytes < _CACHED_BYTES))

    def _checked(self, split: str) -> str:
        if split not in self.splits:
            raise InputError(f"split '{split}': {self.name} has {', '.join(self.splits)}.")
        return split


def open_dataset(path: str | os.PathLike) -> Dataset:
    """Opens the prepared data set in the folder `path`, without reading its records.

    Raises:
        InputError: the folder is missing, incomplete, or holds records of another format.
    """
    path = epath.Path(path).expanduser()
    needed = ("dataset_info.json", "features.json", VOXELS_FILE, TRIALS_FILE)
    missing = [name for name in needed if not (path / name).exists()]
    if missing:
        raise InputError(
            f"{path}: no prepared data set is here ({missing[0]} is missing). Prepare one with `synbrain prepare`, "
            "prepare_haxby or prepare_arrays, and give the folder that it returns."
        )
    info = tfds.builder_from_directory(path).info
    if sorted(info.features) != sorted(FIELDS):
        raise InputError(
            f"{path}: records hold {', '.join(sorted(info.features))}; expected {', '.join(FIELDS)}. "
            "Prepare the data set again with this package."
        )
    index = read_npz(path / TRIALS_FILE)
    return Dataset(
        name=info.full_name.rpartition("/")[0],
        path=path,
        voxels=Voxels.load(path / VOXELS_FILE),
        token_shape=tuple(info.features["tokens"].shape),
        n_voxels=info.features["fmri"].shape[1],
        splits=tuple(str(split) for split in index["splits"]),
        _index=index,
    )


def load_trials(dataset: Dataset, split: str) -> Trials:
    """Reads a whole split into memory: stimuli in record order, the trials of each one after the other."""
    source = dataset.records(split)
    records = [source[index] for index in range(len(source))]
    counts = [len(record.fmri) for record in records]
    return Trials(
        stimulus_id=tuple(record.stimulus_id for record in records),
        tokens=np.stack([record.tokens for record in records]),
        fmri=np.concatenate([record.fmri for record in records]),
        stimulus=np.repeat(np.arange(len(records), dtype=np.int32), counts),
        run=np.concatenate([record.run for record in records]),
    )


def training_batches(
    dataset: Dataset,
    split: str,
    *,
    batch_size: int,
    seed: int,
    unit: str = "trial",
    average_share: float = 0.0,
    order: Int[np.ndarray, "v"] | None = None,
    process_index: int = 0,
    process_count: int = 1,
    targets: Float[np.ndarray, "s t d"] | None = None,
    num_threads: int = 2,
) -> grain.DatasetIterator:
    """Endless batches of `split`: dicts of float32 arrays with leading axis b = batch_size / process_count.

    Every element comes once per epoch; each epoch is shuffled anew and runs into the next, so no batch is short. A
    batch is a function of (seed, its number) only. Process p holds places p, p + process_count, ... of the global
    batch.

    unit "trial": `tokens` [b, t, d] and `fmri` [b, v]. With probability `average_share` the fMRI is the mean of
      2, 4, 8, ... (uniform, at most all) distinct random trials of the trial's record instead.
    unit "stimulus": `tokens`, `fmri` (mean over the record's trials), `weight` [b] (the record's number of trials over
      the mean number) and, if `targets` is given (one per record, in record order), `latent` [b, t, d].

    Args:
        order: permutation applied to the voxels; None keeps the data set's own order.
        num_threads: threads that read ahead; 0 reads in the caller's thread.

    Returns:
        An iterator whose `get_state()` is a small JSON-able dict, the same on every process, and whose
        `set_state(state)` goes on with exactly the next batch.

    Raises:
        InputError: an argument does not fit the data set or another argument.
    """
    counts = dataset.trials_per_record(split)
    if not 0 <= seed < 2**32:
        raise InputError(f"seed {seed}: expected 0 to 4294967295.")
    _check_arguments(dataset, counts, batch_size, unit, average_share, order, process_index, process_count, targets)
    records = dataset.records(split)
    voxels = slice(None) if order is None else order

    record_of_trial = np.repeat(np.arange(len(counts)), counts)
    first_trial = np.cumsum(counts) - counts
    relative_count = (counts / counts.mean()).astype(np.float32)

    def trial(index: int) -> dict[str, np.ndarray]:
        place = record_of_trial[index]
        record = records[place]
        return {"tokens": record.tokens, "fmri": record.fmri[index - first_trial[place]][voxels]}

    def trial_or_average(index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        record = records[record_of_trial[index]]
        n = len(record.fmri)
        if n == 1 or rng.random() >= average_share:
            return trial(index)
        rows = rng.choice(n, size=2 ** rng.integers(1, n.bit_length()), replace=False, shuffle=False)
        return {"tokens": record.tokens, "fmri": record.fmri[rows].mean(axis=0)[voxels]}

    def stimulus(index: int) -> dict[str, np.ndarray]:
        record = records[index]
        element = {"tokens": record.tokens, "fmri": record.fmri.mean(axis=0)[voxels], "weight": relative_count[index]}
        if targets is not None:
            element["latent"] = np.asarray(targets[index], dtype=np.float32)
        return element

    n_elements = len(record_of_trial) if unit == "trial" else len(counts)

    # Not grain's shuffle, whose cost per element grows as 65,536 / n: 2 ms for the eight categories of Haxby.
    @functools.lru_cache(maxsize=16)
    def epoch_order(epoch: int) -> np.ndarray:
        return np.random.default_rng([seed, epoch]).permutation(n_elements)

    def shuffled(position: int, _: int) -> int:
        return int(epoch_order(position // n_elements)[position % n_elements])

    elements = grain.MapDataset.range(n_elements).seed(seed).repeat().map_with_index(shuffled)
    if average_share > 0:
        elements = elements.random_map(trial_or_average)
    else:
        elements = elements.map(trial if unit == "trial" else stimulus)
    batches = elements[process_index::process_count].batch(batch_size // process_count)
    # grain would read 500 batches ahead, which at 256 x 1,664 tokens is 20 GB.
    ahead = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
    return iter(batches.to_iter_dataset(ahead))


def _check_arguments(
    dataset, counts, batch_size, unit, average_share, order, process_index, process_count, targets
) -> None:
    if batch_size < 1 or batch_size % process_count:
        raise InputError(f"batch_size {batch_size}: expected a positive multiple of the {process_count} processes.")
    if not 0 <= process_index < process_count:
        raise InputError(f"process_index {process_index}: expected 0 to {process_count - 1}.")
    if unit not in ("trial", "stimulus"):
        raise InputError(f"unit '{unit}': expected 'trial' or 'stimulus'.")
    if not 0 <= average_share <= 1:
        raise InputError(f"average_share {average_share}: expected a probability, 0 to 1.")
    if unit == "stimulus" and average_share > 0:
        raise InputError(
            "average_share: a stimulus is already the mean of its trials; set it to 0 for unit 'stimulus'."
        )
    if unit == "trial" and targets is not None:
        raise InputError("targets: one per stimulus, so only unit 'stimulus' takes them.")
    if targets is not None and len(targets) != len(counts):
        raise InputError(f"targets: {len(targets)} rows, but the split has {len(counts)} records.")
    if order is not None and not np.array_equal(np.sort(order), np.arange(dataset.n_voxels)):
        raise InputError(f"order: expected each of 0 to {dataset.n_voxels - 1} once (the data set's voxels).")
