"""What a stage logs: lines on stderr or a bar, JSON lines, TensorBoard events; and what a restart makes of them."""

import io
import json
import math
import re
import struct
import sys
from types import SimpleNamespace

import pytest
from tensorboardX.proto.event_pb2 import Event

from synbrain_jax import progress as progress_room
from synbrain_jax.progress import Progress, open_progress


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def log_steps(folder, start, stop, scale=1.0):
    with Progress(folder, "stage1", start, 10) as progress:
        for step in range(start + 1, stop + 1):
            progress.log(step, "train", {"loss": scale / step, "kl": float(step)})
            if step % 2 == 0:
                progress.log(step, "val", {"loss": 2 * scale / step})
            progress.advance(step)


def test_every_number_is_one_json_field(tmp_path):
    log_steps(tmp_path, 0, 2)
    assert lines(tmp_path) == [
        {"step": 1, "train/loss": 1.0, "train/kl": 1.0},
        {"step": 2, "train/loss": 0.5, "train/kl": 2.0},
        {"step": 2, "val/loss": 1.0},
    ]


def test_a_restart_drops_the_lines_after_its_step_and_a_half_written_one(tmp_path):
    log_steps(tmp_path, 0, 7)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "train/loss": 0.')  # the process was killed here
    log_steps(tmp_path, 4, 8, scale=10.0)
    found = [(line["step"], line["train/loss"]) for line in lines(tmp_path) if "train/loss" in line]
    assert found == [(step, 1 / step) for step in (1, 2, 3, 4)] + [(step, 10 / step) for step in (5, 6, 7, 8)]
    assert [line["step"] for line in lines(tmp_path) if "val/loss" in line] == [2, 4, 6, 8]


def test_a_stage_that_is_started_anew_has_an_empty_log(tmp_path):
    log_steps(tmp_path, 0, 3)
    log_steps(tmp_path, 0, 1)
    assert [line["step"] for line in lines(tmp_path)] == [1]


def test_lines_are_on_disk_at_once(tmp_path):
    """A killed run leaves what it logged; nothing waits in a buffer."""
    with Progress(tmp_path, "stage1", 0, 3) as progress:
        progress.log(1, "train", {"loss": 1.0})
        assert lines(tmp_path) == [{"step": 1, "train/loss": 1.0}]


def events(folder) -> dict[tuple[str, int], float]:
    """The scalars of all event files: records of length (8 bytes), checksum (4), an Event, checksum (4)."""
    found = {}
    for file in sorted(folder.glob("*tfevents*")):
        content = file.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + length])
            for value in event.summary.value:
                found[value.tag, event.step] = value.simple_value
            content = content[16 + length :]
    return found


def test_tensorboard_gets_the_same_numbers(tmp_path):
    log_steps(tmp_path, 0, 3)
    expected = {("train/loss", step): 1 / step for step in (1, 2, 3)}
    expected |= {("train/kl", step): float(step) for step in (1, 2, 3)} | {("val/loss", 2): 1.0}
    found = events(tmp_path / "events")
    assert found.keys() == expected.keys()
    assert all(math.isclose(found[key], expected[key], rel_tol=1e-6) for key in expected)


def test_without_a_terminal_each_log_is_a_line(tmp_path, capsys):
    log_steps(tmp_path, 4, 6)
    err = capsys.readouterr().err
    shown = err.splitlines()
    assert len(shown) == 3
    assert "\r" not in err
    pattern = r"stage1 5/10  train/loss 0\.2  train/kl 5  \((\d+\.\d) steps/s, (\d+) s left\)"
    assert re.fullmatch(pattern, shown[0])
    assert shown[2].startswith("stage1 6/10  val/loss 0.3333  (")


def test_speed_and_time_left_count_from_the_resumed_step(tmp_path, capsys, monkeypatch):
    clock = iter([100.0, 104.0])
    monkeypatch.setattr("synbrain_jax.progress.time", SimpleNamespace(monotonic=lambda: next(clock)))
    with Progress(tmp_path, "stage2", 6, 20) as progress:
        progress.log(8, "train", {"loss": 1.0})  # two steps in four seconds
    assert "(0.5 steps/s, 24 s left)" in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_there_is_one_bar(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    log_steps(tmp_path, 4, 10)
    shown = sys.stderr.getvalue()
    assert shown.count("\n") == 1  # one line, redrawn
    last = shown.strip().split("\r")[-1]
    assert last.startswith("stage1: 100%")
    assert "10/10" in last
    assert "train/loss=0.1, val/loss=0.2" in last
    assert "train/kl" not in last
    assert len(lines(tmp_path)) == 9


@pytest.mark.parametrize("value", [0.25, 3.0])
def test_the_selected_checkpoint_is_noted(tmp_path, value):
    with Progress(tmp_path, "stage1", 0, 10) as progress:
        progress.write_selected(8, "val/mse", value)
    noted = json.loads((tmp_path / "selected.json").read_text())
    assert noted == {"step": 8, "metric": "val/mse", "value": value}


def test_of_several_processes_one_logs(tmp_path, monkeypatch, capsys):
    for first in (True, False):
        monkeypatch.setattr(progress_room, "is_first", lambda first=first: first)
        folder = tmp_path / str(first)
        with open_progress(folder, "stage1", 0, 3) as progress:
            progress.log(1, "train", {"loss": 1.0})
            progress.advance(1)
            progress.write_selected(1, "last", 1.0)
        assert bool(capsys.readouterr().err) == first
        assert folder.exists() == first
    assert lines(tmp_path / "True") == [{"step": 1, "train/loss": 1.0}]
