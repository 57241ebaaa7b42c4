"""Baselines against scikit-learn on single trials, a closed form, and cases with a known best answer."""

import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import sklearn.linear_model
from sklearn.model_selection import GroupKFold

from synbrain_jax import baselines
from synbrain_jax.data.pairs import Trials
from synbrain_jax.data.tokens import StoredTokens
from synbrain_jax.errors import InputError


def make_trials(tokens, patterns, counts, noise, *, seed=0, runs=1, names=None) -> Trials:
    """`counts` trials of each stimulus, its pattern plus white noise, dealt out to the runs in turn."""
    rng = np.random.default_rng(seed)
    stimulus = np.repeat(np.arange(len(patterns), dtype=np.int32), counts)
    fmri = patterns[stimulus] + noise * rng.normal(size=(len(stimulus), patterns.shape[1]))
    return Trials(
        stimulus_id=tuple(names or (f"picture {i}" for i in range(len(patterns)))),
        tokens=tokens.astype(np.float32),
        fmri=fmri.astype(np.float32),
        stimulus=stimulus,
        run=np.arange(len(stimulus), dtype=np.int32) % runs,
        session=np.zeros(len(stimulus), np.int32),
    )


def new_stimuli(function, *, n_train=24, n_test=10, noise=0.3, seed=0) -> tuple[Trials, Trials]:
    """Training and test stimuli that differ; patterns are `function` of the flattened tokens [s 6]."""
    rng = np.random.default_rng(seed)
    tokens = rng.normal(size=(n_train + n_test, 2, 3)) + 3
    patterns = function(tokens.reshape(len(tokens), -1) - 3)
    counts = rng.integers(1, 5, n_train)
    train = make_trials(tokens[:n_train], patterns[:n_train], counts, noise, seed=seed + 1)
    names = [f"new {i}" for i in range(n_test)]
    return train, make_trials(tokens[n_train:], patterns[n_train:], 2, noise, seed=seed + 2, names=names)


def linear_map(features):
    return features @ np.random.default_rng(9).normal(size=(features.shape[1], 15)) + 2


def on_trials(train: Trials, test: Trials, candidates, fit_predict):
    """The plain way: fit single trials, choose the candidate by the squared error of held-out single trials."""
    x, x_test = (np.float64(part.tokens.reshape(len(part.tokens), -1)) for part in (train, test))
    x = x[train.stimulus]
    errors = np.zeros(len(candidates))
    folds = GroupKFold(baselines.N_FOLDS).split(x, groups=train.stimulus)
    for fitted, held_out in folds:
        for c, candidate in enumerate(candidates):
            predicted = fit_predict(candidate, x[fitted], train.fmri[fitted], train.stimulus[fitted], x[held_out])
            errors[c] += ((predicted - train.fmri[held_out]) ** 2).sum()
    best = candidates[int(np.argmin(errors))]
    return fit_predict(best, x, train.fmri, train.stimulus, x_test), best


def mean_over_stimuli(values, stimulus):
    return np.mean([values[stimulus == s][0] for s in np.unique(stimulus)])


def test_ridge_equals_scikit_learns_on_single_trials():
    train, test = new_stimuli(linear_map, noise=2.0)

    def fit_predict(penalty, x, y, stimulus, x_new):
        scale = mean_over_stimuli(((x - x.mean(axis=0)) ** 2).sum(axis=1), stimulus)
        trials_per_stimulus = len(x) / len(np.unique(stimulus))
        ridge = sklearn.linear_model.Ridge(penalty * scale * trials_per_stimulus)
        return ridge.fit(x, y).predict(x_new)

    expected, penalty = on_trials(train, test, baselines.PENALTIES, fit_predict)
    assert baselines.PENALTIES.min() < penalty < baselines.PENALTIES.max()
    prediction = baselines.baseline_predictions(train, test)["ridge"]
    np.testing.assert_allclose(prediction, expected, rtol=1e-4, atol=1e-4)


def test_kernel_ridge_solves_the_bordered_system_on_single_trials():
    train, test = new_stimuli(lambda x: np.sin(2 * x) @ np.eye(6, 15) + 1, noise=0.5)
    tokens = np.float64(train.tokens.reshape(len(train.tokens), -1))
    distances = np.linalg.norm(tokens[:, None] - tokens, axis=-1)
    median = np.median(distances[np.triu_indices(len(tokens), 1)])

    def fit_predict(candidate, x, y, stimulus, x_new):
        width, penalty = candidate

        def kernel(a, b):
            return np.exp(-(((a[:, None] - b) ** 2).sum(axis=-1)) / (2 * (width * median) ** 2))

        inner, n = kernel(x, x), len(x)
        centring = np.eye(n) - 1 / n
        scale = mean_over_stimuli(np.diagonal(centring @ inner @ centring), stimulus)
        trials_per_stimulus = n / len(np.unique(stimulus))
        system = np.ones((n + 1, n + 1))
        system[:n, :n] = inner + penalty * scale * trials_per_stimulus * np.eye(n)
        system[n, n] = 0  # the intercept is free, and the dual coefficients sum to zero
        solution = np.linalg.solve(system, np.vstack([y, np.zeros((1, y.shape[1]))]))
        return kernel(x_new, x) @ solution[:n] + solution[n]

    candidates = [(width, penalty) for width in baselines.WIDTHS for penalty in baselines.PENALTIES]
    expected, _ = on_trials(train, test, candidates, fit_predict)
    prediction = baselines.baseline_predictions(train, test)["kernel_ridge"]
    np.testing.assert_allclose(prediction, expected, rtol=1e-3, atol=1e-3)


def error(prediction, truth):
    return float(((prediction - truth) ** 2).mean())


def test_kernel_ridge_learns_what_ridge_cannot():
    train, test = new_stimuli(lambda x: (x[:, :1] ** 2) * np.arange(1, 16), n_train=80, noise=0.1)
    predictions = baselines.baseline_predictions(train, test)
    target = test.fmri[::2]
    assert error(predictions["kernel_ridge"], target) < 0.5 * error(predictions["ridge"], target)


def test_folds_follow_the_way_test_was_split_off():
    """Tokens say nothing about the response, but it repeats well: known stimuli are predicted, new ones are not."""
    rng = np.random.default_rng(0)
    tokens, patterns = rng.normal(size=(30, 2, 20)), rng.normal(size=(30, 12))
    known = make_trials(tokens[:20], patterns[:20], 6, 0.2, runs=3)
    again = make_trials(tokens[:20], patterns[:20], 2, 0.2, seed=1)
    other = make_trials(tokens[20:], patterns[20:], 2, 0.2, names=[f"new {i}" for i in range(10)])
    for name in ("ridge", "kernel_ridge"):
        recalled = baselines.baseline_predictions(known, again)
        assert error(recalled[name], patterns[:20]) < 0.05
        guessed = baselines.baseline_predictions(known, other)
        assert error(guessed[name], guessed["mean_pattern"]) < 0.05


def test_means_and_the_order_of_stimuli():
    rng = np.random.default_rng(0)
    tokens, patterns = rng.normal(size=(4, 2, 3)), rng.normal(size=(4, 5))
    train = make_trials(tokens, patterns, [1, 2, 3, 4], 1.0, runs=2, names="abcd")
    test = make_trials(tokens[[2, 0]], patterns[[2, 0]], 1, 1.0, names="ca")
    predictions = baselines.baseline_predictions(train, test)
    assert list(predictions) == ["stimulus_mean", "ridge", "kernel_ridge", "mean_pattern"]
    expected = [train.fmri[3:6].mean(axis=0), train.fmri[0]]
    np.testing.assert_allclose(predictions["stimulus_mean"], expected, rtol=1e-5)
    np.testing.assert_allclose(predictions["mean_pattern"], [train.fmri.mean(axis=0)] * 2, rtol=1e-5)
    assert all(x.dtype == np.float32 for x in predictions.values())

    unknown = make_trials(tokens[[2, 0]], patterns[[2, 0]], 1, 1.0, names="cx")
    assert list(baselines.baseline_predictions(train, unknown)) == ["ridge", "kernel_ridge", "mean_pattern"]


def test_tokens_that_are_all_the_same_predict_the_mean_pattern():
    train = make_trials(np.full((6, 1, 3), 0.1), np.eye(6), 3, 0.1, runs=3)
    predictions = baselines.baseline_predictions(train, train)
    for name in ("ridge", "kernel_ridge"):
        np.testing.assert_allclose(predictions[name], predictions["mean_pattern"], rtol=1e-5)


def test_one_training_stimulus_is_refused():
    train = make_trials(np.ones((1, 2, 2)), np.ones((1, 4)), 3, 0.1)
    with pytest.raises(InputError, match="training split has 1 stimulus"):
        baselines.baseline_predictions(train, train)


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("block_bytes", [1, 200, 2**20])
def test_gram_in_blocks_equals_the_plain_product(stored, block_bytes):
    """Blocks of 1, 2 and all stimuli; tokens in memory or on disk as bfloat16."""
    rng = np.random.default_rng(0)
    train, test = ((rng.normal(size=(n, 3, 7)) + 5).astype(ml_dtypes.bfloat16) for n in (6, 4))
    everything = np.concatenate([train, test]).astype(np.float64).reshape(10, 21)
    everything -= everything[:6].mean(axis=0)
    given = [StoredTokens(x.__getitem__, x.shape) if stored else x.astype(np.float32) for x in (train, test)]
    gram = baselines.token_gram(*given, block_bytes=block_bytes)
    np.testing.assert_allclose(gram, everything @ everything.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(gram, gram.T)


def test_gram_needs_no_more_memory_than_some_blocks():
    tokens = np.zeros((32, 64, 1024), ml_dtypes.bfloat16)
    stored = StoredTokens(tokens.__getitem__, tokens.shape)
    tracemalloc.start()
    baselines.token_gram(stored, stored, block_bytes=4 * 4 * 64 * 1024)  # 4 stimuli
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 32 * 64 * 1024 * 0.6  # of the tokens as float32; a block is an eighth
