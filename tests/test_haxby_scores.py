"""What the README's first command must reach on real data, and its two controls. Slow: five trainings."""

import json
import os

import numpy as np
import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def reports(train, tmp_path_factory):
    """report.json of `python train.py haxby` with three seeds."""
    folder = tmp_path_factory.mktemp("haxby")
    for seed in range(3):
        train("haxby", "--seed", str(seed), "--workdir", os.fspath(folder / str(seed)))
    return [json.loads((folder / str(seed) / "report.json").read_text()) for seed in range(3)]


def values(reports, row: str, metric: str) -> list[float]:
    return [report["scores"][row][metric] for report in reports]


def test_the_model_predicts_held_out_runs_as_well_as_the_stimulus_mean(reports):
    reference = reports[0]["scores"]["stimulus_mean"]
    assert reference["pattern_r_centred"] == pytest.approx(0.366, abs=5e-4)
    assert np.median(values(reports, "model", "pattern_r_centred")) >= 0.95 * reference["pattern_r_centred"]
    assert np.median(values(reports, "model", "mse")) <= reference["mse"]


def test_the_prediction_follows_the_tokens(reports):
    for report in reports:
        assert abs(report["controls"]["shifted_tokens_pattern_r_centred"]) < 0.1


def test_nothing_is_learnt_from_permuted_labels(train, tmp_path):
    # Without calibration: a gain fitted on true validation labels may be 0, and the control would pass by itself.
    train("haxby", "--data.permute", "trial", "--no-calibrate", "--workdir", os.fspath(tmp_path))
    model = json.loads((tmp_path / "report.json").read_text())["scores"]["model"]
    assert 0 < abs(model["pattern_r_centred"]) < 0.1
