"""Training state, the jitted step, and the one loop that both stages run.

The step is `jax.jit` with shardings in and out and a donated state. Randomness is a function of (seed, step), and so
are the batches: a run that is killed and started again ends with the same bits.
"""

import dataclasses
import math
import os
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from grain import DatasetIterator
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from synbrain_jax.checkpoint import Checkpoints
from synbrain_jax.config import Config, OptimizerConfig, Stage1Config, Stage2Config
from synbrain_jax.errors import InputError, NonFiniteLoss
from synbrain_jax.progress import SELECTED_FILE, Progress
from synbrain_jax.sharding import batch_parts, batch_sharding, replicated, shard_batch, state_sharding

# Validation numbers of which the smallest is best; of all others, the largest.
MINIMISED = ("val/loss", "val/mse", "val/kl", "val/soft_clip")

# loss(params, frozen, batch, key) -> (loss, terms to log); key None: no sampling
LossFunction = Callable[[PyTree, PyTree, dict, PRNGKeyArray | None], tuple[Array, dict[str, Array]]]


@flax.struct.dataclass
class TrainState:
    """All that a step changes: arrays, or (in the same structure) their shapes or shardings."""

    step: PyTree  # int32 []
    params: PyTree
    opt_state: PyTree
    ema: PyTree  # moving average of params; None if there is none

    @property
    def result(self) -> PyTree:
        """The parameters to validate and to keep: the average if there is one."""
        return self.params if self.ema is None else self.ema


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """What one stage of training consists of."""

    name: str
    config: Stage1Config | Stage2Config
    init: Callable[[PRNGKeyArray], PyTree]
    loss: LossFunction
    frozen: PyTree
    """Parameters that the loss needs and that do not change."""
    batches: DatasetIterator
    validate: Callable[[PyTree], dict[str, float]]
    stop: Callable[[dict[str, float]], bool] = lambda terms: False
    """Whether to end before the last step, given the mean training terms since the last validation."""
    start: Callable[[TrainState], TrainState] | None = None
    """Makes the first state, from its shapes and shardings, in place of `init`."""


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate at each step: linear warm-up, then constant or half a cosine down to zero at `steps`."""
    after = max(steps - config.warmup_steps, 1)
    main = (
        optax.constant_schedule(config.learning_rate)
        if config.schedule == "constant"
        else optax.cosine_decay_schedule(config.learning_rate, after)
    )
    if not config.warmup_steps:
        return main
    warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    return optax.join_schedules([warmup, main], [config.warmup_steps])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """AdamW with decoupled weight decay on every parameter that is trained, after clipping the global gradient norm."""
    return optax.chain(
        optax.identity() if config.clip_norm is None else clip_by_global_norm(config.clip_norm),
        scale_by_adam(),
        optax.add_decayed_weights(config.weight_decay, mask=_trained),
        optax.scale_by_learning_rate(learning_rate(config, steps)),
    )


def scale_by_adam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> optax.GradientTransformation:
    """Adam (Kingma and Ba 2015) with optax's state, and PyTorch's numbers.

    optax computes 1 - b2^t by a difference of float32, which is wrong by up to 3e-5 in the first steps.
    """
    plain = optax.scale_by_adam(b1, b2, eps)

    def update(grads, state, params=None):
        count = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(grads, state.mu, b1, 1)
        nu = optax.tree.update_moment(grads, state.nu, b2, 2)
        first, second = (-jnp.expm1(count * math.log(decay)) for decay in (b1, b2))
        updates = jax.tree.map(lambda m, v: m / first / (jnp.sqrt(v / second) + eps), mu, nu)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(plain.init, update)


def _trained(params: PyTree) -> PyTree:
    """True for all but the mapper's fixed position table, which has no gradient."""
    return jax.tree.map_with_path(lambda path, _: path[-1] != jax.tree_util.DictKey("pos_embed"), params)


def clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """Scales all gradients by min(1, limit / (norm + 1e-6)): PyTorch's rule, from which optax's differs by the 1e-6."""

    def update(grads, state, params=None):
        factor = jnp.minimum(1.0, limit / (optax.tree.norm(grads) + 1e-6))
        return jax.tree.map(lambda grad: grad * factor.astype(grad.dtype), grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def init_state(
    init: Callable[[PRNGKeyArray], PyTree], optimizer: optax.GradientTransformation, averaged: bool, key: PRNGKeyArray
) -> TrainState:
    """A fresh state; the average starts as a copy of the parameters."""
    params = init(key)
    ema = jax.tree.map(jnp.copy, params) if averaged else None
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params), ema=ema)


def make_train_step(
    loss: LossFunction, optimizer: optax.GradientTransformation, ema_decay: float | None
) -> Callable[[TrainState, PyTree, dict, PRNGKeyArray], tuple[TrainState, dict[str, Float[Array, ""]]]]:
    """One update as a pure function `step(state, frozen, batch, key) -> (state, terms)`; not jitted.

    `terms` are the loss's own, with the global gradient norm before clipping. `key` is the run's; that of the step is
    `fold_in(key, step)`.
    """

    def train_step(state, frozen, batch, key):
        key = jax.random.fold_in(key, state.step)
        (_, terms), grads = jax.value_and_grad(loss, has_aux=True)(state.params, frozen, batch, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema if ema_decay is None else optax.incremental_update(params, state.ema, 1 - ema_decay)
        terms = terms | {"grad_norm": optax.tree.norm(grads)}
        return TrainState(step=state.step + 1, params=params, opt_state=opt_state, ema=ema), terms

    return train_step


def check_batch_sizes(config: Config, mesh: Mesh) -> None:
    """Raises InputError if a stage's batch cannot be split over the mesh."""
    parts = batch_parts(mesh)
    for name, size in (("stage1", config.stage1.batch_size), ("stage2", config.stage2.batch_size)):
        if size % parts:
            raise InputError(
                f"{name}.batch_size is {size}; it must be a multiple of {parts}, the number of parts into which this "
                "mesh splits a batch (mesh.data x mesh.fsdp)"
            )


def fit(stage: Stage, config: Config, mesh: Mesh, folder: str | os.PathLike) -> PyTree:
    """Trains a stage to its last step, or from its newest checkpoint on, and returns the parameters that validate best.

    Writes checkpoints, `metrics.jsonl`, TensorBoard events and `selected.json` into `folder`.

    Raises:
        NonFiniteLoss: the loss became NaN or infinite. Checkpoints from before are kept.
        InputError: a parameter cannot be split over the mesh, `select` names no validation number, or the stage ended
            before its first checkpoint.
    """
    folder, settings = epath.Path(folder), stage.config
    optimizer = make_optimizer(settings.optimizer, settings.steps)
    ema_decay = settings.optimizer.ema_decay

    def init(key):
        return init_state(stage.init, optimizer, ema_decay is not None, key)

    key = jax.random.key(config.seed)
    abstract = jax.eval_shape(init, key)
    shardings = state_sharding(abstract, mesh)
    target = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), abstract, shardings
    )
    step_function = jax.jit(
        make_train_step(stage.loss, optimizer, ema_decay),
        in_shardings=(shardings, replicated(mesh), batch_sharding(mesh), replicated(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )
    frozen = jax.device_put(stage.frozen, replicated(mesh))

    with Checkpoints(folder / "checkpoints", config, "min" if settings.select in MINIMISED else "max") as checkpoints:
        if (folder / SELECTED_FILE).exists():  # this stage has ended before
            return checkpoints.restore(checkpoints.selected()[0], target)[0].result
        if checkpoints.latest:
            state, position = checkpoints.restore(checkpoints.latest, target)
            stage.batches.set_state(position)
        elif stage.start:
            state = stage.start(target)
        else:
            state = jax.jit(init, out_shardings=shardings)(key)
        step = start = int(state.step)

        with Progress(folder, stage.name, start, settings.steps) as progress:
            if stage.start and checkpoints.latest is None:  # what was handed in may be the result
                numbers = stage.validate(state.result)
                progress.log(start, "val", numbers)
                checkpoints.save(start, state, stage.batches.get_state(), _selection_value(numbers, stage, start))
            pending, since_validation = [], []
            for step in range(start + 1, settings.steps + 1):
                batch = shard_batch(next(stage.batches), mesh)
                state, terms = step_function(state, frozen, batch, key)
                pending.append(terms)
                validating = step % settings.eval_every == 0 or step == settings.steps
                if step % config.log_every == 0 or validating:
                    values = _finite(stage.name, step, pending)
                    progress.log(step, "train", _means(values))
                    since_validation += values
                    pending = []
                if validating:
                    numbers = stage.validate(state.result)
                    progress.log(step, "val", numbers)
                    if stage.stop(_means(since_validation)):
                        break
                    checkpoints.save(step, state, stage.batches.get_state(), _selection_value(numbers, stage, step))
                    since_validation = []
                progress.advance(step)

        chosen = checkpoints.selected()
        if chosen is None:
            raise InputError(
                f"{stage.name}: there is no checkpoint to take: it began at step {start} and ended at step {step} of "
                f"{settings.steps}. Lower {stage.name}.stop_below or eval_every, or raise steps, in a new --workdir."
            )
        progress.write_selected(chosen[0], settings.select, chosen[1])
        return checkpoints.restore(chosen[0], target)[0].result


def _finite(stage: str, step: int, pending: list[dict[str, Array]]) -> list[dict[str, np.ndarray]]:
    """The terms of the steps up to `step`, on the host; raises at the first step whose loss is not finite."""
    values = jax.device_get(pending)
    for i, terms in enumerate(values):
        if not np.isfinite(terms["loss"]):
            listed = ", ".join(f"{name} {float(value):.4g}" for name, value in terms.items())
            raise NonFiniteLoss(
                f"{stage}: the loss is not finite at step {step - len(values) + 1 + i} ({listed}). Checkpoints from "
                "before are kept. Look at the scale of the data (about 1 is expected), or start in a new --workdir "
                f"with a lower {stage}.optimizer.learning_rate or a {stage}.optimizer.clip_norm."
            )
    return values


def _means(values: list[dict[str, np.ndarray]]) -> dict[str, float]:
    return {name: float(np.mean([terms[name] for terms in values])) for name in values[0]}


def _selection_value(numbers: dict[str, float], stage: Stage, step: int) -> float:
    if stage.config.select == "last":
        return float(step)
    name = stage.config.select.removeprefix("val/")
    if name not in numbers:
        known = ", ".join(f"val/{key}" for key in numbers)
        raise InputError(f"{stage.name}.select is {stage.config.select!r}; expected one of {known}")
    return numbers[name]
