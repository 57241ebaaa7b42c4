"""Command lines: `synbrain VERB`, and what `train.py` takes."""

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import tyro

from synbrain_jax.config import Config, nearest
from synbrain_jax.errors import InputError


@contextlib.contextmanager
def exit_on_input_error() -> Iterator[None]:
    """Turns wrong input into one line on stderr and exit code 2."""
    try:
        yield
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def run_settings(arguments: list[str], folder: Path) -> tuple[Config, Path]:
    """Configuration and workdir of `train.py NAME [--workdir DIR] [--section.field value ...]`; `folder` holds NAME.py.

    Raises InputError for an unknown NAME; unknown or misspelt options end the program with a suggestion.
    """
    known = sorted(path.stem for path in folder.glob("*.py"))
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: train.py NAME [options]\n\nNAME is one of: {', '.join(known)}\nOptions: train.py NAME --help")
        raise SystemExit(0)
    name = arguments[0]
    if name not in known:
        raise InputError(f"{name!r} is not an experiment in {folder.name}/{nearest(name, known)}")
    spec = importlib.util.spec_from_file_location(f"configs.{name}", folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def settings(
        config: Annotated[Config, tyro.conf.arg(name="")] = module.config, workdir: Path = Path("runs") / name
    ):
        return config, workdir

    return tyro.cli(settings, args=arguments[1:], prog=f"train.py {name}", description=module.__doc__)
