"""Checkpoints of a training stage, and bundles: the folder with everything that synthesis needs. Orbax underneath."""

import contextlib
import dataclasses
import json
import os
import time
import warnings
import zlib
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath, epy
from jaxtyping import Array, Float, PyTree, UInt32

from synbrain_jax.config import Config
from synbrain_jax.data.voxels import Voxels
from synbrain_jax.distributed import agreed, first_then_others, is_first
from synbrain_jax.errors import InputError, NotStored
from synbrain_jax.files import read_npz, read_text, write_npz, write_text
from synbrain_jax.models.brain_vae import brain_vae_shapes
from synbrain_jax.models.semantic_to_neural import mapper_shapes
from synbrain_jax.variability import Spread

with epy.lazy_imports():  # at its first use, for which who wants the models alone does not wait
    import orbax.checkpoint as ocp

_SECONDS_TO_APPEAR = 90  # a network file system may remember for a minute that a file was not there


class Checkpoints:
    """The checkpoints of one stage: the two latest and, of those that were validated, the best.

    Each holds the training state, a position (what else is needed to go on), the validation value if there is one, and
    the configuration. Orbax makes a step visible only when it is complete; sums over all values show later damage. Use
    as a context manager; leaving it waits for the last write. Of several processes, all make the same calls.
    """

    def __init__(self, folder: str | os.PathLike, config: Config, mode: Literal["min", "max"]):
        self._folder = epath.Path(folder).resolve()
        self._config = config
        self._sign = 1 if mode == "max" else -1
        options = ocp.CheckpointManagerOptions(create=True, cleanup_tmp_directories=True, preservation_policy=self)
        with _storing(self._folder):
            self._manager = ocp.CheckpointManager(self._folder, options=options)
        noted = agreed([[step, self._noted_value(step)] for step in self._manager.all_steps()])
        self._values: dict[int, float | None] = dict(noted)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        try:
            with _storing(self._folder):
                self._manager.close()
        except NotStored:
            if kind is None:  # the first error is the one to hear of
                raise

    def should_preserve(self, checkpoints: Sequence, *, context: object) -> list[bool]:
        """Orbax's PreservationPolicy: which of these steps to keep."""
        steps = sorted(checkpoint.step for checkpoint in checkpoints)
        kept = {*steps[-2:], self._best(steps)}
        return [checkpoint.step in kept for checkpoint in checkpoints]

    def _best(self, steps: Sequence[int]) -> int | None:
        validated = [step for step in steps if self._values.get(step) is not None]
        return max(validated, key=lambda step: (self._sign * self._values[step], step), default=None)

    @property
    def latest(self) -> int | None:
        """Step of the newest checkpoint, whole or not; None if there is none."""
        return max(self._manager.all_steps(), default=None)

    @property
    def best(self) -> int | None:
        """Step of the best checkpoint, perhaps still being written; None if none was validated."""
        return self._best(list(self._values))

    def save(self, step: int, state: PyTree, position: dict, value: float | None = None) -> None:
        """Saves the state after `step` steps; `value` is its validation number, if it has one.

        Raises NotStored if this checkpoint, or the one before, cannot be written.
        """
        if value is not None and not np.isfinite(value):
            # A number that cannot be compared must not look like the best one.
            value = -self._sign * float(np.finfo(np.float32).max)
        self._values[step] = value
        note = {"value": value, "position": position, "sum": int(_jitted_sum(state))}
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            note=ocp.args.JsonSave(note | {"crc": _crc(note)}),
            config=ocp.args.JsonSave(dataclasses.asdict(self._config)),
        )
        with _storing(self._folder):
            self._manager.save(step, args=args, force=True)  # or Orbax has a say in it

    def wait(self) -> None:
        """Returns when all that was saved is on the disk; raises NotStored if it cannot be."""
        with _storing(self._folder):
            self._manager.wait_until_finished()

    def newest(self, target: PyTree) -> tuple[int, PyTree, dict] | None:
        """Step, state and position of the newest checkpoint that is whole; None if there are none at all.

        Damaged ones after it are removed, with a warning. `target` as in `restore`. Raises InputError if none is whole,
        or if this process cannot read one that the first process can.
        """
        self.wait()
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            # Asked first of one process, so that no other waits for one that cannot read.
            fault = agreed(self._fault(step, target) if is_first() else None)
            if fault is None:
                # If one process cannot read what the first could, it ends: it must not go another way than the others.
                found = self.restore(step, target)
                self._remove(damaged)
                return step, *found
            damaged[step] = fault
        if damaged:
            raise InputError(
                f"{self._folder}: no checkpoint can be read ({_listed(damaged)}). If the code has changed since, go "
                "back to the version that wrote them; otherwise delete this folder to begin the stage again."
            )
        return None

    def _remove(self, damaged: dict[int, str]) -> None:
        if damaged and is_first():
            warnings.warn(f"{self._folder}: damaged checkpoints are removed ({_listed(damaged)})", stacklevel=3)
        for step in damaged:
            self._manager.delete(step)
            del self._values[step]

    def _fault(self, step: int, target: PyTree) -> str | None:
        """What is wrong with a checkpoint, as far as this process alone can see, who reads all of it into memory."""
        try:
            saved = self._folder / str(step) / "state"
            state = _read_alone(saved, target)
            for shapes in saved.glob("array_metadatas/*"):  # which Orbax reads only where arrays are spread
                json.loads(shapes.read_text())
            _check_sum(_sum_of_values(state, np), self._note(step))
        except MemoryError:  # says nothing about the checkpoint
            raise
        # Orbax and TensorStore raise many kinds, the plain Exception among them.
        except Exception as error:
            return _first_line(error)
        return None

    def restore(self, step: int, target: PyTree) -> tuple[PyTree, dict]:
        """State and position of a step. `target` gives shapes, types and shardings (as jax.ShapeDtypeStruct).

        Raises InputError if the checkpoint is damaged.
        """
        self.wait()
        try:
            note = self._note(step)
            args = ocp.args.Composite(state=ocp.args.StandardRestore(target))
            state = self._manager.restore(step, args=args).state
            _check_sum(_jitted_sum(state), note)
        except MemoryError:  # says nothing about the checkpoint
            raise
        except Exception as error:  # Orbax and TensorStore raise many kinds
            raise InputError(
                f"{self._folder / str(step)}: this checkpoint cannot be read ({_first_line(error)}). Delete "
                f"{self._folder.parent} to train this stage again."
            ) from error
        return state, note["position"]

    def selected(self) -> tuple[int, float] | None:
        """Step and validation value of the best checkpoint, the later one of equals; None if there is none."""
        self.wait()
        step = self._best(self._manager.all_steps())
        return None if step is None else (step, self._values[step])

    def _note(self, step: int) -> dict:
        note = ocp.JsonCheckpointHandler().restore(self._folder / str(step) / "note")
        if note.pop("crc", None) != _crc(note):
            raise ValueError("its note has changed since it was written")
        return note

    def _noted_value(self, step: int) -> float | None:
        try:
            return self._note(step)["value"]
        except Exception as error:
            if is_first():
                what = f"{self._folder / str(step)}: will not be selected, as its note cannot be read"
                warnings.warn(f"{what} ({_first_line(error)})", stacklevel=3)
            return None


@contextlib.contextmanager
def _storing(where: epath.Path) -> Iterator[None]:
    """Raises NotStored for whatever Orbax, TensorStore or the file system raise."""
    try:
        yield
    except Exception as error:
        raise NotStored(
            f"{where}: cannot be written ({_first_line(error)}). What was whole before is kept: see to the disk, and "
            "give the same command again."
        ) from error


def _first_line(error: Exception) -> str:
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 300 else f"{line[:140]} ... {line[-150:]}"  # the cause comes last


def _listed(damaged: dict[int, str]) -> str:
    return "; ".join(f"step {step}: {fault}" for step, fault in damaged.items())


def _crc(note: dict) -> int:
    return zlib.crc32(json.dumps(note, sort_keys=True).encode())


def _sum_of_values(tree: PyTree, xp: ModuleType = jnp) -> UInt32[Array, ""] | UInt32[np.ndarray, ""] | np.uint32:
    """A sum modulo 2**32 over the bits of all values, each times an odd number by its place.

    The same however arrays are split, unlike a sum of floats; a change of one value always changes it.
    """
    total = xp.zeros(1, xp.uint32)
    for number, leaf in enumerate(jax.tree.leaves(tree)):
        leaf = xp.atleast_1d(xp.asarray(leaf))
        words = leaf.view(f"uint{8 * leaf.dtype.itemsize}").astype(xp.uint32)
        place, stride = xp.zeros((1,) * leaf.ndim, xp.uint32), 1
        for axis, size in enumerate(leaf.shape):
            along = xp.arange(size, dtype=xp.uint32) * xp.uint32(stride % 2**32)
            place = place + along.reshape([size if i == axis else 1 for i in range(leaf.ndim)])
            stride *= size
        of_leaf = (words * (2 * place + 1)).sum(dtype=xp.uint32).reshape(1)
        total = total + of_leaf * xp.uint32(2 * number + 1)
    return total[0]


_jitted_sum = jax.jit(_sum_of_values)


def _check_sum(found, note: dict) -> None:
    if int(found) != note["sum"]:
        raise ValueError("its values have changed since they were written")


def _alone(handler: type, **options) -> "ocp.Checkpointer":
    """A checkpointer for one of several processes, which does not wait for the others."""
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process_{me}"
    )
    return ocp.Checkpointer(handler(multiprocessing_options=alone, **options), multiprocessing_options=alone)


def _read_alone(path: epath.Path, target: PyTree) -> PyTree:
    """The arrays of a saved tree in this process's memory; ValueError if one has another shape than in `target`."""
    args = ocp.args.PyTreeRestore(
        item=target, restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), target)
    )
    with _alone(ocp.PyTreeCheckpointHandler) as checkpointer:
        tree = checkpointer.restore(path, args)
    for found, expected in zip(jax.tree.leaves(tree), jax.tree.leaves(target), strict=True):
        if found.shape != expected.shape:
            raise ValueError(f"an array has shape {found.shape}; expected {expected.shape}")
    return tree


@dataclasses.dataclass(frozen=True, eq=False)
class Bundle:
    """Everything that synthesis needs, in memory.

    `latent_std` is the spread of BrainVAE's posterior averaged over the training trials, None if unknown; `offset` and
    `gain` correct a decoded pattern to `offset + gain * pattern`; `spread` is how real trials vary around that, None if
    unknown. Voxels are in the data set's own order.
    """

    config: Config
    params: dict  # {"brain_vae": ..., "mapper": ...}
    voxels: Voxels
    dataset: str
    latent_std: Float[np.ndarray, "t d"] | None
    offset: Float[np.ndarray, " v"]
    gain: float
    spread: Spread | None = None

    @classmethod
    def uncorrected(
        cls, config: Config, params: dict, voxels: Voxels, dataset: str, latent_std: Float[np.ndarray, "t d"] | None
    ) -> "Bundle":
        """A bundle whose decoded patterns are taken as they are."""
        return cls(config, params, voxels, dataset, latent_std, np.zeros(len(voxels.order), np.float32), 1.0)


def save_bundle(path: str | os.PathLike, bundle: Bundle) -> None:
    """Writes a bundle folder, replacing one that is there; it appears whole or not at all.

    For one process alone. A kill between the two renames leaves the old one as `NAME.replaced`.
    """
    path = epath.Path(path).resolve()
    unfinished, replaced = (path.with_name(path.name + suffix) for suffix in (".unfinished", ".replaced"))
    if replaced.exists() and not path.exists():
        replaced.rename(path)
    for left in (unfinished, replaced):
        if left.exists():
            left.rmtree()
    unfinished.mkdir(parents=True)
    write_text(unfinished / "config.json", bundle.config.to_json())
    bundle.voxels.save(unfinished / "voxels.npz")
    arrays = {"dataset": bundle.dataset, "latent_std": bundle.latent_std, "offset": bundle.offset, "gain": bundle.gain}
    known = {name: np.asarray(value) for name, value in arrays.items() if value is not None}
    write_npz(unfinished / "synthesis.npz", known)
    if bundle.spread is not None:
        bundle.spread.save(unfinished / "spread.npz")
    with _storing(path), _alone(ocp.StandardCheckpointHandler) as checkpointer:
        checkpointer.save(unfinished / "params", args=ocp.args.StandardSave(bundle.params))
    if path.exists():
        path.rename(replaced)
    unfinished.rename(path)
    if replaced.exists():
        replaced.rmtree()


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
        with _alone(ocp.StandardCheckpointHandler) as checkpointer:
            args = ocp.args.StandardRestore(abstract_params(config))
            params = checkpointer.restore(path / "params", args=args)
    # Orbax and TensorStore raise many kinds, the plain Exception among them.
    except Exception as error:
        raise InputError(
            f"{path / 'params'}: cannot be read as the parameters that config.json describes ({_first_line(error)})"
        ) from error
    return Bundle(
        config=config,
        params=params,
        voxels=voxels,
        dataset=str(arrays["dataset"]),
        latent_std=arrays.get("latent_std"),
        offset=arrays["offset"],
        gain=float(arrays["gain"]),
        spread=_read_spread(path / "spread.npz", len(voxels.order)),
    )


def _read_spread(file: epath.Path, n_voxels: int) -> Spread | None:
    """None where there is no such file, as in bundles that know no spread."""
    if not file.exists():
        return None
    spread = Spread.load(file)
    if len(spread.independent) != n_voxels:
        raise InputError(f"{file}: {len(spread.independent)} voxels, but the bundle has {n_voxels}; export it again")
    return spread


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
    """Raises InputError if `workdir` holds a run of another configuration.

    The mesh and how often is logged may differ: they say how a run goes on, not what comes out.
    """
    file = epath.Path(workdir) / "config.json"
    if not file.exists():
        return
    there = _read_config(file)
    differences = there.differences(dataclasses.replace(config, mesh=there.mesh, log_every=there.log_every))
    if differences:
        raise InputError(
            f"{os.fspath(workdir)} belongs to another run ({'; '.join(differences)}). Choose another --workdir, "
            "give the same settings to go on with that run, or delete the folder."
        )


def claim_workdir(workdir: str | os.PathLike, config: Config) -> None:
    """Makes `workdir` the folder of this run. Raises InputError if not every process sees it."""
    file = epath.Path(workdir) / "config.json"
    with first_then_others():
        if is_first():
            write_text(file, config.to_json())
        for _ in range(_SECONDS_TO_APPEAR):
            if file.exists():
                return
            time.sleep(1)
    raise InputError(
        f"{os.fspath(workdir)}: process {jax.process_index()} does not see what process 0 writes there; give a "
        "--workdir on a disk that all of them share"
    )
