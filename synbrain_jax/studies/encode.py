"""Study: how well responses to unseen stimuli are predicted, and how well their spread, beside every baseline.

A system is trained for each seed and scored on the test split with `evaluation.write_evaluation`. Intervals are over
test stimuli, for each seed; a number for all seeds is their mean, with the mean of the ends. On a simulated data set
the true responses are known, and shares are also of what they reach.

Shape letters: s stimuli, v voxels.
"""

import dataclasses
import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float

from synbrain_jax import metrics, run
from synbrain_jax.data.pairs import Dataset
from synbrain_jax.document import Claim, Document, Section, Table
from synbrain_jax.evaluation import write_evaluation
from synbrain_jax.files import read_npz, read_text
from synbrain_jax.report import write_report
from synbrain_jax.run_document import FEW_STIMULI
from synbrain_jax.statistics import Estimate, VoxelR, voxel_r_intervals
from synbrain_jax.studies.common import Settings, document, homes, mean_estimate, open_subjects, trained
from synbrain_jax.studies.spread import calibration_section
from synbrain_jax.variability import Spread

AIM = 0.8  # share of the true ceiling that is asked of the model on the simulation


def study(settings: Settings) -> Document:
    """Trains and scores one system per seed; a section for each subject."""
    started = time.monotonic()
    datasets = open_subjects(settings)
    places = {}
    truths = [true_of(settings, dataset) for dataset in datasets]
    for seed in settings.seeds:
        systems = trained(settings, seed, datasets)
        places[seed] = homes(settings, seed, datasets)
        for system, dataset, truth, home in zip(systems, datasets, truths, places[seed], strict=True):
            if not (home / "report.txt").exists():
                noise = None if truth is None else truth.noise
                write_evaluation(system, dataset, home, residuals=run.residuals_of(home), noise=noise)
                write_report(home)
    sections = []
    for number, dataset in enumerate(datasets):
        own = {seed: places[seed][number] for seed in settings.seeds}
        response = None if truths[number] is None else truths[number].response
        sections += _subject(dataset, own, response, 200 if settings.quick else 2000)
    return document(settings, "Encoding", started, sections)


@dataclasses.dataclass(frozen=True, eq=False)
class Truth:
    """What `synbrain simulate` left beside the data: the test stimuli's noise-free responses, and the trials' noise."""

    response: Float[np.ndarray, "s v"]
    noise: Spread


def true_of(settings: Settings, dataset: Dataset) -> Truth | None:
    """The truth of a simulated data set, in its voxel order; None for any other."""
    source = settings.config.data.source
    subject = dataset.voxels.subject.removeprefix("nsd-")
    file = None if source is None else epath.Path(source) / "truth" / f"{subject}.npz"
    if file is None or not file.exists():
        return None
    known = read_npz(file)
    row = {str(picture): index for index, picture in enumerate(known["picture"])}
    place = {tuple(position): index for index, position in enumerate(known["ijk"].tolist())}
    voxels = [place[tuple(position)] for position in dataset.voxels.ijk.tolist()]
    return Truth(
        response=known["response"][[row[name] for name in dataset.stimulus_ids("test")]][:, voxels],
        noise=Spread(known["noise_factor"][voxels].astype(np.float32), known["noise_diag"][voxels].astype(np.float32)),
    )


# ---- one subject -----------------------------------------------------------------------------------


def _subject(
    dataset: Dataset, places: Mapping[int, epath.Path], truth: Float[np.ndarray, "s v"] | None, draws: int
) -> list[Section]:
    reports = {seed: json.loads(read_text(home / "report.json")) for seed, home in places.items()}
    arrays = {seed: read_npz(home / "predictions.npz") for seed, home in places.items()}
    intervals = {seed: _intervals(arrays[seed], truth, draws) for seed in places}
    sections = [_prediction(dataset, reports, intervals, truth is not None)]
    if "rois" in next(iter(reports.values())):
        sections.append(_regions(dataset, reports))
    if "calibration" in next(iter(reports.values())):
        sections.append(calibration_section(dataset, [report["calibration"] for report in reports.values()]))
    return sections


def _intervals(arrays: Mapping[str, np.ndarray], truth: Float[np.ndarray, "s v"] | None, draws: int) -> VoxelR:
    """Of every row; as a share of what the truth reaches on these measurements, if it is known, else of the ceiling."""
    rows = {name.removeprefix("prediction_"): arrays[name] for name in arrays if name.startswith("prediction_")}
    rows = {"model": arrays["prediction"], **rows}
    target = arrays["target"]
    ceiling = arrays.get("voxel_r_ceiling")
    if truth is not None:
        ceiling = np.asarray(metrics.voxel_pearson(truth, target))
    return voxel_r_intervals(rows, target, ceiling, draws=draws)


_COLUMNS = {
    "pattern_r": "pattern r",
    "pattern_r_centred": "pattern r, centred",
    "identification_top1": "identify top-1",
    "identification_two_way": "identify two-way",
    "trial_mse": "paper: MSE",
    "trial_pattern_r": "paper: Pearson",
    "trial_cosine": "paper: cosine",
}


def _prediction(
    dataset: Dataset, reports: Mapping[int, dict[str, Any]], intervals: Mapping[int, VoxelR], true: bool
) -> Section:
    first = next(iter(reports.values()))
    share = "share of the true ceiling" if true else "share of the noise ceiling"
    rows = []
    for name in first["scores"]:
        scores = [report["scores"][name] for report in reports.values()]
        cells = [float(np.mean([score[column] for score in scores])) for column in _COLUMNS]
        known = [one for one in intervals.values() if name in one.r]
        r = mean_estimate([one.r[name] for one in known]) if known else scores[0]["voxel_r_median"]
        of_ceiling = mean_estimate([one.share[name] for one in known if name in one.share])
        rows.append((name, r, of_ceiling, *cells))
    better = {"voxel r": "high", share: "high"} | {
        title: "low" if "mse" in column else "high" for column, title in _COLUMNS.items()
    }
    few = " Of so few stimuli, intervals are too narrow." if first["n_stimuli"] < FEW_STIMULI else ""
    table = Table(
        title=f"{dataset.voxels.subject}, {first['n_stimuli']} test stimuli, {first['n_voxels']:,} voxels",
        columns=("", "voxel r", share, *_COLUMNS.values()),
        rows=tuple(rows),
        note=(
            f"Median voxel, with 95 % bootstrap intervals over stimuli; mean of {len(reports)} seeds. The share is "
            f"over voxels whose ceiling is above 0.3. The paper's columns are against single trials.{few}"
        ),
        best=better,
        apart=("noise_ceiling",),
    )
    leads = _leads(intervals)
    return Section(
        title=f"Prediction, {dataset.voxels.subject}",
        tables=(table, _lead_table(leads, intervals)),
        claims=tuple(_claims(leads, intervals, share)),
    )


def _leads(intervals: Mapping[int, VoxelR]) -> dict[str, dict[int, Estimate]]:
    """Row -> seed -> how far the model is above it."""
    first = next(iter(intervals.values()))
    return {name: {seed: one.lead[name] for seed, one in intervals.items()} for name in first.lead}


def _lead_table(leads: Mapping[str, Mapping[int, Estimate]], intervals: Mapping[int, VoxelR]) -> Table:
    seeds = tuple(f"seed {seed}" for seed in intervals)
    rows = [(f"model less {name}", *(of_seed[seed] for seed in intervals)) for name, of_seed in leads.items()]
    shares = [one.share.get("model") for one in intervals.values()]
    return Table(
        title="By seed: the model's median voxel r less that of a baseline, of the same resamples",
        columns=("", *seeds),
        rows=(*rows, ("model, share of the ceiling", *shares)),
    )


def _claims(
    leads: Mapping[str, Mapping[int, Estimate]], intervals: Mapping[int, VoxelR], share: str
) -> Iterator[Claim]:
    for name in ("stimulus_mean", "ridge", "kernel_ridge"):
        if name in leads:
            differences = list(leads[name].values())
            told = ", ".join(f"{one.value:+.3f} [{one.low:+.3f}, {one.high:+.3f}]" for one in differences)
            above = all(one.low > 0 for one in differences)
            below = all(one.high < 0 for one in differences)
            yield Claim(
                f"The model predicts better than {name} (the interval is above 0 in all seeds)",
                True if above else False if below else None,
                f"difference of the median voxel r, by seed: {told}",
            )
    shares = [one.share["model"].value for one in intervals.values() if "model" in one.share]
    if shares:
        told = ", ".join(f"{value:.3f}" for value in shares)
        yield Claim(f"The model reaches {AIM} of the ceiling", min(shares) >= AIM, f"{share}, by seed: {told}")


def _regions(dataset: Dataset, reports: Mapping[int, dict[str, Any]]) -> Section:
    first = next(iter(reports.values()))
    names = list(first["scores"])
    rows = []
    for region, content in first["rois"].items():
        medians = [
            float(np.mean([report["rois"][region]["rows"][name]["voxel_r_median"] for report in reports.values()]))
            for name in names
        ]
        rows.append((region, content["n_voxels"], *medians))
    table = Table(
        title="Median voxel r in each region",
        columns=("", "voxels", *names),
        rows=tuple(rows),
        note=f"Mean of {len(reports)} seeds.",
    )
    return Section(title=f"Regions, {dataset.voxels.subject}", tables=(table,))
