"""`synbrain` and the options of `train.py`: what they do, and the one clear error that wrong input gets."""

import dataclasses
import importlib.util
import json
import os
from pathlib import Path

import jax
import nibabel
import numpy as np
import pytest

from synbrain_jax import evaluation, load_pretrained, studies
from synbrain_jax.checkpoint import Bundle, abstract_params, load_bundle, save_bundle
from synbrain_jax.cli import main, plain_errors
from synbrain_jax.config import Config, DataConfig
from synbrain_jax.data.arrays import prepare_arrays
from synbrain_jax.data.pairs import load_trials, open_dataset
from synbrain_jax.data.voxels import Voxels
from synbrain_jax.document import Claim, Document, Section
from synbrain_jax.interop.nifti import from_volume
from synbrain_jax.models.brain_vae import BrainVAEConfig
from synbrain_jax.models.semantic_to_neural import MapperConfig
from synbrain_jax.variability import Spread

ROOT = Path(__file__).parents[1]
_spec = importlib.util.spec_from_file_location("train", ROOT / "train.py")
train = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(train)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    """A bundle of the smallest models with random parameters, 30 voxels, tokens [4, 8]."""
    brain_vae = BrainVAEConfig.small(
        pool_length=16, channels=4, channel_mult=(1,), latent_tokens=4, latent_dim=8, projector_width=8
    )
    config = Config(name="tiny", brain_vae=brain_vae, mapper=MapperConfig.small(tokens=4, width=8, depth=1))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), abstract_params(config))
    voxels = Voxels("s", "none", np.stack([np.arange(30)] * 3, 1), None, None, None, np.arange(30)[::-1].copy())
    path = tmp_path_factory.mktemp("model") / "bundle"
    bundle = Bundle.uncorrected(config, params, voxels, "test/tiny", np.full((4, 8), 0.5, np.float32))
    spread = Spread(rng.normal(size=(30, 2)).astype(np.float32), np.ones(30, np.float32))
    save_bundle(path, dataclasses.replace(bundle, spread=spread))
    return path


@pytest.fixture
def tokens() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(3, 4, 8)).astype(np.float32)


@pytest.mark.parametrize("variability", ["posterior", "calibrated"])
def test_synthesize_writes_what_the_system_gives(bundle, tokens, tmp_path, capsys, variability):
    np.savez(tmp_path / "in.npz", tokens=tokens, stimulus_id=np.array(["a", "b", "c"]))
    np.save(tmp_path / "in.npy", tokens)
    options = ["--k", "2", "--variability", variability, "--seed", "7"]
    for source, out in (("in.npz", "out.npz"), ("in.npy", "out.npy")):
        files = ["--tokens", os.fspath(tmp_path / source), "--out", os.fspath(tmp_path / out)]
        main(["synthesize", "--model", os.fspath(bundle), *files, *options])
        assert "3 stimuli x 2 samples x 30 voxels" in capsys.readouterr().out
    expected = load_pretrained(bundle).synthesize(tokens, jax.random.key(7), k=2, variability=variability)
    with np.load(tmp_path / "out.npz") as written:
        np.testing.assert_array_equal(written["fmri"], expected)
        assert list(written["stimulus_id"]) == ["a", "b", "c"]
        np.testing.assert_array_equal(written["voxel_ijk"], np.stack([np.arange(30)] * 3, 1))
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), expected)
    assert np.abs(expected[:, 0] - expected[:, 1]).max() > 1e-3


def test_synthesize_writes_volumes_in_the_space_of_the_data(bundle, tokens, tmp_path, capsys):
    placed = load_bundle(bundle)
    space = {"volume_shape": (30, 31, 32), "affine": np.diag([2.0, 2.0, 2.0, 1.0])}
    placed = dataclasses.replace(placed, voxels=dataclasses.replace(placed.voxels, **space))
    save_bundle(tmp_path / "placed", placed)
    np.save(tmp_path / "in.npy", tokens)
    names = {name: os.fspath(tmp_path / name) for name in ("in.npy", "out.npy", "brain.nii.gz", "placed")}
    command = ["synthesize", "--tokens", names["in.npy"], "--out", names["out.npy"], "--nifti", names["brain.nii.gz"]]
    main([*command, "--model", names["placed"], "--k", "2", "--variability", "posterior"])
    assert "brain.nii.gz: 6 volumes" in capsys.readouterr().out
    fmri, image = np.load(tmp_path / "out.npy"), nibabel.load(tmp_path / "brain.nii.gz")
    assert image.shape == (30, 31, 32, 6)
    for i, j in np.ndindex(3, 2):
        np.testing.assert_array_equal(from_volume(image, placed.voxels)[2 * i + j], fmri[i, j])
    (tmp_path / "out.npy").unlink()
    err = error_of(capsys, main, [*command, "--model", os.fspath(bundle)])
    assert "no place in a volume (volume_shape, affine unknown)" in err
    assert not (tmp_path / "out.npy").exists()


def error_of(capsys, command, arguments: list[str]) -> str:
    """The single line on stderr of a command that must end with exit code 2."""
    with pytest.raises(SystemExit) as exit_, plain_errors():
        command(arguments)
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "absent.npy", "absent.npy"),
        (lambda folder: _saved(folder / "wrong.npy", np.zeros((3, 4, 9), np.float32)), "[stimuli, 4, 8]"),
        (lambda folder: _saved(folder / "nan.npy", np.full((3, 4, 8), np.nan, np.float32)), "96 values"),
        (lambda folder: _saved(folder / "other.npz", np.zeros((3, 4, 8))), "no array 'tokens'; it holds arr_0"),
        (lambda folder: _truncated(folder / "short.npy"), "short.npy"),
    ],
    ids=["missing", "shape", "nan", "name", "truncated"],
)
def test_bad_tokens_are_one_clear_error(make, message, bundle, tmp_path, capsys):
    out = tmp_path / "results" / "out.npz"
    arguments = [
        "synthesize",
        "--model",
        os.fspath(bundle),
        "--tokens",
        os.fspath(make(tmp_path)),
        "--out",
        os.fspath(out),
    ]
    err = error_of(capsys, main, arguments)
    assert err.startswith("error: ")
    assert message in err
    assert not out.parent.exists()


def _saved(path: Path, array: np.ndarray) -> Path:
    (np.savez if path.suffix == ".npz" else np.save)(path, array)
    return path


def _truncated(path: Path) -> Path:
    np.save(path, np.zeros((3, 4, 8), np.float32))
    path.write_bytes(path.read_bytes()[:-100])
    return path


def test_a_folder_that_is_no_bundle_is_named(tmp_path, tokens, capsys):
    np.save(tmp_path / "in.npy", tokens)
    files = ["--tokens", os.fspath(tmp_path / "in.npy"), "--out", os.fspath(tmp_path / "out.npz")]
    err = error_of(capsys, main, ["synthesize", "--model", os.fspath(tmp_path), *files])
    assert f"{tmp_path} is not a bundle" in err
    assert "config.json" in err


def experiment(**changes) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {
        "fmri": rng.normal(size=(24, 10)).astype(np.float32),
        "stimulus_id": np.repeat(np.arange(8), 3),
        "tokens": np.repeat(rng.normal(size=(8, 4, 8)), 3, axis=0).astype(np.float32),
        "run": np.tile(np.arange(3), 8),
    }
    arrays = {**arrays, **changes}
    return {name: array for name, array in arrays.items() if array is not None}


def with_nan() -> np.ndarray:
    fmri = experiment()["fmri"].copy()
    fmri[5, 2] = np.nan
    return fmri


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fmri": None}, ["fmri", "missing"]),
        ({"fmri": np.zeros((24, 10, 2), np.float32)}, ["fmri", "(24, 10, 2)", "[n, v]"]),
        ({"fmri": with_nan()}, ["fmri", "1"]),
        ({"fmri": np.full((24, 10), np.inf, np.float32)}, ["fmri", "240"]),
        ({"run": np.arange(20)}, ["run", "20", "24"]),
        ({"stimulus_id": np.arange(23)}, ["stimulus_id", "23", "24"]),
        ({"tokens": np.zeros((7, 4, 8), np.float32)}, ["tokens", "7"]),
        ({"fmir": np.zeros(3)}, ["fmir", "fmri"]),
    ],
    ids=["missing", "shape", "nan", "infinite", "runs", "labels", "tokens", "misspelt"],
)
def test_arrays_that_cannot_be_trained_on_leave_nothing_behind(changes, words, tmp_path, capsys):
    source = tmp_path / "mine.npz"
    np.savez(source, **experiment(**changes))
    workdir = tmp_path / "workdir"
    err = error_of(capsys, train.main, ["arrays", "--data.source", os.fspath(source), "--workdir", os.fspath(workdir)])
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert os.fspath(source) in err
    for word in words:
        assert word in err
    assert not workdir.exists()


def test_a_truncated_file_is_named(tmp_path, capsys):
    source = tmp_path / "mine.npz"
    np.savez(source, **experiment())
    source.write_bytes(source.read_bytes()[:-200])
    arguments = ["arrays", "--data.source", os.fspath(source), "--workdir", os.fspath(tmp_path / "workdir")]
    assert os.fspath(source) in error_of(capsys, train.main, arguments)
    assert not (tmp_path / "workdir").exists()


def test_an_unknown_experiment_or_option_gets_the_nearest(tmp_path, capsys):
    assert "did you mean 'haxby'" in error_of(capsys, train.main, ["haxbi"])
    workdir = ["--workdir", os.fspath(tmp_path / "w")]
    assert "--stage1.batch-size" in error_of(capsys, train.main, ["haxby", *workdir, "--stage1.bach-size", "3"])
    assert "data.source" in error_of(capsys, train.main, ["arrays", *workdir])
    assert "stage2.batch_size" in error_of(capsys, train.main, ["haxby", *workdir, "--stage2.batch-size", "9"])
    assert not (tmp_path / "w").exists()


def test_a_workdir_of_another_run_is_refused(tmp_path, capsys):
    config = json.loads(Config(name="haxby").to_json())
    (tmp_path / "config.json").write_text(json.dumps(config))
    err = error_of(capsys, train.main, ["haxby", "--workdir", os.fspath(tmp_path)])
    assert "belongs to another run" in err
    assert "stage1.steps: 1000 here, 400 there" in err
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_prepared_arrays_can_be_evaluated(tmp_path, bundle, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "SAMPLED_STIMULI", 3)
    source = tmp_path / "mine.npz"
    rng = np.random.default_rng(0)
    np.savez(source, **experiment(fmri=rng.normal(size=(24, 30)).astype(np.float32)))
    main(["prepare", "arrays", "--source", os.fspath(source), "--data-dir", os.fspath(tmp_path / "data"), "--name", "x",
          "--validation-runs", "1", "--test-runs", "2"])  # fmt: skip
    prepared = capsys.readouterr().out.strip()
    out = tmp_path / "scores"
    main(["evaluate", "--model", os.fspath(bundle), "--data", prepared, "--out", os.fspath(out)])
    assert "stimulus_mean" in capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    assert report["n_stimuli"] == 8
    assert report["scores"]["mean_pattern"]["pattern_r_centred"] == 0
    # Without the residuals that the spread was fitted to, what is made of them is left out.
    assert report["calibration"]["rows"].keys() == {"independent", "posterior", "latent_noise", "calibrated"}
    assert report["calibration"]["left_out"].keys() == {"ledoit_wolf", "resampled"}
    with np.load(out / "predictions.npz") as file:
        written = dict(file)
    test, system, chosen = load_trials(open_dataset(prepared), "test"), load_pretrained(bundle), [0, 4, 7]
    assert list(written["sampled_id"]) == [test.stimulus_id[row] for row in chosen]
    for place, row in enumerate(chosen):
        own = written["trials"][written["trial_stimulus"] == place]
        np.testing.assert_array_equal(own, test.fmri[test.stimulus == row])
    samples = system.synthesize(test.tokens[chosen], jax.random.key(0), k=8, variability="calibrated")
    np.testing.assert_allclose(written["samples"], samples, atol=1e-5)
    main(["evaluate", "--model", os.fspath(bundle), "--data", prepared, "--out", os.fspath(out), "--shift-tokens", "1"])
    with np.load(out / "predictions.npz") as file:
        np.testing.assert_allclose(file["prediction"], np.roll(written["prediction"], -1, axis=0), atol=1e-5)
        shifted = system.synthesize(test.tokens[[1, 5, 0]], jax.random.key(0), k=8, variability="calibrated")
        np.testing.assert_allclose(file["samples"], shifted, atol=1e-5)
    shifted = json.loads((out / "report.json").read_text())
    assert shifted["scores"]["model"] != report["scores"]["model"]
    assert shifted["scores"]["ridge"] == report["scores"]["ridge"]


def test_data_of_another_brain_are_refused(tmp_path, bundle, capsys):
    np.savez(tmp_path / "mine.npz", **experiment(fmri=np.random.default_rng(0).normal(size=(24, 29))))
    prepared = os.fspath(prepare_arrays(tmp_path / "mine.npz", tmp_path / "data", name="x"))
    out = os.fspath(tmp_path / "scores")
    err = error_of(capsys, main, ["evaluate", "--model", os.fspath(bundle), "--data", prepared, "--out", out])
    assert "29 voxels of" in err
    assert "but the model synthesises 30 of s; give the data set that it was trained on" in err
    assert not os.path.exists(out)


def test_baselines_learn_from_as_much_as_the_model_did(tmp_path, bundle):
    source, out = tmp_path / "mine.npz", tmp_path / "scores"
    rng = np.random.default_rng(0)
    np.savez(source, **experiment(fmri=rng.normal(size=(24, 30)).astype(np.float32)))
    dataset = open_dataset(prepare_arrays(source, tmp_path / "data", name="x", validation_runs=(1,), test_runs=(2,)))
    limited = load_bundle(bundle)
    config = dataclasses.replace(limited.config, data=DataConfig(stimuli=3))
    save_bundle(tmp_path / "bundle", dataclasses.replace(limited, config=config))
    files = ["--model", os.fspath(tmp_path / "bundle"), "--data", os.fspath(dataset.path), "--out", os.fspath(out)]
    main(["evaluate", *files])
    train_of_model, test = (load_trials(dataset.limited(stimuli=3), split) for split in ("train", "test"))
    assert len(train_of_model.stimulus_id) == 3 < len(test.stimulus_id)
    with np.load(out / "predictions.npz") as file:
        assert list(file["stimulus_id"]) == list(test.stimulus_id)
        expected = np.tile(train_of_model.fmri.mean(axis=0), (len(test.stimulus_id), 1))
        np.testing.assert_allclose(file["prediction_mean_pattern"], expected, atol=1e-6)


def test_experiment_runs_a_study_and_shows_what_it_found(tmp_path, capsys, monkeypatch):
    asked = []

    def study(settings):
        asked.append(settings)
        claim = Claim("It works", True, "1 > 0")
        return Document("A study", {"command": settings.command}, (Section("Only", claims=(claim,)),))

    monkeypatch.setattr(studies, "study_of", lambda name: study if name == "encode" else None)
    monkeypatch.chdir(ROOT)
    workdir = tmp_path / "my studies"
    arguments = ["experiment", "encode", "haxby", "--workdir", os.fspath(workdir), "--seeds", "4", "2"]
    main([*arguments, "--change", "stage1.steps=7", "data.permute=trial", "--quick"])
    (settings,) = asked
    assert settings.config.name == "haxby"
    assert settings.config.stage1.steps == 7
    assert settings.config.data.permute == "trial"
    assert (settings.seeds, settings.quick, settings.categories) == ((4, 2), True, None)
    assert os.fspath(settings.workdir) == os.fspath(workdir)
    changes = "--change stage1.steps=7 data.permute=trial"
    assert settings.command == f"synbrain experiment encode haxby {changes} --workdir '{workdir}' --seeds 4 2 --quick"
    folder, printed = workdir / "encode-haxby", capsys.readouterr().out
    assert "**holds**: It works" in printed
    assert printed.endswith(f"The page: {folder / 'report.html'}\n")
    assert sorted(path.name for path in folder.iterdir()) == ["document.json", "report.html", "report.md"]
    assert (folder / "report.md").read_text() in printed
    main(["report", os.fspath(folder)])
    assert capsys.readouterr().out == printed
    main(["report", os.fspath(folder), os.fspath(folder), "--out", os.fspath(tmp_path / "all")])
    assert capsys.readouterr().out == f"The page: {tmp_path / 'all' / 'report.html'}\n"
    assert (tmp_path / "all" / "report.md").read_text().count("## A study") == 2


def test_what_experiment_or_report_cannot_use_is_one_clear_error(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert "did you mean 'haxby'" in error_of(capsys, main, ["experiment", "encode", "haxbi"])
    assert "augment" in error_of(capsys, main, ["experiment", "agument", "haxby"])
    workdir = ["--workdir", os.fspath(tmp_path / "w")]
    assert "each once" in error_of(capsys, main, ["experiment", "encode", "haxby", *workdir, "--seeds", "1", "1"])
    unknown = ["experiment", "encode", "haxby", *workdir, "--change", "stage1.stepps=3"]
    assert "did you mean 'steps'" in error_of(capsys, main, unknown)
    assert "no such folder" in error_of(capsys, main, ["report", os.fspath(tmp_path / "absent")])
    assert "no folder given" in error_of(capsys, main, ["report"])
    assert list(tmp_path.iterdir()) == []
