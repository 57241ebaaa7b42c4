"""How close synthesised responses come to measured ones, and how close they could come: pure functions of arrays.

The first half is JAX (float32, jit and grad safe) and takes NumPy or JAX arrays: one number per voxel or per
stimulus, so that the caller chooses mean or median. The second half is NumPy (float64 inside): repeats of a
stimulus and the noise ceiling of the Natural Scenes Dataset (NSD; Allen et al. 2022, Nature Neuroscience 25).

Shape letters: s stimuli, v voxels, n trials, r repeats, g groups.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from synbrain_jax.errors import InputError

AnyArray = Array | np.ndarray


# ---- prediction against measurement ----------------------------------------------------------------


def voxel_pearson(prediction: Float[AnyArray, "s v"], target: Float[AnyArray, "s v"]) -> Float[Array, "v"]:
    """Pearson correlation of each voxel's responses across stimuli.

    0 for a voxel whose prediction or target is the same for all stimuli (never NaN).
    """
    return jnp.sum(_unit(_centred(prediction, 0), 0) * _unit(_centred(target, 0), 0), axis=0)


def pattern_pearson(prediction: Float[AnyArray, "s v"], target: Float[AnyArray, "s v"]) -> Float[Array, "s"]:
    """Pearson correlation of each stimulus's pattern across voxels.

    0 for a stimulus whose predicted or measured pattern is constant (never NaN). On patterns that are not
    centred over stimuli, the mean pattern alone scores high: see `evaluation.score`.
    """
    return jnp.sum(_unit(_centred(prediction, 1), 1) * _unit(_centred(target, 1), 1), axis=1)


def cosine(prediction: Float[AnyArray, "s v"], target: Float[AnyArray, "s v"]) -> Float[Array, "s"]:
    """Cosine similarity of each stimulus's pattern, not centred; 0 where a pattern is all zero (never NaN)."""
    return jnp.sum(_unit(_float32(prediction), 1) * _unit(_float32(target), 1), axis=1)


def mse(prediction: Float[AnyArray, "s v"], target: Float[AnyArray, "s v"]) -> Float[Array, "s"]:
    """Squared error of each stimulus's pattern, mean over voxels, in squared units of the data."""
    return jnp.mean((_float32(prediction) - _float32(target)) ** 2, axis=1)


def explained_variance(prediction: Float[AnyArray, "s v"], target: Float[AnyArray, "s v"]) -> Float[Array, "v"]:
    """1 - var(target - prediction) / var(target) of each voxel across stimuli; a constant offset costs nothing.

    At most 1 and may be negative; 0 for a voxel whose target is the same for all stimuli.
    """
    residual = jnp.mean(_centred(_float32(target) - _float32(prediction), 0) ** 2, axis=0)
    total = jnp.mean(_centred(target, 0) ** 2, axis=0)
    return jnp.where(total > 0, 1 - residual / jnp.where(total > 0, total, 1), 0)


def identification_top1(prediction: Float[AnyArray, "s v"], target: Float[AnyArray, "s v"]) -> Float[Array, "s"]:
    """1 for each predicted pattern that correlates more with its own target than with any other, else 0.

    A tie is not an identification. Chance 1 / s. Raises InputError below two stimuli.
    """
    correlation, own = _correlation_with_targets(prediction, target)
    return (jnp.sum(correlation >= own, axis=1) == 1).astype(jnp.float32)


def identification_two_way(prediction: Float[AnyArray, "s v"], target: Float[AnyArray, "s v"]) -> Float[Array, "s"]:
    """Share of the s - 1 other targets with which each predicted pattern correlates less than with its own.

    The distractors are measured patterns. A tie counts half, so that a constant prediction is at chance, 0.5.
    Raises InputError below two stimuli.
    """
    correlation, own = _correlation_with_targets(prediction, target)
    ties = jnp.sum(correlation == own, axis=1) - 1  # less the pattern's tie with itself
    return (jnp.sum(correlation < own, axis=1) + 0.5 * ties) / (correlation.shape[1] - 1)


def _correlation_with_targets(
    prediction: Float[AnyArray, "s v"], target: Float[AnyArray, "s v"]
) -> tuple[Float[Array, "s s"], Float[Array, "s 1"]]:
    if len(target) < 2:
        raise InputError(f"identification needs at least 2 stimuli to tell apart, got {len(target)}")
    predicted, measured = _unit(_centred(prediction, 1), 1), _unit(_centred(target, 1), 1)
    correlation = jnp.matmul(predicted, measured.T, precision=lax.Precision.HIGHEST)
    return correlation, jnp.diagonal(correlation)[:, None]


def linear_cka(x: Float[AnyArray, "s v"], y: Float[AnyArray, "s w"]) -> Float[Array, ""]:
    """Linear centred kernel alignment (Kornblith et al. 2019, ICML) of two sets of patterns of the same stimuli.

    The cosine between the two stimulus-by-stimulus matrices of inner products, voxels centred over stimuli: 1 if they
    agree up to rotation and scale, 0 if they have nothing in common or one of them is constant. Few stimuli of many
    voxels score high by chance.
    """
    centred_x, centred_y = _centred(x, 0), _centred(y, 0)
    gram_x, gram_y = (jnp.matmul(z, z.T, precision=lax.Precision.HIGHEST) for z in (centred_x, centred_y))
    return cosine(gram_x.reshape(1, -1), gram_y.reshape(1, -1))[0]


def _float32(values: Float[AnyArray, "s v"]) -> Float[Array, "s v"]:
    return jnp.asarray(values, jnp.float32)


def _centred(values: Float[AnyArray, "s v"], axis: int) -> Float[Array, "s v"]:
    values = _float32(values)
    # Relative to the first entry, so that a constant becomes exactly 0 and a large offset costs no digits.
    values = values - lax.index_in_dim(values, 0, axis)
    return values - jnp.mean(values, axis=axis, keepdims=True)


def _unit(values: Float[Array, "s v"], axis: int) -> Float[Array, "s v"]:
    squares = jnp.sum(values**2, axis=axis, keepdims=True)
    return values / jnp.sqrt(jnp.where(squares > 0, squares, 1))


# ---- repeats and the noise ceiling -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Repeats:
    """Measurements of stimuli whose noise can be taken as independent; see `repeats`."""

    fmri: Float[np.ndarray, "r v"]
    stimulus: Int[np.ndarray, "r"]
    of_trial: Int[np.ndarray, "n"]  # the repeat that each trial is part of


def repeats(fmri: Float[np.ndarray, "n v"], stimulus: Int[np.ndarray, "n"], run: Int[np.ndarray, "n"]) -> Repeats:
    """What counts as one repeat of a stimulus when noise is estimated.

    Trials of one stimulus in one run follow each other closely and share slow noise; counted as independent
    they would make a voxel look far more reliable than it is. So where stimuli recur in other runs, a repeat
    is the mean of a stimulus's trials in a run. Where none does, each trial is a repeat.
    """
    blocks, of_trial = np.unique(np.stack([stimulus, run], axis=1), axis=0, return_inverse=True)
    if len(blocks) == len(np.unique(stimulus)):
        return Repeats(fmri, stimulus, np.arange(len(stimulus)))
    of_trial = of_trial.reshape(-1)
    return Repeats(group_means(fmri, of_trial), blocks[:, 0], of_trial)


def centred(patterns: Float[np.ndarray, "s v"]) -> Float[np.ndarray, "s v"]:
    """Removes the mean pattern over stimuli; exactly 0 where all patterns are equal. float32, float64 inside."""
    return (patterns - patterns.mean(axis=0, dtype=np.float64)).astype(np.float32)


def group_means(values: Float[np.ndarray, "n v"], group: Int[np.ndarray, "n"]) -> Float[np.ndarray, "g v"]:
    """Mean of the rows of each group, in ascending order of the group's number; float32, summed in float64."""
    groups = group_rows(group)
    means = np.empty((len(groups), values.shape[1]), np.float32)
    for mean, rows in zip(means, groups, strict=True):  # one by one: all of them in float64 may be gigabytes
        mean[:] = values[rows].mean(axis=0, dtype=np.float64)
    return means


def group_rows(group: Int[np.ndarray, "n"]) -> list[Int[np.ndarray, "_"]]:
    """The row numbers of each group, in ascending order of the group's number."""
    order = np.argsort(group, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(group[order])) + 1)


def ncsnr(fmri: Float[np.ndarray, "r v"], stimulus: Int[np.ndarray, "r"]) -> Float[np.ndarray, "v"]:
    """Noise-ceiling signal-to-noise ratio of one repeat: sqrt(signal variance / noise variance) of each voxel.

    Noise is the variance within stimuli (n - 1), pooled, so that unequal numbers of repeats weigh by their
    degrees of freedom and a stimulus seen once says nothing. Signal is the variance of all rows (n - 1) less
    the noise, at least 0. NSD's formula, sqrt(max(0, 1 - noise)) / sqrt(noise), assumes data of variance 1;
    here the measured variance stands for the 1, so on voxels z-scored over these rows (with the n - 1 standard
    deviation) the two are equal. float64; infinite for a voxel without noise, 0 for a constant one.
    Raises InputError if no stimulus is repeated.
    """
    rows_of_stimulus = group_rows(stimulus)
    freedom = len(stimulus) - len(rows_of_stimulus)
    if freedom == 0:
        raise InputError(
            f"noise cannot be estimated: each of the {len(stimulus)} stimuli was measured once; "
            "a noise ceiling needs repeats of at least some stimuli"
        )
    grand_mean = fmri.mean(axis=0, dtype=np.float64)
    within, between = np.zeros_like(grand_mean), np.zeros_like(grand_mean)
    for rows in rows_of_stimulus:
        deviation = fmri[rows] - grand_mean
        mean = deviation.mean(axis=0)
        within += ((deviation - mean) ** 2).sum(axis=0)
        between += len(rows) * mean**2
    noise = within / freedom
    signal = np.maximum(0, (within + between) / (len(stimulus) - 1) - noise)
    noise_free = np.where(signal > 0, np.inf, 0.0)
    return np.sqrt(np.divide(signal, noise, out=noise_free, where=noise > 0))


def noise_ceiling(ncsnr: Float[np.ndarray, "v"], n_repeats: int | Int[np.ndarray, "s"]) -> Float[np.ndarray, "v"]:
    """Percentage of a voxel's variance across stimuli that a perfect predictor explains, 0 to 100; float64.

    `n_repeats` is the number of repeats averaged in the target, or one number per stimulus where they differ:
    100 ncsnr^2 / (ncsnr^2 + mean of 1 / n_repeats).
    """
    noise = np.mean(1 / np.asarray(n_repeats, np.float64))
    return 100 * (1 - noise / (np.asarray(ncsnr, np.float64) ** 2 + noise))


def noise_ceiling_r(ncsnr: Float[np.ndarray, "v"], n_repeats: int | Int[np.ndarray, "s"]) -> Float[np.ndarray, "v"]:
    """The same as a correlation, sqrt(noise ceiling / 100): what a perfect predictor's voxel r comes to."""
    return np.sqrt(noise_ceiling(ncsnr, n_repeats) / 100)
