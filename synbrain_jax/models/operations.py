"""Normalisation, activation and attention with gradients written by hand: functions of arrays, without parameters.

Automatic differentiation keeps inner values for the gradient, often in float32, that an accelerator computes anew in
less time than it takes to write and to read them. Values and gradients are those of the definitions, to rounding.
Derivatives are reverse-mode only (`jax.grad`, not `jax.jvp`).

Shape letters: b batch, l positions or t tokens, c channels or d width, h heads of width e.
"""

import math
import re
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

GROUP_NORM_EPS = 1e-6
MODULATED_NORM_EPS = 1e-6


# --- linear layers ---


@jax.custom_vjp
def linear(x: Float[Array, "*b c"], kernel: Float[Array, "c f"]) -> Float[Array, "*b f"]:
    """x @ kernel. The kernel's gradient is one product of matrices that gives it as it is stored; of the automatic one,
    its transpose by a sum over several axes, a CPU's compiler first copies the operands."""
    return jnp.matmul(x, kernel)


def _linear_backward(residuals, grad):
    x, kernel = residuals
    rows, of_rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    of_x = lax.dot_general(grad, kernel, (((grad.ndim - 1,), (1,)), ((), ())))
    return of_x, lax.dot_general(rows, of_rows, (((0,), (0,)), ((), ())))


linear.defvjp(lambda x, kernel: (linear(x, kernel), (x, kernel)), _linear_backward)


def dense_product(x, kernel, _dimensions, precision=None):
    """`linear` as `nn.Dense(dot_general=...)`."""
    assert precision is None, precision
    return linear(x, kernel)


# --- normalisation ---


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def group_norm(
    x: Float[Array, "b l c"], scale: Float[Array, " c"], bias: Float[Array, " c"], groups: int, swish: bool = False
) -> Float[Array, "b l c"]:
    """Group normalisation (Wu and He 2018) over positions and the channels of a group, then swish if asked; in float32.

    On accelerators its time is that of reading and writing x: the statistics take one pass, and the gradient keeps x
    alone and takes two.
    """
    return _group_norm_forward(x, scale, bias, groups, swish)[0]


def _over_groups(per_channel: Float[Array, "b c"], groups: int) -> Float[Array, "b 1 c"]:
    """Mean over the channels of each group, at every channel."""
    b, c = per_channel.shape
    means = per_channel.reshape(b, groups, c // groups).mean(-1)
    return jnp.repeat(means, c // groups, axis=1)[:, None]


def _group_statistics(x: Float[Array, "b l c"], groups: int) -> tuple[Float[Array, "b 1 c"], Float[Array, "b 1 c"]]:
    """Mean and inverse standard deviation of each channel's group."""
    # A value of each channel is taken off first: sums of squares alone lose all digits far from zero.
    middle = x[:, x.shape[1] // 2].astype(jnp.float32)
    shifted = x.astype(jnp.float32) - middle[:, None]
    mean, mean_square = shifted.mean(1), jnp.square(shifted).mean(1)
    group_mean = _over_groups(middle + mean, groups)
    within, between = mean_square - jnp.square(mean), jnp.square(middle + mean - group_mean[:, 0])
    return group_mean, lax.rsqrt(_over_groups(within + between, groups) + GROUP_NORM_EPS)


def _group_norm_forward(x, scale, bias, groups, swish):
    mean, inverse = _group_statistics(x, groups)
    y = (x.astype(jnp.float32) - mean) * (inverse * scale[None, None]) + bias[None, None]
    return (nn.swish(y) if swish else y).astype(x.dtype), (x, scale, bias, mean, inverse)


def _group_norm_backward(groups, swish, residuals, grad):
    x, scale, bias, mean, inverse = residuals

    def normed_and_gradient(x, grad):
        normed, grad = (x.astype(jnp.float32) - mean) * inverse, grad.astype(jnp.float32)
        if swish:
            y = normed * scale[None, None] + bias[None, None]
            sigmoid = nn.sigmoid(y)
            grad = grad * sigmoid * (1 + y * (1 - sigmoid))
        return normed, grad

    # Behind a barrier all is computed anew from x, in 16 bits perhaps: float32 from before would be stored and read.
    x, grad = lax.optimization_barrier((x, grad))
    normed, g = normed_and_gradient(x, grad)
    grad_bias, grad_scale = g.sum(1), (g * normed).sum(1)
    x, grad, grad_bias, grad_scale = lax.optimization_barrier((x, grad, grad_bias, grad_scale))
    normed, g = normed_and_gradient(x, grad)
    mean_g, mean_g_normed = (_over_groups(sums * scale[None] / x.shape[1], groups) for sums in (grad_bias, grad_scale))
    grad_x = inverse * (g * scale[None, None] - mean_g - normed * mean_g_normed)
    return grad_x.astype(x.dtype), grad_scale.sum(0), grad_bias.sum(0)


group_norm.defvjp(_group_norm_forward, _group_norm_backward)


@jax.custom_vjp
def modulated_norm(
    x: Float[Array, "b t d"], shift: Float[Array, "m 1 d"], scale: Float[Array, "m 1 d"]
) -> Float[Array, "b t d"]:
    """Layer normalisation without parameters of its own, then times 1 + scale, plus shift; m is 1 or b.

    The gradient keeps x and computes the rest anew.
    """
    return _modulated_forward(x, shift, scale)[0]


def _modulated_forward(x, shift, scale):
    mean = x.mean(-1, keepdims=True)
    inverse = lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + MODULATED_NORM_EPS)
    return (x - mean) * inverse * (1 + scale) + shift, (x, mean, inverse, scale)


def _modulated_backward(residuals, grad):
    x, mean, inverse, scale = residuals
    axes = (0, 1) if len(scale) == 1 else (1,)
    normed = (lax.optimization_barrier(x) - mean) * inverse
    grad_shift, grad_scale = (part.sum(axes, keepdims=True) for part in (grad, grad * normed))
    x, grad_shift, grad_scale = lax.optimization_barrier((x, grad_shift, grad_scale))
    normed, g = (x - mean) * inverse, grad * (1 + scale)
    grad_x = inverse * (g - g.mean(-1, keepdims=True) - normed * (g * normed).mean(-1, keepdims=True))
    return grad_x, grad_shift, grad_scale


modulated_norm.defvjp(_modulated_forward, _modulated_backward)

# --- activation ---


def recomputed(f: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """`f` of one array whose gradient keeps the array alone and computes anew what it needs of f's inner values.

    On accelerators these cost more to write and to read than to compute.
    """
    function = jax.custom_vjp(f)
    function.defvjp(lambda x: (f(x), x), lambda x, grad: jax.vjp(f, lax.optimization_barrier(x))[1](grad))
    return function


@recomputed
def gelu_erf(x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
    """The exact GELU (Hendrycks and Gimpel 2016), in float32. Flax's takes erfc: more work for a GPU than erf."""
    y = x.astype(jnp.float32)
    return (0.5 * y * (1 + lax.erf(y * math.sqrt(0.5)))).astype(x.dtype)


gelu_tanh = recomputed(partial(nn.gelu, approximate=True))

# --- attention ---


def attend(
    q: Float[Array, "b l c"], k: Float[Array, "b l c"], v: Float[Array, "b l c"], chunk: int | None = None
) -> Float[Array, "b l c"]:
    """Single-head attention; `chunk` queries at a time if given, so that the [b, l, l] scores never exist at once."""

    b, length, c = q.shape
    if chunk is None or chunk >= length:
        return _attend_at_once(q, k, v)
    if length % chunk:
        raise ValueError(f"attention_chunk is {chunk}; it must divide the {length} positions")
    parts = q.reshape(b, length // chunk, chunk, c).swapaxes(0, 1)
    block = jax.checkpoint(lambda part: _attend_at_once(part, k, v))
    return lax.map(block, parts).swapaxes(0, 1).reshape(b, length, c)


@jax.custom_vjp
def _attend_at_once(q, k, v):
    return _attend_forward(q, k, v)[0]


def _attend_forward(q, k, v):
    scores = jnp.einsum("bqc,bkc->bqk", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores * q.shape[-1] ** -0.5, axis=-1).astype(v.dtype)
    out = jnp.einsum("bqk,bkc->bqc", weights, v)
    return out, (q, k, v, weights, out)


def _attend_backward(residuals, grad):
    """Keeps the weights, [b, q, k], in the compute type; automatic differentiation keeps more, in float32."""
    q, k, v, weights, out = residuals
    # Behind the barrier in the compute type: XLA would write and read it in float32.
    grad_weights = lax.optimization_barrier(jnp.einsum("bqc,bkc->bqk", grad, v))
    # Softmax takes off the weights' mean of their gradient, which is the product of out and its own.
    mean = (grad.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)
    grad_scores = weights.astype(jnp.float32) * (grad_weights.astype(jnp.float32) - mean)
    # Two products read it; computed inside each of them it takes a GPU twice the time of both.
    grad_scores = lax.optimization_barrier((grad_scores * q.shape[-1] ** -0.5).astype(q.dtype))
    grad_q = jnp.einsum("bqk,bkc->bqc", grad_scores, k)
    grad_k = jnp.einsum("bqk,bqc->bkc", grad_scores, q)
    return grad_q, grad_k, jnp.einsum("bqk,bqc->bkc", weights, grad)


_attend_at_once.defvjp(_attend_forward, _attend_backward)


def attend_heads(
    q: Float[Array, "b t h e"],
    k: Float[Array, "b t h e"],
    v: Float[Array, "b t h e"],
    precision: lax.PrecisionLike = None,
) -> Float[Array, "b t h e"]:
    """Attention of each head by itself, softmax in float32; in cuDNN's one kernel where it has one for these arrays."""
    plain = partial(_attend_heads, precision=precision)
    if not _cudnn_attends(q.dtype, q.shape[-1]):
        return plain(q, k, v)
    # The program may be for others than the devices that are here: the CPU beside them, or a TPU that is planned for.
    cudnn = partial(jax.nn.dot_product_attention, implementation="cudnn")
    return lax.platform_dependent(q, k, v, cuda=cudnn, default=plain)


def _attend_heads(q, k, v, precision):
    scores = jnp.einsum("bqhe,bkhe->bhqk", q, k, precision=precision, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores * q.shape[-1] ** -0.5, axis=-1).astype(v.dtype)
    return jnp.einsum("bhqk,bkhe->bqhe", weights, v, precision=precision)


def _cudnn_attends(dtype: DTypeLike, width: int) -> bool:
    """Whether the devices here are NVIDIA GPUs, from Ampere on, and the kernel takes this type and width of a head."""
    capability = getattr(jax.devices()[0], "compute_capability", "")
    nvidia = re.fullmatch(r"\d+\.\d", str(capability))
    return dtype == jnp.bfloat16 and width <= 128 and width % 8 == 0 and nvidia is not None and float(capability) >= 8
