"""`synbrain experiment` and `synbrain report`: studies, and pages of what studies and training runs found."""

import shlex
from pathlib import Path
from typing import Literal

import tyro
from etils import epath

from synbrain_jax.cli.experiments import changed_config, named_config
from synbrain_jax.errors import InputError


def experiment(
    study: tyro.conf.Positional[Literal["encode", "adapt", "augment", "consistency"]],
    config: tyro.conf.Positional[Path],
    change: tuple[str, ...] = (),
    workdir: Path = Path("studies"),
    seeds: tuple[int, ...] = (0, 1, 2),
    quick: bool = False,
    categories: Path | None = None,
) -> None:
    """Run a study with several seeds, from data to a page; given again after a stop, it goes on.

    encode: prediction of unseen stimuli and of the spread of trials, beside baselines and noise ceiling. adapt: another
    brain, from little data. augment: decoding with synthetic data. consistency: across trials and subjects, category
    selectivity, geometry. Prints tables and claims; writes report.html, report.md, figures and document.json.

    Args:
        study: Which.
        config: Name of a file in configs/, path of such a file, or a run's config.json.
        change: Settings to change, as data.source=sim stage1.steps=200.
        workdir: Folder of all studies: they share data sets and trained systems.
        seeds: Of training, one system each.
        quick: Fewer amounts, draws and samples, to see that everything runs.
        categories: For consistency: .csv or .npz with stimulus_id and category.
    """
    from synbrain_jax.report import PAGE, write_study
    from synbrain_jax.studies import study_of
    from synbrain_jax.studies.common import Settings

    given = ["synbrain", "experiment", study, f"{config}"]
    given += ["--change", *change] if change else []
    given += ["--workdir", f"{workdir}", "--seeds", *map(str, seeds)]
    given += ["--quick"] if quick else []
    given += ["--categories", f"{categories}"] if categories else []
    settings = Settings(
        config=changed_config(named_config(config), change),
        workdir=epath.Path(workdir),
        seeds=seeds,
        command=shlex.join(given),
        quick=quick,
        categories=None if categories is None else f"{categories}",
    )
    document = study_of(study)(settings)
    folder = settings.folder(study)
    document.save(folder)
    print(write_study(folder))
    print(f"The page: {folder / PAGE}")


def report(runs: tyro.conf.Positional[tuple[Path, ...]], out: Path | None = None) -> None:
    """Draw the figures and tables of finished runs again, or make one page of several runs and studies.

    Args:
        runs: Folders that train.py, `adapt` or `experiment` wrote.
        out: Folder for one page of all (report.html, report.md, figures/), in which runs that differ by their seed
            alone stand side by side. Without it, each has a page in its own folder.
    """
    from synbrain_jax.report import PAGE, is_study, run_folders, write_page, write_report, write_study

    if not runs:
        raise InputError(
            "no folder given; expected those of finished runs or studies, as in: synbrain report runs/haxby"
        )
    if out is not None:
        print(f"The page: {write_page(runs, out)}")
        return
    for folder in (folder for run in runs for folder in run_folders(run)):
        print(write_study(folder) if is_study(folder) else write_report(folder))
        print(f"The page: {folder / PAGE}")
