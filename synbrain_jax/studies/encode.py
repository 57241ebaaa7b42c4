"""Study: how well responses to unseen stimuli are predicted, and how well their spread, beside every baseline.

A system is trained for each seed and scored on the test split with `evaluation.write_evaluation`. Intervals are over
test stimuli, of the same draws for all rows and seeds (`run_document.py`). On a simulated data set the true responses
are known, and shares are also of what they reach.

Shape letters: s stimuli, v voxels.
"""

import dataclasses
import json
import time
from collections.abc import Sequence

import numpy as np
from etils import epath
from jaxtyping import Float

from synbrain_jax import metrics, run
from synbrain_jax.data.pairs import Dataset
from synbrain_jax.document import Claim, Document, Figure, Section, Table, cell_text
from synbrain_jax.evaluation import MIN_CEILING_R, write_evaluation
from synbrain_jax.files import read_npz, read_text, write_bytes
from synbrain_jax.report import write_report
from synbrain_jax.run_document import caption_of, run_document
from synbrain_jax.run_files import Run, read_run
from synbrain_jax.statistics import voxel_r_intervals
from synbrain_jax.studies.common import Settings, document, homes, open_subjects, trained
from synbrain_jax.studies.spread import calibration_section
from synbrain_jax.variability import Spread

SHOWN = ("voxel_r", "samples", "slices")
# What of a simulation's settings decides how hard it is.
TOLD = ("latent_dim", "nonlinear", "gain", "ncsnr", "noise_rank", "noise_shared", "own_tuning", "seed")
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
                shift = settings.config.data.shift_test_tokens
                residuals = run.residuals_of(home)
                write_evaluation(system, dataset, home, shift_tokens=shift, residuals=residuals, noise=noise)
                write_report(home)
    sections = []
    for number, dataset in enumerate(datasets):
        runs = [read_run(places[seed][number]) for seed in settings.seeds]
        sections += _subject(dataset, runs, truths[number], 200 if settings.quick else 2000)
        sections.append(_pictures(dataset.voxels.subject, runs[0], settings.folder("encode")))
    return document(settings, "Encoding", started, sections)


@dataclasses.dataclass(frozen=True, eq=False)
class Truth:
    """What `synbrain simulate` left beside the data: the test stimuli's noise-free responses, and the trials' noise."""

    response: Float[np.ndarray, "s v"]
    noise: Spread
    settings: str
    """Of the simulation, in words."""


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
    simulated = json.loads(read_text(file.with_name("truth.json")))["settings"]
    return Truth(
        response=known["response"][[row[name] for name in dataset.stimulus_ids("test")]][:, voxels],
        noise=Spread(known["noise_factor"][voxels].astype(np.float32), known["noise_diag"][voxels].astype(np.float32)),
        settings=", ".join(f"{name.replace('_', ' ')} {simulated[name]:g}" for name in TOLD if name in simulated),
    )


# ---- one subject -----------------------------------------------------------------------------------


def _subject(dataset: Dataset, runs: Sequence[Run], truth: Truth | None, draws: int) -> list[Section]:
    subject = dataset.voxels.subject
    found = [dataclasses.replace(one, title=f"{one.title}, {subject}") for one in run_document(runs).sections]
    if truth is not None:
        found.append(_against_truth(subject, runs, truth, draws))
    if all("calibration" in one.report for one in runs):
        found.append(calibration_section(dataset, [one.report["calibration"] for one in runs]))
    return found


def _pictures(subject: str, one: Run, folder: epath.Path) -> Section:
    """The figures of one run, copied to the study's."""
    shown = []
    for name in SHOWN:
        drawn = one.workdir / "figures" / f"{name}.png"
        if drawn.exists():
            write_bytes(folder / f"{subject}_{name}.png", drawn.read_bytes())
            shown.append(Figure(f"{subject}_{name}", caption_of(name, one)))
    return Section(f"Figures, {subject}", f"Of seed {one.config.seed}.", figures=tuple(shown))


def _against_truth(subject: str, runs: Sequence[Run], truth: Truth, draws: int) -> Section:
    """Voxel r as a share of that of the true responses, with the same measurements."""
    target = runs[0].arrays["target"]
    reached = np.asarray(metrics.voxel_pearson(truth.response, target))
    found = [voxel_r_intervals(_predictions(one), target, reached, draws=draws) for one in runs]
    rows = [(name.replace("_", " "), *(one.share[name] for one in found)) for name in found[0].share]
    for name in found[0].lead:
        rows.append((f"model less {name.replace('_', ' ')}", *(one.lead_share[name] for one in found)))
    own = [one.share["model"] for one in found]
    return Section(
        title=f"Against the truth, {subject}",
        text=(
            f"The responses are simulated ({truth.settings}); without noise they reach a median voxel r of "
            f"{np.median(reached):.3f} with the measured test means."
        ),
        tables=(
            Table(
                title="Voxel r as a share of what the true responses reach, median voxel",
                columns=("", *(f"seed {one.config.seed}" for one in runs)),
                rows=tuple(rows),
                note=(
                    f"Over the voxels where the truth reaches more than {MIN_CEILING_R}. In brackets: 95 % bootstrap "
                    "intervals over stimuli, of the same draws in all rows; what the truth reaches is taken as known."
                ),
            ),
        ),
        claims=(
            Claim(
                f"The model reaches {AIM} of what the truth reaches, with every seed",
                min(one.value for one in own) >= AIM,
                ", ".join(cell_text(one) for one in own),
            ),
        ),
    )


def _predictions(one: Run) -> dict[str, Float[np.ndarray, "s v"]]:
    """Of the model, which comes first, and the baselines."""
    others = {name: one.arrays[name] for name in one.arrays if name.startswith("prediction_")}
    return {"model": one.arrays["prediction"], **{name.removeprefix("prediction_"): others[name] for name in others}}
