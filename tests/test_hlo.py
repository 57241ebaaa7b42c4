"""Reading compiled programs: counts against closed forms, on this machine's compiler and on lines of TPUs' and GPUs'.

And what both stages' steps must not contain: the automatic gradients of pooling and resizing are scatters, and that of
a dilated convolution becomes a scalar loop.
"""

import itertools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from synbrain_jax.config import Config, Stage1Config, Stage2Config
from synbrain_jax.models.brain_vae import BrainVAEConfig
from synbrain_jax.models.semantic_to_neural import MapperConfig
from synbrain_jax.plan.hlo import Collective, Program, array_bytes, collectives, main_memory_bytes
from synbrain_jax.plan.machines import machine
from synbrain_jax.plan.programs import Planned, plan_programs
from synbrain_jax.sharding import make_mesh

# The released models' structure, narrow.
NARROW = Config(
    name="narrow",
    brain_vae=BrainVAEConfig(
        pool_length=64,
        channels=4,
        channel_mult=(2,),
        num_res_blocks=1,
        latent_tokens=4,
        latent_dim=8,
        projector_width=16,
        dtype="bfloat16",
    ),
    mapper=MapperConfig(tokens=4, width=8, depth=1, heads=2, dtype="bfloat16"),
    stage1=Stage1Config(batch_size=8),
    stage2=Stage2Config(batch_size=8, target="trial"),
)
VOXELS = 97  # pooled and resized, as no power of two


def compiled(function, *shapes, **how) -> Program:
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return Program(jax.jit(function, **how).lower(*args).compile().as_text())


# ---- counting --------------------------------------------------------------------------------------------------------


def test_products_count_twice_their_multiplications():
    program = compiled(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (3, 5, 7), (3, 7, 11))
    assert program.flops() == 2 * 3 * 5 * 7 * 11


@pytest.mark.parametrize(
    ("width", "stride", "pad", "holes", "spread"),
    [(3, 1, (1, 1), 1, 1), (7, 2, (3, 3), 1, 1), (5, 1, (0, 0), 1, 3), (4, 1, (2, 5), 2, 1), (3, 3, (4, 0), 2, 2)],
)
def test_convolutions_count_what_meets_what(width, stride, pad, holes, spread):
    length, channels, features, batch = 19, 4, 6, 2

    def conv(x, kernel):
        return lax.conv_general_dilated(
            x, kernel, (stride,), [pad], (holes,), (spread,), dimension_numbers=("NWC", "WIO", "NWC")
        )

    x, kernel = (batch, length, channels), (width, channels, features)
    # The number of products, by convolving ones with ones.
    met = conv(jnp.ones((1, length, 1)), jnp.ones((width, 1, 1))).sum()
    assert compiled(conv, x, kernel).flops() == 2 * batch * channels * features * float(met)


def test_the_gradient_of_a_convolution_counts_as_twice_itself():
    def conv(x, kernel):
        return lax.conv_general_dilated(x, kernel, (1,), [(1, 1)], dimension_numbers=("NWC", "WIO", "NWC"))

    shapes = (2, 32, 8), (3, 8, 8)
    forward = compiled(conv, *shapes).flops()
    gradient = compiled(jax.grad(lambda x, kernel: (conv(x, kernel) ** 2).sum(), (0, 1)), *shapes).flops()
    assert gradient == 3 * forward > 0


def test_the_body_of_a_loop_counts_as_often_as_it_runs():
    def inner(x, kernel):
        return lax.scan(lambda x, _: (jnp.tanh(x @ kernel), None), x, None, length=5)[0]

    def outer(x, kernel):
        return lax.scan(lambda x, _: (inner(x, kernel), None), x, None, length=3)[0]

    program = compiled(outer, (4, 8), (8, 8))
    assert program.flops() == 15 * 2 * 4 * 8 * 8
    lowered = jax.jit(outer).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in ((4, 8), (8, 8))))
    assert lowered.compile().cost_analysis()["flops"] < program.flops(), "or XLA counts loops by now"


def test_a_step_counts_as_its_mathematics():
    """XLA's convolutions are without padding, which at this width is much."""
    (planned,) = plan_programs(NARROW, make_mesh(devices=jax.devices()[:1]), VOXELS, 8, ("stage1",))
    found = Program(planned.lower().compile().as_text()).flops()
    assert 0.9 * planned.useful_flops < found <= planned.useful_flops


NAMES = ("stage1", "stage2", "synthesis")


def test_traffic_is_what_an_instruction_reads_and_writes():
    program = compiled(lambda a, b: jnp.exp(a) + b, (64, 64), (64, 64))
    assert sum(one.times * program.traffic(one) for one in program.executed()) == 3 * 64 * 64 * 4


def test_of_an_array_that_is_sliced_the_slice_is_read():
    def pick(table, at):
        return jnp.tanh(lax.dynamic_slice(table, (at[0].astype(jnp.int32), 0), (2, 128)))

    program = compiled(pick, (1000, 128), (1,))
    moved = sum(one.times * program.traffic(one) for one in program.executed())
    assert 2 * 2 * 128 * 4 <= moved < 10 * 2 * 128 * 4


def test_of_an_array_that_is_filled_in_place_the_piece_is_written():
    def fill(rows):
        return lax.scan(lambda state, row: (state, jnp.sin(row)), 0, rows)[1]

    program = compiled(fill, (500, 64))
    moved = sum(one.times * program.traffic(one) for one in program.executed())
    assert 2 * 500 * 64 * 4 <= moved < 10 * 500 * 64 * 4


def test_shapes_have_bytes():
    assert array_bytes("(f32[2,3]{1,0:T(8,128)}, bf16[4]{0}, pred[5]{0}, u32[])") == 24 + 8 + 5 + 4
    assert array_bytes("f8e4m3fn[6]{0}") == 6
    assert main_memory_bytes("(f32[2,3]{1,0:T(8,128)S(1)}, bf16[4]{0:T(128)})") == 8


# ---- collectives -----------------------------------------------------------------------------------------------------

MESH = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))


def over_mesh(function, given, wanted):
    """The program of `function` of a float32 [8, 16] array over 8 devices."""
    mapped = jax.shard_map(function, mesh=MESH, in_specs=given, out_specs=wanted, check_vma=False)
    array = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=NamedSharding(MESH, given))
    return Program(jax.jit(mapped).lower(array).compile().as_text())


@pytest.mark.parametrize(
    ("function", "given", "wanted", "expected"),
    [
        (lambda x: lax.psum(x, ("x", "y")), P("x", "y"), P(), Collective("all-reduce", 2 * 8 * 4, 8, 1)),
        (lambda x: lax.psum(x, "y"), P("x", "y"), P("x"), Collective("all-reduce", 2 * 8 * 4, 2, 1)),
        (lambda x: lax.all_gather(x, "x"), P("x"), P(), Collective("all-gather", 8 * 16 * 4, 4, 1)),
        (
            lambda x: lax.psum_scatter(x, "x", tiled=True),
            P(),
            P("x"),
            Collective("reduce-scatter", 8 * 16 * 4, 4, 1),
        ),
        (
            lambda x: lax.scan(lambda s, _: (lax.psum(s, "x") * 0.5, None), x, None, length=6)[0],
            P("x"),
            P("x"),
            Collective("all-reduce", 2 * 16 * 4, 4, 6),
        ),
    ],
)
def test_collectives_are_counted(function, given, wanted, expected):
    (found,) = collectives(over_mesh(function, given, wanted), 8)
    # XLA may do without reduce-scatter on CPUs.
    kinds = {expected.kind, "all-reduce"} if expected.kind == "reduce-scatter" else {expected.kind}
    assert found.kind in kinds
    assert (found.bytes, found.group, found.times) == (expected.bytes, expected.group, expected.times)


# ---- lines that only TPUs and GPUs have ------------------------------------------------------------------------------

LINES = Path(__file__).parent / "golden" / "hlo"
CONVOLUTION, BATCHED = 2 * 3 * 8 * 8 * (3 * 16 - 2), 2 * 3 * 16 * 4 * 8


def test_lines_of_tpus():
    program = Program((LINES / "tpu.txt").read_text())
    assert program.flops() == CONVOLUTION + BATCHED
    # A collective that is spread over fusions is one; a loop without a known count runs by its counter.
    assert collectives(program, 8) == [
        Collective("all-gather", 12 * 64 * 2, 4, 1),
        Collective("all-reduce", 16, 4, 6),  # 0, 2, ... 10
    ]
    moved = {one.instruction.name: program.traffic(one) for one in program.executed() if program.traffic(one)}
    x = 3 * 16 * 8 * 2
    assert moved == {
        "slice-start": 2 * 8 * 8 * 4,
        "copy-start": x,
        "fusion.1": x,
        "first": 384,
        "second": 384,
        "next": 12,
    }
    fusion = next(one.instruction for one in program.executed() if one.instruction.name == "fusion.1")
    assert program.flops_inside(fusion) == CONVOLUTION


def test_lines_of_gpus():
    program = Program((LINES / "gpu.txt").read_text())
    # Of 8 places with 3 taps each, one tap is beyond the edge.
    assert program.flops() == 3 * (2 * 3 * 6 * 8 * (8 * 3 - 1)) + 2 * 24 * 6 * 8
    counts = program.counts()
    assert counts["__cudnn$convForward"] == counts["__cublas$gemm"] == 1
    assert counts["convolution"] == 0


# ---- what must not be there ------------------------------------------------------------------------------------------


def unwelcome(lowered_text: str) -> set[str]:
    """Scatters, loops, sorts, window reductions and dilated convolutions of a lowered program."""
    operations = set(re.findall(r"stablehlo\.(\w+)", lowered_text))
    found = operations & {"scatter", "select_and_scatter", "while", "sort", "reduce_window"}
    dilated = re.findall(r"[lr]hs_dilate = \[[^\]]*\]", lowered_text)
    return found | {one for one in dilated if set(re.findall(r"\d+", one)) != {"1"}}


def narrow_programs(devices) -> list[Planned]:
    return plan_programs(NARROW, make_mesh(devices=devices), VOXELS, 8, NAMES)


def test_no_scatter_loop_or_dilated_convolution_is_lowered_for_accelerators():
    for planned, platform in itertools.product(narrow_programs(jax.devices()[:1]), ("tpu", "cuda")):
        text = planned.lower(lowering_platforms=(platform,)).as_text()
        assert "stablehlo.convolution" in text
        assert unwelcome(text) == set(), (planned.name, platform)


def test_the_textbook_forms_would_be_found():
    x = jnp.ones((1, 8, 8))

    def gathered(x):
        return (x[:, np.array([0, 0, 1, 5])] ** 2).sum()

    def transposed(kernel):
        image, dimensions = jnp.ones((1, 8, 8)), ("NWC", "WIO", "NWC")
        return lax.conv_general_dilated(image, kernel, (1,), [(3, 4)], (2,), dimension_numbers=dimensions).sum()

    def pooled(x):
        return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 1), (1, 2, 1), "VALID").sum()

    gradients = [jax.jit(jax.grad(one)) for one in (gathered, transposed, pooled)]
    looped = jax.jit(lambda x: lax.fori_loop(0, 9, lambda _, y: y * x, x))
    assert [bool(unwelcome(one.lower(x).as_text())) for one in (*gradients, looped)] == [True] * 4


PLUGINS = {"v5e:2x2": "libtpu", "h100:2": "jax_cuda12_plugin"}


@pytest.mark.parametrize("topology", PLUGINS)
def test_no_scatter_loop_or_naive_convolution_is_compiled_for_accelerators(topology):
    pytest.importorskip(PLUGINS[topology])
    target = machine(topology)
    for planned in narrow_programs(target.devices()):
        program = Program(planned.lower().compile().as_text())
        counts = program.counts()
        assert not {"scatter", "while", "select-and-scatter", "sort"} & counts.keys(), planned.name
        library = sum(n for name, n in counts.items() if name.startswith("__cudnn$conv"))
        assert library if topology.startswith("h100") else counts["convolution"]
        if topology.startswith("h100"):
            assert counts["convolution"] == 0, "a convolution that cuDNN does not compute"
        assert program.flops() == pytest.approx(planned.useful_flops / target.size, rel=0.3)
