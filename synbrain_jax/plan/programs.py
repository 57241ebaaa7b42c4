"""What a run compiles, with the shapes it will have: the steps of both stages, synthesis, and the image tower.

Each comes from the very function that training, `synthesize` and `encode-images` jit. Nothing is computed here.

Shape letters: b batch, v voxels, t tokens, d token width.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import PyTree

from synbrain_jax.checkpoint import Bundle
from synbrain_jax.config import Config
from synbrain_jax.data.voxels import Voxels
from synbrain_jax.encoding import encode_batch, jit_encoder
from synbrain_jax.models.brain_vae import BrainVAE, brain_vae_shapes
from synbrain_jax.models.clip_vision import CLIPVisionConfig, clip_vision_shapes
from synbrain_jax.models.semantic_to_neural import SemanticToNeural, mapper_shapes
from synbrain_jax.sharding import batch_parts, batch_sharding, param_sharding, replicated
from synbrain_jax.stages import brain_vae_loss, mapper_loss
from synbrain_jax.synthesis import jit_decoder
from synbrain_jax.training import step_program

NAMES = ("stage1", "stage2", "synthesis", "encoding")
_PICTURE = 425  # pixels a side, as in the Natural Scenes Dataset


@dataclasses.dataclass(frozen=True, eq=False)
class Planned:
    """One jitted function and the shapes of its arguments, placed on a mesh."""

    name: str
    function: Callable
    arguments: tuple
    samples: int
    """Of one call, on all devices."""
    calls: int | None
    """How often a whole run calls it; None: as often as there are pictures."""
    parameters: PyTree
    """Of the arguments, those that the model consists of."""
    mathematics: Callable[[], float]
    """See `useful_flops`."""
    dtype: str
    """Of the products."""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Static arguments."""

    @functools.cached_property
    def useful_flops(self) -> float:
        """Of the products and convolutions of one call on all devices: what the mathematics asks for, without what is
        recomputed to save memory or done twice."""
        return self.mathematics()

    def lower(self, **how) -> jax.stages.Lowered:
        """Traces it; `how` is what `Traced.lower` takes, e.g. the platforms to lower for."""
        return self.function.trace(*self.arguments, **self.options).lower(**how)


def plan_programs(
    config: Config, mesh: Mesh, voxels: int, samples: int, names: tuple[str, ...] = NAMES
) -> list[Planned]:
    """The programs of a run on `mesh`, for a brain with `voxels` voxels; synthesis and encoding of `samples` at once.

    The image tower is bigG/14 in bfloat16, and comes only where the config's tokens are its.
    """
    known = {"stage1": _stage1, "stage2": _stage2, "synthesis": _synthesis, "encoding": _encoding}
    found = [known[name](config, mesh, voxels, samples) for name in names]
    return [one for one in found if one is not None]


def _stage1(config: Config, mesh: Mesh, voxels: int, _samples: int) -> Planned:
    model, settings = BrainVAE(config.brain_vae), config.stage1
    program = step_program(
        lambda key: model.init(key, jnp.zeros((1, 8)))["params"],
        brain_vae_loss(model, settings),
        settings,
        mesh,
        config.brain_vae.dtype,
    )
    batch = _batch(config, settings.batch_size, voxels)
    plain = BrainVAE(_without_recomputation(config.brain_vae))
    return Planned(
        "stage1",
        program.step,
        (program.target, {}, _split(batch, mesh), _key(mesh)),
        settings.batch_size,
        settings.steps,
        program.target.params,
        functools.partial(
            _gradient_flops, brain_vae_loss(plain, settings), brain_vae_shapes(config.brain_vae), {}, batch
        ),
        config.brain_vae.dtype,
    )


def _stage2(config: Config, mesh: Mesh, voxels: int, _samples: int) -> Planned:
    mapper, vae, settings = SemanticToNeural(config.mapper), BrainVAE(config.brain_vae), config.stage2
    tokens = jnp.zeros((1, config.mapper.tokens, config.mapper.width))
    program = step_program(
        lambda key: mapper.init(key, tokens)["params"],
        mapper_loss(mapper, vae, settings),
        settings,
        mesh,
        config.mapper.dtype,
    )
    frozen = brain_vae_shapes(config.brain_vae)
    batch = _batch(config, settings.batch_size, voxels)
    if settings.target == "stimulus_mean":
        batch["latent"] = jax.ShapeDtypeStruct(batch["tokens"].shape, jnp.float32)
        batch["weight"] = jax.ShapeDtypeStruct((settings.batch_size,), jnp.float32)
    plain = (
        SemanticToNeural(dataclasses.replace(config.mapper, remat=False)),
        BrainVAE(_without_recomputation(config.brain_vae)),
    )
    return Planned(
        "stage2",
        program.step,
        (program.target, _placed(frozen, mesh), _split(batch, mesh), _key(mesh)),
        settings.batch_size,
        settings.steps,
        program.target.params,
        functools.partial(_gradient_flops, mapper_loss(*plain, settings), mapper_shapes(config.mapper), frozen, batch),
        config.mapper.dtype,
    )


def _synthesis(config: Config, mesh: Mesh, voxels: int, samples: int) -> Planned:
    shapes = {"brain_vae": brain_vae_shapes(config.brain_vae), "mapper": mapper_shapes(config.mapper)}
    order = np.arange(voxels, dtype=np.int32)
    brain = Voxels("", "", ijk=None, volume_shape=None, affine=None, ncsnr=None, order=order)
    decode = jit_decoder(Bundle.uncorrected(config, shapes, brain, "", None), mesh)
    rows = math.ceil(samples / batch_parts(mesh)) * batch_parts(mesh)
    shape = (rows, config.mapper.tokens, config.mapper.width)
    batch = (jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape[:1], jnp.int32))
    spread = jax.ShapeDtypeStruct(shape[1:], jnp.float32, sharding=replicated(mesh))
    params = _placed(shapes, mesh)

    def predict(params, tokens):
        latent = SemanticToNeural(config.mapper).apply({"params": params["mapper"]}, tokens, method="predict_latent")
        vae = BrainVAE(_without_recomputation(config.brain_vae))
        return vae.apply({"params": params["brain_vae"]}, latent, voxels, method="decode")

    return Planned(
        "synthesis",
        decode,
        (params, *_split(batch, mesh), _key(mesh), spread),
        rows,
        None,
        params,
        functools.partial(product_flops, predict, shapes, batch[0]),
        config.brain_vae.dtype,
        {"k": 1, "varied": False},
    )


def _encoding(config: Config, mesh: Mesh, _voxels: int, samples: int) -> Planned | None:
    tower = CLIPVisionConfig.bigG_14(dtype="bfloat16")
    if (config.mapper.tokens, config.mapper.width) != (tower.tokens, tower.width):
        return None
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, tower.dtype), clip_vision_shapes(tower))
    params = jax.tree.map(_place, shapes, param_sharding(shapes, mesh))
    rows = math.ceil(samples / batch_parts(mesh)) * batch_parts(mesh)
    pictures = jax.ShapeDtypeStruct((rows, _PICTURE, _PICTURE, 3), jnp.uint8)
    return Planned(
        "encoding",
        jit_encoder(tower, mesh),
        (params, _split(pictures, mesh)),
        rows,
        None,
        params,
        functools.partial(product_flops, functools.partial(encode_batch, tower), shapes, pictures),
        tower.dtype,
    )


def _without_recomputation(config):
    return dataclasses.replace(config, remat=False, attention_chunk=None)


def _batch(config: Config, size: int, voxels: int) -> dict[str, jax.ShapeDtypeStruct]:
    """As `data.batches` makes it."""
    tokens = (size, config.mapper.tokens, config.mapper.width)
    return {
        "fmri": jax.ShapeDtypeStruct((size, voxels), jnp.float32),
        "tokens": jax.ShapeDtypeStruct(tokens, jnp.bfloat16),
    }


def _place(leaf, place: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def _placed(tree: PyTree, mesh: Mesh) -> PyTree:
    return jax.tree.map(lambda leaf: _place(leaf, replicated(mesh)), tree)


def _split(batch: PyTree, mesh: Mesh) -> PyTree:
    return jax.tree.map(lambda leaf: _place(leaf, batch_sharding(mesh)), batch)


def _key(mesh: Mesh) -> jax.ShapeDtypeStruct:
    return _place(jax.eval_shape(jax.random.key, 0), replicated(mesh))


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def product_flops(function: Callable, *args: PyTree) -> float:
    """Twice the multiplications of all matrix products and convolutions that the outputs of `function` need.

    From JAX's own program, in which a loop says how often it runs. Padding of convolutions is counted, and so is what
    `jax.checkpoint` recomputes; elementwise work is not.
    """
    closed = jax.make_jaxpr(function)(*args)
    return _jaxpr_flops(closed.jaxpr, {v for v in closed.jaxpr.outvars if not hasattr(v, "val")})


def _gradient_flops(loss: Callable, params: PyTree, frozen: PyTree, batch: dict) -> float:
    gradient = jax.grad(loss, has_aux=True)
    return product_flops(gradient, params, frozen, batch, jax.eval_shape(jax.random.key, 0))


def _jaxpr_flops(jaxpr, needed: set | None = None) -> float:
    """Of the equations that give variables in `needed`; None: of all."""
    total = 0.0
    for equation in reversed(jaxpr.eqns):
        if needed is not None:
            if not needed.intersection(equation.outvars):
                continue
            needed.update(v for v in equation.invars if not hasattr(v, "val"))
        total += _equation_flops(equation)
    return total


def _equation_flops(equation) -> float:
    kind, settings = equation.primitive.name, equation.params
    left, right = (v.aval for v in equation.invars[:2]) if len(equation.invars) > 1 else (None, None)
    out = equation.outvars[0].aval
    if kind == "dot_general":
        (contracted, _), _ = settings["dimension_numbers"]
        return 2.0 * out.size * math.prod(left.shape[axis] for axis in contracted)
    if kind == "conv_general_dilated":
        return 2.0 * out.size * right.size / right.shape[settings["dimension_numbers"].rhs_spec[0]]
    inner = [
        getattr(sub, "jaxpr", sub)
        for value in settings.values()
        for sub in (value if isinstance(value, tuple | list) else (value,))
        if hasattr(getattr(sub, "jaxpr", sub), "eqns")
    ]
    if kind == "cond":
        return max(map(_jaxpr_flops, inner))
    if kind in ("custom_vjp_call", "custom_jvp_call"):  # the other rules are not run
        inner = inner[:1]
    return settings.get("length", 1) * sum(map(_jaxpr_flops, inner), 0.0)


# ---- memory of other machines ----------------------------------------------------------------------------------------


def bytes_per_device(tree: PyTree) -> int:
    """Memory on each device of placed shapes."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape))
        * (4 if jnp.issubdtype(leaf.dtype, jax.dtypes.extended) else leaf.dtype.itemsize)
        for leaf in jax.tree.leaves(tree)
    )
