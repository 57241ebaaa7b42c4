"""What the studies share: their settings, data sets that are prepared once, and systems that are trained once.

A folder of studies has `data/`, `systems/` (each trained system, found again by what it was trained on and how) and one
folder for each study. What is there is not done again.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from synbrain_jax import run, stages
from synbrain_jax.checkpoint import check_workdir, claim_workdir
from synbrain_jax.config import Config
from synbrain_jax.data import open_data
from synbrain_jax.data.pairs import Dataset, load_trials
from synbrain_jax.document import Document, Section
from synbrain_jax.errors import InputError
from synbrain_jax.run_files import facts
from synbrain_jax.sharding import make_mesh
from synbrain_jax.statistics import Estimate
from synbrain_jax.synthesis import SynBrain, load_pretrained
from synbrain_jax.training import check_batch_sizes


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a study was asked for."""

    config: Config
    workdir: epath.Path
    """Of all studies."""
    seeds: tuple[int, ...] = (0, 1, 2)
    command: str = ""
    quick: bool = False
    """Fewer amounts, draws and samples, to see that everything runs."""
    categories: str | None = None
    """Of the study of consistency: a .csv or .npz with stimulus_id and category; None: see `categories_of` there."""

    def __post_init__(self):
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"seeds are {self.seeds}; expected one or more, each once")

    def folder(self, study: str) -> epath.Path:
        """Where a study leaves its document and figures."""
        return self.workdir / f"{study}-{self.config.name}"


def open_subjects(settings: Settings) -> list[Dataset]:
    """The config's data sets, one for each subject, prepared once for all studies of the same data."""
    data = settings.config.data
    told = hashlib.sha256(json.dumps(dataclasses.asdict(dataclasses.replace(data, subjects=()))).encode())
    return open_data(data, settings.workdir / "data" / f"{data.builder}-{told.hexdigest()[:8]}")


def check_unseen(new: Dataset, sources: Sequence[Dataset]) -> None:
    """Raises InputError if a test stimulus of `new` is one that only a source has learnt from or chosen by.

    Stimuli that `new`, or the part of it that is given, learns from itself, as where few of them repeat, are no secret.
    """
    secret = set(new.stimulus_ids("test")) - set(new.stimulus_ids("train"))
    for source in sources:
        if seen := sorted(secret.intersection(source.stimulus_ids("train") + source.stimulus_ids("validation"))):
            raise InputError(
                f"{len(seen)} test stimuli of {new.name}, '{seen[0]}' among them, are training or validation stimuli "
                f"of {source.name}, from which the study begins; prepare both with a `split` that holds the same out"
            )


def homes(settings: Settings, seed: int, datasets: Sequence[Dataset], **changes) -> list[epath.Path]:
    """The folder of each subject's system, where `trained` keeps it, and beside it what else is known of it."""
    return stages.folders(_workdir(settings, _config(settings, seed, datasets, changes), datasets), datasets)


def trained(settings: Settings, seed: int, datasets: Sequence[Dataset], **changes) -> list[SynBrain]:
    """The system of each subject's data set, trained on all of them together as train.py does, if it is not there.

    Args:
        changes: fields of `Config` that are other than in the settings.
    """
    config = _config(settings, seed, datasets, changes)
    workdir = _workdir(settings, config, datasets)
    places = stages.folders(workdir, datasets)
    mesh = mesh_of(settings)
    if all((home / "bundle").exists() for home in places):
        systems = [load_pretrained(home / "bundle", mesh) for home in places]
        for system, dataset, home in zip(systems, datasets, places, strict=True):
            _check_same_brain(system, dataset, home)
        return systems
    check_batch_sizes(config, mesh)
    stages.check_starts(config)
    check_workdir(workdir, config)
    claim_workdir(workdir, config)
    validation = [load_trials(dataset, "validation") for dataset in datasets]
    models = run.train(config, datasets, validation, mesh, workdir)
    return [
        run.export(config, models, number, dataset, validation[number], mesh, home)
        for number, (dataset, home) in enumerate(zip(datasets, places, strict=True))
    ]


def _check_same_brain(system: SynBrain, dataset: Dataset, home: epath.Path) -> None:
    """Raises InputError for other voxels: stimuli and numbers of trials do not tell two simulations apart."""
    known, given = system.bundle.voxels, dataset.voxels
    same = len(known.order) == len(given.order) and (known.ncsnr is None) == (given.ncsnr is None)
    if not same or (known.ncsnr is not None and not np.array_equal(known.ncsnr, given.ncsnr, equal_nan=True)):
        raise InputError(
            f"{home}: trained on other measurements of the same stimuli than {dataset.path}; give these studies "
            "another --workdir, or the config another name (--change name=...)"
        )


def mesh_of(settings: Settings) -> Mesh:
    """All devices, as the config arranges them."""
    sizes = settings.config.mesh
    return make_mesh(sizes.data, sizes.fsdp, sizes.tensor)


def _config(settings: Settings, seed: int, datasets: Sequence[Dataset], changes: dict) -> Config:
    config = dataclasses.replace(settings.config, seed=seed, **changes)
    return config.for_tokens(datasets[0].token_shape).for_platform(jax.default_backend())


def _workdir(settings: Settings, config: Config, datasets: Sequence[Dataset]) -> epath.Path:
    """A folder for this config and these trials; where the data set's files are does not matter."""
    what = dataclasses.asdict(dataclasses.replace(config, seed=0))
    del what["data"], what["log_every"], what["mesh"], what["variability"]["samples"]
    told = hashlib.sha256(json.dumps(what, sort_keys=True).encode())
    for dataset in datasets:
        told.update(f"{dataset.name} {dataset.voxels.normalisation} {config.data.voxel_order}".encode())
        for split in ("train", "validation"):
            told.update(" ".join(dataset.stimulus_ids(split)).encode())
            told.update(dataset.trials_per_record(split).tobytes())
    subjects = "+".join(dataset.voxels.subject for dataset in datasets)
    return settings.workdir / "systems" / f"{config.name}-{subjects}-{told.hexdigest()[:8]}" / f"seed{config.seed}"


# ---- what goes on the page ---------------------------------------------------------------------------


def document(settings: Settings, title: str, started: float, sections: Sequence[Section]) -> Document:
    """A study's result. `started` is `time.monotonic()` of then; what was there before took none of its time."""
    made = facts(settings.command, time.monotonic() - started, settings.seeds)
    made["time of the last start"] = made.pop("time")
    return Document(f"{title}: {settings.config.name}", made, tuple(sections))


def mean_estimate(estimates: Sequence[Estimate]) -> Estimate | None:
    """Of several seeds: the mean of the values, and of the ends of their intervals; None if there are none."""
    if not estimates:
        return None
    ends = [[getattr(one, end) for one in estimates] for end in ("value", "low", "high")]
    return Estimate(*(None if None in values else float(np.mean(values)) for values in ends))
