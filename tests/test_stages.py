"""The losses, targets, validation and correction of both stages, on a small data set with parameters away from zero."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
import tiny
from sklearn.linear_model import LinearRegression

from synbrain_jax import stages
from synbrain_jax.checkpoint import Bundle
from synbrain_jax.config import DataConfig, Stage1Config, Stage2Config
from synbrain_jax.data.batches import training_batches
from synbrain_jax.data.pairs import Trials, load_trials
from synbrain_jax.models.brain_vae import BrainVAE
from synbrain_jax.models.semantic_to_neural import SemanticToNeural
from synbrain_jax.sharding import make_mesh
from synbrain_jax.stages import brain_vae_loss, encode_stimuli, fit_correction, mapper_loss
from synbrain_jax.synthesis import SynBrain

CONFIG = tiny.config()
PARAMS = tiny.random_params(CONFIG)
VAE, MAPPER = BrainVAE(CONFIG.brain_vae), SemanticToNeural(CONFIG.mapper)


@pytest.fixture(scope="module")
def splits(tiny_dataset) -> dict[str, Trials]:
    return {name: load_trials(tiny_dataset, name) for name in ("train", "validation")}


@jax.jit
def encode(params, fmri):
    return VAE.apply({"params": params["brain_vae"]}, fmri, method="encode")


@jax.jit
def decode(params, latent):
    return VAE.apply({"params": params["brain_vae"]}, latent, tiny.VOXELS, method="decode")


@jax.jit
def map_tokens(params, tokens):
    return MAPPER.apply({"params": params["mapper"]}, tokens)


@jax.jit
def autoencode(params, fmri, key):
    return VAE.apply({"params": params["brain_vae"]}, fmri, key)


def one_batch(splits, size=8, seed=1) -> dict:
    train = splits["train"]
    rows = np.random.default_rng(seed).permutation(len(train.fmri))[:size]
    tokens = train.tokens[train.stimulus[rows]]
    return {"fmri": jnp.asarray(train.fmri[rows]), "tokens": jnp.asarray(tokens)}


# ---- losses --------------------------------------------------------------------------------------


def soft_clip(latent, tokens):
    """SynBrain, section 3.2, in float64: cross-entropy both ways between the softmaxes of similarities."""
    z, c = (a.reshape(len(a), -1).astype(np.float64) for a in (latent, tokens))
    z, c = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (z, c))
    target = scipy.special.softmax(c @ c.T / 0.125, axis=1)
    ways = [-(target * scipy.special.log_softmax(s / 0.125, axis=1)).sum(1).mean() for s in (z @ c.T, c @ z.T)]
    return np.mean(ways)


@pytest.mark.parametrize(("scale", "sampled"), [("voxel", True), ("sum", False)])
def test_the_first_stages_loss_is_the_weighted_sum_of_its_terms(splits, scale, sampled):
    key = jax.random.key(4) if sampled else None
    batch = one_batch(splits)
    settings = Stage1Config(kl_weight=0.3, clip_weight=0.7, loss_scale=scale)
    total, terms = jax.jit(brain_vae_loss(VAE, settings))(PARAMS["brain_vae"], {}, batch, key)

    out = autoencode(PARAMS, batch["fmri"], key)
    mean, logvar = (np.asarray(a, np.float64) for a in out.posterior)
    assert (np.abs(out.latent - mean).max() > 0.1) == sampled
    squares = ((np.asarray(out.reconstruction, np.float64) - np.asarray(batch["fmri"])) ** 2).sum(1).mean()
    kl = 0.5 * (mean**2 + np.exp(logvar) - 1 - logvar).sum((1, 2)).mean()
    clip = soft_clip(np.asarray(out.latent), np.asarray(batch["tokens"]))
    voxels = tiny.VOXELS
    expected = {"voxel": squares / voxels + 0.3 * kl / voxels + 0.7 * clip, "sum": squares + 0.3 * kl + 0.7 * clip}
    assert float(total) == pytest.approx(expected[scale], rel=1e-5)
    found = {name: float(value) for name, value in terms.items()}
    assert found == pytest.approx(
        {"loss": float(total), "mse": squares / voxels, "kl": kl, "soft_clip": clip}, rel=1e-5
    )


def test_the_contrast_may_be_within_parts_of_a_batch_but_not_in_validation(tiny_dataset, splits):
    batch, settings = one_batch(splits), Stage1Config(batch_size=8, contrast_size=4, clip_weight=1.0)
    _, terms = jax.jit(brain_vae_loss(VAE, settings))(PARAMS["brain_vae"], {}, batch, None)
    latent, tokens = np.asarray(autoencode(PARAMS, batch["fmri"], None).latent), np.asarray(batch["tokens"])
    halves = [soft_clip(latent[half], tokens[half]) for half in (slice(4), slice(4, 8))]
    assert float(terms["soft_clip"]) == pytest.approx(np.mean(halves), rel=1e-5)

    config = dataclasses.replace(CONFIG, stage1=settings)
    validated = [
        stages.stage1(one, [tiny_dataset], [splits["validation"]]).validate(PARAMS["brain_vae"])
        for one in (config, dataclasses.replace(config, stage1=dataclasses.replace(settings, contrast_size=None)))
    ]
    assert validated[0] == validated[1]


@pytest.mark.parametrize(("scale", "of_mse"), [("voxel", 1.0), ("sum", float(tiny.VOXELS))])
def test_the_stop_rule_counts_as_the_loss_does(tiny_dataset, splits, scale, of_mse):
    def stop(below):
        settings = dataclasses.replace(CONFIG.stage1, stop_below=below, loss_scale=scale)
        return stages.stage1(dataclasses.replace(CONFIG, stage1=settings), [tiny_dataset], [splits["validation"]]).stop

    terms = {"mse": 0.5, "loss": 9.0}
    assert stop(0.5 * of_mse * 1.01)(terms)
    assert not stop(0.5 * of_mse)(terms)
    assert not stop(None)(terms)


@pytest.mark.parametrize("prediction", ["x", "v"])
def test_the_second_stages_loss_is_the_error_of_the_predicted_latent_and_pattern(splits, prediction):
    mapper = SemanticToNeural(dataclasses.replace(CONFIG.mapper, prediction=prediction))
    batch = one_batch(splits)
    rng = np.random.default_rng(0)
    batch["latent"] = jnp.asarray(rng.normal(size=batch["tokens"].shape), jnp.float32)
    batch["weight"] = jnp.asarray(rng.uniform(0.5, 1.5, size=8), jnp.float32)
    loss = mapper_loss(mapper, VAE, Stage2Config(voxel_weight=0.25))
    total, terms = jax.jit(loss)(PARAMS["mapper"], PARAMS["brain_vae"], batch, None)

    latent = map_tokens(PARAMS, batch["tokens"]) + (batch["tokens"] if prediction == "v" else 0)
    per_sample = np.asarray(batch["weight"])[:, None, None] * np.asarray((latent - batch["latent"]) ** 2)
    latent_mse, mse = per_sample.mean(), float(np.mean((decode(PARAMS, latent) - batch["fmri"]) ** 2))
    assert float(terms["latent_mse"]) == pytest.approx(latent_mse, rel=1e-5)
    assert float(terms["mse"]) == pytest.approx(mse, rel=1e-5)
    assert float(total) == float(terms["loss"]) == pytest.approx(latent_mse + 0.25 * mse, rel=1e-5)


def test_without_a_target_the_trial_itself_is_encoded_and_the_encoder_gets_no_gradient(splits):
    batch = one_batch(splits)
    loss = mapper_loss(MAPPER, VAE, Stage2Config(target="trial"))
    value_and_grad = jax.jit(jax.value_and_grad(lambda *args: loss(*args)[0], argnums=(0, 1)))
    total, (to_mapper, to_frozen) = value_and_grad(PARAMS["mapper"], PARAMS["brain_vae"], batch, None)
    target = encode(PARAMS, batch["fmri"]).mean
    expected = float(np.mean((map_tokens(PARAMS, batch["tokens"]) - target) ** 2))
    assert float(total) == pytest.approx(expected, rel=1e-5)
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(to_frozen))
    assert any(np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(to_mapper))


def test_both_stages_start_from_their_models_and_read_their_settings(tiny_dataset, splits):
    """Shapes of the initial parameters; batches in model order; what stage 2 is given is not trained."""
    first = stages.stage1(CONFIG, [tiny_dataset], [splits["validation"]])
    targets = np.random.default_rng(0).normal(size=(9, tiny.TOKENS, tiny.WIDTH)).astype(np.float32)
    second = stages.stage2(CONFIG, [tiny_dataset], [splits["validation"]], PARAMS["brain_vae"], [targets])
    for stage, name in ((first, "brain_vae"), (second, "mapper")):
        shapes = jax.eval_shape(stage.init, jax.random.key(0))
        assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(np.shape, PARAMS[name])
    assert first.frozen == {}
    assert second.frozen is PARAMS["brain_vae"]
    assert (first.config, second.config) == (CONFIG.stage1, CONFIG.stage2)

    order, train = tiny_dataset.voxels.order, splits["train"]
    trial, mean = next(first.batches), next(second.batches)
    given = {row.tobytes() for row in train.fmri[:, order]}
    assert all(row.tobytes() in given for row in trial["fmri"])
    place = [int(np.argmax((train.tokens == tokens).all((1, 2)))) for tokens in mean["tokens"]]
    np.testing.assert_array_equal(mean["latent"], targets[place])
    means = np.stack([train.fmri[train.stimulus == s].mean(0) for s in place])
    np.testing.assert_allclose(mean["fmri"], means[:, order], atol=1e-6)

    reseeded = dataclasses.replace(CONFIG, seed=1)
    again = next(stages.stage1(CONFIG, [tiny_dataset], [splits["validation"]]).batches)
    other = next(stages.stage1(reseeded, [tiny_dataset], [splits["validation"]]).batches)
    np.testing.assert_array_equal(again["fmri"], trial["fmri"])
    assert (other["fmri"] != trial["fmri"]).any()

    given_order = dataclasses.replace(CONFIG, data=DataConfig(voxel_order="given"))
    trial = next(stages.stage1(given_order, [tiny_dataset], [splits["validation"]]).batches)
    given = {row.tobytes() for row in train.fmri}
    assert all(row.tobytes() in given for row in trial["fmri"])

    one_trial = dataclasses.replace(CONFIG, stage2=dataclasses.replace(CONFIG.stage2, target="trial"))
    batch = next(
        stages.stage2(one_trial, [tiny_dataset], [splits["validation"]], PARAMS["brain_vae"], [targets]).batches
    )
    assert set(batch) == {"fmri", "tokens"}


def test_validation_takes_no_more_samples_at_once_than_a_part_of_a_batch(tiny_dataset, splits, monkeypatch):
    seen = []

    def jit_beside(function):
        def call(params, batch):
            seen.append({len(rows) for rows in jax.tree.leaves(batch)})
            return jax.jit(function)(params, batch)

        return call

    monkeypatch.setattr(stages, "jit_beside", jit_beside)
    parts = {name: dataclasses.replace(getattr(CONFIG, name), accumulate=2) for name in ("stage1", "stage2")}
    config = dataclasses.replace(CONFIG, **parts)
    given = (config, [tiny_dataset], [splits["validation"]])
    stages.stage1(*given).validate(PARAMS["brain_vae"])
    stages.stage2(*given, PARAMS["brain_vae"], [None]).validate(PARAMS["mapper"])
    assert seen == [{4}] * (18 // 4 + math.ceil(9 / 4))


# ---- several subjects ----------------------------------------------------------------------------


def test_several_subjects_are_validated_each_and_on_average(two_subjects):
    validation = [load_trials(dataset, "validation") for dataset in two_subjects]
    for make, more in ((stages.stage1, lambda _: []), (stages.stage2, lambda n: [PARAMS["brain_vae"], [None] * n])):
        params = PARAMS["brain_vae" if make is stages.stage1 else "mapper"]
        together = make(CONFIG, two_subjects, validation, *more(2)).validate(params)
        alone = [make(CONFIG, [two_subjects[i]], [validation[i]], *more(1)).validate(params) for i in (0, 1)]
        for name in alone[0]:
            assert together.pop(name) == pytest.approx(np.mean([numbers[name] for numbers in alone]))
            assert [together.pop(f"{name}/{who}") for who in ("tiny", "second")] == [one[name] for one in alone]
        assert together == {}


def test_the_stop_rule_counts_the_mean_number_of_voxels(two_subjects):
    settings = dataclasses.replace(CONFIG.stage1, stop_below=0.5 * 37.5, loss_scale="sum")
    validation = [load_trials(dataset, "validation") for dataset in two_subjects]
    stop = stages.stage1(dataclasses.replace(CONFIG, stage1=settings), two_subjects, validation).stop
    assert stop({"mse": 0.499})
    assert not stop({"mse": 0.501})


def test_one_subject_has_the_workdir_and_several_have_folders_in_it(two_subjects, tmp_path):
    assert stages.folders(tmp_path, two_subjects[:1]) == [tmp_path]
    assert stages.folders(tmp_path, two_subjects) == [tmp_path / "tiny", tmp_path / "second"]


# ---- targets of stage 2 --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoded(tiny_dataset, tmp_path_factory):
    """Folder, targets and posterior spread of `encode_stimuli`; batches of 4, so that most records need padding."""
    folder = tmp_path_factory.mktemp("stage2") / "new"
    config = dataclasses.replace(CONFIG, stage1=dataclasses.replace(CONFIG.stage1, batch_size=4))
    return folder, *encode_stimuli(config, tiny_dataset, PARAMS["brain_vae"], folder)


def test_targets_are_mean_latents_and_the_spread_is_the_posteriors(tiny_dataset, splits, encoded):
    _, targets, latent_std = encoded
    train, order = splits["train"], tiny_dataset.voxels.order
    posterior = encode(PARAMS, train.fmri[:, order])  # every trial at once
    expected = np.stack([np.asarray(posterior.mean)[train.stimulus == s].mean(0) for s in range(9)])
    np.testing.assert_allclose(targets, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(latent_std, np.sqrt(np.exp(posterior.logvar).mean(0)), rtol=1e-5)
    assert (targets.dtype, latent_std.dtype) == (np.float32, np.float32)
    assert np.ptp(expected, axis=0).min() > 1e-2  # the stimuli do differ


def test_targets_are_computed_once(tiny_dataset, encoded):
    folder, targets, latent_std = encoded
    assert sorted(path.name for path in folder.iterdir()) == ["latent_std.npz", "targets.npy"]
    broken = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), PARAMS["brain_vae"])
    again = encode_stimuli(CONFIG, tiny_dataset, broken, folder)
    np.testing.assert_array_equal(again[0], targets)
    np.testing.assert_array_equal(again[1], latent_std)


@pytest.mark.parametrize("left", ["targets.npy.unfinished", "targets.npy"])
def test_targets_that_were_not_finished_are_computed_again(tiny_dataset, encoded, tmp_path, left):
    """The spread is written last: without it, nothing of what a killed run left counts."""
    (tmp_path / left).write_bytes(b"half")
    targets, _ = encode_stimuli(CONFIG, tiny_dataset, PARAMS["brain_vae"], tmp_path)
    np.testing.assert_allclose(targets, encoded[1], rtol=1e-5, atol=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latent_std.npz", "targets.npy"]


def test_single_trials_need_no_targets(tiny_dataset, encoded, tmp_path):
    config = dataclasses.replace(CONFIG, stage2=dataclasses.replace(CONFIG.stage2, target="trial"))
    targets, latent_std = encode_stimuli(config, tiny_dataset, PARAMS["brain_vae"], tmp_path)
    assert targets is None
    np.testing.assert_allclose(latent_std, encoded[2], rtol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["latent_std.npz"]


def test_mean_targets_have_the_gradient_of_all_single_trials(tiny_dataset, encoded):
    """Weighted by its number of trials, the error to a stimulus's mean latent differs from the mean error to the
    latents of its trials by a number that the mapper does not change."""
    targets, order = encoded[1], tiny_dataset.voxels.order
    means = next(
        training_batches(
            [tiny_dataset],
            "train",
            batch_size=9,
            seed=0,
            unit="stimulus",
            targets=[targets],
            orders=[order],
            num_threads=0,
        )
    )
    trials = next(
        training_batches(
            [tiny_dataset], "train", batch_size=sum(tiny.TRAIN_TRIALS), seed=0, orders=[order], num_threads=0
        )
    )
    assert len(set(means["weight"])) > 1
    loss = mapper_loss(MAPPER, VAE, Stage2Config())
    value_and_grad = jax.jit(jax.value_and_grad(lambda *args: loss(*args)[0]))
    results = []
    for params in (PARAMS["mapper"], tiny.random_params(CONFIG, seed=1)["mapper"]):
        results.append([value_and_grad(params, PARAMS["brain_vae"], batch, None) for batch in (means, trials)])
    gaps = []
    for (mean_value, mean_grad), (trial_value, trial_grad) in results:
        for one, other in zip(jax.tree.leaves(mean_grad), jax.tree.leaves(trial_grad), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5 * max(1e-2, np.abs(other).max()))
        gaps.append(float(trial_value - mean_value))
    assert gaps[0] == pytest.approx(gaps[1], rel=1e-4)
    assert gaps[0] > 1e-3


# ---- validation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [64, 8, 5])
def test_the_first_stage_is_validated_on_interleaved_batches(tiny_dataset, splits, size):
    config = dataclasses.replace(CONFIG, stage1=dataclasses.replace(CONFIG.stage1, batch_size=size))
    validation, order = splits["validation"], tiny_dataset.voxels.order
    numbers = stages.stage1(config, [tiny_dataset], [validation]).validate(PARAMS["brain_vae"])
    # Full batches that each span the split; trials are ordered by stimulus.
    count = 18 // size or 1
    used = [round(j * 17 / (count * min(size, 18) - 1)) for j in range(count * min(size, 18))]
    assert len(set(used)) == len(used)
    terms = []
    for rows in (used[first::count] for first in range(count)):
        fmri, tokens = validation.fmri[rows][:, order], validation.tokens[validation.stimulus[rows]]
        out = autoencode(PARAMS, fmri, None)
        mse = np.mean((out.reconstruction - fmri) ** 2)
        kl = 0.5 * np.sum(out.posterior.mean**2 + np.exp(out.posterior.logvar) - 1 - out.posterior.logvar) / len(rows)
        clip = soft_clip(np.asarray(out.latent), tokens)
        weights = CONFIG.stage1
        terms.append([mse + weights.kl_weight * kl / tiny.VOXELS + weights.clip_weight * clip, mse, kl, clip])
    expected = dict(zip(("loss", "mse", "kl", "soft_clip"), np.mean(terms, axis=0), strict=True))
    assert numbers == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("size", [9, 4])
def test_the_second_stage_is_validated_by_decoded_patterns(tiny_dataset, splits, size):
    config = dataclasses.replace(CONFIG, stage2=dataclasses.replace(CONFIG.stage2, batch_size=size))
    validation = splits["validation"]
    stage = stages.stage2(config, [tiny_dataset], [validation], PARAMS["brain_vae"], [None])
    numbers = stage.validate(PARAMS["mapper"])
    target = np.stack([validation.fmri[validation.stimulus == s].mean(0) for s in range(9)])[
        :, tiny_dataset.voxels.order
    ]
    prediction = np.asarray(decode(PARAMS, map_tokens(PARAMS, validation.tokens)))
    centred = zip(prediction - prediction.mean(0), target - target.mean(0), strict=True)
    expected = {
        "mse": np.mean((prediction - target) ** 2),
        "pattern_r_centred": np.mean([scipy.stats.pearsonr(*pair)[0] for pair in centred]),
        "voxel_r": np.mean([scipy.stats.pearsonr(*pair)[0] for pair in zip(prediction.T, target.T, strict=True)]),
    }
    assert numbers == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_a_mapper_that_says_the_same_of_every_picture_correlates_with_nothing(tiny_dataset, splits):
    """As a fresh one does; rounding must not turn a constant into a correlation."""
    stage = stages.stage2(CONFIG, [tiny_dataset], [splits["validation"]], PARAMS["brain_vae"], [None])
    constant = jax.tree.map_with_path(
        lambda path, leaf: np.zeros_like(leaf) if path[0].key == "final" and path[1].key == "kernel" else leaf,
        PARAMS["mapper"],
    )
    numbers = stage.validate(constant)
    assert numbers["pattern_r_centred"] == 0
    assert numbers["voxel_r"] == 0


# ---- offset and gain -----------------------------------------------------------------------------


def make_trials(fmri, stimulus) -> Trials:
    n = int(np.max(stimulus)) + 1
    return Trials(
        stimulus_id=tuple(map(str, range(n))),
        tokens=np.zeros((n, 1, 2), np.float32),
        fmri=np.asarray(fmri, np.float32),
        stimulus=np.asarray(stimulus, np.int32),
        run=np.zeros(len(stimulus), np.int32),
        session=np.zeros(len(stimulus), np.int32),
    )


@pytest.fixture
def biased():
    """Predictions that are twice too large and off by a pattern; unequal numbers of trials."""
    rng = np.random.default_rng(2)
    truth, offset = rng.normal(size=(2, 6, 30)), rng.normal(size=30)
    splits = []
    for patterns, counts in zip(truth, ((3, 1, 4, 2, 5, 2), (2, 2, 1, 3, 2, 2)), strict=True):
        stimulus = np.repeat(np.arange(6), counts)
        trials = make_trials(patterns[stimulus] + offset + 0.3 * rng.normal(size=(len(stimulus), 30)), stimulus)
        splits.append(((2.0 * patterns).astype(np.float32), trials))
    return splits


def test_the_gain_is_the_common_slope_and_the_offset_meets_the_training_mean(biased):
    (train_prediction, train), (prediction, validation) = biased
    offset, gain = fit_correction(*biased)
    predicted = prediction[validation.stimulus]
    # One slope, and an intercept for each voxel: regression on the prediction and thirty indicators.
    design = np.concatenate(
        [predicted.reshape(-1, 1), np.tile(np.eye(30), (len(predicted), 1))], axis=1, dtype=np.float64
    )
    slope = LinearRegression(fit_intercept=False).fit(design, validation.fmri.reshape(-1)).coef_[0]
    assert gain == pytest.approx(slope, rel=1e-4)
    assert 0.45 < gain < 0.55
    corrected = offset + gain * train_prediction[train.stimulus]
    np.testing.assert_allclose(corrected.mean(0), train.fmri.mean(0), atol=1e-5)
    assert offset.dtype == np.float32

    def error(patterns):
        return np.mean((patterns[validation.stimulus] - validation.fmri) ** 2)

    assert error(offset + gain * prediction) < 0.5 * error(prediction)
    for other in (0.8 * gain, 1.2 * gain):  # among gains whose offset is fitted alike
        shifted = train.fmri.mean(0) - other * np.mean(train_prediction[train.stimulus], axis=0)
        assert error(offset + gain * prediction) < error(shifted + other * prediction)


def test_a_gain_is_never_negative_and_a_constant_prediction_needs_none(biased):
    (train_prediction, train), (prediction, validation) = biased
    offset, gain = fit_correction((-train_prediction, train), (-prediction, validation))
    assert gain == 0
    np.testing.assert_allclose(offset, train.fmri.mean(0), atol=1e-6)
    constant = np.broadcast_to(np.float32(0.1) * np.arange(1, 31, dtype=np.float32), (6, 30))
    offset, gain = fit_correction((constant, train), (constant, validation))
    assert gain == 1
    np.testing.assert_allclose(offset + gain * constant[0], train.fmri.mean(0), atol=1e-5)


def test_a_corrected_bundle_predicts_with_less_bias(tiny_dataset, splits):
    std = np.ones((tiny.TOKENS, tiny.WIDTH), np.float32)
    bundle = Bundle.uncorrected(CONFIG, PARAMS, tiny_dataset.voxels, tiny_dataset.name, std)
    model = SynBrain(bundle, make_mesh(devices=jax.devices()[:1]))
    corrected = stages.corrected(bundle, model, splits["train"], splits["validation"])
    expected = fit_correction(*((model.predict(splits[name].tokens), splits[name]) for name in splits))
    np.testing.assert_array_equal(corrected.offset, expected[0])
    assert corrected.gain == expected[1]
    assert corrected.params is PARAMS
    train = splits["train"]
    mean = SynBrain(corrected, model.mesh).predict(train.tokens)[train.stimulus].mean(0)
    np.testing.assert_allclose(mean, train.fmri.mean(0), atol=1e-4)
