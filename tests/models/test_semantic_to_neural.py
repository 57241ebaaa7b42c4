"""The mapper's initial parameters, sizes and presets; its numbers are compared with the release's in tests/parity."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from synbrain_jax.models.semantic_to_neural import MapperConfig, SemanticToNeural

# --- a fresh model ---


@pytest.fixture(scope="module")
def fresh():
    model = SemanticToNeural(MapperConfig(tokens=5, width=64, depth=1, heads=2, mlp_ratio=1.5))
    return model, jax.jit(model.init)(jax.random.key(0, impl="rbg"), jnp.zeros((1, 5, 64)))["params"]


def test_fresh_model_outputs_exactly_zero(fresh):
    model, params = fresh
    tokens = np.random.default_rng(0).normal(size=(2, 5, 64)).astype(np.float32)
    output = jax.jit(model.apply)({"params": params}, tokens, np.float32([0.3, 1.0]))
    np.testing.assert_array_equal(output, np.zeros_like(tokens))


def test_fresh_parameters_have_the_released_distributions(fresh):
    """Xavier-uniform matrices, N(0, 0.02) time embedding, zero biases, modulations and final layer."""
    flat = {"/".join(path): np.asarray(leaf) for path, leaf in flatten_dict(fresh[1]).items()}
    for name, values in flat.items():
        if name.endswith("bias") or "modulation" in name or name.startswith("final"):
            assert not values.any(), name
        elif name.startswith("time"):
            assert abs(values.std() / 0.02 - 1) <= 4 / math.sqrt(2 * values.size), name
        else:
            bound = math.sqrt(6 / sum(values.shape))
            assert 0.99 * bound <= np.abs(values).max() <= bound, name
            # The square of a uniform on [-1, 1] has mean 1/3 and variance 4/45.
            assert abs(((values / bound) ** 2).mean() - 1 / 3) <= 4 * math.sqrt(4 / 45 / values.size), name
    assert flat["block_0/attn/qkv/kernel"].shape == (64, 192)  # so the Xavier bound counts q, k and v together


# --- sizes ---


def parameter_counts(config):
    tokens = jax.ShapeDtypeStruct((1, config.tokens, config.width), jnp.float32)
    tree = jax.eval_shape(SemanticToNeural(config).init, jax.random.key(0), tokens)
    return {"/".join(path): leaf.size for path, leaf in flatten_dict(tree["params"]).items()}


@pytest.fixture(scope="module")
def paper_counts():
    return parameter_counts(MapperConfig.paper())


@pytest.mark.parametrize(
    ("module", "count"),
    [
        ("", 410_430_592 + 425_984),
        ("pos_embed", 425_984),
        ("time", 3_198_208),
        ("block_0/", 49_865_088),
        ("block_7/attn", 11_082_240),
        ("block_7/mlp", 22_159_488),
        ("block_7/modulation", 16_623_360),
        ("final/", 2_770_560),
        ("final_modulation", 5_541_120),
    ],
)
def test_paper_preset_has_the_released_parameter_counts(paper_counts, module, count):
    assert sum(size for path, size in paper_counts.items() if path.startswith(module)) == count


def test_small_preset_has_the_size_that_it_states():
    assert sum(parameter_counts(MapperConfig.small()).values()) == 50_272


def test_presets_take_changes():
    assert MapperConfig.paper(prediction="v") == MapperConfig(prediction="v", positions="stored")
    assert MapperConfig.small(depth=3).depth == 3
