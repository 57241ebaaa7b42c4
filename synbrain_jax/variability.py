"""How real trials vary around a prediction: the calibrated distribution of responses to one picture.

Deviations of trials from the expected response are Gaussian with covariance F F' + D in voxel space: a few patterns F
that voxels share, and independent noise D of each. It is a room of its own because it knows no model: it learns from
the residuals of any prediction, and a bundle carries the result. Voxel space, not latent space, because a decoder that
was trained to be expected responses holds little of the trial noise.

Factor analysis by expectation maximisation (Rubin and Thayer 1982, Psychometrika 47), started from a randomised
principal component analysis (Halko, Martinsson and Tropp 2011, SIAM Review 53). Residuals are read in blocks of rows
and all ranks are fitted in the same pass, so that they may stay on disk; beside a block and arrays of voxels by ranks
nothing is in memory.

Shape letters: n trials, v voxels, r rank, b rows of a block, q columns of a product.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from synbrain_jax.errors import InputError
from synbrain_jax.files import read_npz, write_npz

RANKS = (0, 1, 2, 5, 10, 20, 40, 80)
HELD_OUT_PARTS = 4
_ALL_PARTS_BELOW = 100_000_000  # values: 400 MB, above which one part is held out and not each in turn
_POWER_PASSES, _OVERSAMPLING = 3, 8
_EM_PASSES = 10  # held-out likelihood hardly moves after them
_LEAST_INDEPENDENT = 0.01  # share of a voxel's variance
_BLOCK_VALUES = 16_000_000  # 64 MB


@dataclasses.dataclass(frozen=True, eq=False)
class Spread:
    """Deviations of trials from their expected response: Gaussian of mean 0, in the units and order of the data set."""

    factor: Float[np.ndarray, "v r"]  # float32; covariance is factor @ factor.T + diag(independent)
    independent: Float[np.ndarray, " v"]  # float32, variance
    nll: dict[int, float] = dataclasses.field(default_factory=dict)
    """Rank -> negative log-likelihood of held-out residuals per voxel, in nats; empty if nothing was held out."""

    @property
    def variance(self) -> Float[np.ndarray, " v"]:
        """Of each voxel, float32."""
        return self.independent + (self.factor**2).sum(axis=1)

    def correlation(self) -> Float[np.ndarray, "v v"]:
        """Between voxels, float32: 1 GB for 15,724. A voxel without variance correlates with no other."""
        rows = self.loadings()
        matrix = rows @ rows.T
        np.fill_diagonal(matrix, 1)
        return matrix

    def loadings(self) -> Float[np.ndarray, "v r"]:
        """Rows whose inner products are the correlations between different voxels, float32."""
        variance = self.variance[:, None]
        return self.factor / np.sqrt(np.where(variance > 0, variance, 1))

    def without_correlation(self) -> "Spread":
        """Each voxel's variance, all of it independent."""
        return Spread(self.factor[:, :0], self.variance)

    def save(self, path: str | os.PathLike) -> None:
        """Writes an .npz."""
        ranks, nll = np.array(list(self.nll), np.int32), np.array(list(self.nll.values()), np.float64)
        write_npz(path, {"factor": self.factor, "independent": self.independent, "ranks": ranks, "nll": nll})

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Spread":
        """Reads what `save` wrote; InputError if the file is missing or is not that."""
        arrays = read_npz(path)
        missing = {"factor", "independent", "ranks", "nll"} - arrays.keys()
        if missing:
            raise InputError(f"{os.fspath(path)}: not a spread of trials ({', '.join(sorted(missing))} missing)")
        nll = dict(zip(arrays["ranks"].tolist(), arrays["nll"].tolist(), strict=True))
        return cls(arrays["factor"], arrays["independent"], nll)


def deviations(
    factor: Float[Array | np.ndarray, "v r"], independent: Float[Array | np.ndarray, " v"], key: PRNGKeyArray
) -> Float[Array, " v"]:
    """One draw from N(0, factor @ factor.T + diag(independent)), float32; under vmap over keys one product for all."""
    shared_key, own_key = jax.random.split(key)
    shared = jax.random.normal(shared_key, factor.shape[1:])
    own = jax.random.normal(own_key, factor.shape[:1])
    mixed = jnp.matmul(jnp.asarray(factor), shared, precision=lax.Precision.HIGHEST)
    return mixed + jnp.sqrt(jnp.asarray(independent)) * own


def draw(spread: Spread, key: PRNGKeyArray, count: int) -> Float[np.ndarray, "n v"]:
    """Independent deviations of that spread, float32."""
    return np.asarray(_draw(spread.factor, spread.independent, key, count))


@functools.partial(jax.jit, static_argnames="count")
def _draw(
    factor: Float[Array, "v r"], independent: Float[Array, " v"], key: PRNGKeyArray, count: int
) -> Float[Array, "n v"]:
    return jax.vmap(functools.partial(deviations, factor, independent))(jax.random.split(key, count))


def negative_log_likelihood(spread: Spread, residuals: Float[np.ndarray, "n v"]) -> Float[np.ndarray, " n"]:
    """Of each row under `spread`, in nats per voxel, float64; voxels without variance are left out.

    By the identities of Woodbury and Sylvester: nothing of voxels by voxels is made.
    """
    density = _Density.of(spread)
    parts = [density(block)[own] for block, own in _chosen(residuals, np.ones(len(residuals), bool))]
    return np.concatenate([np.zeros(0), *parts])


def fit_spread(
    residuals: Float[np.ndarray, "n v"], group: Int[np.ndarray, " _"], ranks: Sequence[int] = RANKS, seed: int = 0
) -> Spread:
    """Fits low rank plus diagonal to residuals, the rank by the likelihood of held-out groups.

    Residuals are taken as deviations from the prediction and are not centred: their mean is the business of the
    prediction's offset, and what is left of it counts as spread. Each voxel is scaled to mean square 1 for the fit, so
    that loud ones do not take all patterns. 27,000 residuals of 15,724 voxels on disk took 1.4 GiB beside the pages of
    their file, which the system can have back, and 95 s of CPU time for ranks 0, 2, 10 and 40.

    Args:
        residuals: trial less the prediction of a model that did not see it, float32; an array, or a memory map that is
          read in blocks of rows, about 30 times.
        group: what is held out together: the trial's stimulus or run.
        ranks: to choose from; those not below v and the number of fitted rows are left out.
        seed: of the parts that are held out, and of the start.

    Returns:
        The fit to all rows with the best rank, and the held-out likelihood of every rank: the mean over four parts of
        the groups, each held out in turn; of one part where the residuals are more than 100 million numbers.

    Raises:
        InputError: residuals are not finite, fewer than two groups, or no rank is left.
    """
    if len(group) != len(residuals) or len(np.unique(group)) < 2:
        raise InputError(
            f"{len(residuals)} residuals in {len(np.unique(group))} groups: the rank is chosen on groups that are held "
            "out; expected at least 2, and one number per residual"
        )
    rng = np.random.default_rng(seed)
    names = rng.permutation(np.unique(group))
    parts = [np.isin(group, part) for part in np.array_split(names, min(HELD_OUT_PARTS, len(names)))]
    parts = parts if residuals.size < _ALL_PARTS_BELOW else parts[:1]
    fewest = min(len(group) - part.sum() for part in parts)
    fitted = sorted({rank for rank in ranks if 0 <= rank < min(fewest, residuals.shape[1])})
    if not fitted:
        raise InputError(
            f"ranks are {list(ranks)}; with {fewest} fitted residuals of {residuals.shape[1]} voxels a rank must be "
            f"0 to {min(fewest, residuals.shape[1]) - 1}"
        )
    total = np.zeros(len(fitted))
    for held_out in parts:
        densities = [_Density.of(spread) for spread in _fit(residuals, ~held_out, fitted, rng)]
        for block, rows in _chosen(residuals, held_out):
            total += [density(block)[rows].sum() for density in densities]
    nll = dict(zip(fitted, (total / sum(part.sum() for part in parts)).tolist(), strict=True))
    everything = np.ones(len(group), bool)
    (spread,) = _fit(residuals, everything, [min(nll, key=nll.get)], rng)
    return dataclasses.replace(spread, nll=nll)


def _fit(
    residuals: Float[np.ndarray, "n v"], rows: Bool[np.ndarray, " n"], ranks: Sequence[int], rng: np.random.Generator
) -> list[Spread]:
    """Factor analysis of the chosen rows with every rank, in voxels scaled to mean square 1."""
    power = sum(np.square(block[own], dtype=np.float64).sum(axis=0) for block, own in _chosen(residuals, rows))
    power = power / rows.sum()
    if not np.isfinite(power).all():
        raise InputError("residuals hold NaN or infinite values; check the predictions that they are of")
    scale = np.sqrt(np.where(power > 0, power, 1))
    products = functools.partial(_products, residuals, rows, scale)
    loadings = _principal_loadings(products, max(ranks), rng) if max(ranks) else np.zeros((len(scale), 0))
    factors = [loadings[:, :rank] for rank in ranks]
    own = [np.maximum(1 - (factor**2).sum(axis=1), _LEAST_INDEPENDENT) for factor in factors]
    ends = np.cumsum(ranks)
    for _ in range(_EM_PASSES if max(ranks) else 0):
        # How a residual is turned into the expected strength of each pattern, [v r].
        readouts = [_readout(factor, rest) for factor, rest in zip(factors, own, strict=True)]
        cross, inner = products(np.concatenate(readouts, axis=1))
        for i, (rank, end) in enumerate(zip(ranks, ends, strict=True)):
            part = slice(end - rank, end)
            second = np.eye(rank) - readouts[i].T @ factors[i] + inner[part, part]
            factors[i] = np.linalg.solve(second, cross[:, part].T).T
            own[i] = np.maximum(1 - (factors[i] * cross[:, part]).sum(axis=1), _LEAST_INDEPENDENT)
    return [
        Spread((factor * scale[:, None]).astype(np.float32), (rest * power).astype(np.float32))
        for factor, rest in zip(factors, own, strict=True)
    ]


def _readout(factor: Float[np.ndarray, "v r"], own: Float[np.ndarray, " v"]) -> Float[np.ndarray, "v r"]:
    weighted = factor / own[:, None]
    return np.linalg.solve(np.eye(factor.shape[1]) + factor.T @ weighted, weighted.T).T


def _principal_loadings(products: Callable, rank: int, rng: np.random.Generator) -> Float[np.ndarray, "v r"]:
    """Principal axes times the standard deviation along them, the largest first."""
    columns = rng.normal(size=(len(products.args[-1]), rank + _OVERSAMPLING))[:, : len(products.args[-1])]
    for _ in range(_POWER_PASSES):
        columns = np.linalg.qr(products(columns)[0]).Q
    variance, turn = np.linalg.eigh(products(columns)[1])
    return (columns @ turn * np.sqrt(np.maximum(variance, 0)))[:, ::-1][:, :rank]


def _products(
    residuals: Float[np.ndarray, "n v"],
    rows: Bool[np.ndarray, " n"],
    scale: Float[np.ndarray, " v"],
    columns: Float[np.ndarray, "v q"],
) -> tuple[Float[np.ndarray, "v q"], Float[np.ndarray, "q q"]]:
    """S columns and columns' S columns, S the mean outer product of the chosen, scaled rows; summed in float32."""
    # Scaled here, so that residuals are only multiplied.
    columns, inverse = jnp.asarray(columns / scale[:, None], jnp.float32), jnp.asarray(1 / scale, jnp.float32)
    q = columns.shape[1]
    sums = jnp.zeros((len(scale), q)), jnp.zeros((q, q))
    for block, own in _chosen(residuals, rows):
        sums = _add_products(sums, block, own, columns)
    cross, inner = sums
    return (np.asarray(cross * inverse[:, None], np.float64) / rows.sum(), np.asarray(inner, np.float64) / rows.sum())


@jax.jit
def _add_products(
    sums: tuple[Float[Array, "v q"], Float[Array, "q q"]],
    block: Float[Array, "b v"],
    chosen: Bool[Array, " b"],
    columns: Float[Array, "v q"],
) -> tuple[Float[Array, "v q"], Float[Array, "q q"]]:
    highest = lax.Precision.HIGHEST
    scores = jnp.where(chosen[:, None], jnp.matmul(block, columns, precision=highest), 0)
    cross, inner = (jnp.matmul(left.T, scores, precision=highest) for left in (block, scores))
    return sums[0] + cross, sums[1] + inner


@dataclasses.dataclass(frozen=True, eq=False)
class _Density:
    """The normal density of a spread, prepared: (inverse of D, the correction to it, and what no row changes)."""

    inverse: Float[np.ndarray, " v"]
    correction: Float[np.ndarray, "v r"]
    constant: float
    voxels: int

    @classmethod
    def of(cls, spread: Spread) -> "_Density":
        alive = spread.independent > 0
        factor, own = spread.factor[alive].astype(np.float64), spread.independent[alive].astype(np.float64)
        lower = np.linalg.cholesky(np.eye(factor.shape[1]) + factor.T @ (factor / own[:, None]))
        inverse, correction = np.zeros(len(alive), np.float32), np.zeros(spread.factor.shape, np.float32)
        inverse[alive] = 1 / own
        correction[alive] = np.linalg.solve(lower, (factor / own[:, None]).T).T
        constant = alive.sum() * np.log(2 * np.pi) + np.log(own).sum() + 2 * np.log(np.diagonal(lower)).sum()
        return cls(inverse, correction, float(constant), int(alive.sum()))

    def __call__(self, block: Float[np.ndarray, "b v"]) -> Float[np.ndarray, " b"]:
        distance = np.asarray(_squared_distance(block, self.inverse, self.correction), np.float64)
        return (self.constant + distance) / (2 * self.voxels)


@jax.jit
def _squared_distance(
    block: Float[Array, "b v"], inverse: Float[Array, " v"], correction: Float[Array, "v r"]
) -> Float[Array, " b"]:
    highest = lax.Precision.HIGHEST
    shared = jnp.matmul(block, correction, precision=highest)
    return jnp.matmul(block**2, inverse, precision=highest) - jnp.sum(shared**2, axis=1)


def _chosen(
    residuals: Float[np.ndarray, "n v"], rows: Bool[np.ndarray, " n"]
) -> Iterator[tuple[Float[np.ndarray, "b v"], Bool[np.ndarray, " b"]]]:
    """The blocks that hold one of the chosen rows, and which of theirs are.

    All blocks are of one size, filled up with zeros, so that one program serves them.
    """
    size = max(1, min(len(rows), _BLOCK_VALUES // residuals.shape[1]))
    for start in range(0, len(rows), size):
        own = rows[start : start + size]
        if own.any():
            block, missing = np.asarray(residuals[start : start + size], np.float32), size - len(own)
            yield np.pad(block, ((0, missing), (0, 0))), np.pad(own, (0, missing))
