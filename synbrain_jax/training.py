"""Training state, the jitted step, and the one loop that both stages run.

The step is `jax.jit` with shardings in and out and a donated state. Randomness is a function of (seed, step), and so
are the batches: a run that is killed and started again ends with the same bits.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from synbrain_jax.checkpoint import Checkpoints
from synbrain_jax.config import Config, OptimizerConfig, Stage1Config, Stage2Config
from synbrain_jax.distributed import StopRequests, agreed
from synbrain_jax.errors import InputError, NonFiniteLoss, Stopped
from synbrain_jax.progress import open_progress, selected_step
from synbrain_jax.sharding import (
    batch_parts,
    batch_sharding,
    on_mesh,
    param_sharding,
    process_share,
    replicated,
    shard_batch,
    state_sharding,
)

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
    batches: Iterator[dict[str, np.ndarray]]
    """A grain iterator: its position is saved with the state."""
    validate: Callable[[PyTree], dict[str, float]]
    stop: Callable[[dict[str, float]], bool] = lambda terms: False
    """Whether to end before the last step, given the mean training terms since the last validation."""
    compute_dtype: str = "float32"
    """In which the model uses its kernels, and so in which they can be gathered."""
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
    loss: LossFunction,
    optimizer: optax.GradientTransformation,
    ema_decay: float | None,
    *,
    accumulate: int = 1,
    group: int = 1,
    gather: Callable[[PyTree], PyTree] = lambda params: params,
    scatter: Callable[[PyTree], PyTree] = lambda grads: grads,
) -> Callable[[TrainState, PyTree, dict, PRNGKeyArray], tuple[TrainState, dict[str, Float[Array, ""]]]]:
    """One update as a pure function `step(state, frozen, batch, key) -> (state, terms)`; not jitted.

    `terms` are the loss's own, with the global gradient norm before clipping. `key` is the run's; that of the step is
    `fold_in(key, step)`.

    Args:
        accumulate: the batch is taken in so many equal parts, one after the other; gradients and terms are their means,
            and part i draws with `fold_in(key, i)`. A loss that is a mean over samples, or over groups of samples, has
            the gradient of the whole batch; any other is a mean over parts.
        group: samples that follow one another and must stay in one part.
        gather, scatter: take parameters from where the state keeps them to where the loss uses them, and gradients
            back.
    """
    value_and_grad = jax.value_and_grad(loss, has_aux=True)

    def gradient(params, frozen, batch, key):
        (_, terms), grads = value_and_grad(params, frozen, batch, key)
        return terms, scatter(grads)

    def mean_gradient(params, frozen, batch, key):
        def add(total, numbered):
            number, part = numbered
            one = gradient(params, frozen, part, jax.random.fold_in(key, number))
            return jax.tree.map(jnp.add, total, one), None

        parts = jax.tree.map(lambda rows: _in_parts(rows, accumulate, group), batch)
        shapes = jax.eval_shape(gradient, params, frozen, jax.tree.map(lambda rows: rows[0], parts), key)
        zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        total, _ = jax.lax.scan(add, zero, (jnp.arange(accumulate), parts))
        return jax.tree.map(lambda leaf: leaf / accumulate, total)

    def train_step(state, frozen, batch, key):
        key = jax.random.fold_in(key, state.step)
        terms, grads = (gradient if accumulate == 1 else mean_gradient)(gather(state.params), frozen, batch, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema if ema_decay is None else optax.incremental_update(params, state.ema, 1 - ema_decay)
        terms = terms | {"grad_norm": optax.tree.norm(grads)}
        return TrainState(step=state.step + 1, params=params, opt_state=opt_state, ema=ema), terms

    return train_step


def _in_parts(rows: Array, count: int, group: int) -> Array:
    """[b, ...] as [count, b / count, ...]; part i has groups i, i + count, ..., so that every device has rows of it."""
    grouped = rows.reshape(-1, count, group, *rows.shape[1:]).swapaxes(0, 1)
    return grouped.reshape(count, -1, *rows.shape[1:])


class StepProgram(NamedTuple):
    """What a stage compiles, over a mesh."""

    init: Callable[[PRNGKeyArray], TrainState]
    """Jitted: a fresh state, placed."""
    step: Callable[[TrainState, PyTree, dict, PRNGKeyArray], tuple[TrainState, dict[str, Float[Array, ""]]]]
    """Jitted: `make_train_step`; it takes the state's memory."""
    target: TrainState
    """Shapes, types and shardings of the state."""
    result: Callable[[TrainState], PyTree]
    """`TrainState.result` where it can be used, as by the loss; where it is not split over `data`, that very tree."""


def step_program(
    init: Callable[[PRNGKeyArray], PyTree],
    loss: LossFunction,
    settings: Stage1Config | Stage2Config,
    mesh: Mesh,
    compute_dtype: str = "float32",
) -> StepProgram:
    """The step of a stage over a mesh, of devices or of descriptions of devices. Arguments as the fields of `Stage`.

    Raises InputError if a parameter cannot be split over the mesh.
    """
    optimizer = make_optimizer(settings.optimizer, settings.steps)
    ema_decay = settings.optimizer.ema_decay

    def fresh(key):
        return init_state(init, optimizer, ema_decay is not None, key)

    abstract = jax.eval_shape(fresh, jax.random.key(0))
    kept = state_sharding(abstract, mesh)
    used = param_sharding(abstract.params, mesh)
    target = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), abstract, kept
    )

    def gather(params):
        return jax.lax.with_sharding_constraint(_kernels_as(compute_dtype, params), used)

    def scatter(grads):
        grads = jax.lax.with_sharding_constraint(grads, kept.params)
        return jax.tree.map(lambda grad, like: grad.astype(like.dtype), grads, abstract.params)

    spread = {} if mesh.size == 1 else dict(gather=gather, scatter=scatter)
    group = getattr(settings, "contrast_size", None) or 1
    step = make_train_step(loss, optimizer, ema_decay, accumulate=settings.accumulate, group=group, **spread)
    whole = (lambda params: params) if kept.params == used else jax.jit(lambda params: params, out_shardings=used)
    return StepProgram(
        init=jax.jit(fresh, out_shardings=kept),
        step=jax.jit(
            on_mesh(step, mesh),
            in_shardings=(kept, replicated(mesh), batch_sharding(mesh), replicated(mesh)),
            out_shardings=(kept, replicated(mesh)),
            donate_argnums=0,
        ),
        target=target,
        result=lambda state: whole(state.result),
    )


def _kernels_as(dtype: str, params: PyTree) -> PyTree:
    """Kernels in the type that the model casts them to, so that what is gathered is no larger; the rest as it is."""

    def cast(path, leaf):
        return leaf.astype(dtype) if path[-1] == jax.tree_util.DictKey("kernel") else leaf

    return jax.tree.map_with_path(cast, params)


def check_batch_sizes(config: Config, mesh: Mesh) -> None:
    """Raises InputError if a stage's batch cannot be split over the mesh, or the mesh over the processes."""
    parts = batch_parts(mesh)
    process_share(mesh)
    for name, stage in (("stage1", config.stage1), ("stage2", config.stage2)):
        size, accumulate = stage.batch_size, stage.accumulate
        if size % (parts * accumulate):
            times = f" times {name}.accumulate = {accumulate}" if accumulate > 1 else ""
            raise InputError(
                f"{name}.batch_size is {size}; it must be a multiple of {parts}, the number of parts into which this "
                f"mesh splits a batch (mesh.data x mesh.fsdp){times}"
            )


def fit(stage: Stage, config: Config, mesh: Mesh, folder: str | os.PathLike) -> PyTree:
    """Trains a stage to its last step, or from its newest checkpoint on, and returns the parameters that validate best.

    Writes checkpoints, `metrics.jsonl`, TensorBoard events and `selected.json` into `folder`, which all processes must
    see; of several, all call this.

    Raises:
        NonFiniteLoss: the loss became NaN or infinite. Checkpoints from before are kept.
        NotStored: a checkpoint cannot be written. Those from before are kept.
        Stopped: it was asked to stop, and has saved the step that it had reached.
        InputError: a parameter cannot be split over the mesh, `select` names no validation number, the stage ended
            before its first checkpoint, or no checkpoint can be read.
    """
    folder, settings = epath.Path(folder), stage.config
    program = step_program(stage.init, stage.loss, settings, mesh, stage.compute_dtype)
    target, key = program.target, jax.random.key(config.seed)
    frozen = jax.device_put(stage.frozen, replicated(mesh))

    with Checkpoints(folder / "checkpoints", config, "min" if settings.select in MINIMISED else "max") as checkpoints:
        selected = agreed(selected_step(folder))
        if selected is not None:  # this stage has ended before
            return program.result(checkpoints.restore(selected, target)[0])
        pending, since_validation = [], []
        newest = checkpoints.newest(target)
        if newest:
            _, state, position = newest
            since_validation, pending = _go_on(stage, position)
        else:
            state = stage.start(target) if stage.start else program.init(key)
        step = start = int(state.step)

        open_log = open_progress(folder, stage.name, start, settings.steps, resumed=newest is not None)
        with open_log as progress, StopRequests(mesh) as stop_requests:
            if stage.start and not newest:  # what was handed in may be the result
                numbers = agreed(stage.validate(program.result(state)))
                progress.log(start, "val", numbers)
                checkpoints.save(start, state, _position(stage), _selection_value(numbers, stage, start))
            for step in range(start + 1, settings.steps + 1):
                if _out_of_patience(settings, checkpoints, step - 1):
                    break
                batch = shard_batch(next(stage.batches), mesh)
                state, terms = program.step(state, frozen, batch, key)
                pending.append(terms)
                validating = step % settings.eval_every == 0 or step == settings.steps
                if step % config.log_every == 0 or validating:
                    values = _finite(stage.name, step, pending)
                    progress.log(step, "train", _means(values))
                    since_validation += values
                    pending = []
                if validating:
                    numbers = agreed(stage.validate(program.result(state)))
                    progress.log(step, "val", numbers)
                    if stage.stop(_means(since_validation)):
                        break
                    checkpoints.save(step, state, _position(stage), _selection_value(numbers, stage, step))
                    since_validation = []
                progress.advance(step)
                if stop_requests.received():
                    if not validating:
                        pending = _finite(stage.name, step, pending)
                        checkpoints.save(step, state, _position(stage, since_validation, pending))
                    checkpoints.wait()
                    raise Stopped(f"stopped: {stage.name} is saved at step {step}, and the same command goes on")

        chosen = checkpoints.selected()
        if chosen is None:
            raise InputError(
                f"{stage.name}: there is no checkpoint to take: it began at step {start} and ended at step {step} of "
                f"{settings.steps}. Lower {stage.name}.stop_below or eval_every, or raise steps, in a new --workdir."
            )
        progress.write_selected(chosen[0], settings.select, chosen[1])
        return program.result(checkpoints.restore(chosen[0], target)[0])


def _out_of_patience(settings: Stage1Config | Stage2Config, checkpoints: Checkpoints, step: int) -> bool:
    """Whether to end after `step`; from what checkpoints hold, so that a stage that was killed ends at the same one."""
    if settings.patience is None or checkpoints.best is None:
        return False
    return step - checkpoints.best >= settings.patience * settings.eval_every


def _position(stage: Stage, logged: Sequence[dict] = (), pending: Sequence[dict] = ()) -> dict:
    """What a checkpoint needs beside the state: the place in the data, and the terms since the last validation."""
    logged, pending = (
        [{name: float(value) for name, value in step.items()} for step in steps] for steps in (logged, pending)
    )
    return {"batches": stage.batches.get_state(), "logged": logged, "pending": pending}


def _go_on(stage: Stage, position: dict) -> tuple[list[dict], list[dict]]:
    """Takes the data to the position of a checkpoint; returns the terms since the last validation, in two parts."""
    stage.batches.set_state(position["batches"])
    logged, pending = (
        [{name: np.asarray(value, np.float32) for name, value in step.items()} for step in position[kind]]
        for kind in ("logged", "pending")
    )
    return logged, pending


def _finite(stage: str, step: int, pending: list[dict[str, Array | np.ndarray]]) -> list[dict[str, np.ndarray]]:
    """The terms of the steps up to `step`, on the host; raises at the first step of which one is not finite."""
    values = jax.device_get(pending)
    for i, terms in enumerate(values):
        if not all(np.isfinite(value) for value in terms.values()):
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
