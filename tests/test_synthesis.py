"""Synthesis from an untrained bundle: what it is in terms of mapper and decoder, and what it does not depend on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from synbrain_jax import synthesis
from synbrain_jax.checkpoint import Bundle, save_bundle
from synbrain_jax.config import DataConfig
from synbrain_jax.data.voxels import Voxels
from synbrain_jax.errors import InputError
from synbrain_jax.models.brain_vae import BrainVAE
from synbrain_jax.models.semantic_to_neural import SemanticToNeural
from synbrain_jax.sharding import make_mesh
from synbrain_jax.synthesis import SynBrain, load_pretrained
from synbrain_jax.variability import Spread, deviations

RNG = np.random.default_rng(0)
STIMULI = 7
TOKENS = RNG.normal(size=(STIMULI, tiny.TOKENS, tiny.WIDTH)).astype(np.float32)
ORDER = RNG.permutation(tiny.VOXELS).astype(np.int32)
STD = RNG.uniform(0.1, 2.0, size=(tiny.TOKENS, tiny.WIDTH)).astype(np.float32)
OFFSET = RNG.normal(size=tiny.VOXELS).astype(np.float32)
FACTOR = RNG.normal(size=(tiny.VOXELS, 3)).astype(np.float32)
SPREAD = Spread(FACTOR, RNG.uniform(0.5, 2, size=tiny.VOXELS).astype(np.float32))
KEY = jax.random.key(5)
ONE = make_mesh(devices=jax.devices()[:1])


def make_bundle(prediction="x", voxel_order="hilbert", gain=0.4) -> Bundle:
    config = tiny.config(data=DataConfig(voxel_order=voxel_order))
    config = dataclasses.replace(config, mapper=dataclasses.replace(config.mapper, prediction=prediction))
    voxels = Voxels("s", "none", None, None, None, None, ORDER)
    bundle = Bundle.uncorrected(config, tiny.random_params(config), voxels, "test/tiny", STD)
    return dataclasses.replace(bundle, offset=OFFSET, gain=gain, spread=SPREAD)


BUNDLE = make_bundle()


@pytest.fixture(scope="module")
def model() -> SynBrain:
    return SynBrain(BUNDLE, ONE)


@jax.jit
def _decode(params, latent):
    return BrainVAE(BUNDLE.config.brain_vae).apply({"params": params}, latent, tiny.VOXELS, method="decode")


@jax.jit
def _network(params, tokens):
    return SemanticToNeural(BUNDLE.config.mapper).apply({"params": params}, tokens)


def decode(latent) -> np.ndarray:
    """Patterns in the model's own voxel order, uncorrected."""
    return np.asarray(_decode(BUNDLE.params["brain_vae"], latent))


def network(tokens) -> np.ndarray:
    """What the mapper puts out: the latent, or its difference to the tokens."""
    return np.asarray(_network(BUNDLE.params["mapper"], tokens))


def in_given_order(patterns):
    """Column c of the model's output belongs to voxel ORDER[c]."""
    result = np.empty_like(patterns)
    result[..., ORDER] = patterns
    return result


def largest(difference, of) -> float:
    return float(np.abs(difference).max() / np.abs(of).max())


# ---- what it computes ----------------------------------------------------------------------------


@pytest.mark.parametrize(("prediction", "voxel_order"), [("x", "hilbert"), ("v", "given")])
def test_a_prediction_is_the_decoded_latent_put_back_in_order_and_corrected(prediction, voxel_order):
    latent = network(TOKENS) + (TOKENS if prediction == "v" else 0)
    patterns = in_given_order(decode(latent)) if voxel_order == "hilbert" else decode(latent)
    expected = OFFSET + 0.4 * patterns
    found = SynBrain(make_bundle(prediction, voxel_order), ONE).predict(TOKENS)
    assert found.dtype == np.float32
    assert largest(found - expected, expected) < 1e-5
    assert np.ptp(expected, axis=0).min() > 1e-3  # the stimuli do differ


def noise(i, j):
    return jax.random.normal(jax.random.fold_in(jax.random.fold_in(KEY, i), j), STD.shape)


@pytest.mark.parametrize(
    ("variability", "std", "factor"), [("posterior", STD, 1.0), ("posterior", STD, 0.3), ("latent_noise", 1.0, 0.5)]
)
def test_a_sample_is_the_prediction_and_the_decoders_deviation_for_a_noisy_latent(model, variability, std, factor):
    """Latent + factor x std x noise, the noise keyed by stimulus and sample; the gain corrects the prediction alone."""
    k = 2
    found = model.synthesize(TOKENS, KEY, k=k, variability=variability, noise_factor=factor, batch_size=8)
    latent = network(TOKENS)
    drawn = np.array([[noise(i, j) for j in range(k)] for i in range(STIMULI)])
    noisy = latent[:, None] + np.float32(factor) * std * drawn
    deviation = decode(noisy.reshape(-1, *STD.shape)).reshape(STIMULI, k, -1) - decode(latent)[:, None]
    expected = model.predict(TOKENS)[:, None] + in_given_order(deviation)
    assert found.shape == (STIMULI, k, tiny.VOXELS)
    assert largest(found - expected, expected) < 1e-5
    assert np.std(found, axis=1).min() > 0


def test_latent_noise_has_the_posteriors_spread(model):
    """To first order, voxel covariance over samples is J diag(std^2) J', J the decoder's derivative."""
    factor, k = 0.01, 400
    found = model.synthesize(TOKENS[:1], KEY, k=k, variability="posterior", noise_factor=factor, batch_size=1)[0]
    latent = network(TOKENS[:1])
    unit = 0.01 * np.eye(STD.size, dtype=np.float32).reshape(-1, *STD.shape)
    derivative = (decode(latent + unit) - decode(latent - unit)) / 0.02  # [latent, v]
    expected = np.sqrt(np.sum((factor * STD.reshape(-1, 1) * derivative) ** 2, axis=0))
    # The spread of 400 normal numbers is known to 1 / sqrt(800) = 3.5 %; 5 sigma over 40 voxels.
    np.testing.assert_allclose(np.std(found, axis=0, ddof=1), in_given_order(expected), rtol=0.18)
    np.testing.assert_allclose(found.mean(0), model.predict(TOKENS[:1])[0], atol=5 * expected.max() / np.sqrt(k))


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_a_calibrated_sample_is_the_prediction_and_a_draw_from_the_spread(model, factor):
    """In the data set's voxel order, whatever the model's; the draw is keyed by stimulus and sample."""
    found = model.synthesize(TOKENS, KEY, k=2, variability="calibrated", noise_factor=factor, batch_size=8)
    keys = [[jax.random.fold_in(jax.random.fold_in(KEY, i), j) for j in range(2)] for i in range(STIMULI)]
    drawn = np.array([[deviations(FACTOR, SPREAD.independent, key) for key in row] for row in keys])
    expected = model.predict(TOKENS)[:, None] + np.float32(factor) * drawn
    assert found.dtype == np.float32
    assert largest(found - expected, expected) < 1e-6


def test_calibrated_samples_vary_as_the_spread_says(model):
    k = 4000
    found = model.synthesize(TOKENS[:2], KEY, k=k, variability="calibrated", batch_size=2)
    for deviation in (found - model.predict(TOKENS[:2])[:, None]).astype(np.float64):
        np.testing.assert_allclose((deviation**2).mean(0), SPREAD.variance, rtol=5 * np.sqrt(2 / k))
        np.testing.assert_allclose(np.corrcoef(deviation.T), SPREAD.correlation(), atol=5 / np.sqrt(k))


def test_without_variability_all_samples_are_the_prediction(model):
    found = model.synthesize(TOKENS, k=2, batch_size=8)
    for j in range(2):
        np.testing.assert_array_equal(found[:, j], model.predict(TOKENS, batch_size=8))
    still = model.synthesize(TOKENS, KEY, k=2, variability="posterior", noise_factor=0.0, batch_size=8)
    np.testing.assert_allclose(still[:, 1], model.predict(TOKENS), atol=1e-6)


# ---- what it does not depend on ------------------------------------------------------------------


@pytest.mark.parametrize("variability", ["posterior", "calibrated"])
def test_same_key_same_bits_and_another_key_another_sample(model, variability):
    first, again = (model.synthesize(TOKENS, KEY, k=2, variability=variability, batch_size=8) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    other = model.synthesize(TOKENS, jax.random.key(6), k=2, variability=variability, batch_size=8)
    assert np.abs(first - other).max() > 0.01
    assert np.abs(first[:, 0] - first[:, 1]).max() > 0.01


def test_padding_changes_no_bit(model):
    """The first stimuli of a batch do not know what fills it up."""
    whole = model.synthesize(TOKENS, KEY, k=2, variability="posterior", batch_size=8)
    for count in (1, 3, 6):
        part = model.synthesize(TOKENS[:count], KEY, k=2, variability="posterior", batch_size=8)
        np.testing.assert_array_equal(part, whole[:count])
    assert model.synthesize(TOKENS[:0], batch_size=8).shape == (0, 1, tiny.VOXELS)


@pytest.mark.parametrize("variability", ["posterior", "calibrated"])
@pytest.mark.parametrize("batch_size", [1, 32])
def test_batch_size_changes_nothing_but_rounding(model, batch_size, variability):
    """Another batch size is another program: the same to 1e-6 of the largest value, not bit by bit."""
    settings = dict(k=2, variability=variability)
    expected = model.synthesize(TOKENS, KEY, batch_size=8, **settings)
    found = model.synthesize(TOKENS, KEY, batch_size=batch_size, **settings)
    assert largest(found - expected, expected) < 2e-6


@pytest.mark.parametrize("variability", ["latent_noise", "calibrated"])
def test_a_sample_depends_on_its_stimulus_and_number_only(model, variability):
    few = model.synthesize(TOKENS, KEY, k=2, variability=variability, batch_size=8)
    more = model.synthesize(TOKENS, KEY, k=5, variability=variability, batch_size=8)
    assert largest(more[:, :2] - few, few) < 2e-6
    changed = TOKENS[::-1].copy()
    assert (changed[3] == TOKENS[3]).all()
    others = model.synthesize(changed, KEY, k=2, variability=variability, batch_size=8)
    np.testing.assert_array_equal(others[3], few[3])
    assert np.abs(others[2] - few[2]).max() > 1e-3


@pytest.mark.parametrize("variability", ["posterior", "calibrated"])
def test_devices_change_nothing_but_rounding(model, variability):
    """On eight devices, and with a batch size that they do not divide."""
    spread = SynBrain(BUNDLE, make_mesh(4, 2, 1))
    for settings in (dict(batch_size=3), dict(batch_size=16)):
        settings |= dict(k=2, variability=variability)
        expected = model.synthesize(TOKENS, KEY, **settings)
        assert largest(spread.synthesize(TOKENS, KEY, **settings) - expected, expected) < 2e-6


def test_any_number_of_stimuli_runs_the_same_program(monkeypatch):
    traces = []
    real = synthesis._decode_batch

    def counted(*args, **kwargs):
        traces.append(kwargs)
        return real(*args, **kwargs)

    monkeypatch.setattr(synthesis, "_decode_batch", counted)
    model = SynBrain(BUNDLE, ONE)
    settings = dict(k=2, batch_size=4)
    for count, factor, seed in ((1, 1.0, 0), (4, 0.5, 1), (7, 2.0, 2)):
        tokens, key = TOKENS[:count], jax.random.key(seed)
        model.synthesize(tokens, key, variability="posterior", noise_factor=factor, **settings)
        model.synthesize(tokens, key, variability="latent_noise", **settings)
    assert len(traces) == 1
    for count in (2, 5):
        model.synthesize(TOKENS[:count], **settings)
    assert len(traces) == 2  # without variability nothing is drawn, which is another program
    for count, factor in ((1, 1.0), (7, 0.5)):
        model.synthesize(TOKENS[:count], KEY, variability="calibrated", noise_factor=factor, **settings)
    assert len(traces) == 3  # and so is noise of voxels


# ---- bundles and wrong input ---------------------------------------------------------------------


def test_a_loaded_bundle_synthesises_the_same_bits(model, tmp_path):
    save_bundle(tmp_path / "bundle", BUNDLE)
    loaded = load_pretrained(tmp_path / "bundle", ONE)
    settings = dict(k=2, variability="posterior", batch_size=8)
    np.testing.assert_array_equal(loaded.synthesize(TOKENS, KEY, **settings), model.synthesize(TOKENS, KEY, **settings))
    assert loaded.token_shape == (tiny.TOKENS, tiny.WIDTH)


def test_arrays_of_jax_and_old_style_keys_are_welcome(model):
    settings = dict(k=2, variability="posterior", batch_size=8)
    expected = model.synthesize(TOKENS, jax.random.key(5), **settings)
    found = model.synthesize(jnp.asarray(TOKENS), jax.random.PRNGKey(5), **settings)
    np.testing.assert_array_equal(found, expected)


class NumPyWithoutDeviceArrays:
    """NumPy whose functions take no array of tokens from a device."""

    def __getattr__(self, name):
        value = getattr(np, name)
        if not callable(value) or isinstance(value, type):
            return value

        def checked(*args, **kwargs):
            assert not any(isinstance(arg, jax.Array) and arg.shape[1:] == STD.shape for arg in args), f"np.{name}"
            return value(*args, **kwargs)

        return checked


@pytest.mark.parametrize("mesh", [ONE, make_mesh(4, 2, 1)], ids=["one", "eight"])
def test_tokens_on_devices_stay_there(model, mesh, monkeypatch):
    """And are taken as the float32 numbers that they stand for."""
    tokens = jnp.asarray(TOKENS, jnp.bfloat16)
    expected = model.synthesize(np.asarray(tokens, np.float32), KEY, k=2, variability="posterior", batch_size=4)
    spread = SynBrain(BUNDLE, mesh)
    monkeypatch.setattr(synthesis, "np", NumPyWithoutDeviceArrays())
    found = spread.synthesize(tokens, KEY, k=2, variability="posterior", batch_size=4)
    assert largest(found - expected, expected) < 2e-6


@pytest.mark.parametrize("to_array", [np.asarray, jnp.asarray], ids=["host", "device"])
def test_stimuli_may_come_in_parts(model, to_array):
    settings = dict(k=2, variability="posterior", batch_size=8)
    whole = model.synthesize(TOKENS, KEY, **settings)
    parts = [model.synthesize(to_array(TOKENS[a:b]), KEY, first=a, **settings) for a, b in ((0, 3), (3, 4), (4, 7))]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def with_nan():
    tokens = TOKENS.copy()
    tokens[3, 1, :2] = np.nan, np.inf
    return tokens


@pytest.mark.parametrize(
    ("tokens", "settings", "message"),
    [
        (TOKENS[:, :3], {}, r"tokens have shape \[7, 3, 8\]; this model expects \[stimuli, 4, 8\]"),
        (TOKENS[..., :7], {}, r"\[7, 4, 7\]"),
        (with_nan(), {}, "2 values that are NaN or infinite"),
        (jnp.asarray(with_nan()), {}, "2 values that are NaN or infinite"),
        (TOKENS, {"variability": "posterior"}, "give a key"),
        (TOKENS, {"variability": "latent_noise", "key": None}, "give a key"),
        (TOKENS, {"variability": "calibrated"}, "give a key"),
        (TOKENS, {"k": 0}, "k is 0"),
        (TOKENS, {"batch_size": 0}, "batch_size 0"),
    ],
    ids=["tokens", "width", "nan", "nan on device", "no key", "no key either", "nor here", "k", "batch size"],
)
def test_wrong_input_is_named(model, tokens, settings, message):
    with pytest.raises(InputError, match=message):
        model.synthesize(tokens, **settings)


@pytest.mark.parametrize(("variability", "field"), [("calibrated", "spread"), ("posterior", "latent_std")])
def test_a_spread_that_the_bundle_does_not_know_is_named(variability, field):
    model = SynBrain(dataclasses.replace(BUNDLE, **{field: None}), ONE)
    with pytest.raises(InputError, match=r"bundle does not know .*; use|or use"):
        model.synthesize(TOKENS, KEY, variability=variability)
