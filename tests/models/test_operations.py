"""Functions of models/operations.py and their gradients against their definitions, and what is kept in between."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from golden_set import relative_error
from test_layers import assert_same_function, normal

from synbrain_jax.models import operations


@pytest.mark.parametrize("rows", [(5,), (2, 3), (1, 1, 4)])
def test_gradients_of_a_linear_layer_are_those_of_the_product(rows):
    x, kernel = normal(*rows, 4), normal(4, 6, seed=1)
    assert_same_function(operations.linear, lambda x, kernel: jnp.einsum("...c,cf->...f", x, kernel), x, kernel)


def test_the_gradient_of_a_kernel_is_a_product_of_matrices_that_needs_no_transposition():
    def total(kernel):
        return operations.linear(normal(2, 3, 4), kernel).sum()

    made = [equation for equation in jax.make_jaxpr(jax.grad(total))(jnp.ones((4, 6))).eqns if equation.outvars]
    assert made[-1].primitive.name == "dot_general"
    assert [variable.aval.shape for variable in made[-1].invars] == [(6, 4), (6, 6)]
    assert made[-1].outvars[0].aval.shape == (4, 6)


@pytest.mark.parametrize("swish", [False, True])
@pytest.mark.parametrize(("channels", "groups"), [(6, 2), (4, 4), (6, 1)])
def test_gradient_of_group_norm_is_that_of_its_definition(channels, groups, swish):
    def definition(x, scale, bias):
        grouped = x.reshape(len(x), x.shape[1], groups, -1)
        mean, variance = grouped.mean((1, 3), keepdims=True), grouped.var((1, 3), keepdims=True)
        normed = ((grouped - mean) / jnp.sqrt(variance + 1e-6)).reshape(x.shape)
        y = normed * scale[None, None] + bias[None, None]
        return jax.nn.swish(y) if swish else y

    x = 2 * normal(2, 7, channels) + 1
    scale, bias = 1 + normal(channels, seed=1), normal(channels, seed=2)

    def ours(*args):
        return operations.group_norm(*args, groups, swish)

    assert_same_function(ours, definition, x, scale, bias, tolerance=5e-6)


def kept_for_the_gradient(f, *args):
    """Shapes and types of what is kept between the two passes, scalars apart."""
    _, pull_back = jax.vjp(f, *args)
    return sorted((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(pull_back) if leaf.ndim > 2)


def test_group_norm_of_bfloat16_keeps_no_float32_activations():
    x, scale, bias = normal(2, 8, 6).astype(jnp.bfloat16), jnp.ones(6), jnp.zeros(6)
    kept = kept_for_the_gradient(lambda *args: operations.group_norm(*args, 3, True), x, scale, bias)
    assert kept == [((2, 1, 6), "float32"), ((2, 1, 6), "float32"), ((2, 8, 6), "bfloat16")]


def test_attention_of_bfloat16_keeps_its_weights_once_and_in_bfloat16():
    q, k, v = (normal(2, 8, 4, seed=seed).astype(jnp.bfloat16) for seed in range(3))
    kept = kept_for_the_gradient(operations.attend, q, k, v)
    assert kept == [((2, 8, 4), "bfloat16")] * 4 + [((2, 8, 8), "bfloat16")]


def textbook_attention(q, k, v):
    weights = jax.nn.softmax(jnp.einsum("bqc,bkc->bqk", q, k) / math.sqrt(q.shape[-1]), axis=-1)
    return jnp.einsum("bqk,bkc->bqc", weights, v)


def test_gradient_of_attention_is_that_of_its_definition():
    q, k, v = (normal(2, 5, 4, seed=seed) for seed in range(3))
    assert_same_function(operations.attend, textbook_attention, q, k, v)


def test_attend_heads_attends_in_each_head_by_itself():
    q, k, v = (normal(2, 5, 3, 4, seed=seed) for seed in range(3))
    each = [textbook_attention(*(array[:, :, head] for array in (q, k, v))) for head in range(3)]
    assert relative_error(operations.attend_heads(q, k, v), jnp.stack(each, axis=2)) <= 2e-6


@pytest.mark.parametrize(
    ("capability", "dtype", "width", "expected"),
    [
        ("9.0", "bfloat16", 128, True),
        ("8.0", "bfloat16", 104, True),
        ("12.0", "bfloat16", 64, True),
        ("7.0", "bfloat16", 128, False),
        ("9.0", "float32", 128, False),
        ("9.0", "bfloat16", 136, False),
        ("9.0", "bfloat16", 100, False),
        ("gfx942", "bfloat16", 128, False),  # AMD
        (None, "bfloat16", 128, False),  # a CPU or TPU
    ],
)
def test_cudnn_attends_where_it_can(monkeypatch, capability, dtype, width, expected):
    """In programs for NVIDIA GPUs alone, on a machine that has one."""

    class Device:
        pass

    if capability:
        Device.compute_capability = capability
    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    asked = []

    def fused(q, k, v, implementation):
        asked.append(implementation)
        return jnp.cos(q)

    monkeypatch.setattr(jax.nn, "dot_product_attention", fused)
    q = jax.ShapeDtypeStruct((1, 2, 1, width), dtype)
    traced = jax.jit(lambda *qkv: operations.attend_heads(*qkv)).trace(q, q, q)  # a new function: nothing is cached
    assert asked == ["cudnn"] * expected
    for platform in ("cuda", "rocm", "tpu", "cpu"):
        program = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("cosine" in program) == (expected and platform == "cuda")
        assert ("exponential" in program) != ("cosine" in program)


@pytest.mark.parametrize("rows", [1, 2])
def test_modulated_norm_is_its_definition(rows):
    def definition(x, shift, scale):
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / jnp.sqrt(variance + 1e-6) * (1 + scale) + shift

    x, shift, scale = 3 * normal(2, 5, 8) + 1, normal(rows, 1, 8, seed=1), normal(rows, 1, 8, seed=2)
    assert_same_function(operations.modulated_norm, definition, x, shift, scale, tolerance=5e-6)


@pytest.mark.parametrize(("gelu", "approximate"), [(operations.gelu_erf, False), (operations.gelu_tanh, True)])
def test_gelus_and_their_gradients(gelu, approximate):
    x = jnp.linspace(-6, 6, 101)[None]
    assert_same_function(gelu, partial(jax.nn.gelu, approximate=approximate), x)
    rounded = x.astype(jnp.bfloat16)
    assert gelu(rounded).dtype == jnp.bfloat16
    assert relative_error(gelu(rounded), jax.nn.gelu(rounded.astype(jnp.float32), approximate=approximate)) <= 4e-3
