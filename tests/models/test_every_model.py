"""One table of models, crossed with every property that each of them must have."""

import dataclasses
import re
from collections.abc import Callable
from functools import cache, cached_property, partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict, path_aware_map

from synbrain_jax.models.brain_vae import BrainVAE, BrainVAEConfig
from synbrain_jax.models.semantic_to_neural import MapperConfig, SemanticToNeural

# Most of the time of these tests is compilation; the machine code need not be fast.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A model as a function of changes to its configuration, the changes that save memory, and one batch of inputs."""

    name: str
    build: Callable[..., nn.Module]
    saves_memory: dict
    inputs: tuple  # the data, and a key or a time

    @cached_property
    def params(self):
        """Nothing at its initial zero, so that every parameter matters."""
        shapes = jax.eval_shape(self.build().init, jax.random.key(0), *self.inputs)["params"]
        rng = np.random.default_rng(0)

        def draw(path, leaf):
            spread = np.prod(leaf.shape[:-1]) ** -0.5 if path[-1] == "kernel" else 0.2
            return jnp.asarray((path[-1] == "scale") + spread * rng.normal(size=leaf.shape), leaf.dtype)

        return path_aware_map(draw, shapes)

    def energy(self, model, params, *inputs):
        """A scalar that every number of the output enters, and the output."""
        output = model.apply({"params": params}, *inputs)
        return sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(output)), output


@cache
def compiled(case, **changes):
    """(params, *inputs) -> ((energy, output), gradient of the energy in the parameters), jitted."""
    return quick_jit(jax.value_and_grad(partial(case.energy, case.build(**changes)), has_aux=True))


@cache
def result(case, **changes):
    """Output and gradient for the case's own inputs, as NumPy arrays."""
    (_, output), gradient = compiled(case, **changes)(case.params, *case.inputs)
    return on_host(output), on_host(gradient)


def on_host(tree):
    return jax.tree.map(np.asarray, tree)


def brain_vae(**changes):
    sizes = dict(pool_length=16, channels=4, channel_mult=(2,), num_res_blocks=1)
    latent = dict(latent_tokens=6, latent_dim=8, projector_width=8)
    return BrainVAE(BrainVAEConfig(**{**sizes, **latent, **changes}))


def mapper(**changes):
    return SemanticToNeural(MapperConfig(**{**dict(tokens=6, width=8, depth=2, heads=2), **changes}))


CASES = [
    Case("BrainVAE", brain_vae, dict(remat=True, attention_chunk=2), (normal(3, 21), jax.random.key(7))),
    Case("SemanticToNeural", mapper, dict(remat=True), (normal(3, 6, 8), jnp.array([0.0, 0.2, 0.9]))),
]


@pytest.fixture(params=CASES, ids=lambda case: case.name, scope="module")
def case(request):
    return request.param


def assert_same_output(actual, expected, tolerance=2e-5):
    """Every array within `tolerance` of the other's largest entry."""

    def check(path, a, e):
        assert a.shape == e.shape
        assert np.abs(a - e).max() <= tolerance * np.abs(e).max(), jax.tree_util.keystr(path)

    jax.tree_util.tree_map_with_path(check, on_host(actual), expected)


def assert_same_gradient(actual, expected, tolerance=1e-4):
    """The same for gradients, where one below 1 % of the largest is held to that: some are zero but for rounding."""
    floor = 1e-2 * max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))

    def check(path, a, e):
        assert np.abs(a - e).max() <= tolerance * max(np.abs(e).max(), floor), jax.tree_util.keystr(path)

    jax.tree_util.tree_map_with_path(check, actual, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_variables_are_float32_parameters_and_nothing_else(case, dtype):
    variables = jax.eval_shape(case.build(dtype=dtype).init, jax.random.key(0), *case.inputs)
    assert set(variables) == {"params"}
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


def test_bfloat16_compute_gives_float32_close_to_float32s(case):
    (output, gradient), (exact, exact_gradient) = result(case, dtype="bfloat16"), result(case)
    for actual, expected in zip(jax.tree.leaves(output), jax.tree.leaves(exact), strict=True):
        assert actual.dtype == jnp.float32
        # bfloat16 rounds to 0.4 %, many times over; an error of rounding in float32 would mean that it was not used.
        assert 1e-4 < np.linalg.norm(actual - expected) / np.linalg.norm(expected) < 5e-2
    a, e = (np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(g)]) for g in (gradient, exact_gradient))
    assert a.dtype == np.float32
    assert np.linalg.norm(a - e) / np.linalg.norm(e) < 1e-1


def test_jit_equals_eager(case):
    assert_same_output(case.build().apply({"params": case.params}, *case.inputs), result(case)[0])


def test_saving_memory_changes_neither_value_nor_gradient(case):
    (output, gradient), (plain_output, plain_gradient) = result(case, **case.saves_memory), result(case)
    assert_same_output(output, plain_output)
    assert_same_gradient(gradient, plain_gradient)


def test_rematerialisation_recomputes_every_block(case):
    def program(remat):
        model = case.build(remat=remat)
        return str(jax.make_jaxpr(partial(case.energy, model))(case.params, *case.inputs))

    parts = [(path[:i], path[i]) for path in flatten_dict(case.params) for i in range(len(path))]
    blocks = {(*above, name) for above, name in parts if re.search(r"block_\d$|attn_1$", name)}
    assert program(True).count("policy=None") == len(blocks)  # a parameter of the checkpoint primitive
    assert "policy=None" not in program(False)


def test_equal_configurations_and_shapes_compile_once(case):
    chex.clear_trace_counter()

    @partial(quick_jit, static_argnums=0)
    @chex.assert_max_traces(n=1)
    def apply(model, params, *inputs):
        return model.apply({"params": params}, *inputs)

    data, extra = case.inputs
    apply(case.build(), case.params, data, extra)
    apply(case.build(), case.params, 2 * data, extra)
    with pytest.raises(AssertionError, match="traced > 1 times"):
        apply(case.build(dtype="bfloat16"), case.params, data, extra)


def test_gradient_is_the_slope_of_the_energy(case):
    """Along the gradient's own direction the derivative is the gradient's norm; against a central difference."""
    _, gradient = result(case)
    length = np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(gradient)))
    step = 1e-3

    def energy(sign):
        moved = jax.tree.map(lambda p, g: np.asarray(p) + np.float32(sign * step / length) * g, case.params, gradient)
        (value, _), _ = compiled(case)(moved, *case.inputs)
        return float(value)

    assert (energy(1) - energy(-1)) / (2 * step) == pytest.approx(length, rel=5e-3)


def test_every_kernel_has_a_gradient(case):
    _, gradient = result(case)
    for path, leaf in flatten_dict(gradient).items():
        assert np.abs(leaf).max() > 0 or path[-1] == "bias", path


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e4])
def test_gradient_is_finite_for_awkward_data(case, scale):
    data, extra = case.inputs
    result = compiled(case)(case.params, scale * data, extra)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(on_host(result)))


def test_elements_of_a_batch_do_not_see_each_other(case):
    data, extra = case.inputs
    (_, output), _ = compiled(case)(case.params, data.at[-1].set(7 - data[-1]), extra)
    for changed, original in zip(jax.tree.leaves(on_host(output)), jax.tree.leaves(result(case)[0]), strict=True):
        np.testing.assert_array_equal(changed[:-1], original[:-1])
        assert (changed[-1] != original[-1]).all()


def test_as_an_nnx_module(case):
    """Wrapped by Flax's bridge it takes our parameters by name and gives the same output."""
    model, params = case.build(), case.params
    wrapped = nnx.eval_shape(lambda: nnx.bridge.ToNNX(model, rngs=nnx.Rngs(0)).lazy_init(*case.inputs))
    assert jax.tree.structure(nnx.to_pure_dict(nnx.state(wrapped, nnx.Param))) == jax.tree.structure(params)
    nnx.update(wrapped, params)
    assert_same_output(wrapped(*case.inputs, rngs=jax.random.key(0)), result(case)[0])


def test_brain_vae_attends_to_as_many_queries_at_once_as_it_is_told():
    case = CASES[0]

    def program(chunk):
        return str(jax.make_jaxpr(partial(case.energy, case.build(attention_chunk=chunk)))(case.params, *case.inputs))

    scores_of_two_queries = "f32[3,2,8]"  # [b, chunk, positions]
    assert scores_of_two_queries in program(2)
    assert scores_of_two_queries not in program(None)
