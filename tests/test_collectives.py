"""What devices send each other in a training step: weights and sums of gradients, and never activations."""

import importlib.util
from functools import cache

import compiled_steps
import jax
import pytest
from compiled_steps import BATCH, TOKENS, WIDTHS, sent

from synbrain_jax import sharding

# XLA's CPU compiler splits programs as the others do, but never merges a sum with what takes a part of it.
TARGETS = ["cpu", *(["tpu"] if importlib.util.find_spec("libtpu") else [])]
MESHES = [(8, 1, 1), (2, 4, 1)]
EVERY = [(target, stage, sizes) for target in TARGETS for stage in ("stage1", "stage2") for sizes in MESHES]


@pytest.fixture(autouse=True, scope="module")
def _small_arrays_are_split_too():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "LEAST_OVER_DATA", compiled_steps.LEAST_OVER_DATA)
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        yield


@cache
def collectives(target, stage, sizes, **settings):
    return sent(compiled_steps.compiled(stage, target, sizes, **settings))


def parameters(stage, target) -> dict[str, int]:
    """Path -> size."""
    target = compiled_steps.program(stage, sharding.make_mesh(), WIDTHS[target])[0].target
    leaves = jax.tree_util.tree_leaves_with_path(target.params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.size for path, leaf in leaves}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_sizes_tell_parameters_and_activations_apart(stage, target):
    assert BATCH % (5 * 8) == 0
    assert not [name for name, size in parameters(stage, target).items() if size % 5 == 0]


@pytest.mark.parametrize(("target", "stage", "sizes"), EVERY)
def test_no_activation_is_gathered(target, stage, sizes):
    """Of all samples only their similarities are on every device: BATCH x BATCH numbers in stage 1."""
    found = collectives(target, stage, sizes)
    gathered = [one for one in found if one.kind in ("all-gather", "collective-permute")]
    assert (2 * WIDTHS[target]) ** 2 in {one.size for one in gathered}  # weights are
    assert [one for one in gathered if one.size % 5 == 0 and one.size > BATCH**2] == []
    summed = [one for one in found if one.kind in ("all-reduce", "reduce-scatter") and one.size % 5 == 0]
    assert {one.size for one in summed} <= ({BATCH, BATCH**2} if stage == "stage1" else set())


@pytest.mark.parametrize("target", TARGETS)
def test_parts_of_a_batch_are_not_gathered_either(target):
    found = collectives(target, "stage2", (8, 1, 1), accumulate=2)
    assert [one for one in found if one.size % 5 == 0] == []


@pytest.mark.parametrize(("target", "sizes"), [(target, sizes) for target in TARGETS for sizes in MESHES])
def test_soft_clip_exchanges_features_and_gathers_no_latents(target, sizes):
    """Each device hands on its rows of latents, tokens, and of the gradient of the latents: 3 x 5 x t d numbers."""
    found = collectives(target, "stage1", sizes)
    exchanged = [one for one in found if one.kind == "all-to-all"]
    assert {one.type for one in exchanged} == {"f32"}
    assert sum(one.size for one in exchanged) == 3 * (BATCH // 8) * TOKENS * WIDTHS[target]
    assert sum(one.size == BATCH**2 for one in found if one.kind == "all-reduce") == 2  # S and T
    others = [one for one in collectives(target, "stage2", sizes) if one.kind == "all-to-all"]
    assert [one for one in others if one.size % 5 == 0] == []


@pytest.mark.parametrize("target", TARGETS)
def test_gradients_of_the_conditioning_are_not_summed(target):
    """The conditioning is one row for the whole batch: its kernels' gradients are outer products that every device has,
    and a third of the mapper's parameters is not sent."""
    kernels = {name: size for name, size in parameters("stage2", target).items() if name.endswith("kernel")}
    conditioning = {name for name in kernels if name.startswith("time/") or "modulation" in name}
    assert sum(kernels[name] for name in conditioning) > sum(kernels.values()) / 3
    others = {size for name, size in kernels.items() if name not in conditioning}
    found = collectives(target, "stage2", (8, 1, 1))
    summed = {one.size for one in found if one.kind in ("all-reduce", "reduce-scatter")}
    assert others <= summed
    assert not ({kernels[name] for name in conditioning} - others) & summed


@pytest.mark.parametrize(("target", "stage", "sizes"), EVERY)
def test_kernels_gradients_are_summed_once_and_each_device_receives_its_part(target, stage, sizes):
    """On TPUs by one operation; the CPU's compiler sums the whole, and a device then takes its part."""
    kernels = {size for name, size in parameters(stage, target).items() if name.endswith("kernel")}
    kernels = {size for size in kernels if size >= WIDTHS[target] ** 2}
    found = collectives(target, stage, sizes)
    kinds = {kind: {one.size for one in found if one.kind == kind} for kind in ("all-reduce", "reduce-scatter")}
    expected = kinds.pop("reduce-scatter" if target == "tpu" else "all-reduce")
    assert (2 * WIDTHS[target]) ** 2 in expected
    assert not kernels & next(iter(kinds.values()))
