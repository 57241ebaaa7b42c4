"""Checkpoints of a training stage, and bundles: the folder with everything that synthesis needs. Orbax underneath."""

import dataclasses
import os
from typing import Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import Float, PyTree
from orbax.checkpoint import checkpoint_managers as policies

from synbrain_jax.config import Config
from synbrain_jax.data.voxels import Voxels
from synbrain_jax.errors import InputError
from synbrain_jax.files import read_npz, read_text, write_npz, write_text
from synbrain_jax.models.brain_vae import brain_vae_shapes
from synbrain_jax.models.semantic_to_neural import mapper_shapes


class Checkpoints:
    """The checkpoints of one stage: the two latest and the one with the best validation value.

    Each holds the training state, the position in the data and the configuration. Orbax makes a step visible only when
    it is complete. Use as a context manager; leaving it waits for the last write.
    """

    def __init__(self, folder: str | os.PathLike, config: Config, mode: Literal["min", "max"]):
        self._config = config
        self._sign = 1 if mode == "max" else -1
        best = policies.BestN(get_metric_fn=self._goodness, n=1)
        options = ocp.CheckpointManagerOptions(
            create=True,
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(2), best]),
            best_fn=self._goodness,  # without it Orbax writes no metrics
        )
        self._manager = ocp.CheckpointManager(epath.Path(folder).resolve(), options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self._manager.close()

    def _goodness(self, metrics: dict[str, float]) -> float:
        return self._sign * metrics["value"]

    @property
    def latest(self) -> int | None:
        """Step of the newest checkpoint; None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: PyTree, position: dict, value: float) -> None:
        """Saves the state after `step` steps; `value` is its validation number."""
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave(position),
            config=ocp.args.JsonSave(dataclasses.asdict(self._config)),
        )
        # A number that cannot be compared must not look like the best one.
        value = value if np.isfinite(value) else -self._sign * float(np.finfo(np.float32).max)
        self._manager.save(step, args=args, metrics={"value": value})

    def restore(self, step: int, target: PyTree) -> tuple[PyTree, dict]:
        """State and data position at a step. `target` gives shapes, types and shardings (as jax.ShapeDtypeStruct)."""
        args = ocp.args.Composite(state=ocp.args.StandardRestore(target), data=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=args)
        return restored.state, restored.data

    def selected(self) -> tuple[int, float] | None:
        """Step and validation value of the best checkpoint, the later one of equals; None if there is none."""
        self._manager.wait_until_finished()
        metrics = {step: self._manager.metrics(step) for step in self._manager.all_steps()}
        if not metrics:
            return None
        step = max(metrics, key=lambda step: (self._goodness(metrics[step]), step))
        return step, metrics[step]["value"]


@dataclasses.dataclass(frozen=True, eq=False)
class Bundle:
    """Everything that synthesis needs, in memory.

    `latent_std` is the spread of BrainVAE's posterior averaged over the training trials, None if unknown; `offset` and
    `gain` correct a decoded pattern to `offset + gain * pattern`. Voxels are in the data set's own order.
    """

    config: Config
    params: dict  # {"brain_vae": ..., "mapper": ...}
    voxels: Voxels
    dataset: str
    latent_std: Float[np.ndarray, "t d"] | None
    offset: Float[np.ndarray, " v"]
    gain: float

    @classmethod
    def uncorrected(
        cls, config: Config, params: dict, voxels: Voxels, dataset: str, latent_std: Float[np.ndarray, "t d"] | None
    ) -> "Bundle":
        """A bundle whose decoded patterns are taken as they are."""
        return cls(config, params, voxels, dataset, latent_std, np.zeros(len(voxels.order), np.float32), 1.0)


def save_bundle(path: str | os.PathLike, bundle: Bundle) -> None:
    """Writes a bundle folder, replacing one that is there; it appears whole or not at all."""
    path = epath.Path(path).resolve()
    unfinished = path.with_name(path.name + ".unfinished")
    if unfinished.exists():
        unfinished.rmtree()
    unfinished.mkdir(parents=True)
    write_text(unfinished / "config.json", bundle.config.to_json())
    bundle.voxels.save(unfinished / "voxels.npz")
    arrays = {"dataset": bundle.dataset, "latent_std": bundle.latent_std, "offset": bundle.offset, "gain": bundle.gain}
    known = {name: np.asarray(value) for name, value in arrays.items() if value is not None}
    write_npz(unfinished / "synthesis.npz", known)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(unfinished / "params", bundle.params)
    if path.exists():
        path.rmtree()
    unfinished.rename(path)


def load_bundle(path: str | os.PathLike) -> Bundle:
    """Reads a bundle folder. Raises InputError if it is not one, or not a whole one."""
    path = epath.Path(path).resolve()
    parts = ("config.json", "voxels.npz", "synthesis.npz", "params")
    missing = [part for part in parts if not (path / part).exists()]
    if missing:
        raise InputError(
            f"{path} is not a bundle: {', '.join(missing)} missing. Give the `bundle` folder inside a finished run's "
            "workdir."
        )
    config = _read_config(path / "config.json")
    voxels = Voxels.load(path / "voxels.npz")
    arrays = read_npz(path / "synthesis.npz")
    absent = {"dataset", "offset", "gain"} - arrays.keys()
    if absent:
        raise InputError(f"{path / 'synthesis.npz'}: {', '.join(sorted(absent))} missing; export the bundle again")
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            params = checkpointer.restore(path / "params", abstract_params(config))
    # Orbax and TensorStore raise many kinds, the plain Exception among them.
    except Exception as error:
        cause = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise InputError(
            f"{path / 'params'}: cannot be read as the parameters that config.json describes ({cause})"
        ) from error
    return Bundle(
        config=config,
        params=params,
        voxels=voxels,
        dataset=str(arrays["dataset"]),
        latent_std=arrays.get("latent_std"),
        offset=arrays["offset"],
        gain=float(arrays["gain"]),
    )


def _read_config(file: epath.Path) -> Config:
    text = read_text(file)
    try:
        return Config.from_json(text)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error


def abstract_params(config: Config) -> dict:
    """Shapes and types of both models' parameters, on the first device, without computing any."""
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes = {"brain_vae": brain_vae_shapes(config.brain_vae), "mapper": mapper_shapes(config.mapper)}
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes)


def check_workdir(workdir: str | os.PathLike, config: Config) -> None:
    """Raises InputError if `workdir` holds a run of another configuration."""
    file = epath.Path(workdir) / "config.json"
    differences = _read_config(file).differences(config) if file.exists() else []
    if differences:
        raise InputError(
            f"{os.fspath(workdir)} belongs to another run ({'; '.join(differences)}). Choose another --workdir, "
            "give the same settings to go on with that run, or delete the folder."
        )


def claim_workdir(workdir: str | os.PathLike, config: Config) -> None:
    """Makes `workdir` the folder of this run."""
    write_text(epath.Path(workdir) / "config.json", config.to_json())
