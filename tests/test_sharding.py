"""Where arrays live: meshes, batches, and every array of the released models' training states."""

import functools
import math
import re
from functools import cache

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from golden_set import relative_error
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from synbrain_jax.checkpoint import abstract_params
from synbrain_jax.config import Config, OptimizerConfig
from synbrain_jax.errors import InputError
from synbrain_jax.losses import soft_clip
from synbrain_jax.models.brain_vae import BrainVAEConfig
from synbrain_jax.models.clip_vision import CLIPVisionConfig, clip_vision_shapes
from synbrain_jax.models.semantic_to_neural import MapperConfig
from synbrain_jax.sharding import (
    AXES,
    RULES,
    batch_parts,
    batch_sharding,
    jit_beside,
    make_mesh,
    on_mesh,
    param_sharding,
    replicated,
    shard_batch,
    split_features,
    state_sharding,
)
from synbrain_jax.training import init_state, make_optimizer

RELEASED = Config(name="paper", brain_vae=BrainVAEConfig.paper(), mapper=MapperConfig.paper())


@cache
def released(sizes: tuple[int, int, int] = (1, 2, 2)) -> dict[str, tuple]:
    """Path -> (shape, sharding) of every array of both released models' training states, on devices that need not be
    there."""
    optimizer = make_optimizer(OptimizerConfig(clip_norm=1.0, ema_decay=0.999, schedule="cosine"), steps=10)

    def states():
        params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract_params(RELEASED))
        return {
            name: init_state(lambda _, name=name: params[name], optimizer, True, jax.random.key(0)) for name in params
        }

    shapes = jax.eval_shape(states)
    shardings = state_sharding(shapes, AbstractMesh(sizes, AXES))
    leaves, places = (jax.tree_util.tree_leaves_with_path(tree) for tree in (shapes, shardings))
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    return {name: (leaf.shape, place) for name, (_, leaf), (_, place) in zip(names, leaves, places, strict=True)}


def released_params(sizes: tuple[int, int, int] = (1, 2, 2)) -> dict[str, tuple]:
    return {name.replace("/params/", "/"): item for name, item in released(sizes).items() if "/params/" in name}


def share_on_one(items) -> float:
    """Of all numbers, those on each device."""
    items = list(items)
    on_one = sum(np.prod(place.shard_shape(shape)) for shape, place in items)
    return on_one / sum(np.prod(shape) for shape, _ in items)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (8, 1, 1), (128, 2, 1)], ids=str)
def test_the_full_size_models_are_placed_as_recorded(golden_text, sizes):
    mesh, lines = AbstractMesh(sizes, AXES), {}
    tower = clip_vision_shapes(CLIPVisionConfig.bigG_14())
    used = param_sharding({**abstract_params(RELEASED), "clip": tower}, mesh)
    kept = {name: place for name, (_, place) in released_params(sizes).items()}
    shapes = {name: shape for name, (shape, _) in released_params(sizes).items()}
    for path, place in jax.tree_util.tree_leaves_with_path(used):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        shape = (
            shapes[name] if name in shapes else functools.reduce(lambda tree, key: tree[key.key], path[1:], tower).shape
        )
        between = f"; {tuple(kept[name].spec)}" if name in kept and kept[name].spec != place.spec else ""
        line = f"{re.sub(r'^mapper/block_[0-9]+', 'mapper/block_*', name)} {shape} {tuple(place.spec)}{between}"
        lines[line] = lines.get(line, 0) + 1
    title = f"data {sizes[0]}, fsdp {sizes[1]}, tensor {sizes[2]}: path, shape, spec in use; between steps, if another"
    share = f"Between steps each device keeps {share_on_one(released(sizes).values()):.2%} of both training states."
    text = "".join(f"{line} x{count}\n" for line, count in lines.items())
    golden_text(f"sharding_{math.prod(sizes)}.txt", f"{title}\n{share}\n{text}")


SECOND_OF_A_PAIR = ("attn_1/proj_out", "attn/proj", "mlp/fc2")


def test_kernels_are_split_by_their_role_and_vectors_are_not_split():
    for name, (shape, place) in released_params().items():
        if not name.endswith("/kernel"):
            assert place.spec == P(), name
            continue
        split_in, split_out = ("fsdp", "tensor")
        if name.removesuffix("/kernel").endswith(SECOND_OF_A_PAIR):  # its input is what `tensor` split
            split_in, split_out = ("tensor", "fsdp")
        if "post_projector/dense_2" in name:  # its output is positions, which are not split
            split_in, split_out = (("fsdp", "tensor"), None)
        expected = [None] * (len(shape) - 2) + [split_in, split_out]
        expected = [None if size == 1 else axis for size, axis in zip(shape, expected, strict=True)]
        assert list(place.spec) == expected, name


def test_optimizer_state_and_average_lie_with_their_parameters():
    everything, seen = released(), 0
    for name, (shape, place) in everything.items():
        model, _, rest = name.partition("/")
        if not shape:
            assert place.spec == P(), name
            continue
        parameter = re.sub(r"^(params|ema|opt_state/.*/(mu|nu))/", "", rest)
        assert everything[f"{model}/params/{parameter}"] == (shape, place), name
        seen += 1
    assert seen == 4 * len(released_params())  # parameters, first and second moments, average


def test_four_devices_hold_a_quarter_each():
    assert sum(np.prod(shape) for shape, _ in released_params().values()) == 78_311_937 + 410_430_592 + 425_984
    assert 0.25 < share_on_one(released_params().values()) < 0.252


@pytest.mark.parametrize(("sizes", "share"), [((8, 1, 1), 1 / 8), ((2, 2, 2), 1 / 8), ((128, 2, 1), 1 / 256)])
def test_a_training_state_is_split_over_all_devices(sizes, share):
    """But for small arrays, which are 0.1 % of the whole."""
    assert share < share_on_one(released(sizes).values()) < share + 0.002


def test_over_data_that_axis_is_split_which_fsdp_splits_or_the_first_that_can_be():
    """By hand, for each way in which a kernel [in, out] of the first or second layer of a pair can be split."""
    shapes = {
        "mlp": {"fc1": {"kernel": (24, 4096)}, "fc2": {"kernel": (4096, 24)}},
        "conv1": {"kernel": (3, 8, 4096)},  # 3 cannot be split
        "conv2": {"kernel": (3, 2, 16_384)},  # nor can 2 over both
        "attn": {"proj": {"kernel": (6, 4098)}},  # nothing can
        "norm": {"scale": (2**14,), "bias": (2**14 - 4,)},  # large, and small
    }
    tree = jax.tree.map(lambda shape: jnp.zeros(shape), shapes, is_leaf=lambda node: isinstance(node, tuple))
    found = jax.tree.map(lambda place: place.spec, state_sharding(tree, AbstractMesh((4, 2, 1), AXES)))
    assert found == {
        "mlp": {"fc1": {"kernel": P(("fsdp", "data"), "tensor")}, "fc2": {"kernel": P("tensor", ("fsdp", "data"))}},
        "conv1": {"kernel": P(None, ("fsdp", "data"), "tensor")},
        "conv2": {"kernel": P(None, "fsdp", ("tensor", "data"))},
        "attn": {"proj": {"kernel": P("tensor", "fsdp")}},
        "norm": {"scale": P("data"), "bias": P()},
    }
    wide = jax.tree.map(lambda place: place.spec, state_sharding(tree, AbstractMesh((8, 1, 1), AXES)))
    assert wide["mlp"]["fc2"]["kernel"] == P(("tensor", "data"), "fsdp")
    used = jax.tree.map(lambda place: place.spec, param_sharding(tree, AbstractMesh((4, 2, 1), AXES)))
    assert used["mlp"]["fc1"]["kernel"] == P("fsdp", "tensor")
    assert used["norm"]["scale"] == P()


def test_every_rule_is_the_first_match_of_some_parameter():
    tower = jax.tree_util.tree_leaves_with_path(clip_vision_shapes(CLIPVisionConfig.bigG_14()))
    names = [*released_params(), *(jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in tower)]
    first = {next(pattern for pattern, _ in RULES if re.search(pattern, name)) for name in names}
    assert first == {pattern for pattern, _ in RULES}


def test_a_parameter_that_no_rule_matches_is_an_error():
    mesh = make_mesh()
    with pytest.raises(ValueError, match=r"no sharding rule matches params/gate/weight \(4, 4\)"):
        state_sharding({"params": {"gate": {"weight": jnp.zeros((4, 4))}}}, mesh)
    assert state_sharding({"gate": {"weight": jnp.zeros(())}}, mesh)["gate"]["weight"].spec == P()


def test_a_size_that_the_mesh_does_not_divide_is_named():
    params = abstract_params(tiny.config())["mapper"]
    for axis, sizes in (("fsdp", (1, 3, 1)), ("tensor", (1, 1, 3))):
        with pytest.raises(InputError, match=rf"kernel has shape \(.*cannot be split over mesh\.{axis} = 3"):
            state_sharding(params, make_mesh(*sizes, devices=jax.devices()[:3]))


def test_the_mesh_has_the_devices_in_order_and_automatic_axes():
    for sizes, shape in (((-1, 1, 1), (8, 1, 1)), ((-1, 2, 2), (2, 2, 2)), ((1, 2, 4), (1, 2, 4))):
        mesh = make_mesh(*sizes)
        assert dict(mesh.shape) == dict(zip(("data", "fsdp", "tensor"), shape, strict=True))
        assert mesh.axis_types == (AxisType.Auto,) * 3
        assert [device.id for device in mesh.devices.flat] == list(range(8))
        assert batch_parts(mesh) == shape[0] * shape[1]
    assert make_mesh(devices=jax.devices()[3:4]).devices.flat[0] == jax.devices()[3]


@pytest.mark.parametrize("sizes", [(3, 1, 1), (4, 1, 1), (16, 1, 1), (-1, 3, 1), (-1, 1, 16), (2, 2, 4)])
def test_a_mesh_that_does_not_fit_the_devices_says_so(sizes):
    data, fsdp, tensor = sizes
    given = f"data={data}, fsdp={fsdp}, tensor={tensor}"
    with pytest.raises(InputError, match=f"^mesh of {given} does not fit 8 devices; the product must be 8$"):
        make_mesh(*sizes)


@pytest.mark.parametrize("sizes", [(0, 1, 1), (-2, 1, 1), (-1, 0, 1), (-1, 1, -1), (-1, -2, -4)])
def test_mesh_sizes_must_be_positive(sizes):
    with pytest.raises(InputError, match="sizes must be positive"):
        make_mesh(*sizes)


def test_rows_of_a_batch_go_to_data_and_fsdp_and_are_repeated_over_tensor():
    mesh = make_mesh(2, 2, 2)
    rows = {"a": np.arange(24.0).reshape(8, 3), "b": np.arange(8)}
    batch = shard_batch(rows, mesh)
    assert batch["a"].sharding == batch_sharding(mesh)
    place = {mesh.devices[index].id: index for index in np.ndindex(2, 2, 2)}
    for name, array in batch.items():
        np.testing.assert_array_equal(array, rows[name])
        assert len(array.addressable_shards) == 8
        for shard in array.addressable_shards:
            data, fsdp, _ = place[shard.device.id]
            part = 2 * data + fsdp
            np.testing.assert_array_equal(shard.data, rows[name][2 * part : 2 * part + 2])


def test_replicated_is_whole_everywhere():
    array = jax.device_put(np.arange(6.0), replicated(make_mesh(4, 1, 2)))
    assert len(array.addressable_shards) == 8
    for shard in array.addressable_shards:
        np.testing.assert_array_equal(shard.data, np.arange(6.0))


# ---- activations ---------------------------------------------------------------------------------


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(16, name="final")(x)


class Outer(nn.Module):
    """A block's output, made again in the backward pass or not, that for one row, and a layer's."""

    @nn.compact
    def __call__(self, x, row):
        inner = Inner(name="a")(x)
        layer = nn.Dense(16, name="final")(x)
        return nn.remat(Inner)(name="c")(layer), inner, Inner(name="b")(row), layer


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 4, 2), (2, 1, 4)])
def test_what_modules_put_out_is_split_by_the_batch(sizes):
    mesh = make_mesh(*sizes)
    x, row = jnp.ones((8, 3, 8)), jnp.ones((1, 8))
    params = Outer().init(jax.random.key(0), x, row)
    params = jax.device_put(params, param_sharding(params, mesh))

    def apply(params, x, row):
        out = Outer().apply(params, x, row)
        return (*out, jax.sharding.get_abstract_mesh().shape_tuple)

    def traced(params, x, row):
        *out, axes = on_mesh(apply, mesh)(params, x, row)
        assert dict(axes) == dict(mesh.shape)
        return out

    *blocks, one_row, layer = jax.jit(traced)(params, x, row)
    for block in blocks:
        assert block.sharding.is_equivalent_to(batch_sharding(mesh), 3)
    assert one_row.sharding.is_equivalent_to(replicated(mesh), 2)
    assert layer.sharding.shard_shape((8, 3, 16))[0] == 8 // batch_parts(mesh)  # and `tensor` as XLA likes
    assert on_mesh(apply, make_mesh(devices=jax.devices()[:1])) is apply


def test_rows_are_computed_where_the_parameters_are():
    """Split over their mesh, if their number can be; and on one device where there is no mesh."""
    seen = []

    def function(params, batch):
        seen.append(jax.sharding.get_abstract_mesh().shape_tuple)
        return batch["x"] * params["w"]

    mesh, run = make_mesh(2, 2, 2), jit_beside(function)
    params = {"on the host": np.float32(0), "w": jax.device_put(np.float32(3), replicated(mesh))}
    x = np.arange(24, dtype=np.float32).reshape(8, 3)
    for rows, split in ((8, True), (6, False), (8, True)):
        out = run(params, {"x": x[:rows]})
        np.testing.assert_array_equal(out, 3 * x[:rows])
        assert out.sharding.is_equivalent_to(batch_sharding(mesh) if split else replicated(mesh), 2)
    np.testing.assert_array_equal(run({"w": np.float32(3)}, {"x": x}), 3 * x)
    assert [dict(axes) for axes in seen] == [dict(mesh.shape)] * 2 + [{}]  # each compiled once


@pytest.mark.parametrize("contrast_size", [None, 2, 4])
@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)])
def test_soft_clip_split_by_features_is_the_plain_one(sizes, contrast_size):
    mesh = make_mesh(*sizes)
    # 20 features: not the same number on every device.
    latents, tokens = (np.float32(np.random.default_rng(seed).normal(size=(8, 4, 5))) for seed in (0, 1))

    def loss(latents, tokens, place):
        return soft_clip(latents, tokens, contrast_size=contrast_size, place=place)

    value_and_grad = jax.value_and_grad(loss, argnums=(0, 1))
    expected = jax.jit(functools.partial(value_and_grad, place=lambda rows: rows))(latents, tokens)
    spread = jax.jit(on_mesh(functools.partial(value_and_grad, place=split_features), mesh))
    found = spread(*shard_batch((latents, tokens), mesh))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert relative_error(one, other) < 1e-6


def test_features_are_split_over_all_devices():
    mesh = make_mesh(2, 2, 2)
    rows = np.arange(8.0 * 24).reshape(8, 24)
    found = jax.jit(on_mesh(split_features, mesh))(*shard_batch((rows,), mesh))
    assert found.sharding.is_equivalent_to(NamedSharding(mesh, P(None, AXES)), 2)
    np.testing.assert_array_equal(found, rows)
    assert split_features(found) is found
