"""Several processes that train as one, started as a user starts them, over gloo: the result, a stop, and a death."""

import contextlib
import json
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
import xla_flags

from synbrain_jax import distributed
from synbrain_jax.checkpoint import load_bundle
from synbrain_jax.cli import run_settings
from synbrain_jax.distributed import Processes, agreed, barrier, first_then_others, is_first, start, whole
from synbrain_jax.errors import InputError
from synbrain_jax.sharding import part_of_batch

ROOT = Path(__file__).parents[1]

# ---- options -------------------------------------------------------------------------------------


def test_without_options_there_is_one_process():
    start(Processes())
    assert is_first()
    assert not jax.distributed.is_initialized()
    barrier()
    with first_then_others():
        value = {"a": [1, None, "ü"], "b": float("inf")}
    assert agreed(value) is value
    array = jax.numpy.arange(3)
    assert whole({"a": array})["a"] is array


@pytest.fixture
def asked(monkeypatch):
    """What jax.distributed.initialize was called with."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **settings: calls.append(settings))
    yield calls
    jax.config.update("jax_enable_preemption_service", True)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (Processes("auto"), {}),
        (
            Processes("node1:1234", 2, 3),
            dict(
                coordinator_address="node1:1234",
                process_id=2,
                num_processes=3,
                cluster_detection_method="deactivate",
            ),
        ),
    ],
)
def test_jax_is_told_what_the_options_say(asked, options, expected):
    start(options)
    (settings,) = asked
    assert settings.pop("heartbeat_timeout_seconds") == 100
    assert settings.pop("shutdown_timeout_seconds") > 24 * 3600
    assert settings == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Processes(process_id=0), "--process-id and --processes need --distributed HOST:PORT"),
        (Processes(processes=2), "--process-id and --processes need --distributed HOST:PORT"),
        (
            Processes("auto", processes=2),
            "--distributed auto finds --process-id and --processes itself; leave them out",
        ),
        (Processes("node1", 0, 2), "--distributed is 'node1'; expected auto, or HOST:PORT such as 10.0.0.1:1234"),
        (Processes("n:12"), "--process-id is None and --processes None; with --distributed n:12 both are needed"),
        (Processes("n:12", 2, 2), "--process-id is 2 and --processes 2; .* counts from 0 to below the second"),
    ],
)
def test_options_that_do_not_fit_are_named(asked, options, message):
    with pytest.raises(InputError, match=f"^{message}"):
        start(options)
    assert asked == []


def test_where_no_cluster_is_found_the_message_says_what_to_give(monkeypatch):
    def initialize(**_):
        raise ValueError("coordinator_address should be defined.\nand more")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(InputError, match=r"^--distributed auto: the processes did not find each other \(coordinator_a"):
        start(Processes("auto"))
    jax.config.update("jax_enable_preemption_service", True)


@pytest.mark.parametrize(
    ("shape", "own", "fits"),
    [
        ((8, 1, 1), 4, True),
        ((2, 4, 1), 4, True),
        ((2, 4, 1), 2, True),
        ((1, 4, 2), 4, True),
        ((1, 1, 8), 8, True),
        ((1, 1, 8), 4, True),
        ((2, 2, 2), 1, True),
        ((4, 2, 1), 3, False),
        ((1, 2, 4), 6, False),
    ],
)
def test_a_process_has_a_block_of_the_mesh_and_reads_the_samples_of_its_devices(shape, own, fits):
    """Against the grid itself: nobody's devices have gaps, and who holds the same samples reads the same part."""
    grid = (np.arange(8) // own).reshape(shape)
    blocks = []
    for process in np.unique(grid):
        places = np.argwhere(grid == process)
        blocks.append(len(places) == np.prod(places.max(0) - places.min(0) + 1))
    if not fits or 8 % own:
        with pytest.raises(InputError, match=f"over processes of {own} devices: expected mesh.tensor, and "):
            part_of_batch(grid, 0)
        return
    assert all(blocks)
    samples = np.arange(shape[0] * shape[1])  # as many as parts
    for process in np.unique(grid):
        number, count = part_of_batch(grid, int(process))
        held = np.unique(np.argwhere(grid.reshape(len(samples), -1) == process)[:, 0])
        np.testing.assert_array_equal(samples.reshape(count, -1)[number], held)


# ---- two processes -------------------------------------------------------------------------------

TINY = shlex.split("""
    --brain-vae.pool-length 32 --brain-vae.channels 4 --brain-vae.channel-mult 2 --brain-vae.projector-width 16
    --mapper.depth 1 --log-every 1 --stage1.batch-size 8 --stage2.batch-size 8 --stage1.average-share 0.5
    --stage1.steps 12 --stage1.eval-every 4 --stage2.steps 8 --stage2.eval-every 4 --stage1.contrast-size 4
    --variability.ranks 0 1 --variability.samples 100
""")


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("experiment")
    tiny.write_experiment(folder / "tiny.npz")
    return ["arrays", "--data.source", str(folder / "tiny.npz"), *TINY]


def flags(devices: int) -> dict[str, str]:
    return {"XLA_FLAGS": xla_flags.quick(devices)}


def free_port() -> int:
    """In the range from which jax takes ports under SLURM."""
    for port in random.sample(range(61440, 65536), 100):
        with socket.socket() as tried, contextlib.suppress(OSError):
            tried.bind(("127.0.0.1", port))
            return port
    pytest.fail("no port is free")


def by_address(port: int, number: int) -> tuple[list[str], dict[str, str]]:
    return ["--distributed", f"127.0.0.1:{port}", "--processes", "2", "--process-id", str(number)], {}


def by_slurm(port: int, number: int) -> tuple[list[str], dict[str, str]]:
    job = {"JOB_ID": port - 61440, "STEP_NODELIST": "127.0.0.1", "NTASKS": 2, "PROCID": number, "LOCALID": number}
    return ["--distributed", "auto"], {f"SLURM_{name}": str(value) for name, value in job.items()}


@pytest.fixture(scope="module")
def start_two(start_training, arguments):
    def run(workdir: Path, found=by_address, more: Sequence[str] = ()) -> list[subprocess.Popen]:
        port, processes = free_port(), []
        for number in range(2):
            options, variables = found(port, number)
            command = [*arguments, "--workdir", str(workdir), *more, *options]
            processes.append(start_training(*command, env={**flags(1), **variables}))
        return processes

    return run


def ends(processes: list[subprocess.Popen], timeout: float = 900) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each."""
    try:
        outputs = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def wait_for(processes: list[subprocess.Popen], log: Path, step: int) -> None:
    """Returns when the log has reached `step`; fails if a process ends before."""
    while all(process.poll() is None for process in processes):
        steps = re.findall(r'"step": (\d+)', log.read_text()) if log.exists() else []
        if steps and int(steps[-1]) >= step:
            return
        time.sleep(0.002)
    pytest.fail(f"ended too early: {ends(processes)}")


@pytest.fixture(scope="module")
def one(start_training, arguments, tmp_path_factory):
    """The run of one process over as many devices."""
    workdir = tmp_path_factory.mktemp("one") / "workdir"
    (result,) = ends([start_training(*arguments, "--workdir", str(workdir), env=flags(2))])
    assert result[0] == 0, result[2]
    return workdir, result[1]


@pytest.fixture(scope="module")
def stopped(start_two, tmp_path_factory):
    """A run of two processes, of which the second got SIGTERM in stage 1."""
    workdir = tmp_path_factory.mktemp("two") / "workdir"
    processes = start_two(workdir)
    wait_for(processes, workdir / "stage1" / "metrics.jsonl", 1)
    processes[1].send_signal(signal.SIGTERM)
    return workdir, ends(processes)


def test_a_stop_of_one_process_stops_all_at_the_same_step(stopped):
    workdir, results = stopped
    assert [code for code, *_ in results] == [0, 0], results
    steps = [re.findall(r"stopped: stage1 is saved at step (\d+), and the same", err) for *_, err in results]
    assert steps[0] == steps[1]
    (step,) = steps[0]
    assert 2 <= int(step) < 12
    assert (workdir / "stage1" / "checkpoints" / step).exists()
    assert not (workdir / "stage1" / "selected.json").exists()


def relative(found, expected) -> float:
    """||found - expected|| / ||expected|| over all leaves."""
    pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True))
    off = sum(np.sum((np.asarray(a, np.float64) - np.asarray(b)) ** 2) for a, b in pairs)
    return float(np.sqrt(off / sum(np.sum(np.asarray(b, np.float64) ** 2) for _, b in pairs)))


def assert_same_run(found: Path, expected: Path, tolerance: float) -> None:
    """Losses and what was learnt, relative; correlations are near 0.

    Gradient norms and latents, sums of more numbers of either sign, within three times the tolerance.
    """
    for stage in ("stage1", "stage2"):
        logs = [tiny.log_of(folder / stage) for folder in (found, expected)]
        assert [line.keys() for line in logs[0]] == [line.keys() for line in logs[1]]
        for line, other in zip(*logs, strict=True):
            norms = [one.pop("train/grad_norm", 0.0) for one in (line, other)]
            assert norms[0] == pytest.approx(norms[1], rel=3 * tolerance)
            assert line == pytest.approx(other, rel=tolerance, abs=tolerance)
    targets = [np.load(folder / "stage2" / "targets.npy") for folder in (found, expected)]
    assert relative(*targets) < 3 * tolerance
    bundles = [load_bundle(folder / "bundle") for folder in (found, expected)]
    assert relative(*(bundle.params["mapper"] for bundle in bundles)) < tolerance
    with np.load(found / "predictions.npz") as one, np.load(expected / "predictions.npz") as other:
        assert relative(one["prediction"], other["prediction"]) < tolerance


@pytest.mark.slow  # three trainings
def test_two_processes_end_where_one_does(stopped, one, start_two, tmp_path):
    """Stopped in between, too, and found by each other in another way. One of the two writes."""
    workdir = tmp_path / "workdir"
    shutil.copytree(stopped[0], workdir)
    (code, out, err), (other_code, other_out, other_err) = ends(start_two(workdir, by_slurm))
    assert (code, other_code) == (0, 0), err + other_err
    assert "mean_pattern" in out
    assert other_out.replace("[Gloo]", "").count("mean_pattern") == 0
    assert "stage1" not in other_err
    assert_same_run(workdir, one[0], 1e-6)
    report = json.loads((workdir / "report.json").read_text())
    assert report["scores"].keys() == json.loads((one[0] / "report.json").read_text())["scores"].keys()


@pytest.mark.slow  # three trainings
def test_two_processes_with_the_same_samples_end_where_one_does(start_training, start_two, arguments, tmp_path):
    """`tensor` is split over both, so that each reads every batch whole."""
    more = ["--mesh.tensor", "2", "--variability.folds", "2"]
    results = ends(start_two(tmp_path / "two", more=more))
    results += ends([start_training(*arguments, *more, "--workdir", str(tmp_path / "one"), env=flags(2))])
    assert [code for code, *_ in results] == [0, 0, 0], results
    assert_same_run(tmp_path / "two", tmp_path / "one", 1e-6)
    # Of mappers that were trained to hit latents, which agree within 3e-6.
    residuals = [np.load(tmp_path / name / "crossfit" / "residuals.npy") for name in ("two", "one")]
    assert relative(*residuals) < 3e-6


@pytest.mark.slow  # three trainings
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_others_and_one_alone_can_go_on(
    stopped, one, start_two, start_training, arguments, tmp_path, victim
):
    workdir = tmp_path / "workdir"
    shutil.copytree(stopped[0], workdir)
    processes = start_two(workdir)
    wait_for(processes, workdir / "stage2" / "metrics.jsonl", 5)
    processes[victim].kill()
    killed = time.monotonic()
    results = ends(processes)
    assert time.monotonic() - killed < distributed.HEARTBEAT_SECONDS
    assert results[victim][0] == -signal.SIGKILL
    code, _, err = results[1 - victim]
    assert code not in (0, -signal.SIGKILL)
    assert "error" in err.lower()
    assert "Traceback" not in err
    (result,) = ends([start_training(*arguments, "--workdir", str(workdir))])
    assert result[0] == 0, result[2]
    assert_same_run(workdir, one[0], 1e-5)


# ---- docs/hardware.md ----------------------------------------------------------------------------


def test_the_commands_of_the_docs_are_valid(asked):
    text = (ROOT / "docs" / "hardware.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"train\.py ([^#\n\"]+)", text)
    assert len(commands) == 4
    for command in commands:
        run_settings(shlex.split(command), ROOT / "configs")
    assert ["coordinator_address" in settings for settings in asked] == [False, False, True]
