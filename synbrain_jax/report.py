"""Tables, figures and pages of finished runs and studies, made from the files in their folders and nothing else.

`format_table` and `markdown_table` print the scores of `report.json`; `write_figures` draws a run; `write_report` does
both and makes a page of it; `write_page` makes one of several runs and studies.
"""

import io
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath
from matplotlib.figure import Figure

from synbrain_jax import brain_figures, figures, files, metrics
from synbrain_jax.data.voxels import Voxels
from synbrain_jax.document import FILE as DOCUMENT
from synbrain_jax.document import cell_text, load, read_figures
from synbrain_jax.page import html, markdown
from synbrain_jax.run_document import MAIN_COLUMNS, NAMES, SHARE_COLUMNS, TRIAL_COLUMNS, group_runs, run_document
from synbrain_jax.run_files import Run, read_run

PAGE = "report.html"
TRIAL_HEADING = "Against single trials, the columns of the SynBrain paper:"


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
        rows = [[name, *(cell_text(_number(report, name, metric)) for metric, _, _ in columns)] for name in names]
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
        medians = [cell_text(content["rows"].get(name, {}).get("voxel_r_median")) for name in names]
        share = cell_text(content["rows"]["model"].get("voxel_r_normalised_median"))
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
        lines.append(f"Control {name}: {cell_text(value)}")
    if report.get("gain") == 0:
        lines.append("The gain fitted on validation is 0: the model predicts no difference between stimuli.")
    return lines


# ---- the report --------------------------------------------------------------------------------------


def write_figures(workdir: str | os.PathLike) -> list[epath.Path]:
    """Draws loss_curves, patterns, voxel_r, samples, regions, slices into `workdir/figures/*.png`; returns the paths.

    No regions where the data set names none; no slices where the voxels lie in one slice or their places are unknown.
    All inputs are read before the first file is written. Raises InputError where one is missing.
    """
    return _write_pictures(_drawn(read_run(workdir)), epath.Path(workdir) / "figures")


def write_report(workdir: str | os.PathLike) -> str:
    """Writes report.html, report.txt, report.md and the figures of a run, and scores and a model card into its bundle.

    Returns the text table. Raises InputError where an input is missing or incomplete; nothing is written then.
    """
    workdir = epath.Path(workdir)
    run = read_run(workdir)
    text, pictures = format_table(run.report), _drawn(run)
    page = html([run_document([run], tuple(pictures))], [pictures])
    paths = _write_pictures(pictures, workdir / "figures")
    links = "".join(f"\n![{path.stem.replace('_', ' ')}](figures/{path.name})\n" for path in paths)
    files.write_text(workdir / "report.txt", text)
    files.write_text(workdir / "report.md", markdown_table(run.report) + links)
    files.write_text(workdir / PAGE, page)
    files.write_text(workdir / "bundle" / "report.json", json.dumps(run.report, indent=2) + "\n")
    files.write_text(workdir / "bundle" / "README.md", model_card(run.report, run.voxels))
    return text


def write_study(folder: str | os.PathLike) -> str:
    """Writes report.html and report.md of the study whose document is in `folder`; returns the latter."""
    folder = epath.Path(folder)
    document = load(folder)
    page, text = html([document], [read_figures(document, folder)]), markdown([document])
    files.write_text(folder / PAGE, page)
    files.write_text(folder / "report.md", text)
    return text


def write_page(folders: Sequence[str | os.PathLike], out: str | os.PathLike) -> epath.Path:
    """Writes `out`/report.html, report.md and figures/ of several studies and training runs; returns the page's path.

    Studies come first. Runs that differ by their seed alone stand in one table. Raises InputError where an input is
    missing or incomplete, or a seed is given twice; nothing is written then.
    """
    out = epath.Path(out)
    found = [part for folder in folders for part in run_folders(folder)]
    entries = [(document := load(at), read_figures(document, at)) for at in found if is_study(at)]
    for group in group_runs([read_run(at) for at in found if not is_study(at)]):
        pictures = _drawn(group[0])
        entries.append((run_document(group, tuple(pictures)), pictures))
    documents, pictures = zip(*entries, strict=True)
    places = [f"figures/{number}-{_slug(document.title)}/" for number, document in enumerate(documents, start=1)]
    page, text = html(documents, pictures), markdown(documents, places)
    for place, drawn in zip(places, pictures, strict=True):
        _write_pictures(drawn, out / place)
    files.write_text(out / "report.md", text)
    files.write_text(out / PAGE, page)
    return out / PAGE


def is_study(folder: str | os.PathLike) -> bool:
    """Whether a study, rather than a training run, left its results there."""
    return (epath.Path(folder) / DOCUMENT).exists()


def run_folders(folder: str | os.PathLike) -> list[epath.Path]:
    """The folder itself, or those in it: of subjects that were trained together, or of studies."""
    folder = epath.Path(folder)
    if folder.exists() and not is_study(folder) and not (folder / "report.json").exists():
        inside = {path.parent for name in ("report.json", DOCUMENT) for path in folder.glob(f"*/{name}")}
        return sorted(inside) or [folder]
    return [folder]


def _slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower())[:40].strip("-")


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


def _drawn(run: Run) -> dict[str, bytes]:
    """The figures of a run as PNG, by name."""
    arrays, voxels = run.arrays, run.voxels
    stimuli, ceiling = arrays["stimulus_id"], arrays.get("voxel_r_ceiling")
    target, prediction = metrics.centred(arrays["target"]), metrics.centred(arrays["prediction"])
    title = f"{run.report['dataset']}, {run.report['split']} split"
    kind = "calibrated samples" if run.calibrated else "samples of BrainVAE's posterior"
    drawn = {
        "loss_curves": figures.loss_curves(run.stages),
        "patterns": figures.patterns(stimuli, target, prediction, voxels, title),
        "voxel_r": figures.voxel_r(arrays["voxel_r"], ceiling, len(stimuli), voxels, title),
        "samples": figures.samples_and_trials(
            *(arrays[name] for name in ("sampled_id", "trials", "trial_stimulus", "samples")),
            ceiling,
            voxels,
            title,
            kind,
        ),
    }
    if run.report.get("rois"):
        drawn["regions"] = brain_figures.regions(run.report["rois"], title)
    if brain_figures.is_volume(voxels):
        drawn["slices"] = brain_figures.slices(stimuli, target, prediction, arrays["voxel_r"], ceiling, voxels, title)
    return {name: _png(figure) for name, figure in drawn.items()}


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=figures.DPI)
    return buffer.getvalue()


def _write_pictures(pictures: Mapping[str, bytes], folder: epath.Path) -> list[epath.Path]:
    for name, png in pictures.items():
        files.write_bytes(folder / f"{name}.png", png)
    return [folder / f"{name}.png" for name in pictures]
