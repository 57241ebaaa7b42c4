"""Records per second that training batches are made at, from records as large as those of the Natural Scenes Dataset.

    python -m benchmarks input_pipeline [--records 400] [--batches 40] [--threads 2]

Writes a synthetic prepared data set of one subject (3 trials of 15,724 voxels and 256 x 1,664 tokens, 1.04 MB a record)
into a temporary folder, reads it once so that the files are in the page cache, and then times both stages' batches of
24, shuffled, with voxels reordered. One record is one element of a batch. Next to the time on the clock it prints the
processor's, which other programs disturb less. Nothing is computed with the batches: a device that needs more
milliseconds for a step than a batch takes here never waits.
"""

import argparse
import itertools
import os
import platform
import tempfile
import time
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds

from synbrain_jax.data.arrays import Arrays
from synbrain_jax.data.batches import training_batches
from synbrain_jax.data.builder import SPLITS, Source, prepare
from synbrain_jax.data.pairs import Dataset, Record, open_dataset
from synbrain_jax.data.voxels import Voxels

VOXELS, TOKENS, WIDTH, TRIALS, BATCH = 15_724, 256, 1_664, 3, 24
RECORD_BYTES = TRIALS * VOXELS * 4 + TOKENS * WIDTH * 2


def synthetic(folder: str, n_records: int) -> Dataset:
    """A prepared data set of noise, with `n_records` training stimuli."""
    rng = np.random.default_rng(0)
    n_trials = {split: np.full(n_records if split == "train" else 1, TRIALS) for split in SPLITS}
    number = itertools.count()

    def records(split: str) -> Iterator[Record]:
        for _ in n_trials[split]:
            index = next(number)
            yield Record(
                stimulus_id=f"nsd-{index:05d}",
                tokens=rng.standard_normal((TOKENS, WIDTH), np.float32),
                fmri=rng.standard_normal((TRIALS, VOXELS), np.float32),
                trial_index=np.arange(TRIALS * index, TRIALS * (index + 1), dtype=np.int32),
                run=np.arange(TRIALS, dtype=np.int32),
                session=np.ones(TRIALS, np.int32),
            )

    order = rng.permutation(VOXELS).astype(np.int32)
    voxels = Voxels("noise", "none", ijk=None, volume_shape=None, affine=None, ncsnr=None, order=order)
    source = Source(
        n_voxels=VOXELS,
        token_shape=(TOKENS, WIDTH),
        records={split: records(split) for split in SPLITS},
        n_trials=n_trials,
        voxels=lambda: voxels,
    )
    return open_dataset(prepare(Arrays(source=source, data_dir=folder, config=tfds.core.BuilderConfig(name="noise"))))


def time_batches(dataset: Dataset, count: int, threads: int, **settings) -> tuple[float, float]:
    """Seconds on the clock and of processors for `count` batches, those read ahead in the beginning included."""
    started, used = time.perf_counter(), time.process_time()
    batches = training_batches(
        [dataset], "train", batch_size=BATCH, seed=0, orders=[dataset.voxels.order], num_threads=threads, **settings
    )
    for _ in range(count):
        next(batches)
    return time.perf_counter() - started, time.process_time() - used


def main(arguments: list[str]) -> None:
    """Prints a line for each stage, three times."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks input_pipeline", description=__doc__)
    for name, default in (("records", 400), ("batches", 40), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args(arguments)
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {given.threads} threads")
    with tempfile.TemporaryDirectory() as folder:
        dataset = synthetic(folder, given.records)
        targets = np.lib.format.open_memmap(
            os.path.join(folder, "targets.npy"), "w+", np.float32, (given.records, TOKENS, WIDTH)
        )
        targets[:] = 1
        records = dataset.records("train")
        for index in range(len(records)):
            records[index]
        stages = {
            "stage 1": dict(average_share=0.5),
            "stage 2": dict(unit="stimulus", targets=[targets]),
        }
        for (name, settings), _ in itertools.product(stages.items(), range(3)):
            seconds, used = time_batches(dataset, given.batches, given.threads, **settings)
            n = BATCH * given.batches
            print(
                f"{name}: {n / seconds:5.0f} records/s, {n * RECORD_BYTES / seconds / 1e6:5.0f} MB/s of records; "
                f"{1e3 * used / n:.2f} ms of a core each"
            )
