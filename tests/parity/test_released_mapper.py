"""The mapper against the released system: outputs at several times, parts, losses and all gradients."""

import golden_set
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from golden_set import load, on_device

from synbrain_jax import losses
from synbrain_jax.interop.torch_weights import from_released, our_array, released_key
from synbrain_jax.models.layers import position_embedding
from synbrain_jax.models.semantic_to_neural import Block, SelfAttention, SemanticToNeural, TimeEmbedding, mapper_shapes

FILE = "sit_forward.npz"
FORWARD, SMALL, STATE_DICT = load(FILE), load("eps_sensitive.npz"), load("sit_params.npz")
CONFIG = golden_set.mapper_config(positions="stored")
MODEL = SemanticToNeural(CONFIG)
X = jnp.asarray(FORWARD["x"])


@pytest.fixture(scope="module")
def params():
    return on_device(from_released(STATE_DICT, mapper_shapes(CONFIG), "sit_params.npz"))


@pytest.fixture(scope="module")
def at_time(params):
    return golden_set.jit(lambda tokens, time: MODEL.apply({"params": params}, tokens, time))


@pytest.fixture(scope="module")
def without_time(params):
    """The network's output, and the latent that each kind of prediction makes of it; with the table computed."""
    computed = {name: part for name, part in params.items() if name != "pos_embed"}

    @golden_set.jit
    def run(tokens):
        latents = {
            prediction: SemanticToNeural(golden_set.mapper_config(prediction=prediction)).apply(
                {"params": computed}, tokens, method="predict_latent"
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

    return golden_set.jit(lambda p: {kind: jax.value_and_grad(loss)(p, kind) for kind in ("x", "v")})(params)


def test_parameters_are_all_those_of_the_release():
    assert {released_key(path) for path in flatten_dict(mapper_shapes(CONFIG))} == STATE_DICT.keys()


def test_position_table(compare):
    table = position_embedding(CONFIG.tokens, CONFIG.width)[None]
    compare("sit_params.npz", "pos_embed", table, STATE_DICT["pos_embed"], 1e-7)


def test_output_without_a_time_is_that_at_time_zero(without_time, at_time, compare):
    output, latents = without_time(X)
    zero = at_time(X, np.zeros(len(X), np.float32))
    compare(FILE, "y_t0", output, FORWARD["y_t0"], 1e-5)
    compare(FILE, "y_t0", zero, FORWARD["y_t0"], 1e-5)
    assert golden_set.relative_error(latents["x"], np.asarray(output)) <= 2e-6  # computed or stored positions


def test_output_at_other_times(at_time, compare):
    compare(FILE, "y_t037", at_time(X, np.full(len(X), 0.37, np.float32)), FORWARD["y_t037"], 1e-5)
    compare(FILE, "y_tvec", at_time(X, jnp.asarray(FORWARD["t_vec"])), FORWARD["y_tvec"], 1e-5)


def test_parts(params, compare):
    block = params["block_0"]

    @golden_set.jit
    def run(x, time):
        c = TimeEmbedding(CONFIG.width, jnp.float32).apply({"params": params["time"]}, time)
        attention = SelfAttention(CONFIG.heads, jnp.float32).apply({"params": block["attn"]}, x)
        return c, attention, Block(CONFIG).apply({"params": block}, x + params["pos_embed"][None], c)

    c, attention, block_out = run(X, FORWARD["t_vec"])
    compare(FILE, "t_embed_tvec", c, FORWARD["t_embed_tvec"], 1e-5)
    compare(FILE, "block0_attn_of_x", attention, FORWARD["block0_attn_of_x"], 1e-5)
    compare(FILE, "block0_out_tvec", block_out, FORWARD["block0_out_tvec"], 1e-5)


@pytest.mark.parametrize("prediction", ["x", "v"])
def test_predicted_latent(without_time, compare, prediction):
    _, latents = without_time(jnp.asarray(FORWARD["loss_images"]))
    compare(FILE, f"sampler_{prediction}", latents[prediction], FORWARD[f"sampler_{prediction}"], 1e-5)


def test_normalisation_epsilon(without_time, compare):
    """Tokens that leave 1e-3 after the positions are added, where another epsilon is 20 % off. Batch as compiled."""
    rows = np.arange(len(X)) % len(SMALL["sit_small_x"])
    n = min(len(X), len(SMALL["sit_small_x"]))
    output, _ = without_time(jnp.asarray(SMALL["sit_small_x"][rows]))
    compare("eps_sensitive.npz", "sit_small_y_t0", output[:n], SMALL["sit_small_y_t0"][:n], 1e-3)


@pytest.mark.parametrize("prediction", ["x", "v"])
def test_loss_and_gradient_of_every_parameter(loss_and_gradient, compare, prediction):
    loss, gradient = loss_and_gradient[prediction]
    compare(FILE, f"loss_{prediction}", loss, FORWARD[f"loss_{prediction}"], 2e-6)
    compare(FILE, f"loss_{prediction}_f64", loss, FORWARD[f"loss_{prediction}_f64"], 2e-6)
    prefix = f"grad_{prediction}/"
    expected = {key.removeprefix(prefix): array for key, array in FORWARD.items() if key.startswith(prefix)}
    actual = {released_key(path): leaf for path, leaf in flatten_dict(gradient).items()}
    assert not actual.pop("pos_embed").any()  # fixed
    assert actual.keys() == expected.keys()
    for key, array in expected.items():
        compare(FILE, prefix + key, actual[key], our_array(key, array), 1e-4)
