"""The one example format, and how to open and read it; `data/batches.py` makes training batches of it.

A prepared data set is a folder that TFDS wrote (`data/builder.py`), with one record per stimulus:

    stimulus_id  text
    tokens       [t, d] bfloat16, what the image encoder makes of the stimulus
    fmri         [n, v] float32, every trial of the stimulus in this split
    trial_index  [n] int32, the trial's place in the experiment
    run          [n] int32
    session      [n] int32, the scan session; 0 where the experiment has none

and beside the records `voxels.npz` (`Voxels`) and `trials.npz` (stimulus and number of trials of each record, session
and place in the experiment of each trial, so that trials can be counted and chosen without reading the records).

Shape letters: s stimuli (records), n trials, v voxels, t tokens, d token width.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import SupportsIndex

import numpy as np
from etils import epath, epy
from jaxtyping import Bool, Float, Int, Shaped

from synbrain_jax.data.tokens import StoredTokens
from synbrain_jax.data.voxels import Voxels
from synbrain_jax.errors import InputError
from synbrain_jax.files import read_npz

# Imported when first used: models, losses and steps serve where these are not installed.
with epy.lazy_imports():
    import tensorflow_datasets as tfds

FIELDS = ("fmri", "run", "session", "stimulus_id", "tokens", "trial_index")
VOXELS_FILE = "voxels.npz"
TRIALS_FILE = "trials.npz"
_CACHED_BYTES = 256 * 2**20  # records, or tokens, that take less than this stay in memory


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """One stimulus with all its trials of one split."""

    stimulus_id: str
    tokens: Float[np.ndarray, "t d"]  # bfloat16 when read
    fmri: Float[np.ndarray, "n v"]  # float32
    trial_index: Int[np.ndarray, "n"]  # int32
    run: Int[np.ndarray, "n"]  # int32
    session: Int[np.ndarray, "n"]  # int32


@dataclasses.dataclass(frozen=True, eq=False)
class Trials:
    """One split; the voxels are in the data set's own order."""

    stimulus_id: tuple[str, ...]  # s distinct stimuli
    tokens: Float[np.ndarray, "s t d"] | StoredTokens  # float32; if they are many, on disk until they are indexed
    fmri: Float[np.ndarray, "n v"]  # float32
    stimulus: Int[np.ndarray, "n"]  # int32 index into stimulus_id
    run: Int[np.ndarray, "n"]  # int32
    session: Int[np.ndarray, "n"]  # int32


@dataclasses.dataclass(frozen=True, eq=False)
class _Index:
    """What is known of the records and trials of one split without reading them, in record order."""

    source: str  # the split of the files that holds the records
    stimulus_id: Shaped[np.ndarray, "s"]
    record: Int[np.ndarray, "s"]  # place in the files
    n_trials: Int[np.ndarray, "s"]
    row: Int[np.ndarray, "n"]  # place of the trial in its record
    trial_index: Int[np.ndarray, "n"]
    session: Int[np.ndarray, "n"]

    @property
    def record_of_trial(self) -> Int[np.ndarray, "n"]:
        return np.repeat(np.arange(len(self.n_trials)), self.n_trials)

    def only(self, trials: Bool[np.ndarray, "n"]) -> "_Index":
        """These trials, and the records that have one of them."""
        n_trials = np.bincount(self.record_of_trial[trials], minlength=len(self.n_trials)).astype(np.int32)
        left = n_trials > 0
        return _Index(
            source=self.source,
            stimulus_id=self.stimulus_id[left],
            record=self.record[left],
            n_trials=n_trials[left],
            row=self.row[trials],
            trial_index=self.trial_index[trials],
            session=self.session[trials],
        )


class Records:
    """Random access to the decoded records of one split: those at the places `record`, with the trials `rows` each."""

    def __init__(self, source, record: Int[np.ndarray, "s"], rows: Sequence[Int[np.ndarray, "_"]], keep: bool):
        self._source, self._record, self._rows = source, record, rows
        self._kept: dict[int, Record] | None = {} if keep else None

    def __len__(self) -> int:
        return len(self._record)

    def __getitem__(self, index: SupportsIndex) -> Record:
        index = range(len(self))[index]
        if self._kept is not None and index in self._kept:
            return self._kept[index]
        fields, rows = self._source[int(self._record[index])], self._rows[index]
        record = Record(
            stimulus_id=fields["stimulus_id"].decode(),
            tokens=fields["tokens"],
            fmri=fields["fmri"][rows],
            trial_index=fields["trial_index"][rows],
            run=fields["run"][rows],
            session=fields["session"][rows],
        )
        if self._kept is not None:
            self._kept[index] = record
        return record


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A prepared data set on disk, or a part of it."""

    name: str  # "builder/config"
    path: epath.Path
    voxels: Voxels = dataclasses.field(repr=False)
    token_shape: tuple[int, int]  # (t, d)
    n_voxels: int
    _index: Mapping[str, _Index] = dataclasses.field(repr=False)

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return tuple(self._index)

    def trials_per_record(self, split: str) -> Int[np.ndarray, "s"]:
        """Number of trials (int32) of each record of `split`."""
        return self._of(split).n_trials

    def sessions(self, split: str) -> Int[np.ndarray, "n"]:
        """The scan session (int32) of each trial of `split`, in record order; 0 where the experiment has none."""
        return self._of(split).session

    def stimulus_ids(self, split: str) -> tuple[str, ...]:
        """The stimuli of `split`, in record order."""
        return tuple(str(name) for name in self._of(split).stimulus_id)

    def records(self, split: str) -> Records:
        """Random access to the records of `split`; a small split stays in memory once decoded."""
        index = self._of(split)
        decoded_bytes = 4 * len(index.row) * self.n_voxels + 2 * len(index.record) * np.prod(self.token_shape)
        source = tfds.builder_from_directory(self.path).as_data_source(index.source)
        rows = np.split(index.row, np.cumsum(index.n_trials)[:-1])
        return Records(source, index.record, rows, keep=bool(decoded_bytes < _CACHED_BYTES))

    def limited(self, sessions: int | None = None, stimuli: int | None = None) -> "Dataset":
        """The same with less to learn from, as if the experiment had been shorter; the test split stays whole.

        Args:
            sessions: keeps only the trials of the first so many scan sessions, in training and validation.
            stimuli: then keeps only the training stimuli that were presented first, with all their trials.

        Raises:
            InputError: there are fewer, or a split would be empty.
        """
        index = dict(self._index)
        if sessions is not None:
            known = np.unique(np.concatenate([one.session for one in index.values()]))
            if not 1 <= sessions <= len(known) or not known.any():
                there = f"{len(known)} scan sessions" if known.any() else "no numbers of scan sessions"
                raise InputError(f"data.sessions is {sessions}; {self.name} has {there}: leave it out, or give fewer")
            for split in ("train", "validation"):
                index[split] = index[split].only(index[split].session <= known[sessions - 1])
                if not len(index[split].record):
                    raise InputError(
                        f"data.sessions is {sessions}, but no trial of {self.name}'s {split} split is from the first "
                        f"{sessions} of its {len(known)} scan sessions; give more"
                    )
        if stimuli is not None:
            train = index["train"]
            if not 1 <= stimuli <= len(train.record):
                raise InputError(
                    f"data.stimuli is {stimuli}; expected 1 to {len(train.record)}, the training stimuli of {self.name}"
                )
            presented = np.minimum.reduceat(train.trial_index, np.cumsum(train.n_trials) - train.n_trials)
            chosen = np.sort(np.argsort(presented, kind="stable")[:stimuli])
            index["train"] = train.only(np.isin(train.record_of_trial, chosen))
        return dataclasses.replace(self, _index=index)

    def with_validation_share(self, share: float, seed: int) -> "Dataset":
        """The same with a share of the training stimuli, at least 2, drawn with `seed`, as its validation split.

        Raises InputError for a share that is not between 0 and 1, or where fewer than 2 stimuli would be left.
        """
        train = self._of("train")
        count, stimuli = max(2, round(share * len(train.record))), len(train.record)
        if not 0 < share < 1 or stimuli - count < 2:
            raise InputError(
                f"validation_share is {share} of the {stimuli} training stimuli of {self.name}; expected a share "
                "between 0 and 1 that leaves at least 2 for each side: give another share, or more stimuli"
            )
        chosen = np.random.default_rng(seed).choice(stimuli, count, replace=False)
        return self.moved(np.isin(train.record_of_trial, chosen), "validation")

    def moved(self, trials: Bool[np.ndarray, "n"], to: str) -> "Dataset":
        """The same where these trials of the training split (in its order) make up the split `to` instead.

        Raises:
            InputError: they are none, or all that there are.
        """
        train = self._of("train")
        if trials.all() or not trials.any():
            raise InputError(
                f"{trials.sum()} of the {len(trials)} training trials of {self.name} were to become its split "
                f"'{to}'; expected some but not all"
            )
        index = {**self._index, "train": train.only(~trials), to: train.only(trials)}
        return dataclasses.replace(self, _index=index)

    def _of(self, split: str) -> _Index:
        if split not in self._index:
            raise InputError(f"split '{split}': {self.name} has {', '.join(self._index)}.")
        return self._index[split]


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
    listed = read_npz(path / TRIALS_FILE)
    return Dataset(
        name=info.full_name.rpartition("/")[0],
        path=path,
        voxels=Voxels.load(path / VOXELS_FILE),
        token_shape=tuple(info.features["tokens"].shape),
        n_voxels=info.features["fmri"].shape[1],
        _index={str(split): _index_of(listed, split) for split in listed["splits"]},
    )


def _index_of(listed: Mapping[str, np.ndarray], split: str) -> _Index:
    n_trials = listed[f"{split}.n_trials"]
    return _Index(
        source=split,
        stimulus_id=listed[f"{split}.stimulus_id"],
        record=np.arange(len(n_trials)),
        n_trials=n_trials,
        row=np.concatenate([np.arange(n) for n in n_trials]),
        trial_index=listed[f"{split}.trial_index"],
        session=listed[f"{split}.session"],
    )


def load_trials(dataset: Dataset, split: str) -> Trials:
    """Reads a split: stimuli in record order, the trials of each one after the other.

    Tokens that would take more than 256 MiB stay on disk and are read when they are indexed.
    """
    records, counts = dataset.records(split), dataset.trials_per_record(split)
    shape = (len(records), *dataset.token_shape)
    tokens = np.empty(shape, np.float32) if 4 * np.prod(shape) < _CACHED_BYTES else None
    fmri = np.empty((counts.sum(), dataset.n_voxels), np.float32)
    run, session = np.empty((2, len(fmri)), np.int32)
    for index, end in enumerate(np.cumsum(counts)):
        record, rows = records[index], slice(end - counts[index], end)
        fmri[rows], run[rows], session[rows] = record.fmri, record.run, record.session
        if tokens is not None:
            tokens[index] = record.tokens
    return Trials(
        stimulus_id=dataset.stimulus_ids(split),
        tokens=StoredTokens(lambda index: records[index].tokens, shape) if tokens is None else tokens,
        fmri=fmri,
        stimulus=np.repeat(np.arange(len(records), dtype=np.int32), counts),
        run=run,
        session=session,
    )
