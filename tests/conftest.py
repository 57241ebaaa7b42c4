"""Test-wide settings: eight virtual CPU devices, strict ranks, and shapes checked on every public call."""

import gc
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import xla_flags

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = xla_flags.quick(devices=8)
# What one test has compiled, all others find, those of other workers and `train.py` among them.
os.environ["TESTS_COMPILED"] = os.environ.get("TESTS_COMPILED") or tempfile.mkdtemp(prefix="compiled")
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["TESTS_COMPILED"]
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"

import jax
import pytest
from jaxtyping import install_import_hook

# A tenth of the time would go into looking for garbage among what tracing leaves.
gc.set_threshold(100_000)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Every jaxtyping annotation of the package is checked at run time, in the tests only.
install_import_hook("synbrain_jax", "beartype.beartype")

ROOT = Path(__file__).parents[1]
collect_ignore = ["interop/samples/make_samples.py"]  # a program that needs torch
GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser):
    parser.addoption("--update-golden", action="store_true", help="write the texts in tests/golden anew")
    parser.addoption("--golden", metavar="DIR", type=Path, help="another folder of the released system's arrays")


def pytest_configure(config):
    import golden_set

    if config.getoption("--golden"):
        golden_set.folder = config.getoption("--golden").resolve(strict=True)


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):  # the process that waits for all workers
        shutil.rmtree(os.environ["TESTS_COMPILED"], ignore_errors=True)


def pytest_terminal_summary(terminalreporter):
    """The table of all comparisons with the released system's arrays."""
    from golden_set import format_table

    reports = [r for group in ("passed", "failed") for r in terminalreporter.getreports(group) if r.when == "call"]
    compared = [value for report in reports for name, value in report.user_properties if name == "golden"]
    if compared:
        terminalreporter.section("compared with the released system")
        for line in format_table(compared):
            terminalreporter.write_line(line)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: "slow" not in item.keywords)  # the longest first, so that no worker ends late


@pytest.fixture
def compare(request):
    """`golden_set.Comparisons` of this test."""
    from golden_set import Comparisons

    return Comparisons(request.node)


@pytest.fixture
def golden_text(request) -> Callable[[str, str], None]:
    """Compares a text with the one in tests/golden; with --update-golden, writes it there first."""

    def check(name: str, text: str) -> None:
        if request.config.getoption("--update-golden"):
            (GOLDEN / name).write_text(text)
        assert text == (GOLDEN / name).read_text(), f"{name} differs; if it should: python -m pytest --update-golden"

    return check


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory):
    """`tiny.write_experiment`, prepared."""
    from tiny import write_experiment

    from synbrain_jax.data.arrays import prepare_arrays
    from synbrain_jax.data.pairs import open_dataset

    folder = tmp_path_factory.mktemp("tiny")
    write_experiment(folder / "tiny.npz")
    return open_dataset(prepare_arrays(folder / "tiny.npz", folder / "data", name="tiny"))


@pytest.fixture(scope="session")
def two_subjects(tiny_dataset, tmp_path_factory):
    """`tiny_dataset`, and one of another brain: 35 voxels, and half as many stimuli."""
    from tiny import TRAIN_TRIALS, write_experiment

    from synbrain_jax.data.arrays import prepare_arrays
    from synbrain_jax.data.pairs import open_dataset

    folder = tmp_path_factory.mktemp("second")
    write_experiment(folder / "second.npz", columns=7, trials=TRAIN_TRIALS[:5], seed=1)
    return [tiny_dataset, open_dataset(prepare_arrays(folder / "second.npz", folder / "data", name="second"))]


@pytest.fixture(scope="session")
def start_training() -> Callable[..., subprocess.Popen]:
    """Starts `train.py` as a user does, but compiled as the tests are: a process of its own, one device, if `env` does
    not ask for more."""
    environment = {**os.environ, "XLA_FLAGS": xla_flags.quick()}

    def start(*arguments: str, **options) -> subprocess.Popen:
        command = [sys.executable, os.fspath(ROOT / "train.py"), *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        env = environment | options.pop("env", {})
        return subprocess.Popen(command, env=env, **pipes, **options)

    return start


@pytest.fixture(scope="session")
def train(start_training) -> Callable[..., str]:
    """Runs `train.py` to its end and returns what it printed; fails if it does not succeed."""

    def run(*arguments: str, **options) -> str:
        process = start_training(*arguments, **options)
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
        return out

    return run
