"""Where arrays live: meshes, batches, and every array of the released models' training states."""

import re
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from synbrain_jax.checkpoint import abstract_params
from synbrain_jax.config import Config, OptimizerConfig
from synbrain_jax.errors import InputError
from synbrain_jax.models.brain_vae import BrainVAEConfig
from synbrain_jax.models.clip_vision import CLIPVisionConfig, clip_vision_shapes
from synbrain_jax.models.semantic_to_neural import MapperConfig
from synbrain_jax.sharding import (
    RULES,
    batch_parts,
    batch_sharding,
    make_mesh,
    replicated,
    shard_batch,
    state_sharding,
)
from synbrain_jax.training import init_state, make_optimizer


@cache
def released() -> dict[str, tuple]:
    """Path -> (shape, sharding) of every array of both released models' training states, on four devices."""
    config = Config(name="paper", brain_vae=BrainVAEConfig.paper(), mapper=MapperConfig.paper())
    optimizer = make_optimizer(OptimizerConfig(clip_norm=1.0, ema_decay=0.999, schedule="cosine"), steps=10)

    def states():
        params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract_params(config))
        return {
            name: init_state(lambda _, name=name: params[name], optimizer, True, jax.random.key(0)) for name in params
        }

    shapes = jax.eval_shape(states)
    shardings = state_sharding(shapes, make_mesh(1, 2, 2, devices=jax.devices()[:4]))
    leaves, places = (jax.tree_util.tree_leaves_with_path(tree) for tree in (shapes, shardings))
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    return {name: (leaf.shape, place) for name, (_, leaf), (_, place) in zip(names, leaves, places, strict=True)}


def released_params() -> dict[str, tuple]:
    return {name.replace("/params/", "/"): item for name, item in released().items() if "/params/" in name}


def test_the_released_models_are_placed_as_recorded(golden_text):
    lines = {}
    for name, (shape, place) in released_params().items():
        line = f"{re.sub(r'^mapper/block_[0-9]+', 'mapper/block_*', name)} {shape} {tuple(place.spec)}"
        lines[line] = lines.get(line, 0) + 1
    text = "Parameters of the released models: path, shape, spec, how many\n"
    golden_text("sharding.txt", text + "".join(f"{line} x{count}\n" for line, count in lines.items()))


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
    total = sum(np.prod(shape) for shape, _ in released_params().values())
    assert total == 78_311_937 + 410_430_592 + 425_984
    on_one = sum(np.prod(place.shard_shape(shape)) for shape, place in released_params().values())
    assert 0.25 < on_one / total < 0.252


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
