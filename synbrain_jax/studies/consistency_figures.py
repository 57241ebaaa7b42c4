"""The numbers of the study of consistency as they are handed on, and four pictures of them; no files.

Shape letters: v voxels, d draws, r regions.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Shaped
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture
from matplotlib.image import AxesImage

from synbrain_jax.consistency import row_r
from synbrain_jax.data.voxels import Voxels
from synbrain_jax.figures import BLUE, DIVERGING, GREY, OUTSIDE, VERMILION, WIDTH, volume_slice

MAX_MAPS = 3
# Okabe and Ito's palette, which the common forms of colour blindness tell apart.
PALETTE = (BLUE, VERMILION, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
KINDS = {
    "real, real": "real, other's real",
    "synthetic, synthetic": "synthetic, other's synthetic",
    "real, synthetic": "real, other's synthetic",
    "own": "real, own synthetic",
}

Drawn = dict[str, Shaped[np.ndarray, "..."]]


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """One subject: what its real trials say of each other, and each seed's synthetic responses of them."""

    subject: str
    voxels: Voxels
    real: Drawn
    seeds: list[Drawn]
    categories: tuple[str, ...]
    rois: tuple[str, ...]

    def has(self, name: str) -> bool:
        """Whether every seed has that score."""
        return all(name in one for one in self.seeds)

    def mean(self, name: str) -> Shaped[np.ndarray, "..."]:
        return np.mean([one[name] for one in self.seeds], axis=0)


@dataclasses.dataclass(frozen=True, eq=False)
class Across:
    """Of one seed: correlations [d r] by kind; see `consistency.across_brains`."""

    stimuli: int
    rois: tuple[str, ...]
    profiles: Mapping[str, Float[np.ndarray, "d r"]]
    similarity: Mapping[str, Float[np.ndarray, "d r"]]


def t_maps(one: Result) -> Picture:
    """The most selective categories: real and synthetic maps, where the place of voxels is known, and a scatter."""
    maps = one.seeds[0]["t map, figure"]
    shown = np.sort(np.argsort(-maps[:, 0].std(axis=1), kind="stable")[:MAX_MAPS])
    placed = one.voxels.ijk is not None and one.voxels.volume_shape is not None
    rows = ["real", "synthetic"] if placed else []
    width = WIDTH / len(shown) - 0.9
    heights = [width * float(np.clip(_aspect(one.voxels), 0.3, 2)) + 0.4 for _ in rows] + [3.4]
    figure = Picture((WIDTH, sum(heights) + 0.5), layout="constrained")
    panels = figure.subplots(len(heights), len(shown), squeeze=False, height_ratios=heights)
    for column, category in zip(panels.T, shown, strict=True):
        limit = float(np.percentile(np.abs(maps[category]), 99)) or 1.0
        for panel, label, t in zip(column, rows, maps[category], strict=False):
            image = _slice(panel, t, one.voxels, limit)
            panel.set_title(f"{_short(one.categories[category])}, {label}", fontsize=10)
            figure.colorbar(image, ax=panel, label="t", extend="both", fraction=0.04, pad=0.02)
        panel = column[-1]
        real, made = maps[category]
        panel.axline((0, 0), slope=1, color=GREY, linewidth=0.8)
        panel.plot(real, made, ".", markersize=3, color=BLUE, alpha=0.6)
        (r,) = row_r(real[None], made[None])
        panel.set(xlabel="t of a voxel, real trials", ylabel="t, synthetic samples")
        panel.set_title(f"{_short(one.categories[category])}: r = {r:.2f}", fontsize=10)
        panel.grid(alpha=0.3)
    where = "the slice with most voxels, and all voxels" if placed else "all voxels"
    figure.suptitle(f"{one.subject}: one category against the others; {where}", fontsize=12)
    return figure


def _box(voxels: Voxels) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper (i, j) edges of all voxels with a margin of one voxel."""
    return voxels.ijk[:, :2].min(axis=0) - 1.5, voxels.ijk[:, :2].max(axis=0) + 1.5


def _aspect(voxels: Voxels) -> float:
    low, high = _box(voxels)
    return float((high[1] - low[1]) / (high[0] - low[0]))


def _slice(panel: Axes, t: Float[np.ndarray, "v"], voxels: Voxels, limit: float) -> AxesImage:
    picture = volume_slice(t, voxels.ijk, voxels.volume_shape)
    image = panel.imshow(picture.T, origin="lower", cmap=DIVERGING, vmin=-limit, vmax=limit, interpolation="nearest")
    low, high = _box(voxels)
    panel.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), xticks=[], yticks=[], facecolor=OUTSIDE)
    return image


def regions(results: Sequence[Result], across: Sequence[Across] | None) -> Picture:
    """Bars with intervals: similarity of stimuli in each subject, beside its ceiling, and agreement between brains."""
    blocks = [
        (
            f"{one.subject}: RDM, real with",
            one.rois,
            {"expected response": one.mean("rdm, expected"), "samples": one.mean("rdm, samples")},
            np.sqrt(one.real["rdm, again"])[0] if "rdm, again" in one.real else None,
        )
        for one in results
    ]
    if across is not None:
        kinds = ("real, real", "real, synthetic")
        means = {KINDS[kind]: np.mean([one.profiles[kind] for one in across], axis=0) for kind in kinds}
        blocks.append(("between brains: mean response of a region", across[0].rois, means, None))
    height = 0.3 * sum(len(rois) for _, rois, _, _ in blocks) + 1.1 * len(blocks)
    figure = Picture((WIDTH, height), layout="constrained")
    ratios = [len(rois) + 1 for _, rois, _, _ in blocks]
    panels = figure.subplots(len(blocks), 1, squeeze=False, height_ratios=ratios)[:, 0]
    for panel, (title, rois, rows, ceiling) in zip(panels, blocks, strict=True):
        if ceiling is not None:
            panel.barh(range(len(rois)), ceiling, height=0.85, color="0.85", label="noise ceiling")
        for place, (label, drawn), colour in zip((-0.2, 0.2), rows.items(), (BLUE, VERMILION), strict=True):
            low, high = np.nanquantile(drawn[1:], [0.025, 0.975], axis=0)
            y = np.arange(len(rois)) + place
            panel.hlines(y, low, high, color=colour, linewidth=2)
            panel.plot(drawn[0], y, "o", color=colour, markersize=5, label=label)
        panel.axvline(0, color="0.4", linewidth=0.8)
        panel.set_yticks(range(len(rois)), rois, fontsize=8)
        panel.set_ylim(len(rois) - 0.4, -0.6)
        panel.set_title(title, fontsize=10, loc="left")
        panel.set_xlabel("correlation (Spearman for RDMs, Pearson between brains)", fontsize=8)
        panel.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        panel.grid(axis="x", alpha=0.3)
    return figure


def dissimilarities(one: Result) -> Picture:
    """Both RDMs as ranks in percent, sorted by category."""
    scores = one.seeds[0]
    category = scores["figure category"] % (len(one.categories) + 1)  # none is the last
    order, edges = np.argsort(category, kind="stable"), np.cumsum(np.bincount(category, minlength=1))
    edges = np.concatenate([[0], edges])
    figure = Picture((WIDTH, 5.2), layout="constrained")
    for panel, kind in zip(figure.subplots(1, 2), ("real", "made"), strict=True):
        values = scores[f"figure rdm {kind}"]
        ranks = 100 * np.argsort(np.argsort(values)) / max(1, len(values) - 1)
        square = np.full((len(order), len(order)), np.nan)
        square[np.triu_indices(len(order), 1)] = ranks
        square = np.where(np.isnan(square), square.T, square)[np.ix_(order, order)]
        image = panel.imshow(square, cmap="cividis", interpolation="nearest")
        for edge in edges[1:-1]:
            panel.axhline(edge - 0.5, color="white", linewidth=1)
            panel.axvline(edge - 0.5, color="white", linewidth=1)
        middles = (edges[:-1] + edges[1:] - 1) / 2
        names = [_short(name) for name in (*one.categories, "none")[: len(middles)]]
        panel.set_xticks(middles, names, rotation=45, ha="right", fontsize=8)
        panel.set_yticks(middles, names, fontsize=8)
        panel.set_title("real mean responses" if kind == "real" else "expected responses", fontsize=11)
    figure.colorbar(image, ax=figure.axes, label="dissimilarity, rank in percent", shrink=0.8)
    figure.suptitle(f"{one.subject}: dissimilarity of stimuli, all voxels", fontsize=12)
    return figure


def latents(one: Result) -> Picture:
    """Trials as dots and the mapper's latents as outlined markers, coloured by category."""
    scores = one.seeds[0]
    category = scores["figure latent category"]
    stimulus, share_of = scores["figure latent stimulus"], scores["figure latent share"]
    figure = Picture((WIDTH, 5.6), layout="constrained")
    panel = figure.subplots()
    for index, name in enumerate((*one.categories, "no category")):
        colour = GREY if index == len(one.categories) else PALETTE[index % len(PALETTE)]
        own = category == (index if index < len(one.categories) else -1)
        if not own.any():
            continue
        panel.plot(*scores["figure latent trials"][own[stimulus]].T, ".", color=colour, markersize=5, alpha=0.5)
        panel.plot(
            *scores["figure latent mapped"][own].T, "o", color=colour, markeredgecolor="black", markersize=8,
            label=_short(name),
        )  # fmt: skip
    panel.set_xlabel(f"first component ({share_of[0]:.0%} of the variance of mean trial latents)")
    panel.set_ylabel(f"second component ({share_of[1]:.0%})")
    panel.grid(alpha=0.3)
    panel.legend(title="mapper's latents", fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.suptitle(f"{one.subject}: BrainVAE's latents of trials (dots) and the mapper's latents", fontsize=12)
    return figure


def _short(label: str) -> str:
    return label if len(label) <= 18 else f"{label[:17]}…"
