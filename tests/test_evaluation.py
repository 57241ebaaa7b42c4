"""Scores against SciPy and scikit-learn, ceilings against closed forms, and the known numbers of the Haxby data."""

import dataclasses
import io
import itertools
import json
import math

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from synbrain_jax import evaluation, metrics
from synbrain_jax.data.haxby import prepare_haxby
from synbrain_jax.data.pairs import Trials, load_trials, open_dataset
from synbrain_jax.data.voxels import Voxels
from synbrain_jax.errors import InputError

METRICS = [
    "voxel_r_mean",
    "voxel_r_median",
    "pattern_r",
    "pattern_r_centred",
    "mse",
    "cosine",
    "explained_variance",
    "identification_top1",
    "identification_two_way",
    "trial_mse",
    "trial_pattern_r",
    "trial_cosine",
]
SHARES = ["voxel_r_normalised_median", "voxel_r2_normalised_mean"]
WITH_SHARES = [*METRICS[:2], *SHARES, *METRICS[2:]]


def make_trials(fmri, stimulus, run) -> Trials:
    stimulus = np.asarray(stimulus, np.int32)
    n_stimuli = int(stimulus.max()) + 1
    return Trials(
        stimulus_id=tuple(f"picture {s}" for s in range(n_stimuli)),
        tokens=np.random.default_rng(5).normal(size=(n_stimuli, 2, 3)).astype(np.float32),
        fmri=np.asarray(fmri, np.float32),
        stimulus=stimulus,
        run=np.asarray(run, np.int32),
        session=np.zeros(len(run), np.int32),
    )


def make_voxels(ncsnr, n_voxels) -> Voxels:
    return Voxels(
        subject="nobody",
        normalisation="none",
        ijk=None,
        volume_shape=None,
        affine=None,
        ncsnr=None if ncsnr is None else np.broadcast_to(np.float32(ncsnr), n_voxels),
        order=np.arange(n_voxels, dtype=np.int32),
    )


def balanced(signal, noise, runs, seed=0, first_run=0) -> Trials:
    """One trial of each stimulus in each run; `noise(rng)` [s v] draws the noise of one run."""
    rng = np.random.default_rng(seed)
    fmri = np.concatenate([signal + noise(rng) for _ in range(runs)])
    return make_trials(fmri, np.tile(np.arange(len(signal)), runs), np.repeat(np.arange(runs), len(signal)) + first_run)


@pytest.fixture
def uneven() -> Trials:
    """Three runs that hold all five stimuli, one to three trials each, and an offset of their own."""
    rng = np.random.default_rng(0)
    signal, offset = rng.normal(size=(5, 40)) + 1, rng.normal(size=(3, 40))
    rows = [(s, r) for s, r in itertools.product(range(5), range(3)) for _ in range(rng.integers(1, 4))]
    stimulus, run = np.array(rows)[rng.permutation(len(rows))].T
    return make_trials(signal[stimulus] + offset[run] + rng.normal(size=(len(rows), 40)), stimulus, run)


def test_scores_equal_scipy_and_scikit_learn(uneven):
    prediction = np.random.default_rng(1).normal(size=(5, 40)).astype(np.float32) + evaluation.stimulus_targets(uneven)
    block = np.array(
        [
            [uneven.fmri[(uneven.stimulus == s) & (uneven.run == r)].mean(axis=0, dtype=np.float64) for s in range(5)]
            for r in range(3)
        ]
    )
    target = block.mean(axis=0)
    run_centred = (block - block.mean(axis=1, keepdims=True)).mean(axis=0)
    prediction_centred = prediction - prediction.mean(axis=0, dtype=np.float64)
    voxel_r = scipy.stats.pearsonr(prediction, target, axis=0).statistic
    r = np.corrcoef(prediction_centred, run_centred)[:5, 5:]
    of_trial = prediction[uneven.stimulus]
    expected = {
        "voxel_r_mean": voxel_r.mean(),
        "voxel_r_median": np.median(voxel_r),
        "pattern_r": scipy.stats.pearsonr(prediction, target, axis=1).statistic.mean(),
        "pattern_r_centred": np.diagonal(r).mean(),
        "mse": sklearn.metrics.mean_squared_error(target, prediction),
        "cosine": 1 - sklearn.metrics.pairwise.paired_cosine_distances(prediction, target).mean(),
        "explained_variance": np.median(
            sklearn.metrics.explained_variance_score(target, prediction, multioutput="raw_values")
        ),
        "identification_top1": (r.argmax(axis=1) == np.arange(5)).mean(),
        "identification_two_way": np.mean([r[i, i] > r[i, j] for i, j in itertools.permutations(range(5), 2)]),
        "trial_mse": sklearn.metrics.mean_squared_error(uneven.fmri, of_trial),
        "trial_pattern_r": scipy.stats.pearsonr(of_trial, uneven.fmri, axis=1).statistic.mean(),
        "trial_cosine": 1 - sklearn.metrics.pairwise.paired_cosine_distances(of_trial, uneven.fmri).mean(),
    }
    scores = evaluation.score(prediction, uneven)
    assert list(scores) == METRICS == list(expected)
    assert scores == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_shares_of_the_ceiling_are_over_the_reliable_voxels_alone():
    ceiling = np.array([0.1, 0.3, 0.4, 0.5, 0.8, 0.8], np.float32)  # 0.3 is not above 0.3
    r = np.array([0.9, 0.9, -0.2, 0.6, 0.2, 0.4], np.float32)
    scores = evaluation.voxel_scores(r, ceiling)
    assert scores == pytest.approx(
        {
            "voxel_r_mean": 2.8 / 6,
            "voxel_r_median": 0.5,
            "voxel_r_normalised_median": (0.25 + 0.5) / 2,  # of -0.5, 1.2, 0.25, 0.5
            "voxel_r2_normalised_mean": (0 + 1 + 0.0625 + 0.25) / 4,
        }
    )
    assert list(scores) == WITH_SHARES[:4]
    assert list(evaluation.voxel_scores(r, np.full(6, 0.2, np.float32))) == METRICS[:2]
    assert evaluation.voxel_scores(r) == evaluation.voxel_scores(r, np.full(6, 0.2, np.float32))


def test_targets_of_stimuli_seen_in_different_runs():
    trials = make_trials([[1.0], [3.0], [8.0], [4.0], [6.0]], [0, 0, 0, 1, 1], [2, 2, 5, 3, 3])
    np.testing.assert_allclose(evaluation.stimulus_targets(trials), [[5.0], [5.0]])


def test_a_prediction_that_ignores_the_stimulus_is_at_chance(uneven):
    constant = np.tile(np.random.default_rng(1).normal(size=40).astype(np.float32), (5, 1))
    scores = evaluation.score(constant, uneven)
    for name in ("voxel_r_mean", "voxel_r_median", "pattern_r_centred", "identification_top1"):
        assert scores[name] == 0
    assert scores["identification_two_way"] == 0.5


def test_what_cannot_be_scored_is_refused(uneven):
    prediction = evaluation.stimulus_targets(uneven)
    with pytest.raises(InputError, match=r"shape \(4, 40\), expected \(5, 40\)"):
        evaluation.score(prediction[:4], uneven)
    with pytest.raises(InputError, match="NaN or infinite"):
        evaluation.score(np.where(prediction > 1, np.nan, prediction), uneven)
    with pytest.raises(InputError, match="'late' has no trial"):
        evaluation.score(prediction, dataclasses.replace(uneven, stimulus_id=(*uneven.stimulus_id, "late")))
    with pytest.raises(InputError, match="at least 2"):
        evaluation.score(prediction[:1], make_trials(np.ones((2, 40)), [0, 0], [0, 1]))


def test_shifted_tokens_control(uneven):
    target = metrics.centred(evaluation.stimulus_targets(uneven))

    def look_up(tokens):  # a predictor that knows each stimulus by its tokens
        known = [np.flatnonzero((uneven.tokens == one).all(axis=(1, 2)))[0] for one in tokens]
        return evaluation.stimulus_targets(uneven)[known]

    r = np.corrcoef(target)
    others = np.mean([r[i, j] for i, j in itertools.permutations(range(5), 2)])
    assert evaluation.shifted_tokens_control(look_up, uneven) == pytest.approx(others, abs=1e-5)

    def ignore(tokens):
        return evaluation.stimulus_targets(uneven)

    assert evaluation.shifted_tokens_control(ignore, uneven) == pytest.approx(1, abs=1e-5)


def test_shifted_predictions_are_made_in_parts_from_shifted_tokens(uneven, monkeypatch):
    monkeypatch.setattr(evaluation, "READ_TOGETHER", 2)
    sizes = []

    def first_token(tokens):
        sizes.append(len(tokens))
        return tokens[:, 0]

    for shift in (0, 2, -1, 7):
        expected = [uneven.tokens[(i + shift) % 5, 0] for i in range(5)]
        np.testing.assert_array_equal(evaluation.predict_shifted(first_token, uneven.tokens, shift), expected)
    assert sizes == [2, 2, 1] * 4


def test_the_control_makes_as_many_shifts_as_it_may(uneven, monkeypatch):
    monkeypatch.setattr(evaluation, "CONTROL_PREDICTIONS", 10)
    given = []

    def remember(tokens):
        given.append(int(np.flatnonzero((uneven.tokens == tokens[0]).all(axis=(1, 2)))[0]))
        return evaluation.stimulus_targets(uneven)

    evaluation.shifted_tokens_control(remember, uneven)
    assert given == [2, 3]
    monkeypatch.setattr(evaluation, "CONTROL_PREDICTIONS", 4)
    evaluation.shifted_tokens_control(remember, uneven)
    assert len(given) == 3
    assert given[-1] != 0


# ---- noise ceiling ---------------------------------------------------------------------------------


def white(shape, sd=1.0):
    return lambda rng: sd * rng.normal(size=shape)


def test_ceiling_of_white_noise_has_closed_forms():
    n_stimuli, n_voxels, runs = 40, 300, 3
    rng = np.random.default_rng(100)
    sd = np.linspace(0.2, 1.0, n_voxels)
    signal = 2 * np.sin(np.arange(n_voxels)) + sd * rng.normal(size=(n_stimuli, n_voxels))
    train = balanced(signal, white(signal.shape), 6)
    validation = balanced(signal, white(signal.shape), 1, seed=1, first_run=6)
    test = balanced(signal, white(signal.shape), runs, seed=2, first_run=7)
    ceiling = evaluation.estimate_noise_ceiling(train, validation, test, make_voxels(sd, n_voxels))

    noise = 1 / runs
    np.testing.assert_allclose(ceiling.voxel_r, sd / np.sqrt(sd**2 + noise), rtol=1e-5)
    power = signal.var(axis=0).sum()
    own_mean = signal - signal.mean(axis=1, keepdims=True)
    uncentred_power = (own_mean**2).sum(axis=1).mean()
    closed_form = {
        "voxel_r_mean": ceiling.voxel_r.mean(),
        "voxel_r_median": np.median(ceiling.voxel_r),
        "pattern_r": np.sqrt(uncentred_power / (uncentred_power + n_voxels * noise)),
        "pattern_r_centred": np.sqrt(power / (power + n_voxels * noise * (1 - 1 / n_stimuli))),
        "mse": noise,
        "identification_top1": 1.0,
        "identification_two_way": 1.0,
        "trial_mse": 1.0,
        "trial_pattern_r": np.sqrt(uncentred_power / (uncentred_power + n_voxels)),
    }
    assert {name: ceiling.scores[name] for name in closed_form} == pytest.approx(closed_form, rel=0.02)

    fresh = [balanced(signal, white(signal.shape), runs, seed=seed) for seed in range(10, 30)]
    truth_scores = [evaluation.score(signal.astype(np.float32), trials) for trials in fresh]
    reached = {name: np.mean([one[name] for one in truth_scores]) for name in METRICS}
    assert {name: ceiling.scores[name] for name in METRICS} == pytest.approx(reached, rel=0.02)
    assert list(ceiling.scores) == WITH_SHARES
    assert [ceiling.scores[name] for name in SHARES] == [1, 1]


def test_ceiling_keeps_noise_correlations_and_what_a_run_shares():
    """A noise pattern that is flat over voxels, or the same for all stimuli of a run, cannot lower centred r."""
    signal = np.random.default_rng(100).normal(size=(12, 80))
    harmless = {
        "flat over voxels": lambda rng: 2 * rng.normal(size=(12, 1)) + np.zeros((12, 80)),
        "shared by a run": lambda rng: 2 * rng.normal(size=(1, 80)) + np.zeros((12, 80)),
    }
    for noise in harmless.values():
        train, validation, test = (
            balanced(signal, noise, runs, first_run=first, seed=first) for runs, first in ((9, 0), (1, 9), (2, 10))
        )
        ceiling = evaluation.estimate_noise_ceiling(train, validation, test, make_voxels(50.0, 80))
        assert ceiling.scores["pattern_r_centred"] > 0.99
        assert ceiling.scores["mse"] == pytest.approx(4 / 2, rel=0.35)  # but it is there: 12 runs tell its variance


def test_ceiling_where_repeats_lie_within_one_run():
    """Single trials are the repeats; mixed numbers of them in test use the general form of NSD's formula."""
    rng = np.random.default_rng(0)
    counts = np.tile([1, 3], 50)
    stimulus = np.repeat(np.arange(100), counts)
    signal = rng.normal(size=(100, 60))
    test = make_trials(signal[stimulus] + rng.normal(size=(200, 60)), stimulus, np.zeros(200))
    train = dataclasses.replace(test, stimulus_id=tuple(f"other {s}" for s in range(100)), run=test.run + 1)
    ceiling = evaluation.estimate_noise_ceiling(train, train, test, make_voxels(1.0, 60))
    np.testing.assert_allclose(ceiling.voxel_r, np.sqrt(1 / (1 + (1 + 1 / 3) / 2)), rtol=1e-5)
    assert ceiling.scores["mse"] == pytest.approx((1 + 1 / 3) / 2, rel=0.05)
    assert ceiling.scores["trial_mse"] == pytest.approx(1, rel=0.05)


def test_no_ceiling_where_nothing_repeats(uneven):
    once = make_trials(np.eye(4), np.arange(4), np.zeros(4))
    twin = dataclasses.replace(once, stimulus_id=tuple("abcd"))
    assert evaluation.estimate_noise_ceiling(once, once, twin, make_voxels(1.0, 4)) is None
    assert evaluation.estimate_noise_ceiling(uneven, uneven, uneven, make_voxels(None, 40)) is None


# ---- the whole report ------------------------------------------------------------------------------


def test_report_and_arrays(uneven):
    model = evaluation.stimulus_targets(uneven) + np.random.default_rng(3).normal(size=(5, 40)).astype(np.float32)
    later = dataclasses.replace(uneven, run=uneven.run + 3)
    places = np.arange(40)
    rois = {"a/early": places < 10, "a/late": places >= 25, "b/few": places < 9, "b/none": places < 0}
    result = evaluation.evaluate(
        model,
        train=uneven,
        validation=later,
        test=later,
        voxels=dataclasses.replace(make_voxels(np.repeat([0.7, 0.1], 20), 40), rois=rois),
        dataset="toy",
        split="validation",
        extra={"model_raw": 2 * model},
    )
    names = ["model", "model_raw", "stimulus_mean", "ridge", "kernel_ridge", "mean_pattern", "noise_ceiling"]
    scores, regions = result.report.pop("scores"), result.report.pop("rois")
    assert result.report == {
        "dataset": "toy",
        "split": "validation",
        "n_stimuli": 5,
        "n_trials": len(uneven.fmri),
        "n_voxels": 40,
        "reliable": {"ceiling_r_above": 0.3, "n_voxels": 20},  # noise ceilings of r: 0.77 and 0.17
        "rois_left_out": {"b/few": 9, "b/none": 0},
    }
    assert list(scores) == names
    assert json.loads(json.dumps(scores)) == scores
    for row in scores.values():
        assert list(row) == WITH_SHARES
        assert all(type(value) is float and math.isfinite(value) for value in row.values())
    ceiling = metrics.noise_ceiling_r(np.repeat([0.7, 0.1], 20), 3).astype(np.float32)
    assert scores["model"] == evaluation.score(model, later, ceiling)
    assert scores["model_raw"]["pattern_r"] == pytest.approx(scores["model"]["pattern_r"], rel=1e-5)

    file = io.BytesIO()
    np.savez(file, **result.arrays)
    file.seek(0)
    with np.load(file, allow_pickle=False) as saved:
        arrays = dict(saved)
    assert arrays["stimulus_id"].tolist() == list(uneven.stimulus_id)
    target = evaluation.stimulus_targets(later)
    np.testing.assert_array_equal(arrays["prediction"], model)
    np.testing.assert_array_equal(arrays["target"], target)
    np.testing.assert_allclose(
        arrays["voxel_r"], scipy.stats.pearsonr(model, target, axis=0).statistic, rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(arrays["voxel_r_ceiling"], ceiling, rtol=1e-6)
    for name in names[1:-1]:
        assert scores[name] == evaluation.score(arrays[f"prediction_{name}"], later, ceiling)

    predictions = {"model": model} | {name: arrays[f"prediction_{name}"] for name in names[1:-1]}
    assert list(regions) == ["a/early", "a/late"]
    for name, size in (("a/early", 10), ("a/late", 15)):
        assert regions[name]["n_voxels"] == size
        assert list(regions[name]["rows"]) == names
        for row, prediction in predictions.items():
            within = evaluation.score(
                prediction[:, rois[name]],
                dataclasses.replace(later, fmri=later.fmri[:, rois[name]]),
                ceiling[rois[name]],
            )
            expected = {metric: value for metric, value in within.items() if metric.startswith("voxel_r")}
            assert regions[name]["rows"][row] == pytest.approx(expected, rel=1e-5, abs=1e-6)
            assert len(expected) == (4 if name == "a/early" else 2)  # no voxel of the other is reliable
        assert regions[name]["rows"]["noise_ceiling"]["voxel_r_median"] == pytest.approx(ceiling[rois[name]][0])


def test_rows_that_do_not_apply_are_left_out(uneven):
    new = dataclasses.replace(uneven, stimulus_id=tuple("abcde"))
    result = evaluation.evaluate(
        evaluation.stimulus_targets(new),
        train=uneven,
        validation=uneven,
        test=new,
        voxels=make_voxels(None, 40),
        dataset="toy",
    )
    assert list(result.report["scores"]) == ["model", "ridge", "kernel_ridge", "mean_pattern"]
    assert not {"reliable", "rois", "rois_left_out"} & result.report.keys()
    assert "voxel_r_ceiling" not in result.arrays


def test_a_row_is_not_overwritten(uneven):
    model = evaluation.stimulus_targets(uneven)
    with pytest.raises(InputError, match="extra: ridge is a row of its own"):
        evaluation.evaluate(
            model,
            train=uneven,
            validation=uneven,
            test=uneven,
            voxels=make_voxels(None, 40),
            dataset="toy",
            extra={"ridge": model},
        )


def test_known_numbers_of_the_haxby_data(tmp_path):
    """Runs 0-8 against the mean of runs 10 and 11, as measured by independent analyses of the same data."""
    dataset = open_dataset(prepare_haxby(tmp_path))
    train, validation, test = (load_trials(dataset, split) for split in ("train", "validation", "test"))
    model = np.zeros((8, 530), np.float32)
    result = evaluation.evaluate(
        model, train=train, validation=validation, test=test, voxels=dataset.voxels, dataset=dataset.name
    )
    scores = result.report["scores"]
    assert round(scores["stimulus_mean"]["pattern_r_centred"], 3) == 0.366
    assert round(scores["stimulus_mean"]["voxel_r_mean"], 3) == 0.259
    assert round(scores["stimulus_mean"]["mse"], 3) == 0.119
    assert round(scores["mean_pattern"]["mse"], 3) == 0.132
    assert scores["stimulus_mean"]["identification_two_way"] == scores["stimulus_mean"]["identification_top1"] == 1
    for name in ("ridge", "kernel_ridge"):
        assert 0.345 < scores[name]["pattern_r_centred"] < 0.370
        assert scores[name]["mse"] < scores["stimulus_mean"]["mse"]
    assert 0.45 < scores["noise_ceiling"]["pattern_r_centred"] < 0.53
    assert 0.33 < scores["noise_ceiling"]["voxel_r_mean"] < 0.38
    means = {name: result.arrays["prediction_stimulus_mean"][i] for i, name in enumerate(test.stimulus_id)}

    def look_up(tokens):
        return np.stack(
            [means[train.stimulus_id[np.argmin(((train.tokens - x) ** 2).sum(axis=(1, 2)))]] for x in tokens]
        )

    assert round(evaluation.shifted_tokens_control(look_up, test), 3) == -0.048
