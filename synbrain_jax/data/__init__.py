"""Data sets in one example format: TFDS builders that write it, and the grain pipeline that reads it."""

import os
import re
from pathlib import Path

from synbrain_jax.config import DataConfig
from synbrain_jax.errors import InputError


def prepare_data(config: DataConfig, folder: str | os.PathLike) -> str | os.PathLike:
    """Writes the configured data set under `folder` unless it is there; returns the prepared folder.

    Raises InputError when the user's arrays cannot be used.
    """
    # The builders are imported here, so that the models can be used where TFDS is not installed.
    if config.builder == "haxby2001":
        from synbrain_jax.data.haxby import prepare_haxby

        return prepare_haxby(folder, permute=config.permute)
    if config.source is None:
        what = "your .npz file or folder of .npy files" if config.builder == "arrays" else "the prepared folder"
        raise InputError(f"data.source is not given; data.builder {config.builder!r} needs {what}: --data.source PATH")
    if config.builder == "prepared":
        return config.source
    from synbrain_jax.data.arrays import prepare_arrays

    return prepare_arrays(
        config.source,
        folder,
        name=re.sub(r"[^\w.-]", "_", Path(config.source).stem, flags=re.ASCII),
        normalisation=config.normalisation,
        test_runs=config.test_runs,
        validation_runs=config.validation_runs,
        permute=config.permute,
        tokens=config.tokens,
    )
