"""The numbers that the evaluation of the authors' public release prints (MichaelMaiii/SynBrain, commit f2db4c9).

Defined exactly as there, so that ours can be put beside those of SynBrain (arXiv 2508.10298).

Some of its definitions are not what their names promise; here the names say what is computed, and the docstrings what
the release calls it. For work that need not match published tables use `synbrain_jax.metrics`.

NumPy, on the host, float64 inside unless stated (the release computes in float32, its retrieval on a GPU in float16).
NaN where the release has NaN: a constant pattern has no correlation.

Shape letters: n stimuli or pictures, t trials per stimulus, v voxels, s samples, r rows, f features, d draws,
k stimuli per draw, h and w picture height and width.
"""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
import scipy.ndimage
import scipy.stats
from jaxtyping import Array, Float, Int

from synbrain_jax.errors import InputError

AnyArray = Array | np.ndarray


# ---- synthesised responses against single trials ---------------------------------------------------


def per_trial_mse(synthesised: Float[AnyArray, "n 1 v"], trials: Float[AnyArray, "n t v"]) -> Float[np.ndarray, "n t"]:
    """Squared error, mean over voxels, of each stimulus's one synthesised pattern against each of its trials.

    The release prints the mean of all, "MSE". Against the average of the trials it would be lower.
    """
    return np.mean((_float64(synthesised) - _float64(trials)) ** 2, axis=-1)


def per_trial_pearson(
    synthesised: Float[AnyArray, "n 1 v"], trials: Float[AnyArray, "n t v"]
) -> Float[np.ndarray, "n t"]:
    """Pearson correlation over voxels of each synthesised pattern with each trial; the release prints the mean."""
    return _correlation(*map(_float64, (synthesised, trials)))


def per_trial_cosine(
    synthesised: Float[AnyArray, "n 1 v"], trials: Float[AnyArray, "n t v"]
) -> Float[np.ndarray, "n t"]:
    """Cosine, not centred, of each synthesised pattern with each trial; the release prints the mean.

    0 where a pattern is all zero.
    """
    synthesised, trials = _float64(synthesised), _float64(trials)
    lengths = _length(synthesised) * _length(trials)
    return np.sum(synthesised * trials, axis=-1) / np.where(lengths == 0, 1, lengths)[..., 0]


def trial_rows(
    synthesised: Float[AnyArray, "n 1 v"], trials: Float[AnyArray, "n t v"]
) -> tuple[Float[np.ndarray, "r v"], Float[np.ndarray, "r v"]]:
    """The two arguments of `covariance_alignment` in the release: a row per trial, the synthesised one repeated."""
    synthesised, trials = np.asarray(synthesised), np.asarray(trials)
    return np.repeat(synthesised[:, 0], trials.shape[1], axis=0), trials.reshape(-1, trials.shape[2])


def covariance_alignment(x: Float[AnyArray, "r v"], y: Float[AnyArray, "r v"]) -> float:
    """What the release prints as "CKA", and what published tables mean by it; it is not linear CKA.

    With columns centred, ||X Y'||² / (||X X'|| ||Y Y'|| + 1e-8) in Frobenius norms, where linear CKA has ||Y' X||² on
    top: here the cosine between the two voxel-by-voxel covariance matrices. It asks whether the same voxels
    vary together in both, for which the rows need not even be in the same order; linear CKA (`metrics.linear_cka`)
    asks whether the same rows are alike in both. The two can differ much in either direction.
    """
    x, y = (_float64(z) - np.mean(z, axis=0, dtype=np.float64) for z in (x, y))
    cross, own_x, own_y = (np.sum((a @ b.T) ** 2) for a, b in ((x, y), (x, x), (y, y)))
    return float(cross / (np.sqrt(own_x * own_y) + 1e-8))


@dataclasses.dataclass(frozen=True, eq=False)
class VoxelScores:
    """See `voxel_scores`."""

    mse: float
    explained_variance_total: float
    spearman: Float[np.ndarray, "v"]
    explained_variance: Float[np.ndarray, "v"]


def voxel_scores(measured: Float[AnyArray, "s v"], reconstructed: Float[AnyArray, "s v"]) -> VoxelScores:
    """The release's `evaluate_fmri_reconstruction`, in the data's own dtype.

    Mean squared error and explained variance over all entries at once; Spearman correlation and explained variance
    of each voxel over samples. A voxel with the same value in all samples has Spearman NaN, and explained variance 0
    if it was measured so. Raises InputError below two samples, for which the release fails.
    """
    if len(measured) < 2:
        raise InputError(f"scores per voxel need at least 2 samples, got {len(measured)}")
    measured, reconstructed = np.asarray(measured), np.asarray(reconstructed)
    error = measured - reconstructed
    ranks = (scipy.stats.rankdata(x, axis=0).T for x in (measured, reconstructed))
    return VoxelScores(
        mse=float(np.mean(error**2)),
        explained_variance_total=float(_explained(error.reshape(1, -1), measured.reshape(1, -1))[0]),
        spearman=_correlation(*ranks),
        # One contiguous row per voxel: NumPy then sums it exactly as the release's loop over voxels does.
        explained_variance=_explained(np.ascontiguousarray(error.T), np.ascontiguousarray(measured.T)),
    )


@dataclasses.dataclass(frozen=True)
class Percentiles:
    """The four numbers by which the release summarises voxels."""

    median: float
    p90: float
    p95: float
    p99: float


def percentiles(values: Float[AnyArray, "v"]) -> Percentiles:
    """Percentiles over voxels. A single NaN makes all of them NaN, as in the release."""
    return Percentiles(*(float(value) for value in np.percentile(_float64(values), [50, 90, 95, 99])))


# ---- retrieval and identification ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Retrieval:
    """Share of the k stimuli of each draw that are retrieved correctly; chance 1 / k."""

    image_to_brain: Float[np.ndarray, "d"]  # for each image the most similar brain latent: the release's "fwd"
    brain_to_image: Float[np.ndarray, "d"]  # for each brain latent the most similar image: the release's "bwd"


def retrieval_draws(n: int, seed: int, draws: int = 30, size: int = 300) -> Int[np.ndarray, "d k"]:
    """Which of n stimuli each draw has, without replacement.

    The release does not seed NumPy's legacy generator; had it called `numpy.random.seed(seed)` just before, it would
    have drawn these. Raises InputError if there are fewer stimuli than a draw needs.
    """
    if n < size:
        raise InputError(f"retrieval among {size} stimuli needs at least as many, got {n}: pass a smaller `size`")
    generator = np.random.RandomState(seed)
    return np.stack([generator.choice(n, size, replace=False) for _ in range(draws)])


def retrieval_top1(
    image: Float[AnyArray, "n ..."], brain: Float[AnyArray, "n ..."], draws: Int[AnyArray, "d k"]
) -> Retrieval:
    """Top-1 retrieval by cosine within each of `retrieval_draws`, over embeddings of any shape, in float32.

    The release has three calls: (CLIP tokens, latent of the measured response), (latent synthesised from the picture,
    latent of the measured response) and (CLIP tokens, latent of the synthesised response).
    For top-1 among all stimuli, without draws, see `metrics.identification_top1`.
    """
    _require_pairs(image, brain)
    similarity = batchwise_cosine(*(np.asarray(x, np.float32).reshape(len(x), -1) for x in (brain, image)))
    drawn = [similarity[np.ix_(draw, draw)] for draw in np.asarray(draws)]
    return Retrieval(
        image_to_brain=np.array([topk(of_images, 1) for of_images in drawn]),
        brain_to_image=np.array([topk(of_images.T, 1) for of_images in drawn]),
    )


def normal_interval(values: Float[AnyArray, "d"]) -> tuple[float, float]:
    """The 95 % interval printed beside a retrieval: mean ± 1.96 population standard deviations / sqrt(d).

    It covers the choice of draws from the one set of stimuli only, not what other stimuli would give.
    """
    values = _float64(values)
    half = scipy.stats.norm.ppf(0.975) * values.std() / np.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


def batchwise_cosine(z: Float[AnyArray, "n f"], b: Float[AnyArray, "m f"]) -> Float[np.ndarray, "m n"]:
    """Cosine of row i of z with row j of b at [j, i]: transposed, as in the release. In the data's own dtype."""
    return _unit(np.asarray(b)) @ _unit(np.asarray(z)).T


def batchwise_pearson(z: Float[AnyArray, "n f"], b: Float[AnyArray, "m f"]) -> Float[np.ndarray, "n m"]:
    """Pearson correlation of row i of z with row j of b at [i, j]: not transposed, as in the release."""
    z, b = (_unit(_centred(_float64(x))) for x in (z, b))
    return z @ b.T


def topk(similarity: Float[AnyArray, "n n"], k: int = 5) -> float:
    """Share of rows i whose entry i is among the row's k largest (of equal ones, those on the right)."""
    largest = np.argsort(np.asarray(similarity), axis=1, kind="stable")[:, -k:]
    return float(np.mean(np.any(largest == np.arange(len(largest))[:, None], axis=1)))


def two_way_counts(ground_truth: Float[AnyArray, "n f"], prediction: Float[AnyArray, "n f"]) -> Int[np.ndarray, "n"]:
    """For each prediction, with how many ground truths it correlates less than with its own.

    The inequality is strict, so a tie counts as a failure, up to rounding: `metrics.identification_two_way` counts it
    half. Features of a picture network, flattened, in the release. Raises InputError below two stimuli.
    """
    _require_pairs(ground_truth, prediction)
    # numpy.corrcoef as the release has it, since exact ties depend on how it rounds.
    correlation = np.corrcoef(ground_truth, prediction)[: len(ground_truth), len(ground_truth) :]
    return np.sum(correlation < np.diagonal(correlation), axis=0)


def two_way_identification(ground_truth: Float[AnyArray, "n f"], prediction: Float[AnyArray, "n f"]) -> float:
    """Mean of `two_way_counts` over the n - 1 distractors; chance 0.5.

    Printed for AlexNet ("Alex 2", "Alex 5"), Inception and CLIP. Swapping the arguments gives another number.
    """
    return float(two_way_counts(ground_truth, prediction).mean() / (len(ground_truth) - 1))


def correlation_distance(
    ground_truth: Float[AnyArray, "n f"], prediction: Float[AnyArray, "n f"]
) -> Float[np.ndarray, "n"]:
    """1 - Pearson correlation of each pair of features, lower is better; EfficientNet's and SwAV's mean is printed."""
    return 1 - _correlation(*map(_float64, (ground_truth, prediction)))


# ---- pictures --------------------------------------------------------------------------------------


def pixcorr(ground_truth: Float[AnyArray, "n 3 h w"], prediction: Float[AnyArray, "n 3 h w"]) -> Float[np.ndarray, "n"]:
    """Pearson correlation over all colour values of each pair of pictures, resized to 425; the mean is printed.

    The release hands in pictures that it has already resized to 256 x 256.
    """
    return _per_picture(
        lambda truth, guess: _correlation(truth.reshape(1, -1), guess.reshape(1, -1)).item(), ground_truth, prediction
    )


def ssim(ground_truth: Float[AnyArray, "n 3 h w"], prediction: Float[AnyArray, "n 3 h w"]) -> Float[np.ndarray, "n"]:
    """Structural similarity (Wang et al. 2004, IEEE TIP 13) of each pair of pictures in [0, 1]; the mean is printed.

    Resized to 425 and grey. Gaussian windows of sigma 1.5, cut off at 5 pixels, population covariance, mean over the
    windows that lie within the picture: scikit-image's, with the options that the release passes.
    """
    return _per_picture(_ssim, ground_truth, prediction)


def _per_picture(
    score: Callable[[Float[np.ndarray, "3 _ _"], Float[np.ndarray, "3 _ _"]], float],
    ground_truth: Float[AnyArray, "n 3 h w"],
    prediction: Float[AnyArray, "n 3 h w"],
) -> Float[np.ndarray, "n"]:
    """One pair at a time, since 1,000 resized pictures are 2 GB."""
    pairs = zip(ground_truth, prediction, strict=True)
    return np.array([score(_resized(truth), _resized(guess)) for truth, guess in pairs])


def _resized(picture: Float[AnyArray, "3 h w"], shorter_side: int = 425) -> Float[np.ndarray, "3 _ _"]:
    """Bilinear with half-pixel centres, no antialiasing; the shorter side becomes 425, the longer one in proportion."""
    height, width = (int(shorter_side * side / min(picture.shape[1:])) for side in picture.shape[1:])
    return _float64(jax.image.resize(picture, (3, height, width), "bilinear", antialias=False))


def _ssim(truth: Float[np.ndarray, "3 h w"], guess: Float[np.ndarray, "3 h w"]) -> float:
    def window_mean(x):
        return scipy.ndimage.gaussian_filter(x, sigma=1.5, radius=5)[5:-5, 5:-5]

    x, y = (np.tensordot([0.2125, 0.7154, 0.0721], picture, axes=1) for picture in (truth, guess))
    mean_x, mean_y = window_mean(x), window_mean(y)
    var_x, var_y = window_mean(x**2) - mean_x**2, window_mean(y**2) - mean_y**2
    cov = window_mean(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
    structure = (2 * cov + 0.03**2) / (var_x + var_y + 0.03**2)
    return float(np.mean(luminance * structure))


# ---- rows ------------------------------------------------------------------------------------------


def _require_pairs(first: Float[AnyArray, "..."], second: Float[AnyArray, "..."]) -> None:
    if len(first) != len(second) or len(first) < 2:
        raise InputError(
            f"needs the same stimuli on both sides, at least 2, in the same order; got {len(first)} and {len(second)}"
        )


def _float64(values: Float[AnyArray, "..."]) -> Float[np.ndarray, "..."]:
    return np.asarray(values, np.float64)


def _centred(rows: Float[np.ndarray, "... f"]) -> Float[np.ndarray, "... f"]:
    rows = rows - rows[..., :1]  # so that a constant row becomes exactly 0
    return rows - rows.mean(axis=-1, keepdims=True)


def _length(rows: Float[np.ndarray, "... f"]) -> Float[np.ndarray, "... 1"]:
    return np.linalg.norm(rows, axis=-1, keepdims=True)


def _unit(rows: Float[np.ndarray, "... f"]) -> Float[np.ndarray, "... f"]:
    with np.errstate(invalid="ignore"):
        return rows / _length(rows)  # NaN for a row of zeros


def _correlation(x: Float[np.ndarray, "... f"], y: Float[np.ndarray, "... f"]) -> Float[np.ndarray, "..."]:
    """Pearson correlation of corresponding rows; NaN where one is constant."""
    return np.sum(_unit(_centred(x)) * _unit(_centred(y)), axis=-1)


def _explained(error: Float[np.ndarray, "r f"], measured: Float[np.ndarray, "r f"]) -> Float[np.ndarray, "r"]:
    """1 - var(error) / var(measured) of each row; 0 where there is nothing to explain."""
    total = measured.var(axis=1)
    return _float64(1 - np.divide(error.var(axis=1), total, out=np.ones_like(total), where=total > 0))
