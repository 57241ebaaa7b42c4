"""`synbrain plan`: the mathematics against the release's published counts, times and memory against closed forms."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import tiny
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from synbrain_jax import cli
from synbrain_jax.config import Config
from synbrain_jax.errors import InputError
from synbrain_jax.models.brain_vae import BrainVAE, BrainVAEConfig, brain_vae_shapes
from synbrain_jax.models.semantic_to_neural import MapperConfig, SemanticToNeural, mapper_shapes
from synbrain_jax.plan import Line, _smallest, plan
from synbrain_jax.plan.machines import CHIPS, GIB, SLICES, Chip, Machine, machine, machines
from synbrain_jax.plan.programs import bytes_per_device, plan_programs, product_flops
from synbrain_jax.plan.roofline import estimate
from synbrain_jax.sharding import make_mesh

SHAPE = jax.ShapeDtypeStruct
VOXELS = 15_724

# ---- arithmetic ------------------------------------------------------------------------------------------------------


def test_the_released_models_need_the_operations_that_were_counted_in_the_release():
    """GFLOP a sample of the PyTorch release: encoder 157.60, decoder 240.17, mapper 141.29 (convolutions, matrix
    products and linear layers; the mapper's conditioning, 0.27, is once a batch here)."""
    vae, mapper = BrainVAE(BrainVAEConfig.paper()), SemanticToNeural(MapperConfig.paper())
    shapes, fmri, tokens = brain_vae_shapes(vae.config), SHAPE((2, VOXELS), "float32"), SHAPE((2, 256, 1664), "float32")

    def encode(params, fmri):
        posterior = vae.apply({"params": params}, fmri, method="encode")
        return posterior.mean, posterior.logvar

    def decode(params, latent):
        return vae.apply({"params": params}, latent, VOXELS, method="decode")

    def synthesise(params, tokens):
        return mapper.apply({"params": params}, tokens)

    found = [
        product_flops(encode, shapes, fmri),
        product_flops(lambda params, fmri: encode(params, fmri)[0], shapes, fmri),
        product_flops(decode, shapes, tokens),
        product_flops(synthesise, mapper_shapes(mapper.config), tokens),
    ]
    # Without the variance, the projector to it is not needed: 8.19.
    assert [flops / 2e9 for flops in found] == pytest.approx([157.60, 157.60 - 8.19, 240.17, 141.15], abs=0.02)


def test_what_is_not_needed_and_what_is_not_a_product_does_not_count():
    def function(a, b):
        unused = a @ a
        return jnp.tanh(a @ b), unused

    a, b = SHAPE((4, 4), "float32"), SHAPE((4, 3), "float32")
    assert product_flops(lambda a, b: function(a, b)[0], a, b) == 2 * 4 * 4 * 3
    assert product_flops(function, a, b) == 2 * 4 * 4 * (3 + 4)


def test_loops_and_recomputation_count():
    def loop(x):
        return jax.lax.scan(lambda x, _: (jax.checkpoint(lambda x: jnp.sin(x @ x))(x), None), x, None, length=5)[
            0
        ].sum()

    x = SHAPE((4, 4), "float32")
    assert product_flops(loop, x) == 5 * 2 * 4**3
    assert product_flops(jax.grad(loop), x) == 5 * 2 * 4**3 * 4  # forward, forward again, two products backward


def test_rematerialisation_is_not_useful():
    mesh = make_mesh(devices=jax.devices()[:1])
    plain = tiny.config()
    again = dataclasses.replace(plain, brain_vae=dataclasses.replace(plain.brain_vae, remat=True, attention_chunk=8))
    one, other = (plan_programs(config, mesh, tiny.VOXELS, 8, ("stage1",))[0] for config in (plain, again))
    assert one.useful_flops == other.useful_flops > 0


# ---- machines --------------------------------------------------------------------------------------------------------


def test_names_of_machines():
    assert machine("v5e:4x4") == Machine(CHIPS["v5e"], (4, 4))
    assert machine("v5p:4x4x4").size == 64
    assert str(machine("H100:8")) == "h100:8"
    sizes = [each.size for each in machines(CHIPS["v5e"])]
    assert sizes == sorted(sizes)
    assert sizes[-1] == 256


@pytest.mark.parametrize("topology", ["v5e", "v5e:3x3", "v5e:", "v9:2x2", "h100:3", "v5e:4x4x", ""])
def test_an_unknown_machine_is_named_with_what_is_known(topology):
    with pytest.raises(InputError, match=f"--topology {topology}: expected"):
        machine(topology)


@pytest.mark.parametrize(("topology", "extra"), [("v5e:2x2", "tpu"), ("h100:2", "cuda12")])
def test_a_missing_compiler_is_one_line_that_names_the_extra(topology, extra, monkeypatch):
    def missing(**_):
        raise NotImplementedError("topology not implemented\nand more")  # JAX's, where a plugin is not installed

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    with pytest.raises(InputError, match=rf"pip install -e '\.\[{extra}\]'") as caught:
        machine(topology).devices()
    assert "\n" not in str(caught.value)


def test_collectives_take_what_their_bytes_take_on_the_links():
    v5e, pod = machine("v5e:2x4"), machine("v5e:16x16")
    # Two open axes at 50 GB/s; two rings at 100 GB/s.
    assert v5e.seconds("all-gather", 8 * 10**9, 8) == pytest.approx(7 / 8 * 8 / 100)
    assert v5e.seconds("reduce-scatter", 8 * 10**9, 8) == pytest.approx(7 / 8 * 8 / 100)
    assert v5e.seconds("all-reduce", 8 * 10**9, 8) == pytest.approx(2 * 7 / 8 * 8 / 100)
    assert pod.seconds("all-reduce", 8 * 10**9, 256) == pytest.approx(2 * 255 / 256 * 8 / 200)
    # A part of the chips uses one axis.
    assert pod.seconds("all-gather", 8 * 10**9, 16) == pytest.approx(15 / 16 * 8 / 100)
    assert v5e.seconds("collective-permute", 1 * 10**9, 2) == pytest.approx(1 / 50 / 2)
    assert v5e.seconds("all-reduce", 8 * 10**9, 1) == 0
    # Every chip keeps 1/n and sends the rest: on a ring of 16, on average 4 steps far, over both its directions.
    assert pod.seconds("all-to-all", 1 * 10**9, 256) == pytest.approx(2 * 16 / 4 / 100)
    node, nodes = machine("h100:8"), machine("h100:32")
    assert node.seconds("all-reduce", 9 * 10**9, 8) == pytest.approx(2 * 7 / 8 * 9 / 450)
    # Inside the host as before; then an eighth of the array through each network card.
    assert nodes.seconds("all-gather", 8 * 10**9, 32) == pytest.approx(7 / 8 * 8 / 450 + 3 / 4 * 1 / 50)


def test_a_v5e_pod_reduces_at_the_published_rate():
    """51.2 TB/s for 256 chips: each has a two-hundredth of a terabyte a second in either direction."""
    assert 256 / machine("v5e:16x16").seconds("all-gather", 1 * 10**12, 256) == pytest.approx(51.2, rel=0.01)


# ---- programs --------------------------------------------------------------------------------------------------------


def test_bytes_on_each_device():
    mesh = make_mesh(4, 2, 1)
    split, whole = NamedSharding(mesh, P("data", "fsdp")), NamedSharding(mesh, P())
    tree = [SHAPE((8, 6), "float32", sharding=split), SHAPE((3,), "bfloat16", sharding=whole)]
    assert bytes_per_device(tree) == 8 * 6 * 4 // 8 + 3 * 2


@pytest.fixture(scope="module")
def on_cpus():
    """Eight of this machine's virtual devices as a machine, with rates that make every figure visible."""
    chip = Chip("cpu", "cpu", memory=1.0 * GIB, bandwidth=1e9, bfloat16=2e9, float32=1e9, link=1e9, ring=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CHIPS, "cpu", chip)
        patch.setitem(SLICES, "cpu", ("1", "2", "4", "8"))
        patch.setattr(Machine, "devices", lambda self: jax.devices()[: self.size])
        yield Machine(chip, (8,))


def test_an_estimate_is_the_roofline_of_its_parts(on_cpus):
    mesh = make_mesh()
    (planned,) = plan_programs(tiny.config(), mesh, tiny.VOXELS, 8, ("stage2",))
    found = estimate(planned, planned.lower().compile(), on_cpus)
    assert found.arithmetic_seconds == found.flops / 1e9
    assert found.traffic_seconds == found.traffic / 1e9
    # Some instructions are bound by the one and some by the other.
    assert max(found.arithmetic_seconds, found.traffic_seconds) < found.device_seconds
    assert found.device_seconds < found.arithmetic_seconds + found.traffic_seconds
    assert found.seconds == (max(found.device_seconds, found.link_seconds), found.device_seconds + found.link_seconds)
    assert found.utilisation == pytest.approx(found.useful_flops / 1e9 / found.seconds[0])
    # Eight devices share the work, and gradients are reduced.
    assert found.useful_flops == planned.useful_flops / 8
    assert found.flops == pytest.approx(found.useful_flops, rel=0.25)
    assert found.memory.arguments == pytest.approx(bytes_per_device(planned.arguments), rel=0.02)
    assert found.memory.parameters == bytes_per_device(planned.arguments[0].params)
    # What conditions the whole batch has gradients that no sample adds to, so that they need not be reduced.
    shared = ("time", "modulation", "final_modulation")
    reduced = sum(
        leaf.size
        for path, leaf in jax.tree.leaves_with_path(planned.parameters)
        if not {key.key for key in path} & set(shared)
    )
    sent = sum(size for kind, (_, size) in found.collectives.items() if kind in ("all-reduce", "reduce-scatter"))
    assert 4 * reduced <= sent < 2 * 4 * reduced


def test_a_plan_is_a_table(on_cpus):
    text = plan(tiny.config(), "cpu:8", voxels=tiny.VOXELS, samples=3, programs=("stage2", "synthesis"))
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in text.splitlines() if line.startswith("|")}
    assert [cell.strip() for cell in rows[""]] == ["stage2", "synthesis"]
    assert [cell.strip() for cell in rows["samples a call, on all chips"]] == ["8", "8"]  # rounded up to the devices
    assert [cell.strip() for cell in rows["fits"]] == ["yes", "yes"]
    assert rows["hours for the run"][0].strip() == "0.00"
    assert "mesh data 8 x fsdp 1 x tensor 1, 40 voxels" in text
    assert "Smallest that should fit with these batches, not compiled: stage2 cpu:1" in text


def test_what_does_not_fit_is_said(on_cpus, monkeypatch):
    monkeypatch.setitem(CHIPS, "cpu", dataclasses.replace(on_cpus.chip, memory=1000.0))
    text = plan(tiny.config(), "cpu:8", voxels=tiny.VOXELS, programs=("synthesis",))
    assert "| fits | no |" in text
    assert "synthesis: none with this batch" in text


def test_what_needs_more_than_a_chip_has_is_shared_by_more_chips(on_cpus):
    """At a memory between what one of eight and one of four devices needs, eight is the smallest machine."""
    mesh = make_mesh(2, 1, 1, devices=jax.devices()[:2])
    (planned,) = plan_programs(tiny.config(), mesh, tiny.VOXELS, 8, ("stage2",))
    here = Machine(on_cpus.chip, (2,))
    found = estimate(planned, planned.lower().compile(), here)
    two = dataclasses.replace(found.memory, temporaries=2**20)  # a megabyte of activations on each of two
    line = Line(planned, dataclasses.replace(found, memory=two), "", 0.0)
    for memory, expected in ((2**20, "cpu:4"), (2**19, "cpu:8"), (2**23, "cpu:1")):
        machine_then = Machine(dataclasses.replace(on_cpus.chip, memory=float(memory)), (2,))
        (sentence,) = _smallest([line], machine_then, tiny.config(), tiny.VOXELS)
        assert f"stage2 {expected} (" in sentence


@pytest.mark.parametrize(
    ("message", "cell"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 48.00G of 15.75G hbm.", "no: needs 48.00GiB"),
        ("RESOURCE_EXHAUSTED: out of memory", "no"),
        ("INTERNAL: no tiles | for a dot\nand a stack", "XLA fails: INTERNAL: no tiles / for a dot"),
    ],
)
def test_a_refusal_of_the_compiler_is_a_cell(message, cell, on_cpus, monkeypatch):
    def refuse(_):
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    text = plan(tiny.config(), "cpu:8", voxels=tiny.VOXELS, programs=("synthesis",))
    assert f"| fits | {cell} |" in text


def test_batches_and_programs_that_cannot_be(on_cpus):
    with pytest.raises(InputError, match="must be a multiple of 8"):
        plan(tiny.config(stage1=dataclasses.replace(tiny.config().stage1, batch_size=12)), "cpu:8")
    with pytest.raises(InputError, match="expected some of stage1 stage2 synthesis encoding"):
        plan(tiny.config(), "cpu:8", programs=("stage3",))


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """What the command hands over."""
    found = {}

    def record(config, topology, **options):
        found.update(config=config, topology=topology, **options)
        return "a table"

    monkeypatch.setattr("synbrain_jax.plan.plan", record)
    return found


def test_the_command_reads_an_experiment_and_changes_it(asked, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(Path(__file__).parents[1])
    changes = ["stage1.batch_size=48", "brain_vae.remat=true", "stage1.select=val/mse", "stage1.contrast_size=null"]
    cli.main(["plan", "paper", "--topology", "v5e:4x4", "--change", *changes, "--programs", "stage1"])
    assert capsys.readouterr().out == "a table\n"
    assert (asked["topology"], asked["programs"], asked["voxels"]) == ("v5e:4x4", ("stage1",), VOXELS)
    config = asked["config"]
    assert (config.stage1.batch_size, config.brain_vae.remat, config.stage1.select) == (48, True, "val/mse")
    assert config.stage1.contrast_size is None
    assert config.stage2.batch_size == 24

    file = tmp_path / "config.json"
    file.write_text(tiny.config().to_json())
    cli.main(["plan", str(file), "--topology", "h100:1"])
    assert asked["config"] == Config.from_json(json.dumps(dataclasses.asdict(tiny.config())))
    cli.main(["plan", "configs/haxby.py", "--topology", "h100:1"])
    assert asked["config"].name == "haxby"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["papper"], "papper: there is no experiment configs/papper.py; did you mean 'paper'"),
        (["paper", "--change", "stage1.steps"], "--change stage1.steps: expected a setting and a value"),
        (["paper", "--change", "stage1.setps=3"], "stage1.setps is not a known setting; did you mean 'steps'"),
        (["paper", "--change", "stage1.steps=many"], "stage1.steps is 'many'; expected int"),
    ],
)
def test_mistakes_are_one_line(arguments, message, asked, capsys, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", *arguments, "--topology", "v5e:2x2"])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not asked
