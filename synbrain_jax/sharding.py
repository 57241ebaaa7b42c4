"""The one place that builds a mesh and says where arrays live.

Mesh axes: `data` (batch), `fsdp` (batch, and a dimension of each large parameter), `tensor` (the other dimension). Each
may be 1; one device is the trivial case. Parameters are placed by an ordered table of path patterns; one that no
pattern matches is an error, so that a new parameter is a decision and not an accident.

What training keeps between steps is split over `data` too (ZeRO: Rajbhandari et al. 2020): a step gathers the
parameters once, and each device updates its own part. Activations are split by the batch after every module, which is
asked for here (`on_mesh`) and not in the models.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PyTree

from synbrain_jax.errors import InputError

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))
# Smaller arrays are not split over `data`: to gather them would take longer than to update them.
LEAST_OVER_DATA = 2**14

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
    # The image tower's blocks are stacked and scanned: a block's weights are gathered when it is computed.
    (r"blocks/attn/qkv/kernel$", P(None, "fsdp", None, "tensor")),  # by heads
    (r"blocks/mlp/fc1/kernel$", P(None, "fsdp", "tensor")),
    (r"blocks/(attn/proj|mlp/fc2)/kernel$", P(None, "tensor", "fsdp")),
    (r"(patch_embed|projection)/kernel$", P()),
    (r"attn/qkv/kernel$", P("fsdp", "tensor")),
    (r"attn/proj/kernel$", P("tensor", "fsdp")),
    (r"mlp/fc1/kernel$", P("fsdp", "tensor")),
    (r"mlp/fc2/kernel$", P("tensor", "fsdp")),
    (r"modulation/linear/kernel$", P("fsdp", "tensor")),
    (r"time/dense_\d/kernel$", P("fsdp", "tensor")),
    (r"final/kernel$", P("fsdp", "tensor")),
    (r"(scale|bias|pos_embed|class_embedding|lora_[ab])$", P()),
)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh over `devices` (default: all); `data=-1` takes what `fsdp` and `tensor` leave.

    Raises InputError when the sizes do not multiply to the number of devices.
    """
    # The devices of one process follow each other, so that its share of a batch is one piece.
    devices = sorted(jax.devices(), key=lambda one: one.process_index) if devices is None else list(devices)
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


def batch_parts(mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts a batch is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def process_share(mesh: Mesh) -> tuple[int, int]:
    """Which part of every batch this process reads, and of how many; `part_of_batch` of the mesh.

    On a mesh of devices that are not here, what its first process reads.
    """
    processes = np.vectorize(lambda device: device.process_index)(mesh.devices)
    here = jax.process_index()
    return part_of_batch(processes, here if here in processes else int(processes.flat[0]))


def part_of_batch(processes: Int[np.ndarray, "data fsdp tensor"], process: int) -> tuple[int, int]:
    """Which part of every batch a process reads, and of how many, given whose the devices of a mesh are.

    Processes over which `tensor` is split read the same part. Raises InputError if a process's devices are not a block
    of the mesh.
    """
    _, fsdp, tensor = processes.shape
    own, one_row = int(np.sum(processes == process)), fsdp * tensor
    if processes.size > own and tensor % own and (own % tensor or (own % one_row and one_row % own)):
        sizes = ", ".join(f"mesh.{axis} {size}" for axis, size in zip(AXES, processes.shape, strict=True))
        raise InputError(
            f"{sizes}, over processes of {own} devices: expected mesh.tensor, and mesh.fsdp x mesh.tensor, each to "
            f"divide {own} or to be a multiple of it"
        )
    samples = max(1, own // tensor)  # parts of the batch that it holds
    first = int(np.flatnonzero(processes == process)[0])
    return first // tensor // samples, processes.size // tensor // samples


def shard_batch(batch: PyTree, mesh: Mesh) -> PyTree:
    """This process's rows of a batch as global arrays, sharded over the mesh."""
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(batch_sharding(mesh), rows), batch)


def param_sharding(params: PyTree, mesh: Mesh | AbstractMesh) -> PyTree:
    """Where parameters lie while they are used: a NamedSharding for every leaf, by `RULES`.

    Scalars are replicated. Raises ValueError for a leaf that no rule matches, InputError for one that cannot be split.
    """
    return jax.tree.map_with_path(lambda path, leaf: NamedSharding(mesh, _spec(path, leaf.shape, mesh)), params)


def state_sharding(state: PyTree, mesh: Mesh | AbstractMesh) -> PyTree:
    """Where a training state lies between steps: parameters and what mirrors them (optimizer moments, average).

    As `param_sharding`, and large arrays are split over `data` too: along the axis that `fsdp` splits, else the first,
    that can be divided; where none can, they are not.
    """
    placed = param_sharding(state, mesh)
    return jax.tree.map(lambda leaf, place: NamedSharding(mesh, _over_data(leaf.shape, place)), state, placed)


def _spec(path: tuple, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> P:
    if not shape:
        return P()
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    spec = next((spec for pattern, spec in RULES if re.search(pattern, name)), None)
    if spec is None:
        raise ValueError(f"no sharding rule matches {name} {shape}; add one to synbrain_jax.sharding.RULES")
    for size, axes in zip(shape, spec, strict=False):
        parts = math.prod(mesh.shape[axis] for axis in _axes(axes))
        if size % parts:
            given = " x ".join(f"mesh.{axis}" for axis in _axes(axes))
            raise InputError(
                f"{name} has shape {shape}: {size} cannot be split over {given} = {parts}; choose sizes that divide "
                "the model's widths"
            )
    return spec


def _axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one entry of a spec."""
    return entry if isinstance(entry, tuple) else (entry,) if entry else ()


def _over_data(shape: tuple[int, ...], place: NamedSharding) -> P:
    parts = place.mesh.shape["data"]
    on_one = place.shard_shape(shape)
    divisible = [axis for axis, size in enumerate(on_one) if size % parts == 0]
    if parts == 1 or math.prod(shape) < LEAST_OVER_DATA or not divisible:
        return place.spec
    entries = [*place.spec, *[None] * (len(shape) - len(place.spec))]
    # Along one axis, a sum over devices of which each keeps a part is one operation. Otherwise not the longest, because
    # accelerators store the last axis in wide rows, and the mapper's modulations are cut along it.
    with_fsdp = [axis for axis in divisible if "fsdp" in _axes(entries[axis]) and place.mesh.shape["fsdp"] > 1]
    chosen = [*with_fsdp, *divisible][0]
    entries[chosen] = (*_axes(entries[chosen]), "data")
    return P(*entries)


def on_mesh(function: Callable, mesh: Mesh) -> Callable:
    """`function`, for `jax.jit` over `mesh`: what its flax modules put out stays split by the batch, its leading axis.

    Left alone, XLA may gather activations where it should gather weights. What a block puts out is split by nothing
    else, and what conditions a whole batch (one row) is not split; within blocks, `tensor` is XLA's to place.
    """
    if mesh.size == 1:
        return function

    @functools.wraps(function)
    def traced(*args, **kwargs):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), nn.intercept_methods(_place_output):
            return function(*args, **kwargs)

    return traced


def _place_output(call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext):
    out = call(*args, **kwargs)
    if context.method_name != "__call__":
        return out
    # A layer, as opposed to a block, has arrays for parameters and no modules.
    params = context.module.variables.get("params", {})
    layer = not any(isinstance(part, Mapping) for part in params.values())
    return jax.tree.map(lambda leaf: _split_batch(leaf, layer), out)


def _split_batch(x, layer: bool):
    if not isinstance(x, jax.Array) or x.ndim < 2:
        return x
    divisible = len(x) % batch_parts(jax.sharding.get_abstract_mesh()) == 0
    if layer:
        spec = P(*BATCH, *[P.UNCONSTRAINED] * (x.ndim - 1)) if divisible else P(*[P.UNCONSTRAINED] * x.ndim)
    else:
        spec = BATCH if divisible else P()
    return jax.lax.with_sharding_constraint(x, spec)


def jit_beside(function: Callable[[PyTree, PyTree], PyTree]) -> Callable[[PyTree, PyTree], PyTree]:
    """`function(params, batch)`, jitted over the mesh on which `params` lie, if they lie on one.

    `batch` are rows on the host, the same in every process; they are split over the mesh if their number can be.
    """
    compiled = functools.cache(lambda mesh: jax.jit(function if mesh is None else on_mesh(function, mesh)))

    def call(params: PyTree, batch: PyTree) -> PyTree:
        places = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(params)]
        mesh = next((place.mesh for place in places if isinstance(place, NamedSharding)), None)

        def split(rows):
            if mesh is None or len(rows) % batch_parts(mesh):
                return rows
            return jax.make_array_from_callback(rows.shape, batch_sharding(mesh), lambda index: rows[index])

        return compiled(mesh)(params, jax.tree.map(split, batch))

    return call


def split_features(rows: Float[Array, "b f"]) -> Float[Array, "b f"]:
    """Inside `on_mesh`: all rows on every device, and of each its share of the features; elsewhere, `rows`.

    Products of rows with rows are then sums over devices, and no device ever holds all rows whole.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return rows
    return jax.lax.with_sharding_constraint(rows, P(None, AXES))  # XLA pads what cannot be divided
