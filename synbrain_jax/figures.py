"""The pictures of one run: arrays in, a matplotlib Figure out, no files and no pyplot state.

A room beside `report.py`, which reads the run's files and writes these pictures: together they would be
too long to read in one go. Shape letters: s stimuli, v voxels, n trials, k samples per stimulus.

Colours: blue, vermilion and grey of Okabe and Ito's palette (Color Universal Design, 2008) and the
ColorBrewer RdBu map, all of them told apart in the common forms of colour blindness.
"""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int, Shaped
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from synbrain_jax.data.voxels import Voxels
from synbrain_jax.metrics import pattern_pearson

WIDTH = 10.5  # inches
DPI = 110
MAX_STIMULI = 8
MAX_VOXELS = 6
BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#666666"
DIVERGING, OUTSIDE = "RdBu_r", "0.82"
NO_GEOMETRY = "no voxel positions known: strips in voxel order"


@dataclasses.dataclass(frozen=True)
class Curves:
    """What one training stage logged: {"train/loss": {step: value}, ...}, and the chosen checkpoint."""

    values: Mapping[str, Mapping[int, float]]
    chosen_step: int
    chosen_by: str  # a key of `values`


# ---- numbers behind the pictures -------------------------------------------------------------------


def densest_slice(ijk: Int[np.ndarray, "v 3"]) -> int:
    """The k of the slice that holds most voxels (the lowest such k)."""
    slices, counts = np.unique(ijk[:, 2], return_counts=True)
    return int(slices[np.argmax(counts)])


def volume_slice(
    values: Float[np.ndarray, "v"], ijk: Int[np.ndarray, "v 3"], volume_shape: tuple[int, int, int]
) -> Float[np.ndarray, "i j"]:
    """Puts `values` at their (i, j) in the slice k that holds most voxels; NaN where there is no voxel."""
    picture = np.full(volume_shape[:2], np.nan, values.dtype)
    shown = ijk[:, 2] == densest_slice(ijk)
    picture[ijk[shown, 0], ijk[shown, 1]] = values[shown]
    return picture


def variance_share(
    trials: Float[np.ndarray, "n v"], trial_stimulus: Int[np.ndarray, "n"], samples: Float[np.ndarray, "s k v"]
) -> float:
    """Variance of synthetic samples over that of real trials, both within stimulus and summed over voxels.

    Unbiased variances (n - 1); a stimulus counts by its number of trials less one on both sides, so that
    unequal repeats do not shift the ratio. 1 means that samples spread as trials do. NaN where no stimulus
    has two trials or there is only one sample per stimulus.
    """
    if samples.shape[1] < 2:
        return math.nan
    real = synthetic = 0.0
    for stimulus in np.unique(trial_stimulus):
        own = trials[trial_stimulus == stimulus]
        if len(own) > 1:
            weight = len(own) - 1
            real += weight * float(own.var(axis=0, ddof=1, dtype=np.float64).sum())
            synthetic += weight * float(samples[stimulus].var(axis=0, ddof=1, dtype=np.float64).sum())
    return synthetic / real if real > 0 else math.nan


def shown_stimuli(r: Float[np.ndarray, "s"]) -> Int[np.ndarray, "m"]:
    """Which stimuli a figure shows: all, or, of more than eight, eight evenly spaced by rank of r, best first."""
    if r.size <= MAX_STIMULI:
        return np.arange(r.size)
    best_first = np.argsort(-np.nan_to_num(r, nan=-np.inf), kind="stable")
    return best_first[np.linspace(0, r.size - 1, MAX_STIMULI).round().astype(int)]


# ---- loss curves -----------------------------------------------------------------------------------


def loss_curves(stages: Mapping[str, Curves]) -> Figure:
    """Every logged term of every stage, training and validation together; the chosen step is marked."""
    columns, height = 4, 2.0
    terms = {title: _terms(curves) for title, curves in stages.items()}
    rows = [math.ceil(len(names) / columns) for names in terms.values()]
    figure = Figure((WIDTH, height * sum(rows) + 0.5 * len(rows) + 0.4), layout="constrained")
    parts = figure.subfigures(len(rows) + 1, 1, height_ratios=[*(height * n + 0.5 for n in rows), 0.4])
    for part, (title, names), n_rows in zip(parts, terms.items(), rows, strict=False):
        part.suptitle(f"{title}: step {stages[title].chosen_step:,} chosen by {stages[title].chosen_by}", fontsize=12)
        panels = part.subplots(n_rows, columns, squeeze=False).ravel()
        for panel, name in zip(panels, names, strict=False):
            _term(panel, name, stages[title])
        for panel in panels[len(names) :]:
            panel.set_axis_off()
    keys = parts[-1].subplots()
    keys.set_axis_off()
    keys.plot([], [], color=BLUE, label="training")
    keys.plot([], [], color=VERMILION, marker="o", markersize=3, label="validation")
    keys.plot([], [], color=GREY, linestyle="--", label="chosen checkpoint")
    keys.legend(loc="center", ncols=3, frameon=False)
    return figure


def _terms(curves: Curves) -> list[str]:
    """Names after the slash: the loss first, then the one that chose the checkpoint, then as logged."""
    logged = dict.fromkeys(key.split("/", 1)[1] for key in curves.values)
    first = [name for name in ("loss", curves.chosen_by.split("/", 1)[-1]) if name in logged]
    return list(dict.fromkeys([*first, *logged]))


def _term(panel: Axes, name: str, curves: Curves) -> None:
    drawn: list[float] = []
    for kind, style in (
        ("train", {"color": BLUE, "linewidth": 1.2}),
        ("val", {"color": VERMILION, "linewidth": 1.2, "marker": "o", "markersize": 3}),
    ):
        points = sorted(curves.values.get(f"{kind}/{name}", {}).items())
        if points:
            steps, values = zip(*points, strict=True)
            panel.plot(steps, values, **style)
            drawn += values
    if name == curves.chosen_by.split("/", 1)[-1] and curves.chosen_step in curves.values.get(curves.chosen_by, {}):
        value = curves.values[curves.chosen_by][curves.chosen_step]
        panel.plot(curves.chosen_step, value, "o", markersize=9, markerfacecolor="none", color=GREY)
    panel.axvline(curves.chosen_step, color=GREY, linestyle="--", linewidth=1, zorder=0)
    if min(drawn) > 0 and max(drawn) > 10 * min(drawn):
        panel.set_yscale("log")
    panel.set_title(name.replace("_", " "), fontsize=10)
    panel.set_xlabel("step", fontsize=9)
    panel.tick_params(labelsize=8)
    panel.grid(alpha=0.3)


# ---- maps ------------------------------------------------------------------------------------------


def _show(panel: Axes, values: Float[np.ndarray, "v"], voxels: Voxels, limit: float) -> AxesImage:
    """One value per voxel as a map, or as a strip where positions are unknown; white is 0, grey no voxel."""
    scale = {"cmap": DIVERGING, "vmin": -limit, "vmax": limit, "interpolation": "nearest"}
    panel.set_facecolor(OUTSIDE)
    if voxels.ijk is None or voxels.volume_shape is None:
        panel.set_yticks([])
        panel.set_xlabel("voxel")
        return panel.imshow(values[None], aspect="auto", **scale)
    picture = volume_slice(values, voxels.ijk, voxels.volume_shape)
    image = panel.imshow(picture.T, origin="lower", aspect="equal", **scale)
    low, high = _box(voxels)
    panel.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), xlabel="voxel index i", ylabel="voxel index j")
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=5, integer=True, steps=[1, 2, 5, 10]))
    return image


def _box(voxels: Voxels) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper (i, j) edges of the shown slice's voxels with a margin of one voxel."""
    inside = voxels.ijk[voxels.ijk[:, 2] == densest_slice(voxels.ijk), :2]
    return inside.min(axis=0) - 1.5, inside.max(axis=0) + 1.5


def _map_height(voxels: Voxels, width: float) -> float:
    """Height in inches of a map `width` inches wide."""
    if voxels.ijk is None or voxels.volume_shape is None:
        return 0.5
    low, high = _box(voxels)
    return width * float(np.clip((high[1] - low[1]) / (high[0] - low[0]), 0.3, 2.0))


def _where(voxels: Voxels) -> str:
    if voxels.ijk is None or voxels.volume_shape is None:
        return NO_GEOMETRY
    k = densest_slice(voxels.ijk)
    return f"slice k = {k} ({(voxels.ijk[:, 2] == k).sum():,} of {len(voxels.ijk):,} voxels)"


def _limit(values: np.ndarray) -> float:
    """Ends of a symmetric colour scale: the 99th percentile of |values|, so that one voxel cannot flatten all."""
    finite = np.abs(values[np.isfinite(values)])
    return float(np.percentile(finite, 99)) if finite.size and finite.any() else 1.0


def _signal(voxels: Voxels) -> str:
    return "z-scored signal" if voxels.normalisation.endswith("zscore") else "signal as given"


def _short(label: str) -> str:
    return label if len(label) <= 16 else f"{label[:15]}…"


def patterns(
    stimulus_id: Shaped[np.ndarray, "s"],
    target: Float[np.ndarray, "s v"],
    prediction: Float[np.ndarray, "s v"],
    voxels: Voxels,
    title: str,
) -> Figure:
    """Measured above synthesised patterns (each set with its mean over stimuli removed), stimulus by stimulus."""
    r = np.asarray(pattern_pearson(prediction, target))
    shown = shown_stimuli(r)
    note = "" if shown.size == r.size else f"{shown.size} of {r.size:,} stimuli, evenly spaced from best to worst r; "
    title = f"{title}: patterns with their mean over stimuli removed, on two colour scales"
    title += f"\n{note}{_where(voxels)}; r over all voxels"
    kinds = {"measured": target[shown], "synthesised": prediction[shown]}
    labels = [(_short(str(stimulus_id[s])), f"r = {r[s]:.2f}") for s in shown]
    if voxels.ijk is None or voxels.volume_shape is None:
        return _pattern_strips(kinds, labels, _signal(voxels), title)

    blocks = math.ceil(shown.size / 4)
    columns = math.ceil(shown.size / blocks)
    width = WIDTH / columns - 0.3
    figure = Figure((WIDTH, 2 * blocks * (_map_height(voxels, width) + 0.3) + 0.65), layout="compressed")
    figure.suptitle(title, fontsize=12)
    panels = figure.subplots(2 * blocks, columns, squeeze=False, sharex=True, sharey=True)
    for row, line in enumerate(panels):
        kind = ("measured", "synthesised")[row % 2]
        limit = _limit(kinds[kind])
        for column, panel in enumerate(line):
            at = row // 2 * columns + column
            if at >= shown.size:
                panel.set_axis_off()
                continue
            image = _show(panel, kinds[kind][at], voxels, limit)
            if kind == "measured":
                panel.set_title(labels[at][0], fontsize=11)
            panel.set(xlabel="" if kind == "measured" else labels[at][1], ylabel="")
            panel.tick_params(labelsize=8)
        figure.colorbar(image, ax=list(line), label=f"{kind}\n{_signal(voxels)}", pad=0.01, extend="both")
    figure.supxlabel("voxel index i", fontsize=10)
    figure.supylabel("voxel index j", fontsize=10)
    return figure


def _pattern_strips(kinds: Mapping[str, np.ndarray], labels: list[tuple[str, str]], signal: str, title: str) -> Figure:
    figure = Figure((WIDTH, 2 * (0.3 * len(labels) + 0.7) + 0.7), layout="constrained")
    figure.suptitle(title, fontsize=12)
    for panel, (kind, values) in zip(figure.subplots(2, 1), kinds.items(), strict=True):
        limit = _limit(values)
        image = panel.imshow(values, aspect="auto", cmap=DIVERGING, vmin=-limit, vmax=limit, interpolation="nearest")
        for row in range(1, len(labels)):
            panel.axhline(row - 0.5, color="black", linewidth=0.8)
        names = [name if kind == "measured" else f"{name}, {r}" for name, r in labels]
        panel.set_yticks(range(len(names)), names, fontsize=9)
        panel.set_title(kind, fontsize=11)
        panel.set_xlabel("voxel")
        panel.figure.colorbar(image, ax=panel, label=signal, pad=0.01, extend="both")
    return figure


def voxel_r(
    r: Float[np.ndarray, "v"],
    ceiling: Float[np.ndarray, "v"] | None,
    n_stimuli: int,
    voxels: Voxels,
    title: str,
) -> Figure:
    """Per-voxel r over stimuli beside its noise ceiling: maps on one colour scale, scatter and histograms."""
    maps = {f"r of the model over {n_stimuli:,} stimuli": r}
    layout, map_height = [["map 0", "histogram"]], _map_height(voxels, WIDTH / 2 - 1)
    rows = [max(map_height + 0.9, 2.6)]
    if ceiling is not None:
        maps["noise ceiling of r"] = ceiling
        layout = [["map 0", "map 1"], ["scatter", "histogram"]]
        rows = [map_height + 0.9, 3.2]
    figure = Figure((WIDTH, sum(rows) + 0.5), layout="constrained")
    figure.get_layout_engine().set(wspace=0.04)
    figure.suptitle(f"{title}: voxel by voxel, {_where(voxels)}", fontsize=12)
    panels = figure.subplot_mosaic(layout, height_ratios=rows)
    drawn = [panels[f"map {at}"] for at in range(len(maps))]
    for panel, (name, values) in zip(drawn, maps.items(), strict=True):
        image = _show(panel, values, voxels, 1.0)
        panel.set_title(name, fontsize=11)
    figure.colorbar(image, ax=drawn, label="correlation")

    panel = panels["histogram"]
    for (name, values), colour in zip(maps.items(), (BLUE, VERMILION), strict=False):
        finite = values[np.isfinite(values)]
        label = f"{name}: median {np.median(finite):.2f}" if finite.size else f"{name}: undefined"
        panel.hist(finite, bins=np.linspace(-1, 1, 41), color=colour, alpha=0.55, label=label)
    panel.set(xlabel="correlation", ylabel="number of voxels", xlim=(-1, 1), xticks=np.linspace(-1, 1, 5))
    panel.set_ylim(top=1.3 * panel.get_ylim()[1])
    panel.legend(loc="upper left", fontsize=9)
    panel.grid(alpha=0.3)
    if ceiling is not None:
        panel = panels["scatter"]
        panel.plot([0, 1], [0, 1], color=GREY, linestyle="--", label="r = ceiling", zorder=3)
        chance = 1 / math.sqrt(max(n_stimuli - 1, 1))  # standard deviation of r between unrelated normal values
        panel.axhspan(-chance, chance, color=GREY, alpha=0.15, linewidth=0, label=f"by chance: 0 ± {chance:.2f}")
        opacity = float(np.clip(300 / r.size, 0.05, 0.6))
        panel.scatter(ceiling, r, s=10, color=BLUE, alpha=opacity, linewidths=0, label="a voxel")
        panel.set(xlabel="noise ceiling of r", ylabel="r of the model", xlim=(-0.03, 1.03), ylim=(-1.05, 1.05))
        panel.legend(loc="lower right", fontsize=9)
        panel.grid(alpha=0.3)
    return figure


# ---- samples ---------------------------------------------------------------------------------------


def samples_and_trials(
    stimulus_id: Shaped[np.ndarray, "s"],
    trials: Float[np.ndarray, "n v"],
    trial_stimulus: Int[np.ndarray, "n"],
    samples: Float[np.ndarray, "s k v"],
    ceiling: Float[np.ndarray, "v"] | None,
    voxels: Voxels,
    title: str,
    kind: str = "synthetic samples",
) -> Figure:
    """Real test trials beside synthetic samples, per stimulus, in the voxels with the highest noise ceiling.

    `kind`: what to call the samples.
    """
    if ceiling is None:
        rank, chosen_by = trials.var(axis=0), "trial variance"
    else:
        rank, chosen_by = ceiling, "noise ceiling"
    best = np.argsort(-np.nan_to_num(rank, nan=-np.inf), kind="stable")[:MAX_VOXELS]
    stimuli = np.unique(np.linspace(0, len(stimulus_id) - 1, MAX_STIMULI).round().astype(int))
    note = "" if stimuli.size == len(stimulus_id) else f", {stimuli.size} of the stimuli"
    columns = min(3, best.size)
    rows = math.ceil(best.size / columns)
    figure = Figure((WIDTH, 2.6 * rows + 1.9), layout="constrained")
    share = variance_share(trials, trial_stimulus, samples)
    carried = "unknown (needs two trials and two samples of a stimulus)" if math.isnan(share) else f"{share:.1%}"
    figure.suptitle(
        f"{title}: real trials and {kind}, the {best.size} voxels of highest {chosen_by}{note}\n"
        f"share of trial variance (within stimulus, all voxels) that the samples carry: {carried}",
        fontsize=12,
    )
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for panel, voxel in zip(panels.ravel(), best, strict=False):
        for x, stimulus in enumerate(stimuli):
            own = trials[trial_stimulus == stimulus, voxel]
            _cloud(panel, x - 0.2, own, BLUE)
            _cloud(panel, x + 0.2, samples[stimulus, :, voxel], VERMILION)
        panel.set_title(_voxel_label(int(voxel), voxels, ceiling, trials, trial_stimulus, samples), fontsize=9.5)
        panel.set_xticks(
            range(stimuli.size), [_short(str(stimulus_id[s])) for s in stimuli], rotation=40, ha="right", fontsize=9
        )
        panel.grid(axis="y", alpha=0.3)
    for panel in panels[:, 0]:
        panel.set_ylabel(_signal(voxels))
    for panel in panels.ravel()[best.size :]:
        panel.set_axis_off()
    for colour, label in ((BLUE, "real trials"), (VERMILION, kind)):
        panels[0, 0].plot([], [], color=colour, marker="o", markersize=4, label=f"{label} (line: their mean)")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def _cloud(panel: Axes, x: float, values: Float[np.ndarray, "m"], colour: str) -> None:
    if values.size:
        at = x + np.linspace(-0.14, 0.14, values.size) if values.size > 1 else np.array([x])
        panel.scatter(at, values, s=9, color=colour, alpha=0.5, linewidths=0)
        panel.plot([x - 0.17, x + 0.17], [values.mean()] * 2, color=colour, linewidth=2.2)


def _voxel_label(
    voxel: int,
    voxels: Voxels,
    ceiling: Float[np.ndarray, "v"] | None,
    trials: Float[np.ndarray, "n v"],
    trial_stimulus: Int[np.ndarray, "n"],
    samples: Float[np.ndarray, "s k v"],
) -> str:
    name = f"voxel {voxel}" if voxels.ijk is None else "voxel (i, j, k) = ({}, {}, {})".format(*voxels.ijk[voxel])
    facts = [] if ceiling is None else [f"ceiling {ceiling[voxel]:.2f}"]
    share = variance_share(trials[:, [voxel]], trial_stimulus, samples[:, :, [voxel]])
    if not math.isnan(share):
        facts.append(f"share {share:.0%}")
    return f"{name}\n{', '.join(facts)}" if facts else name
