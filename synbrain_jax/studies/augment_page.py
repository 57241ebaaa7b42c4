"""What `studies/augment.py` found, as tables, a figure and claims that follow from the numbers.

A room of its own because decoding with many amounts of data and telling of it are too long to read in one go.

Shape letters: s test pictures.
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture

from synbrain_jax import figures
from synbrain_jax.document import Cell, Claim, Figure, Section, Table
from synbrain_jax.statistics import Estimate, bootstrap_interval, paired_difference

DECODERS = ("ridge", "network")
KINDS = ("mode", "calibrated")
SCORES = ("image", "brain", "two_way")
NAMES = {
    "image": "image retrieval",
    "brain": "brain retrieval",
    "two_way": "two-way",
    "trial_brain": "brain retrieval from single trials",
}
REAL, CHOSEN = "real only", "chosen by validation"
FIGURE = "retrieval"
# Image and brain retrieval of SynBrain's Table 13: subject 1, an hour of real data, and so many of synthetic data.
PAPER = {
    0: (0.940, 0.776),
    1: (0.879, 0.820),
    2: (0.841, 0.805),
    4: (0.794, 0.777),
    8: (0.671, 0.688),
    16: (0.648, 0.637),
    32: (0.616, 0.619),
}


def arm(kind: str, ratio: float) -> str:
    """The name of real trials with so many synthetic ones for each."""
    return f"+ {ratio:g}x {kind}"


def alone(kind: str, ratios: Sequence[float]) -> str:
    """The name of synthetic trials without real ones, as many as there are at most."""
    return f"{max(ratios):g}x {kind} alone"


class Outcome:
    """The scores of one amount of real data: of every decoder, arm and test picture, mean over seeds.

    Args:
        seeds: of each seed DECODER/ARM/SCORE -> [s], DECODER/ARM/agreement -> [] with the validation, and pool -> [].
        draws: of the bootstrap.
    """

    def __init__(self, seeds: Sequence[Mapping[str, np.ndarray]], draws: int):
        self._seeds, self._draws = seeds, draws
        self.pool = int(seeds[0]["pool"])
        self.arms = tuple(dict.fromkeys(key.split("/")[1] for key in seeds[0] if "/" in key))

    def chosen(self, decoder: str) -> list[str]:
        """Of each seed the arm whose decoder agrees best with validation trials; of equal ones the first."""

        def agreement(scores: Mapping[str, np.ndarray], name: str) -> float:
            return float(scores[f"{decoder}/{name}/agreement"])

        return [max(self.arms, key=functools.partial(agreement, scores)) for scores in self._seeds]

    def by_seed(self, decoder: str, name: str, score: str) -> Float[np.ndarray, "r s"]:
        """Of an arm, which may be CHOSEN, for each of r seeds; SCORE or trial_SCORE."""
        names = self.chosen(decoder) if name == CHOSEN else [name] * len(self._seeds)
        keys = (f"{decoder}/{of_seed}/{score}" for of_seed in names)
        return np.array([scores[key] for scores, key in zip(self._seeds, keys, strict=True)], np.float64)

    def values(self, decoder: str, name: str, score: str) -> Float[np.ndarray, "s"]:
        """The mean of `by_seed`."""
        return self.by_seed(decoder, name, score).mean(axis=0)

    def estimate(self, decoder: str, name: str, score: str) -> Estimate:
        values = self.values(decoder, name, score)
        return bootstrap_interval(values, len(values), draws=self._draws)

    def difference(self, decoder: str, name: str, other: str, score: str) -> Estimate:
        """The arm less the other one, paired by test pictures."""
        first, second = (self.values(decoder, one, score) for one in (name, other))
        return paired_difference(first, second, len(first), draws=self._draws)


# ---- tables ----------------------------------------------------------------------------------------


def sections(outcomes: Mapping[int, Outcome], ratios: Sequence[float]) -> list[Section]:
    """The claims with the figure and the paper's table, then the tables of each amount of real data."""
    last = max(outcomes)
    summary = Section(
        title="Decoding with synthetic data",
        text=(
            f"Decoders learn from real trials of {' or '.join(map(str, outcomes))} pictures, and from synthetic "
            "trials of pictures that were not shown. The system that made them was adapted with the same real trials "
            "and none besides. A fifth of the real pictures is held out for every choice.\n\n"
            "Image retrieval: which picture of the pool was seen, given what was decoded. Brain retrieval: which of "
            "what was decoded belongs to a picture. Two-way: the picture seen against one other."
        ),
        tables=(_paper_table(outcomes[last], last, ratios),),
        figures=(Figure(FIGURE, _CAPTION),),
        claims=tuple(
            claim
            for amount, outcome in sorted(outcomes.items())
            for decoder in DECODERS
            for claim in _claims(decoder, outcome, amount, ratios)
        ),
    )
    return [summary, *(_amount_section(amount, outcome) for amount, outcome in outcomes.items())]


_CAPTION = (
    "Retrieval from test pictures' mean trials against the number of synthetic trials per real one; 0 is real data "
    "only. Solid: calibrated samples; dashed: the mode. Bands: 95 % bootstrap intervals over test pictures."
)


def _amount_section(amount: int, outcome: Outcome) -> Section:
    def table(title: str, rows: Sequence[str], cell: Callable[[str, str, str], Cell], scores: Sequence[str], **rest):
        return Table(
            title=f"{amount} real pictures: {title}",
            columns=("", *(f"{decoder}: {NAMES[score]}" for decoder in DECODERS for score in scores)),
            rows=tuple((row, *(cell(decoder, row, score) for decoder in DECODERS for score in scores)) for row in rows),
            **rest,
        )

    def single(decoder: str, row: str, score: str) -> Cell:
        return chance[score] if row == "chance" else outcome.estimate(decoder, row, f"trial_{score}")

    def mean(decoder: str, row: str, score: str) -> Cell:
        return chance[score] if row == "chance" else outcome.estimate(decoder, row, score)

    def gain(decoder: str, row: str, score: str) -> Cell:
        return outcome.difference(decoder, row, REAL, score)

    def single_gain(decoder: str, row: str, score: str) -> Cell:
        return gain(decoder, row, f"trial_{score}")

    chance = {"image": 1 / outcome.pool, "brain": 1 / outcome.pool, "two_way": 0.5}
    rows = (*outcome.arms, CHOSEN)
    chosen = "; ".join(f"{decoder}: {', '.join(outcome.chosen(decoder))}" for decoder in DECODERS)
    note = (
        f"Top-1 among {outcome.pool} pictures; 95 % bootstrap intervals over test pictures, mean of seeds. Chosen by "
        f"validation, seed by seed: {chosen}."
    )
    paired = "Paired by test picture."
    best = {f"{decoder}: {NAMES[score]}": "high" for decoder in DECODERS for score in SCORES}
    return Section(
        title=f"{amount} real pictures",
        tables=(
            table(
                "the mean of a picture's trials",
                (*rows, "chance"),
                mean,
                SCORES,
                note=note,
                best=best,
                apart=("chance",),
            ),
            table("the mean of a picture's trials, less real data only", rows[1:], gain, SCORES, note=paired),
            table("single trials", (*rows, "chance"), single, SCORES, best=best, apart=("chance",)),
            table("single trials, less real data only", rows[1:], single_gain, SCORES, note=paired),
        ),
    )


def _paper_table(outcome: Outcome, amount: int, ratios: Sequence[float]) -> Table:
    shown = [0, *(ratio for ratio in ratios if ratio in PAPER)]
    rows = []
    for ratio in shown:
        name = REAL if ratio == 0 else arm("calibrated", ratio)
        ours = (outcome.estimate(decoder, name, score) for decoder in DECODERS for score in ("image", "brain"))
        rows.append((name, *PAPER[ratio], *ours))
    ours = (f"{decoder}: {NAMES[score]}" for decoder in DECODERS for score in ("image", "brain"))
    return Table(
        title=f"In the shape of the paper's Table 13 ({amount} real pictures, calibrated samples)",
        columns=("", "paper: image retrieval", "paper: brain retrieval", *ours),
        rows=tuple(rows),
        note=(
            "The paper: MindEye2 with an hour of real data of its subject 1, top-1 among 300, without intervals. Other "
            f"data and decoders, and {outcome.pool} pictures here: compare how the numbers move, not the numbers."
        ),
    )


# ---- claims ----------------------------------------------------------------------------------------


def _claims(decoder: str, outcome: Outcome, amount: int, ratios: Sequence[float]) -> list[Claim]:
    """Of one amount of real data. Which arms are compared is fixed beforehand, or chosen by validation."""
    one, most, few = min(ratios, key=lambda ratio: abs(ratio - 1)), max(ratios), f"{decoder}, {amount} real pictures"
    paper, little, much = "as in the paper's Table 13", arm("calibrated", one), arm("calibrated", most)
    compared = [
        ("Synthetic data improve brain retrieval with little real data", "brain", CHOSEN, REAL, 1),
        ("Synthetic data improve brain retrieval from single trials", "trial_brain", CHOSEN, REAL, 1),
        (f"{one:g}x synthetic data, the paper's best amount, improve brain retrieval", "brain", little, REAL, 1),
        (f"Image retrieval falls with {most:g}x synthetic data, {paper}", "image", much, REAL, -1),
        (f"Brain retrieval falls from {one:g}x to {most:g}x synthetic data, {paper}", "brain", much, little, -1),
        ("Calibrated samples serve brain retrieval better than the mode", "brain", much, arm("mode", most), 1),
    ]
    claims = []
    for text, score, name, other, sign in compared:
        difference = outcome.difference(decoder, name, other, score)
        told = f"{NAMES[score]}, {name} less {other}: {difference.value:+.3f}"
        first, second = (outcome.by_seed(decoder, one_arm, score).mean(axis=1) for one_arm in (name, other))
        told += f" [{difference.low:+.3f}, {difference.high:+.3f}], by seed "
        told += ", ".join(f"{value:+.3f}" for value in first - second)
        claims.append(Claim(f"{text} ({few}, mean of seeds)", _holds(difference, sign), told))
    return claims


def _holds(difference: Estimate, sign: int) -> bool | None:
    """Whether the whole interval is on the side of `sign`: False if none of it is, None if some."""
    low, high = sorted((sign * difference.low, sign * difference.high))
    return True if low > 0 else False if high <= 0 else None


# ---- figure ----------------------------------------------------------------------------------------


def curves(outcomes: Mapping[int, Outcome], ratios: Sequence[float]) -> Picture:
    """Retrieval against the amount of synthetic data, a row for each decoder."""
    figure = Picture((figures.WIDTH, 7.5), layout="constrained")
    figure.suptitle("Decoding with synthetic data", fontsize=12)
    panels = figure.subplots(len(DECODERS), 2, sharex=True, sharey="row", squeeze=False)
    colours = (figures.BLUE, figures.VERMILION, figures.GREY)
    for decoder, row in zip(DECODERS, panels, strict=True):
        for score, panel in zip(("image", "brain"), row, strict=True):
            for (amount, outcome), colour in zip(outcomes.items(), colours, strict=False):
                for kind in KINDS:
                    _line(panel, outcome, decoder, score, kind, ratios, colour, f"{amount} real pictures, {kind}")
            panel.axhline(1 / outcome.pool, color="black", linestyle=":", linewidth=1, label="chance")
            panel.set_title(f"{decoder}: {NAMES[score]}", fontsize=11)
            panel.grid(alpha=0.3)
        row[0].set_ylim(bottom=0)  # of the row, once all is drawn: it ends the automatic scaling
    for panel in panels[-1]:
        panel.set_xticks(range(len(ratios) + 1), ["0", *(f"{ratio:g}" for ratio in ratios)])
        panel.set_xlabel("synthetic trials per real trial")
    for panel in panels[:, 0]:
        panel.set_ylabel(f"top-1 among {outcome.pool}")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def _line(
    panel: Axes,
    outcome: Outcome,
    decoder: str,
    score: str,
    kind: str,
    ratios: Sequence[float],
    colour: str,
    label: str,
) -> None:
    """Real data only at 0, then a step for each ratio."""
    estimates = [outcome.estimate(decoder, name, score) for name in (REAL, *(arm(kind, ratio) for ratio in ratios))]
    at, middle = range(len(estimates)), [one.value for one in estimates]
    if kind == "mode":
        panel.plot(at, middle, color=colour, linestyle="--", linewidth=1.5, marker="s", markersize=3, label=label)
        return
    panel.plot(at, middle, color=colour, linewidth=1.8, marker="o", markersize=4, label=label)
    panel.fill_between(at, [one.low for one in estimates], [one.high for one in estimates], color=colour, alpha=0.15)
