"""Data sets in one example format: TFDS builders that write it, and the grain pipeline that reads it."""

import os

from synbrain_jax.config import DataConfig


def prepare_data(config: DataConfig, folder: str | os.PathLike) -> os.PathLike:
    """Writes the configured data set under `folder` unless it is there; returns the prepared folder.

    Raises InputError when the user's arrays cannot be used.
    """
    # Imported here so that the models can be used where TFDS is not installed.
    if config.builder == "haxby2001":
        from synbrain_jax.data.haxby import prepare_haxby

        return prepare_haxby(folder, permute=config.permute)
    from synbrain_jax.data.arrays import prepare_arrays

    return prepare_arrays(
        config.source,
        folder,
        name="run",
        normalisation=config.normalisation,
        test_runs=config.test_runs,
        validation_runs=config.validation_runs,
        permute=config.permute,
    )
