"""Metrics against SciPy, scikit-learn, brute force and simulations with a known answer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from synbrain_jax import metrics
from synbrain_jax.errors import InputError


@pytest.fixture
def patterns() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    target = rng.normal(size=(12, 30)).astype(np.float32)
    return (0.6 * target + rng.normal(size=target.shape)).astype(np.float32), target


PER_VOXEL = {
    "voxel_pearson": lambda p, t: scipy.stats.pearsonr(p, t, axis=0).statistic,
    "explained_variance": lambda p, t: sklearn.metrics.explained_variance_score(t, p, multioutput="raw_values"),
}
PER_STIMULUS = {
    "pattern_pearson": lambda p, t: scipy.stats.pearsonr(p, t, axis=1).statistic,
    "mse": lambda p, t: sklearn.metrics.mean_squared_error(t.T, p.T, multioutput="raw_values"),
    "cosine": lambda p, t: 1 - sklearn.metrics.pairwise.paired_cosine_distances(p, t),
}


@pytest.mark.parametrize(("name", "reference"), (PER_VOXEL | PER_STIMULUS).items())
def test_equals_scipy_and_scikit_learn(name, reference, patterns):
    function = getattr(metrics, name)
    expected = reference(*(x.astype(np.float64) for x in patterns))
    np.testing.assert_allclose(function(*patterns), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.jit(function)(*patterns), expected, rtol=1e-5, atol=1e-6)
    halved = [jnp.asarray(x, jnp.bfloat16) for x in patterns]
    result = function(*halved)
    assert result.dtype == jnp.float32
    expected = reference(*(np.asarray(x, np.float64) for x in halved))
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["voxel_pearson", "pattern_pearson", "explained_variance"])
def test_a_large_offset_costs_no_digits(name, patterns):
    prediction, target = (np.float32(x + np.float32(1e4)) for x in patterns)
    expected = (PER_VOXEL | PER_STIMULUS)[name](prediction.astype(np.float64), target.astype(np.float64))
    np.testing.assert_allclose(getattr(metrics, name)(prediction, target), expected, rtol=1e-4, atol=1e-5)


def test_constant_patterns_score_zero_with_finite_gradients(patterns):
    prediction, target = patterns
    constant = np.full_like(prediction, 0.1)  # 0.1 is not exact in binary: its mean over 12 need not equal it
    for function in (metrics.voxel_pearson, metrics.pattern_pearson):
        assert not np.any(function(constant, target))
        assert not np.any(function(target, constant))
        gradient = jax.grad(lambda x, f=function: f(x, target).sum())(jnp.asarray(constant))
        assert np.isfinite(gradient).all()
    assert not np.any(metrics.cosine(np.zeros_like(target), target))
    assert not np.any(metrics.explained_variance(prediction, constant))


def test_identification_equals_brute_force(patterns):
    prediction, target = patterns
    prediction = prediction + 2 * np.random.default_rng(2).normal(size=target.shape).astype(np.float32)
    n = len(target)
    r = np.array([[np.corrcoef(p, t)[0, 1] for t in target] for p in prediction])
    top1 = [float(np.argmax(r[i]) == i) for i in range(n)]
    two_way = [np.mean([r[i, j] < r[i, i] for j in range(n) if j != i]) for i in range(n)]
    two_way_among_predictions = [np.mean([r[j, i] < r[i, i] for j in range(n) if j != i]) for i in range(n)]
    assert 0 < np.mean(top1) < 1
    assert two_way != two_way_among_predictions  # so that the case tells which side the distractors come from
    np.testing.assert_array_equal(metrics.identification_top1(prediction, target), top1)
    np.testing.assert_allclose(metrics.identification_two_way(prediction, target), two_way, rtol=1e-6)


def test_identification_ties():
    target = np.array([[1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1]], np.float32)
    np.testing.assert_array_equal(metrics.identification_top1(target, target), [1, 0, 0, 1])
    np.testing.assert_allclose(metrics.identification_two_way(target, target), [1, 2.5 / 3, 2.5 / 3, 1])
    constant = np.full_like(target, 0.1)
    np.testing.assert_array_equal(metrics.identification_top1(constant, target), 0)
    np.testing.assert_array_equal(metrics.identification_two_way(constant, target), 0.5)


@pytest.mark.parametrize("function", [metrics.identification_top1, metrics.identification_two_way])
def test_identification_needs_two_stimuli(function):
    with pytest.raises(InputError, match="at least 2 stimuli"):
        function(np.ones((1, 3), np.float32), np.ones((1, 3), np.float32))


def test_linear_cka_is_the_hsic_ratio():
    """Kornblith et al. 2019, with the centring matrix written out; float64."""
    rng = np.random.default_rng(3)
    x = rng.normal(loc=5, size=(12, 30))
    y = x @ rng.normal(size=(30, 20)) / 10 + rng.normal(size=(12, 20))
    centring = np.eye(12) - 1 / 12

    def hsic(a, b):
        return np.trace(a @ a.T @ centring @ b @ b.T @ centring) / 11**2

    expected = hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y))
    assert 0.1 < expected < 0.95
    np.testing.assert_allclose(metrics.linear_cka(x, y), expected, rtol=1e-5)
    np.testing.assert_allclose(metrics.linear_cka(x[:, 2:], x), metrics.linear_cka(x, x[:, 2:]), rtol=1e-6)
    np.testing.assert_allclose(jax.jit(metrics.linear_cka)(x, y), expected, rtol=1e-5)


def test_linear_cka_sees_through_rotation_scale_and_offset():
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(2, 12, 30))
    rotation = scipy.stats.ortho_group.rvs(30, random_state=5)
    np.testing.assert_allclose(metrics.linear_cka(x, 3 * x @ rotation + 2), 1, rtol=1e-5)
    np.testing.assert_allclose(metrics.linear_cka(y, 3 * x @ rotation + 2), metrics.linear_cka(x, y), rtol=1e-4)
    stretched = x * np.linspace(0.1, 3, 30)
    assert metrics.linear_cka(x, stretched) < 0.99  # but not through a change of some voxels only
    assert metrics.linear_cka(x, np.full_like(x, 0.1)) == 0
    assert np.isfinite(jax.grad(lambda z: metrics.linear_cka(z, y))(jnp.full((12, 30), 0.1))).all()


def simulated_repeats(true_ncsnr, counts, seed=0):
    """Signal of variance ncsnr^2 plus noise of variance 1: (fmri [r v], stimulus [r], signal [s v])."""
    rng = np.random.default_rng(seed)
    signal = rng.normal(size=(len(counts), len(true_ncsnr))) * true_ncsnr
    stimulus = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    return signal[stimulus] + rng.normal(size=(len(stimulus), len(true_ncsnr))), stimulus, signal


def test_ncsnr_is_nsds_formula_on_z_scored_voxels():
    fmri, stimulus, _ = simulated_repeats(np.linspace(0, 1.5, 20), np.full(30, 3))
    fmri = scipy.stats.zscore(3 * fmri + 7, axis=0, ddof=1)
    noise_sd = np.sqrt(np.mean([fmri[stimulus == s].var(axis=0, ddof=1) for s in range(30)], axis=0))
    nsd = np.sqrt(np.maximum(0, 1 - noise_sd**2)) / noise_sd
    assert (nsd == 0).any()
    np.testing.assert_allclose(metrics.ncsnr(fmri, stimulus), nsd, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(
        metrics.ncsnr(5 * fmri - 2, stimulus), nsd, rtol=1e-7, atol=1e-7
    )  # any scale, any offset


def test_ncsnr_of_session_z_scored_data_is_what_nsd_computes():
    """Sessions of other gain and offset, stimuli seen one to three times anywhere: NSD uses those seen three times."""
    true = np.repeat([0.0, 0.3, 0.6, 1.2], 30)
    fmri, stimulus, _ = simulated_repeats(true, np.tile([3, 3, 3, 2, 1], 250))
    session = np.arange(len(stimulus)) // 750
    rng = np.random.default_rng(1)
    for one in np.unique(session):
        rows = session == one
        fmri[rows] = scipy.stats.zscore(rng.uniform(0.5, 2, 120) * fmri[rows] + rng.normal(size=120), axis=0, ddof=1)
    thrice = np.flatnonzero(np.bincount(stimulus) == 3)
    noise_sd = np.sqrt(np.mean([fmri[stimulus == s].var(axis=0, ddof=1) for s in thrice], axis=0))
    nsd = np.sqrt(np.maximum(0, 1 - noise_sd**2)) / noise_sd
    ours = metrics.ncsnr(fmri[np.isin(stimulus, thrice)], stimulus[np.isin(stimulus, thrice)])
    reliable = true > 0
    np.testing.assert_allclose(ours[reliable], nsd[reliable], atol=0.06)  # the 1 is the variance of all trials
    for estimate in (nsd, metrics.ncsnr(fmri, stimulus)):
        of_three = metrics.noise_ceiling_r(estimate, 3).reshape(4, 30).mean(axis=1)
        np.testing.assert_allclose(of_three[1:], metrics.noise_ceiling_r(np.array([0.3, 0.6, 1.2]), 3), atol=0.02)
    assert metrics.noise_ceiling(metrics.ncsnr(fmri, stimulus), 3)[:30].mean() < 5


def test_ncsnr_pools_unequal_repeats_and_ignores_single_trials():
    fmri = np.array([[0.0], [2.0], [10.0], [11.0], [12.0], [20.0]])
    stimulus = np.array([0, 0, 1, 1, 1, 2])
    noise = ((1 + 1) + (1 + 0 + 1)) / (1 + 2)  # squared deviations over degrees of freedom
    expected = np.sqrt(fmri.var(ddof=1) / noise - 1)
    np.testing.assert_allclose(metrics.ncsnr(fmri, stimulus), [expected], rtol=1e-12)


@pytest.mark.parametrize("counts", [np.full(1500, 3), np.tile([1, 2, 4], 500)], ids=["equal", "mixed"])
def test_a_simulation_with_known_ncsnr(counts):
    true = np.repeat([0.3, 0.6, 1.2], 40)
    fmri, stimulus, signal = simulated_repeats(true, counts)
    estimate = metrics.ncsnr(fmri, stimulus)
    np.testing.assert_allclose(estimate.reshape(3, 40).mean(axis=1), [0.3, 0.6, 1.2], rtol=0.03)

    measured = metrics.group_means(fmri, stimulus)
    reached = metrics.voxel_pearson(signal, measured).reshape(3, 40).mean(axis=1)
    ceiling = metrics.noise_ceiling_r(true, counts).reshape(3, 40).mean(axis=1)
    np.testing.assert_allclose(reached, ceiling, rtol=0.02)
    explained = metrics.explained_variance(signal, measured).reshape(3, 40).mean(axis=1)
    np.testing.assert_allclose(100 * explained, metrics.noise_ceiling(true, counts)[::40], atol=1.0)


def test_noise_ceiling_worked_values():
    half = np.array([0.5])
    np.testing.assert_allclose(metrics.noise_ceiling(half, 1), 20.0)
    np.testing.assert_allclose(metrics.noise_ceiling(half, 3), 300 / 7)
    np.testing.assert_allclose(metrics.noise_ceiling_r(half, 1), np.sqrt(0.2))
    a, b, c = 5, 3, 2  # stimuli with 1, 2 and 3 repeats
    mixed = 100 * 0.25 / (0.25 + (a / 1 + b / 2 + c / 3) / (a + b + c))
    np.testing.assert_allclose(metrics.noise_ceiling(half, np.repeat([1, 2, 3], [a, b, c])), mixed)


def test_voxels_without_noise_or_without_signal():
    fmri = np.array([[1.0, 5.0], [1.0, 5.0], [2.0, 5.0], [2.0, 5.0]], np.float32)
    ncsnr = metrics.ncsnr(fmri, np.array([0, 0, 1, 1]))
    np.testing.assert_array_equal(ncsnr, [np.inf, 0])
    np.testing.assert_array_equal(metrics.noise_ceiling(ncsnr, 2), [100, 0])


def test_ncsnr_without_repeats_says_so():
    with pytest.raises(InputError, match="each of the 4 stimuli was measured once"):
        metrics.ncsnr(np.ones((4, 2)), np.arange(4))


def test_a_repeat_is_a_block_where_stimuli_recur_in_other_runs():
    rng = np.random.default_rng(0)
    fmri = rng.normal(size=(10, 3)).astype(np.float32)
    stimulus, run = np.array([1, 1, 0, 1, 0, 0, 2, 1, 1, 0]), np.array([4, 4, 4, 7, 7, 7, 7, 4, 7, 4])
    repeats = metrics.repeats(fmri, stimulus, run)
    np.testing.assert_array_equal(repeats.stimulus, [0, 0, 1, 1, 2])  # in runs 4, 7, 4, 7, 7
    np.testing.assert_allclose(repeats.fmri[2], fmri[[0, 1, 7]].mean(axis=0), rtol=1e-6)
    np.testing.assert_array_equal(repeats.of_trial, [2, 2, 0, 3, 1, 1, 4, 2, 3, 0])


def test_a_repeat_is_a_trial_where_no_stimulus_recurs_in_another_run():
    fmri, stimulus = np.arange(8, dtype=np.float32).reshape(4, 2), np.array([0, 1, 0, 1])
    repeats = metrics.repeats(fmri, stimulus, np.array([3, 9, 3, 9]))
    np.testing.assert_array_equal(repeats.fmri, fmri)
    np.testing.assert_array_equal(repeats.stimulus, stimulus)
    np.testing.assert_array_equal(repeats.of_trial, np.arange(4))
