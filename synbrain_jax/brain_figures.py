"""The pictures of one run that need the brain: scores by region, and slices through the whole volume.

A room beside `figures.py`, which draws what needs no anatomy. Slices are drawn by nilearn (in millimetres, left and
right marked) where it is installed, which the extra `brain` does, else by matplotlib in voxel indices. No template is
fetched or shown: the volume is in the person's own space, and on a template's outlines (a glass brain) it would lie
wrongly. Shape letters: s stimuli, v voxels, m slices.
"""

import importlib.util
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from synbrain_jax.data.voxels import Voxels
from synbrain_jax.figures import BLUE, DIVERGING, OUTSIDE, VERMILION, WIDTH
from synbrain_jax.interop.nifti import to_volume
from synbrain_jax.metrics import pattern_pearson

MAX_REGIONS = 60
MAX_SLICES = 7
_SHARES = (np.arange(MAX_SLICES) + 0.5) / MAX_SLICES  # of the voxels, that lie below each slice
ORANGE, GREEN, LIGHT = "#E69F00", "#009E73", "0.85"  # the first two of Okabe and Ito's palette
# row of the report -> colour and marker
DOTS = {
    "stimulus_mean": (GREEN, "s"),
    "ridge": (VERMILION, "v"),
    "kernel_ridge": (ORANGE, "^"),
    "mean_pattern": ("0.4", "x"),
    "model": (BLUE, "o"),
}


# ---- regions ---------------------------------------------------------------------------------------


def regions(rois: Mapping[str, Mapping[str, Any]], title: str) -> Figure:
    """Median voxel r of the model and its baselines, region by region, on a bar that ends at the noise ceiling.

    `rois` is that of `report.json`, "atlas/region" by name. Atlases after the first MAX_REGIONS regions are left out.
    """
    shown = list(rois)[:MAX_REGIONS]
    atlases = dict.fromkeys(name.rpartition("/")[0] for name in shown)
    members = [[name for name in shown if name.rpartition("/")[0] == atlas] for atlas in atlases]
    figure = Figure((WIDTH, 0.27 * len(shown) + 0.35 * len(members) + 2.3), layout="constrained")
    note = "" if len(shown) == len(rois) else f"; the first {len(shown)} of {len(rois)} regions, all are in report.md"
    figure.suptitle(f"{title}: median voxel r by region{note}", fontsize=12)
    heights = [len(names) + 0.6 for names in members]
    panels = figure.subplots(len(members), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for panel, atlas, names in zip(panels, atlases, members, strict=True):
        _dots(panel, [rois[name] for name in names])
        labels = [f"{name.rpartition('/')[2]} ({rois[name]['n_voxels']:,})" for name in names]
        panel.set_yticks(range(len(names)), labels, fontsize=9)
        panel.set_title(atlas, fontsize=10, loc="left")
    panels[-1].set_xlabel("correlation over stimuli, median of the region's voxels (number in brackets)")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    return figure


def _dots(panel: Axes, contents: list[Mapping[str, Any]]) -> None:
    rows = {
        name: [one["rows"].get(name, {}).get("voxel_r_median") for one in contents] for name in _row_names(contents)
    }
    if "noise_ceiling" in rows:
        panel.barh(
            range(len(contents)), rows["noise_ceiling"], color=LIGHT, height=0.7, label="noise ceiling", zorder=1
        )
    for name, (colour, marker) in DOTS.items():
        if name in rows:
            size = 60 if name == "model" else 30
            label = name.replace("_", " ")
            panel.scatter(rows[name], range(len(contents)), s=size, color=colour, marker=marker, label=label, zorder=2)
    panel.use_sticky_edges = False  # else a dot at 0 is cut in half
    panel.margins(x=0.02)
    panel.axvline(0, color="0.4", linewidth=0.8, zorder=0)
    panel.set_ylim(len(contents) - 0.5, -0.5)
    panel.grid(axis="x", alpha=0.3)


def _row_names(contents: list[Mapping[str, Any]]) -> set[str]:
    return set.intersection(*(set(one["rows"]) for one in contents))


# ---- slices ----------------------------------------------------------------------------------------


def is_volume(voxels: Voxels) -> bool:
    """Whether the voxels' places are known and are in more than one slice."""
    known = voxels.ijk is not None and voxels.volume_shape is not None
    return known and len(np.unique(voxels.ijk[:, 2])) > 1


def slices(
    stimulus_id: Shaped[np.ndarray, "s"],
    target: Float[np.ndarray, "s v"],
    prediction: Float[np.ndarray, "s v"],
    r: Float[np.ndarray, "v"],
    ceiling: Float[np.ndarray, "v"] | None,
    voxels: Voxels,
    title: str,
) -> Figure:
    """Axial slices of one measured and synthesised pattern, of the model's voxel r, and of its noise ceiling.

    The patterns are those of the stimulus with the median pattern r. Voxels as in `is_volume`.
    """
    pattern_r = np.asarray(pattern_pearson(prediction, target))
    typical = int(np.argsort(pattern_r)[len(pattern_r) // 2])
    name = str(stimulus_id[typical])
    maps = {
        f"measured: {name}, the stimulus with the median pattern r": target[typical],
        f"synthesised: {name}, r = {pattern_r[typical]:.2f} (the mean over stimuli is removed from both)": prediction[
            typical
        ],
        f"r of the model over {len(target):,} stimuli": r,
    }
    limits = [_limit(target[typical]), _limit(prediction[typical]), 1.0]
    if ceiling is not None:
        maps["noise ceiling of r"], limits = ceiling, [*limits, 1.0]
    nilearn = voxels.affine is not None and importlib.util.find_spec("nilearn") is not None
    draw = _nilearn_row if nilearn else _plain_row
    figure = Figure((WIDTH, 1.9 * len(maps) + 0.5))
    figure.suptitle(f"{title}: slices through all voxels, from the lowest to the highest", fontsize=12)
    top, height = 1 - 0.4 / figure.get_figheight(), 1.9 / figure.get_figheight()
    for place, ((label, values), limit) in enumerate(zip(maps.items(), limits, strict=True)):
        panel = figure.add_axes((0.01, top - height * (place + 1), 0.98, 0.84 * height))
        panel.set_title(label, fontsize=10, loc="left", pad=2)
        draw(panel, values, voxels, limit)
    return figure


def shown_slices(ijk: Int[np.ndarray, "v 3"]) -> Int[np.ndarray, "m"]:
    """At most MAX_SLICES slices k, between which lie equal numbers of voxels; ascending."""
    return np.unique(np.quantile(ijk[:, 2], _SHARES, method="inverted_cdf"))


def _plain_row(row: Axes, values: Float[np.ndarray, "v"], voxels: Voxels, limit: float) -> None:
    row.set_axis_off()
    chosen = shown_slices(voxels.ijk)
    low, high = voxels.ijk[:, :2].min(axis=0) - 1.5, voxels.ijk[:, :2].max(axis=0) + 1.5
    for place, k in enumerate(chosen):
        panel = row.inset_axes((0.93 * place / len(chosen), 0, 0.9 / len(chosen), 1))
        here = voxels.ijk[:, 2] == k
        picture = np.full(voxels.volume_shape[:2], np.nan, np.float32)
        picture[tuple(voxels.ijk[here, :2].T)] = values[here]
        scale = {"cmap": DIVERGING, "vmin": -limit, "vmax": limit, "interpolation": "nearest"}
        image = panel.imshow(picture.T, origin="lower", aspect="equal", **scale)
        panel.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), xticks=[], yticks=[], facecolor=OUTSIDE)
        panel.set_title(f"k = {k}", fontsize=8, pad=2)
    row.figure.colorbar(image, cax=row.inset_axes((0.95, 0.05, 0.01, 0.9)))


def _nilearn_row(row: Axes, values: Float[np.ndarray, "v"], voxels: Voxels, limit: float) -> None:
    from nilearn import plotting

    z = voxels.ijk @ voxels.affine[2, :3] + voxels.affine[2, 3]
    slicer = plotting.plot_stat_map(
        to_volume(values, voxels),
        bg_img=to_volume(np.ones(len(values), np.float32), voxels),  # white on black, so that a value of 0 shows
        black_bg=True,
        display_mode="z",
        cut_coords=np.unique(np.quantile(z, _SHARES).round()).tolist(),
        axes=row,
        figure=row.figure,
        annotate=False,
        cmap=DIVERGING,
        vmin=-limit,
        vmax=limit,
        resampling_interpolation="nearest",
    )
    slicer.annotate(size=8)


def _limit(values: Float[np.ndarray, "v"]) -> float:
    return float(np.percentile(np.abs(values), 99)) or 1.0
