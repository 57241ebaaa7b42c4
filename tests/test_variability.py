"""The spread of trials: fits against known covariances, SciPy and scikit-learn, in whatever blocks it is read."""

import jax
import numpy as np
import pytest
from scipy.stats import multivariate_normal
from sklearn.decomposition import FactorAnalysis

from synbrain_jax import variability
from synbrain_jax.errors import InputError
from synbrain_jax.variability import Spread, deviations, draw, fit_spread, negative_log_likelihood

RNG = np.random.default_rng(0)
VOXELS, RANK = 30, 3
FACTOR = (RNG.normal(size=(VOXELS, RANK)) * RNG.uniform(0.3, 3, VOXELS)[:, None]).astype(np.float32)
INDEPENDENT = (RNG.uniform(0.5, 2, VOXELS) * (FACTOR**2).sum(1)).astype(np.float32)
TRUE = Spread(FACTOR, INDEPENDENT)
COVARIANCE = FACTOR.astype(np.float64) @ FACTOR.T + np.diag(INDEPENDENT)


def sample(count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).multivariate_normal(np.zeros(VOXELS), COVARIANCE, count).astype(np.float32)


def covariance(spread: Spread) -> np.ndarray:
    return spread.factor.astype(np.float64) @ spread.factor.T + np.diag(spread.independent.astype(np.float64))


def off(one: np.ndarray, other: np.ndarray) -> float:
    """The largest difference of two covariances, as a correlation."""
    sd = np.sqrt(np.diagonal(other))
    return float(np.abs((one - other) / np.outer(sd, sd)).max())


RESIDUALS = sample(4000)
GROUP = np.arange(4000) // 10


# ---- the distribution ----------------------------------------------------------------------------


def test_draws_have_the_covariance():
    n = 20_000
    drawn = draw(TRUE, jax.random.key(0), n)
    assert (drawn.dtype, drawn.shape) == (np.float32, (n, VOXELS))
    last = deviations(FACTOR, INDEPENDENT, jax.random.split(jax.random.key(0), n)[-1])
    np.testing.assert_allclose(drawn[-1], last, rtol=1e-4, atol=1e-4)
    # A covariance of n draws, as a correlation, is known to sqrt(2 / n) = .01 at most.
    assert off(drawn.T @ drawn / n, COVARIANCE) < 0.05
    assert np.abs(drawn.mean(0) / np.sqrt(TRUE.variance)).max() < 5 / np.sqrt(n)


def test_variance_and_correlation_are_those_of_the_covariance():
    sd = np.sqrt(np.diagonal(COVARIANCE))
    expected = COVARIANCE / np.outer(sd, sd)
    np.testing.assert_allclose(TRUE.variance, sd**2, rtol=1e-5)
    np.testing.assert_allclose(TRUE.correlation(), expected, atol=1e-6)
    alone = TRUE.without_correlation()
    np.testing.assert_array_equal(alone.variance, TRUE.variance)
    np.testing.assert_array_equal(alone.correlation(), np.eye(VOXELS))


def test_likelihood_is_that_of_scipy():
    rows = RESIDUALS[:50]
    for spread in (TRUE, TRUE.without_correlation()):
        expected = -multivariate_normal(np.zeros(VOXELS), covariance(spread)).logpdf(rows) / VOXELS
        np.testing.assert_allclose(negative_log_likelihood(spread, rows), expected, rtol=1e-5)
    assert negative_log_likelihood(TRUE, rows[:0]).shape == (0,)


def test_a_voxel_without_variance_does_not_count():
    dead = Spread(np.pad(FACTOR, ((1, 0), (0, 0))), np.pad(INDEPENDENT, (1, 0)))
    rows = np.pad(RESIDUALS[:9], ((0, 0), (1, 0)), constant_values=3)
    found = negative_log_likelihood(dead, rows)
    np.testing.assert_allclose(found, negative_log_likelihood(TRUE, RESIDUALS[:9]), rtol=1e-6)
    assert (dead.correlation()[0] == np.eye(VOXELS + 1)[0]).all()


def test_a_spread_comes_back_from_its_file(tmp_path):
    saved = Spread(FACTOR, INDEPENDENT, {0: 1.5, 40: 1.25})
    saved.save(tmp_path / "spread.npz")
    loaded = Spread.load(tmp_path / "spread.npz")
    np.testing.assert_array_equal(loaded.factor, FACTOR)
    np.testing.assert_array_equal(loaded.independent, INDEPENDENT)
    assert loaded.nll == saved.nll
    np.savez(tmp_path / "other.npz", factor=FACTOR, nll=[1.0])
    with pytest.raises(InputError, match=r"other\.npz: not a spread of trials \(independent, ranks missing\)"):
        Spread.load(tmp_path / "other.npz")


# ---- the fit -------------------------------------------------------------------------------------


def test_a_known_rank_and_covariance_are_found():
    found = fit_spread(RESIDUALS, GROUP, ranks=(0, 1, 2, 3, 5, 8))
    assert found.factor.shape == (VOXELS, RANK)
    assert found.factor.dtype == found.independent.dtype == np.float32
    # An entry of a covariance of n rows, as a correlation, is known to sqrt(2 / n) at most.
    assert off(covariance(found), COVARIANCE) < 5 * np.sqrt(2 / len(RESIDUALS))
    np.testing.assert_allclose(found.variance, (RESIDUALS**2).mean(0), rtol=0.01)
    assert list(found.nll) == [0, 1, 2, 3, 5, 8]
    truth = negative_log_likelihood(TRUE, RESIDUALS).mean()
    assert truth < found.nll[3] < truth + 0.005
    assert found.nll[0] > truth + 0.05


def test_the_likelihood_is_scikit_learns_maximum():
    """Few rows, so that what is fitted is no longer the truth; on principal components alone it is .003 worse."""
    rows = sample(120, seed=2)
    rows -= rows.mean(0)
    found = fit_spread(rows, np.arange(120), ranks=(RANK,))
    reference = FactorAnalysis(RANK, tol=1e-8, max_iter=5000, svd_method="lapack").fit(rows)
    nll = negative_log_likelihood(found, rows).mean()
    assert nll == pytest.approx(-reference.score(rows) / VOXELS, abs=3e-4)
    assert off(covariance(found), reference.get_covariance()) < 0.02


def test_a_held_out_group_says_nothing_about_its_own_likelihood():
    """Without patterns, in closed form: each group under the mean squares of the others."""
    rows, group = sample(40, seed=3) * np.repeat([1, 2, 3, 4], [5, 10, 12, 13])[:, None], np.repeat([7, 1, 3, 5], 10)
    total = 0.0
    for name in np.unique(group):
        variance = (rows[group != name].astype(np.float64) ** 2).mean(0)
        total += 0.5 * (np.log(2 * np.pi * variance) + rows[group == name] ** 2 / variance).mean(1).sum()
    assert fit_spread(rows, group, ranks=(0,)).nll[0] == pytest.approx(total / 40, rel=1e-5)


def test_units_of_a_voxel_only_scale_it():
    """A voxel a thousand times as loud takes no pattern from the others."""
    times = np.where(np.arange(VOXELS) % 2, 1000, 1).astype(np.float32)
    one, other = (fit_spread(rows, GROUP[:500], ranks=(2,)) for rows in (RESIDUALS[:500], RESIDUALS[:500] * times))
    assert off(covariance(one) * np.outer(times, times), covariance(other)) < 1e-3
    assert other.nll[2] == pytest.approx(one.nll[2] + np.log(times).mean(), abs=1e-4)


def test_the_mean_of_residuals_is_part_of_their_spread():
    shift = np.linspace(1, 2, VOXELS, dtype=np.float32) * np.sqrt(np.diagonal(COVARIANCE)).astype(np.float32)
    found = fit_spread(RESIDUALS[:500] + shift, GROUP[:500], ranks=(4,))
    np.testing.assert_allclose(found.variance, ((RESIDUALS[:500] + shift) ** 2).mean(0), rtol=0.02)


class InBlocks(np.ndarray):
    """Gives slices of few rows only, as a file that is larger than the memory should be read."""

    rows = 130

    def __getitem__(self, key):
        assert isinstance(key, slice)
        assert len(range(*key.indices(len(self)))) <= self.rows
        return np.asarray(self)[key]


def test_rows_are_read_in_blocks_and_blocks_change_nothing(monkeypatch):
    expected = fit_spread(RESIDUALS[:500], GROUP[:500], ranks=(0, 2))
    monkeypatch.setattr(variability, "_BLOCK_VALUES", InBlocks.rows * VOXELS)
    found = fit_spread(RESIDUALS[:500].view(InBlocks), GROUP[:500], ranks=(0, 2))
    assert off(covariance(found), covariance(expected)) < 1e-5
    assert found.nll == pytest.approx(expected.nll, rel=1e-5)


def test_of_many_numbers_one_part_is_held_out(monkeypatch):
    rows, group = sample(60, seed=4), np.repeat(np.arange(4), 15)
    each = {}
    for name in range(4):
        variance = (rows[group != name].astype(np.float64) ** 2).mean(0)
        each[name] = 0.5 * (np.log(2 * np.pi * variance) + rows[group == name] ** 2 / variance).mean()
    monkeypatch.setattr(variability, "_ALL_PARTS_BELOW", rows.size)
    found = fit_spread(rows, group, ranks=(0,))
    assert min(abs(found.nll[0] - value) for value in each.values()) < 1e-5
    np.testing.assert_allclose(found.independent, (rows**2).mean(0), rtol=1e-5)  # and all rows fitted at last


def test_the_same_seed_gives_the_same_bits():
    one, again = (fit_spread(RESIDUALS[:200], GROUP[:200], ranks=(0, 3), seed=5) for _ in range(2))
    np.testing.assert_array_equal(one.factor, again.factor)
    assert one.nll == again.nll


def test_a_voxel_that_never_varies_has_no_variance():
    rows = RESIDUALS[:300].copy()
    rows[:, 4] = 0
    found = fit_spread(rows, GROUP[:300], ranks=(2,))
    assert found.variance[4] == 0
    assert not found.factor[4].any()
    assert np.isfinite(found.factor).all()
    others = np.delete(rows, 4, axis=1)
    assert found.nll[2] == pytest.approx(fit_spread(others, GROUP[:300], ranks=(2,)).nll[2], abs=1e-4)


def test_voxels_that_say_the_same_keep_some_noise_of_their_own():
    rows = np.repeat(RESIDUALS[:300, :10], 2, axis=1)
    found = fit_spread(rows, GROUP[:300], ranks=(15,))
    assert (found.independent / found.variance).min() > 0.005
    assert np.isfinite(negative_log_likelihood(found, rows)).all()


def test_ranks_that_the_rows_cannot_fill_are_left_out():
    assert list(fit_spread(RESIDUALS[:16], np.arange(16), ranks=(0, 2, 11, 12, 40)).nll) == [0, 2, 11]
    with pytest.raises(InputError, match=r"ranks are \[40\]; with 12 fitted residuals of 30 voxels .* 0 to 11"):
        fit_spread(RESIDUALS[:16], np.arange(16), ranks=(40,))


@pytest.mark.parametrize(
    ("change", "group", "message"),
    [
        (np.nan, GROUP[:100], "NaN or infinite"),
        (np.inf, GROUP[:100], "NaN or infinite"),
        (0, np.zeros(100, int), "100 residuals in 1 groups"),
        (0, GROUP[:99], "one number per residual"),
    ],
)
def test_wrong_input_is_named(change, group, message):
    rows = RESIDUALS[:100].copy()
    rows[3, 5] += np.float32(change)
    with pytest.raises(InputError, match=message):
        fit_spread(rows, group, ranks=(0, 1))
