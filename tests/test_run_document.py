"""Documents of training runs: every number in its place, intervals as drawing the stimuli by hand gives them."""

import base64
import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
from etils import epath
from test_report import VOXELS as REPORT_VOXELS
from test_report import arrays, content, write_run

from synbrain_jax import evaluation, files, metrics, report
from synbrain_jax.cli import main
from synbrain_jax.config import Config
from synbrain_jax.data.pairs import Trials
from synbrain_jax.data.voxels import Voxels
from synbrain_jax.document import Document, Estimate, Figure, Section
from synbrain_jax.errors import InputError
from synbrain_jax.run_document import Scores, drawn_scores, group_runs, run_document
from synbrain_jax.run_files import Run, facts, read_run, write_facts
from synbrain_jax.statistics import interval, resamples

STIMULI, VOXELS = 24, 40


def scored_run(seed: int = 0, better: float = 0.0) -> Run:
    """A run evaluated for real: two or three trials of each stimulus, two regions, a model that is `better`."""
    rng = np.random.default_rng(0)
    stimulus = np.sort(np.concatenate([np.repeat(np.arange(STIMULI), 2), np.arange(0, STIMULI, 3)]))
    tokens = rng.normal(size=(STIMULI, 2, 2)).astype(np.float32)
    linear = tokens.reshape(STIMULI, -1) @ rng.normal(size=(4, VOXELS)) / 2
    signal = linear + rng.normal(size=(STIMULI, VOXELS)) + rng.normal(size=VOXELS)

    def trials() -> Trials:
        fmri = (signal[stimulus] + rng.normal(size=(len(stimulus), VOXELS))).astype(np.float32)
        names = tuple(f"s{number:02d}" for number in range(STIMULI))
        zeros = np.zeros(len(stimulus), np.int32)
        return Trials(names, tokens, fmri, stimulus.astype(np.int32), zeros, zeros)

    train, test = trials(), trials()
    early = np.arange(VOXELS) < 15
    voxels = Voxels(
        "s1", "none", None, None, None, np.full(VOXELS, 0.8), np.arange(VOXELS), {"early": early, "late": ~early}
    )
    noise = np.random.default_rng(seed + 1).normal(size=signal.shape) * (1.5 - better)
    model = (signal + noise).astype(np.float32)
    result = evaluation.evaluate(model, train=train, validation=train, test=test, voxels=voxels, dataset="tiny")
    return Run(
        workdir=epath.Path(f"runs/seed{seed}"),
        report=json.loads(json.dumps(result.report | {"subject": "s1"})),
        arrays=result.arrays,
        voxels=voxels,
        stages={},
        config=Config(name="tiny", seed=seed),
        facts=facts("python train.py tiny", 12.3, [seed]),
    )


@pytest.fixture(scope="module")
def runs() -> list[Run]:
    return [scored_run(0), scored_run(1, better=0.2)]


def test_a_draw_scores_as_its_stimuli_do(runs):
    run = runs[0]
    counts = np.random.default_rng(5).multinomial(STIMULI, np.full(STIMULI, 1 / STIMULI), size=3).astype(np.float32)
    drawn = drawn_scores(run, "ridge", run.arrays["prediction_ridge"], counts)
    prediction, target = run.arrays["prediction_ridge"], run.arrays["target"]
    ceiling = run.arrays["voxel_r_ceiling"]
    of_stimulus = {
        "pattern_r": metrics.pattern_pearson(prediction, target),
        "pattern_r_centred": metrics.pattern_pearson(metrics.centred(prediction), metrics.centred(target)),
        "mse": np.mean((prediction - target) ** 2, axis=1),
        "cosine": metrics.cosine(prediction, target),
    }
    for draw, row in enumerate(counts.astype(int)):
        chosen = np.repeat(np.arange(STIMULI), row)
        r = np.asarray(metrics.voxel_pearson(prediction[chosen], target[chosen]))
        expected = evaluation.voxel_scores(r, ceiling) | {
            name: np.mean(np.asarray(values)[chosen]) for name, values in of_stimulus.items()
        }
        expected |= {f"rois/{name}": np.median(r[inside]) for name, inside in run.voxels.rois.items()}
        trials = np.concatenate([np.flatnonzero(run.arrays["stimulus_of_trial"] == stimulus) for stimulus in chosen])
        for column, name in enumerate(("trial_mse", "trial_pattern_r", "trial_cosine")):
            expected[name] = run.arrays["trial_scores_ridge"][trials, column].mean()
        for name, value in expected.items():
            assert drawn[name][draw] == pytest.approx(value, abs=2e-6), name


def test_all_stimuli_once_score_as_reported(runs):
    for row in ("model", "ridge"):
        prediction = runs[0].arrays["prediction" if row == "model" else f"prediction_{row}"]
        drawn = drawn_scores(runs[0], row, prediction, np.ones((1, STIMULI), np.float32))
        reported = runs[0].report["scores"][row]
        assert drawn.keys() - {"rois/early", "rois/late"} == reported.keys() - {"explained_variance"}
        for name, value in reported.items():
            if name in drawn:
                assert drawn[name][0] == pytest.approx(value, abs=2e-6), name


def test_means_and_leads_are_of_the_same_draws(runs):
    scores = Scores.of(runs)
    drawn = [
        drawn_scores(run, row, run.arrays[name], resamples(STIMULI))["voxel_r_median"]
        for run in runs
        for row, name in (("model", "prediction"), ("ridge", "prediction_ridge"))
    ]
    first, first_ridge, second, second_ridge = drawn
    for given, expected in (
        (scores.one(1, "model", "voxel_r_median"), second),
        (scores.mean("model", "voxel_r_median"), (first + second) / 2),
        (scores.lead([0], "ridge", "voxel_r_median"), first - first_ridge),
        (scores.lead([0, 1], "ridge", "voxel_r_median"), (first + second - first_ridge - second_ridge) / 2),
    ):
        known = interval(expected)
        assert [given.value, given.low, given.high] == pytest.approx([known.value, known.low, known.high], abs=1e-6)
    assert isinstance(scores.mean("noise_ceiling", "voxel_r_median"), Estimate)
    assert scores.mean("noise_ceiling", "voxel_r_median").low is None
    assert scores.mean("model", "nothing") is None
    assert scores.lead([0], "nothing", "voxel_r_median") is None


def test_one_run_has_a_row_for_each_predictor(runs):
    known = run_document(runs[:1], ("patterns", "voxel_r"))
    assert known.title == "tiny: tiny, test split"
    assert known.facts["seeds"] == "0"
    assert known.facts["command"] == "`python train.py tiny`"
    assert known.facts["subject"] == "s1"
    main, single, share, leads = known.sections[0].tables
    names = ["model", "stimulus mean", "ridge", "kernel ridge", "mean pattern", "noise ceiling"]
    assert [row[0] for row in main.rows] == names
    for table, columns in ((main, report.MAIN_COLUMNS), (single, report.TRIAL_COLUMNS), (share, report.SHARE_COLUMNS)):
        for row in table.rows:
            reported = runs[0].report["scores"][row[0].replace(" ", "_")]
            for cell, (metric, _, _) in zip(row[1:], columns, strict=True):
                assert cell.value == pytest.approx(reported[metric])
                drawn = row[0] != "noise ceiling" and metric != "explained_variance"
                assert (cell.low is not None) == drawn
                assert not drawn or cell.low <= cell.high
    assert main.best["MSE"] == single.best["MSE"] == "low"
    assert main.best["voxel r median"] == "high"
    assert main.apart == ("noise ceiling",)
    assert [row[0] for row in leads.rows] == names[1:4]
    regions = known.sections[1].tables[0]
    assert regions.columns == ("", "voxels", *names)
    assert [row[:2] for row in regions.rows] == [("early", 15), ("late", 25)]
    for row in regions.rows:
        for cell, name in zip(row[2:], names, strict=True):
            reported = runs[0].report["rois"][row[0]]["rows"][name.replace(" ", "_")]
            assert cell.value == pytest.approx(reported["voxel_r_median"])
    assert [figure.name for figure in known.sections[2].figures] == ["voxel_r", "patterns"]


def test_seeds_stand_side_by_side_with_their_mean(runs):
    known = run_document(runs, ("patterns",))
    assert known.facts["seeds"] == "0, 1"
    assert known.facts["folder"] == "`runs/seed0`, `runs/seed1`"
    main, *_, leads = known.sections[0].tables
    rows = {row[0]: row[1:] for row in main.rows}
    assert list(rows)[:4] == ["model, seed 0", "model, seed 1", "model, mean of 2 seeds", "stimulus mean"]
    values = [[cell.value for cell in cells] for cells in list(rows.values())[:3]]
    np.testing.assert_allclose(np.mean(values[:2], axis=0), values[2], rtol=1e-6)
    assert main.apart == ("noise ceiling", "model, seed 0", "model, seed 1")
    assert leads.columns == ("", "seed 0", "seed 1", "mean")
    assert known.sections[2].text == "Of seed 0."


@pytest.mark.parametrize(("better", "holds"), [((1.4, 1.4), True), ((-8.0, -8.0), False), ((1.4, -8.0), None)])
def test_claims_follow_from_the_numbers_of_every_seed(better, holds):
    some = [scored_run(seed, one) for seed, one in enumerate(better)]
    claims = {claim.text: claim for claim in run_document(some).claims}
    assert len(claims) == 3
    claim = claims["The median voxel's r is above that of ridge"]
    assert claim.holds is holds
    leads = Scores.of(some).lead([1], "ridge", "voxel_r_median")
    assert f"{leads.value:.3f} [{leads.low:.3f}, {leads.high:.3f}] (seed 1)" in claim.evidence


def test_few_stimuli_are_said_to_give_narrow_intervals(runs):
    assert "too narrow" not in run_document(runs[:1]).sections[0].text
    few = dataclasses.replace(runs[0], report=runs[0].report | {"n_stimuli": 8})
    assert "With 8 stimuli they are too narrow" in run_document([few]).sections[0].text


def test_runs_of_one_experiment_are_grouped(runs):
    first, second = runs
    other = dataclasses.replace(second, config=dataclasses.replace(second.config, calibrate=False))
    remade = dataclasses.replace(second, arrays=second.arrays | {"target": second.arrays["target"] + 1})
    unknown = dataclasses.replace(first, config=None)
    groups = group_runs([second, other, first, remade, unknown, unknown])
    assert groups == [[first, second], [other], [remade], [unknown], [unknown]]
    elsewhere = dataclasses.replace(first, report=first.report | {"split": "validation"})
    assert group_runs([first, elsewhere]) == [[first], [elsewhere]]
    with pytest.raises(InputError, match=r"runs/seed0 and runs/seed0 are the same run, seed 0; give one"):
        group_runs([first, second, first])


# ---- folders ---------------------------------------------------------------------------------------


PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==")


@pytest.fixture
def undrawn(monkeypatch):
    """Two dots in place of the figures, which test_report looks at."""
    monkeypatch.setattr(report, "_drawn", lambda run: {"patterns": PNG, "voxel_r": PNG})


def run_folder(folder, seed: int):
    folder.mkdir()
    write_run(folder)
    files.write_text(folder / "bundle" / "config.json", Config(name="tiny", seed=seed).to_json())
    return folder


def study_folder(folder):
    folder.mkdir()
    (folder / "curve.png").write_bytes(PNG)
    Document("A study", {"seeds": "0"}, (Section("One", figures=(Figure("curve", "A curve."),)),)).save(folder)
    return folder


def test_a_page_of_runs_and_studies(tmp_path, undrawn):
    folders = [run_folder(tmp_path / name, seed) for name, seed in (("zero", 0), ("one", 1))]
    study = study_folder(tmp_path / "study")
    before = sorted(path for folder in (*folders, study) for path in folder.rglob("*"))
    out = tmp_path / "out"
    assert report.write_page([*folders, study], out) == out / "report.html"
    assert sorted(path for folder in (*folders, study) for path in folder.rglob("*")) == before
    markdown = (out / "report.md").read_text()
    titles = [line for line in markdown.splitlines() if line.startswith("## ")]
    assert titles == ["## Claims", "## A study", "## tiny: simulated/tiny, test split"]
    assert "| model, seed 0 |" in markdown
    assert "| model, mean of 2 seeds |" in markdown
    links = [line.split("](")[1][:-1] for line in markdown.splitlines() if line.startswith("![")]
    assert [link.rpartition("/")[2] for link in links] == ["curve.png", "voxel_r.png", "patterns.png"]
    assert all((out / link).read_bytes() == PNG for link in links)
    assert sorted(path.name for path in out.rglob("*.png")) == sorted(link.rpartition("/")[2] for link in links)
    assert (out / "report.html").read_text().count("<img ") == 3


def test_subjects_that_were_trained_together_are_found_in_their_folder(tmp_path, undrawn):
    together = run_folder(tmp_path / "both", 0)
    for subject in ("a", "b"):
        (together / subject).mkdir()
        for name in ("report.json", "predictions.npz", "bundle"):
            copy = shutil.copytree if name == "bundle" else shutil.copy
            copy(together / name, together / subject / name)
        changed = content(subject=subject)
        files.write_text(together / subject / "report.json", json.dumps(changed))
    (together / "report.json").unlink()
    main(["report", os.fspath(together)])
    assert (together / "a" / "report.html").exists()
    assert (together / "b" / "report.html").exists()
    report.write_page([together], tmp_path / "out")
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert [line for line in markdown.splitlines() if line.startswith("* subject")] == ["* subject: a", "* subject: b"]


def test_a_study_has_its_page_beside_it(tmp_path):
    run_folder(tmp_path / "zero", 0)
    study = study_folder(tmp_path / "study")
    assert report.is_study(study)
    assert not report.is_study(tmp_path / "zero")
    text = report.write_study(study)
    assert text == (study / "report.md").read_text()
    assert "![curve](curve.png)" in text
    assert "<h1>A study</h1>" in (study / "report.html").read_text()


def test_what_cannot_be_reported_writes_nothing(tmp_path, undrawn):
    good = run_folder(tmp_path / "zero", 0)
    (tmp_path / "empty").mkdir()
    for wrong, message in (
        ("empty", r"report\.json: no such file"),
        ("absent", "no such folder"),
        ("zero", "same run"),
    ):
        with pytest.raises(InputError, match=message):
            report.write_page([good, tmp_path / wrong], tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_the_facts_are_those_of_the_start_that_finished_the_run(tmp_path, undrawn):
    write_facts(run_folder(tmp_path / "zero", 3), "python train.py tiny", 65.4, 3)
    write_facts(tmp_path / "zero", "python train.py tiny", 2.0, 3)
    known = read_run(tmp_path / "zero")
    assert known.facts["time"] == "65 s"
    assert known.facts["seeds"] == "3"
    assert known.facts["command"] == "`python train.py tiny`"
    assert "Python 3." in known.facts["versions"]
    assert known.config.seed == 3
    assert "65 s" in (report.write_report(tmp_path / "zero") and (tmp_path / "zero" / "report.html").read_text())


def test_a_run_of_an_older_version_has_no_intervals_against_trials(tmp_path):
    run = read_run(run_folder(tmp_path / "zero", 0))
    assert run.arrays.keys() == arrays().keys()
    assert run.voxels.order.size == REPORT_VOXELS
    main, single, *_ = run_document([run]).sections[0].tables
    assert main.rows[0][2].low is not None
    assert [cell.low for cell in single.rows[0][1:]] == [None] * 3
