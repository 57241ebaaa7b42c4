"""What a finished run left in its folder, read back and checked; and the facts of how it was made.

Apart from `report.py` and `run_document.py`, which show it.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from synbrain_jax import figures, files
from synbrain_jax.config import Config
from synbrain_jax.data.voxels import Voxels
from synbrain_jax.errors import InputError

STAGES = {"stage1": "Stage 1, BrainVAE", "stage2": "Stage 2, semantic-to-neural mapper"}
FACTS = "facts.json"


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """One subject's part of a finished run: report.json, predictions.npz, the bundle's voxels and configuration, the
    curves of both stages, and facts.json (empty where nobody wrote it)."""

    workdir: epath.Path
    report: dict[str, Any]
    arrays: dict[str, np.ndarray]
    voxels: Voxels
    stages: dict[str, figures.Curves]
    config: Config | None
    facts: dict[str, str]

    @property
    def calibrated(self) -> bool:
        """Whether its samples are calibrated, or of BrainVAE's posterior."""
        return "calibration" in self.report


def read_run(workdir: str | os.PathLike) -> Run:
    """The run in a folder. Raises InputError where a file is missing or incomplete, naming it and its command."""
    workdir = epath.Path(workdir)
    report = _read_json(workdir / "report.json", workdir)
    missing = {"dataset", "split", "n_stimuli", "n_trials", "n_voxels", "scores"} - report.keys()
    if missing:
        raise InputError(
            f"{workdir / 'report.json'}: no field {', '.join(sorted(missing))}; run `synbrain evaluate` again"
        )
    arrays = _read_arrays(_need(workdir / "predictions.npz", workdir))
    # Where several subjects were trained together, the folder of one is within the run's.
    trained = next((folder for folder in (workdir, workdir.parent) if (folder / "stage1").exists()), workdir)
    config, facts = workdir / "bundle" / "config.json", workdir / FACTS
    return Run(
        workdir=workdir,
        report=report,
        arrays=arrays,
        voxels=_read_voxels(workdir, arrays["voxel_r"].size),
        stages={title: read_curves(trained, stage) for stage, title in STAGES.items()},
        config=Config.from_json(files.read_text(config)) if config.exists() else None,
        facts=_read_json(facts, workdir) if facts.exists() else {},
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


# ---- facts -----------------------------------------------------------------------------------------


def machine() -> str:
    """What this program runs on, in words: "1 x cpu (2 cores), jax 0.10.2"."""
    device = jax.devices()[0].device_kind
    return f"{jax.device_count()} x {device} ({os.cpu_count()} cores), jax {jax.__version__}"


def facts(command: str, seconds: float, seeds: Sequence[int]) -> dict[str, str]:
    """How something was made, in words: command, seeds, time, date (UTC), machine, versions."""
    libraries = [f"{name} {importlib.metadata.version(name)}" for name in ("synbrain-jax", "jax", "flax", "numpy")]
    return {
        "command": f"`{command}`",
        "seeds": ", ".join(map(str, seeds)),
        "time": f"{seconds:.0f} s",
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        "machine": machine(),
        "versions": ", ".join([*libraries, f"Python {platform.python_version()}"]),
    }


def write_facts(workdir: str | os.PathLike, command: str, seconds: float, seed: int) -> None:
    """Writes the facts of a run into its folder, where it has none yet: of several starts, that which finished it."""
    path = epath.Path(workdir) / FACTS
    if not path.exists():
        files.write_text(path, json.dumps(facts(command, seconds, [seed]), indent=2) + "\n")
