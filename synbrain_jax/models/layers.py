"""Blocks of BrainVAE's one-dimensional networks, and the sin-cos embeddings of the mapper.

Arrays are channels-last: [b, l, c], `l` positions along the voxel axis. Parameters are float32; `dtype` is the type
that convolutions and matrix products compute in; normalisation and softmax always run in float32.

Several operations have a textbook form that compiles badly: a dilated transposed convolution whose weight gradient
falls into a scalar loop on CPU, gathers whose automatic gradient is a scatter. Each is written here in a form without
them (polyphase convolutions, gather-only gradients); the tests compare every one with its textbook form.
"""

import math
from collections.abc import Callable
from functools import lru_cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from synbrain_jax.models.operations import attend, dense_product, gelu_erf, group_norm, linear

LAYER_NORM_EPS = 1e-5


# --- initialisers ---


def torch_uniform(fan_in: int) -> Callable:
    """PyTorch's default for weights and biases of linear and convolution layers: uniform within +-1/sqrt(fan_in)."""
    bound = 1 / math.sqrt(fan_in)

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


# --- convolutions ---


def _conv(x: Array, kernel: Array, padding: tuple[int, int]) -> Array:
    return lax.conv_general_dilated(x, kernel, (1,), [padding], dimension_numbers=("NWC", "WIO", "NWC"))


def strided_conv(x: Float[Array, "b l c"], kernel: Float[Array, "w c f"]) -> Float[Array, "b m f"]:
    """Convolution with stride 2 and `w // 2` zeros on both sides; m = ceil(l / 2), `w` odd and above 1.

    Polyphase: even taps only ever meet even positions of the padded input and odd taps odd ones, so it is the sum of
    two dense convolutions over half the positions.
    """
    length, pad = x.shape[1], kernel.shape[0] // 2
    out = (length + 1) // 2
    x = jnp.pad(x, ((0, 0), (pad, pad + 1), (0, 0)))
    even = x[:, 0::2][:, : out + pad]
    odd = x[:, 1::2][:, : out + pad - 1]
    return _conv(even, kernel[0::2], (0, 0)) + _conv(odd, kernel[1::2], (0, 0))


def transposed_conv(x: Float[Array, "b l c"], kernel: Float[Array, "7 c f"]) -> Float[Array, "b 2*l f"]:
    """Transposed convolution of width 7, stride 2, padding 3, output padding 1: twice as many positions.

    Tap k of input i lands on output 2 i + k - 3. Polyphase: even outputs see taps 1, 3, 5 and odd outputs taps
    0, 2, 4, 6, each a dense convolution; the two are interleaved.
    """
    even = _conv(x, kernel[5::-2], (1, 1))
    odd = _conv(x, kernel[6::-2], (1, 2))
    b, length, f = even.shape
    return jnp.stack([even, odd], axis=2).reshape(b, 2 * length, f)


def conv_to_few(x: Float[Array, "b l c"], kernel: Float[Array, "w c f"]) -> Float[Array, "b l f"]:
    """Same-padded convolution to very few channels: one product to w x f numbers per position, then shifted sums."""
    width, _, features = kernel.shape
    taps = jnp.einsum("blc,wcf->blwf", x, kernel)
    pad = width // 2
    taps = jnp.pad(taps, ((0, 0), (pad, pad), (0, 0), (0, 0)))
    length = x.shape[1]
    return sum(taps[:, w : w + length, w].reshape(*x.shape[:2], features) for w in range(width))


class Conv(nn.Module):
    """One-dimensional convolution with bias and PyTorch's default initialisation. `kind` picks the formulation."""

    features: int
    width: int
    kind: str = "same"  # "same" | "strided" | "transposed"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b l c"]) -> Float[Array, "b m f"]:
        channels = x.shape[-1]
        # PyTorch counts a transposed layer's fan-in on its output channels.
        fan_in = self.width * (self.features if self.kind == "transposed" else channels)
        kernel = self.param("kernel", torch_uniform(fan_in), (self.width, channels, self.features), jnp.float32)
        bias = self.param("bias", torch_uniform(fan_in), (self.features,), jnp.float32)
        x, kernel, bias = (a.astype(self.dtype) for a in (x, kernel, bias))
        match self.kind:
            case "same" if self.width == 1:
                y = linear(x, kernel[0])
            case "same" if self.features < 8 <= channels:
                y = conv_to_few(x, kernel)
            case "same":
                y = _conv(x, kernel, (self.width // 2, self.width // 2))
            case "strided":
                y = strided_conv(x, kernel)
            case "transposed":
                y = transposed_conv(x, kernel)
            case _:
                raise ValueError(f"Conv.kind is {self.kind!r}; expected 'same', 'strided' or 'transposed'")
        return y + bias[None, None]


class Dense(nn.Module):
    """Linear layer on the last axis with PyTorch's default initialisation."""

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b f"]:
        init = torch_uniform(x.shape[-1])
        dense = nn.Dense(
            self.features,
            dtype=self.dtype,
            kernel_init=init,
            bias_init=init,
            dot_general=dense_product,
            name="linear",
        )
        return dense(x)


# --- normalisation and activation ---


class GroupNorm(nn.Module):
    """32 groups, or one channel per group where there are fewer than 32 channels; optionally followed by swish."""

    swish: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "b l c"]) -> Float[Array, "b l c"]:
        channels = x.shape[-1]
        groups = 32 if channels >= 32 else channels
        if channels % groups:
            raise ValueError(f"GroupNorm got {channels} channels; above 32 they must be a multiple of 32")
        scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        return group_norm(x, scale, bias, groups, self.swish)


class NormMLP(nn.Module):
    """(LayerNorm, GELU, Linear) for each of `features`, on the last axis. The normalisation and GELU come first."""

    features: tuple[int, ...]
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b f"]:
        for i, features in enumerate(self.features):
            norm = nn.LayerNorm(epsilon=LAYER_NORM_EPS, use_fast_variance=False, dtype=jnp.float32, name=f"norm_{i}")
            x = gelu_erf(norm(x))
            x = Dense(features, self.dtype, name=f"dense_{i}")(x.astype(self.dtype))
        return x


# --- residual and attention blocks ---


class ResBlock(nn.Module):
    """Norm, swish, conv 3, norm, swish, conv 3, plus the input (through a 1x1 convolution if the width changes)."""

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b l c"]) -> Float[Array, "b l f"]:
        h = Conv(self.features, 3, dtype=self.dtype, name="conv1")(GroupNorm(name="norm1")(x))
        h = Conv(self.features, 3, dtype=self.dtype, name="conv2")(GroupNorm(name="norm2")(h))
        if x.shape[-1] != self.features:
            x = Conv(self.features, 1, dtype=self.dtype, name="shortcut")(x)
        return x + h


class AttentionBlock(nn.Module):
    """Group norm, single-head self-attention over positions, 1x1 projection, plus the input."""

    chunk: int | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b l c"]) -> Float[Array, "b l c"]:
        h = GroupNorm(swish=False, name="norm")(x)
        q, k, v = (Conv(x.shape[-1], 1, dtype=self.dtype, name=name)(h) for name in ("q", "k", "v"))
        return x + Conv(x.shape[-1], 1, dtype=self.dtype, name="proj_out")(attend(q, k, v, self.chunk))


# --- adaptive max pooling ---


@lru_cache
def _pool_tables(length: int, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Which positions each bin covers, [bins, widest], and which bins cover each position, [length, most]; -1 is none.

    Bin i covers floor(i l / m) up to but not including ceil((i + 1) l / m): neighbours overlap unless m divides l.
    """
    i = np.arange(bins, dtype=np.int64)
    start, stop = i * length // bins, -((-(i + 1) * length) // bins)
    span = start[:, None] + np.arange((stop - start).max())
    positions = np.where(span < stop[:, None], span, -1)
    p = np.arange(length, dtype=np.int64)
    first, last = np.searchsorted(stop, p, side="right"), np.searchsorted(start, p, side="right")
    span = first[:, None] + np.arange((last - first).max())
    covering = np.where(span < last[:, None], span, -1)
    return positions.astype(np.int32), covering.astype(np.int32)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def adaptive_max_pool(x: Float[Array, "b l c"], bins: int) -> Float[Array, "b {bins} c"]:
    """Largest value of each of `bins` equal, overlapping stretches of positions, for any l (also l < bins).

    The gradient goes to the first maximum of a bin and adds up where bins overlap (PyTorch's AdaptiveMaxPool1d).
    """
    return _pool_forward(x, bins)[0]


def _pool_forward(x, bins):
    positions, _ = _pool_tables(x.shape[1], bins)
    best, winner = x[:, positions[:, 0]], jnp.broadcast_to(positions[:, 0, None], (bins, x.shape[2]))[None]
    for column in positions[:, 1:].T:
        candidate = x[:, np.maximum(column, 0)]
        better = (candidate > best) & (column >= 0)[None, :, None]
        best, winner = jnp.where(better, candidate, best), jnp.where(better, column[None, :, None], winner)
    return best, (winner, x.shape[1])


def _pool_backward(bins, residuals, grad):
    winner, length = residuals
    _, covering = _pool_tables(length, bins)
    position = np.arange(length, dtype=np.int32)[None, :, None]
    total = jnp.zeros((grad.shape[0], length, grad.shape[2]), grad.dtype)
    winner = jnp.broadcast_to(winner, grad.shape)
    for column in covering.T:
        bin_ = np.maximum(column, 0)
        won = (winner[:, bin_] == position) & (column >= 0)[None, :, None]
        total = total + jnp.where(won, grad[:, bin_], 0)
    return (total,)


adaptive_max_pool.defvjp(_pool_forward, _pool_backward)


# --- linear resize ---


@lru_cache
def _resize_tables(length: int, out: int) -> tuple[np.ndarray, ...]:
    """Left and right source position and right weight of each output; and the outputs (with weights) of each position.

    The index arithmetic is float32 on purpose: PyTorch's is, and float64 moves outputs by up to 1e-3 at 8192 -> 15724.
    """
    scale = np.float32(length - 1) / np.float32(out - 1) if out > 1 else np.float32(0)
    position = scale * np.arange(out, dtype=np.float32)
    left = np.minimum(position.astype(np.int64), length - 1)
    right = np.minimum(left + 1, length - 1)
    weight = (position - left.astype(np.float32)).astype(np.float32)

    target = np.concatenate([left, right])
    source = np.concatenate([np.arange(out), np.arange(out)])
    share = np.concatenate([np.float32(1) - weight, weight])
    by_target = np.argsort(target, kind="stable")
    count = np.bincount(target, minlength=length)
    slot = np.arange(2 * out) - np.repeat(np.cumsum(count) - count, count)
    outputs = np.zeros((length, count.max()), np.int32)
    shares = np.zeros((length, count.max()), np.float32)
    outputs[target[by_target], slot] = source[by_target]
    shares[target[by_target], slot] = share[by_target]
    return left.astype(np.int32), right.astype(np.int32), weight, outputs, shares


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def linear_resize(x: Float[Array, "b l c"], out: int) -> Float[Array, "b {out} c"]:
    """Linear interpolation to `out` positions, both ends aligned (PyTorch's align_corners=True), no antialiasing."""
    if x.shape[1] == out:
        return x
    left, right, weight, _, _ = _resize_tables(x.shape[1], out)
    weight = jnp.asarray(weight, x.dtype)[None, :, None]
    return x[:, left] * (1 - weight) + x[:, right] * weight


def _resize_forward(x, out):
    return linear_resize(x, out), x.shape[1]


def _resize_backward(out, length, grad):
    if length == out:
        return (grad,)
    *_, outputs, shares = _resize_tables(length, out)
    parts = (
        grad[:, outputs[:, j]] * jnp.asarray(shares[:, j], grad.dtype)[None, :, None] for j in range(outputs.shape[1])
    )
    return (sum(parts),)


linear_resize.defvjp(_resize_forward, _resize_backward)


# --- embeddings ---


def timestep_embedding(t: Float[Array, " b"], dim: int, max_period: float = 10_000.0) -> Float[Array, "b {dim}"]:
    """Sinusoids of a time, cosines before sines (Vaswani et al. 2017, as in DiT); an odd `dim` ends in a zero."""
    half = dim // 2
    frequencies = jnp.exp(-math.log(max_period) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = t.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.pad(jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1), ((0, 0), (0, dim % 2)))


def position_embedding(tokens: int, dim: int) -> np.ndarray:
    """Fixed sin-cos table float32 [tokens, dim] (`dim` even): the sines first, then the cosines."""
    omega = 10_000.0 ** (-np.arange(dim // 2) / (dim / 2))
    angles = np.arange(tokens)[:, None] * omega
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)
