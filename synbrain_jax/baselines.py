"""What any encoding model must beat: predictions that need no neural network, fitted on training trials alone.

A room of its own because it is the only one that needs scikit-learn, and nothing in it depends on how scores are
computed. Shape letters: s stimuli, v voxels, n trials, t tokens, d token width.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from einops import rearrange
from jaxtyping import Float, Int
from sklearn.kernel_ridge import KernelRidge
from sklearn.model_selection import GroupKFold

from synbrain_jax import metrics
from synbrain_jax.data.pairs import Trials
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
    predictions["kernel_ridge"] = _kernel_ridge(_gaussian_kernels(gram, len(train.tokens)), train, folds)
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
    kernels: Sequence[Float[np.ndarray, "_ _"]], train: Trials, folds: Sequence[tuple[np.ndarray, np.ndarray]]
) -> Float[np.ndarray, "s v"]:
    """Predicts the test stimuli (the last rows of each kernel; the first are the training stimuli).

    Fits stimulus means weighted by their number of trials, which has the same minimiser as fitting the trials.
    The kernel and penalty are those with the least squared error of held-out trials, summed over folds and voxels;
    with many voxels, over about a thousand of them, evenly spaced. Held-out means weighted by trials stand for the
    held-out trials: their error differs only by the spread of the trials, which no choice changes.
    """
    some_voxels = slice(None, None, -(-train.fmri.shape[1] // MAX_VOXELS_IN_CROSS_VALIDATION))
    error = np.zeros((len(kernels), len(PENALTIES)))
    for fitted_rows, held_out_rows in folds:
        fitted = _stimulus_means(train, fitted_rows, some_voxels)
        held_out = _stimulus_means(train, held_out_rows, some_voxels)
        for k, kernel in enumerate(kernels):
            for p, penalty in enumerate(PENALTIES):
                residual = held_out.pattern - _fit_predict(kernel, fitted, held_out.stimulus, penalty)
                error[k, p] += len(held_out_rows) * np.mean(held_out.weight * (residual**2).mean(axis=1))
    k, p = np.unravel_index(np.argmin(error), error.shape)
    everything = _stimulus_means(train, np.arange(len(train.fmri)))
    test_rows = np.arange(len(train.stimulus_id), len(kernels[k]))
    return _fit_predict(kernels[k], everything, test_rows, PENALTIES[p]).astype(np.float32)


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
    train_tokens: Float[np.ndarray, "_ t d"], test_tokens: Float[np.ndarray, "_ t d"], chunk: int = 4096
) -> Float[np.ndarray, "_ _"]:
    """Inner products (float64) of flattened tokens, training stimuli first, about the mean training tokens.

    Works through `chunk` features at a time, so that tokens of any float type need no second copy in memory.
    """
    train, test = (rearrange(tokens, "s t d -> s (t d)") for tokens in (train_tokens, test_tokens))
    gram = np.zeros((len(train) + len(test),) * 2)
    for start in range(0, train.shape[1], chunk):
        features = np.concatenate([x[:, start : start + chunk] for x in (train, test)]).astype(np.float32)
        features -= features[: len(train)].mean(axis=0)
        gram += features @ features.T
    return gram


def _gaussian_kernels(gram: Float[np.ndarray, "_ _"], n_train: int) -> list[Float[np.ndarray, "_ _"]]:
    norms = np.diagonal(gram)
    squared = np.maximum(norms[:, None] + norms - 2 * gram, 0)
    distances = np.sqrt(squared[:n_train, :n_train][np.triu_indices(n_train, 1)])
    median = np.median(distances[distances > 0]) if (distances > 0).any() else 1.0
    return [np.exp(-squared / (2 * (width * median) ** 2)) for width in WIDTHS]
