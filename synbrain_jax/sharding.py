"""The one place that builds a mesh and says where arrays live.

Mesh axes: `data` (batch), `fsdp` (batch, and a dimension of each large parameter), `tensor` (the other dimension). Each
may be 1; one device is the trivial case. Parameters are placed by an ordered table of path patterns; one that no
pattern matches is an error, so that a new parameter is a decision and not an accident.
"""

import math
import re
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from synbrain_jax.errors import InputError

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))

# First match wins. Shapes: convolution kernels [width, in, out], linear kernels [in, out].
RULES: tuple[tuple[str, P], ...] = (
    (r"encoder/conv_in/kernel$", P(None, None, "tensor")),  # one input channel
    (r"decoder/conv_out/kernel$", P(None, "fsdp", None)),  # one output channel
    (r"(conv\w*|shortcut|\w+sample|attn_1/[qkv])/kernel$", P(None, "fsdp", "tensor")),
    (r"attn_1/proj_out/kernel$", P(None, "tensor", "fsdp")),
    # What post_projector puts out becomes the positions of a convolution. Split, XLA (jax 0.10 to 0.12) computes wrong
    # values where the convolution's kernel is split too and the batch is not.
    (r"post_projector/dense_2/linear/kernel$", P(("fsdp", "tensor"), None)),
    (r"p\w+_projector\w*/dense_\d/linear/kernel$", P("fsdp", "tensor")),
    # The image tower's blocks are stacked and scanned. Were they split over `fsdp`, XLA would leave the batch whole
    # and sum all activations over the devices, instead of gathering a block's weights.
    (r"blocks/attn/qkv/kernel$", P(None, None, None, "tensor")),  # by heads
    (r"blocks/mlp/fc1/kernel$", P(None, None, "tensor")),
    (r"blocks/(attn/proj|mlp/fc2)/kernel$", P(None, "tensor")),
    (r"(patch_embed|projection)/kernel$", P()),
    (r"attn/qkv/kernel$", P("fsdp", "tensor")),
    (r"attn/proj/kernel$", P("tensor", "fsdp")),
    (r"mlp/fc1/kernel$", P("fsdp", "tensor")),
    (r"mlp/fc2/kernel$", P("tensor", "fsdp")),
    (r"modulation/linear/kernel$", P("fsdp", "tensor")),
    (r"time/dense_\d/kernel$", P("fsdp", "tensor")),
    (r"final/kernel$", P("fsdp", "tensor")),
    (r"(scale|bias|pos_embed|class_embedding)$", P()),
)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh over `devices` (default: all); `data=-1` takes what `fsdp` and `tensor` leave.

    Raises InputError when the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    given = f"mesh of data={data}, fsdp={fsdp}, tensor={tensor}"
    if min(fsdp, tensor) < 1 or (data < 1 and data != -1):
        raise InputError(f"{given}: sizes must be positive (data may be -1: whatever is left)")
    size = data if data != -1 else max(1, len(devices) // (fsdp * tensor))
    if size * fsdp * tensor != len(devices):
        raise InputError(f"{given} does not fit {len(devices)} devices; the product must be {len(devices)}")
    grid = np.asarray(devices).reshape(size, fsdp, tensor)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis split over `data` and `fsdp`."""
    return NamedSharding(mesh, BATCH)


def batch_parts(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def shard_batch(batch: PyTree, mesh: Mesh) -> PyTree:
    """This process's rows of a batch as global arrays, sharded over the mesh."""
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(batch_sharding(mesh), rows), batch)


def state_sharding(state: PyTree, mesh: Mesh) -> PyTree:
    """A NamedSharding for every leaf of a tree of parameters, or of one that mirrors them (optimizer state, EMA).

    Scalars are replicated. Raises ValueError for a leaf that no rule matches, InputError for one that cannot be split.
    """
    return jax.tree.map_with_path(lambda path, leaf: NamedSharding(mesh, _spec(path, leaf.shape, mesh)), state)


def _spec(path: tuple, shape: tuple[int, ...], mesh: Mesh) -> P:
    if not shape:
        return P()
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    spec = next((spec for pattern, spec in RULES if re.search(pattern, name)), None)
    if spec is None:
        raise ValueError(f"no sharding rule matches {name} {shape}; add one to synbrain_jax.sharding.RULES")
    for size, axes in zip(shape, spec, strict=False):
        axes = axes if isinstance(axes, tuple) else (axes,) if axes else ()
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if size % parts:
            given = " x ".join(f"mesh.{axis}" for axis in axes)
            raise InputError(
                f"{name} has shape {shape}: {size} cannot be split over {given} = {parts}; choose sizes that divide "
                "the model's widths"
            )
    return spec
