"""The two stages of training: what each learns from, its loss, and its validation.

Stage 1 trains BrainVAE on single trials (and means of several). Stage 2 freezes it and trains the mapper to hit its
latents from the pictures' tokens. A room of its own because `training.py` knows neither models nor data.

Shape letters: b batch, s stimuli, v voxels, t tokens, d token width.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Float, Int, PRNGKeyArray, PyTree

from synbrain_jax import losses, metrics
from synbrain_jax.checkpoint import Bundle
from synbrain_jax.config import Config, Stage1Config, Stage2Config
from synbrain_jax.data.pairs import Dataset, Records, Trials, training_batches
from synbrain_jax.files import read_npz, write_npz
from synbrain_jax.interop.torch_training import check_start, training_state
from synbrain_jax.models.brain_vae import BrainVAE, brain_vae_shapes
from synbrain_jax.models.semantic_to_neural import SemanticToNeural, mapper_shapes
from synbrain_jax.synthesis import SynBrain, model_order
from synbrain_jax.training import LossFunction, Stage, TrainState


def stage1(config: Config, dataset: Dataset, validation: Trials) -> Stage:
    """BrainVAE on the training trials of a data set."""
    model, settings = BrainVAE(config.brain_vae), config.stage1
    order = model_order(config.data.voxel_order, dataset.voxels.order)
    return Stage(
        name="stage1",
        config=settings,
        # No parameter depends on the number of voxels.
        init=lambda key: model.init(key, jnp.zeros((1, 8)))["params"],
        loss=brain_vae_loss(model, settings),
        frozen={},
        batches=training_batches(
            dataset,
            "train",
            batch_size=settings.batch_size,
            seed=config.seed,
            average_share=settings.average_share,
            order=order,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        ),
        validate=_stage1_validation(
            brain_vae_loss(model, dataclasses.replace(settings, contrast_size=None)),
            validation,
            order,
            settings.batch_size,
        ),
        stop=_stop_rule(settings, dataset.n_voxels),
        start=_start(settings.start_from),
    )


def stage2(
    config: Config, dataset: Dataset, validation: Trials, brain_vae: PyTree, targets: Float[np.ndarray, "s t d"] | None
) -> Stage:
    """The mapper on the stimuli (or trials) of a data set; `targets` are the mean latents of `encode_stimuli`."""
    mapper, vae, settings = SemanticToNeural(config.mapper), BrainVAE(config.brain_vae), config.stage2
    order = model_order(config.data.voxel_order, dataset.voxels.order)
    by_stimulus = settings.target == "stimulus_mean"
    return Stage(
        name="stage2",
        config=settings,
        init=lambda key: mapper.init(key, jnp.zeros((1, config.mapper.tokens, config.mapper.width)))["params"],
        loss=mapper_loss(mapper, vae, settings),
        frozen=brain_vae,
        batches=training_batches(
            dataset,
            "train",
            batch_size=settings.batch_size,
            seed=config.seed + 1,
            unit="stimulus" if by_stimulus else "trial",
            targets=targets if by_stimulus else None,
            order=order,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        ),
        validate=_stage2_validation(mapper, vae, brain_vae, validation, order, settings.batch_size),
        start=_start(settings.start_from),
    )


def _stop_rule(settings: Stage1Config, n_voxels: int) -> Callable[[dict[str, float]], bool]:
    scale = n_voxels if settings.loss_scale == "sum" else 1
    return lambda terms: settings.stop_below is not None and terms["mse"] * scale < settings.stop_below


def check_starts(config: Config) -> None:
    """Raises InputError if a checkpoint that a stage is to start from cannot be used for its model."""
    if config.stage1.start_from is not None:
        check_start(config.stage1.start_from, brain_vae_shapes(config.brain_vae))
    if config.stage2.start_from is not None:
        check_start(config.stage2.start_from, mapper_shapes(config.mapper))


def _start(path: str | None) -> Callable[[TrainState], TrainState] | None:
    return None if path is None else functools.partial(training_state, path)


def brain_vae_loss(model: BrainVAE, settings: Stage1Config) -> LossFunction:
    """Squared error + KL + soft-CLIP of a batch, weighted and scaled as configured. The terms are logged unweighted:
    `mse` per voxel, `kl` in nats, `soft_clip`."""

    def loss(params, _frozen, batch, key: PRNGKeyArray | None):
        out = model.apply({"params": params}, batch["fmri"], key)
        voxels = batch["fmri"].shape[-1]
        squared_error = losses.squared_error(out.reconstruction, batch["fmri"])
        kl = losses.kl_to_standard_normal(out.posterior.mean, out.posterior.logvar)
        soft_clip = losses.soft_clip(out.latent, batch["tokens"], contrast_size=settings.contrast_size)
        total = squared_error + settings.kl_weight * kl
        if settings.loss_scale == "voxel":
            total = total / voxels
        total = total + settings.clip_weight * soft_clip
        return total, {"loss": total, "mse": squared_error / voxels, "kl": kl, "soft_clip": soft_clip}

    return loss


def mapper_loss(mapper: SemanticToNeural, vae: BrainVAE, settings: Stage2Config) -> LossFunction:
    """Latent MSE, plus the voxel MSE of the decoded prediction if it has a weight. `batch["latent"]` is the target if
    it is there; otherwise `batch["fmri"]` is encoded."""

    def loss(params, frozen, batch, _key):
        tokens, fmri = batch["tokens"], batch["fmri"]
        latent = batch.get("latent")
        if latent is None:
            latent = jax.lax.stop_gradient(vae.apply({"params": frozen}, fmri, method="encode").mean)
        output = mapper.apply({"params": params}, tokens)
        latent_mse = losses.mapper_mse(output, tokens, latent, mapper.config.prediction, batch.get("weight"))
        terms = {"latent_mse": latent_mse}
        total = latent_mse
        if settings.voxel_weight:
            predicted = tokens + output if mapper.config.prediction == "v" else output
            pattern = vae.apply({"params": frozen}, predicted, fmri.shape[-1], method="decode")
            terms["mse"] = losses.voxel_mse(pattern, fmri)
            total = total + settings.voxel_weight * terms["mse"]
        return total, {"loss": total, **terms}

    return loss


def encode_stimuli(
    config: Config, dataset: Dataset, params: PyTree, folder: str | os.PathLike
) -> tuple[Float[np.ndarray, "s t d"] | None, Float[np.ndarray, "t d"]]:
    """BrainVAE's view of the training set, computed once and kept in `folder`.

    Returns:
        The posterior mean averaged over the trials of each training stimulus, in record order, as a memory map: with a
        squared error the mapper's best output depends on nothing else. None where stage 2 encodes single trials.
        And the root mean posterior variance over all trials.
    """
    folder = epath.Path(folder)
    targets_file, std_file = folder / "targets.npy", folder / "latent_std.npz"
    wanted = config.stage2.target == "stimulus_mean"
    if not std_file.exists():
        vae = BrainVAE(config.brain_vae)
        encode = jax.jit(lambda params, fmri: vae.apply({"params": params}, fmri, method="encode"))
        order = model_order(config.data.voxel_order, dataset.voxels.order)
        counts = dataset.trials_per_record("train")
        shape, size = (config.brain_vae.latent_tokens, config.brain_vae.latent_dim), config.stage1.batch_size
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / "targets.npy.unfinished"
        if wanted:
            targets = np.lib.format.open_memmap(unfinished, "w+", np.float32, (len(counts), *shape))
        variance = np.zeros(shape)
        for record, fmri in _trial_batches(dataset.records("train"), size):
            # Padded, so that one program serves the last batch too.
            padded = np.pad(fmri[:, order], ((0, size - len(fmri)), (0, 0)))
            mean, logvar = (part[: len(fmri)] for part in jax.device_get(encode(params, padded)))
            variance += np.exp(logvar).sum(0, dtype=np.float64)
            if wanted:
                np.add.at(targets, record, mean / counts[record][:, None, None].astype(np.float32))
        if wanted:
            targets.flush()
            unfinished.replace(targets_file)
        write_npz(std_file, {"latent_std": np.sqrt(variance / counts.sum()).astype(np.float32)})
    targets = np.load(targets_file, mmap_mode="r") if wanted else None
    return targets, read_npz(std_file)["latent_std"]


def _trial_batches(records: Records, size: int) -> Iterator[tuple[Int[np.ndarray, " b"], Float[np.ndarray, "b v"]]]:
    """All trials in record order, `size` at a time, with the number of each one's record."""
    place, fmri = np.zeros(0, int), None
    for i in range(len(records)):
        place = np.append(place, np.full(len(records[i].fmri), i))
        fmri = records[i].fmri if fmri is None else np.concatenate([fmri, records[i].fmri])
        while len(place) >= size:
            yield place[:size], fmri[:size]
            place, fmri = place[size:], fmri[size:]
    if len(place):
        yield place, fmri


def corrected(bundle: Bundle, model: SynBrain, train: Trials, validation: Trials) -> Bundle:
    """`bundle` with the offset and gain of `fit_correction`; `model` is the uncorrected bundle's."""
    predictions = [(model.predict(trials.tokens), trials) for trials in (train, validation)]
    offset, gain = fit_correction(*predictions)
    return dataclasses.replace(bundle, offset=offset, gain=gain)


def fit_correction(
    train: tuple[Float[np.ndarray, "s v"], Trials], validation: tuple[Float[np.ndarray, "r v"], Trials]
) -> tuple[Float[np.ndarray, " v"], float]:
    """Offset per voxel and one gain that take decoded patterns to `offset + gain * pattern`.

    A decoder trained on noisy trials predicts differences between stimuli that are too large, and may be biased. The
    gain is the least-squares slope between predicted and measured differences on validation trials (at least 0, where
    the prediction is the mean pattern); the offset makes the mean prediction equal the mean training trial.

    Args:
        train, validation: the decoded pattern of each stimulus of the split, and the split.
    """
    prediction, trials = validation
    predicted = prediction[trials.stimulus]
    predicted, measured = predicted - predicted.mean(0), trials.fmri - trials.fmri.mean(0)
    power = float(np.vdot(predicted, predicted))
    # Differences as small as rounding, or none to see, say nothing about the gain.
    visible = len(prediction) > 1 and power > 1e-10 * float(np.vdot(prediction, prediction))
    gain = max(0.0, float(np.vdot(predicted, measured)) / power) if visible else 1.0
    prediction, trials = train
    mean_prediction = np.average(prediction, axis=0, weights=np.bincount(trials.stimulus, minlength=len(prediction)))
    return (trials.fmri.mean(0) - gain * mean_prediction).astype(np.float32), gain


def _stage1_validation(loss: LossFunction, validation: Trials, order: Int[np.ndarray, " v"], batch_size: int):
    """The loss without sampling on the validation trials. All batches are full and hold trials from the whole
    split, because the contrast is among a batch; a few trials, evenly spread, may be left out."""
    evaluate = jax.jit(lambda params, batch: loss(params, {}, batch, None)[1])
    n = len(validation.fmri)
    size = min(batch_size, n)
    batches = n // size

    def validate(params) -> dict[str, float]:
        totals = []
        for rows in np.linspace(0, n - 1, batches * size).round().astype(int).reshape(size, batches).T:
            tokens = validation.tokens[validation.stimulus[rows]]
            totals.append(evaluate(params, {"fmri": validation.fmri[rows][:, order], "tokens": tokens}))
        totals = jax.device_get(totals)
        return {name: float(np.mean([one[name] for one in totals])) for name in totals[0]}

    return validate


def _stage2_validation(
    mapper, vae, brain_vae: PyTree, validation: Trials, order: Int[np.ndarray, " v"], batch_size: int
):
    """Synthesised patterns of the validation stimuli against the mean of their trials, in voxel space."""
    voxels = len(order)

    @jax.jit
    def predict(params, frozen, tokens):
        latent = mapper.apply({"params": params}, tokens, method="predict_latent")
        return vae.apply({"params": frozen}, latent, voxels, method="decode")

    counts = np.bincount(validation.stimulus)[:, None]
    target = np.zeros((len(counts), voxels), np.float32)
    np.add.at(target, validation.stimulus, validation.fmri[:, order])
    target /= counts

    def validate(params) -> dict[str, float]:
        rows = []
        for start in range(0, len(validation.tokens), batch_size):
            tokens = validation.tokens[start : start + batch_size]
            padded = np.pad(tokens, ((0, batch_size - len(tokens)), (0, 0), (0, 0)))
            rows.append(np.asarray(predict(params, brain_vae, padded))[: len(tokens)])
        prediction = np.concatenate(rows)
        return {
            "mse": float(np.mean(metrics.mse(prediction, target))),
            "pattern_r_centred": float(np.mean(metrics.pattern_pearson(*map(metrics.centred, (prediction, target))))),
            "voxel_r": float(np.mean(metrics.voxel_pearson(prediction, target))),
        }

    return validate
