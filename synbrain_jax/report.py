"""Tables and figures of one finished run, made from the files in its folder and nothing else.

`format_table` and `markdown_table` print the scores of `report.json`; `write_figures` draws the run;
`write_report` does both. Shape letters: s stimuli, v voxels, n trials, k samples per stimulus.
"""

import dataclasses
import io
import json
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from synbrain_jax import brain_figures, figures, files, metrics
from synbrain_jax.data.voxels import Voxels
from synbrain_jax.errors import InputError

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
TRIAL_HEADING = "Against single trials, the columns of the SynBrain paper:"
SHARE_COLUMNS = (
    ("voxel_r_normalised_median", "r/ceiling", "median"),
    ("voxel_r2_normalised_mean", "r²/ceil.²", "mean"),
)

STAGES = {"stage1": "Stage 1, BrainVAE", "stage2": "Stage 2, semantic-to-neural mapper"}


# ---- tables ----------------------------------------------------------------------------------------


def format_table(report: dict[str, Any]) -> str:
    """The scores of one run (the content of `report.json`) as plain text.

    At most 110 columns wide, where regions have names of up to 30 letters.
    A score that is missing, null or not finite is a dash.
    """
    return _render(report, _text_block)


def markdown_table(report: dict[str, Any]) -> str:
    """The same as `format_table`, in Markdown, for a README."""
    return _render(report, _markdown_block)


def _render(report: dict[str, Any], block: Callable[[list[list[str]], list[list[str]]], list[str]]) -> str:
    names = [*NAMES, *(name for name in report["scores"] if name not in NAMES)]

    def table(columns: Sequence[tuple[str, str, str]]) -> list[str]:
        heads = [["", *(column[line] for column in columns)] for line in (1, 2)]
        rows = [[name, *(_cell(_number(report, name, metric)) for metric, _, _ in columns)] for name in names]
        return block(heads, rows)

    chance = 1 / report["n_stimuli"]
    paragraphs = [
        [_headline(report)],
        table(MAIN_COLUMNS),
        [
            "Higher is better, except MSE (lower). Voxel r: over stimuli; pattern r and cosine: over voxels;",
            "explained variance: the median voxel. Centred, and identification: the mean over stimuli is removed from",
            "target and prediction, so that a pattern that is the same for every stimulus earns nothing.",
            f"Chance of identification: {chance:.3f} (top-1), 0.500 (two-way).",
        ],
        [TRIAL_HEADING],
        table(TRIAL_COLUMNS),
    ]
    if reliable := report.get("reliable"):
        count, threshold = reliable["n_voxels"], reliable["ceiling_r_above"]
        heading = f"As a share of the noise ceiling, over the {count:,} voxels whose ceiling of r is above {threshold}:"
        paragraphs += [[heading], table(SHARE_COLUMNS)]
    if "rois" in report:
        paragraphs += _regions(report, block)
    paragraphs.append(_closing(report))
    return "\n\n".join("\n".join(lines) for lines in paragraphs) + "\n"


def _regions(report: dict[str, Any], block: Callable[[list[list[str]], list[list[str]]], list[str]]) -> list[list[str]]:
    """Paragraphs with a row for each region: the median voxel r of the model and all others."""
    names = [name for name in NAMES if name in report["scores"]]
    upper, _, lower = zip(*(name.partition("_") for name in names), strict=True)
    heads = [["", "voxels", *upper, "model"], ["", "", *lower, "r/ceiling"]]
    rows = []
    for region, content in report["rois"].items():
        medians = [_cell(content["rows"].get(name, {}).get("voxel_r_median")) for name in names]
        share = _cell(content["rows"]["model"].get("voxel_r_normalised_median"))
        rows.append([region, f"{content['n_voxels']:,}", *medians, share])
    paragraphs = []
    if rows:
        heading = "Regions, median voxel r; the last column is over their reliable voxels alone:"
        paragraphs += [[heading], block(heads, rows)]
    if left_out := [f"{name} ({size})" for name, size in report["rois_left_out"].items()]:
        paragraphs.append([f"Regions with too few voxels: {', '.join(left_out)}."])
    return paragraphs


def _headline(report: dict[str, Any]) -> str:
    sizes = ", ".join(f"{report[f'n_{what}']:,} {what}" for what in ("stimuli", "trials", "voxels"))
    subject = f" ({report['subject']})" if "subject" in report else ""
    return f"{report['dataset']}{subject}, {report['split']} split: {sizes}"


def _number(report: dict[str, Any], name: str, metric: str) -> float | None:
    value = report["scores"].get(name, {}).get(metric)
    return float(value) if value is not None and math.isfinite(value) else None


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    if not isinstance(value, int | float):
        return str(value)
    return f"{value:z.3f}" if abs(value) < 1e4 else f"{value:.2e}"


def _text_block(heads: list[list[str]], rows: list[list[str]]) -> list[str]:
    first = max(len(row[0]) for row in rows)
    return [(row[0].ljust(first) + "".join(cell.rjust(10) for cell in row[1:])).rstrip() for row in [*heads, *rows]]


def _markdown_block(heads: list[list[str]], rows: list[list[str]]) -> list[str]:
    head = [f"{upper} {lower}".strip() for upper, lower in zip(*heads, strict=True)]
    rule = ["---", *("---:" for _ in head[1:])]
    body = [[f"`{row[0]}`", *row[1:]] for row in rows]
    return [f"| {' | '.join(row)} |" for row in [head, rule, *body]]


def _closing(report: dict[str, Any]) -> list[str]:
    own = _number(report, "model", "pattern_r_centred")
    ratios = []
    for name in ("stimulus_mean", "noise_ceiling"):
        other = _number(report, name, "pattern_r_centred")
        defined = own is not None and other is not None and other > 0
        ratios.append(f"{own / other:.2f} to {name}" if defined else f"- to {name}")
    lines = [f"Ratio of the model's centred pattern r: {', '.join(ratios)}."]
    for name, value in report.get("controls", {}).items():
        lines.append(f"Control {name}: {_cell(value)}")
    if report.get("gain") == 0:
        lines.append("The gain fitted on validation is 0: the model predicts no difference between stimuli.")
    return lines


# ---- reading the run -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Run:
    report: dict[str, Any]
    arrays: dict[str, np.ndarray]
    voxels: Voxels
    stages: dict[str, figures.Curves]


def _read_run(workdir: epath.Path) -> _Run:
    report = _read_json(workdir / "report.json", workdir)
    missing = {"dataset", "split", "n_stimuli", "n_trials", "n_voxels", "scores"} - report.keys()
    if missing:
        raise InputError(
            f"{workdir / 'report.json'}: no field {', '.join(sorted(missing))}; run `synbrain evaluate` again"
        )
    arrays = _read_arrays(_need(workdir / "predictions.npz", workdir))
    # Where several subjects were trained together, the folder of one is within the run's.
    trained = next((folder for folder in (workdir, workdir.parent) if (folder / "stage1").exists()), workdir)
    return _Run(
        report=report,
        arrays=arrays,
        voxels=_read_voxels(workdir, arrays["voxel_r"].size),
        stages={title: read_curves(trained, stage) for stage, title in STAGES.items()},
    )


def _need(path: epath.Path, workdir: epath.Path) -> epath.Path:
    if not workdir.exists():
        raise InputError(f"{workdir}: no such folder; give the --workdir of a finished run")
    command = f"python train.py CONFIG --workdir {workdir}"
    if path.name in ("report.json", "predictions.npz"):
        command = f"synbrain evaluate --model {workdir / 'bundle'} --data DATA --out {workdir}"
    if not path.exists():
        raise InputError(f"{path}: no such file; `{command}` makes it")
    return path


def _read_json(path: epath.Path, workdir: epath.Path) -> dict[str, Any]:
    try:
        return json.loads(files.read_text(_need(path, workdir)))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not JSON ({error}); remove it and run its command again") from None


def _read_arrays(path: epath.Path) -> dict[str, np.ndarray]:
    arrays = files.read_npz(path)
    needed = {"stimulus_id", "prediction", "target", "voxel_r", "sampled_id", "samples", "trials", "trial_stimulus"}
    if needed - arrays.keys():
        missing = ", ".join(sorted(needed - arrays.keys()))
        raise InputError(f"{path}: no array {missing}; run `synbrain evaluate` again")
    return arrays


def _read_voxels(workdir: epath.Path, n_voxels: int) -> Voxels:
    path = _need(workdir / "bundle" / "voxels.npz", workdir)
    voxels = Voxels.load(path)
    if voxels.order.size != n_voxels:
        raise InputError(
            f"{path}: {voxels.order.size} voxels, but predictions.npz has {n_voxels}; they are from different runs: "
            "run `synbrain evaluate` again"
        )
    return voxels


def read_curves(workdir: str | os.PathLike, stage: str) -> figures.Curves:
    """What `workdir/stage/metrics.jsonl` logged and the checkpoint that `selected.json` names.

    Where a run was killed and resumed, the last value of a step counts and a line cut short is skipped.
    Raises InputError where a file is missing or says nothing.
    """
    workdir = epath.Path(workdir)
    path = _need(workdir / stage / "metrics.jsonl", workdir)
    selected = _read_json(workdir / stage / "selected.json", workdir)
    if not {"step", "metric"} <= selected.keys():
        raise InputError(f"{path.parent / 'selected.json'}: no field step or metric; train this stage again")
    curves: dict[str, dict[int, float]] = {}
    for line in files.read_text(path).splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        for key, value in row.items():
            if key.startswith(("train/", "val/")) and value is not None and math.isfinite(value):
                curves.setdefault(key, {})[row["step"]] = value
    if not curves:
        raise InputError(f"{path}: no line has a train/ or val/ value; train this stage again")
    return figures.Curves(curves, chosen_step=selected["step"], chosen_by=selected["metric"])


# ---- the report --------------------------------------------------------------------------------------


def write_figures(workdir: str | os.PathLike) -> list[epath.Path]:
    """Draws loss_curves, patterns, voxel_r, samples, regions, slices into `workdir/figures/*.png`; returns the paths.

    No regions where the data set names none; no slices where the voxels lie in one slice or their places are unknown.
    All inputs are read before the first file is written. Raises InputError where one is missing.
    """
    workdir = epath.Path(workdir)
    return _draw(_read_run(workdir), workdir / "figures")


def write_report(workdir: str | os.PathLike) -> str:
    """Writes report.txt, report.md and the figures into `workdir`, and the scores and a model card into its bundle.

    Returns the text table. Raises InputError where an input is missing or incomplete; nothing is written then.
    """
    workdir = epath.Path(workdir)
    run = _read_run(workdir)
    text, markdown = format_table(run.report), markdown_table(run.report)
    paths = _draw(run, workdir / "figures")
    links = "".join(f"\n![{path.stem.replace('_', ' ')}](figures/{path.name})\n" for path in paths)
    files.write_text(workdir / "report.txt", text)
    files.write_text(workdir / "report.md", markdown + links)
    files.write_text(workdir / "bundle" / "report.json", json.dumps(run.report, indent=2) + "\n")
    files.write_text(workdir / "bundle" / "README.md", model_card(run.report, run.voxels))
    return text


def model_card(report: dict[str, Any], voxels: Voxels) -> str:
    """What a bundle is, in Markdown: whose brain, in which units, how to use it, and its scores beside baselines."""
    return f"""# Synthetic fMRI of {voxels.subject}

A BrainVAE and a semantic-to-neural mapper, trained with synbrain_jax on {report["dataset"]}. They give the responses of
{report["n_voxels"]:,} voxels of this one person to a stimulus, from its tokens; units and voxel order are those of that
data set (normalisation: {voxels.normalisation}). For another person they say nothing without adaptation.

```python
from synbrain_jax import load_pretrained

model = load_pretrained("this folder")
fmri = model.predict(tokens)  # [stimuli, voxels]
```

{markdown_table(report)}"""


def machine() -> str:
    """What this program runs on, in words: "1 x cpu (2 cores), jax 0.10.2"."""
    device = jax.devices()[0].device_kind
    return f"{jax.device_count()} x {device} ({os.cpu_count()} cores), jax {jax.__version__}"


def _draw(run: _Run, folder: epath.Path) -> list[epath.Path]:
    arrays, voxels = run.arrays, run.voxels
    stimuli, ceiling = arrays["stimulus_id"], arrays.get("voxel_r_ceiling")
    target, prediction = metrics.centred(arrays["target"]), metrics.centred(arrays["prediction"])
    title = f"{run.report['dataset']}, {run.report['split']} split"
    drawn = {
        "loss_curves": figures.loss_curves(run.stages),
        "patterns": figures.patterns(stimuli, target, prediction, voxels, title),
        "voxel_r": figures.voxel_r(arrays["voxel_r"], ceiling, len(stimuli), voxels, title),
        "samples": figures.samples_and_trials(
            arrays["sampled_id"], arrays["trials"], arrays["trial_stimulus"], arrays["samples"], ceiling, voxels, title
        ),
    }
    if run.report.get("rois"):
        drawn["regions"] = brain_figures.regions(run.report["rois"], title)
    if brain_figures.is_volume(voxels):
        drawn["slices"] = brain_figures.slices(stimuli, target, prediction, arrays["voxel_r"], ceiling, voxels, title)
    for name, figure in drawn.items():
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=figures.DPI)
        files.write_bytes(folder / f"{name}.png", png.getvalue())
    return [folder / f"{name}.png" for name in drawn]
