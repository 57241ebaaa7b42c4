"""Training that goes on where PyTorch stopped: the release's checkpoints as the state of a run.

A room of its own because the weights alone, in `torch_weights.py`, need nothing of training.
"""

import os

import jax
import numpy as np
import optax
from jaxtyping import PyTree

from synbrain_jax.errors import InputError
from synbrain_jax.interop.state_dicts import check_tensors, listed
from synbrain_jax.interop.torch_file import StoredTensor
from synbrain_jax.interop.torch_weights import Released, StateDict, from_released, open_released, released_shapes
from synbrain_jax.training import TrainState

# What scale_by_adam does; a checkpoint made otherwise cannot go on as it was.
ADAM = {"betas": (0.9, 0.999), "eps": 1e-8, "amsgrad": False, "maximize": False}


def training_state(path: str | os.PathLike, target: TrainState) -> TrainState:
    """The state in which PyTorch stopped: weights, their average, AdamW's moments and the number of steps.

    The position in the data is not in the file. Learning rate and weight decay are the run's own.

    Args:
        path: `last.pth` or `last.pt`.
        target: shapes, types and shardings (as jax.ShapeDtypeStruct) of the state of a run with the same model.

    Raises:
        InputError: the file is not such a checkpoint, is of another model, or holds another optimizer's state.
    """
    with open_released(path) as released:

        def read(tensors: StateDict, what: str) -> PyTree:
            return from_released(tensors, target.params, f"{released.where}, {what}")

        params = read(released.weights, "weights")
        first, second, count = _adam_state(released)
        opt_state = optax.tree_utils.tree_set(
            target.opt_state, count=np.int32(count), mu=read(first, "exp_avg"), nu=read(second, "exp_avg_sq")
        )
        ema = target.ema
        if ema is not None:
            ema = params if released.ema is None else read(released.ema, "'ema'")
        steps = count if released.steps is None else released.steps
        state = TrainState(step=np.int32(steps), params=params, opt_state=opt_state, ema=ema)
    return jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), state, target)


def check_start(path: str | os.PathLike, shapes: PyTree) -> None:
    """Raises what `training_state` would raise for a model of these parameters, without reading the tensors."""
    with open_released(path) as released:

        def check(tensors: StateDict | None, what: str) -> None:
            if tensors is not None:
                where = f"{released.where}, {what}"
                check_tensors(tensors, released_shapes(shapes), where, "the configured model in the release")

        check(released.weights, "weights")
        check(released.ema, "'ema'")
        first, second, _ = _adam_state(released)
        check(first, "exp_avg")
        check(second, "exp_avg_sq")


def _adam_state(released: Released) -> tuple[StateDict, StateDict, int]:
    """First and second moments by key, and the number of updates."""
    where, optimizer = f"{released.where}, optimizer state", released.optimizer
    if not isinstance(optimizer, dict) or not isinstance(optimizer.get("state"), dict):
        raise InputError(f"{where}: is missing; expected that of AdamW, as the release saves it")
    _check_adam_settings(optimizer.get("param_groups"), where)
    entries = optimizer["state"]
    first, second, counts = {}, {}, set()
    # PyTorch numbers parameters in the order of the state dict, in which this model has nothing but parameters.
    for index, (key, weight) in enumerate(released.weights.items()):
        entry = entries.get(index)
        if entry is None and key == "pos_embed":  # frozen
            first[key] = second[key] = np.zeros(weight.shape, np.float32)
            continue
        entry = entry if isinstance(entry, dict) else {}
        moments = entry.get("exp_avg"), entry.get("exp_avg_sq")
        if "step" not in entry or not all(isinstance(moment, StoredTensor) for moment in moments):
            raise InputError(f"{where}: nothing for {key}; was it frozen? Expected step, exp_avg and exp_avg_sq")
        first[key], second[key] = moments
        counts.add(_number(entry["step"], f"{where}, step of {key}"))
    if entries.keys() - range(len(released.weights)) or len(counts) != 1:
        raise InputError(
            f"{where}: {len(entries)} entries and steps {listed(counts)} for {len(released.weights)} tensors; expected "
            "one entry each, with the same step"
        )
    return first, second, counts.pop()


def _check_adam_settings(groups, where: str) -> None:
    for group in groups if isinstance(groups, list) else [None]:
        if not isinstance(group, dict):
            raise InputError(f"{where}: no param_groups; expected AdamW's state dict")
        for name, expected in ADAM.items():
            given = group.get(name, expected)
            if (tuple(given) if isinstance(given, list) else given) != expected:
                raise InputError(f"{where}: {name} is {given}; only {expected} can go on here")


def _number(value, where: str) -> int:
    number = value.read() if isinstance(value, StoredTensor) else value
    if np.shape(number) != () or not np.isfinite(number) or number < 1:
        raise InputError(f"{where} is {number}; expected a number of at least 1")
    return int(number)
