"""Training losses of both stages, as plain functions of arrays; all are means over the batch.

Shape letters: b batch, v voxels, t latent tokens, d latent width.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

SOFT_CLIP_TEMPERATURE = 0.125


def squared_error(prediction: Float[Array, "b v"], target: Float[Array, "b v"]) -> Float[Array, ""]:
    """Sum of squared errors over voxels, mean over the batch (divide by v for the voxel MSE).

    Its square root has the units of the data; the sum grows with the number of voxels.
    """
    chex.assert_equal_shape([prediction, target])
    return jnp.square(prediction - target).sum(-1).mean()


def voxel_mse(prediction: Float[Array, "b v"], target: Float[Array, "b v"]) -> Float[Array, ""]:
    """Mean squared error over voxels and batch."""
    chex.assert_equal_shape([prediction, target])
    return jnp.square(prediction - target).mean()


def kl_to_standard_normal(mean: Float[Array, "b t d"], logvar: Float[Array, "b t d"]) -> Float[Array, ""]:
    """KL divergence of a diagonal Gaussian from N(0, 1) in nats, over t and d (Kingma and Welling 2014, appendix B)."""
    chex.assert_equal_shape([mean, logvar])
    return 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1 - logvar).sum((1, 2)).mean()


def soft_clip(
    latents: Float[Array, "b t d"],
    tokens: Float[Array, "b t d"],
    temperature: float = SOFT_CLIP_TEMPERATURE,
    contrast_size: int | None = None,
    place: Callable[[Array], Array] = lambda rows: rows,
) -> Float[Array, ""]:
    """Contrastive loss whose targets are the similarities among the pictures themselves (SynBrain, section 3.2).

    Each sample is flattened and scaled to unit length. The softmax over the pictures' similarities to picture i says
    which latents may resemble it and how much; the cross-entropy to it is taken from latents to tokens and from tokens
    to latents. The contrast is over all b samples; or, with `contrast_size` n, among each n that follow one another
    (the mean over these groups; n must divide b), as where devices contrast only their own share of a batch.

    `place` says how the flattened samples [b, t * d] lie on devices. Split by features (`sharding.split_features`), no
    device holds all of them: what is summed over devices is the [b, b] similarities.
    """
    chex.assert_equal_shape([latents, tokens])
    latents, tokens = (place(_unit_rows(a)) for a in (latents, tokens))
    if contrast_size is None:
        return _soft_clip(latents, tokens, temperature)
    if len(latents) % contrast_size:
        raise ValueError(f"contrast_size is {contrast_size}; it must divide the batch of {len(latents)}")
    groups = (rows.reshape(-1, contrast_size, rows.shape[1]) for rows in (latents, tokens))
    return jax.vmap(lambda *group: _soft_clip(*group, temperature))(*groups).mean()


def _soft_clip(latents: Float[Array, "n f"], tokens: Float[Array, "n f"], temperature: float) -> Float[Array, ""]:
    def similarities(a, b):
        return jnp.matmul(a, b.T, precision="highest") / temperature

    target = jax.nn.softmax(similarities(tokens, tokens), axis=-1)
    similarity = similarities(latents, tokens)

    def cross_entropy(logits):
        return -(target * jax.nn.log_softmax(logits, axis=-1)).sum(-1).mean()

    return 0.5 * (cross_entropy(similarity) + cross_entropy(similarity.T))


def mapper_mse(
    output: Float[Array, "b t d"],
    tokens: Float[Array, "b t d"],
    latent: Float[Array, "b t d"],
    prediction: str,
    weight: Float[Array, " b"] | None = None,
) -> Float[Array, ""]:
    """Mean squared error of the mapper's output: against the latent ("x"), or the latent minus the tokens ("v").

    `weight` multiplies the error of each sample, for instance by its number of trials.
    """
    chex.assert_equal_shape([output, tokens, latent])
    if prediction not in ("x", "v"):
        raise ValueError(f"prediction is {prediction!r}; expected 'x' or 'v'")
    if weight is not None:
        chex.assert_shape(weight, (len(output),))
    target = latent if prediction == "x" else latent - tokens
    per_sample = jnp.square(output - target).mean((1, 2))
    return per_sample.mean() if weight is None else (weight * per_sample).mean()


def _unit_rows(x: Array) -> Float[Array, "b f"]:
    rows = x.reshape(x.shape[0], -1).astype(jnp.float32)
    # The floor is inside the root, where it also keeps the gradient of an all-zero row finite.
    return rows / jnp.sqrt(jnp.maximum(jnp.square(rows).sum(-1, keepdims=True), 1e-24))
