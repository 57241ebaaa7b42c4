"""Losses against closed forms, numerical integration, and plain loops; with the released system in tests/parity."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_set import relative_error
from scipy.integrate import quad
from scipy.stats import norm

from synbrain_jax import losses

soft_clip_and_gradients = jax.jit(jax.value_and_grad(losses.soft_clip, argnums=(0, 1)))


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


# --- voxels ---


def test_squared_error_sums_over_voxels_and_averages_over_the_batch():
    prediction, target = jnp.array([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]), jnp.array([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    assert losses.squared_error(prediction, target) == (0 + 4 + 9 + 1 + 1 + 1) / 2
    assert losses.voxel_mse(prediction, target) == pytest.approx(16 / 6)


def test_gradient_of_voxel_mse_is_proportional_to_the_error():
    prediction, target = normal(3, 5), normal(3, 5, seed=1)
    expected = 2 * (np.asarray(prediction) - np.asarray(target)) / 15
    assert relative_error(jax.grad(losses.voxel_mse)(prediction, target), expected) <= 1e-6


# --- KL divergence ---


@pytest.mark.parametrize(("mean", "logvar"), [(0.0, 0.0), (1.5, 0.0), (-0.7, -2.0), (0.3, 1.2)])
def test_kl_is_the_integral_that_defines_it(mean, logvar):
    p = norm(mean, math.exp(logvar / 2))
    expected, _ = quad(lambda z: p.pdf(z) * (p.logpdf(z) - norm.logpdf(z)), *p.interval(1 - 1e-15))
    actual = losses.kl_to_standard_normal(jnp.full((1, 1, 1), mean), jnp.full((1, 1, 1), logvar))
    assert float(actual) == pytest.approx(expected, abs=1e-6)


def test_kl_sums_over_the_latent_and_averages_over_the_batch():
    mean, logvar = (np.asarray(normal(3, 4, 5, seed=seed)) for seed in (0, 1))
    terms = 0.5 * (mean.astype(np.float64) ** 2 + np.exp(logvar.astype(np.float64)) - 1 - logvar)
    actual = losses.kl_to_standard_normal(jnp.asarray(mean), jnp.asarray(logvar))
    assert float(actual) == pytest.approx(terms.sum() / 3, rel=1e-6)


# --- soft-CLIP ---


def loop_soft_clip(latents, tokens, temperature):
    """The definition, term by term, in float64."""
    p, t = (np.asarray(a, np.float64).reshape(len(a), -1) for a in (latents, tokens))
    p, t = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (p, t))
    total, b = 0.0, len(t)
    for i in range(b):
        target = np.exp([t[i] @ t[j] / temperature for j in range(b)])
        to_tokens = np.exp([p[i] @ t[j] / temperature for j in range(b)])
        to_latents = np.exp([p[j] @ t[i] / temperature for j in range(b)])
        for j in range(b):
            weight = target[j] / target.sum()
            total -= weight * math.log(to_tokens[j] / to_tokens.sum())
            total -= weight * math.log(to_latents[j] / to_latents.sum())
    return total / (2 * b)


@pytest.mark.parametrize(("batch", "temperature"), [(1, 0.125), (2, 1.0), (5, 0.125), (5, 0.5)])
def test_soft_clip_is_its_definition(batch, temperature):
    latents, tokens = normal(batch, 3, 4), normal(batch, 3, 4, seed=1)
    actual = jax.jit(losses.soft_clip, static_argnums=2)(latents, tokens, temperature)
    assert float(actual) == pytest.approx(loop_soft_clip(latents, tokens, temperature), rel=1e-5, abs=1e-6)


def test_soft_clip_default_temperature_is_an_eighth():
    latents, tokens = normal(4, 3, 4), normal(4, 3, 4, seed=1)
    assert losses.soft_clip(latents, tokens) == losses.soft_clip(latents, tokens, 0.125)


def test_soft_clip_within_groups_is_the_mean_of_their_losses():
    latents, tokens = normal(6, 3, 4), normal(6, 3, 4, seed=1)
    grouped = losses.soft_clip(latents, tokens, contrast_size=2)
    expected = np.mean([loop_soft_clip(latents[i : i + 2], tokens[i : i + 2], 0.125) for i in (0, 2, 4)])
    assert float(grouped) == pytest.approx(expected, rel=1e-5)
    assert abs(float(grouped) - loop_soft_clip(latents, tokens, 0.125)) > 0.1
    with pytest.raises(ValueError, match="contrast_size is 4; it must divide the batch of 6"):
        losses.soft_clip(latents, tokens, contrast_size=4)


def test_soft_clip_ignores_the_length_of_vectors():
    latents, tokens = (np.asarray(normal(4, 3, 4, seed=i)) for i in range(2))
    lengths = np.float32([0.1, 1, 7, 1000])[:, None, None]
    value, _ = soft_clip_and_gradients(latents, tokens)
    scaled, _ = soft_clip_and_gradients(lengths * latents, lengths[::-1] * tokens)
    assert float(scaled) == pytest.approx(float(value), rel=1e-5)


def test_soft_clip_is_least_where_latents_are_the_tokens():
    """There each cross-entropy is the entropy of its target, its lower bound."""
    latents, tokens = (np.asarray(normal(4, 3, 4, seed=i)) for i in range(2))
    least, (gradient, _) = soft_clip_and_gradients(tokens, tokens)
    assert least < soft_clip_and_gradients(latents, tokens)[0]
    assert np.abs(gradient).max() < 1e-6


def test_soft_clip_of_all_zero_rows_has_a_finite_gradient():
    some_zero, tokens = np.array(normal(4, 3, 4)), np.asarray(normal(4, 3, 4, seed=1))
    some_zero[1] = 0
    for arguments in [(some_zero, tokens), (tokens, some_zero)]:
        for array in jax.tree.leaves(soft_clip_and_gradients(*arguments)):
            assert np.isfinite(array).all()


def test_soft_clip_of_bfloat16_is_computed_in_float32():
    latents, tokens = normal(3, 2, 4).astype(jnp.bfloat16), normal(3, 2, 4, seed=1).astype(jnp.bfloat16)
    value = losses.soft_clip(latents, tokens)
    assert value.dtype == jnp.float32
    assert float(value) == pytest.approx(loop_soft_clip(latents, tokens, 0.125), rel=1e-5)


# --- mapper ---


@pytest.mark.parametrize("weight", [None, [1.0, 3.0, 0.5]])
@pytest.mark.parametrize("prediction", ["x", "v"])
def test_mapper_mse_is_its_definition(prediction, weight):
    output, tokens, latent = (np.asarray(normal(3, 2, 4, seed=i)) for i in range(3))
    target = latent if prediction == "x" else latent - tokens
    expected = np.mean((np.ones(3) if weight is None else np.array(weight)) * ((output - target) ** 2).mean((1, 2)))
    weight = None if weight is None else jnp.array(weight)
    actual = losses.mapper_mse(jnp.asarray(output), jnp.asarray(tokens), jnp.asarray(latent), prediction, weight)
    assert float(actual) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("prediction", ["x", "v"])
def test_mapper_mse_is_zero_exactly_where_the_prediction_is_right(prediction):
    tokens, latent = normal(3, 2, 4), normal(3, 2, 4, seed=1)
    output = latent if prediction == "x" else latent - tokens
    assert losses.mapper_mse(output, tokens, latent, prediction) == 0


def test_mapper_mse_refuses_an_unknown_prediction():
    x = normal(1, 2, 3)
    with pytest.raises(ValueError, match="prediction is 'eps'; expected 'x' or 'v'"):
        losses.mapper_mse(x, x, x, "eps")


# --- shapes ---


@pytest.mark.parametrize(
    ("loss", "arguments"),
    [
        (losses.squared_error, (normal(2, 3), normal(2, 1))),
        (losses.voxel_mse, (normal(2, 3), normal(1, 3))),
        (losses.kl_to_standard_normal, (normal(2, 3, 4), normal(2, 3, 1))),
        (losses.soft_clip, (normal(2, 3, 4), normal(1, 3, 4))),
        (losses.mapper_mse, (normal(2, 3, 4), normal(2, 3, 4), normal(2, 1, 4), "x")),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_shapes_that_would_broadcast_are_refused_without_the_test_suites_own_checks(loss, arguments):
    with pytest.raises(AssertionError, match="shape"):
        inspect.unwrap(loss)(*arguments)
