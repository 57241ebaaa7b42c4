"""The packaged real fMRI data: subject 1 of Haxby et al. 2001, one axial slice, eight object categories.

Haxby, Gobbini, Furey, Ishai, Schouten and Pietrini (2001), Science 293:2425-2430; licence in `haxby2001/LICENSE.txt`.
A person looked at blocks of pictures of eight categories, 12 runs of one block per category. The stimulus is the
category; its tokens are the 384-d embedding of a short text that names it, cut into [12, 32].

Shape letters: n trials (volumes), v voxels.
"""

import dataclasses
import importlib.resources
import os
from typing import ClassVar

import numpy as np
import scipy.signal
import tensorflow_datasets as tfds
from einops import rearrange
from etils import epath
from jaxtyping import Float, Int

from synbrain_jax.data.builder import PairsBuilder, Source, prepare, source_of_trials
from synbrain_jax.data.voxels import Voxels, hilbert_order
from synbrain_jax.errors import InputError

TOKEN_SHAPE = (12, 32)
VOLUME_SHAPE = (40, 20, 1)
VALIDATION_RUNS = (9,)
TEST_RUNS = (10, 11)


@dataclasses.dataclass(eq=False)
class HaxbyConfig(tfds.core.BuilderConfig):
    """Which labels the training trials get: their own, or permuted ones (the leakage control)."""

    permute: str = "none"
    seed: int = 0


class Haxby2001(PairsBuilder, skip_registration=True):
    """One record per category; runs 0-8 train, 9 validation, 10-11 test. A random split would leak."""

    name = "haxby2001"
    BUILDER_CONFIGS: ClassVar[list[HaxbyConfig]] = [
        HaxbyConfig(name="default", description="the measured labels"),
        HaxbyConfig(name="permuted", description="stimulus labels permuted among the training trials", permute="trial"),
    ]

    def _load(self) -> Source:
        config = self.builder_config
        bold, names = _packaged("haxby2001_sub1_slice_raw.npz"), _packaged("haxby_category_minilm384.npz")
        task = bold["label"] > 0
        run = bold["run"][task].astype(np.int32)
        categories = [str(name) for name in bold["categories"][1:]]
        rows = [list(names["category"]).index(category) for category in categories]
        embedding = names["emb"][rows]
        embedding = embedding / np.linalg.norm(embedding, axis=1, keepdims=True)
        tokens = rearrange(embedding, "s (t d) -> s t d", t=TOKEN_SHAPE[0], d=TOKEN_SHAPE[1])
        ijk = np.pad(bold["voxel_ij"], ((0, 0), (0, 1))).astype(np.int32)
        voxels = Voxels(
            subject="haxby2001-subj1",
            normalisation="run_detrend_zscore",
            ijk=ijk,
            volume_shape=VOLUME_SHAPE,
            affine=None,
            ncsnr=None,
            order=hilbert_order(ijk),
        )
        return source_of_trials(
            voxels=voxels,
            stimulus_id=tuple(categories),
            tokens_of=tokens.__getitem__,
            fmri=detrend_and_zscore_runs(bold["bold"], bold["run"])[task],
            stimulus=bold["label"][task].astype(np.int32) - 1,
            run=run,
            split=np.select([np.isin(run, TEST_RUNS), np.isin(run, VALIDATION_RUNS)], ["test", "validation"], "train"),
            permute=config.permute,
            seed=config.seed,
        )


def prepare_haxby(data_dir: str | os.PathLike, *, permute: str = "none", seed: int = 0) -> epath.Path:
    """Writes the packaged data under `data_dir` unless it is there, and returns the prepared folder.

    Args:
        permute: "none", or "trial" to permute the stimulus labels among the training trials: a model trained on them
            must score nothing on the test runs, or something leaks. Validation and test labels stay true.
        seed: of the permutation.

    Raises:
        InputError: `permute` is neither.
    """
    if permute not in ("none", "trial"):
        raise InputError(f"permute '{permute}': expected 'none' or 'trial'.")
    if permute == "none":
        config = "default"
    else:
        config = "permuted" if seed == 0 else HaxbyConfig(name=f"permuted-{seed}", permute=permute, seed=seed)
    return prepare(Haxby2001(data_dir=epath.Path(data_dir).expanduser(), config=config))


def detrend_and_zscore_runs(bold: Int[np.ndarray, "n v"], run: Int[np.ndarray, "n"]) -> Float[np.ndarray, "n v"]:
    """Removes each voxel's linear trend within each run and scales it there to mean 0 and variance 1 (float32).

    All volumes of a run count, rest included. A voxel that is constant in a run, or a line, becomes 0 there.
    """
    result = np.empty(bold.shape, np.float32)
    for r in np.unique(run):
        measured = bold[run == r].astype(np.float64)
        flat = scipy.signal.detrend(measured, axis=0)
        sd = flat.std(axis=0)
        varies = sd > 1e-9 * np.abs(measured).max(axis=0)  # else what is left is rounding error
        result[run == r] = np.divide(flat, sd, out=np.zeros_like(flat), where=varies)
    return result


def _packaged(name: str) -> dict[str, np.ndarray]:
    file = importlib.resources.files("synbrain_jax.data") / "haxby2001" / name
    with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
        return dict(arrays)
