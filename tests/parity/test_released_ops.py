"""Single operations against the release, forwards and backwards, with ties and float32 index arithmetic."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_set import load
from scipy.special import erf

from synbrain_jax import losses
from synbrain_jax.models import layers, operations

OPS, SMALL = load("ops.npz"), load("eps_sensitive.npz")


def cases(pattern):
    """The names of the operations that match, each once."""
    return sorted({name for name in (key.split("/")[0] for key in OPS) if re.fullmatch(pattern, name)})


def channels_last(array):
    return jnp.asarray(array).swapaxes(1, 2)


def compare_with_gradient(compare, name, function, y_tolerance, grad_tolerance):
    x, expected = channels_last(OPS[f"{name}/x"]), channels_last(OPS[f"{name}/y"])
    y, pull_back = jax.vjp(lambda x: function(x, expected.shape[1]), x)
    compare("ops.npz", f"{name}/y", y, expected, y_tolerance)
    if f"{name}/grad_x" in OPS:
        (gradient,) = pull_back(channels_last(OPS[f"{name}/cotangent"]))
        compare("ops.npz", f"{name}/grad_x", gradient, channels_last(OPS[f"{name}/grad_x"]), grad_tolerance)


@pytest.mark.parametrize("name", cases("pool_.*"))
def test_adaptive_max_pool(compare, name):
    compare_with_gradient(compare, name, layers.adaptive_max_pool, 0.0, 1e-6)


@pytest.mark.parametrize("name", cases("interp_.*"))
def test_linear_resize(compare, name):
    """To float32 rounding at thousands of positions too, where index arithmetic in float64 would be 1e-3 off."""
    compare_with_gradient(compare, name, layers.linear_resize, 5e-7, 1e-6)


@pytest.mark.parametrize("name", cases(r"downconv\d+"))
def test_strided_conv(compare, name):
    kernel = jnp.asarray(OPS["downconv/weight"].transpose(2, 1, 0))
    y = layers.strided_conv(channels_last(OPS[f"{name}/x"]), kernel) + OPS["downconv/bias"][None, None]
    compare("ops.npz", f"{name}/y", y, channels_last(OPS[f"{name}/y"]), 1e-6)


def test_transposed_conv(compare):
    kernel = jnp.asarray(OPS["convtranspose/weight"].transpose(2, 0, 1))
    y = layers.transposed_conv(channels_last(OPS["convtranspose/x"]), kernel) + OPS["convtranspose/bias"][None, None]
    compare("ops.npz", "convtranspose/y", y, channels_last(OPS["convtranspose/y"]), 1e-6)


def test_activations(compare):
    x = jnp.asarray(OPS["act/x"])
    compare("ops.npz", "act/gelu_erf", operations.gelu_erf(x), OPS["act/gelu_erf"], 1e-6)
    compare("ops.npz", "act/gelu_tanh", operations.gelu_tanh(x), OPS["act/gelu_tanh"], 1e-6)
    compare("ops.npz", "act/silu", jax.nn.silu(x), OPS["act/silu"], 1e-6)


def test_group_norm(compare):
    scale, bias = jnp.asarray(OPS["groupnorm/weight"]), jnp.asarray(OPS["groupnorm/bias"])
    y = operations.group_norm(channels_last(OPS["groupnorm/x"]), scale, bias, 32)
    compare("ops.npz", "groupnorm/y", y, channels_last(OPS["groupnorm/y"]), 2e-6)


def test_group_norm_epsilon(compare):
    x = channels_last(SMALL["groupnorm_small_x"])
    ones = jnp.ones(x.shape[-1])
    y = operations.group_norm(x, ones, 0 * ones, 32)
    compare("eps_sensitive.npz", "groupnorm_small_y", y, channels_last(SMALL["groupnorm_small_y"]), 1e-5)


def test_norm_mlp_normalises_with_epsilon_1e_5_then_applies_exact_gelu(compare):
    """Input of scale 1e-3, where another epsilon shows; the linear layer is the identity."""
    x, normed = jnp.asarray(SMALL["layernorm_small_x"]), SMALL["layernorm_small_y_eps1e-5"].astype(np.float64)
    width = x.shape[-1]
    params = {
        "norm_0": {"scale": jnp.ones(width), "bias": jnp.zeros(width)},
        "dense_0": {"linear": {"kernel": jnp.eye(width), "bias": jnp.zeros(width)}},
    }
    y = layers.NormMLP((width,)).apply({"params": params}, x)
    expected = normed * (1 + erf(normed / np.sqrt(2))) / 2
    compare("eps_sensitive.npz", "layernorm_small_y_eps1e-5", y, expected, 2e-6)


def test_mapper_norm_has_epsilon_1e_6(compare):
    x = jnp.asarray(SMALL["layernorm_small_x"])
    none = jnp.zeros((1, 1, x.shape[-1]))
    y = operations.modulated_norm(x.reshape(1, -1, x.shape[-1]), none, none).reshape(x.shape)
    compare("eps_sensitive.npz", "layernorm_small_y_eps1e-6", y, SMALL["layernorm_small_y_eps1e-6"], 2e-6)


def test_soft_clip(compare):
    value, gradient = jax.value_and_grad(losses.soft_clip)(
        jnp.asarray(OPS["softclip/preds"]), jnp.asarray(OPS["softclip/targs"])
    )
    compare("ops.npz", "softclip/loss", value, OPS["softclip/loss"], 2e-6)
    compare("ops.npz", "softclip/grad_preds", gradient, OPS["softclip/grad_preds"], 1e-5)


@pytest.mark.parametrize("name", [key for key in OPS if key.startswith("timestep/emb")])
def test_timestep_embedding(compare, name):
    width = int(name.removeprefix("timestep/emb"))
    embedding = layers.timestep_embedding(jnp.asarray(OPS["timestep/t"]), width)
    compare("ops.npz", name, embedding, OPS[name], atol=1e-6)


@pytest.mark.parametrize("name", [key for key in OPS if key.startswith("pos_embed/")])
def test_position_embedding(compare, name):
    tokens, width, every = re.fullmatch(r"pos_embed/(\d+)x(\d+)(?:_every(\d+))?", name).groups(default="1")
    table = layers.position_embedding(int(tokens), int(width))
    assert table.dtype == np.float32
    compare("ops.npz", name, table[:: int(every), :: int(every)], OPS[name], atol=1e-7)
