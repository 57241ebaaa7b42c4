"""What the TFDS builders share: the features, the side files, and writing a data set whole or not at all.

A room of its own because reading (`pairs.py`) needs none of it. A builder hands over a `Source`; its records may come
from memory (`source_of_trials`) or be streamed from files.

Shape letters: s stimuli (records), n trials, v voxels, t tokens, d token width.
"""

import abc
import contextlib
import dataclasses
import functools
import io
import itertools
import logging
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from jaxtyping import Float, Int
from tqdm import tqdm

from synbrain_jax.data.pairs import TRIALS_FILE, VOXELS_FILE, Record
from synbrain_jax.data.voxels import Voxels, repeat_ncsnr
from synbrain_jax.errors import InputError
from synbrain_jax.files import read_npz, write_npz

SPLITS = ("train", "validation", "test")
_SHARD_BYTES = 256 * 2**20  # TFDS holds the examples of the shard that it writes in memory


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """What a builder hands over to be written."""

    n_voxels: int
    token_shape: tuple[int, int]  # (t, d)
    records: Mapping[str, Iterable[Record]]  # split -> its records, at least one, in the order to be kept
    n_trials: Mapping[str, Int[np.ndarray, "s"]]  # split -> the number of trials of each of its records
    voxels: Callable[[], Voxels]  # called once, after the records are written
    fingerprint: str = ""  # of the content and the options, where one name may stand for several


class PairsBuilder(tfds.core.ShardBasedBuilder, skip_registration=True):
    """A TFDS builder of the one example format; a subclass says where the records come from.

    Written shard by shard, because TFDS's builder for one generator collects the whole split in memory first.
    """

    VERSION = tfds.core.Version("1.1.0")
    code_path = None  # nothing is downloaded; the look-up of checksums needs a package that TFDS does not declare

    def __init__(self, **kwargs: Any):
        with _quiet():
            super().__init__(**kwargs | {"file_format": "array_record"})

    @abc.abstractmethod
    def _load(self) -> Source:
        """Returns everything that is to be written."""

    @functools.cached_property
    def source(self) -> Source:
        """What this builder writes."""
        return self._load()

    def _info(self) -> tfds.core.DatasetInfo:
        # Only raw bytes can hold bfloat16, and they are by far the fastest to write and read.
        tensor = functools.partial(tfds.features.Tensor, encoding=tfds.features.Encoding.BYTES)
        features = {
            "stimulus_id": tfds.features.Text(),
            "tokens": tensor(shape=self.source.token_shape, dtype=ml_dtypes.bfloat16),
            "fmri": tensor(shape=(None, self.source.n_voxels), dtype=np.float32),
            "trial_index": tensor(shape=(None,), dtype=np.int32),
            "run": tensor(shape=(None,), dtype=np.int32),
            "session": tensor(shape=(None,), dtype=np.int32),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _example_writer(self) -> "_UncompressedWriter":
        return _UncompressedWriter()

    def _shard_iterators_per_split(self, dl_manager):
        self._written = {split: [] for split in self.source.records}
        return {split: self._shards(split) for split in self.source.records}

    def _shards(self, split):
        n_trials = self.source.n_trials[split]
        n_bytes = 4 * self.source.n_voxels * n_trials.sum() + 2 * np.prod(self.source.token_shape) * len(n_trials)
        per_shard = math.ceil(len(n_trials) / math.ceil(n_bytes / _SHARD_BYTES))
        examples = self._generate_examples(split)  # the shards are written one after the other and share it
        n_shards = math.ceil(len(n_trials) / per_shard)
        return [functools.partial(itertools.islice, examples, per_shard)] * n_shards

    def _generate_examples(self, split):
        records = tqdm(
            self.source.records[split],
            total=len(self.source.n_trials[split]),
            desc=f"write {split}",
            unit="record",
            disable=None,
        )
        for key, record in enumerate(records):
            self._written[split].append((record.stimulus_id, record.trial_index, record.session))
            fields = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
            yield key, fields | {"tokens": record.tokens.astype(ml_dtypes.bfloat16)}

    def _download_and_prepare(self, dl_manager, download_config):
        super()._download_and_prepare(dl_manager, download_config)
        # data_dir is TFDS's temporary folder here, so the side files appear together with the records.
        index = {"splits": np.array(list(self._written)), "fingerprint": np.array(self.source.fingerprint)}
        for split, written in self._written.items():
            names, trial_index, session = zip(*written, strict=True)
            index |= {
                f"{split}.stimulus_id": np.array(names),
                f"{split}.n_trials": np.array([len(trials) for trials in trial_index], np.int32),
                f"{split}.trial_index": np.concatenate(trial_index),
                f"{split}.session": np.concatenate(session),
            }
        write_npz(epath.Path(self.data_dir) / TRIALS_FILE, index)
        self.source.voxels().save(epath.Path(self.data_dir) / VOXELS_FILE)


class _UncompressedWriter:
    """TFDS's writer of ArrayRecord files, without its compression: noise shrinks by a fifth, but is read at a third of
    the speed."""

    def write(self, path: epath.PathLike, examples: Iterable[tuple[Any, bytes]]) -> None:
        writer = ArrayRecordWriter(os.fspath(path), "group_size:1,uncompressed")
        for _, example in examples:
            writer.write(example)
        writer.close()


def prepare(builder: PairsBuilder) -> epath.Path:
    """Writes the builder's data set unless it is already there, and returns its folder.

    Raises:
        InputError: the folder already holds a data set of the same name from other content.
    """
    folder = epath.Path(builder.data_dir)
    if not folder.exists():
        _write(builder, folder)
    if str(read_npz(folder / TRIALS_FILE).get("fingerprint")) != builder.source.fingerprint:
        raise InputError(
            f"{folder}: already prepared from other arrays or with other options. Choose another name or data folder, "
            "or delete this one."
        )
    return folder


def source_of_trials(
    *,
    voxels: Voxels,
    stimulus_id: tuple[str, ...],
    tokens_of: Callable[[int], Float[np.ndarray, "t d"]],
    fmri: Any,
    stimulus: Int[np.ndarray, "n"],
    run: Int[np.ndarray, "n"],
    split: np.ndarray,
    session: Int[np.ndarray, "n"] | None = None,
    permute: str = "none",
    seed: int = 0,
    fingerprint: str = "",
) -> Source:
    """Groups the trials of an experiment by split and stimulus.

    Args:
        voxels: geometry; the noise-ceiling ratio is added here, over the trials of all splits and the true labels.
        stimulus_id: the s stimuli.
        tokens_of: the tokens of a stimulus, by its index.
        fmri: array-like [n, v] (an array, a memory map, or anything that is indexed like one), read piece by piece.
        stimulus: index into `stimulus_id` of each trial.
        split: "train", "validation" or "test" for each trial.
        session: scan session of each trial; None: 0 for all.
        permute: "trial" permutes the stimulus labels among the training trials (a control: a model trained on
            them can have learned nothing about stimuli); "none" keeps them.
        seed: of the permutation.
    """
    session = np.zeros(len(run), np.int32) if session is None else session
    true_stimulus = stimulus
    if permute == "trial":
        stimulus = stimulus.copy()
        training = np.flatnonzero(split == "train")
        stimulus[training] = np.random.default_rng([seed, 1]).permutation(stimulus[training])
    elif permute != "none":
        raise InputError(f"permute '{permute}': expected 'none' or 'trial'.")

    def records(name: str) -> Iterator[Record]:
        rows_of_split = np.flatnonzero(split == name)
        shown, counts = np.unique(stimulus[rows_of_split], return_counts=True)
        by_stimulus = rows_of_split[np.argsort(stimulus[rows_of_split], kind="stable")]
        for index, rows in zip(shown, np.split(by_stimulus, np.cumsum(counts)[:-1]), strict=True):
            yield Record(
                stimulus_id=stimulus_id[index],
                tokens=np.asarray(tokens_of(index), np.float32),
                fmri=np.asarray(fmri[rows], np.float32),
                trial_index=rows.astype(np.int32),
                run=run[rows].astype(np.int32),
                session=session[rows].astype(np.int32),
            )

    def with_ncsnr() -> Voxels:
        block = max(1, 2**24 // len(run))  # voxels at a time: 64 MB
        ratios = [
            repeat_ncsnr(np.asarray(fmri[:, start : start + block], np.float32), true_stimulus, run)
            for start in range(0, len(voxels.order), block)
        ]
        return dataclasses.replace(voxels, ncsnr=None if ratios[0] is None else np.concatenate(ratios))

    return Source(
        n_voxels=len(voxels.order),
        token_shape=tuple(np.shape(tokens_of(0))),
        records={name: records(name) for name in SPLITS},
        n_trials={name: np.unique(stimulus[split == name], return_counts=True)[1] for name in SPLITS},
        voxels=with_ncsnr,
        fingerprint=fingerprint,
    )


def _write(builder: PairsBuilder, folder: epath.Path) -> None:
    """Runs TFDS; after a failure the folders that it made are gone."""
    created = [parent for parent in folder.parents if not parent.exists()]
    try:
        with _quiet(), tempfile.TemporaryDirectory() as downloads:
            builder.download_and_prepare(download_dir=downloads)
    except BaseException as error:
        if isinstance(error, OSError) and folder.exists():
            return  # another process finished the same data set first
        for parent in created:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides TFDS's notices, and its progress bars where there is no terminal."""
    logger = logging.getLogger("absl")
    level = logger.level
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
