"""`train.py` as its users run it, at a tiny size: kill and resume, and what wrong input leaves behind."""

import itertools
import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from synbrain_jax.checkpoint import load_bundle

TINY = shlex.split("""
    --brain-vae.pool-length 32 --brain-vae.channels 4 --brain-vae.channel-mult 1 2 --brain-vae.projector-width 16
    --mapper.depth 1 --log-every 2 --stage1.steps 32 --stage1.eval-every 4 --stage2.steps 32 --stage2.eval-every 4
    --variability.folds 1 --variability.ranks 0 1 --variability.samples 100
""")


@pytest.fixture(scope="module")
def uninterrupted(train, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "workdir"
    return workdir, train("haxby", "--workdir", os.fspath(workdir), *TINY)


def test_a_run_ends_with_the_table_and_everything_in_its_folder(uninterrupted):
    workdir, out = uninterrupted
    report = json.loads((workdir / "report.json").read_text())
    assert (report["n_stimuli"], report["n_trials"], report["n_voxels"]) == (8, 144, 530)
    rows = ["model", "stimulus_mean", "ridge", "kernel_ridge", "mean_pattern", "noise_ceiling"]
    assert list(report["scores"]) == rows
    for row in rows:
        assert row in out
        assert all(np.isfinite(value) for value in report["scores"][row].values())
    assert f"{report['scores']['stimulus_mean']['pattern_r_centred']:.3f}" == "0.366"  # known of this data set
    for figure in ("loss_curves", "patterns", "voxel_r", "samples"):
        assert (workdir / "figures" / f"{figure}.png").stat().st_size > 5000
    selected = json.loads((workdir / "stage1" / "selected.json").read_text())
    lines = [json.loads(line) for line in (workdir / "stage1" / "metrics.jsonl").read_text().splitlines()]
    validation = {line["step"]: line["val/loss"] for line in lines if "val/loss" in line}
    assert selected["step"] == min(validation, key=validation.get)


def wait_for_step(process: subprocess.Popen, log: Path, step: int) -> None:
    """Returns when the log has reached `step`; fails if the process ends before."""
    while process.poll() is None:
        steps = re.findall(r'"step": (\d+)', log.read_text()) if log.exists() else []
        if steps and int(steps[-1]) >= step:
            return
        time.sleep(0.002)
    pytest.fail(f"ended before it could be killed: {process.stderr.read()}")


def assert_same_bits(workdir: Path, expected_dir: Path) -> None:
    """Of everything that two runs left: parameters, correction, scores, logs and what was selected."""
    expected, resumed = load_bundle(expected_dir / "bundle"), load_bundle(workdir / "bundle")
    jax.tree.map(np.testing.assert_array_equal, resumed.params, expected.params)
    np.testing.assert_array_equal(resumed.offset, expected.offset)
    assert resumed.gain == expected.gain
    scores = [json.loads((folder / "report.json").read_text())["scores"] for folder in (workdir, expected_dir)]
    assert scores[0] == scores[1]
    for stage, name in itertools.product(("stage1", "stage2"), ("metrics.jsonl", "selected.json")):
        assert (workdir / stage / name).read_text() == (expected_dir / stage / name).read_text()


@pytest.mark.slow  # test_faults stops and kills within one process
def test_a_run_that_was_stopped_and_killed_ends_with_the_same_bits(uninterrupted, train, start_training, tmp_path):
    expected_dir, _ = uninterrupted
    workdir = tmp_path / "workdir"
    arguments = ["haxby", "--workdir", os.fspath(workdir), *TINY]
    kill, stop = (signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 0)
    for stage, step, (sent, code) in (("stage1", 7, stop), ("stage2", 14, kill)):
        process = start_training(*arguments)
        wait_for_step(process, workdir / stage / "metrics.jsonl", step)
        process.send_signal(sent)
        err = process.communicate()[1]
        assert process.returncode == code, err
        if sent == signal.SIGTERM:
            saved = re.fullmatch(r"stopped: stage1 is saved at step (\d+), and the same .*", err.splitlines()[-1])[1]
            assert (workdir / "stage1" / "checkpoints" / saved).exists()
    train(*arguments)
    assert_same_bits(workdir, expected_dir)


def test_a_full_disk_is_one_line_and_what_was_saved_stays(uninterrupted, start_training, tmp_path):
    """A limit to the size of files is as much of a full disk as a user can make: no checkpoint fits."""
    workdir = tmp_path / "workdir"
    shutil.copytree(uninterrupted[0], workdir)
    (workdir / "stage2" / "selected.json").unlink()
    shutil.rmtree(workdir / "stage2" / "checkpoints" / "32")
    arguments = ["haxby", "--workdir", os.fspath(workdir), *TINY]
    process = start_training(*arguments)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (2**16, 2**16))
    out, err = process.communicate(timeout=600)
    assert process.returncode == 1, err
    assert "Traceback" not in err
    line = err.splitlines()[-1]
    assert line.startswith(f"error: {workdir}/stage2/checkpoints: cannot be written (")
    assert "File too large" in line
    assert out == ""
    assert (workdir / "stage2" / "checkpoints" / "28").exists()
    assert not (workdir / "stage2" / "checkpoints" / "32").exists()
    assert not (workdir / "stage2" / "selected.json").exists()


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_nothing(uninterrupted, train, start_training, tmp_path):
    """Anywhere: while the program starts, reads, steps, validates, writes a checkpoint, or goes on to stage 2."""
    workdir = tmp_path / "workdir"
    arguments = ["haxby", "--workdir", os.fspath(workdir), *TINY]
    rng = random.Random(0)
    moments = sorted((stage, rng.randint(1, 28)) for stage in 10 * ("stage1", "stage2"))
    for stage, step in moments:
        log = workdir / stage / "metrics.jsonl"
        reached = log.exists() and f'"step": {step}' in log.read_text()
        process = start_training(*arguments)
        wait_for_step(process, log, step)
        time.sleep(rng.uniform(0, 6 if reached else 0.3))  # a start takes some seconds
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    train(*arguments)
    assert_same_bits(workdir, uninterrupted[0])


@pytest.mark.slow  # test_studies starts finished studies again
def test_a_finished_run_is_not_trained_again(uninterrupted, train):
    workdir, out = uninterrupted
    log = workdir / "stage1" / "metrics.jsonl"
    before = log.read_text()
    again = train("haxby", "--workdir", os.fspath(workdir), *TINY)
    assert again.splitlines()[:-1] == out.splitlines()[:-1]  # the last line has the seconds
    assert log.read_text() == before
