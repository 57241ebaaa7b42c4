"""BrainVAE: a continuous distribution over the fMRI patterns of one brain.

SynBrain (arXiv 2508.10298), section 3.2; structure and numerical details follow the authors' public release
(MichaelMaiii/SynBrain). The voxels are treated as a one-dimensional signal: pooled to a fixed length, encoded by a
convolutional network with one attention layer, and projected to a latent with the shape of the picture's CLIP tokens.
The decoder mirrors it and ends at whatever number of voxels is asked for; no parameter depends on it.

Differences from the release: channels-last arrays; compute type, rematerialisation and chunked attention are options.
The numbers are the same. Derivatives are reverse-mode only (`jax.grad`, not `jax.jvp`).

Shape letters: b batch, v voxels, t latent tokens, d latent width, l positions, c channels.
"""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from synbrain_jax.errors import InputError
from synbrain_jax.models.layers import (
    AttentionBlock,
    Conv,
    GroupNorm,
    NormMLP,
    ResBlock,
    adaptive_max_pool,
    linear_resize,
)


@dataclasses.dataclass(frozen=True)
class BrainVAEConfig:
    """Architecture of BrainVAE. `channel_mult` has one entry per resolution level; the first `num_down_blocks`
    levels of the encoder halve the positions, and the deepest `num_up_blocks` levels of the decoder double them."""

    pool_length: int = 8192
    channels: int = 128
    channel_mult: tuple[int, ...] = (2, 4, 4)
    num_res_blocks: int = 2
    num_down_blocks: int = 1
    num_up_blocks: int = 1
    latent_tokens: int = 256
    latent_dim: int = 1664
    projector_width: int = 2048
    dtype: str = "float32"
    """Compute type, "float32" or "bfloat16"; parameters, normalisation and softmax stay float32."""
    remat: bool = False
    """Recompute each block in the backward pass: about a third of the memory for a third more time."""
    attention_chunk: int | None = None
    """Queries attended at once; None: all. Must divide pool_length / 2**num_down_blocks."""

    def __post_init__(self):
        levels = len(self.channel_mult)
        for width in (self.channels, *(self.channels * mult for mult in self.channel_mult)):
            if width < 1 or (width > 32 and width % 32):
                raise InputError(
                    f"brain_vae.channels is {self.channels} and channel_mult {self.channel_mult}: a layer gets {width} "
                    "channels; expected 1 to 32 or a multiple of 32, for the group normalisation"
                )
        for name, count in (("num_down_blocks", self.num_down_blocks), ("num_up_blocks", self.num_up_blocks)):
            if not 0 <= count <= levels:
                raise InputError(f"brain_vae.{name} is {count}; expected 0 to {levels}, the number of channel_mult")
        if self.pool_length % 2**self.num_down_blocks or self.pool_length < 1:
            raise InputError(
                f"brain_vae.pool_length is {self.pool_length}; expected a multiple of {2**self.num_down_blocks}, to be "
                f"halved num_down_blocks = {self.num_down_blocks} times"
            )
        if self.attention_chunk is not None and (self.attention_chunk < 1 or self.positions % self.attention_chunk):
            raise InputError(
                f"brain_vae.attention_chunk is {self.attention_chunk}; it must divide the {self.positions} positions"
            )
        if self.dtype not in ("float32", "bfloat16"):
            raise InputError(f"brain_vae.dtype is {self.dtype!r}; expected 'float32' or 'bfloat16'")

    @property
    def positions(self) -> int:
        """Positions at the bottleneck, the axis that the projectors act on."""
        return self.pool_length // 2**self.num_down_blocks

    @classmethod
    def paper(cls, **changes) -> "BrainVAEConfig":
        """The released model: 78,311,937 parameters."""
        return cls(**changes)

    @classmethod
    def small(cls, **changes) -> "BrainVAEConfig":
        """180,349 parameters, for a few hundred voxels: trains on a laptop's CPU in a minute or two."""
        settings = dict(
            pool_length=128,
            channels=8,
            num_res_blocks=1,
            latent_tokens=12,
            latent_dim=32,
            projector_width=128,
        )
        return cls(**{**settings, **changes})


class Posterior(NamedTuple):
    """Diagonal Gaussian over latents."""

    mean: Float[Array, "b t d"]
    logvar: Float[Array, "b t d"]

    def sample(self, key: PRNGKeyArray) -> Float[Array, "b t d"]:
        """One draw per batch element, differentiable in mean and logvar (Kingma and Welling 2014)."""
        noise = jax.random.normal(key, self.mean.shape, self.mean.dtype)
        return self.mean + jnp.exp(0.5 * self.logvar) * noise


class BrainVAEOutput(NamedTuple):
    """What one pass through the autoencoder gives."""

    reconstruction: Float[Array, "b v"]
    posterior: Posterior
    latent: Float[Array, "b t d"]


def _block(kind, config, *args, **kwargs):
    return (nn.remat(kind) if config.remat else kind)(*args, dtype=jnp.dtype(config.dtype), **kwargs)


class Encoder(nn.Module):
    """Voxels to bottleneck features."""

    config: BrainVAEConfig

    @nn.compact
    def __call__(self, fmri: Float[Array, "b v"]) -> Float[Array, "b l c"]:
        cfg, dtype = self.config, jnp.dtype(self.config.dtype)
        x = Conv(cfg.channels, 7, dtype=dtype, name="conv_in")(fmri[..., None])
        x = adaptive_max_pool(x, cfg.pool_length)
        for level, mult in enumerate(cfg.channel_mult):
            for i in range(cfg.num_res_blocks):
                x = _block(ResBlock, cfg, cfg.channels * mult, name=f"down_{level}_block_{i}")(x)
            if level < cfg.num_down_blocks:
                x = Conv(x.shape[-1], 7, kind="strided", dtype=dtype, name=f"down_{level}_downsample")(x)
        x = _Middle(cfg, name="mid")(x)
        return Conv(cfg.latent_tokens, 7, dtype=dtype, name="conv_out")(GroupNorm(name="norm_out")(x))


class Decoder(nn.Module):
    """Bottleneck features to voxels."""

    config: BrainVAEConfig

    @nn.compact
    def __call__(self, h: Float[Array, "b l c"], num_voxels: int) -> Float[Array, "b {num_voxels}"]:
        cfg, dtype = self.config, jnp.dtype(self.config.dtype)
        levels = len(cfg.channel_mult)
        x = Conv(cfg.channels * cfg.channel_mult[-1], 7, dtype=dtype, name="conv_in")(h)
        x = _Middle(cfg, name="mid")(x)
        for level in reversed(range(levels)):
            for i in range(cfg.num_res_blocks + 1):
                features = cfg.channels * cfg.channel_mult[level]
                x = _block(ResBlock, cfg, features, name=f"up_{level}_block_{i}")(x)
            if level >= levels - cfg.num_up_blocks:
                x = Conv(x.shape[-1], 7, kind="transposed", dtype=dtype, name=f"up_{level}_upsample")(x)
        x = GroupNorm(name="norm_out")(linear_resize(x, num_voxels))
        return Conv(1, 7, dtype=dtype, name="conv_out")(x)[..., 0]


class _Middle(nn.Module):
    """Residual block, attention, residual block."""

    config: BrainVAEConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b l c"]) -> Float[Array, "b l c"]:
        cfg, features = self.config, x.shape[-1]
        x = _block(ResBlock, cfg, features, name="block_1")(x)
        x = _block(AttentionBlock, cfg, cfg.attention_chunk, name="attn_1")(x)
        return _block(ResBlock, cfg, features, name="block_2")(x)


class BrainVAE(nn.Module):
    """Variational autoencoder of fMRI patterns whose latent has the shape of the picture's CLIP tokens.

    >>> model = BrainVAE(BrainVAEConfig.small())
    >>> params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 530)))["params"]
    >>> model.apply({"params": params}, jnp.zeros((2, 12, 32)), 530, method="decode").shape
    (2, 530)
    """

    config: BrainVAEConfig

    def setup(self):
        cfg, dtype = self.config, jnp.dtype(self.config.dtype)
        to_latent = (cfg.projector_width, cfg.projector_width, cfg.latent_dim)
        self.encoder, self.decoder = Encoder(cfg), Decoder(cfg)
        self.pre_projector_mean = NormMLP(to_latent, dtype)
        self.pre_projector_logvar = NormMLP(to_latent, dtype)
        self.post_projector = NormMLP((cfg.projector_width, cfg.projector_width, cfg.positions), dtype)

    def encode(self, fmri: Float[Array, "b v"]) -> Posterior:
        """Posterior over the latents of measured patterns, float32, for any number of voxels."""
        h = self.encoder(fmri).swapaxes(1, 2)  # the projectors act on positions
        mean, logvar = self.pre_projector_mean(h), self.pre_projector_logvar(h)
        return Posterior(mean.astype(jnp.float32), logvar.astype(jnp.float32))

    def decode(self, latent: Float[Array, "b t d"], num_voxels: int) -> Float[Array, "b {num_voxels}"]:
        """Pattern of `num_voxels` voxels, float32, in the units of the training data."""
        h = self.post_projector(latent).swapaxes(1, 2)
        return self.decoder(h, num_voxels).astype(jnp.float32)

    def __call__(self, fmri: Float[Array, "b v"], key: PRNGKeyArray | None = None) -> BrainVAEOutput:
        """Encode and decode: through a posterior sample if a key is given, through its mean otherwise."""
        posterior = self.encode(fmri)
        latent = posterior.mean if key is None else posterior.sample(key)
        return BrainVAEOutput(self.decode(latent, fmri.shape[-1]), posterior, latent)


def brain_vae_shapes(config: BrainVAEConfig) -> PyTree:
    """Shapes and types of the parameters, without computing any; none depends on the number of voxels."""
    return jax.eval_shape(BrainVAE(config).init, jax.random.key(0), jnp.zeros((1, 8)))["params"]
