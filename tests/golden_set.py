"""The released system's golden arrays (tests/golden), and its parameter names in terms of ours."""

import json
import re
from pathlib import Path

import numpy as np
from flax.traverse_util import unflatten_dict

from synbrain_jax.models.brain_vae import BrainVAEConfig
from synbrain_jax.models.semantic_to_neural import MapperConfig

GOLDEN = Path(__file__).parent / "golden"
CONFIG = json.loads((GOLDEN / "config.json").read_text())

_RENAMED = [
    (r"^encoder\.down\.(\d+)\.block\.(\d+)", r"encoder.down_\1_block_\2"),
    (r"^encoder\.down\.(\d+)\.downsample\.conv", r"encoder.down_\1_downsample"),
    (r"^decoder\.up\.(\d+)\.block\.(\d+)", r"decoder.up_\1_block_\2"),
    (r"^decoder\.up\.(\d+)\.upsample\.trans_conv", r"decoder.up_\1_upsample"),
    (r"nin_shortcut", "shortcut"),
    (r"^(p\w+_projector\w*)\.[036]\.", lambda m: f"{m[1]}.norm_{int(m[0][-2]) // 3}."),
    (r"^(p\w+_projector\w*)\.[258]\.", lambda m: f"{m[1]}.dense_{int(m[0][-2]) // 3}.linear."),
    (r"^t_embedder\.mlp\.([02])", lambda m: f"time.dense_{int(m[1]) // 2}"),
    (r"^blocks\.(\d+)", r"block_\1"),
    (r"^final_layer\.linear", "final"),
    (r"^final_layer\.adaLN_modulation\.1", "final_modulation.linear"),
    (r"adaLN_modulation\.1", "modulation.linear"),
]


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / name) as file:
        return {key: file[key] for key in file.files}


def our_name(key: str) -> tuple[str, ...]:
    for pattern, replacement in _RENAMED:
        key = re.sub(pattern, replacement, key)
    *path, leaf = key.split(".")
    is_norm = "norm" in path[-1]
    return (*path, {"weight": "scale" if is_norm else "kernel", "bias": "bias"}[leaf])


def our_array(key: str, array: np.ndarray) -> np.ndarray:
    if array.ndim == 3:  # [out, in, width], but [in, out, width] in a transposed convolution
        return array.transpose(2, 0, 1) if "upsample" in key else array.transpose(2, 1, 0)
    return array.T


def to_params(state_dict: dict[str, np.ndarray]) -> dict:
    flat = {our_name(k): our_array(k, v) for k, v in state_dict.items() if k != "pos_embed"}
    return unflatten_dict(flat)


def brain_vae_config(name: str = "brainvae") -> BrainVAEConfig:
    sizes = CONFIG[name]
    net = sizes["ddconfig"]
    return BrainVAEConfig(
        pool_length=net["ada_length"],
        channels=net["ch"],
        channel_mult=tuple(net["ch_mult"]),
        num_res_blocks=net["num_res_blocks"],
        num_down_blocks=net["num_down_blocks"],
        num_up_blocks=net["num_up_blocks"],
        latent_tokens=net["z_channels"],
        latent_dim=sizes["embed_dim"],
        projector_width=sizes["linear_dim"],
    )


def mapper_config(**changes) -> MapperConfig:
    sizes = CONFIG["sit"]
    return MapperConfig(
        tokens=sizes["num_patches"],
        width=sizes["hidden_size"],
        depth=sizes["depth"],
        heads=sizes["num_heads"],
        mlp_ratio=sizes["mlp_ratio"],
        **changes,
    )


def relative_error(actual, expected) -> float:
    """Largest difference over largest expected value, the measure in which the golden tolerances are stated."""
    return float(np.abs(np.asarray(actual, np.float64) - expected).max() / np.abs(expected).max())
