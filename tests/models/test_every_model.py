"""One table of models, crossed with every property that each of them must have."""

import dataclasses
from collections.abc import Callable
from functools import cache, partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict, path_aware_map
from released import relative_error

from synbrain_jax.models.brain_vae import BrainVAE, BrainVAEConfig
from synbrain_jax.models.semantic_to_neural import MapperConfig, SemanticToNeural


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A model as a function of changes to its configuration, and one batch of inputs (the first is the data)."""

    name: str
    build: Callable[..., nn.Module]
    inputs: tuple

    def random_params(self):
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
    def compiled(self, **changes):
        """(params, *inputs) -> ((energy, output), gradient of the energy in the parameters), jitted."""
        return jax.jit(jax.value_and_grad(partial(self.energy, self.build(**changes)), has_aux=True))

    @cache
    def result(self, **changes):
        (_, output), gradient = self.compiled(**changes)(self.random_params(), *self.inputs)
        return output, gradient


def brain_vae(**changes):
    sizes = dict(pool_length=16, channels=4, channel_mult=(2,), num_res_blocks=1)
    latent = dict(latent_tokens=6, latent_dim=8, projector_width=8)
    return BrainVAE(BrainVAEConfig(**{**sizes, **latent, **changes}))


def mapper(**changes):
    return SemanticToNeural(MapperConfig(**{**dict(tokens=6, width=8, depth=2, heads=2), **changes}))


CASES = [
    Case("BrainVAE", brain_vae, (normal(3, 21), jax.random.key(7))),
    Case("SemanticToNeural", mapper, (normal(3, 6, 8), jnp.array([0.0, 0.2, 0.9]))),
]


@pytest.fixture(params=CASES, ids=lambda case: case.name, scope="module")
def case(request):
    return request.param


def assert_close(actual, expected, tolerance):
    """Every array within `tolerance` of the other's largest entry, or of 1e-4 of the largest of all."""
    floor = 1e-4 * max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))

    def check(path, a, e):
        assert a.shape == e.shape
        difference = np.abs(np.asarray(a, np.float64) - np.asarray(e, np.float64)).max()
        assert difference <= tolerance * max(np.abs(e).max(), floor), jax.tree_util.keystr(path)

    jax.tree_util.tree_map_with_path(check, actual, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_variables_are_float32_parameters_and_nothing_else(case, dtype):
    variables = jax.eval_shape(case.build(dtype=dtype).init, jax.random.key(0), *case.inputs)
    assert set(variables) == {"params"}
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


def test_bfloat16_compute_gives_float32_close_to_float32s(case):
    (output, gradient), (exact, exact_gradient) = case.result(dtype="bfloat16"), case.result()
    for actual, expected in zip(jax.tree.leaves(output), jax.tree.leaves(exact), strict=True):
        assert actual.dtype == jnp.float32
        assert 1e-5 < relative_error(actual, expected) < 4e-2  # bfloat16 rounds to 0.4 %, many times over
    a, e = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(g)]) for g in (gradient, exact_gradient))
    assert a.dtype == np.float32
    assert a @ e / np.linalg.norm(a) / np.linalg.norm(e) > 0.99


def test_jit_equals_eager(case):
    output, _ = case.result()
    assert_close(case.build().apply({"params": case.random_params()}, *case.inputs), output, 1e-5)


def test_rematerialisation_changes_neither_value_nor_gradient(case):
    assert_close(case.result(remat=True), case.result(), 1e-5)


def test_rematerialisation_recomputes_the_blocks(case):
    def program(remat):
        model = case.build(remat=remat)
        return str(jax.make_jaxpr(partial(case.energy, model))(case.random_params(), *case.inputs))

    assert program(True).count("policy=None") >= 2  # a parameter of the checkpoint primitive
    assert "policy=None" not in program(False)


def test_equal_configurations_and_shapes_compile_once(case):
    @partial(jax.jit, static_argnums=0)
    @chex.assert_max_traces(n=1)
    def apply(model, params, *inputs):
        return model.apply({"params": params}, *inputs)

    params, (data, extra) = case.random_params(), case.inputs
    apply(case.build(), params, data, extra)
    apply(case.build(), jax.tree.map(jnp.zeros_like, params), 2 * data, extra)
    with pytest.raises(AssertionError, match="traced > 1 times"):
        apply(case.build(), params, data[:2], extra if extra.ndim == 0 else extra[:2])


def test_gradient_is_the_slope_of_the_energy(case):
    """Along the gradient's own direction the derivative is the gradient's norm; against a central difference."""
    run, params = case.compiled(), case.random_params()
    _, gradient = run(params, *case.inputs)
    norm = float(jnp.sqrt(sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(gradient))))
    step = 1e-3

    def energy(sign):
        moved = jax.tree.map(lambda p, g: p + sign * step * g / norm, params, gradient)
        return float(run(moved, *case.inputs)[0][0])

    assert (energy(1) - energy(-1)) / (2 * step) == pytest.approx(norm, rel=5e-3)


def test_every_kernel_has_a_gradient(case):
    _, gradient = case.result()
    for path, leaf in flatten_dict(gradient).items():
        assert jnp.abs(leaf).max() > 0 or path[-1] == "bias", path


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e4])
def test_gradient_is_finite_for_awkward_data(case, scale):
    data, extra = case.inputs
    result = case.compiled()(case.random_params(), scale * data, extra)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result))


def test_elements_of_a_batch_do_not_see_each_other(case):
    data, extra = case.inputs
    (_, output), _ = case.compiled()(case.random_params(), data.at[-1].set(7 - data[-1]), extra)
    for changed, original in zip(jax.tree.leaves(output), jax.tree.leaves(case.result()[0]), strict=True):
        np.testing.assert_array_equal(changed[:-1], original[:-1])
        assert (changed[-1] != original[-1]).all()


def test_as_an_nnx_module(case):
    """Wrapped by Flax's bridge it takes our parameters by name and gives the same output."""
    model, params = case.build(), case.random_params()
    wrapped = nnx.eval_shape(lambda: nnx.bridge.ToNNX(model, rngs=nnx.Rngs(0)).lazy_init(*case.inputs))
    assert jax.tree.structure(nnx.to_pure_dict(nnx.state(wrapped, nnx.Param))) == jax.tree.structure(params)
    nnx.update(wrapped, params)
    assert_close(wrapped(*case.inputs, rngs=jax.random.key(0)), case.result()[0], 1e-5)


@pytest.mark.parametrize("chunk", [2, 8])
def test_brain_vae_attends_in_chunks_without_changing_anything(chunk):
    assert_close(CASES[0].result(attention_chunk=chunk), CASES[0].result(), 1e-5)
