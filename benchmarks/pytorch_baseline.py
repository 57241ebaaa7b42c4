"""BrainVAE, the SiT mapper and CLIP's image tower in PyTorch, released sizes by default, released parameter names.

Written from a description of the released system, not from its source: the alternative that this package is timed
against (`benchmarks/pytorch_cases.py`), and a second opinion on what it computes. Needs torch; the package never does.

Letters: B batch, L voxels, P latent tokens (= z_channels), W positions inside the VAE, E latent width.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels), channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """Two pre-normalised convolutions and a shortcut, [B, in, W] -> [B, out, W]."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.norm1, self.conv1 = group_norm(n_in), nn.Conv1d(n_in, n_out, 3, padding=1)
        self.norm2, self.conv2 = group_norm(n_out), nn.Conv1d(n_out, n_out, 3, padding=1)
        self.nin_shortcut = nn.Conv1d(n_in, n_out, 1) if n_in != n_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class AttnBlock(nn.Module):
    """Single-head self-attention over positions with a residual, [B, C, W] -> [B, C, W]."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv1d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = self.q(h), self.k(h), self.v(h)
        weights = torch.softmax(q.transpose(1, 2) @ k * q.shape[1] ** -0.5, dim=-1)
        return x + self.proj_out(v @ weights.transpose(1, 2))


class Mid(nn.Sequential):
    def __init__(self, channels: int):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)


class Level(nn.Module):
    """The residual blocks of one resolution; `resample`, if any, is a (name, module) that follows them."""

    def __init__(self, n_in: int, n_out: int, blocks: int, resample: tuple[str, nn.Module] | None):
        super().__init__()
        self.block = nn.Sequential(*(ResnetBlock(n_out if i else n_in, n_out) for i in range(blocks)))
        self.resample = resample and resample[0]
        if resample:
            self.add_module(*resample)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        return getattr(self, self.resample)(x) if self.resample else x


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, 7, stride=2, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.trans_conv = nn.ConvTranspose1d(channels, channels, 7, stride=2, padding=3, output_padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.trans_conv(x)


class Encoder(nn.Module):
    """[B, 1, L] -> [B, P, ada_length / 2**num_down_blocks]."""

    def __init__(self, ch, ch_mult, z_channels, ada_length, num_res_blocks, num_down_blocks):
        super().__init__()
        widths = [ch, *(ch * m for m in ch_mult)]
        self.conv_in = nn.Conv1d(1, ch, 7, padding=3)
        self.pool = nn.AdaptiveMaxPool1d(ada_length)
        self.down = nn.Sequential(
            *(
                Level(a, b, num_res_blocks, ("downsample", Downsample(b)) if i < num_down_blocks else None)
                for i, (a, b) in enumerate(pairwise(widths))
            )
        )
        self.mid = Mid(widths[-1])
        self.norm_out, self.conv_out = group_norm(widths[-1]), nn.Conv1d(widths[-1], z_channels, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.mid(self.down(self.pool(self.conv_in(x))))
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """[B, P, W] -> [B, 1, length]; the levels run from the last to the first, upsampling after the first of them."""

    def __init__(self, ch, ch_mult, z_channels, num_res_blocks, num_up_blocks):
        super().__init__()
        widths, levels = [ch * m for m in ch_mult], len(ch_mult)
        self.conv_in = nn.Conv1d(z_channels, widths[-1], 7, padding=3)
        self.mid = Mid(widths[-1])
        self.up = nn.ModuleList(
            Level(
                widths[min(i + 1, levels - 1)],
                widths[i],
                num_res_blocks + 1,
                ("upsample", Upsample(widths[i])) if i >= levels - num_up_blocks else None,
            )
            for i in range(levels)
        )
        self.norm_out, self.conv_out = group_norm(widths[0]), nn.Conv1d(widths[0], 1, 7, padding=3)

    def forward(self, z: Tensor, length: int) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        h = F.interpolate(h, size=length, mode="linear", align_corners=True)
        return self.conv_out(F.silu(self.norm_out(h)))


def projector(n_in: int, hidden: int, n_out: int) -> nn.Sequential:
    """LayerNorm, GELU (erf), Linear, three times, over the last axis."""
    widths = [n_in, hidden, hidden, n_out]
    return nn.Sequential(*(m for a, b in pairwise(widths) for m in (nn.LayerNorm(a), nn.GELU(), nn.Linear(a, b))))


class Posterior(NamedTuple):
    """A diagonal Gaussian over the latent, mean and log-variance each [B, P, E]."""

    mean: Tensor
    logvar: Tensor

    @property
    def std(self) -> Tensor:
        return torch.exp(0.5 * self.logvar)

    def sample(self, noise: Tensor) -> Tensor:
        return self.mean + self.std * noise

    def kl(self) -> Tensor:
        """KL divergence from the standard normal, [B], in nats."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1 - self.logvar).sum((1, 2))


class BrainVAE(nn.Module):
    """Any number of voxels in, a latent [B, z_channels, embed_dim], any number of voxels out."""

    def __init__(
        self,
        ch: int = 128,
        ch_mult: tuple[int, ...] = (2, 4, 4),
        z_channels: int = 256,
        ada_length: int = 8192,
        num_res_blocks: int = 2,
        num_down_blocks: int = 1,
        num_up_blocks: int = 1,
        hidden_dim: int = 4096,
        linear_dim: int = 2048,
        embed_dim: int = 1664,
    ):
        super().__init__()
        self.encoder = Encoder(ch, ch_mult, z_channels, ada_length, num_res_blocks, num_down_blocks)
        self.decoder = Decoder(ch, ch_mult, z_channels, num_res_blocks, num_up_blocks)
        self.pre_projector_mean = projector(hidden_dim, linear_dim, embed_dim)
        self.pre_projector_logvar = projector(hidden_dim, linear_dim, embed_dim)
        self.post_projector = projector(embed_dim, linear_dim, hidden_dim)

    def encode(self, x: Tensor) -> Posterior:
        h = self.encoder(x)
        return Posterior(self.pre_projector_mean(h), self.pre_projector_logvar(h))

    def decode(self, z: Tensor, length: int) -> Tensor:
        return self.decoder(self.post_projector(z), length)

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction through the posterior's mean."""
        return self.decode(self.pre_projector_mean(self.encoder(x)), x.shape[-1])


def soft_clip_loss(preds: Tensor, targs: Tensor, temperature: float = 0.125) -> Tensor:
    """Contrastive loss whose targets are the softmax of the similarities among the targets; both [B, P, E]."""
    preds, targs = (F.normalize(a.flatten(1), dim=-1) for a in (preds, targs))
    target = (targs @ targs.T / temperature).softmax(-1)
    logits = preds @ targs.T / temperature
    return sum(-(target * s.log_softmax(-1)).sum(-1).mean() for s in (logits, logits.T)) / 2


class VAELosses(NamedTuple):
    recon: Tensor
    kl: Tensor
    clip: Tensor
    total: Tensor


def vae_losses(
    model: BrainVAE, x: Tensor, clip: Tensor, noise: Tensor | None = None, kl_weight=0.001, clip_weight=1000
) -> tuple[VAELosses, Tensor, Tensor, Posterior]:
    """Stage-1 losses with the latent, the reconstruction and the posterior; without noise the latent is the mean."""
    posterior = model.encode(x)
    z = posterior.mean if noise is None else posterior.sample(noise)
    recon = model.decode(z, x.shape[-1])
    recon_loss, kl = ((recon - x) ** 2).sum() / len(x), posterior.kl().sum() / len(x)
    clip_loss = soft_clip_loss(z, clip)
    return (
        VAELosses(recon_loss, kl, clip_loss, recon_loss + kl_weight * kl + clip_weight * clip_loss),
        z,
        recon,
        posterior,
    )


def timestep_embedding(t: Tensor, dim: int = 256) -> Tensor:
    """Cosines, then sines, of t at dim // 2 geometric frequencies, [B] -> [B, dim]; an odd dim ends in a zero."""
    half = dim // 2
    angles = t[:, None].float() * torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / half)
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, dim % 2))


def position_embedding(tokens: int, dim: int) -> Tensor:
    """Sines, then cosines, of the position at dim / 2 geometric frequencies, [tokens, dim], made in float64."""
    angles = torch.arange(tokens).double()[:, None] * 10000.0 ** (-torch.arange(dim // 2).double() / (dim / 2))
    return torch.cat([angles.sin(), angles.cos()], dim=-1).float()


class TimestepEmbedder(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(timestep_embedding(t).to(self.mlp[0].weight.dtype))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def modulation(width: int, vectors: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(width, vectors * width))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class SiTBlock(nn.Module):
    def __init__(self, width: int, heads: int, mlp_ratio: float):
        super().__init__()
        self.attn = Attention(width, heads)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.adaLN_modulation = modulation(width, 6)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        x = x + gate_a * self.attn(modulate(x, shift_a, scale_a))
        return x + gate_m * self.mlp(modulate(x, shift_m, scale_m))


class FinalLayer(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.adaLN_modulation = modulation(width, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.linear(modulate(x, *self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)))


class SiT(nn.Module):
    """Image tokens [B, P, E] and times [B] to brain latents [B, P, E]; the released system always uses t = 0."""

    def __init__(self, num_patches=256, hidden_size=1664, depth=8, num_heads=13, mlp_ratio=4.0):
        super().__init__()
        self.pos_embed = nn.Parameter(position_embedding(num_patches, hidden_size)[None], requires_grad=False)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.blocks = nn.ModuleList(SiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier for linear layers, small time embedding, zero modulation and output: a fresh model outputs 0."""
        for name, p in self.named_parameters():
            if name == "pos_embed":
                continue
            if p.ndim == 1 or "adaLN_modulation" in name or name.startswith("final_layer.linear"):
                nn.init.zeros_(p)
            elif name.startswith("t_embedder"):
                nn.init.normal_(p, std=0.02)
            else:
                nn.init.xavier_uniform_(p)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, c = x + self.pos_embed, self.t_embedder(t)
        for block in self.blocks:
            x = block(x, c)
        return self.final_layer(x, c)


def sample_one_step(model: SiT, images: Tensor, prediction: str = "x") -> Tensor:
    """Brain latents of image tokens in one step at t = 0; prediction is 'x' (the latent) or 'v' (the difference)."""
    y = model(images, images.new_zeros(len(images)))
    return y if prediction == "x" else images + y


def sit_loss(model: SiT, images: Tensor, latents: Tensor, prediction: str = "x") -> Tensor:
    """Stage-2 loss: mean squared error of the one-step prediction."""
    return ((sample_one_step(model, images, prediction) - latents) ** 2).mean((1, 2)).mean()


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    for e, p in zip(ema.parameters(), model.parameters(), strict=True):
        e.mul_(decay).add_(p, alpha=1 - decay)


class VisionBlock(nn.Module):
    """Pre-normalised attention and MLP over tokens [B, N, E], with open_clip's names."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, hidden))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class VisionTower(nn.Module):
    """Normalised pictures [B, 3, S, S] to the patches' tokens after the last normalisation; ViT-bigG/14 by default."""

    def __init__(self, image_size=224, patch=14, width=1664, depth=48, heads=16, hidden=8192):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.positional_embedding = nn.Parameter(torch.randn(1 + (image_size // patch) ** 2, width) * width**-0.5)
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.Sequential(*(VisionBlock(width, heads, hidden) for _ in range(depth)))

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.conv1(pixels).flatten(2).mT
        first = self.class_embedding.to(patches.dtype).expand(len(pixels), 1, -1)
        x = self.ln_pre(torch.cat([first, patches], dim=1) + self.positional_embedding)
        return self.ln_post(self.transformer.resblocks(x))[:, 1:]
