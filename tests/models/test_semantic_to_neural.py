"""The mapper against the arrays, losses, gradients and parameter counts of the released system."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from released import load, mapper_config, our_array, our_name, relative_error, to_params

from synbrain_jax import losses
from synbrain_jax.models.semantic_to_neural import (
    Block,
    MapperConfig,
    SelfAttention,
    SemanticToNeural,
    TimeEmbedding,
)

FORWARD, SMALL = load("sit_forward.npz"), load("eps_sensitive.npz")
MODEL = SemanticToNeural(mapper_config())
X = jnp.asarray(FORWARD["x"])


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(jnp.asarray, to_params(load("sit_params.npz")))


@pytest.fixture(scope="module")
def at_time(params):
    return jax.jit(lambda tokens, time: MODEL.apply({"params": params}, tokens, time))


@pytest.fixture(scope="module")
def without_time(params):
    """The network's output, and the latent that each kind of prediction makes of it."""

    @jax.jit
    def run(tokens):
        latents = {
            prediction: SemanticToNeural(mapper_config(prediction=prediction)).apply(
                {"params": params}, tokens, method="predict_latent"
            )
            for prediction in ("x", "v")
        }
        return MODEL.apply({"params": params}, tokens), latents

    return run


@pytest.fixture(scope="module")
def loss_and_gradient(params):
    """Loss and gradients of one stage-2 step for each kind of prediction."""
    tokens, latent = jnp.asarray(FORWARD["loss_images"]), jnp.asarray(FORWARD["loss_fmri"])

    def loss(params, prediction):
        return losses.mapper_mse(MODEL.apply({"params": params}, tokens), tokens, latent, prediction)

    return jax.jit(lambda p: {kind: jax.value_and_grad(loss)(p, kind) for kind in ("x", "v")})(params)


# --- the released arrays ---


def test_parameters_are_the_released_ones_by_name_and_shape(params):
    ours = jax.eval_shape(MODEL.init, jax.random.key(0), X)["params"]
    assert {k: v.shape for k, v in flatten_dict(params).items()} == {k: v.shape for k, v in flatten_dict(ours).items()}


def test_output_without_a_time_is_that_at_time_zero(without_time, at_time):
    output, _ = without_time(X)
    assert relative_error(output, FORWARD["y_t0"]) <= 1e-5
    assert relative_error(at_time(X, np.zeros(4, np.float32)), FORWARD["y_t0"]) <= 1e-5
    assert relative_error(output, np.asarray(at_time(X, np.zeros(4, np.float32)))) <= 2e-6


def test_output_at_other_times(at_time):
    assert relative_error(at_time(X, np.full(4, 0.37, np.float32)), FORWARD["y_t037"]) <= 1e-5
    assert relative_error(at_time(X, jnp.asarray(FORWARD["t_vec"])), FORWARD["y_tvec"]) <= 1e-5


def test_parts(params):
    cfg, block = MODEL.config, params["block_0"]

    @jax.jit
    def run(x, time, positions):
        c = TimeEmbedding(cfg.width, jnp.float32).apply({"params": params["time"]}, time)
        attention = SelfAttention(cfg.heads, jnp.float32).apply({"params": block["attn"]}, x)
        return c, attention, Block(cfg).apply({"params": block}, x + positions, c)

    c, attention, block_out = run(X, FORWARD["t_vec"], load("sit_params.npz")["pos_embed"])
    assert relative_error(c, FORWARD["t_embed_tvec"]) <= 1e-5
    assert relative_error(attention, FORWARD["block0_attn_of_x"]) <= 1e-5
    assert relative_error(block_out, FORWARD["block0_out_tvec"]) <= 1e-5


def test_predicted_latent(without_time):
    _, latents = without_time(jnp.asarray(FORWARD["loss_images"]))
    assert relative_error(latents["x"], FORWARD["sampler_x"]) <= 1e-5
    assert relative_error(latents["v"], FORWARD["sampler_v"]) <= 1e-5


def test_normalisation_epsilon(without_time):
    """Tokens that leave 1e-3 after the positions are added, where another epsilon is 20 % off. Batch as compiled."""
    tokens = SMALL["sit_small_x"]
    output, _ = without_time(jnp.asarray(np.concatenate([tokens, tokens[:1]])))
    assert relative_error(output[:3], SMALL["sit_small_y_t0"]) <= 1e-3


@pytest.mark.parametrize("prediction", ["x", "v"])
def test_loss_and_gradient_of_every_parameter(loss_and_gradient, prediction):
    loss, gradient = loss_and_gradient[prediction]
    np.testing.assert_allclose(loss, FORWARD[f"loss_{prediction}"], rtol=2e-6)
    prefix = f"grad_{prediction}/"
    expected = {k.removeprefix(prefix): v for k, v in FORWARD.items() if k.startswith(prefix)}
    gradient = flatten_dict(gradient)
    assert {our_name(key) for key in expected} == set(gradient)
    for key, array in expected.items():
        assert relative_error(gradient[our_name(key)], our_array(key, array)) <= 1e-4, key


# --- a fresh model ---


@pytest.fixture(scope="module")
def fresh():
    model = SemanticToNeural(MapperConfig(tokens=5, width=64, depth=1, heads=2, mlp_ratio=1.5))
    return model, jax.jit(model.init)(jax.random.key(0, impl="rbg"), jnp.zeros((1, 5, 64)))["params"]


def test_fresh_model_outputs_exactly_zero(fresh):
    model, params = fresh
    tokens = np.random.default_rng(0).normal(size=(2, 5, 64)).astype(np.float32)
    output = jax.jit(model.apply)({"params": params}, tokens, np.float32([0.3, 1.0]))
    np.testing.assert_array_equal(output, np.zeros_like(tokens))


def test_fresh_parameters_have_the_released_distributions(fresh):
    """Xavier-uniform matrices, N(0, 0.02) time embedding, zero biases, modulations and final layer."""
    flat = {"/".join(path): np.asarray(leaf) for path, leaf in flatten_dict(fresh[1]).items()}
    for name, values in flat.items():
        if name.endswith("bias") or "modulation" in name or name.startswith("final"):
            assert not values.any(), name
        elif name.startswith("time"):
            assert abs(values.std() / 0.02 - 1) <= 4 / math.sqrt(2 * values.size), name
        else:
            bound = math.sqrt(6 / sum(values.shape))
            assert 0.99 * bound <= np.abs(values).max() <= bound, name
            # The square of a uniform on [-1, 1] has mean 1/3 and variance 4/45.
            assert abs(((values / bound) ** 2).mean() - 1 / 3) <= 4 * math.sqrt(4 / 45 / values.size), name
    assert flat["block_0/attn/qkv/kernel"].shape == (64, 192)  # so the Xavier bound counts q, k and v together


# --- sizes ---


def parameter_counts(config):
    tokens = jax.ShapeDtypeStruct((1, config.tokens, config.width), jnp.float32)
    tree = jax.eval_shape(SemanticToNeural(config).init, jax.random.key(0), tokens)
    return {"/".join(path): leaf.size for path, leaf in flatten_dict(tree["params"]).items()}


@pytest.fixture(scope="module")
def paper_counts():
    return parameter_counts(MapperConfig.paper())


@pytest.mark.parametrize(
    ("module", "count"),
    [
        ("", 410_430_592),
        ("time", 3_198_208),
        ("block_0/", 49_865_088),
        ("block_7/attn", 11_082_240),
        ("block_7/mlp", 22_159_488),
        ("block_7/modulation", 16_623_360),
        ("final/", 2_770_560),
        ("final_modulation", 5_541_120),
    ],
)
def test_paper_preset_has_the_released_parameter_counts(paper_counts, module, count):
    assert sum(size for path, size in paper_counts.items() if path.startswith(module)) == count


def test_small_preset_has_the_size_that_it_states():
    assert sum(parameter_counts(MapperConfig.small()).values()) == 50_272


def test_presets_take_changes():
    assert MapperConfig.paper(prediction="v") == MapperConfig(prediction="v")
    assert MapperConfig.small(depth=3).depth == 3
