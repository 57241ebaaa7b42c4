"""BrainVAE against the released system: features, posteriors, patterns, losses, and the gradient of every parameter."""

from unittest import mock

import golden_set
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from golden_set import load, on_device

from synbrain_jax import losses
from synbrain_jax.interop.torch_weights import from_released, our_array, released_key
from synbrain_jax.models.brain_vae import BrainVAE, brain_vae_shapes
from synbrain_jax.models.layers import adaptive_max_pool, linear_resize

FORWARD, SHORT, SMALL, SIT = (
    load(f"{name}.npz") for name in ("brainvae_forward", "brainvae_forward_short", "eps_sensitive", "sit_forward")
)
CONFIG = golden_set.brain_vae_config()
MODEL = BrainVAE(CONFIG)
LONG, OTHER = FORWARD["x"].shape[-1], SHORT["x"].shape[-1]
BATCH = len(FORWARD["x"])


def voxels(array):
    return jnp.asarray(array[:, 0])


@pytest.fixture(scope="module")
def params():
    return on_device(from_released(load("brainvae_params.npz"), brain_vae_shapes(CONFIG), "brainvae_params.npz"))


@pytest.fixture(scope="module")
def inspect(params):
    """Posterior of patterns, latents decoded to both lengths, and the output of every module on the way."""

    @golden_set.jit
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
    weights = golden_set.load_json("config.json")["brainvae"]

    @golden_set.jit
    def run(params, fmri, tokens, noise=None):
        def total(params):
            with mock.patch.object(jax.random, "normal", return_value=noise):
                output = MODEL.apply({"params": params}, fmri, None if noise is None else jax.random.key(0))
            parts = {
                "recon": losses.squared_error(output.reconstruction, fmri),
                "kl": losses.kl_to_standard_normal(*output.posterior),
                "clip": losses.soft_clip(output.latent, tokens),
            }
            weighted = weights["kl_weight"] * parts["kl"] + weights["clip_weight"] * parts["clip"]
            parts["total"] = parts["recon"] + weighted
            return parts["total"], (parts, output)

        gradient, aux = jax.grad(total, has_aux=True)(params)
        return *aux, {released_key(path): leaf for path, leaf in flatten_dict(gradient).items()}

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


@pytest.fixture
def compare_gradients(compare):
    def check(file, actual, expected, gradient_set, prefix=""):
        zero = golden_set.zero_gradients(gradient_set)
        for key, array in expected.items():
            tolerance = {"atol": 1e-3} if key in zero else {"tolerance": 1e-4}
            compare(file, prefix + key, actual[key], our_array(key, array), **tolerance)

    return check


def test_parameters_are_all_those_of_the_release(params):
    ours = {released_key(path) for path in flatten_dict(brain_vae_shapes(CONFIG))}
    assert ours == load("brainvae_params.npz").keys() == load("brainvae_grads.npz").keys()


def test_posterior(forward, compare):
    (posterior, _, _), _ = forward
    compare("brainvae_forward.npz", "posterior_mean", posterior.mean, FORWARD["posterior_mean"], 2e-5)
    compare("brainvae_forward.npz", "posterior_logvar", posterior.logvar, FORWARD["posterior_logvar"], 2e-5)
    std = jnp.exp(posterior.logvar / 2)
    compare("brainvae_forward.npz", "posterior_std", std, FORWARD["posterior_std"], 2e-5)
    nll = 0.5 * (np.log(2 * np.pi) + posterior.logvar).sum((1, 2))
    compare("brainvae_forward.npz", "nll_of_mode", nll, FORWARD["nll_of_mode"], 2e-5)
    kl = [losses.kl_to_standard_normal(*(part[i : i + 1] for part in posterior)) for i in range(BATCH)]
    compare("brainvae_forward.npz", "kl_per_sample", kl, FORWARD["kl_per_sample"], 2e-6)


def test_decoding_to_either_number_of_voxels(forward, compare):
    (_, pattern, other), _ = forward
    compare("brainvae_forward.npz", "decode_out", pattern, FORWARD["decode_out"][:, 0], 2e-5)
    expected = FORWARD["decode_out_other_length"][:, 0]
    compare("brainvae_forward.npz", "decode_out_other_length", other, expected, 2e-5)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("encoder/down_0_block_0", "mid/enc_down0_block0_out"),
        ("encoder/down_0_downsample", "mid/enc_downsample_out"),
        ("encoder/mid/attn_1", "mid/enc_attn_out"),
        ("encoder", "encoder_h"),
        ("decoder/mid", "mid/dec_mid_out"),
        (f"decoder/up_{len(CONFIG.channel_mult) - 1}_upsample", "mid/dec_upsample_out"),
    ],
)
def test_features_on_the_way(forward, compare, module, name):
    compare("brainvae_forward.npz", name, features(forward, module), FORWARD[name].swapaxes(1, 2), 2e-5)


def features(forward, module):
    found = forward[1]["intermediates"]
    for part in module.split("/"):
        found = found[part]
    return found["__call__"][0]


def test_pooled_and_resized_features(forward, compare):
    pooled = adaptive_max_pool(features(forward, "encoder/conv_in"), CONFIG.pool_length)
    compare("brainvae_forward.npz", "mid/enc_pool_out", pooled, FORWARD["mid/enc_pool_out"].swapaxes(1, 2), 2e-5)
    last = features(forward, f"decoder/up_0_block_{CONFIG.num_res_blocks}")
    expected = FORWARD["mid/dec_norm_out_in"].swapaxes(1, 2)
    compare("brainvae_forward.npz", "mid/dec_norm_out_in", linear_resize(last, LONG), expected, 2e-5)
    normed = FORWARD["mid/dec_norm_out_out"].swapaxes(1, 2)
    expected = normed / (1 + np.exp(-normed))  # our module includes the swish that follows
    compare("brainvae_forward.npz", "mid/dec_norm_out_out", features(forward, "decoder/norm_out"), expected, 2e-5)


def test_projected_latent(forward, compare):
    actual = features(forward, "post_projector")
    compare("brainvae_forward.npz", "decode_post_projector", actual, FORWARD["decode_post_projector"], 2e-5)


def test_normalisation_epsilons(inspect, compare):
    """Inputs of scale 1e-3, where any other epsilon is 40 % off; in batches of the size that is compiled."""
    rows = np.arange(BATCH) % len(SMALL["small_x"])
    n = min(BATCH, len(SMALL["small_x"]))
    (posterior, pattern, _), _ = inspect(voxels(SMALL["small_x"][rows]), jnp.asarray(SMALL["small_z"][rows]))
    file = "eps_sensitive.npz"
    compare(file, "small_posterior_mean", posterior.mean[:n], SMALL["small_posterior_mean"][:n], 1e-3)
    compare(file, "small_posterior_logvar", posterior.logvar[:n], SMALL["small_posterior_logvar"][:n], 1e-3)
    compare(file, "small_decode", pattern[:n], SMALL["small_decode"][:n, 0], 1e-3)


@pytest.mark.parametrize("prediction", ["x", "v"])
def test_synthesis_from_the_mappers_latents(inspect, compare, prediction):
    (_, pattern, _), _ = inspect(voxels(FORWARD["x"]), jnp.asarray(SIT[f"sampler_{prediction}"]))
    compare("sit_forward.npz", f"synth_{prediction}", pattern, SIT[f"synth_{prediction}"][:, 0], 2e-5)


@pytest.mark.parametrize(("way", "prefix"), [("at_the_mean", ""), ("sampled", "sampled_")])
def test_training_step(request, compare, way, prefix):
    parts, output, _ = request.getfixturevalue(way)
    file = "brainvae_forward.npz"
    for name, value in parts.items():
        compare(file, f"{prefix}{name}_loss", value, FORWARD[f"{prefix}{name}_loss"], 2e-6)
        if not prefix:
            compare(file, f"{name}_loss_f64", value, FORWARD[f"{name}_loss_f64"], 2e-6)
    compare(file, f"{prefix}z", output.latent, FORWARD[f"{prefix}z"], 2e-5)
    compare(file, f"{prefix}recon", output.reconstruction, FORWARD[f"{prefix}recon"][:, 0], 2e-5)


def test_fewer_voxels_than_pooling_bins(short, compare):
    parts, output, _ = short
    assert CONFIG.pool_length > OTHER
    file = "brainvae_forward_short.npz"
    for name, value in parts.items():
        compare(file, f"{name}_loss", value, SHORT[f"{name}_loss"], 2e-6)
    compare(file, "total_loss_f64", parts["total"], SHORT["total_loss_f64"], 2e-6)
    compare(file, "posterior_mean", output.posterior.mean, SHORT["posterior_mean"], 2e-5)
    compare(file, "posterior_logvar", output.posterior.logvar, SHORT["posterior_logvar"], 2e-5)
    compare(file, "z", output.latent, SHORT["z"], 2e-5)
    compare(file, "recon", output.reconstruction, SHORT["recon"][:, 0], 2e-5)


def test_gradient_of_every_parameter(at_the_mean, compare_gradients):
    gradients = load("brainvae_grads.npz")
    assert gradients.keys() == at_the_mean[2].keys()
    compare_gradients("brainvae_grads.npz", at_the_mean[2], gradients, "grads")


def test_gradient_through_a_posterior_sample(sampled, compare_gradients):
    gradients = load("brainvae_grads_sampled_subset.npz")
    assert any("logvar" in key for key in gradients)
    compare_gradients("brainvae_grads_sampled_subset.npz", sampled[2], gradients, "grads_sampled")


def test_gradient_with_fewer_voxels_than_pooling_bins(short, compare, compare_gradients):
    _, _, gradient = short
    stored = {key.removeprefix("grad/"): array for key, array in SHORT.items() if key.startswith("grad/")}
    compare_gradients("brainvae_forward_short.npz", gradient, stored, "grads_short", "grad/")
    trained = [key not in golden_set.zero_gradients("grads_short") for key in SHORT["grad_l2_keys"]]
    norms = np.array([np.linalg.norm(gradient[key]) for key in SHORT["grad_l2_keys"]])
    compare("brainvae_forward_short.npz", "grad_l2", (norms / SHORT["grad_l2"])[trained], np.ones(sum(trained)), 1e-4)
