"""The Hilbert order against what defines the curve; the noise-ceiling ratio against NSD's formula; the file."""

import numpy as np
import pytest

from synbrain_jax.data.voxels import Voxels, hilbert_order, repeat_ncsnr
from synbrain_jax.errors import InputError


def grid(*sizes: int) -> np.ndarray:
    """All cells of a grid, [cells, axes], in a random order."""
    cells = np.stack(np.meshgrid(*map(np.arange, sizes), indexing="ij"), axis=-1).reshape(-1, len(sizes))
    return np.random.default_rng(0).permutation(cells)


@pytest.mark.parametrize("sizes", [(2, 2), (4, 4), (16, 16), (2, 2, 2), (8, 8, 8)])
def test_hilbert_curve_steps_to_neighbours_and_fills_each_subcube_before_the_next(sizes):
    cells = grid(*sizes)
    order = hilbert_order(cells)
    assert order.dtype == np.int32
    np.testing.assert_array_equal(np.sort(order), np.arange(len(cells)))
    visited = cells[order]
    np.testing.assert_array_equal(np.abs(np.diff(visited, axis=0)).sum(axis=1), 1)
    for size in (2**level for level in range(1, 5)):  # this sets it apart from a path that snakes along the rows
        block = visited // size
        changes = np.any(np.diff(block, axis=0) != 0, axis=1).sum()
        assert changes == len(np.unique(block, axis=0)) - 1


def test_hilbert_order_of_a_mask_is_the_curve_with_the_rest_left_out():
    cells = grid(8, 8, 8)
    corners = (cells == 0).all(axis=1) | (cells == 7).all(axis=1)  # keep the bounding box
    kept = np.flatnonzero(corners | (np.random.default_rng(1).random(len(cells)) < 0.3))
    whole = hilbert_order(cells)
    np.testing.assert_array_equal(kept[hilbert_order(cells[kept])], whole[np.isin(whole, kept)])


def test_hilbert_order_of_a_slice_is_two_dimensional_wherever_the_slice_lies():
    cells = grid(8, 8)
    expected = hilbert_order(cells)
    for axis in range(3):
        slice_of_volume = np.insert(cells - 3, axis, 5, axis=1)
        np.testing.assert_array_equal(hilbert_order(slice_of_volume), expected)


def test_hilbert_order_keeps_the_order_of_voxels_at_one_place():
    twice = np.repeat(grid(4, 4), 2, axis=0)
    order = hilbert_order(twice).reshape(-1, 2)
    np.testing.assert_array_equal(order[:, 1], order[:, 0] + 1)
    np.testing.assert_array_equal(hilbert_order(np.full((3, 3), 7)), [0, 1, 2])


def test_hilbert_order_of_a_line_is_its_direction():
    np.testing.assert_array_equal(hilbert_order(np.array([[5, 1, 9], [5, 1, 2], [5, 1, 30]])), [1, 0, 2])


def nsd_ncsnr(repeats: np.ndarray) -> np.ndarray:
    """NSD's formula on [stimuli, repeats, v]: z-score over all rows, pooled within-stimulus variance."""
    rows = repeats.reshape(-1, repeats.shape[-1])
    z = (repeats - rows.mean(axis=0)) / rows.std(axis=0, ddof=1)
    noise_variance = z.var(axis=1, ddof=1).mean(axis=0)
    return np.sqrt(np.maximum(0, 1 - noise_variance)) / np.sqrt(noise_variance)


def repeated(seed: int, signal: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """12 stimuli in each of 5 runs, 7 voxels: fmri [stimuli, runs, v] and the labels of its rows."""
    rng = np.random.default_rng(seed)
    fmri = signal * rng.normal(size=(12, 1, 7)) + rng.normal(size=(12, 5, 7))
    stimulus, run = (np.ravel(label).astype(np.int32) for label in np.indices((12, 5)))
    return fmri, stimulus, run


def test_one_repeat_is_the_mean_of_a_block_less_the_mean_of_its_run():
    fmri, stimulus, run = repeated(0)
    expected = nsd_ncsnr(fmri - fmri.mean(axis=0, keepdims=True))
    rng = np.random.default_rng(1)
    trial = rng.permutation(np.repeat(np.arange(60), 4))
    jitter = rng.normal(size=(60, 4, 7))
    jitter -= jitter.mean(axis=1, keepdims=True)  # within-block noise that the block's mean does not hold
    place = np.zeros(60, dtype=int)
    measured = np.empty((240, 7))
    for row, block in enumerate(trial):
        measured[row] = fmri.reshape(-1, 7)[block] + jitter[block, place[block]] + 10 * run[block]
        place[block] += 1
    np.testing.assert_allclose(repeat_ncsnr(measured, stimulus[trial], run[trial]), expected, rtol=1e-4)


def test_run_means_stay_where_runs_hold_different_stimuli():
    fmri, stimulus, run = repeated(2)
    kept = ~((stimulus == 3) & (run == 4))
    one_less = repeat_ncsnr(fmri.reshape(-1, 7)[kept], stimulus[kept], run[kept])
    shifted = repeat_ncsnr((fmri.reshape(-1, 7) + 10 * run[:, None])[kept], stimulus[kept], run[kept])
    assert (shifted < 0.5 * one_less).all()  # the drift between runs counts as noise


def test_a_trial_is_the_repeat_where_stimuli_stay_within_a_run():
    fmri, stimulus, _ = repeated(3)
    expected = nsd_ncsnr(fmri)
    rows = fmri.reshape(-1, 7)
    for run in (np.zeros_like(stimulus), stimulus // 4):
        np.testing.assert_allclose(repeat_ncsnr(rows, stimulus, run), expected, rtol=1e-5)


def test_ncsnr_is_none_without_repeats_and_right_on_known_noise():
    fmri, stimulus, run = repeated(4)
    assert repeat_ncsnr(fmri[:, 0], np.arange(12, dtype=np.int32), run[:12]) is None
    rng = np.random.default_rng(5)
    known = 2.0 * rng.normal(size=(4000, 1, 3)) + rng.normal(size=(4000, 3, 3))
    stimulus, run = (np.ravel(label).astype(np.int32) for label in np.indices((4000, 3)))
    np.testing.assert_allclose(repeat_ncsnr(known.reshape(-1, 3), stimulus, run), 2.0, rtol=0.05)


def voxels(**changes) -> Voxels:
    ijk = grid(3, 2, 2).astype(np.int32)
    complete = dict(
        subject="subj01",
        normalisation="run_zscore",
        ijk=ijk,
        volume_shape=(3, 2, 2),
        affine=np.diag([2.0, 2.0, 2.0, 1.0]),
        ncsnr=np.linspace(0, 1, 12, dtype=np.float32),
        order=hilbert_order(ijk),
        rois={"prf-visualrois/V1v": ijk[:, 0] == 0, "streams/early": ijk[:, 1] == 1, "floc-faces/none": ijk[:, 0] > 9},
    )
    return Voxels(**(complete | changes))


def arrays(voxels: Voxels) -> dict:
    """Every field by name, each region by its own."""
    return {name: value for name, value in vars(voxels).items() if name != "rois"} | dict(voxels.rois)


@pytest.mark.parametrize("unknown", [(), ("ijk", "volume_shape", "affine", "ncsnr")])
def test_a_voxel_file_gives_back_what_was_saved(tmp_path, unknown):
    saved = voxels(**dict.fromkeys(unknown), **({"rois": {}} if unknown else {}))
    saved.save(tmp_path / "voxels.npz")
    loaded = arrays(Voxels.load(tmp_path / "voxels.npz"))
    assert list(loaded) == list(arrays(saved))
    for name, value in arrays(saved).items():
        np.testing.assert_array_equal(loaded[name], value)
        assert getattr(loaded[name], "dtype", None) == getattr(value, "dtype", None)
    assert [file.name for file in tmp_path.iterdir()] == ["voxels.npz"]


def test_selected_voxels_keep_their_places_and_regions_and_get_an_order_of_their_own():
    whole = voxels()
    mask = whole.ijk[:, 0] != 1
    numbers = np.flatnonzero(mask)[::-1]
    for chosen, kept in ((mask, np.flatnonzero(mask)), (numbers, numbers)):
        part = whole.select(chosen)
        np.testing.assert_array_equal(part.ijk, whole.ijk[kept])
        np.testing.assert_array_equal(part.ncsnr, whole.ncsnr[kept])
        np.testing.assert_array_equal(part.order, hilbert_order(part.ijk))
        np.testing.assert_array_equal(part.rois["prf-visualrois/V1v"], part.ijk[:, 0] == 0)
        assert (part.subject, part.volume_shape) == (whole.subject, whole.volume_shape)
    nowhere = voxels(ijk=None, ncsnr=None).select(numbers)
    np.testing.assert_array_equal(nowhere.order, np.arange(len(numbers)))


def test_a_file_that_is_no_voxel_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"absent\.npz"):
        Voxels.load(tmp_path / "absent.npz")
    np.savez(tmp_path / "other.npz", subject="subj01")
    with pytest.raises(InputError, match=r"other\.npz: not a voxel file \(normalisation, order missing\)"):
        Voxels.load(tmp_path / "other.npz")
    np.savez(tmp_path / "objects.npz", order=np.array([{}], dtype=object))
    with pytest.raises(InputError, match=r"objects\.npz"):
        Voxels.load(tmp_path / "objects.npz")
