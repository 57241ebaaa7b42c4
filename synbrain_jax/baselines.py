"""What any encoding model must beat: predictions that need no neural network, fitted on training trials alone.

A room of its own because it is the only one that needs scikit-learn, and nothing in it depends on how scores are
computed. Shape letters: s stimuli, v voxels, n trials, t tokens, d token width.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from einops import rearrange
from jaxtyping import Float, Int
from sklearn.kernel_ridge import KernelRidge
from sklearn.model_selection import GroupKFold

from synbrain_jax import metrics
from synbrain_jax.data.pairs import Trials
from synbrain_jax.data.tokens import StoredTokens
from synbrain_jax.errors import InputError

N_FOLDS = 5
PENALTIES = np.logspace(2, -4, 13)  # times the mean squared feature norm; the strongest first, so that it wins ties
WIDTHS = (0.5, 1.0, 2.0)  # times the median distance between the tokens of training stimuli
MAX_VOXELS_IN_CROSS_VALIDATION = 1000


def baseline_predictions(train: Trials, test: Trials) -> dict[str, Float[np.ndarray, "s v"]]:
    """Predictions for the stimuli of `test` that need no neural network, fitted on `train` alone; float32.

    stimulus_mean: mean training trial of the same stimulus; left out if a test stimulus has none.
    ridge, kernel_ridge (Gaussian kernel): least squares from the flattened tokens, with an intercept that is not
      penalised. One penalty (and kernel width) for all voxels, by cross-validation within `train`.
    mean_pattern: mean training trial.

    Raises InputError if `train` has fewer than two stimuli.
    """
    if len(train.stimulus_id) < 2:
        raise InputError(f"the training split has {len(train.stimulus_id)} stimulus; expected at least 2")
    place = {stimulus: index for index, stimulus in enumerate(train.stimulus_id)}
    repeated = all(stimulus in place for stimulus in test.stimulus_id)
    predictions = {}
    if repeated:
        means = _stimulus_means(train, np.arange(len(train.fmri))).pattern
        predictions["stimulus_mean"] = means[[place[stimulus] for stimulus in test.stimulus_id]]
    gram = token_gram(train.tokens, test.tokens)
    folds = _folds(train, by_run=repeated)
    predictions["ridge"] = _kernel_ridge([gram], train, folds)
    squared = _squared_distances(gram)
    del gram  # 660 MB for the 9,100 pictures of one person's Natural Scenes Dataset
    predictions["kernel_ridge"] = _kernel_ridge(_gaussian_kernels(squared, len(train.tokens)), train, folds)
    mean = train.fmri.mean(axis=0, dtype=np.float64).astype(np.float32)
    predictions["mean_pattern"] = np.tile(mean, (len(test.stimulus_id), 1))
    return predictions


@dataclasses.dataclass(frozen=True, eq=False)
class _StimulusMeans:
    """Mean of some trials of each stimulus that occurs among them, and its weight: their number, of mean 1."""

    stimulus: Int[np.ndarray, "s"]
    pattern: Float[np.ndarray, "s v"]
    weight: Float[np.ndarray, "s"]


def _stimulus_means(trials: Trials, rows: Int[np.ndarray, "_"], voxels: slice = slice(None)) -> _StimulusMeans:
    groups = [rows[group] for group in metrics.group_rows(trials.stimulus[rows])]
    counts = np.array([len(group) for group in groups])
    return _StimulusMeans(
        stimulus=np.array([trials.stimulus[group[0]] for group in groups]),
        pattern=np.stack([trials.fmri[group, voxels].mean(axis=0, dtype=np.float64) for group in groups]).astype(
            np.float32
        ),
        weight=counts / counts.mean(),
    )


def _folds(train: Trials, by_run: bool) -> list[tuple[Int[np.ndarray, "_"], Int[np.ndarray, "_"]]]:
    """Splits training trials as training was split from test.

    Where test stimuli occur in training, the question is how well a known stimulus is predicted in a new run, so
    runs are held out; by stimulus, the penalty would be chosen for a harder question and flatten the prediction.
    Where they do not, stimuli are held out: a held-out run holds known stimuli, and would favour memorising them.
    """
    by_run = by_run and len(np.unique(train.run)) > 1
    group = train.run if by_run else train.stimulus
    return list(GroupKFold(min(N_FOLDS, len(np.unique(group)))).split(group, groups=group))


def _kernel_ridge(
    kernels: Iterable[Float[np.ndarray, "_ _"]], train: Trials, folds: Sequence[tuple[np.ndarray, np.ndarray]]
) -> Float[np.ndarray, "s v"]:
    """Predicts the test stimuli (the last rows of each kernel; the first are the training stimuli).

    Fits stimulus means weighted by their number of trials, which has the same minimiser as fitting the trials.
    The kernel and penalty are those with the least squared error of held-out trials, summed over folds and voxels;
    with many voxels, over about a thousand of them, evenly spaced. Held-out means weighted by trials stand for the
    held-out trials: their error differs only by the spread of the trials, which no choice changes.
    """
    some_voxels = slice(None, None, -(-train.fmri.shape[1] // MAX_VOXELS_IN_CROSS_VALIDATION))
    parts = [tuple(_stimulus_means(train, rows, some_voxels) for rows in fold) for fold in folds]
    trials = [len(held_out_rows) for _, held_out_rows in folds]
    best = (np.inf, None, None)
    for kernel in kernels:  # one after the other: each may be large
        error = np.zeros(len(PENALTIES))
        for (fitted, held_out), n in zip(parts, trials, strict=True):
            for p, penalty in enumerate(PENALTIES):
                residual = held_out.pattern - _fit_predict(kernel, fitted, held_out.stimulus, penalty)
                error[p] += n * np.mean(held_out.weight * (residual**2).mean(axis=1))
        if error.min() < best[0]:
            best = (error.min(), kernel, PENALTIES[np.argmin(error)])
    _, kernel, penalty = best
    everything = _stimulus_means(train, np.arange(len(train.fmri)))
    test_rows = np.arange(len(train.stimulus_id), len(kernel))
    return _fit_predict(kernel, everything, test_rows, penalty).astype(np.float32)


def _fit_predict(
    kernel: Float[np.ndarray, "_ _"], fitted: _StimulusMeans, rows: Int[np.ndarray, "s"], penalty: float
) -> Float[np.ndarray, "s v"]:
    """Kernel ridge with an unpenalised intercept: features and targets are centred by their weighted means."""
    share = fitted.weight / fitted.weight.sum()
    inner, outer = kernel[np.ix_(fitted.stimulus, fitted.stimulus)], kernel[np.ix_(rows, fitted.stimulus)]
    uncentred_scale = np.trace(inner) / len(inner)
    to_mean = inner @ share
    outer = outer - (outer @ share)[:, None] - to_mean + share @ to_mean
    inner = inner - to_mean[:, None] - to_mean + share @ to_mean
    mean_pattern = share @ fitted.pattern
    scale = np.trace(inner) / len(inner)
    if scale <= 1e-12 * uncentred_scale:  # all tokens are the same
        return np.tile(mean_pattern, (len(rows), 1))
    ridge = KernelRidge(alpha=penalty * scale, kernel="precomputed")
    ridge.fit(inner, fitted.pattern - mean_pattern, sample_weight=fitted.weight)
    return ridge.predict(outer) + mean_pattern


def token_gram(
    train_tokens: Float[np.ndarray, "_ t d"] | StoredTokens,
    test_tokens: Float[np.ndarray, "_ t d"] | StoredTokens,
    block_bytes: int = 2**29,
) -> Float[np.ndarray, "_ _"]:
    """Inner products (float64) of flattened tokens, training stimuli first, about the mean training tokens.

    Works through blocks of stimuli, of `block_bytes` each as float32, two at a time, so that tokens may stay on disk;
    each block is read about half as often as there are blocks.
    """
    size = max(1, block_bytes // (4 * math.prod(train_tokens.shape[1:])))

    def blocks_of(tokens, first: int) -> list[tuple]:
        return [(tokens, slice(start, start + size), first + start) for start in range(0, len(tokens), size)]

    train_blocks = blocks_of(train_tokens, 0)
    blocks = train_blocks + blocks_of(test_tokens, len(train_tokens))
    mean = sum(tokens[rows].sum(axis=0, dtype=np.float64) for tokens, rows, _ in train_blocks)
    mean = (mean / len(train_tokens)).astype(np.float32)

    def features(tokens, rows) -> Float[np.ndarray, "_ features"]:
        return rearrange(tokens[rows].astype(np.float32, copy=False) - mean, "s t d -> s (t d)")

    gram = np.zeros((len(train_tokens) + len(test_tokens),) * 2)
    for number, (*block, at) in enumerate(blocks):
        one = features(*block)
        for *other_block, other_at in blocks[number:]:
            other = one if other_at == at else features(*other_block)
            product = _product(one, other)
            gram[at : at + len(one), other_at : other_at + len(other)] = product
            gram[other_at : other_at + len(other), at : at + len(one)] = product.T
    return gram


def _product(
    one: Float[np.ndarray, "_ features"], other: Float[np.ndarray, "_ features"], chunk: int = 4096
) -> Float[np.ndarray, "_ _"]:
    """`one @ other.T` in float32, `chunk` features at a time, summed in float64."""
    total = np.zeros((len(one), len(other)))
    for start in range(0, one.shape[1], chunk):
        total += one[:, start : start + chunk] @ other[:, start : start + chunk].T
    return total


def _squared_distances(gram: Float[np.ndarray, "_ _"]) -> Float[np.ndarray, "_ _"]:
    norms = np.diagonal(gram)
    return np.maximum(norms[:, None] + norms - 2 * gram, 0)


def _gaussian_kernels(squared: Float[np.ndarray, "_ _"], n_train: int) -> Iterator[Float[np.ndarray, "_ _"]]:
    """For each width, from squared distances."""
    between = np.sqrt(squared[:n_train, :n_train])
    between = between[between > 0]  # each pair comes twice, which does not move the median
    median = np.median(between) if len(between) else 1.0
    for width in WIDTHS:
        yield np.exp(-squared / (2 * (width * median) ** 2))
