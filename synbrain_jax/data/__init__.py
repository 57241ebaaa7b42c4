"""Data sets in one example format: TFDS builders that write it, and the grain pipeline that reads it."""

import os
import re
from pathlib import Path

from synbrain_jax.config import DataConfig
from synbrain_jax.data.pairs import Dataset, open_dataset
from synbrain_jax.errors import InputError


def open_data(config: DataConfig, folder: str | os.PathLike) -> list[Dataset]:
    """The configured data set of each subject, prepared under `folder` unless it is there, and limited as configured.

    Raises InputError when it cannot be used, or when the subjects' do not go together.
    """
    datasets = [open_dataset(path).limited(config.sessions, config.stimuli) for path in prepare_data(config, folder)]
    first, *others = datasets
    for other in others:
        if other.token_shape != first.token_shape:
            raise InputError(
                f"{other.path}: tokens are {list(other.token_shape)}, but {list(first.token_shape)} in {first.path}; "
                "one model needs the same encoder for all subjects"
            )
    names = [dataset.voxels.subject for dataset in datasets]
    if len(set(names)) < len(names):
        raise InputError(f"the subjects are {', '.join(names)}; each must come once")
    return datasets


def prepare_data(config: DataConfig, folder: str | os.PathLike) -> list[str | os.PathLike]:
    """Writes the configured data set of each subject under `folder` unless it is there; returns the prepared folders.

    Raises InputError when the user's files cannot be used.
    """
    # The builders are imported here, so that the models can be used where TFDS is not installed.
    if config.builder == "haxby2001":
        from synbrain_jax.data.haxby import prepare_haxby

        return [prepare_haxby(folder, permute=config.permute)]
    if config.source is None:
        what = {
            "arrays": "your .npz file or folder of .npy files",
            "nsd": "the folder that has nsddata and nsddata_betas",
            "prepared": "the prepared folder",
        }
        raise InputError(
            f"data.source is not given; data.builder {config.builder!r} needs {what[config.builder]}: "
            "--data.source PATH"
        )
    if config.builder == "prepared":
        return [config.source, *config.more_sources]
    if config.builder == "nsd":
        return _prepare_nsd(config, folder)
    from synbrain_jax.data.arrays import prepare_arrays

    prepared = prepare_arrays(
        config.source,
        folder,
        name=re.sub(r"[^\w.-]", "_", Path(config.source).stem, flags=re.ASCII),
        normalisation=config.normalisation,
        test_runs=config.test_runs,
        validation_runs=config.validation_runs,
        permute=config.permute,
        tokens=config.tokens,
    )
    return [prepared]


def _prepare_nsd(config: DataConfig, folder: str | os.PathLike) -> list[str | os.PathLike]:
    from synbrain_jax.data.nsd import prepare_nsd

    if config.tokens is None:
        raise InputError(
            "data.tokens is not given; data.builder 'nsd' needs the folder that `synbrain encode-images` wrote from "
            "nsd_stimuli.hdf5: --data.tokens PATH"
        )
    if not config.subjects:
        raise InputError("data.subjects is empty; expected at least one of 1 to 8: --data.subjects 1")
    options = dict(
        tokens=config.tokens,
        normalisation=config.normalisation,
        test=config.test,
        validation_share=config.validation_share,
        betas=config.betas,
        permute=config.permute,
    )
    return [prepare_nsd(config.source, subject, folder, **options) for subject in config.subjects]
