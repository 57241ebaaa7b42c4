"""`synbrain prepare` and `synbrain simulate`: data sets."""

import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import arg, subcommand

from synbrain_jax.data.simulated_brain import Simulation
from synbrain_jax.errors import InputError


def _haxby2001(data_dir: Path, permute: Literal["none", "trial"] = "none") -> Callable[[], os.PathLike]:
    """The packaged slice of Haxby et al. (2001).

    Args:
        data_dir: Folder for prepared data sets.
        permute: "trial" permutes the stimulus labels of the training trials, as a control.
    """
    from synbrain_jax.data.haxby import prepare_haxby

    return functools.partial(prepare_haxby, data_dir, permute=permute)


def _arrays(
    source: Path,
    data_dir: Path,
    name: str = "arrays",
    normalisation: Literal["none", "run_zscore", "scale2000"] = "none",
    validation_runs: tuple[int, ...] = (),
    test_runs: tuple[int, ...] = (),
    permute: Literal["none", "trial"] = "none",
    tokens: Path | None = None,
) -> Callable[[], os.PathLike]:
    """Your own experiment.

    Args:
        source: An .npz file, or a folder of .npy files: fmri, tokens, stimulus_id, run, ...
        data_dir: Folder for prepared data sets.
        name: Name of this one.
        normalisation: "run_zscore" z-scores each voxel within each run; "scale2000" divides by 2000.
        validation_runs: Runs held out for validation.
        test_runs: Runs held out for the test.
        permute: "trial" permutes the stimulus labels of the training trials, as a control.
        tokens: Folder that `encode-images` wrote, in place of the arrays tokens and tokens_stimulus_id.
    """
    from synbrain_jax.data.arrays import prepare_arrays

    return functools.partial(
        prepare_arrays,
        source,
        data_dir,
        name=name,
        normalisation=normalisation,
        validation_runs=validation_runs,
        test_runs=test_runs,
        permute=permute,
        tokens=tokens,
    )


def _nsd(
    root: Path,
    subject: int,
    data_dir: Path | None = None,
    tokens: Path | None = None,
    normalisation: Literal["session_zscore", "scale2000", "none"] = "session_zscore",
    test: Literal["shared", "test515"] = "shared",
    validation_share: float = 0.1,
    betas: str = "betas_fithrf_GLMdenoise_RR",
    permute: Literal["none", "trial"] = "none",
    seed: int = 0,
    show: Annotated[bool, arg(name="list")] = False,
    download: bool = False,
) -> Callable[[], os.PathLike | str]:
    """A subject of the Natural Scenes Dataset, from the files that NSD publishes. Given again after a stop, it goes on.

    Args:
        root: Folder with NSD's own layout: nsddata, nsddata_betas.
        subject: 1 to 8.
        data_dir: Folder for prepared data sets.
        tokens: Folder that `encode-images` wrote from nsd_stimuli.hdf5.
        normalisation: "session_zscore" z-scores each voxel within each session; "scale2000" divides what the files hold
            by 2000, as the SynBrain release does; "none" is percent signal change.
        test: "shared" tests on the 1,000 pictures that were meant for all subjects; "test515" on the 515 that all saw
            three times, and validates on the other shared ones.
        validation_share: Of the pictures that are not shared.
        betas: Version of the betas.
        permute: "trial" permutes the stimulus labels of the training trials, as a control.
        seed: Of the validation pictures and of the permutation.
        show: Print the files in NSD's bucket that this subject needs, and stop.
        download: Fetch those files into `root`, and stop. NSD asks you to agree to its terms first.
    """
    if show or download:
        from synbrain_jax.data import nsd_download

        return functools.partial(nsd_download.show if show else nsd_download.download, root, subject, betas=betas)
    if data_dir is None or tokens is None:
        raise InputError("--data-dir and --tokens: both are needed, except with --list or --download")
    from synbrain_jax.data.nsd import prepare_nsd

    return functools.partial(
        prepare_nsd,
        root,
        subject,
        data_dir,
        tokens=tokens,
        normalisation=normalisation,
        test=test,
        validation_share=validation_share,
        betas=betas,
        seed=seed,
        permute=permute,
    )


_Prepare = (
    Annotated[Callable, subcommand("haxby2001", constructor=_haxby2001)]
    | Annotated[Callable, subcommand("arrays", constructor=_arrays)]
    | Annotated[Callable, subcommand("nsd", constructor=_nsd)]
)


def prepare(data: Annotated[_Prepare, arg(name="")]) -> None:
    """Write a data set as the records that training reads, and print its folder."""
    print(data())


def simulate(
    layout: tyro.conf.Positional[Literal["nsd"]], out: Path, settings: Annotated[Simulation, arg(name="")]
) -> None:
    """Simulate an experiment with a known truth, to learn the commands or to test a model.

    Args:
        layout: "nsd": files, units and indices as in the Natural Scenes Dataset.
        out: New folder for it.
    """
    from synbrain_jax.data.simulate import simulate_nsd, statement

    print(statement(simulate_nsd(out, **dataclasses.asdict(settings))))
