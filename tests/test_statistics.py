"""Bootstrap intervals against SciPy, closed forms, brute force, and how often they hold the truth."""

import numpy as np
import pytest
import scipy.stats

from synbrain_jax import metrics, statistics
from synbrain_jax.errors import InputError
from synbrain_jax.statistics import Estimate, bootstrap_interval, of_rows, paired_difference, voxel_r_intervals


def responses(n=40, v=7, seed=0):
    rng = np.random.default_rng(seed)
    target = rng.normal(3, 2, size=(n, v)).astype(np.float32)
    rows = {name: (a * target + rng.normal(size=(n, v))).astype(np.float32) for name, a in (("a", 1), ("b", 0.3))}
    return rows, target


def r_of(prediction, target):
    return np.array([scipy.stats.pearsonr(p, t)[0] for p, t in zip(prediction.T, target.T, strict=True)])


def test_mean_agrees_with_scipy_and_with_the_closed_form():
    values = np.random.default_rng(0).gamma(2, size=200)
    ours = bootstrap_interval(values, 200, draws=20_000)
    scipys = scipy.stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=1)
    error = values.std() / np.sqrt(200)
    assert ours.value == pytest.approx(values.mean())
    assert [ours.low, ours.high] == pytest.approx(list(scipys.confidence_interval), abs=0.1 * error)
    normal = scipy.stats.norm(values.mean(), error)
    assert [ours.low, ours.high] == pytest.approx(list(normal.interval(0.95)), abs=0.15 * error)
    narrow = bootstrap_interval(values, 200, draws=20_000, level=0.5)
    assert [narrow.low, narrow.high] == pytest.approx(list(normal.interval(0.5)), abs=0.1 * error)


def test_95_percent_intervals_hold_the_truth_95_times_in_100():
    rng = np.random.default_rng(0)
    found = [bootstrap_interval(rng.exponential(size=60), 60, draws=500, seed=i) for i in range(600)]
    assert 0.90 <= np.mean([one.low <= 1 <= one.high for one in found]) <= 0.97
    few = [bootstrap_interval(rng.normal(size=8), 8, draws=500, seed=i) for i in range(600)]
    assert 0.84 <= np.mean([one.low <= 0 <= one.high for one in few]) <= 0.94  # as the docstring warns


def test_a_draw_is_all_stimuli_as_often_as_they_are_drawn():
    everything, *counts = statistics.resamples(5, draws=4000, seed=3)
    np.testing.assert_array_equal(everything, np.ones(5))
    counts = np.array(counts)
    assert counts.shape == (4000, 5)
    np.testing.assert_array_equal(counts.sum(axis=1), 5)
    # Marginal moments of a multinomial draw: mean 1, variance 1 - 1/n.
    assert counts.mean(axis=0) == pytest.approx(np.ones(5), abs=0.06)
    assert counts.var(axis=0) == pytest.approx(np.full(5, 0.8), abs=0.08)
    np.testing.assert_array_equal(counts, statistics.resamples(5, draws=4000, seed=3)[1:])
    assert (counts != statistics.resamples(5, draws=4000, seed=4)[1:]).any()


def test_a_function_of_rows_sees_the_same_draws_as_one_of_counts(monkeypatch):
    values = np.random.default_rng(0).normal(size=30)
    by_rows = bootstrap_interval(of_rows(lambda rows: values[rows].mean()), 30, draws=300)
    by_counts = bootstrap_interval(values, 30, draws=300)
    assert [by_rows.value, by_rows.low, by_rows.high] == pytest.approx([by_counts.value, by_counts.low, by_counts.high])
    monkeypatch.setattr(statistics, "_VALUES_TOGETHER", 7 * 30)  # parts of 7 draws, the last of 6
    assert bootstrap_interval(of_rows(lambda rows: values[rows].mean()), 30, draws=300) == by_rows


def test_paired_difference_uses_the_same_draws():
    rng = np.random.default_rng(0)
    common, small = rng.normal(size=50) * 10, rng.normal(size=50) * 0.1
    apart = paired_difference(common + small + 1, common, 50)
    alone = bootstrap_interval(small + 1, 50)
    assert [apart.value, apart.low, apart.high] == pytest.approx([alone.value, alone.low, alone.high], abs=1e-6)
    with_function = paired_difference(of_rows(lambda rows: common[rows].mean()), common, 50, draws=50)
    assert [with_function.low, with_function.high] == pytest.approx([0, 0], abs=1e-6)


def test_draws_without_a_value_are_left_out():
    def share_of_first(counts):
        return np.where(counts[:, 0] > 0, 1.0, np.nan)

    assert bootstrap_interval(share_of_first, 4) == Estimate(1.0, 1.0, 1.0)
    assert bootstrap_interval(share_of_first, 4, draws=0) == Estimate(1.0)
    assert statistics.interval(np.array([1, np.nan])) == Estimate(1.0)


def test_what_has_no_interval_is_refused():
    with pytest.raises(InputError, match="1 stimuli"):
        bootstrap_interval(np.ones(1), 1)
    with pytest.raises(InputError, match=r"shape \(3,\).*4 stimuli"):
        bootstrap_interval(np.ones(3), 4)
    with pytest.raises(InputError, match="one finite number"):
        bootstrap_interval(np.array([1, np.nan]), 2)
    with pytest.raises(InputError, match="is nan"):
        bootstrap_interval(lambda counts: np.full(len(counts), np.nan), 3)


def test_voxel_r_of_every_draw_is_that_of_its_rows(monkeypatch):
    rows, target = responses()
    target[:, 2] = 5  # a voxel that never varies has r 0
    ceiling = np.array([0.9, 0.8, 0.9, 0.2, 0.5, 0.6, 0.7], np.float32)
    reliable = ceiling > 0.3
    monkeypatch.setattr(statistics, "_VALUES_TOGETHER", 7 * 11)  # parts of 11 draws
    found = voxel_r_intervals(rows, target, ceiling, draws=200, seed=5)
    drawn = [np.repeat(np.arange(40), counts.astype(int)) for counts in statistics.resamples(40, 200, 5)]

    def brute(name):
        r = np.array([np.asarray(metrics.voxel_pearson(rows[name][i], target[i])) for i in drawn])
        return np.median(r, axis=1), np.median(r[:, reliable] / ceiling[reliable], axis=1)

    (a, share_a), (b, share_b) = brute("a"), brute("b")
    for ours, expected in (
        (found.r["a"], a),
        (found.r["b"], b),
        (found.lead["b"], a - b),
        (found.share["a"], share_a),
        (found.lead_share["b"], share_a - share_b),
    ):
        low, high = np.quantile(expected[1:], [0.025, 0.975])
        assert [ours.value, ours.low, ours.high] == pytest.approx([expected[0], low, high], abs=2e-5)
    assert set(found.lead) == {"b"}


def test_voxel_r_is_scipys_whatever_the_scale():
    rows, target = responses()
    expected = np.median(r_of(rows["a"], target))
    assert voxel_r_intervals(rows, target, draws=5).r["a"].value == pytest.approx(expected, abs=1e-5)
    shifted = {"a": rows["a"] * 1e-3 + 100}
    assert voxel_r_intervals(shifted, target * 1e4, draws=5).r["a"].value == pytest.approx(expected, abs=2e-3)


def test_without_a_ceiling_or_a_reliable_voxel_there_is_no_share():
    rows, target = responses()
    assert voxel_r_intervals(rows, target, draws=5).share == {}
    assert voxel_r_intervals(rows, target, np.full(7, 0.2, np.float32), draws=5).lead_share == {}
    assert set(voxel_r_intervals(rows, target, np.full(7, 0.2), min_ceiling_r=0.1, draws=5).share) == {"a", "b"}
