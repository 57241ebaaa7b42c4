"""A set of arrays that the released system produced: tests/golden, or the folder given by `pytest --golden DIR`.

Every comparison with it goes through `Comparisons`, which the table at the end of the test run is made of.
"""

import dataclasses
import functools
import json
import re
from collections import defaultdict
from pathlib import Path

import jax
import numpy as np
import pytest
from jaxtyping import PyTree

from synbrain_jax.models.brain_vae import BrainVAEConfig
from synbrain_jax.models.semantic_to_neural import MapperConfig

# As users compile: conftest.py turns optimisation off to save time, which costs digits too.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 3})

OWN = Path(__file__).parent / "golden"
folder = OWN  # conftest.py replaces it before any test module is imported


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(folder / name) as file:
        return {key: file[key] for key in file.files}


def load_json(name: str) -> dict:
    return json.loads((folder / name).read_text())


def brain_vae_config(name: str = "brainvae", **changes) -> BrainVAEConfig:
    sizes = load_json("config.json")[name]
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
        **changes,
    )


def mapper_config(**changes) -> MapperConfig:
    sizes = load_json("config.json")["sit"]
    return MapperConfig(
        tokens=sizes["num_patches"],
        width=sizes["hidden_size"],
        depth=sizes["depth"],
        heads=sizes["num_heads"],
        mlp_ratio=sizes["mlp_ratio"],
        **changes,
    )


def zero_gradients(gradient_set: str) -> set[str]:
    """BrainVAE's parameters whose exact gradient is zero: a constant added before a softmax over keys, or before a
    normalisation over positions, changes nothing. In float32 it is noise, which AdamW turns into full steps."""
    noise = load_json("noise_brainvae.json")[gradient_set]
    return {key for key, seen in noise.items() if seen["max_abs"] < 1e-9}


def relative_error(actual, expected) -> float:
    """Largest difference over largest expected value, the measure in which the golden tolerances are stated."""
    return float(np.abs(np.asarray(actual, np.float64) - expected).max() / np.abs(expected).max())


def on_device(params: PyTree) -> PyTree:
    return jax.tree.map(jax.numpy.asarray, params)


@dataclasses.dataclass(frozen=True)
class Comparisons:
    """Compares arrays with stored ones and notes, for the table, how much of its tolerance each has used."""

    item: pytest.Item

    def __call__(self, file: str, name: str, actual, expected, tolerance: float = 0.0, *, atol: float = 0.0) -> None:
        """Asserts max |actual - expected| <= tolerance * max |expected| + atol; NaNs must be in the same places."""
        actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
        assert actual.shape == expected.shape, f"{file} {name}: shape {actual.shape}, expected {expected.shape}"
        np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected), err_msg=f"{file} {name}: NaN")
        there = ~np.isnan(expected)
        error = np.abs(actual - expected)[there].max(initial=0.0)
        limit = tolerance * np.abs(expected)[there].max(initial=0.0) + atol
        used = error / limit if limit else np.inf if error else 0.0
        self.item.user_properties.append(("golden", (file, name, float(used))))
        assert error <= limit, f"{file} {name}: error {error:.3g}, allowed {limit:.3g}"


# What the tests start from, by file: all other arrays are there to be compared.
GIVEN = {
    "brainvae_forward.npz": r"x|clip|decode_z|eps",
    "brainvae_forward_short.npz": r"x|clip|grad_l2_keys",
    "brainvae_train.npz": r"x|clip",
    "ckpt_sit/expected.npz": r"x|steps|next_(images|fmri)",
    "ckpt_vae/expected.npz": r"x|z|target_length|epoch|next_(x|clip)",
    "clip_hf_tiny_gelu/expected.npz": r"pixel_values",
    "clip_hf_tiny_quick_gelu/expected.npz": r"pixel_values",
    "clip_open_clip_tiny.npz": r"(w|cfg)/.*|cfg|mlp_ratio|image|src_image",
    "eps_sensitive.npz": r"small_[xz]|\w+_small_x",
    "kornia_resize.npz": r".*/(x_u8|base25_u8|crop_rc)",
    "metrics.npz": r"voxel_(recon|fmri)|twoway_(gt|pd)|retrieval_(image|brain|np_seed)|sim_[ZB]|recon\d_(x|recon)"
    r"|image_.*_u8",
    "ops.npz": r".*/(x|cotangent|weight|bias|preds|targs|t)",
    "sit_forward.npz": r"x|t_vec|loss_(images|fmri)",
    "sit_params.npz": r"(?!pos_embed).*",
    "sit_train.npz": r"images|fmri",
}


def to_compare(file: str) -> set[str]:
    """The arrays of a file that the tests should reproduce."""
    with np.load(folder / file) as arrays:
        return {name for name in arrays.files if not re.fullmatch(GIVEN.get(file, ""), name)}


def format_table(comparisons: list[tuple[str, str, float]]) -> list[str]:
    """One line per file: how many of its arrays were compared, and the one that came closest to its tolerance."""
    by_file = defaultdict(dict)
    for file, name, used in comparisons:
        by_file[file][name] = max(used, by_file[file].get(name, 0.0))
    rows = [("file", "arrays compared", "worst error / tolerance", "at")]
    for file, used in sorted(by_file.items()):
        wanted = to_compare(file)
        worst = max(used, key=used.get)
        rows.append((file, f"{len(wanted & used.keys())} of {len(wanted)}", f"{used[worst]:.3f}", worst))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
