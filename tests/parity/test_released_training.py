"""Training against the released system: traces of AdamW, clipping and averaging, and steps after its checkpoints."""

import golden_set
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from golden_set import load, on_device

from synbrain_jax.config import OptimizerConfig, Stage1Config, Stage2Config
from synbrain_jax.interop.torch_training import training_state
from synbrain_jax.interop.torch_weights import (
    from_released,
    our_array,
    read_brain_vae,
    read_mapper,
    released_key,
)
from synbrain_jax.models.brain_vae import BrainVAE, brain_vae_shapes
from synbrain_jax.models.semantic_to_neural import SemanticToNeural, mapper_shapes
from synbrain_jax.sharding import make_mesh, state_sharding
from synbrain_jax.stages import brain_vae_loss, mapper_loss
from synbrain_jax.training import init_state, make_optimizer, make_train_step

# One step of AdamW on noise is about a learning rate: what two correct programs may differ by.
NOISY_STEPS = 2
VAE_TRAIN, SIT_TRAIN = load("brainvae_train.npz"), load("sit_train.npz")


def vae_loss_at_the_mean(config):
    """The stage-1 loss without sampling, with the released weights."""
    loss = brain_vae_loss(BrainVAE(config), Stage1Config(loss_scale="sum", clip_weight=1000.0, kl_weight=0.001))
    return lambda params, frozen, batch, key: loss(params, frozen, batch, None)


def sit_loss(config):
    return mapper_loss(
        SemanticToNeural(config), BrainVAE(golden_set.brain_vae_config()), Stage2Config(target="stimulus_mean")
    )


def vae_batch(fmri, tokens):
    return {"fmri": jnp.asarray(fmri[:, 0]), "tokens": jnp.asarray(tokens)}


def sit_batch(images, latent):
    return {"tokens": jnp.asarray(images), "fmri": jnp.zeros((len(images), 1)), "latent": jnp.asarray(latent)}


def by_key(params):
    return {released_key(path): np.asarray(leaf) for path, leaf in flatten_dict(params).items()}


def target_of(shapes, optimizer, averaged):
    """What `fit` hands to `training_state`."""
    fresh = jax.eval_shape(
        lambda: init_state(
            lambda _: jax.tree.map(lambda s: jnp.zeros(s.shape), shapes), optimizer, averaged, jax.random.key(0)
        )
    )
    places = state_sharding(fresh, make_mesh(devices=jax.devices()[:1]))
    return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), fresh, places)


# ---- traces ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vae_step():
    config, optimizer = golden_set.brain_vae_config(), make_optimizer(OptimizerConfig(weight_decay=0.05), 1)
    return optimizer, golden_set.jit(make_train_step(vae_loss_at_the_mean(config), optimizer, None))


def test_brain_vae_trace(vae_step, compare):
    file, optimizer, step = "brainvae_train.npz", *vae_step
    shapes = brain_vae_shapes(golden_set.brain_vae_config())
    params = on_device(from_released(load("brainvae_params.npz"), shapes, "brainvae_params.npz"))
    state = init_state(lambda _: params, optimizer, False, jax.random.key(0))
    voxels = VAE_TRAIN["x"].shape[-1]
    seen = []
    for fmri, tokens in [
        *zip(VAE_TRAIN["x"], VAE_TRAIN["clip"], strict=True),
        (VAE_TRAIN["x"][0], VAE_TRAIN["clip"][0]),
    ]:
        before = state
        state, terms = step(state, {}, vae_batch(fmri, tokens), jax.random.key(0))
        seen.append([terms["mse"] * voxels, terms["kl"], terms["soft_clip"], terms["loss"]])
    for name, actual in (("losses", np.array(seen[:-1])), ("losses_after", np.array(seen[-1]))):
        compare_losses(compare, file, name, actual, VAE_TRAIN[name], VAE_TRAIN[f"{name}_f64"], 2e-6)
    zero, noise = golden_set.zero_gradients("grads"), golden_set.load_json("noise_brainvae.json")["train_final"]
    for key, ours in by_key(before.params).items():
        expected = our_array(key, VAE_TRAIN[f"final/{key}"])
        atol = 1e-3 if key in zero else max(5e-6, 2 * noise[key]["max_abs_diff_f32_f64"])
        compare(file, f"final/{key}", ours, expected, atol=atol)


@pytest.mark.parametrize(("decay", "name"), [(0.9999, "ema"), (0.9, "ema09")])
def test_mapper_trace(compare, decay, name):
    file, config = "sit_train.npz", golden_set.mapper_config(positions="stored")
    optimizer = make_optimizer(OptimizerConfig(clip_norm=1.0), 1)
    step = golden_set.jit(make_train_step(sit_loss(config), optimizer, decay))
    params = on_device(from_released(load("sit_params.npz"), mapper_shapes(config), "sit_params.npz"))
    state = init_state(lambda _: params, optimizer, True, jax.random.key(0))
    losses, norms = [], []
    for images, latent in zip(SIT_TRAIN["images"], SIT_TRAIN["fmri"], strict=True):
        state, terms = step(state, {}, sit_batch(images, latent), jax.random.key(0))
        losses.append(terms["loss"])
        norms.append(terms["grad_norm"])
    assert min(norms) < 1 < max(norms)  # clipped and not clipped
    for column, actual, tolerance in (("losses", losses, 2e-6), ("grad_norms", norms, 1e-4)):
        stored, exact = SIT_TRAIN[column], SIT_TRAIN[f"{column}_f64"]
        compare_losses(compare, file, column, np.array(actual), stored, exact, tolerance)
    for kind, tree in (("final", state.params), (name, state.ema)):
        for key, ours in by_key(tree).items():
            compare_trained(compare, file, f"{kind}/{key}", ours, our_array(key, SIT_TRAIN[f"{kind}/{key}"]), 5e-6)


def compare_losses(compare, file, name, actual, stored, exact, tolerance):
    """Each number relative to itself, with two allowances. A mean square of differences that nearly cancel has an error
    of about their rounding times its root; and where the release's own float32 is further from float64, ours may be."""
    rounding = 1e-7 * np.sqrt(np.abs(exact) * np.abs(exact).max(axis=0))
    limit = np.maximum(tolerance * np.abs(exact) + rounding, 2 * np.abs(stored - exact))
    for suffix, expected in (("", stored), ("_f64", exact)):
        compare(file, name + suffix, (actual - expected) / limit, np.zeros_like(expected), atol=1.0)


def compare_trained(compare, file, name, ours, expected, atol):
    """Parameters after training; the gradient of the keys' third of a qkv bias is zero but for rounding."""
    if name.endswith("qkv.bias"):
        third = len(expected) // 3
        keys = slice(third, 2 * third)
        compare(file, f"{name}, keys", ours[keys], expected[keys], atol=1e-3)
        ours, expected = np.delete(ours, keys), np.delete(expected, keys)
    compare(file, name, ours, expected, atol=atol)


# ---- checkpoints -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stage1():
    """Configuration and parameters of the stored stage-1 checkpoint, and what the release computed with it."""
    return *read_brain_vae(golden_set.folder / "ckpt_vae/last.pth"), load("ckpt_vae/expected.npz")


@pytest.fixture(scope="module")
def stage2():
    return load("ckpt_sit/expected.npz")


def test_stage_1_checkpoint(stage1, compare):
    config, params, expected = stage1
    assert config == golden_set.brain_vae_config("ckpt_brainvae")
    model, file = BrainVAE(config), "ckpt_vae/expected.npz"
    encode = golden_set.jit(lambda params, x: model.apply({"params": params}, x, method="encode"))
    length = int(expected["target_length"])
    decode = golden_set.jit(lambda params, z: model.apply({"params": params}, z, length, method="decode"))
    posterior = encode(params, jnp.asarray(expected["x"][:, 0]))
    compare(file, "posterior_mean", posterior.mean, expected["posterior_mean"], 2e-5)
    compare(file, "posterior_logvar", posterior.logvar, expected["posterior_logvar"], 2e-5)
    compare(file, "decode_out", decode(params, jnp.asarray(expected["z"])), expected["decode_out"][:, 0], 2e-5)


def test_stage_1_goes_on_where_pytorch_stopped(stage1, compare):
    config, params, expected = stage1
    file, settings = "ckpt_vae/expected.npz", OptimizerConfig(weight_decay=0.05)
    optimizer = make_optimizer(settings, 1)
    target = target_of(brain_vae_shapes(config), optimizer, averaged=False)
    state = training_state(golden_set.folder / "ckpt_vae/last.pth", target)
    jax.tree.map(np.testing.assert_array_equal, state.params, params)
    noise = without_effect(config, params, expected["next_x"])
    step = golden_set.jit(make_train_step(vae_loss_at_the_mean(config), optimizer, None))
    after, terms = step(state, {}, vae_batch(expected["next_x"], expected["next_clip"]), jax.random.key(0))
    assert int(after.step) == int(state.step) + 1
    compare(file, "next_total_loss", terms["loss"], expected["next_total_loss"], 2e-6)
    ours = by_key(after.params)
    compared = [key.removeprefix("next/") for key in expected if key.startswith("next/")]
    for key in compared:
        atol = 2 * NOISY_STEPS * settings.learning_rate if key in noise else 5e-6
        compare(file, f"next/{key}", ours[key], our_array(key, expected[f"next/{key}"]), atol=atol)


def without_effect(config, params, fmri):
    """The biases that may be anything: what a normalisation or a softmax removes. Their gradient is rounding noise."""
    model, fmri = BrainVAE(config), jnp.asarray(fmri[:, 0])
    run = golden_set.jit(lambda params: model.apply({"params": params}, fmri)[:2])
    before = run(params)
    size = max(np.abs(leaf).max() for leaf in jax.tree.leaves(before))
    found = set()
    for path, bias in flatten_dict(params).items():
        if path[-1] == "bias":
            changed = unflatten_dict({**flatten_dict(params), path: bias + 0.5})
            moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), run(changed), before)
            if max(jax.tree.leaves(moved)) <= 1e-5 * size:
                found.add(released_key(path))
    return found


@pytest.mark.parametrize(("averaged", "name"), [(True, "y_ema_t0"), (False, "y_model_t0")])
def test_stage_2_checkpoint(stage2, compare, averaged, name):
    config, params = read_mapper(golden_set.folder / "ckpt_sit/last.pt", averaged=averaged)
    assert config == golden_set.mapper_config(positions="stored")
    output = golden_set.jit(SemanticToNeural(config).apply)({"params": params}, jnp.asarray(stage2["x"]))
    compare("ckpt_sit/expected.npz", name, output, stage2[name], 1e-5)


def test_stage_2_goes_on_where_pytorch_stopped(stage2, compare):
    file, config = "ckpt_sit/expected.npz", golden_set.mapper_config(positions="stored")
    settings = OptimizerConfig(learning_rate=1e-2, clip_norm=1.0, ema_decay=0.7)
    optimizer = make_optimizer(settings, 1)
    target = target_of(mapper_shapes(config), optimizer, averaged=True)
    state = training_state(golden_set.folder / "ckpt_sit/last.pt", target)
    assert int(state.step) == int(stage2["steps"])
    step = golden_set.jit(make_train_step(sit_loss(config), optimizer, settings.ema_decay))
    after, terms = step(state, {}, sit_batch(stage2["next_images"], stage2["next_fmri"]), jax.random.key(0))
    compare(file, "next_loss", terms["loss"], stage2["next_loss"], 2e-6)
    for kind, tree in (("next_model", after.params), ("next_ema", after.ema)):
        ours = by_key(tree)
        for name in [name for name in stage2 if name.startswith(f"{kind}/")]:
            key = name.removeprefix(f"{kind}/")
            compare(file, name, ours[key], our_array(key, stage2[name]), atol=5e-6)
