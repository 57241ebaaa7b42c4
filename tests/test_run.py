"""`train.py` as its users run it, at a tiny size: kill and resume, and what wrong input leaves behind."""

import json
import os
import re
import shlex
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


def test_a_killed_run_ends_with_the_same_bits(uninterrupted, train, start_training, tmp_path):
    expected_dir, _ = uninterrupted
    workdir = tmp_path / "workdir"
    arguments = ["haxby", "--workdir", os.fspath(workdir), *TINY]
    for stage, step in (("stage1", 7), ("stage1", 21), ("stage2", 14)):
        process = start_training(*arguments)
        wait_for_step(process, workdir / stage / "metrics.jsonl", step)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    train(*arguments)

    expected, resumed = load_bundle(expected_dir / "bundle"), load_bundle(workdir / "bundle")
    jax.tree.map(np.testing.assert_array_equal, resumed.params, expected.params)
    np.testing.assert_array_equal(resumed.offset, expected.offset)
    assert resumed.gain == expected.gain
    scores = [json.loads((folder / "report.json").read_text())["scores"] for folder in (workdir, expected_dir)]
    assert scores[0] == scores[1]
    for stage in ("stage1", "stage2"):
        logs = [(folder / stage / "metrics.jsonl").read_text() for folder in (workdir, expected_dir)]
        assert logs[0] == logs[1]


def test_a_finished_run_is_not_trained_again(uninterrupted, train):
    workdir, out = uninterrupted
    log = workdir / "stage1" / "metrics.jsonl"
    before = log.read_text()
    again = train("haxby", "--workdir", os.fspath(workdir), *TINY)
    assert again.splitlines()[:-1] == out.splitlines()[:-1]  # the last line has the seconds
    assert log.read_text() == before
