"""Whether synthetic responses vary as real trials do: distributions around one prediction, scored on held-out trials.

Every distribution ("row") is of deviations from the same expected response, so that what differs is the spread alone. A
room of its own because `variability.py` fits without knowing any model or data set, and here both come together.

Scores as in Gneiting and Raftery (2007, Journal of the American Statistical Association 102): Gaussian log-likelihood,
energy score of the whole pattern, continuous ranked probability score (CRPS) of single voxels. Noise correlations are
compared as matrices, beside what a perfect model could reach with so few trials.

Shape letters: s stimuli, n trials, v voxels, m samples, w voxels of a matrix.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray
from scipy.special import ndtr, ndtri
from sklearn.covariance import ledoit_wolf_shrinkage

from synbrain_jax import metrics
from synbrain_jax.data.pairs import Trials
from synbrain_jax.errors import InputError
from synbrain_jax.statistics import Estimate, bootstrap_interval
from synbrain_jax.synthesis import SynBrain, Variability
from synbrain_jax.variability import Spread, draw, negative_log_likelihood

LEVELS = (50, 80, 95)  # per cent, of the central intervals
SAMPLES = 4000  # with a tenth of them, chance moves energy scores by more than rows differ
MAX_MATRIX_VOXELS = 4000  # a matrix of all 15,724 would take 1 GB, and its eigenvectors hours
SPLITS = 10


@dataclasses.dataclass(frozen=True, eq=False)
class Drawn:
    """A distribution known by deviations from the expected response; `complete` if it is these and no others."""

    deviations: Float[np.ndarray, "m v"]
    complete: bool = False


Row = Spread | Drawn


@dataclasses.dataclass(frozen=True)
class RowScores:
    """One distribution on held-out trials; lower is better from `nll` on."""

    variance_ratio: tuple[float, float, float]
    """Synthetic mean square over that of the trials, both about the prediction: quartiles over voxels; 1 is right."""
    coverage: dict[str, float]
    """Level in per cent -> share of all trials' voxels inside the central interval."""
    correlation_match: float | None
    """Pearson correlation of synthetic and real noise correlations over pairs of voxels; 0 if all are the same."""
    truth_match: float | None
    """The same with the true noise correlations, where they are known."""
    nll: float | None
    """Negative log-likelihood in nats per voxel and trial; only of what has a density."""
    energy_score: float
    """In units of the data, of patterns of all voxels."""
    energy_score_fair: float
    """The same without the cost of having finitely many responses, which a complete `Drawn` pays; else equal."""
    energy_difference: Estimate | None
    """`energy_score` less that of the compared row: mean over blocks, and its 95 % bootstrap interval."""
    crps: float
    """In units of the data, mean over voxels and trials."""


@dataclasses.dataclass(frozen=True)
class MatrixCeiling:
    """How well real noise correlations agree with themselves, and what that leaves for a perfect model."""

    split_half: float  # match of two halves of the trials, mean over splits
    reliability: float  # of all trials, by the formula of Spearman and Brown
    perfect_model: float  # its square root: the expected match of the true matrix
    halves_of: str  # "runs" or "stimuli"


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What `scores` returns."""

    rows: dict[str, RowScores]
    ceiling: MatrixCeiling | None  # None where there are too few trials to halve
    noise: str  # what the real noise correlations are of: "within stimuli" or "about the prediction"
    real_truth_match: float | None  # of the real noise correlations with the true ones, where they are known
    block: str  # what is drawn as one in intervals: "stimulus in a run" or "stimulus"
    n_trials: int
    n_blocks: int
    matrix_voxels: int


# ---- rows ------------------------------------------------------------------------------------------


def standard_rows(
    model: SynBrain,
    tokens: Any,
    residuals: Float[np.ndarray, "n v"] | None,
    key: PRNGKeyArray,
    *,
    samples: int = SAMPLES,
    noise_factor: float = 1.0,
) -> tuple[dict[str, Row], dict[str, str]]:
    """The model's calibrated spread, and what it must beat, by name; then those left out, and why.

    independent: each voxel's variance alone. ledoit_wolf: `ledoit_wolf` of the residuals. resampled: `resampled`
    residuals. posterior, latent_noise: `SynBrain.synthesize` with that variability, the second with `noise_factor`;
    their deviations are drawn for all stimuli of `tokens` (evenly spaced ones, if there are more than `samples`) and
    pooled. calibrated: the bundle's spread. A drawn row takes 4 `samples` v bytes: 250 MB for 15,724 voxels.

    Args:
        tokens: [s t d], of the held-out stimuli.
        residuals: of the trials to which the spread was fitted, if they are known.

    Raises:
        InputError: the bundle has no spread.
    """
    spread = model.bundle.spread
    if spread is None:
        raise InputError("the bundle knows no spread of trials; learn it with `synbrain calibrate`")
    rows: dict[str, Row] = {"independent": spread.without_correlation()}
    left_out = {}
    resample_key, posterior_key, noise_key = jax.random.split(key, 3)
    if residuals is None:
        left_out |= dict.fromkeys(("ledoit_wolf", "resampled"), "the residuals are not at hand")
    elif residuals.shape[1] <= MAX_MATRIX_VOXELS:
        rows["ledoit_wolf"] = ledoit_wolf(residuals)
    else:
        left_out["ledoit_wolf"] = f"needs a matrix of all voxels: above {MAX_MATRIX_VOXELS} too large"
    if residuals is not None:
        rows["resampled"] = resampled(residuals, resample_key, samples)
    if model.bundle.latent_std is None:
        left_out["posterior"] = "the bundle does not know the spread of BrainVAE's posterior"
    else:
        rows["posterior"] = latent_deviations(model, tokens, "posterior", posterior_key, samples)
    rows["latent_noise"] = latent_deviations(model, tokens, "latent_noise", noise_key, samples, noise_factor)
    return rows | {"calibrated": spread}, left_out


def ledoit_wolf(residuals: Float[np.ndarray, "n v"]) -> Spread:
    """The covariance of Ledoit and Wolf (2004, Journal of Multivariate Analysis 88), of residuals taken as centred.

    Voxels are scaled to mean square 1 before. Holds a copy of the residuals and three matrices of v by v, float64.
    """
    scale = np.sqrt(np.mean(np.square(residuals, dtype=np.float64), axis=0))
    scaled = residuals / np.where(scale > 0, scale, 1).astype(np.float32)
    shrinkage = ledoit_wolf_shrinkage(scaled, assume_centered=True)
    empirical = np.asarray(_inner_products(scaled), np.float64) / len(scaled)
    values, vectors = np.linalg.eigh(empirical)
    factor = vectors * np.sqrt((1 - shrinkage) * np.maximum(values, 0)) * scale[:, None]
    independent = shrinkage * np.trace(empirical) / len(scale) * scale**2
    return Spread(factor.astype(np.float32), independent.astype(np.float32))


def resampled(residuals: Float[np.ndarray, "n v"], key: PRNGKeyArray, samples: int = SAMPLES) -> Drawn:
    """The training residuals themselves, each equally likely; of more than `samples`, so many chosen at random."""
    if len(residuals) <= samples:
        return Drawn(np.asarray(residuals, np.float32), complete=True)
    chosen = np.sort(np.asarray(jax.random.choice(key, len(residuals), (samples,), replace=False)))
    return Drawn(np.asarray(residuals[chosen], np.float32))


def latent_deviations(
    model: SynBrain,
    tokens: Any,
    variability: Variability,
    key: PRNGKeyArray,
    samples: int = SAMPLES,
    noise_factor: float = 1.0,
) -> Drawn:
    """Synthetic responses less the expected one of their stimulus: at least `samples`, as many of every stimulus."""
    chosen = np.unique(np.linspace(0, len(tokens) - 1, samples).round().astype(int))
    k = math.ceil(samples / len(chosen))
    some, batch_size = tokens[chosen], min(32, len(chosen))  # padding would be drawn k times, too
    drawn = model.synthesize(some, key, k=k, variability=variability, noise_factor=noise_factor, batch_size=batch_size)
    drawn -= model.predict(some, batch_size)[:, None]
    return Drawn(drawn.reshape(-1, drawn.shape[-1]))


# ---- scores ----------------------------------------------------------------------------------------


def scores(
    prediction: Float[np.ndarray, "s v"],
    trials: Trials,
    rows: Mapping[str, Row],
    key: PRNGKeyArray,
    *,
    compared: str = "calibrated",
    truth: Spread | None = None,
    samples: int = SAMPLES,
) -> Calibration:
    """Scores distributions of deviations against held-out trials less the prediction of their stimulus.

    Variance ratio and coverage are of that difference, model error included, as are the densities. Of a Gaussian row
    (`Spread`) all but the energy score is exact; for that, `samples` deviations are drawn once and serve every trial.

    Real noise correlations are of deviations within stimuli, trial less the mean of its stimulus's n trials, times
    sqrt(n / (n - 1)); of trials less prediction, centred, only where no stimulus repeats. Their ceiling comes from
    halves of the runs where a run repeats a stimulus, the mean being that of the half, else from halves of the stimuli.
    Of more than MAX_MATRIX_VOXELS voxels, evenly spaced ones stand for all in these matrices.

    Intervals are over blocks: the trials of a stimulus in a run where a run repeats a stimulus, else of a stimulus.

    Args:
        prediction: expected response to each stimulus of `trials`, in its order.
        rows: by name, all around that prediction.
        compared: the row that the others' energy scores are compared with, if it is there.
        truth: the noise of the trials, where it is known.

    Raises:
        InputError: a shape does not fit, values are not finite, or a drawn row has fewer than two deviations.
    """
    held_out = _held_out(prediction, trials, rows)
    voxels = np.arange(0, held_out.shape[1], -(-held_out.shape[1] // MAX_MATRIX_VOXELS))
    noise, kind = noise_deviations(trials.fmri[:, voxels], trials.stimulus, prediction[:, voxels])
    real = correlations(noise)
    true = None if truth is None else _matrix(truth, voxels)
    in_run = _runs_repeat(trials)
    block = np.unique(np.stack([trials.stimulus, trials.run * in_run], 1), axis=0, return_inverse=True)[1].reshape(-1)

    found, energies = {}, {}
    for number, (name, row) in enumerate(rows.items()):
        matrix = _matrix(row, voxels)
        marginal = _marginal_scores(row, held_out)
        drawn = row if isinstance(row, Drawn) else Drawn(draw(row, jax.random.fold_in(key, number), samples))
        fair, cost = energy_scores(drawn, held_out)
        energies[name] = fair + cost
        found[name] = RowScores(
            **marginal,
            correlation_match=matrix_match(matrix, real),
            truth_match=None if true is None else matrix_match(matrix, true),
            nll=float(negative_log_likelihood(row, held_out).mean()) if isinstance(row, Spread) else None,
            energy_score=float(energies[name].mean()),
            energy_score_fair=float(fair.mean()),
            energy_difference=None,
        )
    for name in found.keys() - {compared} if compared in found else ():
        difference = metrics.group_means((energies[name] - energies[compared])[:, None], block)[:, 0]
        estimate = bootstrap_interval(difference, len(difference)) if len(difference) > 1 else None
        found[name] = dataclasses.replace(found[name], energy_difference=estimate)
    return Calibration(
        rows=found,
        ceiling=matrix_ceiling(trials, prediction, voxels),
        noise=kind,
        real_truth_match=None if true is None else matrix_match(real, true),
        block="stimulus in a run" if in_run else "stimulus",
        n_trials=len(held_out),
        n_blocks=len(np.unique(block)),
        matrix_voxels=len(voxels),
    )


def _held_out(
    prediction: Float[np.ndarray, "s v"], trials: Trials, rows: Mapping[str, Row]
) -> Float[np.ndarray, "n v"]:
    expected = (len(trials.stimulus_id), trials.fmri.shape[1])
    if prediction.shape != expected:
        raise InputError(f"prediction has shape {prediction.shape}, expected {expected}: one pattern per stimulus")
    for name, row in rows.items():
        values = row.deviations if isinstance(row, Drawn) else row.factor.T
        if values.shape[1] != expected[1] or (isinstance(row, Drawn) and len(values) < 2):
            raise InputError(
                f"row {name}: {list(values.shape)} numbers; expected {expected[1]} voxels, and at least 2 deviations "
                "if it is drawn"
            )
        if not np.isfinite(values).all():
            raise InputError(f"row {name} holds NaN or infinite values; check the model that made it")
    held_out = trials.fmri - prediction[trials.stimulus]
    if not np.isfinite(held_out).all():
        raise InputError("the prediction or the trials hold NaN or infinite values; check the model that made it")
    return held_out


def energy_scores(row: Drawn, held_out: Float[np.ndarray, "n v"]) -> tuple[Float[np.ndarray, "n"], float]:
    """Energy score of each trial, E|X - y| - E|X - X'| / 2, estimated without bias over all pairs of draws; float64.

    And what is to be added to all of them if the row is complete: X and X' are then often the same.
    """
    drawn = jnp.asarray(row.deviations)
    m = len(drawn)
    between = float(np.asarray(_mean_distances(drawn, drawn), np.float64).mean()) * m / (m - 1)
    toward = np.asarray(_mean_distances(jnp.asarray(held_out), drawn), np.float64)
    return toward - between / 2, between / (2 * m) if row.complete else 0.0


@jax.jit
def _mean_distances(points: Float[Array, "n v"], others: Float[Array, "m v"]) -> Float[Array, "n"]:
    squares = jnp.sum(others**2, axis=1)

    def from_one(point):
        inner = jnp.matmul(others, point, precision=lax.Precision.HIGHEST)
        return jnp.mean(jnp.sqrt(jnp.maximum(jnp.sum(point**2) + squares - 2 * inner, 0)))

    return lax.map(from_one, points, batch_size=256)


def _marginal_scores(row: Row, held_out: Float[np.ndarray, "n v"]) -> dict[str, Any]:
    """Variance ratio, coverage and CRPS: of single voxels, whose number alone decides how long this takes.

    A voxel that is 0 in all trials, as where nothing was measured, would be inside every interval: it is left out.
    """
    power = np.mean(np.square(held_out, dtype=np.float64), axis=0)
    alive = np.flatnonzero(power)
    variance, inside, crps = np.zeros(len(power)), np.zeros(len(LEVELS)), 0.0
    for v in alive:
        y = held_out[:, v].astype(np.float64)
        if isinstance(row, Drawn):
            x = np.sort(row.deviations[:, v]).astype(np.float64)
            variance[v] = np.mean(x**2)
            ends = np.quantile(x, [[(100 - level) / 200, (100 + level) / 200] for level in LEVELS]).T
            crps += crps_drawn(x, y, row.complete).mean()
        else:
            variance[v] = row.independent[v] + np.sum(row.factor[v] ** 2)
            ends = np.array([[-1], [1]]) * np.sqrt(variance[v]) * ndtri((100 + np.array(LEVELS)) / 200)
            crps += crps_gaussian(np.sqrt(variance[v]), y).mean()
        inside += np.mean((ends[0] <= y[:, None]) & (y[:, None] <= ends[1]), axis=0)
    ratio = np.quantile(variance[alive] / power[alive], (0.25, 0.5, 0.75))
    coverage = {str(level): float(share) for level, share in zip(LEVELS, inside / len(alive), strict=True)}
    return {
        "variance_ratio": tuple(float(value) for value in ratio),
        "coverage": coverage,
        "crps": float(crps / len(alive)),
    }


def crps_gaussian(sd: float | np.floating, y: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """CRPS of N(0, sd^2) for each value, in closed form (Gneiting et al. 2005, Monthly Weather Review 133)."""
    if sd == 0:
        return np.abs(y)
    z = y / sd
    density = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
    return sd * (z * (2 * ndtr(z) - 1) + 2 * density - 1 / np.sqrt(np.pi))


def crps_drawn(
    ascending: Float[np.ndarray, "m"], y: Float[np.ndarray, "n"], complete: bool = False
) -> Float[np.ndarray, "n"]:
    """CRPS for each value: E|X - y| - E|X - X'| / 2 over all pairs of draws, which are `complete` as in `Drawn`."""
    m, below = len(ascending), np.searchsorted(ascending, y)
    sums = np.concatenate([[0.0], np.cumsum(ascending)])
    toward = (y * (2 * below - m) + sums[-1] - 2 * sums[below]) / m
    pairs = 2 * np.sum((2 * np.arange(m) - m + 1) * ascending) / (m * m if complete else m * (m - 1))
    return toward - pairs / 2


# ---- noise correlations ----------------------------------------------------------------------------


def noise_deviations(
    fmri: Float[np.ndarray, "n v"], stimulus: Int[np.ndarray, "n"], prediction: Float[np.ndarray, "s v"]
) -> tuple[Float[np.ndarray, "k v"], str]:
    """Deviations within stimuli, of those that repeat, times sqrt(n / (n - 1)); about the prediction if none does."""
    repeated = [rows for rows in metrics.group_rows(stimulus) if len(rows) > 1]
    if not repeated:
        return fmri - prediction[stimulus], "about the prediction"
    parts = [np.sqrt(len(rows) / (len(rows) - 1)) * (fmri[rows] - fmri[rows].mean(axis=0)) for rows in repeated]
    return np.concatenate(parts).astype(np.float32), "within stimuli"


def correlations(residuals: Float[np.ndarray, "n w"]) -> Float[np.ndarray, "w w"]:
    """Pearson correlations between voxels, float32; 0 with a voxel that is constant."""
    centred = metrics.centred(residuals)
    norms = np.sqrt(np.sum(np.square(centred, dtype=np.float64), axis=0))
    return np.asarray(_inner_products((centred / np.where(norms > 0, norms, 1)).astype(np.float32)))


@jax.jit
def _inner_products(rows: Float[Array, "n w"]) -> Float[Array, "w w"]:
    return jnp.matmul(rows.T, rows, precision=lax.Precision.HIGHEST)


def _matrix(row: Row, voxels: Int[np.ndarray, "w"]) -> Float[np.ndarray, "w w"]:
    if isinstance(row, Drawn):
        return correlations(row.deviations[:, voxels])
    return Spread(row.factor[voxels], row.independent[voxels]).correlation()


def matrix_match(one: Float[np.ndarray, "w w"], other: Float[np.ndarray, "w w"]) -> float | None:
    """Pearson correlation over pairs of voxels; 0 if a matrix has no two different ones, None below three voxels."""
    if len(one) < 3:
        return None
    pairs = ~np.eye(len(one), dtype=bool)
    return float(metrics.voxel_pearson(one[pairs][:, None], other[pairs][:, None])[0])


def matrix_ceiling(
    trials: Trials, prediction: Float[np.ndarray, "s v"], voxels: Int[np.ndarray, "w"]
) -> MatrixCeiling | None:
    """The match of real noise correlations from two halves of the trials, and what follows from it; see `scores`."""
    by_run = _runs_repeat(trials) and len(np.unique(trials.run)) > 1
    unit = trials.run if by_run else trials.stimulus
    names, rng = np.unique(unit), np.random.default_rng(0)
    if len(names) < 2 or len(voxels) < 3:
        return None
    fmri, expected = trials.fmri[:, voxels], prediction[:, voxels]

    def of(half) -> Float[np.ndarray, "w w"]:
        rows = np.isin(unit, list(half))
        return correlations(noise_deviations(fmri[rows], trials.stimulus[rows], expected)[0])

    halves = {frozenset(rng.permutation(names)[: len(names) // 2].tolist()) for _ in range(SPLITS)}
    splits = {frozenset([half, frozenset(names.tolist()) - half]) for half in halves}
    found = [matrix_match(*map(of, split)) for split in splits]
    half = float(np.mean(found))
    reliability = 2 * half / (1 + half)
    return MatrixCeiling(half, reliability, math.sqrt(max(reliability, 0)), "runs" if by_run else "stimuli")


def _runs_repeat(trials: Trials) -> bool:
    """Whether a run that shows a stimulus holds several trials of it: on average two or more.

    Where a picture comes twice in a run only now and then, as in the Natural Scenes Dataset, they are not blocks.
    """
    blocks = np.unique(np.stack([trials.stimulus, trials.run], axis=1), axis=0)
    return 2 * len(blocks) <= len(trials.stimulus)
