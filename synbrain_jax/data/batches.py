"""Training batches: the seeded, sharded, resumable grain pipeline over prepared data sets, one per subject.

A room of its own because opening and reading a data set (`pairs.py`) needs no grain.

Shape letters: s stimuli (records), n trials, v voxels, t tokens, d token width, b batch.
"""

import functools
from collections.abc import Sequence

import numpy as np
from etils import epy
from jaxtyping import Float, Int

from synbrain_jax.data.pairs import Dataset
from synbrain_jax.errors import InputError

# Imported when first used: models, losses and steps serve where it is not installed.
with epy.lazy_imports():
    import grain


def training_batches(
    datasets: Sequence[Dataset],
    split: str,
    *,
    batch_size: int,
    seed: int,
    unit: str = "trial",
    average_share: float = 0.0,
    orders: Sequence[Int[np.ndarray, "_"]] | None = None,
    process_index: int = 0,
    process_count: int = 1,
    targets: Sequence[Float[np.ndarray, "_ t d"] | None] | None = None,
    num_threads: int = 2,
) -> "grain.DatasetIterator":
    """Endless batches of `split`: dicts of arrays with leading axis b = batch_size / process_count.

    Each batch is of one subject, so that subjects may differ in voxels; a seeded schedule gives each one batches in
    proportion to its elements (rounded to whole batches an epoch). Of one subject every element comes once per epoch;
    each epoch is shuffled anew and runs into the next, so no batch is short. A batch is a function of (seed, its
    number) only; process p holds the p-th of process_count equal parts of it.

    unit "trial": `tokens` [b, t, d] bfloat16, as stored, and `fmri` [b, v] float32. With probability `average_share`
      the fMRI is the mean of 2, 4, 8, ... (uniform, at most all) distinct random trials of the trial's record instead.
    unit "stimulus": `tokens`, `fmri` (mean over the record's trials), `weight` [b] float32 (the record's number of
      trials over the mean number) and, if `targets` is given (one per record, in record order), `latent` [b, t, d]
      float32.

    Args:
        datasets: one per subject.
        orders: permutation applied to the voxels of each; None keeps the data sets' own order.
        targets: of each data set, perhaps memory maps; None: no `latent`.
        num_threads: threads that read ahead; 0 reads in the caller's thread.

    Returns:
        An iterator whose `get_state()` is a small JSON-able dict, the same on every process, and whose
        `set_state(state)` goes on with exactly the next batch.

    Raises:
        InputError: an argument does not fit a data set or another argument.
    """
    orders = [None] * len(datasets) if orders is None else orders
    targets = [None] * len(datasets) if targets is None else targets
    if not 0 <= seed < 2**32:
        raise InputError(f"seed {seed}: expected 0 to 4294967295.")
    subjects, batches_per_epoch = [], []
    for number, (dataset, order, target) in enumerate(zip(datasets, orders, targets, strict=True)):
        counts = dataset.trials_per_record(split)
        _check_arguments(dataset, counts, batch_size, unit, average_share, order, process_index, process_count, target)
        own_seed = (seed + 2 * number) % 2**32  # stage 2 has the odd ones
        elements = _elements(dataset, split, own_seed, unit, average_share, order, target)
        subjects.append(elements.batch(batch_size // process_count))
        n_elements = int(counts.sum()) if unit == "trial" else len(counts)
        batches_per_epoch.append(max(1, round(n_elements / batch_size)))
    # grain would read 500 batches ahead, which at 256 x 1,664 tokens is 10 GB.
    ahead = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
    batches = _one_subject_at_a_time(subjects, batches_per_epoch, seed, process_index, process_count)
    return iter(batches.to_iter_dataset(ahead))


def _elements(dataset: Dataset, split: str, seed: int, unit: str, average_share: float, order, targets):
    """The shuffled elements of one data set, epoch after epoch, as a grain.MapDataset."""
    counts, records = dataset.trials_per_record(split), dataset.records(split)
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
        return elements.random_map(trial_or_average)
    return elements.map(trial if unit == "trial" else stimulus)


def _one_subject_at_a_time(
    subjects, batches_per_epoch: Sequence[int], seed: int, process_index: int, process_count: int
):
    """A process's parts of the batches of several endless grain.MapDatasets, as one: in each epoch so many of each, in
    seeded order."""
    length = sum(batches_per_epoch)

    @functools.lru_cache(maxsize=16)
    def schedule(epoch: int) -> tuple[np.ndarray, np.ndarray]:
        subject = np.repeat(np.arange(len(subjects)), batches_per_epoch)
        np.random.default_rng([seed, epoch, 1]).shuffle(subject)
        number = np.empty(length, int)
        for which, count in enumerate(batches_per_epoch):
            number[subject == which] = epoch * count + np.arange(count)
        return subject, number

    def batch(position: int, _: int) -> dict[str, np.ndarray]:
        subject, number = schedule(position // length)
        place = position % length
        return subjects[subject[place]][int(number[place]) * process_count + process_index]

    return grain.MapDataset.range(length).repeat().map_with_index(batch)


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
