"""What synthetic and real responses have in common: against SciPy, brute force over draws, and simulations whose truth
is known; and the study from a trained tiny system to its page."""

import dataclasses
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.spatial
import scipy.stats
import tiny
from etils import epath

from synbrain_jax import consistency, document, metrics, statistics
from synbrain_jax.checkpoint import Bundle
from synbrain_jax.consistency import Responses
from synbrain_jax.data.pairs import Dataset, Trials
from synbrain_jax.data.voxels import Voxels
from synbrain_jax.errors import InputError
from synbrain_jax.studies import common
from synbrain_jax.studies import consistency as the_study
from synbrain_jax.studies import consistency_page as the_page
from synbrain_jax.synthesis import SynBrain

STIMULI, TRIALS, VOXELS = 12, 4, 30


def simulated(signal=1.0, noise=1.0, seed=0, stimuli=STIMULI, trials=TRIALS, voxels=VOXELS):
    """True patterns of the stimuli, and trials of them in `trials` runs."""
    rng = np.random.default_rng(seed)
    truth = signal * rng.normal(size=(stimuli, voxels))
    stimulus = np.repeat(np.arange(stimuli), trials)
    fmri = truth[stimulus] + noise * rng.normal(size=(len(stimulus), voxels)) + 5
    return truth.astype(np.float32), Responses(fmri.astype(np.float32), stimulus, np.tile(np.arange(trials), stimuli))


def drawn_rows(counts):
    return [np.repeat(np.arange(len(row)), row.astype(int)) for row in counts]


# ---- across trials ---------------------------------------------------------------------------------


def brute_agreement(one, another, excluded):
    means = [metrics.group_means(part.fmri, part.stimulus).mean(axis=0) for part in (one, another)]
    own, other = ([[] for _ in range(one.stimuli)] for _ in range(2))
    for i, x in enumerate(one.fmri - means[0]):
        for j, y in enumerate(another.fmri - means[1]):
            if not excluded(i, j):
                same = one.stimulus[i] == another.stimulus[j]
                (own if same else other)[one.stimulus[i]].append(scipy.stats.pearsonr(x, y)[0])
    return [[np.mean(r) if r else np.nan for r in side] for side in (own, other)]


def test_agreement_of_trials_is_over_pairs_of_different_runs():
    _, trials = simulated(stimuli=5)
    keep = np.ones(20, bool)
    keep[[0, 5, 6, 7]] = False  # unequal numbers of trials, and one stimulus seen once
    run = np.random.default_rng(0).integers(0, 3, 20)
    trials = Responses(trials.fmri, trials.stimulus, run).of(keep)
    found = consistency.agreement(trials)
    own, other = brute_agreement(trials, trials, lambda i, j: trials.run[i] == trials.run[j])
    np.testing.assert_allclose(found.own, own, atol=1e-5)
    np.testing.assert_allclose(found.other, other, atol=1e-5)
    assert np.isnan(found.own[1])


def test_agreement_of_samples_with_trials_is_over_all_pairs():
    _, trials = simulated(stimuli=4)
    samples = consistency.as_responses(np.random.default_rng(1).normal(1, 1, size=(4, 3, VOXELS)).astype(np.float32))
    found = consistency.agreement(samples, trials)
    own, other = brute_agreement(samples, trials, lambda i, j: False)
    np.testing.assert_allclose(found.own, own, atol=1e-5)
    np.testing.assert_allclose(found.other, other, atol=1e-5)


def test_samples_like_trials_agree_as_trials_do_and_the_truth_better():
    truth, trials = simulated(stimuli=40, trials=6, voxels=400)
    samples = truth[:, None] + np.random.default_rng(5).normal(size=(40, 6, 400)).astype(np.float32)
    excess = {
        name: float(np.mean(found.own - found.other))
        for name, found in {
            "trials": consistency.agreement(trials),
            "samples": consistency.agreement(consistency.as_responses(samples), trials),
            "truth": consistency.agreement(consistency.as_responses(truth[:, None]), trials),
        }.items()
    }
    # Signal and noise have variance 1: a trial is half signal; centring adds 1 / 40.
    assert excess["trials"] == pytest.approx(0.5 * 40 / 39, abs=0.02)
    assert excess["samples"] == pytest.approx(excess["trials"], abs=0.01)
    assert excess["truth"] == pytest.approx(np.sqrt(0.5) * 40 / 39, abs=0.02)


def test_as_many_samples_as_trials():
    samples = np.arange(3 * 2 * 4, dtype=np.float32).reshape(3, 2, 4)
    trials = Responses(np.zeros((6, 4), np.float32), np.array([0, 1, 1, 2, 2, 2]), np.arange(6))
    found = consistency.as_many(samples, trials)
    np.testing.assert_array_equal(found.stimulus, [0, 1, 1, 2, 2])  # of three trials there are two samples
    np.testing.assert_array_equal(found.fmri, samples.reshape(6, 4)[[0, 2, 3, 4, 5]])
    np.testing.assert_array_equal(found.run, [0, 0, 1, 0, 1])


def test_means_leave_out_what_is_unknown():
    values = np.array([1, np.nan, 4])
    counts = np.array([[1, 1, 1], [2, 1, 0], [0, 3, 0]], np.float32)
    np.testing.assert_allclose(consistency.weighted_mean(values, counts), [2.5, 1, np.nan])
    np.testing.assert_allclose(consistency.known_mean(np.array([[1, np.nan], [np.nan, np.nan]])), [1, np.nan])


def test_halves_hold_whole_runs_equally_often():
    stimulus = np.repeat([0, 1, 2, 3], [6, 6, 1, 4])
    run = np.array([0, 0, 1, 1, 2, 2, 0, 0, 0, 1, 1, 1, 5, 7, 7, 7, 7])
    halves = [consistency.halves(Responses(np.zeros((17, 1), np.float32), stimulus, run), seed) for seed in range(20)]
    for half in halves:
        for s, r in itertools.product((0, 1), range(3)):
            assert len(np.unique(half[(stimulus == s) & (run == r)])) <= 1
        assert sorted(half[[0, 2, 4]]) == [-1, 0, 1]  # three runs: one is left over
        assert sorted(half[[6, 9]]) == [0, 1]
        assert half[12] == -1  # seen once
        assert sorted(half[13:]) == [0, 0, 1, 1]  # one run: by trial
    assert len({tuple(half) for half in halves}) > 5


def test_spearman_brown_steps_up_a_known_reliability():
    # The mean of m measurements with noise variance s has reliability 1 / (1 + s / m).
    single = 1 / (1 + 2.0)
    found = consistency.spearman_brown(np.array([single, -0.1]), 3.0)
    np.testing.assert_allclose(found, [1 / (1 + 2 / 3), 0])


# ---- across brains and stimuli ---------------------------------------------------------------------


def test_region_means_and_correlation_across_brains():
    rng = np.random.default_rng(0)
    rois = {"a": np.arange(10) < 3, "b": np.arange(10) >= 3}
    fmri = rng.normal(size=(6, 10)).astype(np.float32)
    means = consistency.region_means(fmri, rois)
    np.testing.assert_allclose(means[:, 1], fmri[:, 3:].mean(axis=1), rtol=1e-5)
    real, made = ([rng.normal(size=4) for _ in range(3)] for _ in range(2))

    def r(one, another):
        return np.array([[np.corrcoef(one, another)[0, 1]]])

    found = consistency.across_brains(real, made, r)
    matrix = np.corrcoef(np.stack(real + made))
    np.testing.assert_allclose(found["real, real"], np.mean([matrix[0, 1], matrix[0, 2], matrix[1, 2]]))
    np.testing.assert_allclose(found["synthetic, synthetic"], np.mean([matrix[3, 4], matrix[3, 5], matrix[4, 5]]))
    others = [matrix[a, 3 + b] for a, b in itertools.permutations(range(3), 2)]
    np.testing.assert_allclose(found["real, synthetic"], np.mean(others))
    np.testing.assert_allclose(found["own"], np.mean([matrix[i, 3 + i] for i in range(3)]))


def test_rdm_is_scipys_of_centred_patterns():
    truth, _ = simulated()
    centred = truth - truth.mean(axis=0)
    expected = scipy.spatial.distance.pdist(centred, "correlation")
    np.testing.assert_allclose(consistency.rdm(truth + 100), expected, atol=1e-4)


def test_rdm_r_is_spearmans_and_of_draws_that_of_their_pairs():
    (one, _), (noise, _) = simulated(), simulated(seed=1)
    x, y = consistency.rdm(one), consistency.rdm(one + noise)
    x[3] = x[7]  # a tie
    counts = statistics.resamples(STIMULI, draws=20, seed=0)
    found = consistency.rdm_r(x, y, counts)
    assert found[0] == pytest.approx(scipy.stats.spearmanr(x, y)[0], abs=1e-6)
    i, j = np.triu_indices(STIMULI, 1)
    ranks = [scipy.stats.rankdata(values) for values in (x, y)]
    for rows, r in zip(drawn_rows(counts), found, strict=True):
        pairs = [np.flatnonzero((i == min(a, b)) & (j == max(a, b))) for a, b in itertools.combinations(rows, 2)]
        pairs = np.concatenate(pairs)
        assert r == pytest.approx(np.corrcoef(ranks[0][pairs], ranks[1][pairs])[0, 1], abs=1e-6)
    assert consistency.rdm_r(np.ones_like(x), y, counts[:1])[0] == 0


# ---- selectivity -----------------------------------------------------------------------------------


def test_t_and_d_prime_are_those_of_the_drawn_trials():
    _, trials = simulated(noise=0.5)
    trials.fmri[:, 4] = 3  # a voxel that never varies
    trials = trials.of(np.arange(len(trials.stimulus)) % 5 > 0)  # unequal numbers
    inside = np.stack([np.arange(STIMULI) < 4, np.arange(STIMULI) % 2 == 0])
    counts = statistics.resamples(STIMULI, draws=6, seed=2)
    found = consistency.contrasts(consistency.moments(trials), inside, counts)
    for (c, category), (d, rows) in itertools.product(enumerate(inside), enumerate(drawn_rows(counts))):
        drawn = [
            np.concatenate([trials.fmri[trials.stimulus == s] for s in rows if category[s] == side] or [[]])
            for side in (1, 0)
        ]
        assert min(map(len, drawn)) > 1
        test = scipy.stats.ttest_ind(*(np.delete(side, 4, axis=1).astype(float) for side in drawn), equal_var=False)
        np.testing.assert_allclose(np.delete(found.t[c, d], 4), test.statistic, rtol=2e-3, atol=1e-3)
        np.testing.assert_allclose(np.delete(found.freedom[c, d], 4), test.df, rtol=2e-3)
        own, others = (np.delete(side, 4, axis=1) for side in drawn)
        pooled = np.sqrt((own.var(axis=0, ddof=1) + others.var(axis=0, ddof=1)) / 2)
        d_prime = (own.mean(axis=0) - others.mean(axis=0)) / pooled
        np.testing.assert_allclose(np.delete(found.d_prime[c, d], 4), d_prime, rtol=2e-3, atol=1e-3)
    np.testing.assert_array_equal(found.t[..., 4], 0)


def test_what_does_not_vary_within_a_category_has_no_t():
    _, trials = simulated()
    inside = np.arange(STIMULI) < 5
    sizes = np.random.default_rng(0).normal(size=VOXELS).astype(np.float32)
    trials.fmri[:] = np.outer(inside[trials.stimulus], sizes) + 3 * sizes
    found = consistency.contrasts(consistency.moments(trials), inside[None], statistics.resamples(STIMULI, draws=50))
    np.testing.assert_array_equal(found.t, 0)
    np.testing.assert_array_equal(found.d_prime, 0)


def test_a_category_that_a_draw_lacks_has_t_0():
    _, trials = simulated()
    counts = np.ones((1, STIMULI), np.float32)
    counts[0, 0] = 0
    found = consistency.contrasts(consistency.moments(trials), np.eye(STIMULI, dtype=bool)[:1], counts)
    np.testing.assert_array_equal(found.t, 0)
    np.testing.assert_array_equal(found.d_prime, 0)


def test_significant_voxels_are_those_of_benjamini_and_hochberg():
    rng = np.random.default_rng(0)
    t, freedom = rng.normal(1, 2, size=(2, 50)), np.full((2, 50), 20.0)
    for row, chosen in zip(t, consistency.significant(t, freedom), strict=True):
        p = np.sort(scipy.stats.t.sf(row, 20))
        below = np.flatnonzero(p <= 0.05 * np.arange(1, 51) / 50)
        assert chosen.sum() == (below.max() + 1 if len(below) else 0) > 0
        assert row[chosen].min() > row[~chosen].max()
    assert not consistency.significant(-np.abs(t) - 3, freedom).any()  # one-sided


def test_top_dice_and_row_correlation():
    t = np.array([[1.0, 5, 3, 4, 2], [9, 1, 8, 2, 3]])
    np.testing.assert_array_equal(consistency.top(t, 0.4), [[0, 1, 0, 1, 0], [1, 0, 1, 0, 0]])
    assert consistency.top(t, 0.01).sum() == 2
    one, another = np.array([[1, 1, 0, 0], [0, 0, 0, 0]], bool), np.array([[0, 1, 1, 1], [0, 0, 0, 0]], bool)
    np.testing.assert_allclose(consistency.dice(one, another), [2 / 5, np.nan])
    r = consistency.row_r(t, t**2)
    np.testing.assert_allclose(r, [np.corrcoef(row, row**2)[0, 1] for row in t], atol=1e-6)


def test_clusters_find_groups_that_are_there():
    rng = np.random.default_rng(0)
    group = rng.permutation(np.repeat([0, 1, 2], 10))
    features = 10 * rng.normal(size=(3, 4))[group] + rng.normal(size=(30, 4))
    found = consistency.clusters(features.astype(np.float32), 3)
    assert len(set(zip(group.tolist(), found.tolist(), strict=True))) == 3


def test_latent_plane_is_that_of_the_largest_variance():
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.normal(size=(20, 20))).Q[:2]
    places = rng.normal(size=(8, 2)) * [10, 4]
    trials = (places @ axes)[np.repeat(np.arange(8), 3)] + 0.01 * rng.normal(size=(24, 20))
    plane = consistency.latent_plane(trials, np.repeat(np.arange(8), 3), places @ axes)
    distances = scipy.spatial.distance.pdist
    np.testing.assert_allclose(distances(plane.mapped), distances(places), rtol=1e-2)
    np.testing.assert_allclose(plane.trials[::3], plane.mapped, atol=0.1)
    assert plane.share.sum() == pytest.approx(1, abs=1e-3)


# ---- the study -------------------------------------------------------------------------------------


class Known(SynBrain):
    """A system that expects `responses` [s v] and draws samples around them, whatever the tokens."""

    def __init__(self, responses, noise):
        self.responses, self.noise = responses, np.float32(noise)
        self.bundle = types.SimpleNamespace(spread=None, latent_std=None)

    def predict(self, tokens):
        return self.responses

    def synthesize(self, tokens, key, *, k, variability):
        draws = np.random.default_rng(7).normal(size=(len(self.responses), k, self.responses.shape[1]))
        return self.responses[:, None] + self.noise * draws.astype(np.float32)


def known_brain(number, truth, voxels=60, trials=6):
    """A subject whose voxels mix `truth` [s d] about as everybody's do, and its true responses.

    Subject 2 saw the pictures in another order.
    """
    rng = np.random.default_rng(number)
    order = np.arange(len(truth)) if number == 1 else np.arange(len(truth))[::-1]
    truth = truth[order]
    weights = np.random.default_rng(99).normal(size=(truth.shape[1], voxels)) + 0.5 * rng.normal(size=(3, voxels))
    responses = (truth @ weights / np.sqrt(truth.shape[1])).astype(np.float32)
    stimulus = np.repeat(np.arange(len(truth), dtype=np.int32), trials)
    run = np.tile(np.arange(trials, dtype=np.int32), len(truth))
    fmri = (responses[stimulus] + rng.normal(size=(len(stimulus), voxels))).astype(np.float32)
    names = tuple(f"picture {i}" for i in order)
    test = Trials(names, truth[:, None].astype(np.float32), fmri, stimulus, run, run)
    rois = {
        "atlas/front": np.arange(voxels) < 25,
        "atlas/back": np.arange(voxels) >= 25,
        "atlas/few": np.arange(voxels) < 5,
    }
    order = np.arange(voxels, dtype=np.int32)
    place = Voxels(f"subject {number}", "none", None, None, None, None, order, rois)
    return Dataset(f"known/{number}", epath.Path("."), place, (1, 3), voxels, {}), test, responses


@pytest.fixture
def studied(monkeypatch, tmp_path):
    """Runs the study on two known brains with a system each, of the true responses to the stimuli `shown`."""
    truth = np.random.default_rng(0).normal(size=(40, 3))
    brains = [known_brain(number, truth) for number in (1, 2)]
    tests = {dataset.name: test for dataset, test, _ in brains}
    monkeypatch.setattr(the_study, "open_subjects", lambda settings: [dataset for dataset, _, _ in brains])
    monkeypatch.setattr(the_study, "load_trials", lambda dataset, split: tests[dataset.name])
    monkeypatch.setattr(the_study, "_latent_scores", lambda system, brain: {})

    def run(shown, noise, seeds=(0,), **changes):
        home = tmp_path / f"{noise}{shown[0]}"
        systems = {dataset.name: Known(responses[shown], noise) for dataset, _, responses in brains}
        monkeypatch.setattr(the_study, "trained", lambda settings, seed, datasets: [systems[datasets[0].name]])
        monkeypatch.setattr(the_study, "homes", lambda settings, seed, datasets: [epath.Path(home / datasets[0].name)])
        settings = common.Settings(tiny.config(), epath.Path(tmp_path), seeds, quick=True, **changes)
        return the_study.study(settings)

    return run


def held(page):
    return {claim.text: claim.holds for claim in page.claims}


def test_claims_hold_for_a_system_that_knows_the_truth_and_its_noise(studied):
    page = studied(np.arange(40), 1.0)
    claims = held(page)
    assert len(claims) == 2 * (3 + 2 + 1) + 2
    # Few voxels and stimuli tell little of RDMs in two brains, and of what their few regions do not share.
    untold = [
        text for text in claims if text.endswith("(RDMs of regions)") or "where regions differ in selectivity" in text
    ]
    assert len(untold) == 3
    assert all(claims.pop(text) is not False for text in untold)
    assert set(claims.values()) == {True}
    region, real, *_ = page.sections[3].tables[0].rows[-1]
    assert region == "mean"
    assert real.low > 0.5
    cells = [cell for part in page.sections for table in part.tables for row in table.rows for cell in row]
    estimates = [cell for cell in cells if isinstance(cell, statistics.Estimate)]
    assert len(estimates) > 50
    assert all(one.low - 1e-6 <= one.value <= one.high + 1e-6 for one in estimates)


def test_draws_of_how_regions_differ_in_selectivity_lie_about_what_all_stimuli_give():
    """In a draw some stimuli are there twice, which alone makes d' noisier and its correlation smaller."""
    dataset, test, responses = known_brain(1, np.random.default_rng(0).normal(size=(40, 3)))
    brain = the_study._brain(dataset, test, the_study.categories_of(None, [test]), 100)
    noise = 5 * np.random.default_rng(1).normal(size=(len(test.fmri), responses.shape[1]))
    made = dataclasses.replace(brain.trials, fmri=(responses[test.stimulus] + noise).astype(np.float32))
    r = the_study._region_scores(brain, made)["d prime, r"]
    assert len(r) == 101
    assert r[0] < 0.9  # or clipping would show
    assert r[1:].mean() == pytest.approx(r[0], abs=0.03)
    assert r[1:].std() > 0.02


def test_a_claim_is_what_the_whole_interval_says():
    def drawn(low, high):
        return np.concatenate([[(low + high) / 2], np.linspace(low, high, 1001)])

    def holds(low, high, *bounds):
        return the_page.judged("", drawn(low, high), "", *bounds).holds

    assert [holds(0.95, 1.0, 0.9), holds(0.8, 1.0, 0.9), holds(0.7, 0.8, 0.9)] == [True, None, False]
    assert [holds(0.95, 1.0, 0.9, 1.1), holds(1.0, 1.2, 0.9, 1.1), holds(1.2, 1.3, 0.9, 1.1)] == [True, None, False]
    shares = the_page.share(drawn(0.2, 0.4), drawn(0.4, 0.8))
    np.testing.assert_allclose(shares, 0.5)
    assert np.isnan(the_page.share(drawn(0.2, 0.4), drawn(-0.1, 0.8))).all()
    untold = the_page.judged("", np.full(5, np.nan), "", 0.9)
    assert untold.holds is None
    assert "no number" in untold.evidence


def test_claims_fail_for_responses_to_other_pictures(studied):
    page = studied(np.roll(np.arange(40), 7), 1.0)
    assert {text for text, holds in held(page).items() if holds} == set()


def test_samples_that_hardly_vary_are_told_from_trials(studied):
    claims = held(studied(np.arange(40), 0.1))
    assert claims["subject 1: a synthetic sample agrees with a real trial as well as another trial does"] is True
    assert claims["subject 1: a synthetic sample agrees with a real trial as it does with another sample"] is False


def test_without_runs_trials_of_one_stimulus_are_compared_all_the_same():
    dataset, test, _ = known_brain(1, np.random.default_rng(0).normal(size=(8, 3)))
    categories = the_study.categories_of(None, [test])
    brain = the_study._brain(dataset, test, categories, draws=5)
    np.testing.assert_array_equal(brain.trials.run, test.run)
    unknown = dataclasses.replace(test, run=np.zeros_like(test.run))
    found = the_study._measured(the_study._brain(dataset, unknown, categories, draws=5), splits=1)
    expected = the_study._measured(brain, splits=1)
    # As every trial of a stimulus has a run of its own, its pairs are the same.
    np.testing.assert_allclose(found["trial, trial"][0], expected["trial, trial"][0], atol=1e-6)
    assert "t map, again" in found


def test_categories_come_from_a_file(studied, tmp_path):
    file = tmp_path / "categories.csv"
    lines = ["stimulus_id,category", *(f"picture {i},{'face' if i < 15 else 'house'}" for i in range(30)), "other,x"]
    file.write_text("\n".join(lines) + "\n")
    rows = studied(np.arange(40), 1.0, categories=str(file)).sections[1].tables[0].rows
    assert [row[0] for row in rows] == ["face", "house", "mean"]
    names, of = zip(*(line.split(",") for line in lines[1:]), strict=True)
    np.savez(tmp_path / "categories.npz", stimulus_id=np.array(names), category=np.array(of))
    assert studied(np.arange(40), 1.0, categories=str(tmp_path / "categories.npz")).sections[1].tables[0].rows == rows
    file.write_text("picture,kind\npicture 1,face\n")
    with pytest.raises(InputError, match=r"header stimulus_id,category.*'picture \d+'"):
        studied(np.arange(40), 1.0, categories=str(file))


def test_without_a_file_few_stimuli_are_categories_and_many_are_clustered(studied):
    truth = np.random.default_rng(0).normal(size=(8, 3))
    _, test, _ = known_brain(1, truth)
    few = the_study.categories_of(None, [test])
    assert few.names == test.stimulus_id
    assert few.masks(test.stimulus_id)["picture 3"].tolist().index(True) == 3
    page = studied(np.arange(40), 1.0)
    assert "5 k-means clusters" in page.sections[1].text
    assert len(page.sections[1].tables[0].rows) == 6


@pytest.fixture(scope="module")
def tiny_systems(two_subjects):
    config = tiny.config()
    std = np.full((tiny.TOKENS, tiny.WIDTH), 0.1, np.float32)
    params = tiny.random_params(config)
    return [SynBrain(Bundle.uncorrected(config, params, data.voxels, data.name, std)) for data in two_subjects]


def test_study_of_models_goes_to_a_page_and_is_not_done_twice(two_subjects, tiny_systems, monkeypatch, tmp_path):
    monkeypatch.setattr(the_study, "open_subjects", lambda settings: two_subjects)
    systems = {data.name: system for data, system in zip(two_subjects, tiny_systems, strict=True)}
    monkeypatch.setattr(the_study, "trained", lambda settings, seed, datasets: [systems[datasets[0].name]])
    monkeypatch.setattr(
        the_study, "homes", lambda settings, seed, datasets: [epath.Path(tmp_path) / f"{datasets[0].name}{seed}"]
    )
    settings = common.Settings(tiny.config(), epath.Path(tmp_path), (0, 1), quick=True)
    page = the_study.study(settings)
    page.save(settings.folder("consistency"))
    assert document.load(settings.folder("consistency")) == page
    for figure in page.figures:
        assert (settings.folder("consistency") / f"{figure.name}.png").read_bytes().startswith(b"\x89PNG")
    assert {figure.name for figure in page.figures} == {"t_maps", "regions", "rdms", "latents"}
    # Each test stimulus was measured once: no trial agrees with another, and what needs that cannot be told.
    trials = page.sections[0].tables[0].rows[0]
    assert [trials[column] for column in (1, 3, 4)] == [None, None, None]
    assert [claim.holds for claim in page.sections[0].claims][::3] == [None, None]
    brains = page.sections[3]
    assert "5 stimuli that all 2 brains saw" in brains.tables[0].note

    def again(*_):
        raise AssertionError("computed twice")

    monkeypatch.setattr(the_study, "_synthetic", again)
    assert the_study.study(settings).sections == page.sections


def test_latent_scores_are_of_the_models_own_latents(tiny_dataset, tiny_systems):
    from synbrain_jax.data.pairs import load_trials
    from synbrain_jax.models.brain_vae import BrainVAE

    system = tiny_systems[0]
    test = load_trials(tiny_dataset, "test")
    brain = the_study._brain(tiny_dataset, test, the_study.categories_of(None, [test]), draws=5)
    found = the_study._latent_scores(system, brain)
    params = jax.tree.map(jnp.asarray, system.bundle.params["brain_vae"])
    order = system.bundle.voxels.order
    latents = (
        BrainVAE(tiny.config().brain_vae)
        .apply({"params": params}, jnp.asarray(test.fmri[:, order]), method="encode")
        .mean
    )
    plane = consistency.latent_plane(
        np.asarray(latents).reshape(len(latents), -1),
        test.stimulus,
        np.zeros((9, tiny.TOKENS * tiny.WIDTH), np.float32),
    )
    np.testing.assert_allclose(np.abs(found["figure latent trials"]), np.abs(plane.trials), atol=1e-3)
    assert found["figure latent category"].tolist() == list(range(9))
