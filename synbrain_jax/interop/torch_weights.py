"""The released system's checkpoints in terms of our parameters, and back.

The release (MichaelMaiii/SynBrain) saves stage 1 as `last.pth` and stage 2 as `last.pt`; both hold weights, AdamW's
state (for `torch_training.py`) and a few settings. They are read by `TorchFile`, which executes nothing. A safetensors
file of plain keys is taken as well. Every tensor is accounted for: one that is missing, left over, or of another shape
is an error.

Sizes of the models are read off the shapes, each from several tensors, so that a single wrong tensor is found and does
not decide. Layouts: a linear weight [out, in] becomes [in, out], a convolution's [out, in, width] becomes
[width, in, out], a transposed convolution's [in, out, width] becomes [width, in, out].
"""

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator, Mapping

import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree
from safetensors import SafetensorError

from synbrain_jax.checkpoint import Bundle
from synbrain_jax.config import Config, DataConfig
from synbrain_jax.data.voxels import Voxels
from synbrain_jax.errors import InputError
from synbrain_jax.interop.state_dicts import agreed_size, check_tensors, listed
from synbrain_jax.interop.torch_file import StoredTensor, TorchFile
from synbrain_jax.models.brain_vae import BrainVAEConfig, brain_vae_shapes
from synbrain_jax.models.layers import position_embedding
from synbrain_jax.models.semantic_to_neural import MapperConfig, mapper_shapes

StateDict = Mapping[str, np.ndarray | StoredTensor]

# Our parameter path, joined by dots, to the release's key; each line is applied in turn.
_RENAMED = [
    (r"^(encoder\.down|decoder\.up)_(\d+)_block_(\d+)", r"\1.\2.block.\3"),
    (r"^encoder\.down_(\d+)_downsample", r"encoder.down.\1.downsample.conv"),
    (r"^decoder\.up_(\d+)_upsample", r"decoder.up.\1.upsample.trans_conv"),
    (r"\.shortcut\.", r".nin_shortcut."),
    (r"_projector(\w*)\.norm_(\d)", lambda m: f"_projector{m[1]}.{3 * int(m[2])}"),
    (r"_projector(\w*)\.dense_(\d)\.linear", lambda m: f"_projector{m[1]}.{3 * int(m[2]) + 2}"),
    (r"^time\.dense_(\d)", lambda m: f"t_embedder.mlp.{2 * int(m[1])}"),
    (r"^block_(\d+)", r"blocks.\1"),
    (r"^final\.", r"final_layer.linear."),
    (r"^final_modulation\.", r"final_layer.modulation."),
    (r"modulation\.linear", r"adaLN_modulation.1"),
    (r"\.(kernel|scale)$", r".weight"),
]


# ---- names and layouts -------------------------------------------------------------------------------------


def released_key(path: tuple[str, ...]) -> str:
    """The state-dict key of one of our parameters.

    >>> released_key(("decoder", "up_2_upsample", "kernel"))
    'decoder.up.2.upsample.trans_conv.weight'
    """
    key = ".".join(path)
    for pattern, replacement in _RENAMED:
        key = re.sub(pattern, replacement, key)
    return key


def released_array(key: str, array: np.ndarray) -> np.ndarray:
    """Our array in the layout that the release has for `key`: the same bits in another order."""
    if key == "pos_embed":
        return array[None]
    axes = (1, 2, 0) if "trans_conv" in key and array.ndim == 3 else None
    return np.ascontiguousarray(array.transpose(axes))


def our_array(key: str, array: np.ndarray) -> np.ndarray:
    """The inverse of `released_array`."""
    if key == "pos_embed":
        return array[0]
    axes = (2, 0, 1) if "trans_conv" in key and array.ndim == 3 else None
    return np.ascontiguousarray(array.transpose(axes))


def to_released(params: PyTree) -> dict[str, np.ndarray]:
    """A model's parameters as the release's state dict, without DataParallel's prefix."""
    state_dict = {}
    for path, leaf in flatten_dict(params).items():
        key = released_key(path)
        state_dict[key] = released_array(key, np.asarray(leaf))
    return state_dict


def from_released(tensors: StateDict, shapes: PyTree, where: str) -> PyTree:
    """The release's state dict as a tree of NumPy float32 arrays.

    Args:
        tensors: read one at a time.
        shapes: a model's parameters, as arrays or shapes; the result is like it.
        where: names the tensors' origin in messages.

    Raises:
        InputError: a tensor is missing, left over, of another shape, or does not hold finite floating-point numbers.
    """
    check_tensors(tensors, released_shapes(shapes), where, "this model in the release")

    def read(path: tuple[str, ...]) -> np.ndarray:
        key = released_key(path)
        tensor = tensors[key] if isinstance(tensors[key], np.ndarray) else tensors[key].read()
        array = our_array(key, np.asarray(tensor, np.float32))
        if not np.isfinite(array).all():
            raise InputError(f"{where}: {key} holds values that are NaN or infinite; did its training diverge?")
        return array

    return unflatten_dict({path: read(path) for path in flatten_dict(shapes)})


def released_shapes(shapes: PyTree) -> dict[str, tuple[int, ...]]:
    """The release's shape of each of a model's tensors, by key."""
    keys = {released_key(path): leaf.shape for path, leaf in flatten_dict(shapes).items()}
    return {key: released_array(key, np.broadcast_to(np.int8(0), shape)).shape for key, shape in keys.items()}


# ---- sizes -------------------------------------------------------------------------------------------------


def brain_vae_config(tensors: StateDict, where: str) -> BrainVAEConfig:
    """The architecture of a BrainVAE state dict. Raises InputError if there is none."""
    size, count = _sizes_of(tensors, where)
    mean, logvar, post = "pre_projector_mean", "pre_projector_logvar", "post_projector"
    levels, down = count(r"encoder\.down\.(\d+)\.block\."), count(r"encoder\.down\.(\d+)\.downsample\.")
    channels = size("encoder.conv_in.bias", "encoder.conv_in.weight", "encoder.down.0.block.0.norm1.bias")
    blocks = [f"encoder.down.{level}.block.0" for level in range(levels)]
    widths = [size(f"{block}.conv1.bias", f"{block}.norm2.bias", f"{block}.conv2.bias") for block in blocks]
    if any(width % channels for width in widths):
        raise InputError(f"{where}: levels of {widths} channels; expected multiples of the first layer's {channels}")
    return BrainVAEConfig(
        pool_length=size(f"{mean}.0.bias", f"{logvar}.0.bias", f"{post}.8.bias") * 2**down,
        channels=channels,
        channel_mult=tuple(width // channels for width in widths),
        num_res_blocks=count(r"encoder\.down\.0\.block\.(\d+)\."),
        num_down_blocks=down,
        num_up_blocks=count(r"decoder\.up\.(\d+)\.upsample\."),
        latent_tokens=size("encoder.conv_out.bias", "encoder.conv_out.weight", "decoder.conv_in.weight.1"),
        latent_dim=size(f"{mean}.8.bias", f"{logvar}.8.bias", f"{post}.0.bias"),
        projector_width=size(f"{mean}.2.bias", f"{logvar}.2.bias", f"{post}.2.bias"),
    )


def mapper_config(
    tensors: StateDict, where: str, heads: int, prediction: str = "x", depth: int | None = None
) -> MapperConfig:
    """The architecture of a mapper state dict, which tells neither the number of heads nor the kind of prediction.

    `depth` is counted unless it is given (and then no block can be missing unnoticed).
    `positions` is "stored": the release averages its fixed position table along with the weights, and rounding moves
    the average (by up to 2e-4 in 50,000 steps), so the file's own table is part of the weights.
    """
    size, count = _sizes_of(tensors, where)
    width = size("final_layer.linear.bias", "t_embedder.mlp.0.bias", "t_embedder.mlp.2.bias")
    hidden = size("blocks.0.mlp.fc1.bias", "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight.1")
    depth = count(r"blocks\.(\d+)\.") if depth is None else depth
    try:
        return MapperConfig(
            tokens=size("pos_embed.1"),
            width=width,
            depth=depth,
            heads=heads,
            mlp_ratio=hidden / width,
            prediction=prediction,
            positions="stored",
        )
    except InputError as error:
        raise InputError(f"{where}: {error}; --heads gives the number of heads") from error


def _sizes_of(tensors: StateDict, where: str):
    """`size(*places)`, the size that most of some places agree on, where a place is a key (its first axis) or
    "key.1" (its second); and `count(pattern)`, how many values a pattern's group takes among the keys."""

    def size(*places: str) -> int:
        axes = [(place[:-2], 1) if place.endswith(".1") else (place, 0) for place in places]
        return agreed_size(tensors, where, *axes)

    def count(pattern: str) -> int:
        return len({found[1] for key in tensors if (found := re.match(pattern, key))})

    return size, count


# ---- files -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Released:
    """What one of the release's files holds. The tensors are read when they are needed, while it is open."""

    where: str
    weights: StateDict
    ema: StateDict | None = None  # moving average of the weights
    optimizer: Mapping | None = None  # PyTorch's AdamW state dict
    arguments: Mapping = dataclasses.field(default_factory=dict)  # of the release's command line
    steps: int | None = None


@contextlib.contextmanager
def open_released(path: str | os.PathLike) -> Iterator[Released]:
    """Opens `last.pth`, `last.pt`, or a state dict alone (by torch.save, or a safetensors file).

    Raises InputError for anything else.
    """
    where = os.fspath(path)
    if where.endswith(".safetensors"):
        weights = _state_dict(_read_safetensors(where), where)
        yield Released(where, weights, ema=weights)
        return
    with TorchFile(path) as file:
        content = file.content if isinstance(file.content, dict) else {}
        if content and all(isinstance(value, StoredTensor) for value in content.values()):
            weights = _state_dict(content, where)
            yield Released(where, weights, ema=weights)
            return
        if not isinstance(content.get("model"), dict):
            held = listed(content) or type(file.content).__name__
            raise InputError(
                f"{where}: holds {held}; expected a checkpoint of the release, with weights under 'model' (last.pth or "
                "last.pt)"
            )
        arguments, steps = content.get("args"), content.get("steps")
        yield Released(
            where=where,
            weights=_state_dict(content["model"], f"{where}, 'model'"),
            ema=_state_dict(content["ema"], f"{where}, 'ema'") if "ema" in content else None,
            optimizer=content.get("optimizer", content.get("opt")),
            arguments=arguments if isinstance(arguments, dict) else {},
            steps=steps if isinstance(steps, int) else None,
        )


def _read_safetensors(path: str) -> StateDict:
    try:
        return safetensors.numpy.load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read as a safetensors file ({error})") from error


def _state_dict(values, where: str) -> StateDict:
    """Tensors by plain key, in the file's order; the release's DataParallel prefixes every key with `module.`."""
    if not isinstance(values, dict):
        raise InputError(f"{where}: is a {type(values).__name__}; expected a state dict")
    plain = {}
    for key, value in values.items():
        if not isinstance(key, str) or not isinstance(value, StoredTensor | np.ndarray):
            raise InputError(f"{where}: {key!r} is a {type(value).__name__}; expected named tensors only")
        plain[key.removeprefix("module.")] = value
    if len(plain) != len(values):
        raise InputError(f"{where}: the same key with and without the prefix 'module.'; expected it once")
    return plain


def read_brain_vae(path: str | os.PathLike) -> tuple[BrainVAEConfig, PyTree]:
    """Architecture and parameters (NumPy float32) of a stage-1 checkpoint. Raises InputError if it is not one."""
    with open_released(path) as released:
        config = brain_vae_config(released.weights, released.where)
        return config, from_released(released.weights, brain_vae_shapes(config), released.where)


def read_mapper(
    path: str | os.PathLike, *, averaged: bool = True, heads: int | None = None
) -> tuple[MapperConfig, PyTree]:
    """Architecture and parameters (NumPy float32) of a stage-2 checkpoint. Raises InputError if it is not one.

    Args:
        averaged: take the moving average of the weights, as the release does, and not the weights themselves. A state
            dict alone stands for either.
        heads: attention heads; None: as the checkpoint says.
    """
    with open_released(path) as released:
        config = mapper_config(released.weights, released.where, **_mapper_arguments(released, heads))
        tensors = released.ema if averaged else released.weights
        if tensors is None:
            raise InputError(f"{released.where}: holds no moving average ('ema'); take the weights with --weights raw")
        return config, from_released(tensors, mapper_shapes(config), released.where)


def _mapper_arguments(released: Released, heads: int | None) -> dict:
    heads = released.arguments.get("model_head") if heads is None else heads
    if not isinstance(heads, int):
        raise InputError(f"{released.where}: does not say how many attention heads the mapper has; give --heads")
    if released.arguments.get("qk_norm"):
        raise InputError(f"{released.where}: was trained with qk_norm, which this mapper does not have")
    depth, prediction = (released.arguments.get(name) for name in ("model_depth", "prediction"))
    return {
        "heads": heads,
        "prediction": prediction if isinstance(prediction, str) else "x",
        "depth": depth if isinstance(depth, int) else None,
    }


# ---- bundles -----------------------------------------------------------------------------------------------


def bundle_from_released(
    brain_vae: str | os.PathLike,
    mapper: str | os.PathLike,
    *,
    averaged: bool = True,
    heads: int | None = None,
    voxels: Voxels | int | None = None,
    dataset: str = "unknown",
) -> Bundle:
    """A bundle of the release's two checkpoints. It has neither a correction nor the posterior's spread.

    Args:
        brain_vae, mapper: `last.pth` and `last.pt`, or safetensors files of plain keys.
        averaged, heads: as for `read_mapper`.
        voxels: of the brain that they were trained on, or their number; None: the number in the checkpoint's arguments.
        dataset: name of the data set that they were trained on.

    Raises:
        InputError: a file cannot be used, the two do not fit each other, or the number of voxels is not known.
    """
    vae_config, vae_params = read_brain_vae(brain_vae)
    mapper_settings, mapper_params = read_mapper(mapper, averaged=averaged, heads=heads)
    if voxels is None:
        with open_released(mapper) as released:
            voxels = released.arguments.get("num_voxels")
        if not isinstance(voxels, int):
            raise InputError(f"{os.fspath(mapper)}: does not say how many voxels the brain has; give --voxels")
    if isinstance(voxels, Voxels) and voxels.normalisation == "run_zscore":
        raise InputError(
            "the data set was prepared with normalisation 'run_zscore', but the release was trained on betas / 2000; "
            "prepare it with 'scale2000', or give the number of voxels instead"
        )
    if isinstance(voxels, int):
        if voxels < 1:
            raise InputError(f"the number of voxels is {voxels}; expected at least 1")
        order = np.arange(voxels, dtype=np.int32)
        voxels = Voxels("unknown", "scale2000", ijk=None, volume_shape=None, affine=None, ncsnr=None, order=order)
    try:
        config = Config(
            name="released",
            data=DataConfig(builder="arrays", normalisation="scale2000", voxel_order="given"),
            brain_vae=vae_config,
            mapper=mapper_settings,
            calibrate=False,
        )
    except InputError as error:
        files = f"{os.fspath(brain_vae)} and {os.fspath(mapper)}"
        raise InputError(f"{files} are not of one system: {error}") from error
    return Bundle.uncorrected(config, {"brain_vae": vae_params, "mapper": mapper_params}, voxels, dataset, None)


def released_from_bundle(bundle: Bundle) -> dict[str, dict[str, np.ndarray]]:
    """State dicts of both models, as PyTorch's `load_state_dict` takes them: "brain_vae" and "mapper".

    The bundle's correction has no counterpart in the release and is left out.
    """
    params, config = bundle.params, bundle.config.mapper
    table = {} if "pos_embed" in params["mapper"] else {"pos_embed": position_embedding(config.tokens, config.width)}
    return {"brain_vae": to_released(params["brain_vae"]), "mapper": to_released({**params["mapper"], **table})}
