"""The benchmark of synthesis onto the disk: its fit against closed forms, and its program on very small sizes."""

import json
import sys

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT))
from benchmarks import synthesis_scale
from benchmarks.synthesis_scale import Sizes, fit


def test_the_fit_of_lines_and_powers():
    x = np.array([1.0, 2, 4, 8])
    line = fit(x, 3 + 0.5 * x)
    assert [line[name] for name in ("seconds_fixed", "seconds_each", "r2")] == pytest.approx([3, 0.5, 1])
    assert fit(x, 5 * x**1.7)["exponent"] == pytest.approx(1.7)
    assert fit(x, x**3)["r2"] < 0.95


def test_a_small_run_tells_every_size_and_draws(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(synthesis_scale, "BASE", Sizes(stimuli=3, voxels=40, batch=2, k=2, tokens=4))
    monkeypatch.setattr(synthesis_scale, "VARIED", {"stimuli": (3, 8)})
    monkeypatch.setattr(synthesis_scale, "OVERLAP", synthesis_scale.BASE)
    files = {name: tmp_path / f"found.{name}" for name in ("json", "png")}
    synthesis_scale.main(
        ["--rounds", "2", *(str(word) for name, file in files.items() for word in (f"--{name}", file))]
    )
    found = json.loads(files["json"].read_text())
    assert found["scale"]["stimuli"]["values"] == [3, 8]
    assert all(len(row) == 2 and min(row) > 0 for row in found["scale"]["stimuli"]["seconds"])
    assert found["overlap"]["megabytes"] == pytest.approx(3 * 2 * 40 * 4 / 1e6)
    assert set(found["overlap"]["seconds"]) == {"compute", "write", "both"}
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    assert "overlap: compute" in capsys.readouterr().out
