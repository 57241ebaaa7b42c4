"""The semantic-to-neural mapper: from a picture's CLIP tokens to BrainVAE's latent, in one step.

SynBrain (arXiv 2508.10298), section 3.3: a diffusion-transformer stack (DiT, Peebles and Xie 2023; SiT, Ma et al.
2024) used without diffusion. Its time input is 0 in training and in synthesis, so all conditioning is one vector; it is
computed once per batch, and its parameters are kept because the released weights have them.

Differences from the release: the conditioning is not repeated over the batch; the fixed position table is a constant
unless it is asked for as a parameter. The numbers are the same. Derivatives are reverse-mode only (`jax.grad`, not
`jax.jvp`).

Shape letters: b batch, t tokens, d token width.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from synbrain_jax.errors import InputError
from synbrain_jax.models.layers import position_embedding, timestep_embedding
from synbrain_jax.models.operations import attend_heads, dense_product, gelu_tanh, modulated_norm

TIME_FREQUENCIES = 256
_xavier = nn.initializers.xavier_uniform()


@dataclasses.dataclass(frozen=True)
class MapperConfig:
    """Architecture of the mapper. Input and output are both [tokens, width]; in a run, 0 takes the data set's."""

    tokens: int = 256
    width: int = 1664
    depth: int = 8
    heads: int = 13
    mlp_ratio: float = 4.0
    prediction: str = "x"
    """What the network's output is: "x", the latent itself, or "v", the latent minus the tokens."""
    positions: str = "computed"
    """The fixed position table: "computed", a constant, or "stored", a parameter `pos_embed` that no step changes, as
    in the release (whose moving average of it drifts by rounding)."""
    dtype: str = "float32"
    """Compute type, "float32" or "bfloat16"; parameters, normalisation and softmax stay float32."""
    remat: bool = False
    """Recompute each block in the backward pass."""

    def __post_init__(self):
        if self.heads < 1 or self.width % self.heads or self.width % 2:
            raise InputError(
                f"mapper.width is {self.width} and mapper.heads {self.heads}; the width must be even and a multiple of "
                "the heads"
            )
        if self.prediction not in ("x", "v"):
            raise InputError(f"mapper.prediction is {self.prediction!r}; expected 'x' or 'v'")
        if self.positions not in ("computed", "stored"):
            raise InputError(f"mapper.positions is {self.positions!r}; expected 'computed' or 'stored'")
        if self.dtype not in ("float32", "bfloat16"):
            raise InputError(f"mapper.dtype is {self.dtype!r}; expected 'float32' or 'bfloat16'")

    @classmethod
    def paper(cls, **changes) -> "MapperConfig":
        """The released mapper: 410,430,592 parameters, and the position table's 425,984 numbers."""
        return cls(**{"positions": "stored", **changes})

    @classmethod
    def small(cls, **changes) -> "MapperConfig":
        """For small data sets with 12 tokens of width 32: 50,272 parameters."""
        return cls(**{**dict(tokens=12, width=32, depth=2, heads=2), **changes})


def _dense(features: int, dtype: DTypeLike, name: str, kernel_init=_xavier) -> nn.Dense:
    return nn.Dense(features, dtype=dtype, kernel_init=kernel_init, dot_general=dense_product, name=name)


class _Modulation(nn.Module):
    """`count` vectors of the tokens' width from the conditioning; zero at initialisation (adaLN-zero)."""

    count: int
    width: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, c: Float[Array, "b d"]) -> list[Float[Array, "b 1 d"]]:
        out = _dense(self.count * self.width, self.dtype, "linear", nn.initializers.zeros)(nn.silu(c))
        return jnp.split(out.astype(jnp.float32)[:, None], self.count, axis=-1)


class TimeEmbedding(nn.Module):
    """Conditioning vector of a time."""

    width: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, t: Float[Array, " b"]) -> Float[Array, "b d"]:
        init = nn.initializers.normal(0.02)
        h = nn.silu(_dense(self.width, self.dtype, "dense_0", init)(timestep_embedding(t, TIME_FREQUENCIES)))
        return _dense(self.width, self.dtype, "dense_1", init)(h)


class SelfAttention(nn.Module):
    """Multi-head self-attention over tokens."""

    heads: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        qkv = _dense(3 * x.shape[-1], self.dtype, "qkv")(x.astype(self.dtype))
        q, k, v = rearrange(qkv, "b t (three h e) -> three b t h e", three=3, h=self.heads)
        out = rearrange(attend_heads(q, k, v), "b t h e -> b t (h e)")
        return _dense(x.shape[-1], self.dtype, "proj")(out)


class MLP(nn.Module):
    """Two linear layers around a tanh-approximated GELU."""

    hidden: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        h = gelu_tanh(_dense(self.hidden, self.dtype, "fc1")(x.astype(self.dtype)))
        return _dense(x.shape[-1], self.dtype, "fc2")(h)


class Block(nn.Module):
    """Attention and MLP, each on a modulated normalisation and added through a gate."""

    config: MapperConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"], c: Float[Array, "c d"]) -> Float[Array, "b t d"]:
        cfg, dtype = self.config, jnp.dtype(self.config.dtype)
        modulation = _Modulation(6, cfg.width, dtype, name="modulation")(c)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation
        attn = SelfAttention(cfg.heads, dtype, name="attn")
        mlp = MLP(int(cfg.width * cfg.mlp_ratio), dtype, name="mlp")
        x = x + gate_attn * attn(modulated_norm(x, shift_attn, scale_attn))
        return x + gate_mlp * mlp(modulated_norm(x, shift_mlp, scale_mlp))


class SemanticToNeural(nn.Module):
    """One-step mapper from CLIP tokens to BrainVAE latents. A fresh one outputs exactly zero.

    >>> import jax
    >>> model = SemanticToNeural(MapperConfig.small())
    >>> tokens = jnp.ones((2, 12, 32))
    >>> params = model.init(jax.random.key(0), tokens)["params"]
    >>> float(jnp.abs(model.apply({"params": params}, tokens)).max())
    0.0
    """

    config: MapperConfig

    @nn.compact
    def __call__(self, tokens: Float[Array, "b t d"], time: Float[Array, " b"] | None = None) -> Float[Array, "b t d"]:
        """The network's output, float32: the latent or the difference to it (`config.prediction`).

        `time` is 0 for every element when it is not given, which is how the system is trained and used.
        """
        cfg, dtype = self.config, jnp.dtype(self.config.dtype)
        if tokens.shape[1:] != (cfg.tokens, cfg.width):
            raise ValueError(f"tokens have shape {tokens.shape}; expected [batch, {cfg.tokens}, {cfg.width}]")
        block = nn.remat(Block) if cfg.remat else Block
        c = TimeEmbedding(cfg.width, dtype, name="time")(jnp.zeros(1) if time is None else time)
        positions = jnp.asarray(position_embedding(cfg.tokens, cfg.width))
        if cfg.positions == "stored":
            positions = jax.lax.stop_gradient(self.param("pos_embed", lambda _: positions))
        x = tokens + positions[None]
        for i in range(cfg.depth):
            x = block(cfg, name=f"block_{i}")(x, c)
        shift, scale = _Modulation(2, cfg.width, dtype, name="final_modulation")(c)
        x = modulated_norm(x, shift, scale).astype(dtype)
        return _dense(cfg.width, dtype, "final", nn.initializers.zeros)(x).astype(jnp.float32)

    def predict_latent(self, tokens: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """The latent of each picture."""
        output = self(tokens)
        return tokens + output if self.config.prediction == "v" else output


def mapper_shapes(config: MapperConfig) -> PyTree:
    """Shapes and types of the parameters, without computing any."""
    tokens = jnp.zeros((1, config.tokens, config.width))
    return jax.eval_shape(SemanticToNeural(config).init, jax.random.key(0), tokens)["params"]
