"""The released evaluation's numbers against those it gave, and where they part from the correct ones."""

from dataclasses import asdict

import numpy as np
import pytest
import scipy.spatial
import scipy.stats
from golden_set import load

from synbrain_jax import metrics
from synbrain_jax.errors import InputError
from synbrain_jax.interop import released_metrics as released

FILE = "metrics.npz"
GOLDEN = load(FILE)
ROWS = released.trial_rows(GOLDEN["voxel_recon"], GOLDEN["voxel_fmri"])
DRAWS, DRAWN = GOLDEN["retrieval_indices"].shape
PICTURES = tuple((GOLDEN[f"image_{which}_u8"] / 255).astype(np.float32) for which in ("gt", "pd"))


@pytest.mark.parametrize(
    ("function", "mean", "each"),
    [
        (released.per_trial_mse, "voxel_MSE", "voxel_mse_per_trial"),
        (released.per_trial_pearson, "voxel_Pearson", "voxel_pearson_per_trial"),
        (released.per_trial_cosine, "voxel_Cosine", None),
    ],
)
def test_one_pattern_against_single_trials(function, mean, each, compare):
    scores = function(GOLDEN["voxel_recon"], GOLDEN["voxel_fmri"])
    assert scores.shape == GOLDEN["voxel_fmri"].shape[:2]
    compare(FILE, mean, scores.mean(), GOLDEN[mean], tolerance=1e-6)
    if each:
        compare(FILE, each, scores, GOLDEN[each], tolerance=1e-6)


def test_cosine_of_each_trial_is_scipys():
    synthesised, trials = (GOLDEN[name].astype(np.float64) for name in ("voxel_recon", "voxel_fmri"))
    distance = scipy.spatial.distance.cosine
    expected = [[1 - distance(guess[0], trial) for trial in of] for guess, of in zip(synthesised, trials, strict=True)]
    np.testing.assert_allclose(released.per_trial_cosine(synthesised, trials), expected, rtol=1e-9)
    np.testing.assert_array_equal(released.per_trial_cosine(0 * synthesised, trials), 0)


def test_a_constant_pattern_has_no_correlation():
    constant = np.full((1, 1, 6), 0.1)
    assert constant.mean() != 0.1  # the mean of equal numbers is rounded, too
    assert np.isnan(released.per_trial_pearson(constant, np.arange(12.0).reshape(1, 2, 6))).all()


def test_covariance_alignment(compare):
    value = released.covariance_alignment(*ROWS)
    compare(FILE, "voxel_CKA", value, GOLDEN["voxel_CKA"], tolerance=2e-6)
    compare(FILE, "voxel_CKA_f64", value, GOLDEN["voxel_CKA_f64"], tolerance=1e-12)
    compare(FILE, "cka_self", released.covariance_alignment(ROWS[1], ROWS[1]), GOLDEN["cka_self"], tolerance=1e-9)


def test_covariance_alignment_of_almost_nothing():
    """The 1e-8 in the denominator: 0 instead of NaN for constant patterns, 1/2 where the norms' product equals it."""
    centred = ROWS[0] - ROWS[0].mean(axis=0, dtype=np.float64)
    scale = 1e-4 / np.linalg.norm(centred @ centred.T)
    np.testing.assert_allclose(released.covariance_alignment(centred, scale * centred), 0.5, rtol=1e-9)
    assert released.covariance_alignment(centred, 0 * centred) == 0


def test_covariance_alignment_is_not_linear_cka(compare):
    linear = metrics.linear_cka(*ROWS)
    compare(FILE, "voxel_standard_linear_CKA_f64", linear, GOLDEN["voxel_standard_linear_CKA_f64"], tolerance=1e-6)

    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 6)) * np.linspace(0.1, 3, 6)
    y = x + 0.2 * rng.normal(size=x.shape)
    alignment = released.covariance_alignment(x, y)
    covariances = [np.cov(rows, rowvar=False).reshape(-1) for rows in (x, y)]
    np.testing.assert_allclose(alignment, 1 - scipy.spatial.distance.cosine(*covariances), rtol=1e-9)
    # Rows in another order: the same covariances, but nothing to do with each other.
    shuffled = rng.permutation(y)
    np.testing.assert_allclose(released.covariance_alignment(x, shuffled), alignment, rtol=1e-9)
    assert metrics.linear_cka(x, y) > 0.9 > 0.3 > metrics.linear_cka(x, shuffled)
    # Voxels in another order: the same patterns to linear CKA, other covariances.
    np.testing.assert_allclose(metrics.linear_cka(x, y[:, ::-1]), metrics.linear_cka(x, y), rtol=1e-5)
    assert alignment > 0.9 > 0.5 > released.covariance_alignment(x, y[:, ::-1])


@pytest.mark.parametrize("case", ["recon1", "recon2"])
def test_voxel_scores(case, compare):
    scores = released.voxel_scores(GOLDEN[f"{case}_x"], GOLDEN[f"{case}_recon"])
    compare(FILE, f"{case}_mse", scores.mse, GOLDEN[f"{case}_mse"], tolerance=1e-6)
    for name in ("spearman", "explained_variance", "explained_variance_total"):
        compare(FILE, f"{case}_{name}", getattr(scores, name), GOLDEN[f"{case}_{name}"], tolerance=1e-6)
    for suffix, values in (("corr", scores.spearman), ("ev", scores.explained_variance)):
        for name, value in asdict(released.percentiles(values)).items():
            compare(FILE, f"{case}_{name}_{suffix}", value, GOLDEN[f"{case}_{name}_{suffix}"], tolerance=1e-6)


def test_voxels_that_are_constant_or_have_ties():
    measured = np.array([[1, 0, 3], [1, 1, 3], [2, 2, 3], [4, 3, 3]], np.float32)
    reconstructed = np.array([[0, 5, 1], [2, 5, 2], [1, 5, 3], [4, 5, 4]], np.float32)
    scores = released.voxel_scores(measured, reconstructed)
    ranks = [1.5, 1.5, 3, 4], [1, 3, 2, 4]
    np.testing.assert_allclose(scores.spearman, [np.corrcoef(*ranks)[0, 1], np.nan, np.nan])
    np.testing.assert_allclose(scores.explained_variance, [1 - 0.6875 / 1.5, 0, 0], rtol=1e-6)
    assert np.isnan(list(asdict(released.percentiles(scores.spearman)).values())).all()


def test_explained_variance_of_a_voxel_is_bit_for_bit_the_loops():
    """A voxel of equal values need not have variance 0 in float32; then its score is arbitrary, and the release's."""
    rng = np.random.default_rng(0)
    measured = np.concatenate([np.repeat(rng.normal(size=(1, 20)), 37, axis=0), rng.normal(size=(37, 20))], axis=1)
    measured, reconstructed = (x.astype(np.float32) for x in (measured, rng.normal(size=measured.shape)))
    assert (measured[:, :20].var(axis=0) > 0).any()
    scores = released.voxel_scores(measured, reconstructed)
    for voxel, (x, r) in enumerate(zip(measured.T, reconstructed.T, strict=True)):
        expected = 1 - np.var(x - r) / np.var(x) if np.var(x) else 0
        assert scores.explained_variance[voxel] == expected


def test_voxel_scores_need_two_samples():
    with pytest.raises(InputError, match="at least 2 samples, got 1"):
        released.voxel_scores(np.ones((1, 3)), np.ones((1, 3)))


def test_retrieval_draws_are_the_legacy_generators(compare):
    seed = int(GOLDEN["retrieval_np_seed"])
    indices = released.retrieval_draws(len(GOLDEN["retrieval_image"]), seed, DRAWS, DRAWN)
    compare(FILE, "retrieval_indices", indices, GOLDEN["retrieval_indices"])
    assert released.retrieval_draws(400, seed).shape == (30, 300)  # the release's own numbers
    with pytest.raises(InputError, match="among 300 stimuli needs at least as many, got 299: pass a smaller `size`"):
        released.retrieval_draws(299, seed)


def test_retrieval(compare):
    top1 = released.retrieval_top1(GOLDEN["retrieval_image"], GOLDEN["retrieval_brain"], GOLDEN["retrieval_indices"])
    for label, values in (("fwd", top1.image_to_brain), ("bwd", top1.brain_to_image)):
        compare(FILE, f"retrieval_{label}_per_rep", values, GOLDEN[f"retrieval_{label}_per_rep"], tolerance=1e-6)
        compare(FILE, f"retrieval_{label}_mean", values.mean(), GOLDEN[f"retrieval_{label}_mean"], tolerance=1e-6)
        np.testing.assert_allclose(
            released.normal_interval(values),
            scipy.stats.norm.interval(0.95, loc=values.mean(), scale=np.std(values) / np.sqrt(DRAWS)),
        )


def test_retrieval_among_all_is_identification_top1_where_patterns_are_centred():
    rng = np.random.default_rng(1)
    image = rng.normal(size=(40, 3, 5))
    brain = image + 1.5 * rng.normal(size=image.shape)
    image, brain = (x - x.mean(axis=(1, 2), keepdims=True) for x in (image, brain))
    top1 = released.retrieval_top1(image, brain, np.arange(40)[None])
    image, brain = image.reshape(40, 15), brain.reshape(40, 15)
    np.testing.assert_allclose(top1.brain_to_image, metrics.identification_top1(brain, image).mean(), rtol=1e-6)
    np.testing.assert_allclose(top1.image_to_brain, metrics.identification_top1(image, brain).mean(), rtol=1e-6)
    assert 0 < top1.brain_to_image != top1.image_to_brain > 0


def test_batchwise_similarities_and_topk(compare):
    z, b = GOLDEN["sim_Z"], GOLDEN["sim_B"]
    cosine = released.batchwise_cosine(z, b)
    compare(FILE, "sim_batchwise_cosine", cosine, GOLDEN["sim_batchwise_cosine"], tolerance=1e-6)
    pearson = released.batchwise_pearson(z, b)
    compare(FILE, "sim_batchwise_pearson", pearson, GOLDEN["sim_batchwise_pearson"], tolerance=1e-6)
    compare(FILE, "sim_top1", released.topk(cosine, 1), GOLDEN["sim_top1"], tolerance=1e-6)
    compare(FILE, "sim_top3", released.topk(cosine, 3), GOLDEN["sim_top3"], tolerance=1e-6)
    compare(FILE, "sim_top5_default", released.topk(cosine), GOLDEN["sim_top5_default"], tolerance=1e-6)
    assert np.isnan(released.batchwise_cosine(0 * z, b)).all()


def test_topk_by_hand():
    similarity = np.array([[0.5, 0.9, 0.1, 0.2], [0.0, 0.9, 0.1, 0.2], [0.3, 0.2, 0.1, 0.0], [0.7, 0.8, 0.9, 0.1]])
    assert [released.topk(similarity, k) for k in (1, 2, 3, 4, 9)] == [0.25, 0.5, 0.75, 1, 1]
    assert released.topk(np.array([[0.5, 0.5], [0.5, 0.5]]), 1) == 0.5  # of equal ones, the one on the right


def test_two_way_identification(compare):
    truth, guess = GOLDEN["twoway_gt"], GOLDEN["twoway_pd"]
    counts, average = released.two_way_counts(truth, guess), released.two_way_identification(truth, guess)
    compare(FILE, "twoway_counts", counts, GOLDEN["twoway_counts"])
    compare(FILE, "twoway_avg", average, GOLDEN["twoway_avg"], tolerance=1e-12)
    compare(FILE, "twoway_denominator", counts.mean() / average, GOLDEN["twoway_denominator"], tolerance=1e-12)
    swapped = released.two_way_identification(guess, truth)
    compare(FILE, "twoway_avg_swapped_arguments", swapped, GOLDEN["twoway_avg_swapped_arguments"], tolerance=1e-12)


def test_a_tie_in_two_way_identification_is_a_failure():
    truth = np.array([[1, 0, 0], [0, 1, 0], [0, 1, 0]], np.float32)
    np.testing.assert_array_equal(released.two_way_counts(truth, truth), [2, 1, 1])
    np.testing.assert_allclose(metrics.identification_two_way(truth, truth), [1, 0.75, 0.75])


def test_unpaired_or_single_stimuli_are_refused():
    one, three = np.ones((1, 4)), np.ones((3, 4))
    for refused in (
        lambda: released.two_way_counts(one, one),
        lambda: released.two_way_identification(one, one),
        lambda: released.retrieval_top1(one, one, np.zeros((1, 1), int)),
    ):
        with pytest.raises(InputError, match="at least 2, in the same order; got 1 and 1"):
            refused()
    with pytest.raises(InputError, match="got 3 and 1"):
        released._require_pairs(three, one)


def test_correlation_distance_is_scipys():
    truth, guess = (GOLDEN[name].astype(np.float64) for name in ("twoway_gt", "twoway_pd"))
    expected = [scipy.spatial.distance.correlation(a, b) for a, b in zip(truth, guess, strict=True)]
    np.testing.assert_allclose(released.correlation_distance(truth, guess), expected, rtol=1e-9)


def test_pictures(compare):
    compare(FILE, "image_pixcorr", released.pixcorr(*PICTURES).mean(), GOLDEN["image_pixcorr"], tolerance=1e-6)
    compare(FILE, "image_ssim", released.ssim(*PICTURES).mean(), GOLDEN["image_ssim"], tolerance=1e-6)


def test_pictures_that_need_no_resizing():
    """Against NumPy's correlation, and windows of the SSIM summed one by one."""
    rng = np.random.default_rng(0)
    truth = rng.uniform(size=(1, 3, 425, 425)).astype(np.float32)
    guess = (0.5 * truth + 0.5 * rng.uniform(size=truth.shape)).astype(np.float32)
    np.testing.assert_allclose(released.pixcorr(truth, guess), np.corrcoef(truth.ravel(), guess.ravel())[0, 1], 1e-6)

    grey = 0.2125, 0.7154, 0.0721
    x, y = (sum(c * channel for c, channel in zip(grey, picture[0], strict=True)) for picture in (truth, guess))
    weight = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    weight = np.outer(weight, weight) / weight.sum() ** 2
    x, y = (np.lib.stride_tricks.sliding_window_view(z, weight.shape) for z in (x, y))

    def mean(window):
        return np.einsum("abij,ij->ab", window, weight, optimize=True)

    c1, c2, mx, my = 0.01**2, 0.03**2, mean(x), mean(y)
    vx, vy = mean((x - mx[..., None, None]) ** 2), mean((y - my[..., None, None]) ** 2)
    cov = mean((x - mx[..., None, None]) * (y - my[..., None, None]))
    expected = np.mean((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    np.testing.assert_allclose(released.ssim(truth, guess), expected, rtol=1e-6)


def test_a_picture_is_resized_in_proportion():
    """The shorter side to 425; a straight ramp stays one between the centres of its first and last pixels."""
    ramp = np.broadcast_to(np.linspace(0, 1, 12, dtype=np.float32), (3, 8, 12))
    resized = released._resized(ramp)
    assert resized.shape == (3, 425, 637)
    centres = (np.arange(637) + 0.5) * 12 / 637 - 0.5
    expected = np.clip(centres, 0, 11) / 11
    np.testing.assert_allclose(resized, np.broadcast_to(expected, resized.shape), atol=1e-6)
    shrunk = released._resized(np.stack([np.tile([0.0, 1.0], (850, 425)).astype(np.float32)] * 3))
    np.testing.assert_allclose(shrunk, 0.5, atol=1e-6)  # the two nearest pixels only
