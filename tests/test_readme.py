"""The README's commands and programs, in its order, as a reader would try them, and the scores that they must reach.

Slow: five trainings. One module, so that the scores are those of the very run that the README shows.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
INSTALLATION = "python3 -m venv"  # run by .ci/run
TESTS = "python -m pytest"  # likewise


def readme_steps() -> list[tuple[str, str]]:
    """("sh", line) and ("python", program) in reading order; commands in tables count as lines."""
    pattern = r"```(sh|python)\n(.*?)```|^\|[^|]*\| `([^`]+)` \|$"
    steps = []
    for kind, block, cell in re.findall(pattern, README, flags=re.DOTALL | re.MULTILINE):
        if kind == "python":
            steps.append(("python", block))
        else:
            steps += [("sh", line) for line in (block or cell).strip().splitlines()]
    return steps


def test_the_installation_and_the_test_command_are_those_of_ci():
    lines = [line for kind, line in readme_steps() if kind == "sh"]
    assert any(line.startswith(INSTALLATION) and "-c constraints.txt -e '.[test]'" in line for line in lines)
    assert any(line.startswith(TESTS) for line in lines)
    assert "^python -m pytest" in (ROOT / ".ci" / "run").read_text()


def test_pictures_and_folders_that_the_readme_names_exist():
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.fixture(scope="module")
def reader(start_training, tmp_path_factory) -> Path:
    """The folder of a reader who has tried everything."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("train.py", "configs"):
        (folder / name).symlink_to(ROOT / name)
    environment = {**os.environ, "XLA_FLAGS": "", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for kind, step in readme_steps():
        if step.startswith((INSTALLATION, TESTS)):
            continue
        if step.startswith("python train.py"):
            process = start_training(*shlex.split(step)[2:], cwd=folder)
            _, err = process.communicate(timeout=900)
            assert process.returncode == 0, f"{step}\n{err}"
            continue
        command = [sys.executable, "-c", step] if kind == "python" else shlex.split(step)
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{step}\n{done.stderr}"
    return folder


def report(workdir: Path) -> dict:
    return json.loads((workdir / "report.json").read_text())


@pytest.fixture(scope="module")
def reports(reader, train) -> list[dict]:
    """report.json of the README's first command with seeds 0, 1 and 2."""
    for seed in (1, 2):
        train("haxby", "--seed", str(seed), "--workdir", os.fspath(reader / "runs" / f"haxby{seed}"))
    return [report(reader / "runs" / name) for name in ("haxby", "haxby1", "haxby2")]


@pytest.mark.slow
def test_the_commands_leave_what_the_readme_says(reader):
    with np.load(reader / "synthetic.npz") as synthetic:
        assert synthetic["fmri"].shape == (40, 8, 300)
        assert synthetic["stimulus_id"][3] == "picture03"
    assert report(reader / "scores")["scores"] == report(reader / "runs" / "mine")["scores"]
    for name in ("bundle/README.md", "report.html", "report.md", "predictions.npz", "figures/patterns.png",
                 "stage1/metrics.jsonl"):  # fmt: skip
        assert (reader / "runs" / "haxby" / name).exists()
    assert (reader / "results" / "report.html").exists()


@pytest.mark.slow
def test_the_model_predicts_held_out_runs_as_well_as_the_stimulus_mean(reports):
    reference = reports[0]["scores"]["stimulus_mean"]
    assert reference["pattern_r_centred"] == pytest.approx(0.366, abs=5e-4)
    of_model = [one["scores"]["model"] for one in reports]
    assert np.median([one["pattern_r_centred"] for one in of_model]) >= 0.95 * reference["pattern_r_centred"]
    assert np.median([one["mse"] for one in of_model]) <= reference["mse"]


@pytest.mark.slow
def test_the_prediction_follows_the_tokens(reports):
    for one in reports:
        assert abs(one["controls"]["shifted_tokens_pattern_r_centred"]) < 0.1


@pytest.mark.slow
def test_nothing_is_learnt_from_permuted_labels(reader):
    # Uncalibrated: a gain fitted on the true validation labels may be 0, and the control would pass by itself.
    model = report(reader / "runs" / "permuted")["scores"]["model"]
    assert 0 < abs(model["pattern_r_centred"]) < 0.1
