"""A training run, or the same experiment with several seeds, as a `Document`: scores with intervals, regions, claims.

Intervals are of the bootstrap over test stimuli (`statistics.py`); all rows and seeds are drawn alike, so that their
differences and means have intervals, too. Noise ceilings are taken as known. Patterns are centred over the stimuli
there are, not anew over those of each draw, and the patterns to be told apart in identification stay all of them.

Shape letters: s stimuli, v voxels, n trials, d draws.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from synbrain_jax import metrics
from synbrain_jax.document import Cell, Claim, Document, Estimate, Figure, Section, Table, cell_text
from synbrain_jax.errors import InputError
from synbrain_jax.run_files import Run
from synbrain_jax.statistics import interval, resamples, standardised, weighted_r

NAMES = ("model", "stimulus_mean", "ridge", "kernel_ridge", "mean_pattern", "noise_ceiling")
# (metric in report.json, upper and lower line of its column heading)
MAIN_COLUMNS = (
    ("voxel_r_mean", "voxel r", "mean"),
    ("voxel_r_median", "voxel r", "median"),
    ("pattern_r", "pattern r", "raw"),
    ("pattern_r_centred", "pattern r", "centred"),
    ("mse", "MSE", ""),
    ("cosine", "cosine", ""),
    ("explained_variance", "explained", "variance"),
    ("identification_top1", "identify", "top-1"),
    ("identification_two_way", "identify", "two-way"),
)
TRIAL_COLUMNS = (
    ("trial_mse", "MSE", ""),
    ("trial_pattern_r", "pattern r", "raw"),
    ("trial_cosine", "cosine", ""),
)
SHARE_COLUMNS = (
    ("voxel_r_normalised_median", "r/ceiling", "median"),
    ("voxel_r2_normalised_mean", "r²/ceil.²", "mean"),
)
CAPTIONS = {
    "voxel_r": "Correlation of prediction and measurement over the test stimuli, voxel by voxel, beside its noise "
    "ceiling.",
    "regions": "Median voxel r in each region, of the model, the baselines and the noise ceiling.",
    "patterns": "Measured responses above, synthesised ones below, for stimuli from the best to the worst predicted; "
    "the mean over stimuli is removed from both. r is over voxels.",
    "slices": "Volume slices of measured and synthesised responses, and of voxel r beside its noise ceiling.",
    "samples": "Single trials beside synthetic samples of the same stimuli, in the most reliable voxels.",
    "loss_curves": "What training and validation logged; the line is at the checkpoint that was chosen.",
}
_CALIBRATED = (
    " Calibrated samples vary as trials do about the prediction, and so more than trials of a stimulus do about their "
    "own mean."
)
_POSTERIOR = " The samples are of BrainVAE's posterior, which is not fitted to how trials vary."
FEW_STIMULI = 20
DRAWN_VALUES = 100_000_000  # draws x stimuli x voxels, where that allows 500 to 2,000 draws
TOGETHER = 4_000_000  # draws x voxels at a time


def group_runs(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs that differ by their seed alone and were scored on the same measurements, together; by seed in a group.

    Raises InputError where a seed of one experiment is there twice.
    """
    groups: list[list[Run]] = []
    for run in runs:
        own = next((group for group in groups if _alike(group[0], run)), None)
        if own is None:
            groups.append([run])
            continue
        if twin := next((other for other in own if other.config.seed == run.config.seed), None):
            raise InputError(f"{twin.workdir} and {run.workdir} are the same run, seed {run.config.seed}; give one")
        own.append(run)
    return [sorted(group, key=lambda run: run.config.seed) if len(group) > 1 else group for group in groups]


def _alike(one: Run, other: Run) -> bool:
    if one.config is None or other.config is None:
        return False
    return (
        dataclasses.replace(one.config, seed=0) == dataclasses.replace(other.config, seed=0)
        and all(one.report.get(field) == other.report.get(field) for field in ("dataset", "subject", "split"))
        and all(np.array_equal(one.arrays[name], other.arrays[name]) for name in ("stimulus_id", "target"))
    )


def run_document(runs: Sequence[Run], figures: Sequence[str] = ()) -> Document:
    """The document of one of `group_runs`. `figures` are names of `CAPTIONS`, drawn from the first run."""
    scores = Scores.of(runs)
    report = runs[0].report
    name = f"{runs[0].config.name}: " if runs[0].config else ""
    sections = [_scores_section(scores, report)]
    if report.get("rois"):
        sections.append(_regions_section(scores, report))
    if figures:
        shown = tuple(Figure(name, caption_of(name, runs[0])) for name in CAPTIONS if name in figures)
        of = f"Of {scores.seeds[0]}." if len(runs) > 1 else ""
        sections.append(Section("Figures", of, figures=shown))
    return Document(f"{name}{report['dataset']}, {report['split']} split", _facts(runs), tuple(sections))


def caption_of(figure: str, run: Run) -> str:
    """Of one of a run's figures."""
    if figure != "samples":
        return CAPTIONS[figure]
    return CAPTIONS[figure] + (_CALIBRATED if run.calibrated else _POSTERIOR)


def _facts(runs: Sequence[Run]) -> dict[str, str]:
    names = dict.fromkeys(name for run in runs for name in run.facts)
    facts = {name: "; ".join(dict.fromkeys(run.facts[name] for run in runs if name in run.facts)) for name in names}
    if all(run.config for run in runs):
        facts["seeds"] = ", ".join(str(run.config.seed) for run in runs)
    if "subject" in runs[0].report:
        facts["subject"] = runs[0].report["subject"]
    return facts | {"folder": ", ".join(f"`{run.workdir}`" for run in runs)}


# ---- scores with intervals ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """Scores of all rows of some runs: as reported, and in each draw where they can be drawn.

    seeds: a name for each run. values and drawn: of each run, {row: {metric: number, or array [d]}}; the median voxel r
    within a region is the metric "rois/NAME".
    """

    seeds: tuple[str, ...]
    values: tuple[dict[str, dict[str, float]], ...]
    drawn: tuple[dict[str, dict[str, Float[np.ndarray, "d"]]], ...]

    @classmethod
    def of(cls, runs: Sequence[Run]) -> "Scores":
        n = len(runs[0].arrays["stimulus_id"])
        draws = int(np.clip(DRAWN_VALUES // runs[0].arrays["target"].size, 500, 2000))
        counts = resamples(n, draws)
        seeds = tuple(f"seed {run.config.seed}" if run.config else "model" for run in runs)
        return cls(seeds, tuple(map(_values, runs)), tuple(_drawn_rows(run, counts) for run in runs))

    @property
    def rows(self) -> list[str]:
        """All but the model, in the order of `NAMES`."""
        known = dict.fromkeys(row for values in self.values for row in values)
        return sorted(known.keys() - {"model"}, key=lambda row: (NAMES.index(row) if row in NAMES else -1, row))

    def mean(self, row: str, metric: str) -> Cell:
        """Of all runs."""
        return self._estimate(range(len(self.seeds)), row, metric)

    def one(self, number: int, row: str, metric: str) -> Cell:
        """Of one run."""
        return self._estimate([number], row, metric)

    def lead(self, numbers: Sequence[int], row: str, metric: str) -> Cell:
        """How far the model of some runs, on average, is above another row in the same draws."""
        return self._estimate(numbers, "model", metric, row)

    def _estimate(self, numbers: Sequence[int], row: str, metric: str, less: str | None = None) -> Cell:
        values = [_above(self.values[at], row, less, metric) for at in numbers]
        drawn = [_above(self.drawn[at], row, less, metric) for at in numbers]
        if any(value is None for value in values):
            return None
        value = float(np.mean(values))
        if any(draws is None for draws in drawn):
            return Estimate(value)
        return dataclasses.replace(interval(np.mean(drawn, axis=0)), value=value)  # the value as reported


def _above(scores: Mapping[str, Mapping[str, Any]], row: str, other: str | None, metric: str) -> Any:
    """A row's score, less that of another row if one is named; None where either is missing."""
    own = scores.get(row, {}).get(metric)
    if own is None or other is None:
        return own
    less = scores.get(other, {}).get(metric)
    return None if less is None else own - less


def _values(run: Run) -> dict[str, dict[str, float]]:
    values = {row: dict(scores) for row, scores in run.report["scores"].items()}
    for region, content in run.report.get("rois", {}).items():
        for row, scores in content["rows"].items():
            values[row][f"rois/{region}"] = scores.get("voxel_r_median")
    return values


def _drawn_rows(run: Run, counts: Float[np.ndarray, "d s"]) -> dict[str, dict[str, Float[np.ndarray, "d"]]]:
    rows = {"model": run.arrays["prediction"]}
    rows |= {row: run.arrays[name] for row in run.report["scores"] if (name := f"prediction_{row}") in run.arrays}
    return {row: drawn_scores(run, row, prediction, counts) for row, prediction in rows.items()}


def drawn_scores(
    run: Run, row: str, prediction: Float[np.ndarray, "s v"], counts: Float[np.ndarray, "d s"]
) -> dict[str, Float[np.ndarray, "d"]]:
    """The scores of `evaluation.score` in each draw, but explained variance; by their names in report.json.

    Those against single trials only where predictions.npz has them: runs of older versions do not.
    """
    target = run.arrays["target"]
    centred = metrics.centred(prediction), metrics.centred(target)
    of_stimuli = {
        "pattern_r": metrics.pattern_pearson(prediction, target),
        "pattern_r_centred": metrics.pattern_pearson(*centred),
        "mse": metrics.mse(prediction, target),
        "cosine": metrics.cosine(prediction, target),
        "identification_top1": metrics.identification_top1(*centred),
        "identification_two_way": metrics.identification_two_way(*centred),
    }
    drawn = {name: counts @ np.asarray(values, np.float64) / len(target) for name, values in of_stimuli.items()}
    if f"trial_scores_{row}" in run.arrays:
        drawn |= _against_trials(run.arrays[f"trial_scores_{row}"], run.arrays["stimulus_of_trial"], counts)
    return drawn | _voxel_r(prediction, target, run.arrays.get("voxel_r_ceiling"), run.report, run.voxels.rois, counts)


def _against_trials(
    scores: Float[np.ndarray, "n 3"], stimulus: Int[np.ndarray, "n"], counts: Float[np.ndarray, "d s"]
) -> dict[str, Float[np.ndarray, "d"]]:
    size = counts.shape[1]
    sums = np.stack([np.bincount(stimulus, column, size) for column in scores.T], axis=1)
    drawn = counts @ sums / (counts @ np.bincount(stimulus, minlength=size))[:, None]
    return dict(zip((metric for metric, _, _ in TRIAL_COLUMNS), drawn.T, strict=True))


def _voxel_r(
    prediction: Float[np.ndarray, "s v"],
    target: Float[np.ndarray, "s v"],
    ceiling_r: Float[np.ndarray, "v"] | None,
    report: Mapping[str, Any],
    rois: Mapping[str, Bool[np.ndarray, "v"]],
    counts: Float[np.ndarray, "d s"],
) -> dict[str, Float[np.ndarray, "d"]]:
    x, y = standardised(prediction), standardised(target)
    reliable = np.zeros(target.shape[1], bool)
    if ceiling_r is not None and "reliable" in report:
        reliable = ceiling_r > report["reliable"]["ceiling_r_above"]
    regions = {f"rois/{name}": rois[name] for name in report.get("rois", {}) if name in rois}
    parts = []
    for part in np.array_split(counts, -(-counts.shape[0] * target.shape[1] // TOGETHER)):
        r = weighted_r(x, y, part)
        drawn = {"voxel_r_mean": r.mean(axis=1), "voxel_r_median": np.median(r, axis=1)}
        if reliable.any():
            share = r[:, reliable] / ceiling_r[reliable]
            drawn["voxel_r_normalised_median"] = np.median(share, axis=1)
            drawn["voxel_r2_normalised_mean"] = np.mean(np.clip(share, 0, 1) ** 2, axis=1)
        parts.append(drawn | {name: np.median(r[:, inside], axis=1) for name, inside in regions.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


# ---- sections ----------------------------------------------------------------------------------------


def _scores_section(scores: Scores, report: Mapping[str, Any]) -> Section:
    sizes = ", ".join(f"{report[f'n_{what}']:,} {what}" for what in ("stimuli", "trials", "voxels"))
    text = f"{sizes}. In brackets: 95 % bootstrap intervals over stimuli."
    if report["n_stimuli"] < FEW_STIMULI:
        text += f" With {report['n_stimuli']} stimuli they are too narrow: of such intervals about 90 % hold the truth."
    main = _table(scores, "Against the mean response to each stimulus", MAIN_COLUMNS)
    single = _table(scores, "Against single trials, the columns of the SynBrain paper", TRIAL_COLUMNS)
    note = (
        "Voxel r: over stimuli; pattern r and cosine: over voxels; explained variance: the median voxel. Centred, and "
        "identification: without the mean over stimuli, so that a pattern that is the same for every stimulus earns "
        f"nothing. Chance of identification: {1 / report['n_stimuli']:.3f} (top-1), 0.500 (two-way). Bold: the best "
        "row, and those that cannot be told from it; the noise ceiling, which a perfect predictor reaches on average, "
        "does not compete."
    )
    tables = [dataclasses.replace(main, note=note), single]
    if reliable := report.get("reliable"):
        heading = (
            f"As a share of the noise ceiling, over the {reliable['n_voxels']:,} voxels whose ceiling of r is above "
            f"{reliable['ceiling_r_above']}"
        )
        tables.append(_table(scores, heading, SHARE_COLUMNS))
    rivals = [row for row in scores.rows if row not in ("mean_pattern", "noise_ceiling")]
    if rivals:
        tables.append(_leads(scores, rivals))
    return Section("Scores", text, tuple(tables), claims=tuple(_claim(scores, row) for row in rivals))


def _table(scores: Scores, title: str, columns: Sequence[tuple[str, str, str]]) -> Table:
    heads = [f"{upper} {lower}".strip() for _, upper, lower in columns]
    lines: list[tuple[str, list[Cell]]] = []
    several = len(scores.seeds) > 1
    if several:
        for number, seed in enumerate(scores.seeds):
            lines.append((f"model, {seed}", [scores.one(number, "model", metric) for metric, _, _ in columns]))
    for row in ("model", *scores.rows):
        name = f"model, mean of {len(scores.seeds)} seeds" if several and row == "model" else row.replace("_", " ")
        lines.append((name, [scores.mean(row, metric) for metric, _, _ in columns]))
    return Table(
        title,
        ("", *heads),
        tuple((name, *cells) for name, cells in lines),
        best={head: "low" if head == "MSE" else "high" for head in heads},
        apart=("noise ceiling", *(name for name, _ in lines[: len(scores.seeds) * several])),
    )


def _leads(scores: Scores, rivals: Sequence[str]) -> Table:
    columns = {seed: [number] for number, seed in enumerate(scores.seeds)}
    if len(columns) > 1:
        columns["mean"] = [number for [number] in columns.values()]
    rows = [
        (row.replace("_", " "), *(scores.lead(numbers, row, "voxel_r_median") for numbers in columns.values()))
        for row in rivals
    ]
    return Table("How far the model's median voxel r is above that of", ("", *columns), tuple(rows))


def _claim(scores: Scores, rival: str) -> Claim:
    """Whether the model's median voxel r is above another row's: beyond the interval with every seed, or not."""
    leads = [scores.lead([number], rival, "voxel_r_median") for number in range(len(scores.seeds))]
    evidence = ", ".join(f"{cell_text(lead)} ({seed})" for seed, lead in zip(scores.seeds, leads, strict=True))
    known = [lead for lead in leads if isinstance(lead, Estimate) and lead.low is not None]
    holds = None
    if len(known) == len(leads):
        above, below = all(lead.low > 0 for lead in known), all(lead.high <= 0 for lead in known)
        holds = True if above else False if below else None
    own, other = (cell_text(scores.mean(row, "voxel_r_median")) for row in ("model", rival))
    name = rival.replace("_", " ")
    numbers = f"{own} against {other}; above it by {evidence}"
    return Claim(f"The median voxel's r is above that of {name}", holds, numbers)


def _regions_section(scores: Scores, report: Mapping[str, Any]) -> Section:
    columns = [
        row
        for row in ("model", *scores.rows)
        if any(f"rois/{name}" in values.get(row, {}) for name in report["rois"] for values in scores.values)
    ]
    rows = [
        (region, content["n_voxels"], *(scores.mean(row, f"rois/{region}") for row in columns))
        for region, content in report["rois"].items()
    ]
    left_out = ", ".join(f"{name} ({size})" for name, size in report.get("rois_left_out", {}).items())
    note = f"Regions with too few voxels: {left_out}." if left_out else ""
    title = "Median voxel r in each region" + (f", mean of {len(scores.seeds)} seeds" if len(scores.seeds) > 1 else "")
    heads = ("", "voxels", *(row.replace("_", " ") for row in columns))
    return Section("Regions", tables=(Table(title, heads, tuple(rows), note),))
