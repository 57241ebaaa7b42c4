"""Blocks of models/layers.py against their textbook forms and brute force; with the released system in tests/parity."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_set import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from synbrain_jax.models import layers

few_examples = settings(max_examples=5, deadline=None, derandomize=True, database=None)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def channels_last(array):
    return jnp.asarray(array).swapaxes(1, 2)


@partial(jax.jit, static_argnums=0)
def value_and_gradients(f, cotangent, *args):
    value, pull_back = jax.vjp(f, *args)
    return value, pull_back(cotangent)


def assert_same_function(ours, textbook, *args, tolerance=2e-6):
    """Equal values, and equal gradients of every argument for a random cotangent."""
    cotangent = normal(*jax.eval_shape(textbook, *args).shape, seed=99)
    actual, expected = (value_and_gradients(f, cotangent, *args) for f in (ours, textbook))
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.shape == e.shape
        assert relative_error(a, e) <= tolerance


# --- convolutions ---


def textbook_conv(x, kernel, stride=1, padding=None, dilation=1):
    padding = padding or (kernel.shape[0] // 2, kernel.shape[0] // 2)
    return lax.conv_general_dilated(
        x, kernel, (stride,), [padding], lhs_dilation=(dilation,), dimension_numbers=("NWC", "WIO", "NWC")
    )


def textbook_strided(x, kernel):
    return textbook_conv(x, kernel, stride=2)


def textbook_transposed(x, kernel):
    return textbook_conv(x, kernel[::-1], padding=(3, 4), dilation=2)


@few_examples
@given(length=st.integers(1, 20), width=st.sampled_from([3, 5, 7]))
def test_strided_conv_is_a_convolution_with_stride_2(length, width):
    assert_same_function(layers.strided_conv, textbook_strided, normal(2, length, 3), normal(width, 3, 4, seed=1))


@few_examples
@given(length=st.integers(1, 12))
def test_transposed_conv_is_a_dilated_convolution(length):
    assert_same_function(layers.transposed_conv, textbook_transposed, normal(2, length, 3), normal(7, 3, 4, seed=1))


@pytest.mark.parametrize(("width", "features"), [(7, 1), (3, 2)])
def test_conv_to_few_is_a_convolution(width, features):
    assert_same_function(layers.conv_to_few, textbook_conv, normal(2, 9, 8), normal(width, 8, features, seed=1))


@pytest.mark.parametrize(
    ("module", "textbook"),
    [
        (layers.Conv(9, 1), textbook_conv),
        (layers.Conv(9, 3), textbook_conv),
        (layers.Conv(2, 7), textbook_conv),
        (layers.Conv(4, 7, kind="strided"), textbook_strided),
        (layers.Conv(4, 7, kind="transposed"), textbook_transposed),
    ],
    ids=["pointwise", "same", "few features", "strided", "transposed"],
)
def test_conv_module_is_its_formulation_plus_bias(module, textbook):
    x = normal(2, 6, 8)
    params = {"kernel": normal(module.width, 8, module.features, seed=1), "bias": normal(module.features, seed=2)}
    expected = textbook(x, params["kernel"]) + params["bias"][None, None]
    assert relative_error(module.apply({"params": params}, x), expected) <= 1e-6


def test_unknown_kind_of_convolution_is_refused():
    with pytest.raises(ValueError, match=r"Conv\.kind is 'dilated'; expected 'same', 'strided' or 'transposed'"):
        layers.Conv(4, 3, kind="dilated").init(jax.random.key(0), normal(1, 5, 2))


@pytest.mark.parametrize(
    ("module", "fan_in"),
    [
        (layers.Conv(128, 7), 16 * 7),
        (layers.Conv(128, 7, kind="strided"), 16 * 7),
        (layers.Conv(128, 7, kind="transposed"), 128 * 7),
        (layers.Dense(512), 16),
    ],
    ids=["same", "strided", "transposed", "dense"],
)
def test_parameters_start_uniform_within_one_over_root_fan_in(module, fan_in):
    params = module.init(jax.random.key(0), jnp.zeros((1, 4, 16)))["params"]
    for values in jax.tree.leaves(params):
        scaled = np.asarray(values).ravel() * math.sqrt(fan_in)
        assert np.abs(scaled).max() <= 1
        # The k-th moment of a uniform on [-1, 1] is 1 / (k + 1); 3.5 standard errors of the 128 or more values.
        for power in (2, 4):
            error = math.sqrt((1 / (2 * power + 1) - 1 / (power + 1) ** 2) / scaled.size)
            assert abs((scaled**power).mean() - 1 / (power + 1)) <= 3.5 * error


def test_dense_works_on_the_last_axis_of_any_array():
    x, kernel, bias = normal(2, 3, 4, 5), normal(5, 6, seed=1), normal(6, seed=2)
    y = layers.Dense(6).apply({"params": {"linear": {"kernel": kernel, "bias": bias}}}, x)
    assert relative_error(y, np.asarray(x) @ np.asarray(kernel) + np.asarray(bias)) <= 1e-6


# --- adaptive max pooling ---


def brute_force_pool(x, bins, cotangent):
    """Maxima of the bins, and the gradient: each bin's cotangent goes to its first maximum."""
    y, gradient = np.empty((x.shape[0], bins, x.shape[2]), x.dtype), np.zeros_like(x)
    for b, i, c in np.ndindex(*y.shape):
        start, stop = math.floor(i * x.shape[1] / bins), math.ceil((i + 1) * x.shape[1] / bins)
        winner = start + np.argmax(x[b, start:stop, c])
        y[b, i, c] = x[b, winner, c]
        gradient[b, winner, c] += cotangent[b, i, c]
    return y, gradient


def pool_and_gradient(x, bins, cotangent):
    y, (gradient,) = value_and_gradients(lambda x: layers.adaptive_max_pool(x, bins), cotangent, x)
    return y, gradient


@settings(few_examples, max_examples=12)
@given(length=st.integers(1, 30), bins=st.integers(1, 20))
def test_pool_and_its_gradient_are_brute_force_even_with_ties(length, bins):
    # Small integers: most bins hold a tie, and sums of gradients are exact.
    rng = np.random.default_rng(length * 100 + bins)
    x = rng.integers(-2, 3, (2, length, 3)).astype(np.float32)
    cotangent = rng.integers(-9, 10, (2, bins, 3)).astype(np.float32)
    expected = brute_force_pool(x, bins, cotangent)
    for actual, exact in zip(pool_and_gradient(jnp.asarray(x), bins, jnp.asarray(cotangent)), expected, strict=True):
        np.testing.assert_array_equal(actual, exact)


@pytest.mark.parametrize(("length", "bins"), [(13, 5), (5, 8)])
def test_pool_gradient_is_the_automatic_one_of_a_plain_maximum(length, bins):
    def plain(x):
        stretches = [x[:, i * length // bins : math.ceil((i + 1) * length / bins)] for i in range(bins)]
        return jnp.stack([stretch.max(1) for stretch in stretches], axis=1)

    assert_same_function(lambda x: layers.adaptive_max_pool(x, bins), plain, normal(2, length, 3))


# --- linear resize ---


@few_examples
@given(length=st.integers(1, 24), out=st.integers(1, 40))
def test_resize_is_linear_interpolation_between_aligned_ends(length, out):
    # Column i of the matrix is the response to a spike at position i; NumPy's interpolation runs in float64.
    positions = np.linspace(0, length - 1, out) if out > 1 else np.zeros(1)
    matrix = np.stack([np.interp(positions, np.arange(length), spike) for spike in np.eye(length)], axis=1)
    x, cotangent = normal(2, length, 3), normal(2, out, 3, seed=1)
    y, (gradient,) = value_and_gradients(lambda x: layers.linear_resize(x, out), cotangent, x)
    assert relative_error(y, np.einsum("ol,blc->boc", matrix, x)) <= 1e-5
    assert relative_error(gradient, np.einsum("ol,boc->blc", matrix, cotangent)) <= 1e-5


@pytest.mark.parametrize(("length", "out"), [(8192, 15724), (64, 61)])
def test_resize_gradient_is_the_automatic_one_of_a_plain_gather(length, out):
    position = np.float32((length - 1) / (out - 1)) * np.arange(out, dtype=np.float32)
    left = position.astype(np.int32)
    right, weight = np.minimum(left + 1, length - 1), (position - left).astype(np.float32)[None, :, None]

    def plain(x):
        return (1 - weight) * x[:, left] + weight * x[:, right]

    assert_same_function(lambda x: layers.linear_resize(x, out), plain, normal(1, length, 1))


# --- what the special forms are for ---


@pytest.mark.parametrize(
    ("f", "args"),
    [
        (layers.strided_conv, (normal(2, 8, 3), normal(7, 3, 4))),
        (layers.transposed_conv, (normal(2, 8, 3), normal(7, 3, 4))),
        (layers.conv_to_few, (normal(2, 8, 8), normal(7, 8, 1))),
        (lambda x: layers.adaptive_max_pool(x, 5), (normal(2, 8, 3),)),
        (lambda x: layers.linear_resize(x, 13), (normal(2, 8, 3),)),
    ],
    ids=["strided_conv", "transposed_conv", "conv_to_few", "adaptive_max_pool", "linear_resize"],
)
def test_gradient_program_has_no_dilated_convolution_and_no_scatter_over_positions(f, args):
    cotangent = normal(*jax.eval_shape(f, *args).shape)
    program = str(jax.make_jaxpr(lambda c, *a: value_and_gradients(f, c, *a))(cotangent, *args))
    assert "hs_dilation=(2,)" not in program
    assert "window_strides=(2,)" not in program
    assert not re.search(r"\[2,\d+,\d+\] = scatter", program)


# --- normalisation ---


def exact_group_norm(x, scale, bias, groups):
    b, length, c = x.shape
    grouped = np.asarray(x, np.float64).reshape(b, length, groups, c // groups)
    centred = grouped - grouped.mean((1, 3), keepdims=True)
    normed = centred / np.sqrt((centred**2).mean((1, 3), keepdims=True) + 1e-6)
    return normed.reshape(x.shape) * np.asarray(scale) + np.asarray(bias)


@pytest.mark.parametrize(("channels", "groups"), [(6, 6), (12, 4), (5, 1)])
def test_group_norm_is_its_definition(channels, groups):
    x, scale, bias = normal(2, 7, channels), normal(channels, seed=1), normal(channels, seed=2)
    expected = exact_group_norm(x, scale, bias, groups)
    assert relative_error(layers.group_norm(x, scale, bias, groups), expected) <= 2e-6


def test_group_norm_keeps_its_precision_far_from_zero():
    x = 1000 + normal(2, 50, 4)
    expected = exact_group_norm(x, np.ones(4), np.zeros(4), 2)
    assert relative_error(layers.group_norm(x, jnp.ones(4), jnp.zeros(4), 2), expected) <= 1e-3


def test_group_norm_of_bfloat16_is_computed_in_float32():
    x, scale, bias = normal(2, 300, 8).astype(jnp.bfloat16), 1 + normal(8), normal(8)
    y = layers.group_norm(x, scale, bias, 2)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, layers.group_norm(x.astype(jnp.float32), scale, bias, 2).astype(jnp.bfloat16))


@pytest.mark.parametrize(("channels", "groups"), [(8, 8), (32, 32), (96, 32)])
@pytest.mark.parametrize("swish", [True, False])
def test_group_norm_module_picks_groups_by_channels(channels, groups, swish):
    x, scale, bias = normal(2, 5, channels), normal(channels, seed=1), normal(channels, seed=2)
    expected = exact_group_norm(x, scale, bias, groups)
    expected = expected / (1 + np.exp(-expected)) if swish else expected
    y = layers.GroupNorm(swish).apply({"params": {"scale": scale, "bias": bias}}, x)
    assert relative_error(y, expected) <= 2e-6


def test_group_norm_refuses_channels_that_do_not_divide():
    with pytest.raises(ValueError, match="48 channels; above 32 they must be a multiple of 32"):
        layers.GroupNorm().init(jax.random.key(0), jnp.zeros((1, 3, 48)))


# --- attention ---


def test_attend_is_dot_product_attention():
    q, k, v = (normal(2, 12, 5, seed=i) for i in range(3))
    expected = jax.nn.dot_product_attention(q[:, :, None], k[:, :, None], v[:, :, None])[:, :, 0]
    assert relative_error(layers.attend(q, k, v), expected) <= 2e-6


@pytest.mark.parametrize("chunk", [1, 4, 12, 99])
def test_chunked_attention_has_the_same_values_and_gradients(chunk):
    q, k, v = (normal(2, 12, 5, seed=i) for i in range(3))
    assert_same_function(lambda *a: layers.attend(*a, chunk), layers.attend, q, k, v)


def test_chunked_attention_never_holds_all_scores():
    q, k, v = (normal(2, 12, 5, seed=i) for i in range(3))

    def program(chunk):
        return str(jax.make_jaxpr(lambda *a: value_and_gradients(lambda *x: layers.attend(*x, chunk), *a))(q, q, k, v))

    assert "f32[2,12,12]" in program(None)
    assert "f32[2,12,12]" not in program(4)
    assert "f32[3,2,4,12]" not in program(4)  # nor stacked over the chunks for the backward pass


def test_chunk_that_does_not_divide_the_positions_is_refused():
    with pytest.raises(ValueError, match="attention_chunk is 5; it must divide the 12 positions"):
        layers.attend(*[normal(1, 12, 3)] * 3, chunk=5)


# --- embeddings ---


def test_timestep_embedding_of_zero_is_ones_then_zeros():
    np.testing.assert_array_equal(layers.timestep_embedding(jnp.zeros(2), 6), [[1, 1, 1, 0, 0, 0]] * 2)
