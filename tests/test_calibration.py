"""Scores of synthetic variability: closed forms, brute force, SciPy and scikit-learn; and the real data's numbers."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny
from scipy.integrate import quad
from scipy.stats import norm
from sklearn.covariance import LedoitWolf

from synbrain_jax import calibration
from synbrain_jax.calibration import (
    Drawn,
    correlations,
    crps_drawn,
    crps_gaussian,
    energy_scores,
    latent_deviations,
    ledoit_wolf,
    matrix_ceiling,
    matrix_match,
    noise_deviations,
    resampled,
    scores,
    standard_rows,
)
from synbrain_jax.checkpoint import Bundle
from synbrain_jax.data.haxby import _packaged, detrend_and_zscore_runs
from synbrain_jax.data.pairs import Trials
from synbrain_jax.data.voxels import Voxels
from synbrain_jax.errors import InputError
from synbrain_jax.sharding import make_mesh
from synbrain_jax.statistics import bootstrap_interval
from synbrain_jax.synthesis import SynBrain
from synbrain_jax.variability import Spread, draw, fit_spread, negative_log_likelihood

RNG = np.random.default_rng(0)
VOXELS = 12
FACTOR = RNG.normal(size=(VOXELS, 2)).astype(np.float32)
SPREAD = Spread(FACTOR, RNG.uniform(0.5, 2, VOXELS).astype(np.float32))
KEY = jax.random.key(0)


def make_trials(stimulus, run, spread: Spread = SPREAD, seed: int = 1) -> tuple[np.ndarray, Trials]:
    """A prediction, and trials that vary around it as `spread` says."""
    rng, stimulus = np.random.default_rng(seed), np.asarray(stimulus, np.int32)
    n, v = len(stimulus), len(spread.independent)
    prediction = 3 * rng.normal(size=(stimulus.max() + 1, v)).astype(np.float32)
    shared = rng.normal(size=(n, spread.factor.shape[1])) @ spread.factor.T
    fmri = prediction[stimulus] + shared + rng.normal(size=(n, v)) * np.sqrt(spread.independent)
    names = tuple(str(number) for number in range(len(prediction)))
    run = np.asarray(run, np.int32)
    tokens = np.zeros((len(names), 1, 1), np.float32)
    return prediction, Trials(names, tokens, fmri.astype(np.float32), stimulus, run, 0 * run)


PREDICTION, TRIALS = make_trials(np.repeat(np.arange(20), 3), np.arange(60) % 3)
HELD_OUT = TRIALS.fmri - PREDICTION[TRIALS.stimulus]
ROWS = {
    "independent": SPREAD.without_correlation(),
    "calibrated": SPREAD,
    "resampled": Drawn(draw(SPREAD, jax.random.key(1), 50), complete=True),
    "drawn": Drawn(0.5 * draw(SPREAD, jax.random.key(2), 1000)),
}


@functools.cache
def scored():
    return scores(PREDICTION, TRIALS, ROWS, KEY, truth=SPREAD, samples=500)


# ---- proper scores -------------------------------------------------------------------------------


def test_crps_of_a_gaussian_is_the_integral_that_defines_it():
    for sd, y in ((1.0, 0.3), (0.4, -2.0), (3.0, 1.5)):
        below = quad(lambda x, sd=sd: norm.cdf(x, scale=sd) ** 2, -30, y)[0]
        above = quad(lambda x, sd=sd: (1 - norm.cdf(x, scale=sd)) ** 2, y, 30)[0]
        assert crps_gaussian(sd, np.array([y]))[0] == pytest.approx(below + above, abs=1e-6)
    np.testing.assert_array_equal(crps_gaussian(0.0, np.array([-2.0, 3.0])), [2, 3])


def brute_energy(drawn, held_out, complete):
    pairs = np.linalg.norm(drawn[:, None] - drawn, axis=2)
    m = len(drawn)
    toward = np.linalg.norm(held_out[:, None] - drawn, axis=2).mean(1)
    return toward - pairs.sum() / (m * m if complete else m * (m - 1)) / 2


@pytest.mark.parametrize("complete", [False, True])
def test_scores_of_draws_are_sums_over_all_pairs(complete):
    drawn = np.round(RNG.normal(size=(40, 3)), 1).astype(np.float32)  # with ties
    held_out = np.round(RNG.normal(size=(9, 3)), 1).astype(np.float32)
    fair, cost = energy_scores(Drawn(drawn, complete), held_out)
    np.testing.assert_allclose(fair, brute_energy(drawn, held_out, False), rtol=1e-5)
    np.testing.assert_allclose(fair + cost, brute_energy(drawn, held_out, complete), rtol=1e-5)
    for v in range(3):
        expected = brute_energy(drawn[:, v : v + 1], held_out[:, v : v + 1], complete)
        found = crps_drawn(np.sort(drawn[:, v]).astype(np.float64), held_out[:, v].astype(np.float64), complete)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_energy_score_of_one_gaussian_voxel_is_its_crps():
    spread = Spread(np.zeros((1, 0), np.float32), np.float32([2.25]))
    held_out = np.linspace(-4, 4, 7, dtype=np.float32)[:, None]
    fair, cost = energy_scores(Drawn(draw(spread, KEY, 8000)), held_out)
    # Distances have a spread of about 1.5 here, and the two terms' errors nearly cancel for values in the middle.
    np.testing.assert_allclose(fair, crps_gaussian(1.5, held_out[:, 0].astype(np.float64)), atol=0.05)
    assert cost == 0


def test_a_sharper_or_wider_row_scores_worse():
    narrow, wide = (Spread(np.float32(times) * FACTOR, np.float32(times**2) * SPREAD.independent) for times in (0.5, 2))
    prediction, trials = make_trials(np.repeat(np.arange(50), 4), np.arange(200) % 4)
    rows = scores(prediction, trials, {"narrow": narrow, "wide": wide, "calibrated": SPREAD}, KEY, samples=500).rows
    for other in ("narrow", "wide"):
        for score in ("nll", "energy_score", "crps"):
            assert getattr(rows[other], score) > 1.02 * getattr(rows["calibrated"], score), (other, score)
        assert rows[other].energy_difference.low > 0


# ---- rows ----------------------------------------------------------------------------------------


def test_ledoit_wolf_is_scikit_learns():
    for count in (8, 100):  # fewer than voxels, and more
        residuals = RNG.normal(size=(count, VOXELS)).astype(np.float32) @ RNG.normal(size=(VOXELS, VOXELS)) + 0.3
        residuals = residuals.astype(np.float32)
        scale = np.sqrt((residuals.astype(np.float64) ** 2).mean(0))
        reference = LedoitWolf(assume_centered=True).fit(residuals / scale)
        found = ledoit_wolf(residuals)
        covariance = (found.factor @ found.factor.T + np.diag(found.independent)) / np.outer(scale, scale)
        np.testing.assert_allclose(covariance, reference.covariance_, atol=1e-4)
        expected = -reference.score(residuals[:5] / scale) / VOXELS + np.log(scale).mean()
        assert negative_log_likelihood(found, residuals[:5]).mean() == pytest.approx(expected, abs=1e-3)


def test_resampled_residuals_are_themselves_or_some_of_them():
    residuals = RNG.normal(size=(20, 3)).astype(np.float32)
    row = resampled(residuals, KEY, 20)
    np.testing.assert_array_equal(row.deviations, residuals)
    assert row.complete
    some = resampled(residuals, KEY, 8)
    assert not some.complete
    found = {tuple(one) for one in some.deviations.tolist()}
    assert len(found) == 8
    assert found < {tuple(one) for one in residuals.tolist()}


@pytest.fixture(scope="module")
def model() -> SynBrain:
    config = tiny.config()
    voxels = Voxels("s", "none", None, None, None, None, np.arange(tiny.VOXELS, dtype=np.int32))
    std = np.ones((tiny.TOKENS, tiny.WIDTH), np.float32)
    bundle = Bundle.uncorrected(config, tiny.random_params(config), voxels, "test/tiny", std)
    spread = Spread(RNG.normal(size=(tiny.VOXELS, 2)).astype(np.float32), np.ones(tiny.VOXELS, np.float32))
    return SynBrain(dataclasses.replace(bundle, spread=spread), make_mesh(devices=jax.devices()[:1]))


TOKENS = RNG.normal(size=(5, tiny.TOKENS, tiny.WIDTH)).astype(np.float32)
RESIDUALS = RNG.normal(size=(30, tiny.VOXELS)).astype(np.float32)


def test_the_rows_of_a_system(model):
    rows, left_out = standard_rows(model, TOKENS, RESIDUALS, KEY, samples=10, noise_factor=0.0)
    assert list(rows) == ["independent", "ledoit_wolf", "resampled", "posterior", "latent_noise", "calibrated"]
    assert left_out == {}
    assert rows["calibrated"] is model.bundle.spread
    np.testing.assert_allclose(rows["independent"].variance, model.bundle.spread.variance)
    assert rows["independent"].factor.shape[1] == 0
    np.testing.assert_allclose(rows["ledoit_wolf"].variance, ledoit_wolf(RESIDUALS).variance)
    assert rows["resampled"].deviations.shape == rows["posterior"].deviations.shape == (10, tiny.VOXELS)
    assert np.abs(rows["posterior"].deviations).max() > 0.01
    assert np.abs(rows["latent_noise"].deviations).max() < 1e-5  # no noise was asked for


def test_deviations_of_a_latent_are_from_their_own_stimulus(model):
    found = latent_deviations(model, TOKENS, "latent_noise", KEY, samples=8, noise_factor=0.5).deviations
    drawn = model.synthesize(TOKENS, KEY, k=2, variability="latent_noise", noise_factor=0.5)
    expected = drawn - model.predict(TOKENS)[:, None]
    # Another batch size is another program: of responses, the same to 2e-6 of the largest; here of two of them.
    np.testing.assert_allclose(found, expected.reshape(10, -1), atol=4e-6 * np.abs(drawn).max())
    assert len(latent_deviations(model, TOKENS, "posterior", KEY, samples=3).deviations) == 3


def test_what_a_bundle_or_a_size_does_not_allow_is_left_out(model, monkeypatch):
    monkeypatch.setattr(calibration, "MAX_MATRIX_VOXELS", tiny.VOXELS - 1)
    other = SynBrain(dataclasses.replace(model.bundle, latent_std=None), model.mesh)
    rows, left_out = standard_rows(other, TOKENS, RESIDUALS, KEY, samples=10)
    assert list(rows) == ["independent", "resampled", "latent_noise", "calibrated"]
    assert left_out.keys() == {"ledoit_wolf", "posterior"}
    with pytest.raises(InputError, match="knows no spread of trials"):
        standard_rows(SynBrain(dataclasses.replace(model.bundle, spread=None), model.mesh), TOKENS, RESIDUALS, KEY)


# ---- single voxels -------------------------------------------------------------------------------


def test_variance_ratio_is_of_mean_squares_about_the_prediction():
    power = (HELD_OUT.astype(np.float64) ** 2).mean(0)
    found = scored().rows
    np.testing.assert_allclose(
        found["calibrated"].variance_ratio, np.percentile(SPREAD.variance / power, [25, 50, 75]), rtol=1e-5
    )
    expected = np.percentile((ROWS["drawn"].deviations ** 2).mean(0) / power, [25, 50, 75])
    np.testing.assert_allclose(found["drawn"].variance_ratio, expected, rtol=1e-5)


def test_coverage_is_that_of_the_intervals_of_each_distribution():
    n = 2000
    prediction, trials = make_trials(np.arange(n), np.zeros(n))
    half = Spread(FACTOR / 2, SPREAD.independent / 4)
    rows = {"calibrated": SPREAD, "half": half, "drawn": Drawn(draw(half, KEY, 2000))}
    found = scores(prediction, trials, rows, KEY, samples=2).rows
    for level in (50, 80, 95):
        z = norm.ppf(0.5 + level / 200)
        assert found["calibrated"].coverage[str(level)] == pytest.approx(level / 100, abs=0.02)
        expected = 2 * norm.cdf(z / 2) - 1
        assert found["half"].coverage[str(level)] == pytest.approx(expected, abs=0.02)
        assert found["drawn"].coverage[str(level)] == pytest.approx(expected, abs=0.02)


def test_a_voxel_that_is_always_0_has_no_say():
    dead = Spread(np.pad(FACTOR, ((0, 1), (0, 0))), np.pad(SPREAD.independent, (0, 1)))
    fmri = np.pad(TRIALS.fmri, ((0, 0), (0, 1)))
    rows = {"calibrated": dead}
    found = scores(np.pad(PREDICTION, ((0, 0), (0, 1))), dataclasses.replace(TRIALS, fmri=fmri), rows, KEY, samples=10)
    for name in ("coverage", "crps", "variance_ratio"):
        expected = getattr(scored().rows["calibrated"], name)
        assert getattr(found.rows["calibrated"], name) == pytest.approx(expected), name


def test_scores_of_a_row_are_means_over_trials_and_voxels():
    found = scored().rows
    sd = np.sqrt(SPREAD.variance).astype(np.float64)
    expected = np.mean([crps_gaussian(sd[v], HELD_OUT[:, v].astype(np.float64)).mean() for v in range(VOXELS)])
    assert found["calibrated"].crps == pytest.approx(expected, rel=1e-6)
    drawn = ROWS["resampled"].deviations
    brute = [brute_energy(drawn[:, v : v + 1], HELD_OUT[:, v : v + 1], True).mean() for v in range(VOXELS)]
    assert found["resampled"].crps == pytest.approx(np.mean(brute), rel=1e-5)
    assert found["calibrated"].nll == pytest.approx(negative_log_likelihood(SPREAD, HELD_OUT).mean())
    assert found["resampled"].nll is found["drawn"].nll is None


# ---- whole patterns ------------------------------------------------------------------------------


def test_energy_scores_are_compared_block_by_block():
    """Here no run repeats a stimulus, so that a stimulus's trials are one block."""
    result = scored()
    drawn = ROWS["resampled"].deviations
    assert result.rows["resampled"].energy_score == pytest.approx(brute_energy(drawn, HELD_OUT, True).mean(), rel=1e-5)
    fair = brute_energy(drawn, HELD_OUT, False).mean()
    assert result.rows["resampled"].energy_score_fair == pytest.approx(fair, rel=1e-5)
    sharp = ROWS["drawn"].deviations
    rows = {"calibrated": ROWS["drawn"], "resampled": ROWS["resampled"]}
    found = scores(PREDICTION, TRIALS, rows, KEY).rows["resampled"].energy_difference
    difference = (brute_energy(drawn, HELD_OUT, True) - brute_energy(sharp, HELD_OUT, False)).reshape(20, 3).mean(1)
    expected = bootstrap_interval(difference, 20)
    np.testing.assert_allclose(dataclasses.astuple(found), dataclasses.astuple(expected), atol=1e-4)
    assert result.rows["calibrated"].energy_difference is None
    assert (result.block, result.n_blocks, result.n_trials) == ("stimulus", 20, 60)


def test_where_a_run_repeats_a_stimulus_its_trials_in_a_run_are_a_block():
    stimulus, run = np.tile(np.repeat(np.arange(4), 3), 2), np.repeat([0, 1], 12)
    prediction, trials = make_trials(stimulus, run)
    result = scores(prediction, trials, {"only": SPREAD}, KEY, samples=10)
    assert (result.block, result.n_blocks) == ("stimulus in a run", 8)
    assert result.rows["only"].energy_difference is None  # nothing to compare with
    assert result.ceiling.halves_of == "runs"


def test_a_picture_that_comes_twice_in_a_run_now_and_then_does_not_make_runs_blocks():
    run = TRIALS.run.copy()
    run[[1, 4, 7]] = run[[0, 3, 6]]
    result = scores(PREDICTION, dataclasses.replace(TRIALS, run=run), {"only": SPREAD}, KEY, samples=10)
    assert (result.block, result.n_blocks, result.ceiling.halves_of) == ("stimulus", 20, "stimuli")


# ---- noise correlations --------------------------------------------------------------------------


def test_matches_are_correlations_over_pairs_of_voxels():
    result = scored()
    stimulus_means = TRIALS.fmri.reshape(20, 3, -1).mean(1)
    within = TRIALS.fmri - stimulus_means[TRIALS.stimulus]
    pairs = np.triu_indices(VOXELS, 1)
    real = np.corrcoef(within.T)[pairs]
    expected = np.corrcoef(real, SPREAD.correlation()[pairs])[0, 1]
    assert result.noise == "within stimuli"
    assert result.rows["calibrated"].correlation_match == pytest.approx(expected, abs=1e-4)
    drawn = np.corrcoef(ROWS["drawn"].deviations.T)[pairs]
    assert result.rows["drawn"].correlation_match == pytest.approx(np.corrcoef(real, drawn)[0, 1], abs=1e-4)
    assert result.rows["drawn"].truth_match > 0.98
    assert result.rows["calibrated"].truth_match == pytest.approx(1, abs=1e-5)
    assert result.real_truth_match == pytest.approx(expected, abs=1e-4)
    assert result.rows["independent"].correlation_match == 0
    assert result.matrix_voxels == VOXELS


def test_deviations_within_a_stimulus_are_widened_by_what_its_mean_took():
    stimulus = np.array([0, 0, 1, 2, 2, 2])
    fmri = RNG.normal(size=(6, 2)).astype(np.float32)
    found, kind = noise_deviations(fmri, stimulus, np.zeros((3, 2), np.float32))
    two, three = fmri[:2] - fmri[:2].mean(0), fmri[3:] - fmri[3:].mean(0)
    np.testing.assert_allclose(found, np.concatenate([np.sqrt(2) * two, np.sqrt(1.5) * three]), rtol=1e-5)
    assert kind == "within stimuli"
    prediction = RNG.normal(size=(6, 2)).astype(np.float32)
    found, kind = noise_deviations(fmri, np.arange(6)[::-1].copy(), prediction)
    np.testing.assert_array_equal(found, fmri - prediction[::-1])
    assert kind == "about the prediction"


def test_a_constant_voxel_correlates_with_none():
    values = np.column_stack([RNG.normal(size=(9, 2)), np.full(9, 0.1)]).astype(np.float32)
    found = correlations(values)
    assert found[0, 1] == pytest.approx(np.corrcoef(values[:, :2].T)[0, 1], abs=1e-6)
    np.testing.assert_array_equal(found[2], 0)
    assert matrix_match(found[:2, :2], found[:2, :2]) is None


MANY = Spread(RNG.normal(size=(80, 3)).astype(np.float32), np.full(80, 6, np.float32))


@pytest.mark.parametrize(("repeats", "in_run"), [(4, True), (3, False), (1, False)])
def test_the_ceiling_is_what_the_true_matrix_reaches(repeats, in_run):
    """Few trials, and a perfect model: its match is what two halves of the trials foretell."""
    if in_run:
        stimulus, run = np.tile(np.repeat(np.arange(6), repeats), 4), np.repeat(np.arange(4), 6 * repeats)
    else:
        stimulus, run = np.repeat(np.arange(90 // repeats), repeats), np.arange(90) % 5
    reached, foretold = [], []
    for seed in range(4):
        prediction, trials = make_trials(stimulus, run, MANY, seed)
        ceiling = matrix_ceiling(trials, prediction, np.arange(80))
        noise, _ = noise_deviations(trials.fmri, trials.stimulus, prediction)
        reached.append(matrix_match(MANY.correlation(), correlations(noise)))
        foretold.append(ceiling.perfect_model)
        assert ceiling.reliability == pytest.approx(2 * ceiling.split_half / (1 + ceiling.split_half))
        assert ceiling.perfect_model**2 == pytest.approx(ceiling.reliability)
    assert 0.5 < np.mean(reached) < 0.95  # far from certain
    assert np.mean(foretold) == pytest.approx(np.mean(reached), abs=0.04)
    assert ceiling.halves_of == ("runs" if in_run else "stimuli")


def test_of_two_runs_the_halves_are_the_runs():
    """Each about its own means: a mean of both would put the same pattern into both halves."""
    prediction, trials = make_trials(np.tile(np.repeat(np.arange(5), 4), 2), np.repeat([3, 8], 20))
    halves = []
    for run in (3, 8):
        fmri = trials.fmri[trials.run == run].reshape(5, 4, -1)
        halves.append(np.corrcoef((fmri - fmri.mean(1, keepdims=True)).reshape(20, -1).T)[np.triu_indices(VOXELS, 1)])
    found = matrix_ceiling(trials, prediction, np.arange(VOXELS))
    assert found.split_half == pytest.approx(np.corrcoef(halves)[0, 1], abs=1e-5)
    one_run = dataclasses.replace(trials, run=0 * trials.run, stimulus=0 * trials.stimulus)
    assert matrix_ceiling(one_run, prediction, np.arange(VOXELS)) is None


def test_of_many_voxels_some_stand_for_all(monkeypatch):
    monkeypatch.setattr(calibration, "MAX_MATRIX_VOXELS", 5)
    result = scores(PREDICTION, TRIALS, {"drawn": ROWS["drawn"], "s": SPREAD}, KEY, truth=SPREAD, samples=5)
    assert result.matrix_voxels == 4  # every third
    assert result.rows["s"].truth_match == pytest.approx(1, abs=1e-5)
    noise, _ = noise_deviations(TRIALS.fmri[:, ::3], TRIALS.stimulus, PREDICTION[:, ::3])
    expected = matrix_match(SPREAD.correlation()[::3, ::3], correlations(noise))
    assert result.rows["s"].correlation_match == pytest.approx(expected, abs=1e-5)
    assert result.rows["drawn"].truth_match > 0.9


# ---- wrong input, and the real data --------------------------------------------------------------


def not_finite(values):
    return values + np.float32(np.nan)


@pytest.mark.parametrize(
    ("prediction", "row", "message"),
    [
        (PREDICTION[:3], SPREAD, r"prediction has shape \(3, 12\), expected \(20, 12\)"),
        (not_finite(PREDICTION), SPREAD, "the prediction or the trials hold NaN"),
        (PREDICTION, Spread(FACTOR[:3], SPREAD.independent[:3]), "row r: .* expected 12 voxels"),
        (PREDICTION, Drawn(HELD_OUT[:1]), "row r: .* at least 2 deviations"),
        (PREDICTION, Drawn(not_finite(HELD_OUT)), "row r holds NaN"),
        (PREDICTION, Spread(not_finite(FACTOR), SPREAD.independent), "row r holds NaN"),
    ],
)
def test_wrong_input_is_named(prediction, row, message):
    with pytest.raises(InputError, match=message):
        scores(prediction, TRIALS, {"r": row}, KEY)


def test_haxbys_held_out_runs():
    """Around the stimulus mean, without any model: what runs 0-8 say of runs 10 and 11 of the packaged data."""
    packaged = _packaged("haxby2001_sub1_slice_raw.npz")
    task = packaged["label"] > 0
    fmri = detrend_and_zscore_runs(packaged["bold"], packaged["run"])[task]
    stimulus, run = packaged["label"][task].astype(np.int32) - 1, packaged["run"][task].astype(np.int32)

    def means(rows):
        return np.stack([fmri[rows & (stimulus == s)].mean(0) for s in range(8)])

    train, test = run < 9, run >= 10
    residuals = np.empty_like(fmri)
    for held_out in range(9):
        rows = run == held_out
        residuals[rows] = fmri[rows] - means(train & ~rows)[stimulus[rows]]
    residuals = residuals[train]
    spread = fit_spread(residuals, run[train], ranks=(0, 40))
    assert spread.factor.shape[1] == 40
    names = tuple("abcdefgh")
    trials = Trials(names, np.zeros((8, 1, 1), np.float32), fmri[test], stimulus[test], run[test], 0 * run[test])
    rows = {
        "independent": spread.without_correlation(),
        "ledoit_wolf": ledoit_wolf(residuals),
        "resampled": resampled(residuals, KEY),
        "calibrated": spread,
    }
    result = scores(means(train), trials, rows, KEY, samples=2000)
    found = result.rows
    calibrated = found["calibrated"]
    assert 0.9 < calibrated.variance_ratio[1] < 1.1
    assert all(abs(share - int(level) / 100) < 0.02 for level, share in calibrated.coverage.items())
    assert calibrated.nll < found["ledoit_wolf"].nll - 0.1 < found["independent"].nll - 0.17
    assert calibrated.correlation_match > 0.7 * result.ceiling.perfect_model
    assert calibrated.correlation_match > 0.95 * found["resampled"].correlation_match
    assert found["independent"].energy_difference.low > 0
    for other in ("ledoit_wolf", "resampled"):
        assert found[other].energy_difference.high > 0
    assert (result.block, result.n_blocks, result.ceiling.halves_of) == ("stimulus in a run", 16, "runs")
