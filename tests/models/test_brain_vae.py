"""BrainVAE against the arrays, losses, gradients and parameter counts of the released system."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from released import brain_vae_config, load, our_array, our_name, relative_error, to_params

from synbrain_jax import losses
from synbrain_jax.models.brain_vae import BrainVAE, BrainVAEConfig, Posterior

FORWARD, SHORT, SMALL = load("brainvae_forward.npz"), load("brainvae_forward_short.npz"), load("eps_sensitive.npz")
GRADIENTS = load("brainvae_grads.npz")
SAMPLED_GRADIENTS = load("brainvae_grads_sampled_subset.npz")
SIT = load("sit_forward.npz")
MODEL = BrainVAE(brain_vae_config())
LONG, OTHER = FORWARD["x"].shape[-1], SHORT["x"].shape[-1]

# Zero but for rounding: a constant added before a softmax over keys or a normalisation over positions changes nothing.
ZERO_GRADIENTS = {
    "encoder.down.0.block.0.conv1.bias",
    "encoder.mid.attn_1.k.bias",
    "encoder.conv_out.bias",
    "decoder.mid.attn_1.k.bias",
    "decoder.up.0.block.0.conv1.bias",
    "decoder.up.0.block.0.conv2.bias",
    "decoder.up.0.block.0.nin_shortcut.bias",
    "decoder.up.0.block.1.conv1.bias",
    "decoder.up.0.block.1.conv2.bias",
}


def voxels(array):
    return jnp.asarray(array[:, 0])


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(jnp.asarray, to_params(load("brainvae_params.npz")))


@pytest.fixture(scope="module")
def inspect(params):
    """Posterior of patterns, latents decoded to both lengths, and the output of every module on the way."""

    @jax.jit
    def run(fmri, latent):
        def both(model, fmri, latent):
            return model.encode(fmri), model.decode(latent, LONG), model.decode(latent, OTHER)

        return MODEL.apply(
            {"params": params}, fmri, latent, method=both, capture_intermediates=True, mutable=["intermediates"]
        )

    return run


@pytest.fixture(scope="module")
def forward(inspect):
    return inspect(voxels(FORWARD["x"]), jnp.asarray(FORWARD["decode_z"]))


@pytest.fixture(scope="module")
def loss_and_gradient():
    """Losses, outputs and gradients of one stage-1 step; `noise` stands in for the posterior's own draw."""

    @jax.jit
    def run(params, fmri, tokens, noise=None):
        def total(params):
            with mock.patch.object(jax.random, "normal", return_value=noise):
                output = MODEL.apply({"params": params}, fmri, None if noise is None else jax.random.key(0))
            parts = {
                "recon": losses.squared_error(output.reconstruction, fmri),
                "kl": losses.kl_to_standard_normal(*output.posterior),
                "clip": losses.soft_clip(output.latent, tokens),
            }
            parts["total"] = parts["recon"] + 0.001 * parts["kl"] + 1000 * parts["clip"]
            return parts["total"], (parts, output)

        gradient, aux = jax.grad(total, has_aux=True)(params)
        return *aux, flatten_dict(gradient)

    return run


@pytest.fixture(scope="module")
def at_the_mean(params, loss_and_gradient):
    noise = jnp.zeros_like(FORWARD["eps"])
    return loss_and_gradient(params, voxels(FORWARD["x"]), jnp.asarray(FORWARD["clip"]), noise)


@pytest.fixture(scope="module")
def sampled(params, loss_and_gradient):
    noise = jnp.asarray(FORWARD["eps"])
    return loss_and_gradient(params, voxels(FORWARD["x"]), jnp.asarray(FORWARD["clip"]), noise)


@pytest.fixture(scope="module")
def short(params, loss_and_gradient):
    """Fewer voxels than pooling bins, and no key: through the posterior mean."""
    return loss_and_gradient(params, voxels(SHORT["x"]), jnp.asarray(SHORT["clip"]))


def assert_losses(parts, expected, prefix=""):
    for name, value in parts.items():
        np.testing.assert_allclose(value, expected[f"{prefix}{name}_loss"], rtol=2e-6, err_msg=name)


def assert_gradients(actual, expected):
    for key, array in expected.items():
        ours, theirs = actual[our_name(key)], our_array(key, array)
        assert ours.shape == theirs.shape, key
        if key in ZERO_GRADIENTS:
            assert np.abs(ours).max() <= 1e-3, key
        else:
            assert relative_error(ours, theirs) <= 1e-4, key


# --- the released arrays ---


def test_parameters_are_the_released_ones_by_name_and_shape(params):
    ours = jax.eval_shape(MODEL.init, jax.random.key(0), jax.ShapeDtypeStruct((1, LONG), jnp.float32))["params"]
    assert {k: v.shape for k, v in flatten_dict(params).items()} == {k: v.shape for k, v in flatten_dict(ours).items()}


def test_posterior(forward):
    (posterior, _, _), _ = forward
    assert relative_error(posterior.mean, FORWARD["posterior_mean"]) <= 2e-5
    assert relative_error(posterior.logvar, FORWARD["posterior_logvar"]) <= 2e-5


def test_decoding_to_either_number_of_voxels(forward):
    (_, pattern, other), _ = forward
    assert relative_error(pattern, FORWARD["decode_out"][:, 0]) <= 2e-5
    assert relative_error(other, FORWARD["decode_out_other_length"][:, 0]) <= 2e-5


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("encoder/down_0_block_0", "mid/enc_down0_block0_out"),
        ("encoder/down_0_downsample", "mid/enc_downsample_out"),
        ("encoder/mid/attn_1", "mid/enc_attn_out"),
        ("encoder", "encoder_h"),
        ("decoder/mid", "mid/dec_mid_out"),
        ("decoder/up_2_upsample", "mid/dec_upsample_out"),
        ("decoder/norm_out", "mid/dec_norm_out_out"),
    ],
)
def test_features_on_the_way(forward, module, name):
    _, captured = forward
    actual = captured["intermediates"]
    for part in module.split("/"):
        actual = actual[part]
    expected = FORWARD[name].swapaxes(1, 2)
    if module.endswith("norm_out"):  # ours includes the swish that follows
        expected = expected / (1 + np.exp(-expected))
    assert relative_error(actual["__call__"][0], expected) <= 2e-5


def test_projected_latent(forward):
    _, captured = forward
    actual = captured["intermediates"]["post_projector"]["__call__"][0]
    assert relative_error(actual, FORWARD["decode_post_projector"]) <= 2e-5


def test_normalisation_epsilons(inspect):
    """Inputs of scale 1e-3, where any other epsilon is 40 % off. Repeated to the batch that is already compiled."""
    fmri, latent = (np.concatenate([a, a[:1]]) for a in (SMALL["small_x"], SMALL["small_z"]))
    (posterior, pattern, _), _ = inspect(voxels(fmri), jnp.asarray(latent))
    assert relative_error(posterior.mean[:3], SMALL["small_posterior_mean"]) <= 1e-3
    assert relative_error(posterior.logvar[:3], SMALL["small_posterior_logvar"]) <= 1e-3
    assert relative_error(pattern[:3], SMALL["small_decode"][:, 0]) <= 1e-3


@pytest.mark.parametrize("prediction", ["x", "v"])
def test_synthesis_from_the_mappers_latents(inspect, prediction):
    (_, pattern, _), _ = inspect(voxels(FORWARD["x"]), jnp.asarray(SIT[f"sampler_{prediction}"]))
    assert relative_error(pattern, SIT[f"synth_{prediction}"][:, 0]) <= 2e-5


def test_training_step_through_the_posterior_mean(at_the_mean):
    parts, output, _ = at_the_mean
    assert_losses(parts, FORWARD)
    assert relative_error(output.latent, FORWARD["z"]) <= 2e-5
    assert relative_error(output.reconstruction, FORWARD["recon"][:, 0]) <= 2e-5


def test_training_step_through_a_posterior_sample(sampled):
    parts, output, _ = sampled
    assert_losses(parts, FORWARD, "sampled_")
    assert relative_error(output.latent, FORWARD["sampled_z"]) <= 2e-5
    assert relative_error(output.reconstruction, FORWARD["sampled_recon"][:, 0]) <= 2e-5


def test_fewer_voxels_than_pooling_bins(short):
    parts, output, _ = short
    assert_losses(parts, SHORT)
    assert relative_error(output.posterior.mean, SHORT["posterior_mean"]) <= 2e-5
    assert relative_error(output.posterior.logvar, SHORT["posterior_logvar"]) <= 2e-5
    assert relative_error(output.latent, SHORT["z"]) <= 2e-5
    assert relative_error(output.reconstruction, SHORT["recon"][:, 0]) <= 2e-5


def test_gradient_of_every_parameter(at_the_mean):
    _, _, gradient = at_the_mean
    assert {our_name(key) for key in GRADIENTS} == set(gradient)
    assert_gradients(gradient, GRADIENTS)


def test_gradient_through_a_posterior_sample(sampled):
    assert any("logvar" in key for key in SAMPLED_GRADIENTS)
    assert_gradients(sampled[2], SAMPLED_GRADIENTS)


def test_gradient_with_fewer_voxels_than_pooling_bins(short):
    _, _, gradient = short
    assert_gradients(gradient, {k.removeprefix("grad/"): v for k, v in SHORT.items() if k.startswith("grad/")})
    for key, norm in zip(SHORT["grad_l2_keys"], SHORT["grad_l2"], strict=True):
        if key not in ZERO_GRADIENTS:
            np.testing.assert_allclose(np.linalg.norm(gradient[our_name(key)]), norm, rtol=1e-4, err_msg=key)


# --- sampling ---


def test_posterior_sample_has_the_posteriors_moments_and_follows_its_key():
    shape = (4, 50, 100)
    posterior = Posterior(jnp.full(shape, 3.0), jnp.full(shape, 2 * jnp.log(0.5)))
    draw, again, other = (np.asarray(posterior.sample(jax.random.key(seed))) for seed in (0, 0, 1))
    n = draw.size
    assert abs(draw.mean() - 3) <= 4 * 0.5 / n**0.5
    assert abs(draw.std() - 0.5) <= 4 * 0.5 / (2 * n) ** 0.5
    np.testing.assert_array_equal(draw, again)
    assert abs(np.corrcoef(draw.ravel(), other.ravel())[0, 1]) <= 4 / n**0.5


# --- sizes ---


def parameter_counts(config, num_voxels):
    tree = jax.eval_shape(BrainVAE(config).init, jax.random.key(0), jax.ShapeDtypeStruct((1, num_voxels), jnp.float32))
    return {"/".join(path): leaf.size for path, leaf in flatten_dict(tree["params"]).items()}


@pytest.fixture(scope="module")
def paper_counts():
    return parameter_counts(BrainVAEConfig.paper(), 15_724)


@pytest.mark.parametrize(
    ("module", "count"),
    [
        ("", 78_311_937),
        ("encoder/", 12_347_904),
        ("encoder/conv_in", 1_024),
        ("encoder/down_0_block", 723_968),
        ("encoder/down_0_downsample", 459_008),
        ("encoder/down_1", 2_889_728),
        ("encoder/down_2", 3_151_872),
        ("encoder/mid", 4_203_520),
        ("encoder/norm_out", 1_024),
        ("encoder/conv_out", 917_760),
        ("decoder/", 17_927_681),
        ("decoder/conv_in", 918_016),
        ("decoder/mid", 4_203_520),
        ("decoder/up_2_block", 4_727_808),
        ("decoder/up_2_upsample", 1_835_520),
        ("decoder/up_1", 4_727_808),
        ("decoder/up_0", 1_512_704),
        ("decoder/norm_out", 512),
        ("decoder/conv_out", 1_793),
        ("pre_projector_mean", 16_012_928),
        ("pre_projector_logvar", 16_012_928),
        ("post_projector", 16_010_496),
    ],
)
def test_paper_preset_has_the_released_parameter_counts(paper_counts, module, count):
    assert sum(size for path, size in paper_counts.items() if path.startswith(module)) == count


def test_no_parameter_depends_on_the_number_of_voxels(paper_counts):
    assert parameter_counts(BrainVAEConfig.paper(), 12_682) == paper_counts


def test_small_preset_has_the_size_that_it_states():
    assert sum(parameter_counts(BrainVAEConfig.small(), 530).values()) == 180_349


def test_presets_take_changes():
    assert BrainVAEConfig.paper(remat=True) == BrainVAEConfig(remat=True)
    assert BrainVAEConfig.small(channels=16).channels == 16
    assert BrainVAEConfig.small(pool_length=64, num_down_blocks=2).positions == 16
