"""Experiments by name, file or run: what `train.py` takes, and `synbrain plan`."""

import importlib.util
import json
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro
from tyro.conf import arg

from synbrain_jax.config import Config, nearest
from synbrain_jax.distributed import Processes, start
from synbrain_jax.errors import InputError
from synbrain_jax.files import read_text


def plan(
    config: tyro.conf.Positional[Path],
    topology: str,
    change: tuple[str, ...] = (),
    voxels: int = 15_724,
    samples: int = 32,
    programs: tuple[Literal["stage1", "stage2", "synthesis", "encoding"], ...] = (
        "stage1",
        "stage2",
        "synthesis",
        "encoding",
    ),
) -> None:
    """Say whether a run fits a TPU slice or GPUs, and how long it takes at the least, without having them.

    Compiles the steps of both stages, synthesis and image encoding for that machine (minutes for each), and prints what
    each chip holds, computes and sends. Needs XLA's compiler for it: the extra tpu or cuda12.

    Args:
        config: Name of a file in configs/, path of such a file, or a run's config.json.
        topology: v5e:2x4, v5p:4x4x4, h100:8, ...
        change: Settings to change, as stage1.batch_size=1024 mesh.tensor=2 brain_vae.remat=true.
        voxels: Of the brain; hardly matters.
        samples: Pictures at once in synthesis and encoding, on all chips together.
        programs: What to compile.
    """
    from synbrain_jax import plan as planning

    jax.config.update("jax_platforms", "cpu")  # or it would look for the devices that it compiles for
    settings = changed_config(named_config(config), change)
    print(planning.plan(settings, topology, voxels=voxels, samples=samples, programs=programs))


def named_config(where: Path) -> Config:
    """The config of a name, an experiment's file, or a run's config.json."""
    if where.suffix == ".json":
        return Config.from_json(read_text(where))
    path = where if where.suffix == ".py" else Path("configs") / f"{where}.py"
    if not path.is_file():
        known = sorted(found.stem for found in path.parent.glob("*.py"))
        raise InputError(f"{where}: there is no experiment {path}{nearest(path.stem, known) if known else ''}")
    return _experiment(path).config


def changed_config(config: Config, changes: Sequence[str]) -> Config:
    """`config` with settings such as "stage1.batch_size=1024"; values as in JSON, or plain text."""
    tree = json.loads(config.to_json())
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals:
            raise InputError(f"--change {change}: expected a setting and a value, as in stage1.batch_size=1024")
        *parents, last = name.split(".")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        try:
            place[last] = json.loads(value)
        except json.JSONDecodeError:
            place[last] = value
    return Config.from_json(json.dumps(tree))


_ONE_PROCESS = Processes()


def run_settings(arguments: list[str], folder: Path) -> tuple[Config, Path]:
    """Configuration and workdir of `train.py NAME [--workdir DIR] [--section.field value ...]`; `folder` holds NAME.py.

    Joins the other processes, where `--distributed` says that there are any. Raises InputError for an unknown NAME, or
    if they are not found; unknown or misspelt options end the program with a suggestion.
    """
    known = sorted(path.stem for path in folder.glob("*.py"))
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: train.py NAME [options]\n\nNAME is one of: {', '.join(known)}\nOptions: train.py NAME --help")
        raise SystemExit(0)
    name = arguments[0]
    if name not in known:
        raise InputError(f"{name!r} is not an experiment in {folder.name}/{nearest(name, known)}")
    module = _experiment(folder / f"{name}.py")

    def settings(
        config: Annotated[Config, arg(name="")] = module.config,
        workdir: Path = Path("runs") / name,
        processes: Annotated[Processes, arg(name="")] = _ONE_PROCESS,
    ):
        return config, workdir, processes

    *result, processes = tyro.cli(settings, args=arguments[1:], prog=f"train.py {name}", description=module.__doc__)
    start(processes)
    return tuple(result)


def _experiment(path: Path) -> types.ModuleType:
    """The module of a file in configs/."""
    spec = importlib.util.spec_from_file_location(f"configs.{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
