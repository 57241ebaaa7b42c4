"""BrainVAE's posterior, sizes and presets; its numbers are compared with the released system's in tests/parity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from synbrain_jax.models.brain_vae import BrainVAE, BrainVAEConfig, Posterior

# --- sampling ---


def test_posterior_sample_has_the_posteriors_moments_and_follows_its_key():
    shape = (4, 50, 100)
    posterior = Posterior(jnp.full(shape, 3.0), jnp.full(shape, 2 * jnp.log(0.5)))
    draw, again, other = (np.asarray(posterior.sample(jax.random.key(seed))) for seed in (0, 0, 1))
    n = draw.size
    assert abs(draw.mean() - 3) <= 4 * 0.5 / n**0.5
    assert abs(draw.std() - 0.5) <= 4 * 0.5 / (2 * n) ** 0.5
    np.testing.assert_array_equal(draw, again)
    assert abs(np.corrcoef(draw.ravel(), other.ravel())[0, 1]) <= 4 / n**0.5


# --- sizes ---


def parameter_counts(config, num_voxels):
    tree = jax.eval_shape(BrainVAE(config).init, jax.random.key(0), jax.ShapeDtypeStruct((1, num_voxels), jnp.float32))
    return {"/".join(path): leaf.size for path, leaf in flatten_dict(tree["params"]).items()}


@pytest.fixture(scope="module")
def paper_counts():
    return parameter_counts(BrainVAEConfig.paper(), 15_724)


@pytest.mark.parametrize(
    ("module", "count"),
    [
        ("", 78_311_937),
        ("encoder/", 12_347_904),
        ("encoder/conv_in", 1_024),
        ("encoder/down_0_block", 723_968),
        ("encoder/down_0_downsample", 459_008),
        ("encoder/down_1", 2_889_728),
        ("encoder/down_2", 3_151_872),
        ("encoder/mid", 4_203_520),
        ("encoder/norm_out", 1_024),
        ("encoder/conv_out", 917_760),
        ("decoder/", 17_927_681),
        ("decoder/conv_in", 918_016),
        ("decoder/mid", 4_203_520),
        ("decoder/up_2_block", 4_727_808),
        ("decoder/up_2_upsample", 1_835_520),
        ("decoder/up_1", 4_727_808),
        ("decoder/up_0", 1_512_704),
        ("decoder/norm_out", 512),
        ("decoder/conv_out", 1_793),
        ("pre_projector_mean", 16_012_928),
        ("pre_projector_logvar", 16_012_928),
        ("post_projector", 16_010_496),
    ],
)
def test_paper_preset_has_the_released_parameter_counts(paper_counts, module, count):
    assert sum(size for path, size in paper_counts.items() if path.startswith(module)) == count


def test_no_parameter_depends_on_the_number_of_voxels(paper_counts):
    assert parameter_counts(BrainVAEConfig.paper(), 12_682) == paper_counts


def test_small_preset_has_the_size_that_it_states():
    assert sum(parameter_counts(BrainVAEConfig.small(), 530).values()) == 180_349


def test_presets_take_changes():
    assert BrainVAEConfig.paper(remat=True) == BrainVAEConfig(remat=True)
    assert BrainVAEConfig.small(channels=16).channels == 16
    assert BrainVAEConfig.small(pool_length=64, num_down_blocks=2).positions == 16
