"""The image tower against a plain NumPy program, its sizes, memory options and placement; released weights: parity."""

import math
import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict, path_aware_map
from jax.sharding import PartitionSpec as P
from scipy.special import erf, expit

from synbrain_jax.errors import InputError
from synbrain_jax.models.clip_vision import Block, CLIPVision, CLIPVisionConfig, clip_vision_shapes
from synbrain_jax.sharding import make_mesh, on_mesh, param_sharding, shard_batch

# The picture's size is no multiple of the patch's, nor the MLP's width of the tower's.
SIZES = dict(image_size=19, patch_size=5, width=16, depth=3, heads=4, mlp_width=24, embed_dim=8)
PIXELS = jnp.asarray(np.random.default_rng(1).normal(size=(8, 19, 19, 3)), jnp.float32)


@cache
def config(**changes) -> CLIPVisionConfig:
    return CLIPVisionConfig(**{**SIZES, **changes})


@cache
def params():
    """Nothing at its initial zero or one, so that every parameter matters."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        rows = leaf.shape[1] if path[0] == "blocks" else np.prod(leaf.shape[:-1])
        spread = rows**-0.5 if path[-1] == "kernel" else 0.3
        return ((path[-1] == "scale") + spread * rng.normal(size=leaf.shape)).astype(np.float32)

    return path_aware_map(draw, clip_vision_shapes(config()))


def energy(model, params, pixels):
    """A scalar that every number of the output enters, and the output."""
    output = model.apply({"params": params}, pixels)
    return sum((jnp.arange(1.0, leaf.size + 1) * jnp.square(leaf.ravel())).mean() for leaf in output), output


@cache
def result(**changes):
    """Output and gradient for PIXELS."""
    function = jax.value_and_grad(partial(energy, CLIPVision(config(**changes))), has_aux=True)
    (_, output), gradient = jax.jit(function)(params(), PIXELS)
    return output, gradient


def relative(actual, expected) -> float:
    """||actual - expected|| / ||expected|| over all leaves."""
    pairs = list(zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True))
    off = sum(np.sum((np.asarray(a, np.float64) - np.asarray(e)) ** 2) for a, e in pairs)
    return math.sqrt(off / sum(np.sum(np.asarray(e, np.float64) ** 2) for _, e in pairs))


# --- the numbers ---


def by_hand(config, params, pixels):
    """The tower in float64, picture by picture, head by head: tokens, embedding, hidden tokens."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    gelu = {"gelu": lambda x: x * (1 + erf(x / np.sqrt(2))) / 2, "quick_gelu": lambda x: x * expit(1.702 * x)}

    def norm(x, q):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + config.layer_norm_eps) * q[
            "scale"
        ] + q["bias"]

    def linear(x, q):
        return x @ q["kernel"] + q["bias"]

    def one(picture):
        size, grid = config.patch_size, config.image_size // config.patch_size
        corners = [(size * row, size * column) for row in range(grid) for column in range(grid)]
        kernel = p["patch_embed"]["kernel"].reshape(-1, config.width)
        patches = [picture[r : r + size, c : c + size].ravel() @ kernel for r, c in corners]
        x = norm(np.stack([p["class_embedding"], *patches]) + p["pos_embed"], p["ln_pre"])
        for i in range(config.depth):
            block = jax.tree.map(lambda leaf, i=i: leaf[i], p["blocks"])
            three = jax.tree.map(lambda leaf: np.moveaxis(leaf, -2, 0), block["attn"]["qkv"])
            q, k, v = (
                np.split(norm(x, block["ln_1"]) @ kernel + bias, config.heads, 1)
                for kernel, bias in zip(three["kernel"], three["bias"], strict=True)
            )
            heads = []
            for h in range(config.heads):
                weights = np.exp(q[h] @ k[h].T / np.sqrt(config.width / config.heads))
                heads.append(weights / weights.sum(1, keepdims=True) @ v[h])
            x = x + linear(np.concatenate(heads, 1), block["attn"]["proj"])
            h = linear(norm(x, block["ln_2"]), block["mlp"]["fc1"])
            x = x + linear(gelu[config.activation](h), block["mlp"]["fc2"])
        out = norm(x, p["ln_post"])
        return out[1:], out[0] @ p["projection"]["kernel"], x

    return [np.stack(parts) for parts in zip(*map(one, pixels), strict=True)]


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("layer_norm_eps", [1e-5, 0.1])
def test_output_is_that_of_the_plain_program(activation, layer_norm_eps):
    changes = dict(activation=activation, layer_norm_eps=layer_norm_eps)
    model = CLIPVision(config(**changes))
    tokens, pooled, hidden = by_hand(config(**changes), params(), np.asarray(PIXELS[:2], np.float64))
    output = model.apply({"params": params()}, PIXELS[:2])
    assert output.tokens.shape == (2, 9, 16)
    assert output.pooled.shape == (2, 8)
    assert relative(output, (tokens, pooled)) <= 2e-6
    assert relative(model.apply({"params": params()}, PIXELS[:2], method="hidden"), hidden) <= 2e-6


def test_pictures_of_another_size_are_refused():
    for shape in ((1, 19, 20, 3), (1, 24, 24, 3)):
        with pytest.raises(ValueError, match=r"pixels have shape .*; expected \[batch, 19, 19, 3\]"):
            CLIPVision(config()).apply({"params": params()}, jnp.zeros(shape))


# --- scan, rematerialisation, types ---


def test_scan_is_a_loop_over_blocks():
    """Value and gradient, against blocks applied one after the other."""

    def loop(blocks, x):
        for i in range(config().depth):
            x = Block(config()).apply({"params": jax.tree.map(lambda leaf, i=i: leaf[i], blocks)}, x)
        return x

    def scanned(blocks, x):
        return CLIPVision(config()).apply({"params": {**params(), "blocks": blocks}}, x, method="hidden")

    def first(x):
        model = CLIPVision(config())
        _, captured = model.apply({"params": params()}, x, capture_intermediates=True, mutable="intermediates")
        return captured["intermediates"]["ln_pre"]["__call__"][0]

    start = first(PIXELS)
    weights = jnp.asarray(np.random.default_rng(2).normal(size=start.shape), jnp.float32)
    run = [
        jax.jit(jax.value_and_grad(lambda blocks, f=f, x=x: (f(blocks, x) * weights).sum()))(params()["blocks"])
        for f, x in ((loop, start), (scanned, PIXELS))
    ]
    assert relative(run[1], run[0]) <= 1e-5


def program(**changes) -> str:
    shapes = clip_vision_shapes(config(**changes))
    return str(jax.make_jaxpr(CLIPVision(config(**changes)).apply)({"params": shapes}, PIXELS[:1]))


def test_the_program_does_not_grow_with_the_depth():
    for depth in (2, 30):  # attention, a block's linear layers, the projection
        assert program(depth=depth).count("dot_general[") == 2 + 4 + 1


def test_rematerialisation_recomputes_the_block_and_changes_nothing():
    (output, gradient), (plain_output, plain_gradient) = result(remat=True), result()
    assert relative(output, plain_output) <= 1e-6
    assert relative(gradient, plain_gradient) <= 1e-5
    assert program(remat=True).count("policy=None") == 1  # a parameter of the checkpoint primitive
    assert "policy=None" not in program()


def test_gradient_is_the_slope_of_the_energy():
    """Along the gradient's own direction, against a central difference."""
    gradient = result()[1]
    length = np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(gradient)))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))
    value = jax.jit(lambda params: energy(CLIPVision(config()), params, PIXELS)[0])

    def at(step):
        return float(value(jax.tree.map(lambda p, g: p + np.float32(step / length) * g, params(), gradient)))

    assert (at(1e-3) - at(-1e-3)) / 2e-3 == pytest.approx(length, rel=5e-3)


def test_bfloat16_gives_float32_close_to_float32s():
    (output, gradient), (exact, exact_gradient) = result(dtype="bfloat16"), result()
    for actual, expected in zip(output, exact, strict=True):
        assert actual.dtype == jnp.float32
        # bfloat16 rounds to 0.4 %, many times over; an error of float32's rounding would mean that it was not used.
        assert 1e-4 < relative(actual, expected) < 2e-2
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}
    assert relative(gradient, exact_gradient) < 5e-2
    # Products are bfloat16; the residual stream, normalisation and softmax are not.
    lines = program(dtype="bfloat16").splitlines()
    assert any(":bf16[1,10,24] = dot_general" in line for line in lines)
    assert any(":f32[1,4,10,10] = exp" in line for line in lines)
    assert not any(re.search(r":bf16\[[\d,]*\] = (exp|rsqrt|reduce_sum|concatenate)", line) for line in lines)


@pytest.mark.parametrize(
    ("dtype", "exact"), [("bfloat16", ["None"]), ("float32", ["(Precision.HIGHEST, Precision.HIGHEST)"] * 8)]
)
def test_float32_is_not_rounded_on_accelerators(dtype, exact):
    """The patches' convolution and seven products; of these the program says nothing if they are as usual."""
    found = re.findall(r"^ +precision=(.*)$", program(dtype=dtype), re.MULTILINE)
    assert found == exact


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_parameters_may_be_stored_in_half_precision(stored, dtype):
    """The same numbers as float32 ones of those values."""
    halves = jax.tree.map(lambda leaf: leaf.astype(stored), params())
    floats = jax.tree.map(lambda leaf: leaf.astype(np.float32), halves)
    output, expected = (CLIPVision(config(dtype=dtype)).apply({"params": p}, PIXELS) for p in (halves, floats))
    assert {leaf.dtype for leaf in output} == {jnp.dtype("float32")}
    assert relative(output, expected) <= 1e-6


def test_variables_are_float32_parameters_and_nothing_else():
    variables = jax.eval_shape(CLIPVision(config(dtype="bfloat16")).init, jax.random.key(0), PIXELS)
    assert set(variables) == {"params"}
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


def test_every_block_begins_with_numbers_of_its_own():
    fresh = jax.jit(CLIPVision(config()).init)(jax.random.key(0, impl="rbg"), PIXELS[:1])["params"]["blocks"]
    for path, leaf in flatten_dict(fresh).items():
        assert (path[-1] == "kernel") == (np.asarray(leaf[0]) != np.asarray(leaf[1])).all(), path


def test_pictures_of_a_batch_do_not_see_each_other():
    changed = jnp.concatenate([PIXELS[:-1], 7 - PIXELS[-1:]])
    run = jax.jit(CLIPVision(config()).apply)
    for a, b in zip(run({"params": params()}, changed), run({"params": params()}, PIXELS), strict=True):
        np.testing.assert_array_equal(a[:-1], b[:-1])
        assert (a[-1] != b[-1]).all()


# --- sizes ---


@pytest.mark.parametrize(
    ("preset", "count", "tokens"),
    [("bigG_14", 1_844_907_264, 256), ("H_14", 632_076_800, 256), ("L_14", 303_966_208, 256), ("B_32", 87_849_216, 49)],
)
def test_presets_have_the_published_sizes(preset, count, tokens):
    settings = getattr(CLIPVisionConfig, preset)()
    leaves = jax.tree.leaves(clip_vision_shapes(settings))
    assert sum(leaf.size for leaf in leaves) == count
    assert settings.tokens == tokens


@pytest.mark.parametrize(
    ("module", "count"),
    [
        ("class_embedding", 1_664),
        ("pos_embed", 257 * 1_664),
        ("patch_embed/", 3 * 14 * 14 * 1_664),
        ("ln_pre/", 2 * 1_664),
        ("blocks/attn/", 48 * 4 * (1_664 + 1) * 1_664),
        ("blocks/mlp/", 48 * (2 * 1_664 * 8_192 + 1_664 + 8_192)),
        ("projection/", 1_664 * 1_280),
    ],
)
def test_parts_of_bigg_have_their_sizes(module, count):
    flat = flatten_dict(clip_vision_shapes(CLIPVisionConfig.bigG_14()), sep="/")
    assert sum(leaf.size for path, leaf in flat.items() if path.startswith(module)) == count


@pytest.mark.parametrize("preset", ["bigG_14", "H_14", "L_14", "B_32"])
def test_presets_take_changes(preset):
    changed = getattr(CLIPVisionConfig, preset)(depth=2, width=96, activation="quick_gelu")
    assert (changed.depth, changed.width, changed.activation) == (2, 96, "quick_gelu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(width=18), "clip_vision.width is 18 and clip_vision.heads 4; the width must be a multiple"),
        (dict(patch_size=20), "image_size is 19 and clip_vision.patch_size 20; the picture must hold"),
        (dict(activation="relu"), "clip_vision.activation is 'relu'; expected 'gelu' or 'quick_gelu'"),
        (dict(dtype="float16"), "clip_vision.dtype is 'float16'; expected 'float32' or 'bfloat16'"),
        *((({name: 0}), f"clip_vision.{name} is 0; expected a positive number") for name in SIZES),
        (dict(layer_norm_eps=float("nan")), "clip_vision.layer_norm_eps is nan"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        config(**changes)


# --- placement ---


def test_every_parameter_of_bigg_has_its_place():
    shapes = clip_vision_shapes(CLIPVisionConfig.bigG_14())
    mesh = make_mesh(1, 1, 8)
    places = flatten_dict(param_sharding({"clip_vision": shapes}, mesh)["clip_vision"], sep="/")
    split = {
        "blocks/attn/qkv/kernel": P(None, "fsdp", None, "tensor"),
        "blocks/attn/proj/kernel": P(None, "tensor", "fsdp"),
        "blocks/mlp/fc1/kernel": P(None, "fsdp", "tensor"),
        "blocks/mlp/fc2/kernel": P(None, "tensor", "fsdp"),
    }
    assert {path: place.spec for path, place in places.items()} == {path: split.get(path, P()) for path in places}
    leaves = flatten_dict(shapes, sep="/")
    on_one = sum(np.prod(place.shard_shape(leaves[path].shape)) for path, place in places.items())
    assert on_one < 0.128 * 1_844_907_264  # of 8 devices


@pytest.mark.parametrize("mesh", [*(name for name in tiny.MESHES if name != "1"), "fsdp 4 x tensor 2"])
def test_eight_devices_agree_with_one(mesh):
    mesh = make_mesh(1, 4, 2) if mesh == "fsdp 4 x tensor 2" else tiny.mesh_of(mesh)
    placed = jax.device_put(params(), param_sharding(params(), mesh))
    output = jax.jit(on_mesh(CLIPVision(config()).apply, mesh))(
        {"params": placed}, shard_batch(np.asarray(PIXELS), mesh)
    )
    assert len(output.tokens.sharding.device_set) == 8
    assert relative(output, result()[0]) <= 2e-6
