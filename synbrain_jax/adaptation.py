"""A trained system fine-tuned to another brain, from little data of it.

No parameter depends on the number of voxels, so that a new brain can start from the parameters of another. BrainVAE is
fine-tuned whole, then the mapper, or a part of it, against the fine-tuned BrainVAE's latents, as in SynBrain, which
tunes the mapper's MLPs. Both stages are those of training, from other first parameters, with a share of the new
person's few stimuli held out for validation: it stops them, and picks the checkpoint.

Left alone, the first stage can make the mapper useless: reconstructing the new brain's patterns and matching its few
pictures, BrainVAE's latents may move away from those that the source mapper predicts; little data must teach it again.
So its decoder also learns to read the new brain out of the source mapper's latents (`AdaptationConfig.readout_weight`),
which is ours and not SynBrain's; docs/studies.md has what it is worth.

Only what is tuned has a gradient and an optimizer's state. With LoRA (Hu et al. 2021, arXiv 2106.09685) that is a
product of two thin matrices for each kernel, which the result has added to the kernels: a system as any other.
"""

import dataclasses
import json
import os
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from jaxtyping import PyTree

from synbrain_jax import losses, run, stages
from synbrain_jax.checkpoint import Bundle, check_workdir, claim_workdir
from synbrain_jax.config import AdaptationConfig, Config, DataConfig, MeshConfig, Stage1Config, Stage2Config
from synbrain_jax.data.pairs import Dataset, Trials, load_trials, open_dataset
from synbrain_jax.distributed import first_then_others, is_first, whole
from synbrain_jax.errors import InputError
from synbrain_jax.files import read_text, write_text
from synbrain_jax.models.brain_vae import BrainVAE
from synbrain_jax.models.semantic_to_neural import SemanticToNeural
from synbrain_jax.sharding import make_mesh, replicated
from synbrain_jax.synthesis import SynBrain, model_order
from synbrain_jax.training import Stage, TrainState, check_batch_sizes, fit, init_state, make_optimizer

SETTINGS_FILE = "adaptation.json"
_BLOCK_PARTS = ("mlp", "attn")
_DEFAULT = AdaptationConfig()


def adapt(
    source: Bundle,
    data: str | os.PathLike,
    workdir: str | os.PathLike,
    settings: AdaptationConfig = _DEFAULT,
    mesh: Mesh | None = None,
) -> SynBrain | None:
    """Fine-tunes `source` to the brain of a prepared data set; the result is saved as `workdir`/bundle.

    Its voxels, offset, gain and spread of trials are the new brain's. Given again after a stop, it goes on. Several
    processes all call it; the first gets the system, on its own devices, the others None.

    Args:
        data: folder of the prepared data set, with the tokens of the encoder that the source was trained with.
        mesh: all devices unless given.

    Raises:
        InputError: the data set does not fit the source, has too few stimuli, or `workdir` holds something else.
        NonFiniteLoss, NotStored, Stopped: as `training.fit`.
    """
    workdir, mesh = epath.Path(workdir), make_mesh() if mesh is None else mesh
    config, dataset = _prepared(source, data, settings)
    config = dataclasses.replace(config, mesh=MeshConfig(fsdp=mesh.shape["fsdp"], tensor=mesh.shape["tensor"]))
    noted = {"source": _digest(source.params), **dataclasses.asdict(settings)}
    check_workdir(workdir, config)
    _check_settings(workdir, noted)
    check_batch_sizes(config, mesh)
    params = jax.device_get(source.params)
    part = tuned_part(params["mapper"], settings)
    with first_then_others():
        if is_first():
            write_text(workdir / SETTINGS_FILE, json.dumps(noted, indent=2) + "\n")
    claim_workdir(workdir, config)
    config = config.for_platform(jax.default_backend())

    validation = load_trials(dataset, "validation")
    stage1 = stages.stage1(config, [dataset], [validation])
    if settings.readout_weight:
        stage1 = with_readout(stage1, config, params["mapper"], settings.readout_weight, mesh, dataset, validation)
    stage1 = dataclasses.replace(stage1, start=_start_at(params["brain_vae"], config.stage1))
    brain_vae = fit(stage1, config, mesh, workdir / "stage1")

    targets, latent_std = stages.encode_stimuli(config, dataset, brain_vae, workdir / "stage2")
    stage2 = _only(part, stages.stage2(config, [dataset], [validation], brain_vae, [targets]), mesh)
    tuned = fit(stage2, config, mesh, workdir / "stage2")
    mapper = _join(stage2.frozen["mapper"], tuned)

    trained = run.Trained(whole({"brain_vae": brain_vae, "mapper": mapper}), (latent_std,))
    if not is_first():
        return None
    return run.export(config, trained, 0, dataset, validation, mesh.local_mesh, workdir)


# ---- what is known before anything is trained -------------------------------------------------------


def _prepared(source: Bundle, data: str | os.PathLike, settings: AdaptationConfig) -> tuple[Config, Dataset]:
    """The configuration of the run, and the data set with its validation split."""
    dataset = open_dataset(data)
    expected = (source.config.mapper.tokens, source.config.mapper.width)
    if dataset.token_shape != expected:
        raise InputError(
            f"{dataset.path}: tokens are {list(dataset.token_shape)}, but the system to adapt takes {list(expected)}; "
            "prepare the data with the encoder that it was trained with"
        )
    dataset = dataset.limited(settings.sessions, settings.stimuli)
    dataset = dataset.with_validation_share(settings.validation_share, settings.seed)
    return adapted_config(source.config, os.fspath(dataset.path), settings), dataset


def adapted_config(source: Config, data: str, settings: AdaptationConfig) -> Config:
    """The source's configuration with the data, steps, rates, patience and seed of an adaptation."""

    def tuned(stage: Stage1Config | Stage2Config, steps: int | None, rate: float):
        return dataclasses.replace(
            chosen_by_validation(stage, settings.patience),
            steps=stage.steps if steps is None else steps,
            optimizer=dataclasses.replace(stage.optimizer, learning_rate=rate * stage.optimizer.learning_rate),
            eval_every=stage.eval_every if settings.eval_every is None else settings.eval_every,
        )

    return dataclasses.replace(
        source,
        seed=settings.seed,
        data=DataConfig(
            builder="prepared",
            source=data,
            sessions=settings.sessions,
            stimuli=settings.stimuli,
            voxel_order=source.data.voxel_order,
        ),
        stage1=tuned(source.stage1, settings.brain_vae_steps, settings.brain_vae_rate),
        stage2=tuned(source.stage2, settings.mapper_steps, settings.mapper_rate),
        # Mappers for cross-fitting are trained whole.
        variability=dataclasses.replace(source.variability, folds=min(source.variability.folds, 1)),
    )


def chosen_by_validation(stage: Stage1Config | Stage2Config, patience: int | None) -> Stage1Config | Stage2Config:
    """The stage stopped by validation, and by nothing else, with its best checkpoint as the result."""
    first = isinstance(stage, Stage1Config)
    best = "val/loss" if first else "val/pattern_r_centred"
    # "last" is never worse than the best, so that patience would not end it.
    select = best if stage.select == "last" else stage.select
    alone = dict(stop_below=None) if first else {}
    return dataclasses.replace(stage, patience=patience, select=select, start_from=None, **alone)


def _digest(params: PyTree) -> int:
    """A check sum of all values."""
    total = 0
    for leaf in jax.tree.leaves(params):
        total = zlib.crc32(np.ascontiguousarray(leaf).view(np.uint8), total)
    return total


def _check_settings(workdir: epath.Path, noted: dict) -> None:
    """Raises InputError if `workdir` holds an adaptation of another source, or with other settings."""
    file = workdir / SETTINGS_FILE
    if not file.exists():
        return
    try:
        there = json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise InputError(f"{file}: not JSON ({error}); delete {workdir} to begin again") from error
    differences = [f"{k}: {there.get(k)!r} here, {v!r} given" for k, v in noted.items() if there.get(k) != v]
    if differences:
        raise InputError(
            f"{workdir} belongs to another adaptation ({'; '.join(differences)}). Choose another --workdir, give the "
            "same settings and source to go on with that one, or delete the folder."
        )


# ---- first parameters -------------------------------------------------------------------------------


def _start_at(params: PyTree, settings: Stage1Config | Stage2Config) -> Callable[[TrainState], TrainState]:
    """Makes the first state of a stage from parameters on the host; the optimizer begins anew."""
    optimizer, averaged = make_optimizer(settings.optimizer, settings.steps), settings.optimizer.ema_decay is not None

    def fresh(params: PyTree) -> TrainState:  # copies, because a step takes the memory of the state
        return init_state(lambda _: jax.tree.map(jnp.copy, params), optimizer, averaged, jax.random.key(0))

    def start(target: TrainState) -> TrainState:
        places = jax.tree.map(lambda leaf: leaf.sharding, target)
        return jax.jit(fresh, out_shardings=places)(jax.device_put(params, places.params))

    return start


# ---- what the source has learnt of pictures ----------------------------------------------------------


def with_readout(
    stage: Stage, config: Config, mapper: PyTree, weight: float, mesh: Mesh, dataset: Dataset, validation: Trials
) -> Stage:
    """BrainVAE's stage with one more term in its loss: the pattern decoded from the latent that `mapper`, the source's,
    predicts from the picture's tokens, against the trial (or the mean of several).

    It is logged unweighted, per voxel, as `readout`, of training and validation; `loss` in the log, which stops the
    stage and picks the checkpoint, stays the loss without it.
    """
    network, brain_vae = SemanticToNeural(config.mapper), BrainVAE(config.brain_vae)
    frozen = jax.device_put(mapper, replicated(mesh))

    def readout(params, mapper, batch):
        tokens, fmri = batch["tokens"].astype(jnp.float32), batch["fmri"]
        latent = network.apply({"params": mapper}, tokens, method="predict_latent")
        pattern = brain_vae.apply({"params": params}, latent, fmri.shape[-1], method="decode")
        return losses.voxel_mse(pattern, fmri)

    def loss(params, mapper, batch, key):
        total, terms = stage.loss(params, {}, batch, key)
        error = readout(params, mapper, batch)
        scale = batch["fmri"].shape[-1] if config.stage1.loss_scale == "sum" else 1
        return total + weight * scale * error, {**terms, "readout": error}

    held_out = stages.trial_validation(
        lambda params, _frozen, batch, _key: (None, {"readout": readout(params["brain_vae"], params["mapper"], batch)}),
        validation,
        model_order(config.data.voxel_order, dataset.voxels.order),
        config.stage1.batch_size // config.stage1.accumulate,
    )

    def validate(params) -> dict[str, float]:
        return {**stage.validate(params), **held_out({"brain_vae": params, "mapper": frozen})}

    return dataclasses.replace(stage, loss=loss, validate=validate, frozen=frozen)


# ---- parts of the mapper ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class TunedPart:
    """First parameters that are tuned, and those that they are joined with."""

    tuned: PyTree
    frozen: PyTree


def tuned_part(mapper: PyTree, settings: AdaptationConfig) -> TunedPart:
    """The mapper's parameters, on the host, in two trees of which `_join` makes one again, with the same values.

    Raises InputError for a LoRA rank that is no reduction.
    """
    flat = flatten_dict(mapper)
    if settings.part == "lora":
        return TunedPart(_low_rank(flat, settings), mapper)
    own = {path: leaf for path, leaf in flat.items() if settings.part == "all" or settings.part in path}
    return TunedPart(
        unflatten_dict(own), unflatten_dict({path: leaf for path, leaf in flat.items() if path not in own})
    )


def _low_rank(flat: dict[tuple[str, ...], np.ndarray], settings: AdaptationConfig) -> PyTree:
    """For each kernel [i, o] of attention and MLP a random `lora_a` [i, rank] and a `lora_b` [rank, o] of zeros."""
    rng, rank, factors = np.random.default_rng(settings.seed), settings.lora_rank, {}
    for path, kernel in flat.items():
        if path[-1] != "kernel" or path[1] not in _BLOCK_PARTS:
            continue
        inputs, outputs = kernel.shape
        if rank >= min(inputs, outputs):
            raise InputError(
                f"lora_rank is {rank}; expected less than {min(inputs, outputs)}, the rank of {'/'.join(path)}"
            )
        factors[*path[:-1], "lora_a"] = (rng.normal(size=(inputs, rank)) / np.sqrt(inputs)).astype(np.float32)
        factors[*path[:-1], "lora_b"] = np.zeros((rank, outputs), np.float32)
    return unflatten_dict(factors)


@jax.jit
def _join(frozen: PyTree, tuned: PyTree) -> PyTree:
    """The mapper's parameters: all of both trees, and of LoRA's factors their product, added to the kernel."""
    flat, own = flatten_dict(frozen), flatten_dict(tuned)
    for path, leaf in own.items():
        if path[-1] == "lora_a":
            kernel = (*path[:-1], "kernel")
            change = jnp.matmul(leaf, own[*path[:-1], "lora_b"], precision=jax.lax.Precision.HIGHEST)
            flat[kernel] = flat[kernel] + change
        elif path[-1] != "lora_b":
            flat[path] = leaf
    return unflatten_dict(flat)


def _only(part: TunedPart, stage: Stage, mesh: Mesh) -> Stage:
    """The stage of the whole mapper, `stage`, with `part` alone in its state."""
    frozen = jax.device_put(part.frozen, replicated(mesh))

    def loss(params, frozen, batch, key):
        return stage.loss(_join(frozen["mapper"], params), frozen["brain_vae"], batch, key)

    return dataclasses.replace(
        stage,
        init=lambda key: jax.tree.map(jnp.asarray, part.tuned),
        loss=loss,
        frozen={"mapper": frozen, "brain_vae": stage.frozen},
        validate=lambda params: stage.validate(_join(frozen, params)),
        start=_start_at(part.tuned, stage.config),
    )
