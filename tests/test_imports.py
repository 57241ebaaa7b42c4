"""Which room may import which, and what a bare `import synbrain_jax` must not bring along."""

import ast
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "synbrain_jax"

# Rooms from the ground up: a module imports only modules of lower floors, and on one floor nobody imports a neighbour.
FLOORS = [
    ["errors", "models.operations", "plan.hlo"],
    [
        "files",
        "distributed",
        "sharding",
        "losses",
        "metrics",
        "models.layers",
        "interop.torch_file",
        "interop.released_metrics",
        "interop.state_dicts",
        "preprocessing",
        "statistics",
        "plan.machines",
    ],
    [
        "models.brain_vae",
        "models.clip_vision",
        "models.semantic_to_neural",
        "models.token_decoder",
        "data.tokens",
        "data.voxels",
        "response_files",
        "data.simulated_brain",
        "variability",
        "document",
        "consistency",
    ],
    ["config", "page"],
    [
        "data.array_files",
        "data.nsd_files",
        "data.pairs",
        "data.pictures",
        "checkpoint",
        "figures",
        "progress",
        "interop.clip_weights",
        "interop.nifti",
    ],
    ["brain_figures", "data.nsd_download", "run_files", "studies.consistency_figures"],
    ["data.batches", "data.builder", "data.simulate", "synthesis", "training", "run_document", "baselines"],
    ["interop.torch_weights", "encoding", "decoding", "calibration", "report", "studies.augment_page"],
    ["interop.torch_training", "studies.consistency_page", "retrieval", "streaming"],
    ["data.arrays", "data.haxby", "data.nsd", "stages", "evaluation"],
    ["data", "plan.programs", "run"],
    ["plan.roofline", "adaptation", "studies.common"],
    ["plan", "studies", "studies.spread"],
    ["studies.adapt", "studies.augment", "studies.consistency", "studies.encode"],
    ["cli.adapt", "cli.compiled", "cli.convert", "cli.ending", "cli.experiments", "cli.prepare", "cli.systems"],
    ["cli.studies"],
    ["cli"],
]
NO_ROOM = {"__init__", "interop", "models"}  # they only name what is inside


def modules() -> dict[str, Path]:
    """Name within the package -> file; a folder goes by its own name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and parts[:-1] else parts)] = path
    return found


@cache
def imported(name: str) -> frozenset[str]:
    """What a module imports anywhere in its file, as full names; for `from x import y` also x.y."""
    names = set()
    for node in ast.walk(ast.parse(modules()[name].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            assert all(alias.name != "*" for alias in node.names), f"{name}: import *"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names)


def rooms(name: str) -> set[str]:
    """The rooms of the package that a module imports."""
    known = modules().keys() - NO_ROOM
    return {full.removeprefix("synbrain_jax.") for full in imported(name)} & known


def everything_below(name: str) -> set[str]:
    return rooms(name).union(*(everything_below(room) for room in rooms(name)))


def test_every_room_has_a_floor():
    assert sorted(room for floor in FLOORS for room in floor) == sorted(modules().keys() - NO_ROOM)


def test_imports_go_down_only():
    floor_of = {room: number for number, floor in enumerate(FLOORS) for room in floor}
    upwards = [(name, room) for name in floor_of for room in rooms(name) if floor_of[room] >= floor_of[name]]
    assert upwards == []


def test_leaves_and_models_know_nothing_of_the_rest():
    for leaf in ("errors", "files", "sharding", "losses", "metrics"):
        assert rooms(leaf) <= {"errors"}, leaf
    for name in modules():
        if name.startswith("models"):
            assert all(room == "errors" or room.startswith("models.") for room in rooms(name)), name


@pytest.mark.parametrize(
    ("room", "stranger"),
    [
        ("data.pairs", "training"),
        ("data", "training"),
        ("data", "synthesis"),
        ("training", "stages"),
        ("training", "data.pairs"),
        ("evaluation", "training"),
        ("evaluation", "stages"),
        ("synthesis", "training"),
        ("synthesis", "data.pairs"),
        ("report", "evaluation"),
        ("report", "training"),
        ("metrics", "losses"),
    ],
)
def test_neighbours_do_not_know_each_other(room, stranger):
    assert {room, stranger} <= modules().keys()
    assert stranger not in everything_below(room)


def test_the_training_loop_has_no_model_of_its_own():
    assert not {room for room in rooms("training") if room.startswith(("models", "losses", "data"))}


def test_nothing_but_the_program_imports_the_command_line():
    users = [name for name in modules() if any(full.startswith("synbrain_jax.cli") for full in imported(name))]
    assert [name for name in users if name.partition(".")[0] != "cli"] == []


def test_no_room_imports_torch_or_tensorflow():
    for name in modules():
        tops = {full.partition(".")[0] for full in imported(name)}
        assert not tops & {"torch", "tensorflow", "pickle"}, name


IMPORT_AND_REPORT = """
import json, socket, sys

def refuse(*args, **kwargs):
    raise AssertionError("a network call")

class Offline(socket.socket):
    connect = connect_ex = sendto = refuse

socket.socket, socket.getaddrinfo, socket.create_connection = Offline, refuse, refuse
before = set(sys.modules)
import synbrain_jax
public = {name: type(getattr(synbrain_jax, name)).__name__ for name in synbrain_jax.__all__}
print(json.dumps({"modules": sorted({m.partition(".")[0] for m in set(sys.modules) - before}), "public": public}))
"""


def test_the_package_alone_needs_no_data_library_no_plots_and_no_network():
    done = subprocess.run([sys.executable, "-c", IMPORT_AND_REPORT], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    heavy = {"orbax", "tensorflow_datasets", "grain", "transformers", "sklearn", "matplotlib", "torch", "tensorflow"}
    assert not heavy & set(result["modules"])
    assert {"synbrain_jax", "jax", "flax"} <= set(result["modules"])
    assert 10 <= len(result["public"]) <= 30
