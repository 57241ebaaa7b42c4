"""What the benchmarks time: the models at released or small sizes, random parameters and inputs, and one step of each.

Every case is a jitted step with its arguments, the floating-point operations of a batch, and a check against float32.
Computation has the type that is asked for, parameters are float32; the image tower's have the same type.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from benchmarks.flops import brain_vae_flops, clip_flops, mapper_flops
from synbrain_jax.checkpoint import Bundle
from synbrain_jax.config import Config, OptimizerConfig, Stage1Config, Stage2Config
from synbrain_jax.data.voxels import Voxels
from synbrain_jax.encoding import encode_batch
from synbrain_jax.models.brain_vae import BrainVAE, BrainVAEConfig, brain_vae_shapes
from synbrain_jax.models.clip_vision import CLIPVisionConfig, clip_vision_shapes
from synbrain_jax.models.semantic_to_neural import MapperConfig, SemanticToNeural, mapper_shapes
from synbrain_jax.sharding import make_mesh
from synbrain_jax.stages import brain_vae_loss, mapper_loss
from synbrain_jax.synthesis import jit_decoder
from synbrain_jax.training import step_program

QUICK = {"xla_gpu_autotune_level": "0"}  # of programs that are not timed


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Models and batches of all cases."""

    vae: BrainVAEConfig
    mapper: MapperConfig
    clip: CLIPVisionConfig
    voxels: int
    picture: int
    batches: dict[str, int]

    @classmethod
    def full(cls, platform: str = "gpu") -> "Sizes":
        """The released system on subject 1, in batches that fill an 80 GB GPU (the release trains with 24), or that a
        CPU takes some seconds for."""
        return cls(
            BrainVAEConfig.paper(),
            MapperConfig.paper(),
            CLIPVisionConfig.bigG_14(),
            voxels=15_724,
            picture=425,
            batches=CPU_BATCHES if platform == "cpu" else {**dict.fromkeys(CASES, 64), "mapper_train": 96},
        )

    @classmethod
    def tiny(cls) -> "Sizes":
        return cls(
            BrainVAEConfig.small(),
            MapperConfig.small(),
            CLIPVisionConfig(image_size=28, width=8, depth=2, heads=2, mlp_width=20, embed_dim=6),
            voxels=150,
            picture=40,
            batches=dict.fromkeys(CASES, 2),
        )


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing to time: a jitted `step(*args)`. That of training is given its own first output as first argument."""

    flops: float  # of one batch
    step: Callable
    args: tuple
    error: Callable[[Callable], float]
    """Of what `step`, compiled, computes: relative to float32."""
    trains: bool = False


def random_params(shapes: PyTree, seed: int | Array, dtype=jnp.float32) -> PyTree:
    """Every parameter drawn, also those that start at zero or one: normal with the variance 1 / fan-in."""

    def scale(path, numbers):
        name, stacked = path[-1].key, path[0].key == "blocks"
        fan_in = np.prod(numbers.shape[stacked:-1]) if name == "kernel" else 400
        return numbers * jnp.asarray(fan_in**-0.5, dtype) + (name == "scale")

    leaves, tree = jax.tree.flatten(shapes)
    ends = np.cumsum([leaf.size for leaf in leaves])

    @jax.jit
    def make(key):
        numbers = jax.random.normal(key, (ends[-1],), dtype)  # one program for all
        parts = [numbers[end - leaf.size : end].reshape(leaf.shape) for leaf, end in zip(leaves, ends, strict=True)]
        return jax.tree.map_with_path(scale, jax.tree.unflatten(tree, parts))

    # Its numbers depend on the compiler, and take it no time.
    return make(jax.random.key(seed, impl="rbg") if isinstance(seed, int) else seed)


def normal(seed: int, *shape: int, scale: float = 1.0) -> Array:
    return scale * jax.random.normal(jax.random.key(seed), shape)


def one_device() -> Mesh:
    return make_mesh(devices=jax.devices()[:1])


def relative_error(actual: PyTree, expected: PyTree) -> float:
    """Norm of the difference over the norm of what is expected, over all leaves."""

    def norm(tree):
        return np.sqrt(sum(float(jnp.square(leaf.astype(jnp.float32)).sum()) for leaf in jax.tree.leaves(tree)))

    difference = jax.tree.map(lambda a, b: a.astype(jnp.float32) - b.astype(jnp.float32), actual, expected)
    return float(norm(difference) / norm(expected))


def exactly(function: Callable, *args: Any) -> Any:
    """Of a float32 function, with products that are not rounded to fewer digits; compiled with little search."""
    with jax.default_matmul_precision("highest"):
        return jax.jit(function, compiler_options=QUICK)(*args)


def inference_case(make: Callable[[str], Callable], params: PyTree, inputs: Array, flops: float, dtype: str) -> Case:
    """`make(dtype)(params, inputs)`; two samples of what is timed are compared with float32."""

    def error(step):
        wanted = exactly(make("float32"), jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params), inputs[:2])
        return relative_error(step(params, inputs)[:2], wanted)

    return Case(len(inputs) * flops, jax.jit(make(dtype)), (params, inputs), error)


def vae_params(sizes: Sizes, seed: int) -> PyTree:
    return random_params(brain_vae_shapes(sizes.vae), seed)


def forward_case(sizes: Sizes, batch: int, seed: int, dtype: str) -> Case:
    """BrainVAE: encode, decode the mean."""

    def make(dtype):
        model = BrainVAE(dataclasses.replace(sizes.vae, dtype=dtype))
        return lambda params, fmri: model.apply({"params": params}, fmri).reconstruction

    flops = sum(brain_vae_flops(sizes.vae, sizes.voxels, logvar=False))
    return inference_case(make, vae_params(sizes, seed), normal(seed, batch, sizes.voxels), flops, dtype)


def encode_case(sizes: Sizes, batch: int, seed: int, dtype: str) -> Case:
    """BrainVAE: the posterior's mean."""

    def make(dtype):
        model = BrainVAE(dataclasses.replace(sizes.vae, dtype=dtype))
        return lambda params, fmri: model.apply({"params": params}, fmri, method="encode").mean

    flops = brain_vae_flops(sizes.vae, sizes.voxels, logvar=False)[0]
    return inference_case(make, vae_params(sizes, seed), normal(seed, batch, sizes.voxels), flops, dtype)


def train_case(
    make_loss: Callable,
    settings,
    shapes: PyTree,
    frozen: PyTree,
    data: dict[str, Array],
    flops: float,
    seed: int,
    dtype: str,
) -> Case:
    """A whole step as `training.fit` makes it; the check is of the gradient on two samples."""
    program = step_program(lambda key: random_params(shapes, key), make_loss(dtype), settings, one_device(), dtype)
    few = {name: rows[:2] for name, rows in data.items()}

    def error(_):
        def gradient(type_):
            return lambda params, frozen, few: jax.grad(lambda p: make_loss(type_)(p, frozen, few, None)[0])(params)

        params = random_params(shapes, seed)
        ours = jax.jit(gradient(dtype), compiler_options=QUICK)(params, frozen, few)
        return relative_error(ours, exactly(gradient("float32"), params, frozen, few))

    key = jax.random.key(seed)
    batch = len(data["tokens"])
    return Case(3 * batch * flops, program.step, (program.init(key), frozen, data, key), error, trains=True)


def vae_train_case(sizes: Sizes, batch: int, seed: int, dtype: str) -> Case:
    """Stage 1 as configs/paper.py has it: sampled posterior, three losses, AdamW."""
    settings = Stage1Config(loss_scale="sum", clip_weight=1000.0)

    def make_loss(dtype):
        return brain_vae_loss(BrainVAE(dataclasses.replace(sizes.vae, dtype=dtype)), settings)

    data = {
        "fmri": normal(seed, batch, sizes.voxels, scale=0.3),
        "tokens": normal(seed + 1, batch, sizes.mapper.tokens, sizes.mapper.width),
    }
    flops = sum(brain_vae_flops(sizes.vae, sizes.voxels))
    return train_case(make_loss, settings, brain_vae_shapes(sizes.vae), {}, data, flops, seed, dtype)


def mapper_train_case(sizes: Sizes, batch: int, seed: int, dtype: str) -> Case:
    """Stage 2 on latents that are there: clipping, AdamW, moving average."""
    settings = Stage2Config(optimizer=OptimizerConfig(clip_norm=1.0, ema_decay=0.9999))

    def make_loss(dtype):
        mapper = SemanticToNeural(dataclasses.replace(sizes.mapper, dtype=dtype))
        return mapper_loss(mapper, BrainVAE(sizes.vae), settings)

    shape = (batch, sizes.mapper.tokens, sizes.mapper.width)
    data = {"tokens": normal(seed, *shape), "latent": normal(seed + 1, *shape), "fmri": jnp.zeros((batch, 1))}
    return train_case(
        make_loss, settings, mapper_shapes(sizes.mapper), {}, data, mapper_flops(sizes.mapper), seed, dtype
    )


def make_bundle(sizes: Sizes, params: PyTree, dtype: str) -> Bundle:
    config = Config(
        name="benchmark",
        brain_vae=dataclasses.replace(sizes.vae, dtype=dtype),
        mapper=dataclasses.replace(sizes.mapper, dtype=dtype),
    )
    order = np.arange(sizes.voxels, dtype=np.int32)
    voxels = Voxels("benchmark", "none", ijk=None, volume_shape=None, affine=None, ncsnr=None, order=order)
    return Bundle.uncorrected(config, params, voxels, "none", None)


def system_params(sizes: Sizes, seed: int) -> PyTree:
    return {"mapper": random_params(mapper_shapes(sizes.mapper), seed), "brain_vae": vae_params(sizes, seed + 1)}


def synthesis_case(sizes: Sizes, batch: int, seed: int, dtype: str) -> Case:
    """What `SynBrain.synthesize` has the device do for a batch of tokens that is there."""
    mesh, bundles = one_device(), {name: make_bundle(sizes, {}, name) for name in ("bfloat16", "float32")}
    tokens = normal(seed, batch, sizes.mapper.tokens, sizes.mapper.width)
    rest = np.arange(batch, dtype=np.int32), jax.random.key(0), np.zeros(tokens.shape[1:], np.float32)

    def make(dtype):
        decode = jit_decoder(bundles[dtype], mesh)
        return lambda params, tokens: decode(
            params, tokens, rest[0][: len(tokens)], rest[1], rest[2], k=1, varied=False
        )[:, 0]

    flops = mapper_flops(sizes.mapper) + brain_vae_flops(sizes.vae, sizes.voxels)[1]
    return inference_case(make, system_params(sizes, seed), tokens, flops, dtype)


def clip_case(sizes: Sizes, batch: int, seed: int, dtype: str) -> Case:
    """8-bit pictures to tokens, with the resize; the weights have the type of the computation."""
    params = random_params(clip_vision_shapes(sizes.clip), seed, jnp.dtype(dtype))
    side = sizes.picture
    pictures = jax.random.randint(jax.random.key(seed), (batch, side, side, 3), 0, 256, jnp.int32).astype(jnp.uint8)

    def make(dtype):
        config = dataclasses.replace(sizes.clip, dtype=dtype)
        return lambda params, pictures: encode_batch(config, params, pictures)

    return inference_case(make, params, pictures, clip_flops(sizes.clip), dtype)


CASES = {
    "forward": forward_case,
    "encode": encode_case,
    "vae_train": vae_train_case,
    "mapper_train": mapper_train_case,
    "synthesis": synthesis_case,
    "clip": clip_case,
}

CPU_BATCHES = {"forward": 1, "encode": 4, "vae_train": 1, "mapper_train": 4, "synthesis": 4, "clip": 1}
