"""The two stages of training: what each learns from, its loss, and its validation.

Stage 1 trains BrainVAE on single trials (and means of several). Stage 2 freezes it and trains the mapper to hit its
latents from the pictures' tokens. No parameter depends on the number of voxels, so that both learn from one subject or
from several. A room of its own because `training.py` knows neither models nor data.

Shape letters: b batch, s stimuli, v voxels, t tokens, d token width.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Float, Int, PRNGKeyArray, PyTree

from synbrain_jax import losses, metrics
from synbrain_jax.checkpoint import Bundle
from synbrain_jax.config import Config, Stage1Config, Stage2Config
from synbrain_jax.data.batches import training_batches
from synbrain_jax.data.pairs import Dataset, Records, Trials
from synbrain_jax.distributed import agreed, barrier, is_first, whole
from synbrain_jax.files import read_npz, write_npz
from synbrain_jax.interop.torch_training import check_start, training_state
from synbrain_jax.models.brain_vae import BrainVAE, brain_vae_shapes
from synbrain_jax.models.semantic_to_neural import SemanticToNeural, mapper_shapes
from synbrain_jax.sharding import jit_beside, make_mesh, process_share, split_features
from synbrain_jax.synthesis import SynBrain, model_order
from synbrain_jax.training import LossFunction, Stage, TrainState

_ENCODED_AT_ONCE = 32  # trials, on one device, where a batch may be that of many


def folders(workdir: str | os.PathLike, datasets: Sequence[Dataset]) -> list[epath.Path]:
    """Where what belongs to one subject is kept: `workdir`, or where there are several a folder in it for each."""
    workdir = epath.Path(workdir)
    return [workdir] if len(datasets) == 1 else [workdir / dataset.voxels.subject for dataset in datasets]


def stage1(config: Config, datasets: Sequence[Dataset], validation: Sequence[Trials]) -> Stage:
    """BrainVAE on the training trials of each subject's data set."""
    model, settings = BrainVAE(config.brain_vae), config.stage1
    orders = _orders(config, datasets)
    loss = brain_vae_loss(model, dataclasses.replace(settings, contrast_size=None))
    return Stage(
        name="stage1",
        config=settings,
        init=lambda key: model.init(key, jnp.zeros((1, 8)))["params"],
        loss=brain_vae_loss(model, settings),
        compute_dtype=config.brain_vae.dtype,
        frozen={},
        batches=training_batches(
            datasets,
            "train",
            batch_size=settings.batch_size,
            seed=config.seed,
            average_share=settings.average_share,
            orders=orders,
            **_share(config),
        ),
        validate=_over_subjects(
            datasets,
            [
                trial_validation(loss, trials, order, settings.batch_size // settings.accumulate)
                for trials, order in zip(validation, orders, strict=True)
            ],
        ),
        stop=_stop_rule(settings, float(np.mean([dataset.n_voxels for dataset in datasets]))),
        start=_start(settings.start_from),
    )


def stage2(
    config: Config,
    datasets: Sequence[Dataset],
    validation: Sequence[Trials],
    brain_vae: PyTree,
    targets: Sequence[Float[np.ndarray, "_ t d"] | None],
) -> Stage:
    """The mapper on the stimuli (or trials) of each subject's data set; `targets` are their `encode_stimuli`."""
    mapper, vae, settings = SemanticToNeural(config.mapper), BrainVAE(config.brain_vae), config.stage2
    orders = _orders(config, datasets)
    by_stimulus = settings.target == "stimulus_mean"
    return Stage(
        name="stage2",
        config=settings,
        init=lambda key: mapper.init(key, jnp.zeros((1, config.mapper.tokens, config.mapper.width)))["params"],
        loss=mapper_loss(mapper, vae, settings),
        compute_dtype=config.mapper.dtype,
        frozen=brain_vae,
        batches=training_batches(
            datasets,
            "train",
            batch_size=settings.batch_size,
            seed=config.seed + 1,
            unit="stimulus" if by_stimulus else "trial",
            targets=targets if by_stimulus else None,
            orders=orders,
            **_share(config),
        ),
        validate=_over_subjects(
            datasets,
            [
                _stage2_validation(mapper, vae, brain_vae, trials, order, settings.batch_size // settings.accumulate)
                for trials, order in zip(validation, orders, strict=True)
            ],
        ),
        start=_start(settings.start_from),
    )


def _share(config: Config) -> dict[str, int]:
    """Which part of each batch this process reads."""
    index, count = process_share(make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor))
    return dict(process_index=index, process_count=count)


def _orders(config: Config, datasets: Sequence[Dataset]) -> list[Int[np.ndarray, "_"]]:
    return [model_order(config.data.voxel_order, dataset.voxels.order) for dataset in datasets]


def _over_subjects(
    datasets: Sequence[Dataset], validations: Sequence[Callable[[PyTree], dict[str, float]]]
) -> Callable[[PyTree], dict[str, float]]:
    """The mean over subjects of each number and, where there are several, those of each one as "number/subject"."""
    if len(validations) == 1:
        return validations[0]

    def validate(params) -> dict[str, float]:
        each = {data.voxels.subject: one(params) for data, one in zip(datasets, validations, strict=True)}
        names = next(iter(each.values()))
        means = {name: float(np.mean([numbers[name] for numbers in each.values()])) for name in names}
        return means | {f"{name}/{subject}": each[subject][name] for subject in each for name in names}

    return validate


def _stop_rule(settings: Stage1Config, n_voxels: float) -> Callable[[dict[str, float]], bool]:
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
        tokens = batch["tokens"].astype(jnp.float32)  # stored, and sent to the device, with half the bits
        voxels = batch["fmri"].shape[-1]
        squared_error = losses.squared_error(out.reconstruction, batch["fmri"])
        kl = losses.kl_to_standard_normal(out.posterior.mean, out.posterior.logvar)
        soft_clip = losses.soft_clip(out.latent, tokens, contrast_size=settings.contrast_size, place=split_features)
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
        tokens, fmri = batch["tokens"].astype(jnp.float32), batch["fmri"]
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
    if not agreed(std_file.exists()):
        params = jax.device_put(whole(params))
        if is_first():
            _write_encoding(config, dataset, params, targets_file if wanted else None, std_file)
        barrier()
    targets = np.load(targets_file, mmap_mode="r") if wanted else None
    return targets, read_npz(std_file)["latent_std"]


def _write_encoding(
    config: Config, dataset: Dataset, params: PyTree, targets_file: epath.Path | None, std_file: epath.Path
) -> None:
    """What `encode_stimuli` reads; `std_file` appears last."""
    vae = BrainVAE(config.brain_vae)
    encode = jax.jit(lambda params, fmri: vae.apply({"params": params}, fmri, method="encode"))
    order = model_order(config.data.voxel_order, dataset.voxels.order)
    counts = dataset.trials_per_record("train")
    shape = (config.brain_vae.latent_tokens, config.brain_vae.latent_dim)
    size = min(config.stage1.batch_size, _ENCODED_AT_ONCE)
    std_file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = std_file.with_name("targets.npy.unfinished")
    if targets_file:
        targets = np.lib.format.open_memmap(unfinished, "w+", np.float32, (len(counts), *shape))
    variance = np.zeros(shape)
    for record, fmri in _trial_batches(dataset.records("train"), size):
        # Padded, so that one program serves the last batch too.
        padded = np.pad(fmri[:, order], ((0, size - len(fmri)), (0, 0)))
        mean, logvar = (part[: len(fmri)] for part in jax.device_get(encode(params, padded)))
        variance += np.exp(logvar).sum(0, dtype=np.float64)
        if targets_file:
            for place, share in zip(record, mean / counts[record][:, None, None].astype(np.float32), strict=True):
                targets[place] += share
    if targets_file:
        targets.flush()
        unfinished.replace(targets_file)
    write_npz(std_file, {"latent_std": np.sqrt(variance / counts.sum()).astype(np.float32)})


def _trial_batches(records: Records, size: int) -> Iterator[tuple[Int[np.ndarray, " b"], Float[np.ndarray, "b v"]]]:
    """All trials in record order, `size` at a time, with the number of each one's record."""
    place, fmri = np.zeros(0, int), None
    for i in range(len(records)):
        own = records[i].fmri
        place = np.append(place, np.full(len(own), i))
        fmri = own if fmri is None else np.concatenate([fmri, own])
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


def trial_validation(
    loss: LossFunction, validation: Trials, order: Int[np.ndarray, " v"], batch_size: int
) -> Callable[[PyTree], dict[str, float]]:
    """The terms of a loss, without sampling, on the validation trials. All batches are full and hold trials from the
    whole split, because the contrast is among a batch; a few trials, evenly spread, may be left out."""
    evaluate = jit_beside(lambda params, batch: loss(params, {}, batch, None)[1])
    n = len(validation.fmri)
    size = min(batch_size, n)
    batches = n // size

    def validate(params) -> dict[str, float]:
        totals = []
        for rows in np.linspace(0, n - 1, batches * size).round().astype(int).reshape(size, batches).T:
            tokens = validation.tokens[validation.stimulus[rows]]
            totals.append(evaluate(params, {"fmri": validation.fmri[rows][:, order], "tokens": tokens}))
        totals = jax.device_get(whole(totals))
        return {name: float(np.mean([one[name] for one in totals])) for name in totals[0]}

    return validate


def _stage2_validation(
    mapper, vae, brain_vae: PyTree, validation: Trials, order: Int[np.ndarray, " v"], batch_size: int
):
    """Synthesised patterns of the validation stimuli against the mean of their trials, in voxel space."""
    voxels = len(order)

    @jit_beside
    def predict(params, tokens):
        latent = mapper.apply({"params": params["mapper"]}, tokens, method="predict_latent")
        return vae.apply({"params": params["brain_vae"]}, latent, voxels, method="decode")

    counts = np.bincount(validation.stimulus)[:, None]
    target = np.zeros((len(counts), voxels), np.float32)
    np.add.at(target, validation.stimulus, validation.fmri[:, order])
    target /= counts

    def validate(params) -> dict[str, float]:
        rows = []
        for start in range(0, len(validation.tokens), batch_size):
            tokens = validation.tokens[start : start + batch_size]
            padded = np.pad(tokens, ((0, batch_size - len(tokens)), (0, 0), (0, 0)))
            pattern = predict({"mapper": params, "brain_vae": brain_vae}, padded)
            rows.append(np.asarray(whole(pattern))[: len(tokens)])
        prediction = np.concatenate(rows)
        return {
            "mse": float(np.mean(metrics.mse(prediction, target))),
            "pattern_r_centred": float(np.mean(metrics.pattern_pearson(*map(metrics.centred, (prediction, target))))),
            "voxel_r": float(np.mean(metrics.voxel_pearson(prediction, target))),
        }

    return validate
