"""Studies: what is claimed of such models, tried from data to tables with several seeds; see `synbrain experiment`."""

import importlib
from collections.abc import Callable

# Each is a module here with a function `study`; imported when it is run.
STUDIES = ("encode", "adapt", "augment", "consistency")


def study_of(name: str) -> Callable:
    """The function of a study: from `common.Settings` to a `document.Document`."""
    return importlib.import_module(f"synbrain_jax.studies.{name}").study
