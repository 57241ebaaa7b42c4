"""Training steps of narrow models, compiled over eight devices, and what their programs send between these.

Sizes tell the arrays apart: each device has 5 samples, and no parameter has a size that 5 divides, so whatever is sent
in a multiple of 5 numbers is an activation. `python -m tests.compiled_steps tpu` lists what a TPU v5e would send.
"""

import math
import re
import sys
from collections import Counter
from typing import NamedTuple

import jax
import jax.numpy as jnp

from synbrain_jax import sharding
from synbrain_jax.config import OptimizerConfig, Stage1Config, Stage2Config
from synbrain_jax.models.brain_vae import BrainVAE, BrainVAEConfig
from synbrain_jax.models.semantic_to_neural import MapperConfig, SemanticToNeural
from synbrain_jax.sharding import batch_sharding, make_mesh, replicated
from synbrain_jax.stages import brain_vae_loss, mapper_loss
from synbrain_jax.training import StepProgram, step_program

BATCH, TOKENS, VOXELS = 40, 8, 96
LEAST_OVER_DATA = 512  # the models are small
# Of the latent. For TPUs, XLA leaves sums of small arrays as they are.
WIDTHS = {"cpu": 32, "tpu": 256}
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def devices(target: str) -> list[jax.Device]:
    """Eight: of this machine ("cpu"), or a description of TPU v5e chips ("tpu", for which libtpu compiles)."""
    if target == "cpu":
        return jax.devices()
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices


def program(
    stage: str, mesh: jax.sharding.Mesh, width: int = WIDTHS["cpu"], dtype: str = "float32", **settings
) -> tuple[StepProgram, tuple]:
    """The step of a stage, and shapes of its other arguments: frozen parameters, batch (unless `batch_size` is
    given, of BATCH samples for each of the parts that `accumulate` takes), key."""
    sizes = dict(latent_tokens=TOKENS, latent_dim=width, pool_length=32, channels=8, channel_mult=(2,))
    vae = BrainVAE(BrainVAEConfig.small(**sizes, projector_width=2 * width, dtype=dtype))
    settings["optimizer"] = OptimizerConfig(clip_norm=1.0, ema_decay=0.9)
    rows = settings.setdefault("batch_size", BATCH * settings.get("accumulate", 1))
    shapes = {"tokens": (rows, TOKENS, width)}
    if stage == "stage1":
        shapes["fmri"] = (rows, VOXELS)
        settings = Stage1Config(**settings)
        init, loss = lambda key: vae.init(key, jnp.zeros((1, 8)))["params"], brain_vae_loss(vae, settings)
    else:
        mapper = SemanticToNeural(MapperConfig.small(tokens=TOKENS, width=width, dtype=dtype))
        shapes |= {"latent": shapes["tokens"], "fmri": (rows, VOXELS)}
        settings = Stage2Config(**settings)
        init, loss = (
            lambda key: mapper.init(key, jnp.zeros((1, TOKENS, width)))["params"],
            mapper_loss(mapper, vae, settings),
        )
    batch = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=batch_sharding(mesh)) for name, shape in shapes.items()
    }
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=replicated(mesh))
    return step_program(init, loss, settings, mesh, dtype), ({}, batch, key)


class Sent(NamedTuple):
    """What one collective operation of a program puts out."""

    kind: str
    type: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def sent(text: str) -> list[Sent]:
    """All results of collective operations in a compiled program. A sum inside a computation that keeps a part of it,
    as TPUs have it, counts as "reduce-scatter", with the shape of the whole."""
    found, scattered = [], False
    for line in text.splitlines():
        if line.endswith("{"):  # a computation begins
            scattered = "all-reduce-scatter" in line.split("(")[0]
        one = re.search(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(", line)
        if one:
            kind = "reduce-scatter" if scattered else one[2]
            for type_, shape in re.findall(r"(\w+)\[([\d,]*)\]", one[1]):
                found.append(Sent(kind, type_, tuple(int(n) for n in shape.split(",") if n)))
    return found


def compiled(stage: str, target: str, sizes: tuple[int, int, int], dtype: str = "float32", **settings) -> str:
    """The text of a step's program."""
    mesh = make_mesh(*sizes, devices=devices(target))
    steps, rest = program(stage, mesh, WIDTHS[target], dtype, **settings)
    return steps.step.lower(steps.target, *rest).compile().as_text()


if __name__ == "__main__":
    sharding.LEAST_OVER_DATA = LEAST_OVER_DATA
    for name in ("stage1", "stage2"):
        for mesh_sizes in ((8, 1, 1), (1, 8, 1), (2, 4, 1)):
            print(name, mesh_sizes)
            for what, count in sorted(Counter(sent(compiled(name, sys.argv[1], mesh_sizes))).items()):
                print(f"  {count} {what.kind} {what.type}{list(what.shape)}")
