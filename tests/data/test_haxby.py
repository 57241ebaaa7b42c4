"""The packaged real data: preprocessing in closed form, the splits, and figures that are known of these data."""

import importlib
import importlib.resources

import numpy as np
import pytest

from synbrain_jax.data import arrays, haxby
from synbrain_jax.data.haxby import detrend_and_zscore_runs, prepare_haxby
from synbrain_jax.data.pairs import Dataset, Trials, load_trials, open_dataset
from synbrain_jax.errors import InputError

SPLITS = {"train": range(9), "validation": (9,), "test": (10, 11)}


def packaged(name: str) -> np.lib.npyio.NpzFile:
    return np.load(importlib.resources.files("synbrain_jax.data") / "haxby2001" / name, allow_pickle=False)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def dataset(data_dir) -> Dataset:
    return open_dataset(prepare_haxby(data_dir))


def run_centred(trials: Trials) -> np.ndarray:
    """Block patterns [runs, 8, v], less the mean of each run."""
    blocks = np.stack(
        [
            [trials.fmri[(trials.run == run) & (trials.stimulus == index)].mean(axis=0) for index in range(8)]
            for run in np.unique(trials.run)
        ]
    )
    return blocks - blocks.mean(axis=1, keepdims=True)


def mean_pattern_correlation(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(one, other, strict=True)]))


def test_detrending_is_the_residual_of_a_line_scaled_to_unit_variance():
    rng = np.random.default_rng(0)
    run = np.repeat([0, 1, 2], [30, 12, 40])
    bold = rng.integers(200, 900, (82, 6)) + 7 * np.arange(82)[:, None]
    bold[run == 1, 2] = 500  # a dead voxel
    bold[run == 1, 3] = 100 + 7 * np.arange(12)  # and one that only drifts
    expected = np.empty(bold.shape)
    for r in range(3):
        y = bold[run == r].astype(float)
        design = np.stack([np.ones(len(y)), np.arange(len(y))], axis=1)
        residual = y - design @ np.linalg.lstsq(design, y, rcond=None)[0]
        expected[run == r] = residual / np.sqrt(np.mean(residual**2, axis=0))
    expected[run == 1, 2] = expected[run == 1, 3] = 0
    np.testing.assert_allclose(detrend_and_zscore_runs(bold, run), expected, atol=1e-5)


def test_records_hold_the_task_volumes_of_their_runs(dataset):
    raw = packaged("haxby2001_sub1_slice_raw.npz")
    task = raw["label"] > 0
    clean = detrend_and_zscore_runs(raw["bold"], raw["run"])[task]
    label, run = raw["label"][task], raw["run"][task]
    for split, runs in SPLITS.items():
        assert dataset.stimulus_ids(split) == tuple(raw["categories"][1:])
        np.testing.assert_array_equal(dataset.trials_per_record(split), 9 * len(runs))
        for number, record in enumerate(dataset.records(split), start=1):
            rows = np.flatnonzero((label == number) & np.isin(run, runs))
            np.testing.assert_array_equal(record.trial_index, rows)
            np.testing.assert_array_equal(record.run, run[rows])
            np.testing.assert_array_equal(record.fmri, clean[rows])


def test_tokens_are_the_embedding_of_the_category_at_unit_norm(dataset):
    names = packaged("haxby_category_minilm384.npz")
    embedding = dict(zip(names["category"], names["emb"], strict=True))
    assert dataset.token_shape == (12, 32)
    for record in dataset.records("test"):
        expected = embedding[record.stimulus_id] / np.linalg.norm(embedding[record.stimulus_id])
        np.testing.assert_allclose(record.tokens.ravel(), expected, rtol=2**-8)


def test_category_means_predict_the_test_runs_as_well_as_is_known(dataset):
    train, test = (run_centred(load_trials(dataset, split)) for split in ("train", "test"))
    assert mean_pattern_correlation(train.mean(axis=0), test.mean(axis=0)) == pytest.approx(0.366, abs=0.001)
    assert mean_pattern_correlation(test[0], test[1]) == pytest.approx(0.20, abs=0.01)


def test_voxels_lie_in_the_slice_and_follow_the_curve(dataset):
    voxels, position = dataset.voxels, packaged("haxby2001_sub1_slice_raw.npz")["voxel_ij"]
    np.testing.assert_array_equal(voxels.ijk[:, :2], position)
    assert (voxels.ijk[:, 2] == 0).all()
    assert voxels.volume_shape == (40, 20, 1)
    assert (voxels.ijk < voxels.volume_shape).all()
    np.testing.assert_array_equal(np.sort(voxels.order), np.arange(530))
    step = {name: np.abs(np.diff(position[order], axis=0)).sum(axis=1) for name, order in orders(voxels.order).items()}
    assert (step["hilbert"] == 1).mean() > 0.85
    assert step["hilbert"].mean() < 0.8 * step["raster"].mean()


def orders(hilbert: np.ndarray) -> dict[str, np.ndarray]:
    return {"hilbert": hilbert, "raster": np.arange(len(hilbert))}


def test_noise_ceiling_ratio_comes_from_the_blocks_of_all_runs(dataset):
    trials = [load_trials(dataset, split) for split in SPLITS]
    blocks = np.concatenate([run_centred(each) for each in trials])  # [12 runs, 8, v]
    z = blocks / blocks.reshape(96, -1).std(axis=0, ddof=1)
    noise = z.var(axis=0, ddof=1).mean(axis=0)
    expected = np.sqrt(np.maximum(0, 1 - noise) / noise)
    np.testing.assert_allclose(dataset.voxels.ncsnr, expected, rtol=1e-3, atol=1e-3)
    assert dataset.voxels.ncsnr.max() > 1.5  # a few voxels know the category very well


def test_permuted_labels_leave_nothing_to_learn_but_the_test_as_it_was(data_dir, dataset):
    permuted = open_dataset(prepare_haxby(data_dir, permute="trial"))
    assert permuted.name == "haxby2001/permuted"
    reseeded = open_dataset(prepare_haxby(data_dir, permute="trial", seed=5))
    true, *shuffled = (load_trials(each, "train") for each in (dataset, permuted, reseeded))
    test = load_trials(dataset, "test")
    target = run_centred(test).mean(axis=0)
    for trials in shuffled:
        means = np.stack([trials.fmri[trials.stimulus == index].mean(axis=0) for index in range(8)])
        assert abs(mean_pattern_correlation(means - means.mean(axis=0), target)) < 0.1
        np.testing.assert_array_equal(np.sort(trials.fmri, axis=0), np.sort(true.fmri, axis=0))
    assert (shuffled[0].fmri != shuffled[1].fmri).any()
    for split in ("validation", "test"):
        np.testing.assert_array_equal(load_trials(permuted, split).fmri, load_trials(dataset, split).fmri)
    np.testing.assert_array_equal(permuted.voxels.ncsnr, dataset.voxels.ncsnr)
    with pytest.raises(InputError, match="permute 'labels': expected 'none' or 'trial'"):
        prepare_haxby(data_dir, permute="labels")


def test_modules_that_define_builders_can_be_imported_again(tmp_path):
    for module in (haxby, arrays):
        importlib.reload(module)
    assert open_dataset(haxby.prepare_haxby(tmp_path)).name == "haxby2001/default"


def test_the_licence_of_the_data_lies_beside_them():
    notice = (importlib.resources.files("synbrain_jax.data") / "haxby2001" / "LICENSE.txt").read_text()
    for part in ("CC BY-SA 3.0", "not of the code", "Haxby, J. V.", "haxby2001_sub1_slice_raw.npz", "PyMVPA 2.6.5"):
        assert part in notice
