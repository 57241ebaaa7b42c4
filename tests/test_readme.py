"""Every command and program of the README, in its order, as a reader would try them. Slow: two trainings."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.slow
def test_every_command_of_the_readme_works(start_training, tmp_path):
    for name in ("train.py", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = {**os.environ, "XLA_FLAGS": "", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for kind, step in readme_steps():
        if kind == "sh" and step.startswith((INSTALLATION, TESTS)):
            continue
        if kind == "python":
            command = [sys.executable, "-c", step]
        elif step.startswith("python train.py"):
            process = start_training(*shlex.split(step)[2:], cwd=tmp_path)
            _, err = process.communicate(timeout=600)
            assert process.returncode == 0, f"{step}\n{err}"
            continue
        else:
            command = shlex.split(step)
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{step}\n{done.stderr}"
    assert (tmp_path / "synthetic.npz").exists()
