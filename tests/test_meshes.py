"""Both stages, trained for a few steps on one device and on eight, split in different ways, end alike."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from synbrain_jax import stages
from synbrain_jax.config import OptimizerConfig, Stage1Config, Stage2Config
from synbrain_jax.data.pairs import load_trials
from synbrain_jax.models.brain_vae import BrainVAE
from synbrain_jax.training import fit


def relative(actual, expected) -> float:
    """||actual - expected|| / ||expected|| over all leaves."""
    pairs = list(zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True))
    off = sum(np.sum((np.asarray(a, np.float64) - np.asarray(b)) ** 2) for a, b in pairs)
    return float(np.sqrt(off / sum(np.sum(np.asarray(b, np.float64) ** 2) for _, b in pairs)))


REAL = tiny.config(
    seed=3,
    stage1=Stage1Config(
        steps=4,
        batch_size=8,
        eval_every=4,
        average_share=0.5,
        optimizer=OptimizerConfig(learning_rate=2e-3, weight_decay=0.05),
    ),
    stage2=Stage2Config(
        steps=4,
        batch_size=8,
        eval_every=4,
        optimizer=OptimizerConfig(learning_rate=2e-3, clip_norm=1.0, ema_decay=0.9),
    ),
)


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """What both stages gave on one mesh, on the host."""

    logs: dict[str, list[dict]]
    brain_vae: dict
    targets: np.ndarray
    mapper: dict


@pytest.fixture(scope="module")
def trained(tiny_dataset, tmp_path_factory):
    """Trains both stages on a mesh, by its name, and each mesh once."""
    validation = load_trials(tiny_dataset, "validation")
    initial = tiny.random_params(REAL)  # handed in, because to compile the real initialisation takes longest

    @cache
    def on(name) -> Trained:
        folder, mesh = tmp_path_factory.mktemp("mesh"), tiny.mesh_of(name)
        stage = stages.stage1(REAL, tiny_dataset, validation)
        stage = dataclasses.replace(stage, init=lambda _: jax.tree.map(jnp.array, initial["brain_vae"]))
        brain_vae = fit(stage, REAL, mesh, folder / "stage1")
        targets, _ = stages.encode_stimuli(REAL, tiny_dataset, brain_vae, folder / "stage2")
        stage = stages.stage2(REAL, tiny_dataset, validation, brain_vae, targets)
        stage = dataclasses.replace(stage, init=lambda _: jax.tree.map(jnp.array, initial["mapper"]))
        mapper = fit(stage, REAL, mesh, folder / "stage2")
        logs = {name: tiny.log_of(folder / name) for name in ("stage1", "stage2")}
        return Trained(logs, jax.device_get(brain_vae), np.array(targets), jax.device_get(mapper))

    return on


@cache
def outputs(dataset):
    """All that BrainVAE makes of the validation trials, as a function of the parameters, on one device."""
    fmri = jnp.asarray(load_trials(dataset, "validation").fmri)
    return jax.jit(lambda params: BrainVAE(REAL.brain_vae).apply({"params": params}, fmri))


def split_by_effect(params: dict, outputs) -> tuple[dict, dict]:
    """The parameters (by name) on which the outputs depend, and those on which they do not.

    A bias before a normalisation over positions, or of attention keys, changes nothing. Its gradient is rounding noise,
    and AdamW takes a full step in the direction of the noise.
    """
    with_effect, without = {}, {}
    before = outputs(params)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for place, (path, leaf) in enumerate(leaves):
        moved = leaf + 0.3 * np.cos(np.arange(leaf.size, dtype=np.float32)).reshape(leaf.shape)
        changed = [moved if i == place else other for i, (_, other) in enumerate(leaves)]
        after = outputs(jax.tree.unflatten(jax.tree.structure(params), changed))
        (with_effect if relative(after, before) > 1e-5 else without)[jax.tree_util.keystr(path)] = leaf
    return with_effect, without


OTHERS = ["data 8", "2 x 2 x 2"]


@pytest.mark.parametrize("name", OTHERS)
def test_training_losses_do_not_depend_on_the_mesh(trained, name):
    for stage in ("stage1", "stage2"):
        pairs = zip(trained(name).logs[stage], trained("1").logs[stage], strict=True)
        training = [pair for pair in pairs if "train/loss" in pair[0]]
        assert len(training) == 4
        for found, expected in training:
            assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", OTHERS)
def test_validation_does_not_depend_on_the_mesh(trained, name):
    for stage in ("stage1", "stage2"):
        found, expected = (run.logs[stage][-1] for run in (trained(name), trained("1")))
        assert "val/mse" in found
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)  # correlations are near 0


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_learnt_does_not_depend_on_the_mesh(trained, tiny_dataset, name):
    """Relative to its norm: the latents, the mapper, and BrainVAE's parameters but for those that have no effect."""
    found, expected = trained(name), trained("1")
    assert relative(found.targets, expected.targets) < 1e-5
    assert relative(found.mapper, expected.mapper) < 1e-5
    synthesis = outputs(tiny_dataset)
    assert relative(synthesis(found.brain_vae), synthesis(expected.brain_vae)) < 1e-5
    with_effect, without = split_by_effect(expected.brain_vae, synthesis)
    by_name = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(found.brain_vae)}
    assert relative({name: by_name[name] for name in with_effect}, with_effect) < 1e-5
    assert all(name.endswith("['bias']") for name in without)
    # These have moved by at most the sum of learning rates, up on one mesh and down on the other.
    assert all(np.abs(by_name[name] - leaf).max() < 2 * 4 * 2e-3 for name, leaf in without.items())
