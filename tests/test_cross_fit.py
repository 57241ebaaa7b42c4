"""`run.py`: how far predictions of unseen trials are off, and the bundle that knows it."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
import tiny
from etils import epath

from synbrain_jax import run, stages
from synbrain_jax.checkpoint import load_bundle
from synbrain_jax.config import VariabilityConfig
from synbrain_jax.data.arrays import prepare_arrays
from synbrain_jax.data.pairs import load_trials, open_dataset
from synbrain_jax.errors import InputError
from synbrain_jax.sharding import make_mesh

CONFIG = tiny.config(variability=VariabilityConfig(folds=3, ranks=(0, 1)))


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def brain_vae():
    return tiny.random_params(CONFIG)["brain_vae"]


def cross_fit(dataset, brain_vae, mesh, workdir, config=CONFIG):
    validation = [load_trials(dataset, "validation")]
    run._cross_fit(config, [dataset], validation, brain_vae, mesh, workdir)
    return run._load(workdir)


@pytest.fixture(scope="module")
def residuals(tiny_dataset, brain_vae, mesh, tmp_path_factory):
    workdir = epath.Path(tmp_path_factory.mktemp("crossfit"))
    return workdir, cross_fit(tiny_dataset, brain_vae, mesh, workdir)


def test_every_training_trial_has_a_residual_and_the_models_of_the_parts_are_gone(residuals, tiny_dataset):
    workdir, found = residuals
    trials = load_trials(tiny_dataset, "train")
    assert found.values.shape == trials.fmri.shape
    assert np.isfinite(found.values).all()
    np.testing.assert_array_equal(found.group, trials.run)  # the test's stimuli occur in training: runs are held out
    assert sorted(path.name for path in (workdir / "crossfit").iterdir()) == ["group.npy", "residuals.npy"]
    np.testing.assert_array_equal(run.residuals_of(workdir), found.values)
    assert run.residuals_of(workdir / "elsewhere") is None


def test_no_trial_has_a_say_in_its_own_prediction(residuals, brain_vae, mesh, tmp_path):
    """With BrainVAE fixed, a trial moved far away moves its own residual by just that, and those of its part not."""
    file = tmp_path / "tiny.npz"
    tiny.write_experiment(file)
    with np.load(file) as arrays:
        arrays = dict(arrays)
    moved = int(np.flatnonzero(arrays["split"] == "train")[5])
    arrays["fmri"][moved] += 3
    np.savez(file, **arrays)
    dataset = open_dataset(prepare_arrays(file, tmp_path / "data", name="tiny"))
    again = cross_fit(dataset, brain_vae, mesh, epath.Path(tmp_path / "work"))
    _, before = residuals
    changed = np.abs(np.asarray(again.values) - np.asarray(before.values)).max(axis=1)
    own = int(np.argmax(changed))
    np.testing.assert_allclose(again.values[own] - before.values[own], 3, atol=1e-5)
    fold = [run._fold(before.group, 3, number) for number in range(3)]
    (part,) = [mask for mask in fold if mask[own]]
    others = part.copy()
    others[own] = False
    assert others.any()
    assert changed[others].max() < 1e-6
    assert changed[~part].min() > 1e-6  # whose mappers have learnt from it


def test_parts_are_disjoint_whole_groups_and_everything():
    group = np.repeat(np.arange(7), 3)
    masks = [run._fold(group, 3, number) for number in range(3)]
    np.testing.assert_array_equal(sum(mask.astype(int) for mask in masks), 1)
    assert all(len(np.unique(mask[group == one])) == 1 for mask in masks for one in range(7))
    with pytest.raises(InputError, match=r"variability\.folds is 8; expected at most 7"):
        run._fold(group, 8, 0)


def test_too_little_to_hold_out_is_said_before_anything_is_trained(tiny_dataset, mesh, tmp_path, monkeypatch):
    config = dataclasses.replace(CONFIG, variability=VariabilityConfig(folds=100, ranks=(0, 1)))
    monkeypatch.setattr(run, "fit", None)
    with pytest.raises(InputError, match=r"variability\.folds is 100"):
        run.train(config, [tiny_dataset], [load_trials(tiny_dataset, "validation")], mesh, epath.Path(tmp_path))


def test_new_stimuli_are_held_out_where_the_test_has_new_ones(tmp_path):
    rng = np.random.default_rng(0)
    stimulus = np.repeat(np.arange(12), 2)
    np.savez(
        tmp_path / "new.npz",
        fmri=rng.normal(size=(24, 10)).astype(np.float32),
        tokens=rng.normal(size=(12, 4, 8)).astype(np.float32)[stimulus],
        stimulus_id=stimulus,
        run=np.arange(24) % 2,
        split=np.repeat(["train", "validation", "test"], [16, 4, 4]),
    )
    dataset = open_dataset(prepare_arrays(tmp_path / "new.npz", tmp_path / "data", name="new"))
    trials = load_trials(dataset, "train")
    np.testing.assert_array_equal(run._group(dataset, trials), trials.stimulus)


def test_what_was_stopped_between_two_parts_goes_on(residuals, tiny_dataset, brain_vae, mesh, tmp_path, monkeypatch):
    workdir, expected = residuals
    part_way = epath.Path(tmp_path / "work")
    fitted, fit = [], stages.stage2

    def stops(*arguments):
        fitted.append(arguments)
        if len(fitted) == 2:
            raise KeyboardInterrupt
        return fit(*arguments)

    monkeypatch.setattr(stages, "stage2", stops)
    with pytest.raises(KeyboardInterrupt):
        cross_fit(tiny_dataset, brain_vae, mesh, part_way)
    assert run.residuals_of(part_way) is None
    monkeypatch.setattr(stages, "stage2", fit)
    np.testing.assert_array_equal(cross_fit(tiny_dataset, brain_vae, mesh, part_way).values, expected.values)
    monkeypatch.setattr(stages, "stage2", stops)  # nothing is trained where the residuals are
    shutil.copytree(workdir, tmp_path / "done")
    cross_fit(tiny_dataset, brain_vae, mesh, epath.Path(tmp_path / "done"))


@pytest.mark.parametrize("folds", [0, 1, 3])
def test_the_bundle_knows_the_spread_that_was_asked_for(residuals, tiny_dataset, mesh, tmp_path, folds):
    home = epath.Path(tmp_path / "home")
    config = dataclasses.replace(CONFIG, variability=VariabilityConfig(folds=folds, ranks=(0, 1)))
    if folds == 3:
        shutil.copytree(residuals[0], home)
    validation = load_trials(tiny_dataset, "validation")
    trained = run.Trained(tiny.random_params(config), (np.ones((tiny.TOKENS, tiny.WIDTH), np.float32),))
    system = run.export(config, trained, 0, tiny_dataset, validation, mesh, home)
    spread = load_bundle(home / "bundle").spread
    if folds == 0:
        assert spread is None
        return
    off = (
        validation.fmri - system.predict(validation.tokens)[validation.stimulus] if folds == 1 else residuals[1].values
    )
    np.testing.assert_allclose(run.residuals_of(home), off, atol=1e-6)
    np.testing.assert_allclose(spread.variance, np.mean(np.asarray(off) ** 2, axis=0), rtol=0.02)
    assert set(spread.nll) <= {0, 1}


def test_any_bundle_can_be_calibrated(tiny_dataset, mesh, tmp_path):
    """As `export` does, whatever correction it had before."""
    validation = load_trials(tiny_dataset, "validation")
    config = dataclasses.replace(CONFIG, variability=VariabilityConfig(folds=1, ranks=(0, 1)))
    trained = run.Trained(tiny.random_params(config), (np.ones((tiny.TOKENS, tiny.WIDTH), np.float32),))
    expected = run.export(config, trained, 0, tiny_dataset, validation, mesh, epath.Path(tmp_path / "home")).bundle
    before = dataclasses.replace(expected, offset=expected.offset + 1, gain=3.0, spread=None)
    found = run.calibrated(before, tiny_dataset, mesh)
    np.testing.assert_allclose(found.offset, expected.offset, atol=1e-6)
    assert found.gain == pytest.approx(expected.gain)
    np.testing.assert_allclose(found.spread.variance, expected.spread.variance, rtol=1e-5)
    few = dataclasses.replace(expected, voxels=expected.voxels.select(np.arange(7)))
    with pytest.raises(InputError, match=r"40 voxels of .* but the model synthesises 7"):
        run.calibrated(few, tiny_dataset, mesh)
    index = tiny_dataset._index["validation"]
    first = index.only(np.arange(len(index.row)) == 0)
    one = dataclasses.replace(tiny_dataset, _index={**tiny_dataset._index, "validation": first})
    with pytest.raises(InputError, match="validation trials are of one stimulus"):
        run.calibrated(expected, one, mesh)
