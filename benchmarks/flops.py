"""Floating-point operations that the mathematics of each model needs, by formula: 2 per multiplication in convolutions
and matrix products, and nothing else. What a compiler counts includes what it computes twice."""

import itertools

from synbrain_jax.models.brain_vae import BrainVAEConfig
from synbrain_jax.models.clip_vision import CLIPVisionConfig
from synbrain_jax.models.semantic_to_neural import TIME_FREQUENCIES, MapperConfig


def brain_vae_flops(cfg: BrainVAEConfig, voxels: int, *, logvar: bool = True) -> tuple[float, float]:
    """Operations of encoding and of decoding one pattern."""

    def conv(positions, width, c_in, c_out):
        return 2.0 * positions * width * c_in * c_out

    def block(positions, c_in, c_out):
        shortcut = conv(positions, 1, c_in, c_out) if c_in != c_out else 0.0
        return conv(positions, 3, c_in, c_out) + conv(positions, 3, c_out, c_out) + shortcut

    def mlp(d_in, d_out):
        widths = (d_in, cfg.projector_width, cfg.projector_width, d_out)
        return sum(conv(cfg.latent_tokens, 1, a, b) for a, b in itertools.pairwise(widths))

    positions, channels = cfg.pool_length, cfg.channels
    encode = conv(voxels, 7, 1, channels)
    for level, mult in enumerate(cfg.channel_mult):
        for _ in range(cfg.num_res_blocks):
            encode += block(positions, channels, cfg.channels * mult)
            channels = cfg.channels * mult
        if level < cfg.num_down_blocks:
            positions //= 2
            encode += conv(positions, 7, channels, channels)
    attention = 4 * conv(positions, 1, channels, channels) + 2 * conv(positions, 1, channels, positions)
    middle = 2 * block(positions, channels, channels) + attention
    encode += middle + conv(positions, 7, channels, cfg.latent_tokens)
    encode += (2 if logvar else 1) * mlp(cfg.positions, cfg.latent_dim)

    decode = mlp(cfg.latent_dim, cfg.positions) + conv(positions, 7, cfg.latent_tokens, channels) + middle
    for level in reversed(range(len(cfg.channel_mult))):
        for _ in range(cfg.num_res_blocks + 1):
            decode += block(positions, channels, cfg.channels * cfg.channel_mult[level])
            channels = cfg.channels * cfg.channel_mult[level]
        if level >= len(cfg.channel_mult) - cfg.num_up_blocks:
            decode += conv(positions, 7, channels, channels)
            positions *= 2
    return encode, decode + conv(voxels, 7, channels, 1)


def mapper_flops(cfg: MapperConfig) -> float:
    """Operations of one mapping. The conditioning counts once a picture although a batch computes it once."""
    t, d = cfg.tokens, cfg.width
    linear = 2.0 * t * d * d
    block = 4 * linear + 4.0 * t * t * d + 2 * cfg.mlp_ratio * linear + 12.0 * d * d
    return cfg.depth * block + linear + 4.0 * d * d + 2.0 * d * (TIME_FREQUENCIES + d)


def clip_flops(cfg: CLIPVisionConfig) -> float:
    """Operations of encoding one picture, of the model's size."""
    t, d = cfg.tokens + 1, cfg.width
    block = 8.0 * t * d * d + 4.0 * t * t * d + 4.0 * t * d * cfg.mlp_width
    return cfg.depth * block + 2.0 * cfg.tokens * 3 * cfg.patch_size**2 * d + 2.0 * d * cfg.embed_dim
