"""From measured fMRI back to the tokens of the picture that was seen: two decoders. `retrieval.py` scores them.

Whatever has `decode` can be scored, a decoder of other weights too. Ours are ridge regression in closed form, and a
residual network that is also trained for retrieval. Both learn from single trials, each with a weight, so that
synthetic trials may count less than real ones, and what they choose they choose by real trials held out.

Shape letters: n trials, v voxels, s pictures, t tokens, d token width, f = t x d token values.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from synbrain_jax import losses, metrics
from synbrain_jax.config import OptimizerConfig
from synbrain_jax.errors import InputError
from synbrain_jax.models.token_decoder import TokenDecoder, TokenDecoderConfig
from synbrain_jax.training import make_optimizer

PENALTIES = tuple(10.0**power for power in (4, 3, 2, 1.5, 1, 0.5, 0, -0.5, -1, -1.5, -2, -3))  # strongest first


@runtime_checkable
class Decoder(Protocol):
    """What tells tokens from fMRI."""

    def decode(self, fmri: Float[np.ndarray, "n v"]) -> Float[np.ndarray, "n t d"]:
        """Tokens (float32) of what was seen in each trial, or in each mean of trials."""


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """Trials, and what was seen in them."""

    fmri: Float[np.ndarray, "n v"]
    tokens: Float[np.ndarray, "s t d"]
    stimulus: Int[np.ndarray, "n"]  # index into tokens
    weight: Float[np.ndarray, "n"]  # how much a trial counts, at least 0

    @classmethod
    def alike(
        cls, fmri: Float[np.ndarray, "n v"], tokens: Float[np.ndarray, "s t d"], stimulus: Int[np.ndarray, "n"]
    ) -> "Examples":
        """Examples that all count as one."""
        return cls(fmri, tokens, stimulus, np.ones(len(fmri)))

    def mean_tokens(self) -> Float[np.ndarray, "t d"]:
        """Mean over trials, by weight."""
        share = np.bincount(self.stimulus, self.weight, len(self.tokens)) / self.weight.sum()
        return np.einsum("s,std->td", share.astype(np.float32), self.tokens)

    def with_more(self, other: "Examples", weight: float) -> "Examples":
        """These and others; the others' weights are multiplied by `weight`."""
        return Examples(
            np.concatenate([self.fmri, other.fmri]),
            np.concatenate([self.tokens, other.tokens]),
            np.concatenate([self.stimulus, other.stimulus + len(self.tokens)]),
            np.concatenate([self.weight, weight * other.weight]),
        )


# ---- ridge -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class LinearDecoder:
    """tokens = mean_tokens + (fmri - mean_fmri) @ kernel."""

    mean_fmri: Float[np.ndarray, "v"]
    mean_tokens: Float[np.ndarray, "t d"]
    kernel: Float[np.ndarray, "v f"]

    def decode(self, fmri: Float[np.ndarray, "n v"]) -> Float[np.ndarray, "n t d"]:
        decoded = (fmri - self.mean_fmri) @ self.kernel
        return decoded.reshape(len(fmri), *self.mean_tokens.shape) + self.mean_tokens


class Moments(NamedTuple):
    """Weighted sums over trials: all that ridge regression needs where voxels are fewer than trials; float64.

    They add up, so that real and synthetic trials of many amounts and weights are each looked at once.
    """

    weight: float
    fmri: Float[np.ndarray, "v"]
    tokens: Float[np.ndarray, "t d"]
    fmri_fmri: Float[np.ndarray, "v v"]
    fmri_tokens: Float[np.ndarray, "v f"]

    @classmethod
    def of(cls, trials: Examples) -> "Moments":
        """The sums of some trials, read 4,096 at a time."""
        size = trials.fmri.shape[1]
        total = cls(0.0, np.zeros(size), np.zeros(trials.tokens.shape[1:]), np.zeros((size, size)), np.zeros(()))
        for start in range(0, len(trials.fmri), 4096):
            rows = slice(start, start + 4096)
            weight, fmri = trials.weight[rows].astype(np.float64), trials.fmri[rows].astype(np.float64)
            tokens = trials.tokens[trials.stimulus[rows]].astype(np.float64)
            weighted = weight[:, None] * fmri
            total = total.plus(
                cls(
                    float(weight.sum()),
                    weighted.sum(axis=0),
                    np.einsum("n,ntd->td", weight, tokens),
                    fmri.T @ weighted,
                    weighted.T @ tokens.reshape(len(tokens), -1),
                )
            )
        return total

    def plus(self, other: "Moments", weight: float = 1.0) -> "Moments":
        """The sums of these trials and of others, whose weights are multiplied by `weight`."""
        return Moments(*(mine + weight * its for mine, its in zip(self, other, strict=True)))


def fit_ridges(train: Examples | Moments, penalties: Sequence[float] = PENALTIES) -> list[LinearDecoder]:
    """Weighted ridge regression with an intercept that is not penalised, one decoder for each penalty.

    Minimises sum_i w_i |tokens_i - decode(fmri_i)|^2 + penalty x scale x |kernel|^2. Of the scatter matrix [v v] or,
    where the examples are fewer than voxels, their weighted Gram matrix [n n], all about the weighted mean, the
    eigenvalues are computed once for all penalties, in float64; scale is their sum over the number of voxels. Where all
    trials are the same, up to rounding, the mean tokens are decoded from anything.
    """
    dual = isinstance(train, Examples) and len(train.fmri) < train.fmri.shape[1]
    problem = _dual(train) if dual else _primal(train if isinstance(train, Moments) else Moments.of(train))
    values, vectors = np.linalg.eigh(problem.matrix)
    values = values.clip(0)
    if values.mean() <= 1e-12 * problem.size:
        nothing = np.zeros((len(problem.mean_fmri), problem.right.shape[1]), np.float32)
        return [LinearDecoder(problem.mean_fmri.astype(np.float32), problem.mean_tokens, nothing)] * len(penalties)
    scale = values.sum() / len(problem.mean_fmri)
    rotated = vectors.T @ problem.right
    back = vectors if problem.left is None else problem.left @ vectors
    kernels = (back @ (rotated / (values + penalty * scale)[:, None]) for penalty in penalties)
    return [
        LinearDecoder(problem.mean_fmri.astype(np.float32), problem.mean_tokens, kernel.astype(np.float32))
        for kernel in kernels
    ]


class _Problem(NamedTuple):
    """Ridge regression as kernel = left @ inverse(matrix + penalty) @ right; left None: the identity."""

    mean_fmri: Float[np.ndarray, "v"]
    mean_tokens: Float[np.ndarray, "t d"]
    left: Float[np.ndarray, "v m"] | None
    matrix: Float[np.ndarray, "m m"]
    right: Float[np.ndarray, "m f"]
    size: float  # mean of the matrix's diagonal before the mean was taken out, by which rounding is told


def _primal(sums: Moments) -> _Problem:
    mean_fmri, mean_tokens = sums.fmri / sums.weight, sums.tokens / sums.weight
    matrix = sums.fmri_fmri - sums.weight * np.outer(mean_fmri, mean_fmri)
    right = sums.fmri_tokens - sums.weight * np.outer(mean_fmri, mean_tokens)
    size = float(np.trace(sums.fmri_fmri) / len(matrix))
    return _Problem(mean_fmri, mean_tokens.astype(np.float32), None, matrix, right, size)


def _dual(train: Examples) -> _Problem:
    weight = train.weight.astype(np.float64)
    root = np.sqrt(weight)[:, None]
    raw = root * train.fmri
    mean_fmri, mean_tokens = root[:, 0] @ raw / weight.sum(), train.mean_tokens()
    fmri = raw - root * mean_fmri
    right = root * (train.tokens - mean_tokens).reshape(len(train.tokens), -1)[train.stimulus]
    return _Problem(mean_fmri, mean_tokens, fmri.T, fmri @ fmri.T, right, float(np.square(raw).sum() / len(raw)))


# ---- the network -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class NetworkSettings:
    """How the residual network learns. The defaults were chosen by `agreement` on validation pictures of the
    simulation, with 60 and 250 pictures and with many synthetic trials."""

    hidden: int = 256
    depth: int = 1
    dropout: float = 0.5
    retrieval_weight: float = 0.5
    """Multiplies soft-CLIP, against the squared error per token value in units of the values' variance."""
    batch_size: int = 128
    steps: int = 200
    eval_every: int = 20
    """Steps between validations; the best of them is the result."""
    patience: int = 4
    """Validations without improvement after which it ends."""
    learning_rate: float = 3e-3
    """Of AdamW, down to zero along half a cosine."""
    weight_decay: float = 3.0

    def optimizer(self) -> optax.GradientTransformation:
        config = OptimizerConfig(self.learning_rate, "cosine", weight_decay=self.weight_decay, clip_norm=1.0)
        return make_optimizer(config, self.steps)


class _Scaling(NamedTuple):
    """Units in which the network sees voxels and gives tokens."""

    mean_fmri: Float[Array, "v"]
    std_fmri: Float[Array, "v"]
    mean_tokens: Float[Array, "t d"]
    std_tokens: float


@dataclasses.dataclass(frozen=True, eq=False)
class NetworkDecoder:
    """A trained `TokenDecoder`, and the units it was trained in."""

    config: TokenDecoderConfig
    params: PyTree
    scaling: _Scaling

    def decode(self, fmri: Float[np.ndarray, "n v"]) -> Float[np.ndarray, "n t d"]:
        return np.asarray(_decode(self.config, self.params, self.scaling, fmri.astype(np.float32)))


@functools.partial(jax.jit, static_argnums=0)
def _decode(
    config: TokenDecoderConfig, params: PyTree, scaling: _Scaling, fmri: Float[Array, "n v"]
) -> Float[Array, "n t d"]:
    scaled = (fmri - scaling.mean_fmri[None]) / scaling.std_fmri[None]
    tokens = TokenDecoder(config).apply({"params": params}, scaled)
    return scaling.mean_tokens[None] + scaling.std_tokens * tokens


def fit_network(
    train: Examples, validation: Examples, origin: Float[np.ndarray, "t d"], settings: NetworkSettings, seed: int
) -> NetworkDecoder:
    """Trains the network on batches drawn by weight, with replacement, to the step of best `agreement` in validation.

    Loss: squared error per token value + retrieval_weight x soft-CLIP (`losses.soft_clip`) of a batch's decoded and
    true tokens, both about their mean. Batches and dropout follow from `seed` and the step. What is compiled does not
    depend on how many trials there are.
    """
    config = TokenDecoderConfig(*train.tokens.shape[1:], settings.hidden, settings.depth, settings.dropout)
    scaling = _scaling(train)
    draw = np.random.default_rng(seed)
    key = jax.random.key(seed)
    params, opt_state = _start(config, settings, train.fmri.shape[1], key)
    share = train.weight / train.weight.sum()
    best, kept, waited = -np.inf, None, 0
    for start in range(0, settings.steps, settings.eval_every):
        rows = draw.choice(len(share), (settings.eval_every, settings.batch_size), p=share)
        batches = train.fmri[rows], train.tokens[train.stimulus[rows]]
        params, opt_state = _train(config, settings, params, opt_state, scaling, batches, start, key)
        decoder = NetworkDecoder(config, params, scaling)
        score = agreement(decoder, validation, origin)
        best, kept, waited = (score, decoder, 0) if score > best else (best, kept, waited + 1)
        if waited == settings.patience:
            break
    if kept is None:
        raise InputError("the network's output is not finite; look at the scale of the trials, about 1 is expected")
    return kept


def _scaling(train: Examples) -> _Scaling:
    share = train.weight / train.weight.sum()
    mean = share @ train.fmri
    variance = share @ np.square(train.fmri - mean)
    mean_tokens = train.mean_tokens()
    per_picture = np.square(train.tokens - mean_tokens).mean((1, 2))
    std_tokens = float(np.sqrt(share @ per_picture[train.stimulus]))
    std = np.sqrt(np.where(variance > 0, variance, 1))
    return _Scaling(mean.astype(np.float32), std.astype(np.float32), mean_tokens, std_tokens or 1.0)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _start(
    config: TokenDecoderConfig, settings: NetworkSettings, n_voxels: int, key: PRNGKeyArray
) -> tuple[PyTree, PyTree]:
    params = TokenDecoder(config).init(key, jnp.zeros((1, n_voxels)))["params"]
    return params, settings.optimizer().init(params)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _train(
    config: TokenDecoderConfig,
    settings: NetworkSettings,
    params: PyTree,
    opt_state: PyTree,
    scaling: _Scaling,
    batches: tuple[Float[Array, "k b v"], Float[Array, "k b t d"]],
    start: Int[Array, ""] | int,
    key: PRNGKeyArray,
) -> tuple[PyTree, PyTree]:
    """As many steps as there are batches, from step `start` on."""
    model, optimizer = TokenDecoder(config), settings.optimizer()

    def loss(params, fmri, tokens, key):
        fmri = (fmri - scaling.mean_fmri[None]) / scaling.std_fmri[None]
        target = (tokens - scaling.mean_tokens[None]) / scaling.std_tokens
        decoded = model.apply({"params": params}, fmri, training=True, rngs={"dropout": key})
        return jnp.square(decoded - target).mean() + settings.retrieval_weight * losses.soft_clip(decoded, target)

    def step(state, numbered):
        params, opt_state = state
        number, fmri, tokens = numbered
        grads = jax.grad(loss)(params, fmri, tokens, jax.random.fold_in(key, number))
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    numbers = start + jnp.arange(len(batches[0]))
    state, _ = jax.lax.scan(step, (params, opt_state), (numbers, *batches))
    return state


# ---- choosing, by trials held out ------------------------------------------------------------------


def agreement(decoder: Decoder, held_out: Examples, origin: Float[np.ndarray, "t d"]) -> float:
    """Mean cosine of decoded and true tokens about `origin`, over single trials by weight.

    It is smooth where few are held out, and no more than retrieval does it see the size of what is decoded.
    """
    decoded, true = decoder.decode(held_out.fmri), held_out.tokens[held_out.stimulus]
    cosine = np.asarray(metrics.cosine(rows_about(decoded, origin), rows_about(true, origin)))
    return float(np.average(cosine, weights=held_out.weight))


def choose(decoders: Iterable[Decoder], held_out: Examples, origin: Float[np.ndarray, "t d"]) -> tuple[Decoder, float]:
    """The decoder of best `agreement` with trials held out, of equal ones the first; and that agreement."""
    scored = [(decoder, agreement(decoder, held_out, origin)) for decoder in decoders]
    return max(scored, key=lambda pair: pair[1])


def rows_about(tokens: Float[np.ndarray, "n t d"], origin: Float[np.ndarray, "t d"]) -> Float[np.ndarray, "n f"]:
    """Tokens less `origin`, one row for each set of them."""
    return (tokens - origin).reshape(len(tokens), -1)
