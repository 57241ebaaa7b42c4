"""Decoders against scikit-learn, NumPy and cases with a known answer; retrieval against every pool there is."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.linear_model

from synbrain_jax import decoding
from synbrain_jax.decoding import Examples, LinearDecoder, Moments, NetworkSettings
from synbrain_jax.errors import InputError
from synbrain_jax.interop import released_metrics
from synbrain_jax.models.token_decoder import TokenDecoder, TokenDecoderConfig
from synbrain_jax.retrieval import retrieval, retrieval_of_means, retrieval_of_trials

RNG = np.random.default_rng(0)


def examples(trials=40, voxels=6, pictures=12, seed=0, noise=0.5) -> Examples:
    """Trials that are linear in the tokens [2 3] of what was seen, with unequal weights and means."""
    rng = np.random.default_rng(seed)
    tokens = rng.normal(size=(pictures, 2, 3)).astype(np.float32) + 2
    stimulus = np.concatenate([np.arange(pictures), rng.integers(0, pictures, trials - pictures)])
    fmri = (tokens.reshape(pictures, 6) @ np.random.default_rng(9).normal(size=(6, voxels)))[stimulus]
    fmri = (fmri + noise * rng.normal(size=fmri.shape)).astype(np.float32)
    return Examples(fmri, tokens, stimulus, rng.uniform(0.2, 3, trials))


def targets(trials: Examples) -> np.ndarray:
    return trials.tokens.reshape(len(trials.tokens), -1)[trials.stimulus]


# ---- ridge -----------------------------------------------------------------------------------------


def by_scikit_learn(trials: Examples, penalty: float, size: int, new: np.ndarray) -> np.ndarray:
    """Its penalty is absolute: a share of all eigenvalues, which add up to the weighted squares about the mean."""
    mean = np.average(trials.fmri, axis=0, weights=trials.weight)
    scale = (trials.weight[:, None] * (trials.fmri - mean) ** 2).sum() / size
    ridge = sklearn.linear_model.Ridge(penalty * scale, solver="svd")
    fitted = ridge.fit(np.float64(trials.fmri), targets(trials), sample_weight=trials.weight)
    return fitted.predict(np.float64(new)).reshape(-1, 2, 3)


@pytest.mark.parametrize("voxels", [6, 70])
def test_ridge_equals_scikit_learns_with_more_and_with_fewer_trials_than_voxels(voxels):
    trials, new = examples(voxels=voxels), RNG.normal(size=(5, voxels)).astype(np.float32)
    for penalty, decoder in zip(decoding.PENALTIES, decoding.fit_ridges(trials), strict=True):
        expected = by_scikit_learn(trials, penalty, voxels, new)
        decoded = decoder.decode(new)
        assert decoded.dtype == np.float32
        np.testing.assert_allclose(decoded, expected, rtol=2e-4, atol=2e-4)


def test_sums_of_trials_add_up_with_weights():
    one, other = examples(trials=4100, voxels=4), examples(seed=1, voxels=4)
    new = RNG.normal(size=(5, 4)).astype(np.float32)
    both = one.with_more(other, 7.0)
    np.testing.assert_allclose(both.weight, [*one.weight, *7 * other.weight])
    np.testing.assert_array_equal(targets(both), np.concatenate([targets(one), targets(other)]))
    from_sums = decoding.fit_ridges(Moments.of(one).plus(Moments.of(other), 7.0), (0.1,))[0].decode(new)
    np.testing.assert_allclose(from_sums, by_scikit_learn(both, 0.1, 4, new), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("voxels", [6, 70])
def test_from_trials_that_are_all_the_same_the_mean_is_learnt(voxels):
    """As the responses of a system that has learnt nothing are."""
    same = dataclasses.replace(examples(), fmri=np.full((40, voxels), 0.1, np.float32))
    decoders = decoding.fit_ridges(same)
    assert len(decoders) == len(decoding.PENALTIES)
    expected = np.average(targets(same), axis=0, weights=same.weight).reshape(2, 3)
    for decoder in decoders:
        decoded = decoder.decode(RNG.normal(size=(3, voxels)).astype(np.float32))
        np.testing.assert_allclose(decoded, np.broadcast_to(expected, decoded.shape), rtol=1e-5)


def test_mean_tokens_are_weighted():
    trials = examples()
    expected = np.average(targets(trials), axis=0, weights=trials.weight).reshape(2, 3)
    np.testing.assert_allclose(trials.mean_tokens(), expected, rtol=1e-5)


# ---- the network -----------------------------------------------------------------------------------


def test_network_equals_a_plain_program():
    model = TokenDecoder(TokenDecoderConfig(tokens=2, width=3, hidden=5, depth=2))
    fmri = jnp.asarray(RNG.normal(size=(4, 7)), jnp.float32)
    shapes = model.init(jax.random.key(0), fmri)["params"]
    params = jax.tree.map(lambda leaf: RNG.normal(size=leaf.shape).astype(np.float32), shapes)

    def dense(x, layer):
        return x @ np.float64(layer["kernel"]) + layer["bias"]

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    hidden = dense(np.float64(fmri), params["into"])
    for block in range(2):
        norm = params[f"norm_{block}"]
        inner = (hidden - hidden.mean(1, keepdims=True)) / np.sqrt(hidden.var(1, keepdims=True) + 1e-6)
        inner = gelu(dense(inner * norm["scale"] + norm["bias"], params[f"block_{block}_in"]))
        hidden = hidden + dense(inner, params[f"block_{block}_out"])
    expected = dense(hidden, params["out"]).reshape(4, 2, 3)
    np.testing.assert_allclose(model.apply({"params": params}, fmri), expected, rtol=1e-4, atol=1e-4)


def test_dropout_is_in_training_only_and_keeps_the_mean():
    model = TokenDecoder(TokenDecoderConfig(tokens=1, width=4, hidden=64, depth=0, dropout=0.5))
    fmri = jnp.asarray(RNG.normal(size=(1, 7)), jnp.float32)
    params = model.init(jax.random.key(0), fmri)
    keys = jax.random.split(jax.random.key(1), 4000)
    draws = jax.vmap(lambda key: model.apply(params, fmri, training=True, rngs={"dropout": key}))(keys)
    spread = np.std(draws, axis=0)
    assert spread.min() > 0.1
    np.testing.assert_array_less(abs(np.mean(draws, axis=0) - model.apply(params, fmri)), 4 * spread / 4000**0.5)


@pytest.mark.parametrize(
    ("change", "message"), [({"tokens": 0}, "decoder.tokens is 0"), ({"dropout": 1.0}, "decoder.dropout is 1.0")]
)
def test_network_sizes_that_cannot_be_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        TokenDecoderConfig(**{"tokens": 2, "width": 3, **change})


QUICK = NetworkSettings(hidden=32, dropout=0.0, batch_size=16, steps=40, eval_every=20)


def fit(train: Examples, validation: Examples, seed: int = 0, **changes) -> decoding.NetworkDecoder:
    settings = dataclasses.replace(QUICK, **changes)
    return decoding.fit_network(train, validation, train.mean_tokens(), settings, seed)


def test_network_learns_what_ridge_cannot():
    def seen(seed, pictures=300):
        rng = np.random.default_rng(seed)
        fmri = rng.normal(size=(pictures, 4)).astype(np.float32)
        return Examples.alike(fmri, abs(fmri[:, :, None]) + 3, np.arange(pictures))

    train, validation, test = map(seen, (0, 1, 2))
    network = fit(train, validation, steps=200, weight_decay=0.01)
    ridge, _ = decoding.choose(decoding.fit_ridges(train), validation, train.mean_tokens())
    errors = [float(((one.decode(test.fmri) - test.tokens) ** 2).mean()) for one in (network, ridge)]
    assert errors[0] < 0.4 * errors[1]


def test_network_does_not_depend_on_units():
    train, validation = examples(), examples(seed=1)

    def in_other_units(trials):
        return dataclasses.replace(trials, fmri=8 * trials.fmri + 4, tokens=2 * trials.tokens - 8)

    plain = fit(train, validation).decode(validation.fmri)
    other = fit(in_other_units(train), in_other_units(validation)).decode(8 * validation.fmri + 4)
    np.testing.assert_allclose(other, 2 * plain - 8, rtol=1e-3, atol=1e-3)
    assert np.square(plain - train.mean_tokens()).mean() > 0.1


def test_network_follows_weights_and_seed():
    train, validation = examples(), examples(seed=1)
    plain = fit(train, validation).decode(validation.fmri)
    nonsense = dataclasses.replace(examples(seed=2), fmri=np.full((40, 6), 100, np.float32))
    with_nothing = fit(train.with_more(nonsense, 0.0), validation).decode(validation.fmri)
    np.testing.assert_allclose(with_nothing, plain, rtol=1e-5, atol=1e-5)
    assert not np.allclose(fit(train, validation, seed=1).decode(validation.fmri), plain, atol=1e-2)


def test_retrieval_loss_asks_for_directions():
    """It asks for the direction of the true tokens only, so that with much of it their length is off."""
    train = examples(noise=0.0)

    def cosine_and_error(weight):
        decoder = fit(train, train, retrieval_weight=weight, weight_decay=0.01, steps=200)
        error = np.square(decoder.decode(train.fmri) - targets(train).reshape(-1, 2, 3)).mean()
        return decoding.agreement(decoder, train, train.mean_tokens()), error

    (plain, plain_error), (contrasted, contrasted_error) = cosine_and_error(0.0), cosine_and_error(30.0)
    assert min(plain, contrasted) > 0.9
    assert contrasted_error > 2 * plain_error


def test_training_ends_and_goes_back_to_the_best_validation(monkeypatch):
    train, validation = examples(), examples(seed=1)
    scores = iter([0.1, 0.5, 0.4, 0.5, 0.9])
    monkeypatch.setattr(decoding, "agreement", lambda *_: next(scores))
    stopped = fit(train, validation, steps=100, patience=2)
    assert next(scores) == 0.9  # never asked for
    scores = iter([0.1, 0.5, 0.4, 0.4, 0.4])
    whole = fit(train, validation, steps=100, patience=9)
    jax.tree.map(np.testing.assert_array_equal, stopped.params, whole.params)
    scores = iter([0.9, 0.5, 0.4, 0.4, 0.4])
    earlier = fit(train, validation, steps=100, patience=9)
    assert not np.allclose(earlier.params["out"]["kernel"], whole.params["out"]["kernel"], atol=1e-3)


# ---- choosing --------------------------------------------------------------------------------------


class Told:
    """A decoder that gives the first six voxels back as tokens [2 3], times a factor."""

    def __init__(self, factor=1.0):
        self.factor = factor

    def decode(self, fmri):
        return (self.factor * fmri[:, :6].reshape(-1, 2, 3)).astype(np.float32)


def test_agreement_is_a_cosine_about_the_origin_by_weight():
    tokens = RNG.normal(size=(2, 2, 3)).astype(np.float32)
    trials = Examples(np.stack([tokens[0], -tokens[1]]).reshape(2, 6), tokens, np.arange(2), np.array([3.0, 1.0]))
    nowhere = np.zeros((2, 3), np.float32)
    assert decoding.agreement(Told(), trials, nowhere) == pytest.approx((3 - 1) / 4, abs=1e-6)
    moved = dataclasses.replace(trials, tokens=tokens + 5, fmri=trials.fmri + 5)
    assert decoding.agreement(Told(), moved, nowhere + 5) == pytest.approx(0.5, abs=1e-5)
    best, score = decoding.choose([Told(-1.0), Told(), Told(2.0)], trials, nowhere)
    assert (best.factor, score) == (1.0, pytest.approx(0.5, abs=1e-6))


# ---- retrieval -------------------------------------------------------------------------------------


def pairs(pictures, noise, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.normal(size=(pictures, 2, 3)).astype(np.float32)
    return (tokens + noise * rng.normal(size=tokens.shape)).astype(np.float32), tokens


NOWHERE = np.zeros((2, 3), np.float32)


@pytest.mark.parametrize("pool", [2, 3, 7])
def test_retrieval_is_the_mean_over_every_pool(pool):
    decoded, tokens = pairs(7, noise=1.0)
    drawn = np.array(list(itertools.combinations(range(7), pool)))
    hits = {"image": [[] for _ in range(7)], "brain": [[] for _ in range(7)]}
    unit_decoded, unit = (
        x.reshape(7, -1) / np.linalg.norm(x.reshape(7, -1), axis=1)[:, None] for x in (decoded, tokens)
    )
    for chosen in drawn:
        similarity = unit_decoded[chosen] @ unit[chosen].T
        for place, picture in enumerate(chosen):
            hits["image"][picture].append(similarity[place].argmax() == place)
            hits["brain"][picture].append(similarity[:, place].argmax() == place)
    result = retrieval(decoded, tokens, NOWHERE, pool)
    for name, each in hits.items():
        expected = [np.mean(one) for one in each]
        assert 0.2 < np.mean(expected) < 0.95
        np.testing.assert_allclose(getattr(result, name), expected, atol=1e-12)
    released = released_metrics.retrieval_top1(tokens, decoded, drawn)
    assert result.image.mean() == pytest.approx(released.brain_to_image.mean())
    assert result.brain.mean() == pytest.approx(released.image_to_brain.mean())
    assert result.pool == pool


def test_two_way_is_the_share_of_other_pictures_that_are_less_alike():
    decoded, tokens = pairs(20, noise=1.5)
    cosine = np.array([[np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b) for b in tokens] for a in decoded])
    expected = [np.mean(np.delete(row, i) < row[i]) for i, row in enumerate(cosine)]
    result = retrieval(decoded, tokens, NOWHERE)
    np.testing.assert_allclose(result.two_way, expected, atol=1e-12)
    assert 0.6 < result.two_way.mean() < 0.99


def test_nothing_decoded_is_at_chance():
    _, tokens = pairs(9, noise=1.0)
    result = retrieval(np.ones_like(tokens), tokens, NOWHERE)
    assert result.image.sum() == 1  # the picture that is most like what is always decoded
    assert result.brain.sum() == 0  # all alike: a tie is no retrieval
    assert result.two_way.mean() == pytest.approx(0.5)
    nothing = retrieval(np.zeros_like(tokens), tokens, NOWHERE)
    np.testing.assert_array_equal([nothing.image, nothing.brain, nothing.two_way], [[0] * 9, [0] * 9, [0.5] * 9])


def test_what_all_tokens_share_does_not_matter_about_their_mean():
    """What is decoded from noisy trials lies too near the mean, and so do then the pictures retrieved."""
    decoded, tokens = pairs(40, noise=1.0)
    plain, moved = (retrieval(0.25 * decoded + by, tokens + by, NOWHERE + by) for by in (0, 16))
    np.testing.assert_array_equal(moved.image, plain.image)
    np.testing.assert_array_equal(moved.brain, plain.brain)
    not_centred = retrieval(0.25 * decoded + 16, tokens + 16, NOWHERE)
    assert not_centred.image.mean() < 0.7 * plain.image.mean()


def test_means_and_single_trials():
    """The second trial of each picture shows the next one; the first picture has a third."""
    _, tokens = pairs(8, noise=0)
    flat = 3 * tokens.reshape(8, 6)
    trials = Examples.alike(
        np.concatenate([flat, np.roll(flat, -1, axis=0), flat[:1]]), tokens, np.r_[np.arange(8), np.arange(8), 0]
    )
    single = retrieval_of_trials(Told(), trials, NOWHERE)
    np.testing.assert_array_equal(single.image, np.full(8, 0.5))
    np.testing.assert_array_equal(single.brain, np.full(8, 0.5))
    assert single.pool == 8
    expected = np.stack([flat[i] + flat[(i + 1) % 8] for i in range(8)])
    expected[0] += flat[0]
    whole = retrieval(expected.reshape(8, 2, 3), tokens, NOWHERE)
    np.testing.assert_array_equal(retrieval_of_means(Told(), trials, NOWHERE).two_way, whole.two_way)
    assert whole.two_way.mean() > single.two_way.mean()


def test_a_pool_of_one_picture_is_refused():
    with pytest.raises(InputError, match="1 decoded and 1 true"):
        retrieval(*pairs(1, noise=0), NOWHERE)


def test_linear_decoder_is_affine():
    kernel = RNG.normal(size=(4, 6)).astype(np.float32)
    decoder = LinearDecoder(np.arange(4, dtype=np.float32), np.ones((2, 3), np.float32), kernel)
    fmri = RNG.normal(size=(5, 4)).astype(np.float32)
    expected = 1 + ((fmri - np.arange(4)) @ kernel).reshape(5, 2, 3)
    np.testing.assert_allclose(decoder.decode(fmri), expected, rtol=1e-5, atol=1e-5)
