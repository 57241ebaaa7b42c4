"""The image tower of CLIP: from a picture to the tokens that the whole system starts from.

A pre-norm vision transformer (Dosovitskiy et al. 2021) trained with CLIP (Radford et al. 2021); numerical details as in
open_clip (Cherti et al. 2023), whose bigG/14 made the released system's tokens. Those are the patches' tokens after the
last normalisation, without the class token and not projected.

Differences: channels-last pictures; one compiled block is scanned over stacked parameters. The numbers are the same.
The weights are meant to be loaded (`synbrain_jax.interop.clip_weights`), not trained from scratch. Derivatives are
reverse-mode only.

Shape letters: b batch, h w pixels, t tokens (one a patch), n = t + 1 with the class token, d token width, e embedding.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from synbrain_jax.errors import InputError
from synbrain_jax.models.operations import attend_heads, gelu_erf


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig:
    """Architecture of the tower. Patches that would cross the picture's right or lower edge are left out."""

    image_size: int = 224
    patch_size: int = 14
    width: int = 1664
    depth: int = 48
    heads: int = 16
    mlp_width: int = 8192
    embed_dim: int = 1280
    activation: str = "gelu"
    """Of the MLPs: "gelu", the exact one, or "quick_gelu", x * sigmoid(1.702 x), with which OpenAI's were trained."""
    layer_norm_eps: float = 1e-5
    dtype: str = "float32"
    """Compute type, "float32" or "bfloat16"; the residual stream, normalisation and softmax stay float32.

    With "float32", products are full float32 on accelerators too, not TF32 or bfloat16 passes.
    """
    remat: bool = False
    """Recompute each block in the backward pass."""

    def __post_init__(self):
        for name in ("image_size", "patch_size", "width", "depth", "heads", "mlp_width", "embed_dim", "layer_norm_eps"):
            if not getattr(self, name) > 0:
                raise InputError(f"clip_vision.{name} is {getattr(self, name)}; expected a positive number")
        if self.width % self.heads:
            raise InputError(
                f"clip_vision.width is {self.width} and clip_vision.heads {self.heads}; the width must be a multiple "
                "of the heads"
            )
        if self.image_size < self.patch_size:
            raise InputError(
                f"clip_vision.image_size is {self.image_size} and clip_vision.patch_size {self.patch_size}; the "
                "picture must hold at least one patch"
            )
        if self.activation not in ACTIVATIONS:
            raise InputError(f"clip_vision.activation is {self.activation!r}; expected 'gelu' or 'quick_gelu'")
        if self.dtype not in ("float32", "bfloat16"):
            raise InputError(f"clip_vision.dtype is {self.dtype!r}; expected 'float32' or 'bfloat16'")

    @property
    def tokens(self) -> int:
        """Patches of a picture."""
        return (self.image_size // self.patch_size) ** 2

    @classmethod
    def bigG_14(cls, **changes) -> "CLIPVisionConfig":
        """ViT-bigG/14, the released system's: 1,844,907,264 parameters, 256 tokens of width 1664."""
        return cls(**changes)

    @classmethod
    def H_14(cls, **changes) -> "CLIPVisionConfig":
        """ViT-H/14: 632,076,800 parameters, 256 tokens of width 1280."""
        return cls(**{**dict(width=1280, depth=32, mlp_width=5120, embed_dim=1024), **changes})

    @classmethod
    def L_14(cls, **changes) -> "CLIPVisionConfig":
        """ViT-L/14: 303,966,208 parameters, 256 tokens of width 1024."""
        return cls(**{**dict(width=1024, depth=24, mlp_width=4096, embed_dim=768), **changes})

    @classmethod
    def B_32(cls, **changes) -> "CLIPVisionConfig":
        """ViT-B/32: 87,849,216 parameters, 49 tokens of width 768."""
        sizes = dict(patch_size=32, width=768, depth=12, heads=12, mlp_width=3072, embed_dim=512)
        return cls(**{**sizes, **changes})


class CLIPVisionOutput(NamedTuple):
    """What the tower makes of pictures, float32."""

    tokens: Float[Array, "b t d"]
    """One a patch, row by row, after the last normalisation: the system's input."""
    pooled: Float[Array, "b e"]
    """CLIP's image embedding, projected, its length as it comes."""


def quick_gelu(x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
    """x * sigmoid(1.702 x) (Hendrycks and Gimpel 2016)."""
    return x * nn.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": gelu_erf, "quick_gelu": quick_gelu}


def _precision(dtype: DTypeLike) -> jax.lax.Precision | None:
    """Of products: GPUs and TPUs would otherwise round float32 factors to TF32 or bfloat16."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def _layer_norm(config: CLIPVisionConfig, name: str | None = None) -> nn.LayerNorm:
    return nn.LayerNorm(config.layer_norm_eps, use_fast_variance=False, dtype=jnp.float32, name=name)


class SelfAttention(nn.Module):
    """Multi-head self-attention over tokens."""

    heads: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        # The three have an axis of their own, so that the last one is split by heads wherever it is split.
        exact = _precision(self.dtype)
        project = nn.DenseGeneral((3, x.shape[-1]), dtype=self.dtype, precision=exact, name="qkv")
        qkv = project(x.astype(self.dtype))
        q, k, v = rearrange(qkv, "b n three (h e) -> three b n h e", h=self.heads)
        out = rearrange(attend_heads(q, k, v, exact), "b n h e -> b n (h e)")
        return nn.Dense(x.shape[-1], dtype=self.dtype, precision=exact, name="proj")(out)


class MLP(nn.Module):
    """Two linear layers around an activation."""

    hidden: int
    activation: str
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        linear = partial(nn.Dense, dtype=self.dtype, precision=_precision(self.dtype))
        h = linear(self.hidden, name="fc1")(x.astype(self.dtype))
        return linear(x.shape[-1], name="fc2")(ACTIVATIONS[self.activation](h))


class Block(nn.Module):
    """Attention and MLP, each on a normalisation and added to its input."""

    config: CLIPVisionConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        cfg, dtype = self.config, jnp.dtype(self.config.dtype)
        x = x + SelfAttention(cfg.heads, dtype, name="attn")(_layer_norm(cfg, "ln_1")(x))
        return x + MLP(cfg.mlp_width, cfg.activation, dtype, name="mlp")(_layer_norm(cfg, "ln_2")(x))


class CLIPVision(nn.Module):
    """The tower. Every parameter of a block has a leading axis over the `depth` blocks.

    >>> config = CLIPVisionConfig(image_size=28, width=8, depth=2, heads=2, mlp_width=20, embed_dim=6)
    >>> model, pixels = CLIPVision(config), jnp.zeros((1, 28, 28, 3))
    >>> params = model.init(jax.random.key(0), pixels)["params"]
    >>> model.apply({"params": params}, pixels).tokens.shape
    (1, 4, 8)
    """

    config: CLIPVisionConfig

    def setup(self):
        cfg, patch = self.config, (self.config.patch_size,) * 2
        init = nn.initializers.normal(cfg.width**-0.5)
        linear = dict(use_bias=False, dtype=jnp.dtype(cfg.dtype), precision=_precision(cfg.dtype))
        self.patch_embed = nn.Conv(cfg.width, patch, patch, "VALID", **linear)
        self.class_embedding = self.param("class_embedding", init, (cfg.width,))
        self.pos_embed = self.param("pos_embed", init, (1 + cfg.tokens, cfg.width))
        self.ln_pre, self.ln_post = _layer_norm(cfg), _layer_norm(cfg)
        # Inside a scan nothing could be merged with what is recomputed, so that need not be prevented.
        self.blocks = (nn.remat(Block, prevent_cse=False) if cfg.remat else Block)(cfg)
        self.projection = nn.Dense(cfg.embed_dim, **linear)

    def hidden(self, pixels: Float[Array, "b h w 3"]) -> Float[Array, "b n d"]:
        """What the last block puts out, before the last normalisation, float32; the class token comes first.

        Tokens made with open_clip before version 2.24 are `hidden(pixels)[:, 1:]`.
        """
        cfg = self.config
        if pixels.shape[1:] != (cfg.image_size, cfg.image_size, 3):
            raise ValueError(
                f"pixels have shape {pixels.shape}; expected [batch, {cfg.image_size}, {cfg.image_size}, 3]"
            )
        patches = rearrange(self.patch_embed(pixels), "b h w d -> b (h w) d").astype(jnp.float32)
        first = jnp.broadcast_to(self.class_embedding, (len(pixels), 1, cfg.width))
        x = self.ln_pre(jnp.concatenate([first, patches], axis=1) + self.pos_embed[None])
        scan = nn.scan(
            lambda block, x, _: (block(x), None),
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            length=cfg.depth,
        )
        return scan(self.blocks, x, None)[0]

    def __call__(self, pixels: Float[Array, "b h w 3"]) -> CLIPVisionOutput:
        """Tokens and embeddings of pictures of `config.image_size`, already normalised as CLIP's were."""
        x = self.ln_post(self.hidden(pixels))
        return CLIPVisionOutput(x[:, 1:], self.projection(x[:, 0]).astype(jnp.float32))


def clip_vision_shapes(config: CLIPVisionConfig) -> PyTree:
    """Shapes and types of the parameters, without computing any."""
    pixels = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, 3), jnp.float32)
    return jax.eval_shape(CLIPVision(config).init, jax.random.key(0), pixels)["params"]
