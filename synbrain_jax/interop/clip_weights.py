"""CLIP's vision weights, as open_clip and Hugging Face publish them, in terms of our parameters.

Only the tensors of the image tower are read, one at a time and straight to their places in our stacked arrays, so that
memory holds the tower and one tensor, whatever else the file has. Every tensor of the tower is accounted for: one that
is missing, left over, or of another shape is an error.

An open_clip checkpoint tells its sizes by its shapes, each read off several tensors, so that a single wrong one is
found and does not decide. A Hugging Face folder has them in `config.json`. Layouts: a linear weight [out, in] becomes
[in, out], a convolution's [out, in, height, width] becomes [height, width, in, out].
"""

import dataclasses
import functools
import itertools
import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike
from jaxtyping import PyTree
from safetensors import SafetensorError, safe_open

from synbrain_jax.errors import InputError
from synbrain_jax.files import read_text
from synbrain_jax.interop.state_dicts import agreed_size, check_tensors, listed
from synbrain_jax.interop.torch_file import StoredTensor, TorchFile
from synbrain_jax.models.clip_vision import CLIPVisionConfig, clip_vision_shapes

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PROCESSOR = "preprocessor_config.json"
_IGNORED = ".position_ids"  # a buffer in older files: 0, 1, 2, ...

# Ours, open_clip's, Hugging Face's. `kind` is weight or bias; `part` q, k, v, which we have in one.
_NAMES = [
    ("class_embedding", "visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("pos_embed", "visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("patch_embed", "visual.conv1.{kind}", "vision_model.embeddings.patch_embedding.{kind}"),
    ("ln_pre", "visual.ln_pre.{kind}", "vision_model.pre_layrnorm.{kind}"),
    ("ln_post", "visual.ln_post.{kind}", "vision_model.post_layernorm.{kind}"),
    ("projection", "visual.proj", "visual_projection.{kind}"),
]
_BLOCK = ("blocks/", "visual.transformer.resblocks.{block}.", "vision_model.encoder.layers.{block}.")
_NAMES_IN_BLOCK = [
    ("ln_1", "ln_1.{kind}", "layer_norm1.{kind}"),
    ("attn/qkv", "attn.in_proj_{kind}", "self_attn.{part}_proj.{kind}"),
    ("attn/proj", "attn.out_proj.{kind}", "self_attn.out_proj.{kind}"),
    ("ln_2", "ln_2.{kind}", "layer_norm2.{kind}"),
    ("mlp/fc1", "mlp.c_fc.{kind}", "mlp.fc1.{kind}"),
    ("mlp/fc2", "mlp.c_proj.{kind}", "mlp.fc2.{kind}"),
]
LAYOUTS = ("open_clip", "hf")
_PRESETS = (CLIPVisionConfig.bigG_14(), CLIPVisionConfig.H_14(), CLIPVisionConfig.L_14(), CLIPVisionConfig.B_32())
_HEADS = {preset.width: preset.heads for preset in _PRESETS}


@dataclasses.dataclass(frozen=True)
class _SafeTensor:
    """A tensor that is still in its safetensors file, with what is used of StoredTensor."""

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: str

    def read(self) -> np.ndarray:
        # Opened anew each time: a file that stays mapped keeps every page that was read.
        with _opened(self.path) as file:
            return file.get_tensor(self.key)


StateDict = Mapping[str, StoredTensor | _SafeTensor]


def load_clip_vision(
    source: str | os.PathLike,
    *,
    heads: int | None = None,
    activation: str | None = None,
    dtype: DTypeLike | None = None,
) -> tuple[CLIPVisionConfig, PyTree]:
    """Architecture and parameters (NumPy) of a CLIP image tower.

    Args:
        source: an open_clip checkpoint (.safetensors, or .bin and .pt by torch.save), a Hugging Face folder of a
            CLIPModel or CLIPVisionModelWithProjection, or the name `org/name` of such a folder in Hugging Face's hub.
        heads: attention heads, for an open_clip checkpoint whose width is not that of a preset.
        activation: "gelu" or "quick_gelu", for an open_clip checkpoint; None: "gelu". OpenAI's weights need
            "quick_gelu".
        dtype: of the parameters; None: as they are in the file.

    Raises:
        InputError: there is nothing at `source`, it is not such a checkpoint, or a tensor is missing, left over, of
            another shape, or does not hold floating-point numbers.
    """
    path = local_clip(source)
    if path.is_dir():
        if heads is not None or activation is not None:
            raise InputError(f"{path}: heads and activation are in its {CONFIG}; give them for open_clip files only")
        return _read(_hf_config(path / CONFIG), _hf_tensors(path), "hf", os.fspath(path), dtype)
    where = os.fspath(path)
    if path.suffix == ".safetensors":
        return _read_open_clip(_safetensors(path), where, heads, activation, dtype)
    with TorchFile(path) as file:
        return _read_open_clip(_state_dict(file.content), where, heads, activation, dtype)


def vision_keys(config: CLIPVisionConfig, layout: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a tower's tensors in a file.

    Args:
        config: the tower.
        layout: "open_clip" or "hf", Hugging Face's.
    """
    return {place.key: place.shape for place in _places(clip_vision_shapes(config), layout)}


# ---- names and places --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Place:
    """A file's tensor: with its axes in the order `axes`, [index] of a parameter whose q, k, v are side by side."""

    key: str
    shape: tuple[int, ...]
    path: tuple[str, ...]
    index: tuple
    axes: tuple[int, ...]


def _places(shapes: PyTree, layout: str) -> Iterator[_Place]:
    """The place of every tensor of the tower whose parameters have these shapes."""
    column = 1 + LAYOUTS.index(layout)
    names = {row[0]: row[column] for row in _NAMES}
    names |= {_BLOCK[0] + row[0]: _BLOCK[column] + row[column] for row in _NAMES_IN_BLOCK}
    for path, leaf in flatten_dict(shapes).items():
        name = names.get("/".join(path)) or names["/".join(path[:-1])]
        stacked = path[0] == "blocks"
        parts = "qkv" if "{part}" in name else " "
        *rows, columns = _side_by_side(path, leaf.shape)[stacked:]
        size = columns // len(parts)
        shape = (*rows, size)
        axes = tuple(range(len(shape)))
        if path[-1] == "kernel" and name != "visual.proj":
            axes = (*axes[2:], 1, 0)
        for block, (i, part) in itertools.product(range(leaf.shape[0]) if stacked else [None], enumerate(parts)):
            index = (..., slice(i * size, (i + 1) * size))
            yield _Place(
                key=name.format(block=block, part=part, kind="bias" if path[-1] == "bias" else "weight"),
                shape=tuple(shape[axes.index(axis)] for axis in range(len(axes))),
                path=path,
                index=(block, *index) if stacked else index,
                axes=axes,
            )


def _read(
    config: CLIPVisionConfig, tensors: StateDict, layout: str, where: str, dtype: DTypeLike | None
) -> tuple[CLIPVisionConfig, PyTree]:
    shapes = clip_vision_shapes(config)
    places = list(_places(shapes, layout))
    known = {key: tensor for key, tensor in tensors.items() if not key.endswith(_IGNORED)}
    check_tensors(known, {place.key: place.shape for place in places}, where, "a CLIP image tower")
    dtypes = defaultdict(set)
    for place in places:
        dtypes[place.path].add(str(tensors[place.key].dtype))
    parameters = {}
    for path, leaf in flatten_dict(shapes).items():
        kept = functools.reduce(jnp.promote_types, dtypes[path]) if dtype is None else dtype
        parameters[path] = np.empty(_side_by_side(path, leaf.shape), kept)
    for place in places:
        parameters[place.path][place.index] = tensors[place.key].read().transpose(place.axes)
    return config, jax.tree.map(lambda array, like: array.reshape(like.shape), unflatten_dict(parameters), shapes)


def _side_by_side(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape with q, k and v, [..., 3, d], as one axis, [..., 3 d], as open_clip has them."""
    return (*shape[:-2], shape[-2] * shape[-1]) if "qkv" in path else shape


# ---- open_clip's checkpoints -------------------------------------------------------------------------------


def _read_open_clip(
    tensors: StateDict, where: str, heads: int | None, activation: str | None, dtype: DTypeLike | None
) -> tuple[CLIPVisionConfig, PyTree]:
    vision = {key: tensor for key, tensor in tensors.items() if key.startswith("visual.")}
    if not vision:
        hint = " Give the folder that it is in." if any(key.startswith("vision_model.") for key in tensors) else ""
        raise InputError(
            f"{where}: has no tensor visual.*, but {listed(tensors) or 'none'}; expected open_clip's names.{hint}"
        )
    config = _open_clip_config(vision, where, heads, activation or "gelu")
    return _read(config, vision, "open_clip", where, dtype)


def _open_clip_config(tensors: StateDict, where: str, heads: int | None, activation: str) -> CLIPVisionConfig:
    size = functools.partial(agreed_size, tensors, where)
    block = "visual.transformer.resblocks."
    numbers = {found[1] for key in tensors if (found := re.match(rf"{re.escape(block)}(\d+)\.", key))}
    width = size(("visual.class_embedding", 0), ("visual.ln_pre.bias", 0), ("visual.ln_post.bias", 0))
    patch = size(("visual.conv1.weight", 2), ("visual.conv1.weight", 3))
    positions = size(("visual.positional_embedding", 0))
    grid = math.isqrt(max(positions - 1, 0))
    if grid**2 != positions - 1:
        raise InputError(
            f"{where}: visual.positional_embedding has {positions} rows; expected one for the class token and those of "
            "a square grid of patches"
        )
    heads = _HEADS.get(width) if heads is None else heads
    if heads is None:
        raise InputError(
            f"{where}: does not say how many attention heads its {width} channels are for; give heads (known widths: "
            f"{', '.join(map(str, _HEADS))})"
        )
    mlp_width = size(*((f"{block}{number}.mlp.c_fc.bias", 0) for number in sorted(numbers) or "0"))
    embed_dim = size(("visual.proj", 1))
    try:
        return CLIPVisionConfig(
            image_size=grid * patch,
            patch_size=patch,
            width=width,
            depth=len(numbers),
            heads=heads,
            mlp_width=mlp_width,
            embed_dim=embed_dim,
            activation=activation,
        )
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _state_dict(content) -> dict[str, StoredTensor]:
    """The tensors of what torch.save wrote: weights alone, or open_clip's training checkpoint with them."""
    content = content if isinstance(content, dict) else {}
    weights = content.get("state_dict", content)
    named = weights.items() if isinstance(weights, dict) else []
    return {str(key).removeprefix("module."): value for key, value in named if isinstance(value, StoredTensor)}


# ---- Hugging Face's folders --------------------------------------------------------------------------------


def _hf_config(path: Path) -> CLIPVisionConfig:
    """The architecture in a config.json of a CLIPModel, or of its vision model alone."""
    from transformers import CLIPVisionConfig as HFConfig

    content = _json(path)
    if content.get("model_type") not in ("clip", "clip_vision_model"):
        raise InputError(f"{path}: model_type is {content.get('model_type')!r}; expected 'clip' or 'clip_vision_model'")
    vision = content.get("vision_config", content)
    if not isinstance(vision, dict):
        raise InputError(f"{path}: vision_config is {vision!r}; expected a JSON object")
    try:
        hf = HFConfig.from_dict(vision)
        if hf.num_channels != 3 or not isinstance(hf.image_size, int):
            raise InputError(
                f"num_channels is {hf.num_channels} and image_size {hf.image_size}; expected 3, and one number"
            )
        return CLIPVisionConfig(
            image_size=hf.image_size,
            patch_size=hf.patch_size,
            width=hf.hidden_size,
            depth=hf.num_hidden_layers,
            heads=hf.num_attention_heads,
            mlp_width=hf.intermediate_size,
            embed_dim=content.get("projection_dim", hf.projection_dim),
            activation=hf.hidden_act,
            layer_norm_eps=hf.layer_norm_eps,
        )
    # transformers and huggingface_hub check the values, each with exceptions of its own.
    except Exception as error:
        raise InputError(f"{path}: {error}") from error


def _hf_tensors(folder: Path) -> StateDict:
    """The vision tensors of a folder, from one file or from those that the index names."""
    if (folder / WEIGHTS).exists():
        return {key: tensor for key, tensor in _safetensors(folder / WEIGHTS).items() if _is_vision(key)}
    if not (folder / INDEX).exists():
        raise InputError(
            f"{folder}: has neither {WEIGHTS} nor {INDEX}; expected a folder of a Hugging Face CLIP model. Of "
            "open_clip's weights, give the file itself (.safetensors, .bin or .pt)."
        )
    tensors = {}
    for shard in _vision_shards(folder / INDEX):
        tensors |= {key: tensor for key, tensor in _safetensors(folder / shard).items() if _is_vision(key)}
    return tensors


def _vision_shards(index: Path) -> list[str]:
    """The files beside an index that hold vision tensors."""
    files = _json(index).get("weight_map")
    if not isinstance(files, dict):
        raise InputError(f"{index}: has no weight_map; expected the name of each tensor's file")
    shards = sorted({str(shard) for key, shard in files.items() if _is_vision(key)})
    strange = [shard for shard in shards if Path(shard).name != shard]
    if strange:
        raise InputError(f"{index}: names {listed(strange)}; expected names of files beside it")
    return shards


def _is_vision(key: str) -> bool:
    return key.startswith(("vision_model.", "visual_projection."))


def _json(path: Path) -> dict:
    try:
        content = json.loads(read_text(path))
    except ValueError as error:
        raise error if isinstance(error, InputError) else InputError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}; expected a JSON object")
    return content


# ---- files -------------------------------------------------------------------------------------------------

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def _safetensors(path: Path) -> dict[str, _SafeTensor]:
    """The tensors of a safetensors file, unread."""
    tensors = {}
    with _opened(path) as file:
        for key in sorted(file.keys()):
            part = file.get_slice(key)
            dtype = _DTYPES.get(part.get_dtype(), part.get_dtype())
            tensors[key] = _SafeTensor(path, key, tuple(part.get_shape()), dtype)
    return tensors


def _opened(path: Path):
    try:
        return safe_open(path, "numpy")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read as a safetensors file ({error})") from error


def local_clip(source: str | os.PathLike) -> Path:
    """The file or folder of a `source` as of `load_clip_vision`; from the hub, only what the image tower needs.

    Raises:
        InputError: there is nothing at `source`.
    """
    path = Path(source)
    if path.exists():
        return path
    named = isinstance(source, str) and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source)
    if not named or path.suffix in (".safetensors", ".bin", ".pt", ".pth"):
        raise InputError(f"{path}: no such file or folder; expected CLIP weights, or a name org/name in the hub")
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(source, allow_patterns=[CONFIG, PROCESSOR, WEIGHTS, INDEX]))
        if not (folder / WEIGHTS).exists() and (folder / INDEX).exists():
            shards = _vision_shards(folder / INDEX)
            folder = Path(snapshot_download(source, allow_patterns=[CONFIG, INDEX, *shards]))
    except InputError:
        raise
    # The hub's client, its transport and the file system each have exceptions of their own.
    except Exception as error:
        raise InputError(
            f"{source}: neither a file or folder here nor to be had from Hugging Face's hub ({error})"
        ) from error
    return folder
