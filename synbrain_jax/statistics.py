"""How far a number would move with other stimuli: bootstrap intervals over stimuli, and paired differences.

Stimuli are drawn with replacement, each with all its trials and all its voxels, as often as there are stimuli (Efron
and Tibshirani 1993, An Introduction to the Bootstrap). A draw is kept as counts, how often each stimulus is in it, so
that sums over a draw are one matrix product for all draws. The same seed and number of stimuli give the same draws:
whatever is computed from them is paired.

Intervals are percentile intervals: they stay within a score's range and follow any monotone change of scale. The BCa
interval would need every statistic once more for each stimulus left out, and is not defined for a mask of voxels or a
median that no single stimulus moves. With few stimuli (Haxby has 8) percentile intervals are too narrow: of 95 %
intervals of a mean of 8, about 90 % hold the truth.

NumPy, on the host. Shape letters: n stimuli, d draws, v voxels.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float, Int, Num

from synbrain_jax.errors import InputError

DRAWS = 2000
_VALUES_TOGETHER = 4_000_000  # of draws times voxels or stimuli: what is computed at a time

# From counts [d n] to one number per draw, or to an array of numbers per draw [d ...].
Statistic = Callable[[Float[np.ndarray, "d n"]], Num[np.ndarray, "d ..."]]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number and the ends of its interval, which are None where there is none."""

    value: float
    low: float | None = None
    high: float | None = None


def resamples(n: int, draws: int = DRAWS, seed: int = 0) -> Float[np.ndarray, "d n"]:
    """How often each of n stimuli is in each draw, float32; each row sums to n.

    The first row, which comes before the random draws, has every stimulus once: what a statistic gives for it is its
    value. Raises InputError below two stimuli.
    """
    if n < 2 or draws < 0:
        raise InputError(
            f"{n} stimuli and {draws} draws: an interval needs at least 2 stimuli, and no fewer than 0 draws"
        )
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws)
    return np.concatenate([np.ones((1, n)), drawn]).astype(np.float32)


def bootstrap_interval(
    statistic: Statistic | Float[np.ndarray, "n"], n: int, *, draws: int = DRAWS, seed: int = 0, level: float = 0.95
) -> Estimate:
    """A statistic of all n stimuli with its percentile bootstrap interval.

    Args:
        statistic: one finite value per stimulus, of which the mean is taken; or a function of counts [d n] that gives
          one number per draw. It may give NaN for draws without enough distinct stimuli: they are left out.

    Raises:
        InputError: there are fewer than two stimuli, or the statistic of all of them is not finite.
    """
    return interval(in_parts(_statistic(statistic, n), resamples(n, draws, seed)), level)


def paired_difference(
    first: Statistic | Float[np.ndarray, "n"],
    second: Statistic | Float[np.ndarray, "n"],
    n: int,
    *,
    draws: int = DRAWS,
    seed: int = 0,
    level: float = 0.95,
) -> Estimate:
    """`bootstrap_interval` of the first statistic less the second, both of the same draws."""
    one, other = _statistic(first, n), _statistic(second, n)
    return bootstrap_interval(lambda counts: one(counts) - other(counts), n, draws=draws, seed=seed, level=level)


def interval(drawn: Float[np.ndarray, "d"], level: float = 0.95) -> Estimate:
    """The first number, with the percentile interval of the others; none if there are no others, or all are NaN.

    Others that are NaN are left out. Raises InputError if the first is not finite.
    """
    if not np.isfinite(drawn[0]):
        raise InputError(f"the statistic of all stimuli is {drawn[0]}; expected a finite number")
    others = drawn[1:][~np.isnan(drawn[1:])]
    if not len(others):
        return Estimate(float(drawn[0]))
    low, high = np.quantile(others, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(drawn[0]), float(low), float(high))


def in_parts(
    statistic: Statistic, counts: Float[np.ndarray, "d n"], width: int | None = None
) -> Num[np.ndarray, "d ..."]:
    """`statistic(counts)`, so few draws at a time that 4 million values of `width` per draw (default: n) suffice."""
    rows = max(1, _VALUES_TOGETHER // (width or counts.shape[1]))
    return np.concatenate([statistic(counts[start : start + rows]) for start in range(0, len(counts), rows)])


def of_rows(function: Callable[[Int[np.ndarray, "n"]], float]) -> Statistic:
    """A statistic from a function of row numbers, a stimulus drawn twice being there twice; one call per draw."""

    def statistic(counts: Float[np.ndarray, "d n"]) -> Float[np.ndarray, "d"]:
        return np.array([function(np.repeat(np.arange(len(row)), row.astype(int))) for row in counts], np.float64)

    return statistic


def _statistic(given: Statistic | Float[np.ndarray, "n"], n: int) -> Statistic:
    if callable(given):
        return given
    if given.shape != (n,) or not np.isfinite(given).all():
        raise InputError(f"values of shape {given.shape}; expected one finite number for each of {n} stimuli")
    return lambda counts: counts @ given.astype(np.float64) / n


# ---- voxel r ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class VoxelR:
    """Row -> its median over voxels; and other row -> how far the first row is above it, of the same draws.

    The shares are of r / ceiling over reliable voxels; empty without a ceiling or where no voxel is reliable.
    """

    r: dict[str, Estimate]
    share: dict[str, Estimate]
    lead: dict[str, Estimate]  # the first row's median less the other's
    lead_share: dict[str, Estimate]


def voxel_r_intervals(
    predictions: Mapping[str, Float[np.ndarray, "n v"]],
    target: Float[np.ndarray, "n v"],
    ceiling_r: Float[np.ndarray, "v"] | None = None,
    *,
    min_ceiling_r: float = 0.3,
    draws: int = DRAWS,
    seed: int = 0,
    level: float = 0.95,
) -> VoxelR:
    """Median voxel r (`metrics.voxel_pearson`) of every row, with intervals over stimuli.

    Args:
        predictions: row -> its predictions of the n stimuli; the first is compared with each of the others.
        ceiling_r: the noise ceiling of each voxel's r, taken as known.
        min_ceiling_r: a voxel is reliable above it; the default is that of `evaluation.voxel_scores`.

    2,000 draws take a second for 125 stimuli of 600 voxels and about 10 s a row for 1,000 of 15,724. Beside the
    arguments it holds three arrays of the target's size and 200 MB.
    """
    counts = resamples(len(target), draws, seed)
    reliable = np.zeros(target.shape[1], bool) if ceiling_r is None else ceiling_r > min_ceiling_r
    ceiling = None if ceiling_r is None else ceiling_r[reliable].astype(np.float32)
    y = standardised(target)
    medians, shares = {}, {}
    for row, prediction in predictions.items():
        x = standardised(prediction)

        def summaries(part: Float[np.ndarray, "d n"], x: Float[np.ndarray, "n v"] = x) -> Float[np.ndarray, "d 2"]:
            r = weighted_r(x, y, part)
            share = np.median(r[:, reliable] / ceiling, axis=1) if reliable.any() else np.full(len(r), np.nan)
            return np.stack([np.median(r, axis=1), share], axis=1)

        medians[row], shares[row] = in_parts(summaries, counts, width=target.shape[1]).T

    def estimates(drawn: Mapping[str, Float[np.ndarray, "d"]]) -> dict[str, Estimate]:
        return {row: interval(values, level) for row, values in drawn.items()}

    def leads(drawn: Mapping[str, Float[np.ndarray, "d"]]) -> dict[str, Estimate]:
        first, *others = drawn
        return estimates({row: drawn[first] - drawn[row] for row in others})

    if not reliable.any():
        return VoxelR(estimates(medians), {}, leads(medians), {})
    return VoxelR(estimates(medians), estimates(shares), leads(medians), leads(shares))


def weighted_r(
    x: Float[np.ndarray, "n v"], y: Float[np.ndarray, "n v"], counts: Float[np.ndarray, "d n"]
) -> Float[np.ndarray, "d v"]:
    """Pearson correlation of each column of x with that of y in each draw; 0 where one is constant in the draw.

    The columns as `standardised` makes them: sums in float32 then lose no digits.
    """
    n = len(x)
    mean_x, mean_y = counts @ x / n, counts @ y / n
    covariance = counts @ (x * y) / n - mean_x * mean_y
    variance_x, variance_y = counts @ (x * x) / n - mean_x**2, counts @ (y * y) / n - mean_y**2
    varied = (variance_x > 1e-6) & (variance_y > 1e-6)  # rounding leaves less of a constant
    return np.where(varied, covariance / np.sqrt(np.where(varied, variance_x * variance_y, 1)), 0)


def standardised(values: Float[np.ndarray, "n v"]) -> Float[np.ndarray, "n v"]:
    """Each column with mean 0 and variance 1 (divided by n), or all 0 where it is constant; float32."""
    centred = values - values.mean(axis=0, dtype=np.float64)
    spread = centred.std(axis=0)
    return (centred / np.where(spread > 0, spread, 1)).astype(np.float32)
