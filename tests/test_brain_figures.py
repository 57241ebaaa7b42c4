"""Pictures of regions and slices show the numbers that they were given, each where it belongs."""

import socket
import sys

import matplotlib
import numpy as np
import pytest
import scipy.stats

from synbrain_jax import brain_figures
from synbrain_jax.data.voxels import Voxels

SHAPE = (9, 6, 5)
AFFINE = np.array([[2.0, 0, 0, -8], [0, 2, 0, -5], [0, 0, 2, 10], [0, 0, 0, 1]])


def voxels(**changes) -> Voxels:
    """200 of 270 places; none in slice k = 2."""
    ijk = np.argwhere(np.ones(SHAPE, bool))
    ijk = np.random.default_rng(1).permutation(ijk[ijk[:, 2] != 2])[:200].astype(np.int32)
    fields = dict(subject="sub1", normalisation="none", ijk=ijk, volume_shape=SHAPE, affine=AFFINE, ncsnr=None)
    return Voxels(**{**fields, "order": np.arange(200, dtype=np.int32), **changes})


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    target, noise = rng.normal(size=(2, 5, 200)).astype(np.float32)
    return {
        "stimulus_id": np.array(["ant", "bee", "cow", "dog", "eel"]),
        "target": target,
        "prediction": np.array([3, 0.1, 1, 2, -1], np.float32)[:, None] * target + noise,  # "cow" is in the middle
        "r": rng.uniform(-1, 1, 200).astype(np.float32),
        "ceiling": rng.uniform(0, 1, 200).astype(np.float32),
    }


# ---- regions ---------------------------------------------------------------------------------------


def rois(n_faces: int = 2) -> dict:
    names = ["areas/V1v", "areas/hV4", *(f"faces/face {i}" for i in range(n_faces))]
    rows = ["model", "ridge", "kernel_ridge", "mean_pattern", "noise_ceiling"]
    return {
        name: {
            "n_voxels": 1000 + at,
            "rows": {row: {"voxel_r_median": 0.01 * at + 0.1 * place} for place, row in enumerate(rows)},
        }
        for at, name in enumerate(names)
    }


def test_each_region_has_its_dots_and_its_ceiling():
    figure = brain_figures.regions(rois(), "sim")
    areas, faces = figure.axes
    assert (areas.get_title(loc="left"), faces.get_title(loc="left")) == ("areas", "faces")
    for panel, start, labels in (
        (areas, 0, ["V1v (1,000)", "hV4 (1,001)"]),
        (faces, 2, ["face 0 (1,002)", "face 1 (1,003)"]),
    ):
        assert [label.get_text() for label in panel.get_yticklabels()] == labels
        bars = {round(bar.get_y() + bar.get_height() / 2): bar.get_width() for bar in panel.patches}
        assert bars == pytest.approx({y: 0.01 * (start + y) + 0.4 for y in (0, 1)})
        assert {bar.get_x() for bar in panel.patches} == {0}
        drawn = {dots.get_label(): dots.get_offsets().tolist() for dots in panel.collections}
        for place, row in enumerate(["model", "ridge", "kernel ridge", "mean pattern"]):
            np.testing.assert_allclose(drawn.pop(row), [[0.01 * (start + y) + 0.1 * place, y] for y in (0, 1)])
        assert drawn == {}
        low, high = panel.get_ylim()
        assert low > high  # the first region is at the top
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sorted(legend) == ["kernel ridge", "mean pattern", "model", "noise ceiling", "ridge"]


def test_regions_without_a_ceiling_and_too_many_of_them():
    many = rois(n_faces=brain_figures.MAX_REGIONS)
    for content in many.values():
        del content["rows"]["noise_ceiling"]
    figure = brain_figures.regions(many, "sim")
    assert sum(len(panel.get_yticklabels()) for panel in figure.axes) == brain_figures.MAX_REGIONS
    assert figure.get_suptitle().endswith("the first 60 of 62 regions, all are in report.md")
    assert not [bar for panel in figure.axes for bar in panel.patches]


# ---- slices ----------------------------------------------------------------------------------------


def test_slices_divide_the_voxels_evenly():
    k = np.repeat([3, 4, 9], [700, 10, 300])
    ijk = np.stack([k, k, k], 1).astype(np.int32)
    np.testing.assert_array_equal(brain_figures.shown_slices(ijk), [3, 9])
    every = np.repeat(np.arange(70), 3)
    shown = brain_figures.shown_slices(np.stack([every] * 3, 1).astype(np.int32))
    np.testing.assert_allclose(shown, [5, 15, 25, 35, 45, 55, 65], atol=1)
    assert len(shown) == 7


def test_a_volume_has_known_places_in_several_slices():
    assert brain_figures.is_volume(voxels())
    assert not brain_figures.is_volume(voxels(ijk=None))
    assert not brain_figures.is_volume(voxels(volume_shape=None))
    assert not brain_figures.is_volume(voxels(ijk=voxels().ijk * np.array([1, 1, 0], np.int32)))


def shown_values(a: dict, v: Voxels) -> list[np.ndarray]:
    """What the rows of the picture must show, from top to bottom."""
    r = [scipy.stats.pearsonr(p, t).statistic for p, t in zip(a["prediction"], a["target"], strict=True)]
    assert np.argsort(r)[2] == 2
    return [a["target"][2], a["prediction"][2], a["r"], a["ceiling"]]


@pytest.mark.parametrize("reason", ["no affine", "no nilearn"])
def test_plain_slices_put_every_voxel_of_a_slice_at_its_place(reason, monkeypatch):
    if reason == "no nilearn":
        monkeypatch.setitem(sys.modules, "nilearn", None)
    a, v = arrays(), voxels(affine=None if reason == "no affine" else AFFINE)
    figure = brain_figures.slices(**a, voxels=v, title="sim")
    rows = [panel for panel in figure.axes if panel.get_title(loc="left")]
    assert rows[0].get_title(loc="left") == "measured: cow, the stimulus with the median pattern r"
    for row, values in zip(rows, shown_values(a, v), strict=True):
        panels = [panel for panel in row.child_axes if panel.images]
        assert [panel.get_title() for panel in panels] == [f"k = {k}" for k in (0, 1, 3, 4)]
        for panel, k in zip(panels, (0, 1, 3, 4), strict=True):
            expected = np.full(SHAPE[:2], np.nan, np.float32)
            for (i, j, at), value in zip(v.ijk, values, strict=True):
                if at == k:
                    expected[i, j] = value
            np.testing.assert_array_equal(panel.images[0].get_array().filled(np.nan), expected.T)
            assert panel.images[0].origin == "lower"
            low, high = panel.images[0].get_clim()
            assert (
                high
                == -low
                == pytest.approx(1 if values.min() >= -1 and values.max() <= 1 else np.percentile(np.abs(values), 99))
            )


def test_nilearn_draws_the_same_slices_and_fetches_nothing(monkeypatch):
    pytest.importorskip("nilearn")

    def refuse(*_, **__):
        raise AssertionError("a network call")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    a, v = arrays(), voxels()
    figure = brain_figures.slices(**a, voxels=v, title="sim")
    cuts = [panel for panel in figure.axes if any(text.get_text().startswith("z=") for text in panel.texts)]
    rows = shown_values(a, v)
    assert len(cuts) == 4 * len(rows)
    for at, panel in enumerate(cuts):
        k = (0, 1, 3, 4)[at % 4]
        here = v.ijk[:, 2] == k
        expected = np.full(SHAPE[:2], np.nan)
        expected[tuple(v.ijk[here, :2].T)] = rows[at // 4][here]
        assert panel.images[-1].origin == "upper"  # the largest j, the front of the head, first
        np.testing.assert_array_equal(panel.images[-1].get_array().filled(np.nan), expected.T[::-1])
        assert f"z={10 + 2 * k}" in [text.get_text() for text in panel.texts]
    assert matplotlib.pyplot.get_fignums() == []


def test_without_a_ceiling_it_has_no_row():
    a, v = arrays() | {"ceiling": None}, voxels(affine=None)
    figure = brain_figures.slices(**a, voxels=v, title="sim")
    assert len([panel for panel in figure.axes if panel.get_title(loc="left")]) == 3
