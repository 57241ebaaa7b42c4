"""Whether synthetic responses behave as measured ones do: across trials, brains, categories and stimuli.

What depends on the choice of stimuli is a function of counts [d s], how often each stimulus is in each of d draws (see
`statistics.py`), and gives one number per draw, so that each comparison gets an interval and differences are paired.
Correlations are 0, not NaN, where one side is constant.

NumPy, on the host. Shape letters: s stimuli, n trials (or samples), v voxels, r regions, c categories, p pairs of
stimuli, d draws.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations, permutations
from typing import Any

import numpy as np
import scipy.stats
from jaxtyping import Bool, Float, Int, Num
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA

from synbrain_jax import metrics
from synbrain_jax.statistics import standardised

TOP = 0.1  # of the voxels: the most selective ones


@dataclasses.dataclass(frozen=True, eq=False)
class Responses:
    """Measured trials, or synthetic ones. Every stimulus from 0 to the last has at least one."""

    fmri: Float[np.ndarray, "n v"]  # float32
    stimulus: Int[np.ndarray, "n"]
    run: Int[np.ndarray, "n"]  # those of one run may share noise; of samples, the number of the sample

    @property
    def stimuli(self) -> int:
        return int(self.stimulus.max()) + 1

    def of(self, rows: Bool[np.ndarray, "n"]) -> "Responses":
        return Responses(self.fmri[rows], self.stimulus[rows], self.run[rows])


def as_responses(samples: Float[np.ndarray, "s k v"]) -> Responses:
    """Samples of each stimulus (or one expected response, k = 1), sample j as if measured in run j."""
    s, k, v = samples.shape
    return Responses(samples.reshape(s * k, v), np.repeat(np.arange(s), k), np.tile(np.arange(k), s))


def as_many(samples: Float[np.ndarray, "s k v"], trials: Responses) -> Responses:
    """Of each stimulus as many of its samples as it has trials (all k, if it has more)."""
    samples_of = as_responses(samples)
    return samples_of.of(samples_of.run < np.bincount(trials.stimulus)[samples_of.stimulus])


def weighted_mean(values: Float[np.ndarray, "s"], counts: Float[np.ndarray, "d s"]) -> Float[np.ndarray, "d"]:
    """Mean over the stimuli of each draw, of those whose value is not NaN; NaN where there is none."""
    known = ~np.isnan(values)
    weight = counts[:, known].sum(axis=1, dtype=np.float64)
    return _ratio(counts[:, known] @ values[known].astype(np.float64), weight)


def known_mean(values: Float[np.ndarray, "d c"]) -> Float[np.ndarray, "d"]:
    """Mean of each row's values that are not NaN; NaN where there is none."""
    return _ratio(np.nansum(values, axis=1), (~np.isnan(values)).sum(axis=1))


def _ratio(total: Float[np.ndarray, "d"], number: Num[np.ndarray, "d"]) -> Float[np.ndarray, "d"]:
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)


# ---- across trials ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Agreement:
    """Mean pattern correlation of each stimulus's responses; NaN where it has no pair."""

    own: Float[np.ndarray, "s"]  # with those to the same stimulus
    other: Float[np.ndarray, "s"]  # with those to other stimuli: chance


def agreement(one: Responses, another: Responses | None = None) -> Agreement:
    """Pearson correlations over voxels of the responses in `one` with those in `another`, by stimulus of `one`.

    Both are centred by the mean over stimuli of their mean responses, so that a pattern common to all stimuli does not
    count. Without `another`, pairs within `one` from different runs: what the trials of a run share may be noise.
    """
    unit = _unit(one)
    if another is not None:
        sums, pairs = _pairs(unit, one.stimulus, _unit(another), another.stimulus, one.stimuli)
    else:
        sums, pairs = _pairs(unit, one.stimulus, unit, one.stimulus, one.stimuli)
        for rows in metrics.group_rows(one.run):  # each holds few of the stimuli, so that this costs little
            shown, place = np.unique(one.stimulus[rows], return_inverse=True)
            within, number = _pairs(unit[rows], place, unit[rows], place, len(shown))
            sums[np.ix_(shown, shown)] -= within
            pairs[np.ix_(shown, shown)] -= number
    own, n_own = np.diagonal(sums), np.diagonal(pairs)
    other, n_other = sums.sum(axis=1) - own, pairs.sum(axis=1) - n_own
    return Agreement(_ratio(own, n_own), _ratio(other, n_other))


def _unit(responses: Responses) -> Float[np.ndarray, "n v"]:
    mean = metrics.group_means(responses.fmri, responses.stimulus).mean(axis=0, dtype=np.float64)
    return _unit_rows((responses.fmri - mean).astype(np.float32))


def _unit_rows(values: Float[np.ndarray, "*n v"]) -> Float[np.ndarray, "*n v"]:
    """Rows with mean 0 and length 1, or all 0."""
    values = values - values.mean(axis=-1, keepdims=True)
    length = np.linalg.norm(values, axis=-1, keepdims=True)
    return values / np.where(length > 0, length, 1)


def _pairs(
    one: Float[np.ndarray, "n v"],
    stimulus: Int[np.ndarray, "n"],
    another: Float[np.ndarray, "m v"],
    other_stimulus: Int[np.ndarray, "m"],
    stimuli: int,
) -> tuple[Float[np.ndarray, "s s"], Float[np.ndarray, "s s"]]:
    """Sum of the inner products of all pairs of rows, by the stimuli of both, and number of pairs."""
    sums = [np.zeros((stimuli, one.shape[1]), np.float32) for _ in range(2)]
    np.add.at(sums[0], stimulus, one)
    np.add.at(sums[1], other_stimulus, another)
    number = [np.bincount(labels, minlength=stimuli).astype(np.float64) for labels in (stimulus, other_stimulus)]
    return (sums[0] @ sums[1].T).astype(np.float64), np.outer(*number)


def halves(responses: Responses, seed: int = 0) -> Int[np.ndarray, "n"]:
    """A random half for each trial, 0 or 1, with equally many runs of its stimulus in both; -1 for what is left over.

    What is halved are the runs that a stimulus was shown in, or its trials where it was shown in one alone.
    """
    rng = np.random.default_rng(seed)
    half = np.full(len(responses.stimulus), -1)
    for rows in metrics.group_rows(responses.stimulus):
        units, place = np.unique(responses.run[rows], return_inverse=True)
        if len(units) == 1:
            place = np.arange(len(rows))
        count = place.max() + 1
        side = np.full(count, -1)
        side[: count // 2 * 2] = np.arange(count // 2 * 2) % 2
        half[rows] = rng.permutation(side)[place]
    return half


def spearman_brown(r: Float[np.ndarray, "*shape"], times: float) -> Float[np.ndarray, "*shape"]:
    """Reliability of `times` as much data from that of a part (Spearman 1910, Brown 1910); 0 where r is below 0."""
    r = np.maximum(r, 0)
    return times * r / (1 + (times - 1) * r)


# ---- across brains ---------------------------------------------------------------------------------


def region_means(fmri: Float[np.ndarray, "n v"], rois: Mapping[str, Bool[np.ndarray, "v"]]) -> Float[np.ndarray, "n r"]:
    """Mean response of the voxels of each region, float32."""
    return np.stack([fmri[:, inside].mean(axis=1, dtype=np.float64) for inside in rois.values()], axis=1).astype(
        np.float32
    )


def across_brains(
    real: Sequence[Any], synthetic: Sequence[Any], r: Callable[[Any, Any], Float[np.ndarray, "d r"]]
) -> dict[str, Float[np.ndarray, "d r"]]:
    """How alike the responses of several brains to the same stimuli are, mean over pairs of brains.

    Args:
        real, synthetic: what each brain has, such as the mean responses of its regions, or their RDMs.
        r: the correlation of two of these, region by region.

    Returns:
        "real, real" and "synthetic, synthetic": of two brains; "real, synthetic": of a brain and another one's
        synthetic responses; "own": of a brain and its own.
    """

    def mean_r(pairs: Iterable[tuple[Any, Any]]) -> Float[np.ndarray, "d r"]:
        return np.mean([r(*pair) for pair in pairs], axis=0)

    return {
        "real, real": mean_r(combinations(real, 2)),
        "synthetic, synthetic": mean_r(combinations(synthetic, 2)),
        "real, synthetic": mean_r((real[a], synthetic[b]) for a, b in permutations(range(len(real)), 2)),
        "own": mean_r(zip(real, synthetic, strict=True)),
    }


# ---- similarity of stimuli -------------------------------------------------------------------------


def rdm(patterns: Float[np.ndarray, "s v"]) -> Float[np.ndarray, "p"]:
    """Representational dissimilarity: 1 - Pearson correlation of each pair of patterns, centred over stimuli.

    The pairs are those above the diagonal, row by row. Method: Kriegeskorte, Mur and Bandettini 2008, Frontiers in
    Systems Neuroscience 2:4.
    """
    unit = _unit_rows(metrics.centred(patterns))
    return (1 - unit @ unit.T)[np.triu_indices(len(unit), 1)].astype(np.float64)


def rdm_r(
    one: Float[np.ndarray, "p"], another: Float[np.ndarray, "p"], counts: Float[np.ndarray, "d s"]
) -> Float[np.ndarray, "d"]:
    """Spearman correlation of two RDMs: in each draw, the Pearson correlation of the ranks that pairs have among all.

    A pair is there as often as both its stimuli together. Pairs of a stimulus with itself are left out: they would be
    alike in all RDMs.
    """
    s = counts.shape[1]

    def sum_over_pairs(values: Float[np.ndarray, "p"]) -> Float[np.ndarray, "d"]:
        square = np.zeros((s, s))
        square[np.triu_indices(s, 1)] = values
        return np.sum(counts @ square * counts, axis=1)

    x, y = (scipy.stats.rankdata(values) / len(values) - 0.5 for values in (one, another))
    number = np.maximum(sum_over_pairs(np.ones(len(one))), 1)
    xx, yy, xy, mean_x, mean_y = (sum_over_pairs(values) / number for values in (x * x, y * y, x * y, x, y))
    power = (xx - mean_x**2) * (yy - mean_y**2)
    return np.where(power > 1e-12, (xy - mean_x * mean_y) / np.sqrt(np.where(power > 1e-12, power, 1)), 0)


# ---- selectivity -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """What t and d' depend on: of each stimulus the number of its trials, and the sums of values and squares.

    Values are less their column's mean and over its standard deviation, which t and d' do not see.
    """

    number: Float[np.ndarray, "s"]
    total: Float[np.ndarray, "s v"]
    squares: Float[np.ndarray, "s v"]


def moments(responses: Responses) -> Moments:
    """Of voxels, or of the regions that `responses.fmri` has as columns."""
    values = standardised(responses.fmri)
    sums = np.zeros((2, responses.stimuli, values.shape[1]), np.float32)
    np.add.at(sums[0], responses.stimulus, values)
    np.add.at(sums[1], responses.stimulus, values**2)
    return Moments(np.bincount(responses.stimulus).astype(np.float32), *sums)


@dataclasses.dataclass(frozen=True, eq=False)
class Contrasts:
    """Each category against all others in each draw; 0 where a side has fewer than two trials or nothing varies."""

    t: Float[np.ndarray, "c d v"]  # Welch 1947, Biometrika 34
    freedom: Float[np.ndarray, "c d v"]
    d_prime: Float[np.ndarray, "c d v"]  # difference of means over the root mean of both variances


def contrasts(of: Moments, inside: Bool[np.ndarray, "c s"], counts: Float[np.ndarray, "d s"]) -> Contrasts:
    """How the trials of the stimuli in each category differ from those of the others."""
    everything = _sums(of, counts)
    found = []
    for category in inside:
        own = _sums(of, counts * category, category)
        found.append(_contrast(own, [total - part for total, part in zip(everything, own, strict=True)]))
    return Contrasts(*(np.stack(values) for values in zip(*found, strict=True)))


def _sums(
    of: Moments, counts: Float[np.ndarray, "d s"], rows: Bool[np.ndarray, "s"] | slice = slice(None)
) -> list[Float[np.ndarray, "d _"]]:
    """Number of trials, their sum and sum of squares, of the stimuli `rows` that are counted."""
    return [counts[:, rows] @ values[rows] for values in (of.number[:, None], of.total, of.squares)]


def _contrast(
    own: Sequence[Float[np.ndarray, "d _"]], others: Sequence[Float[np.ndarray, "d _"]]
) -> tuple[Float[np.ndarray, "d v"], ...]:
    numbers, means, variances = [], [], []
    for number, total, squares in (own, others):
        numbers.append(number)
        means.append(total / np.maximum(number, 1))
        spread = np.maximum(squares - number * means[-1] ** 2, 0)
        # Rounding leaves less of what does not vary.
        variances.append(np.where(spread > 1e-5 * number, spread, 0) / np.maximum(number - 1, 1))
    difference, pooled = means[0] - means[1], (variances[0] + variances[1]) / 2
    shares = [variance / np.maximum(number, 1) for variance, number in zip(variances, numbers, strict=True)]
    known = (numbers[0] > 1) & (numbers[1] > 1) & (pooled > 0)
    error, pooled = (np.where(known, values, 1) for values in (shares[0] + shares[1], pooled))
    below = sum(part**2 / np.maximum(number - 1, 1) for part, number in zip(shares, numbers, strict=True))
    return (
        np.where(known, difference / np.sqrt(error), 0),
        np.where(known, error**2 / np.where(known, below, 1), 1),
        np.where(known, difference / np.sqrt(pooled), 0),
    )


def row_r(one: Float[np.ndarray, "*d v"], another: Float[np.ndarray, "*d v"]) -> Float[np.ndarray, "*d"]:
    """Pearson correlation over voxels of each pair of rows."""
    return np.sum(_unit_rows(one) * _unit_rows(another), axis=-1)


def top(t: Float[np.ndarray, "*d v"], share: float = TOP) -> Bool[np.ndarray, "*d v"]:
    """The `share` of each row's voxels that have the largest t, at least one."""
    least = max(1, round(share * t.shape[-1]))
    return t >= np.partition(t, -least, axis=-1)[..., [-least]]


def significant(
    t: Float[np.ndarray, "*d v"], freedom: Float[np.ndarray, "*d v"], q: float = 0.05
) -> Bool[np.ndarray, "*d v"]:
    """Voxels with t above 0 at a false discovery rate of q over each row (Benjamini and Hochberg 1995), one-sided."""
    return scipy.stats.false_discovery_control(scipy.stats.t.sf(t, freedom), axis=-1) < q


def dice(one: Bool[np.ndarray, "*d v"], another: Bool[np.ndarray, "*d v"]) -> Float[np.ndarray, "*d"]:
    """Twice the voxels in both over the sum of those in each; NaN where both are empty."""
    sizes = one.sum(axis=-1) + another.sum(axis=-1)
    return np.where(sizes > 0, 2 * (one & another).sum(axis=-1) / np.maximum(sizes, 1), np.nan)


def clusters(features: Float[np.ndarray, "s f"], number: int, seed: int = 0) -> Int[np.ndarray, "s"]:
    """k-means (scikit-learn) of standardised features, a category from 0 for each stimulus."""
    found = KMeans(min(number, len(features)), n_init=10, random_state=seed).fit_predict(standardised(features))
    return found.astype(np.int64)


# ---- latents ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Plane:
    """Two principal components."""

    trials: Float[np.ndarray, "n 2"]
    mapped: Float[np.ndarray, "s 2"]
    share: Float[np.ndarray, "2"]  # of the variance of what they were fitted to


def latent_plane(
    trials: Float[np.ndarray, "n f"], stimulus: Int[np.ndarray, "n"], mapped: Float[np.ndarray, "s f"]
) -> Plane:
    """BrainVAE's latents of trials and the mapper's latents of their stimuli in the plane of the first two principal
    components of the stimuli's mean trial latents. Raises scikit-learn's ValueError below two stimuli."""
    pca = PCA(2, random_state=0).fit(metrics.group_means(trials, stimulus))
    return Plane(pca.transform(trials), pca.transform(mapped), pca.explained_variance_ratio_)
