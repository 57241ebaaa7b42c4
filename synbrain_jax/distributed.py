"""Several processes that train as one: how they start, which of them writes, what they agree on, and how they stop.

`jax.distributed` finds the others and watches over them. Every process runs the same program; this room holds the few
places where one must do what the others do not. With a single process, nothing here waits or copies. A leaf.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from etils import epy
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from synbrain_jax.errors import InputError, Stopped

with epy.lazy_imports():  # as in `checkpoint.py`
    import orbax.checkpoint as ocp

HEARTBEAT_SECONDS = 100  # a process that has been silent for so long is taken for dead; the others then end
_A_WEEK = 7 * 24 * 3600  # waiting for another's long work ends by its death, not by the clock


# ---- start -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Processes:
    """How a run is spread over processes: options of `train.py`, and no part of what the run is."""

    distributed: str | None = None
    """Train over several processes, each started with the same command: "auto" on a TPU pod slice or under SLURM, else
    HOST:PORT, where process 0 listens."""
    process_id: int | None = None
    """With HOST:PORT: the number of this process, from 0."""
    processes: int | None = None
    """With HOST:PORT: how many there are."""


def start(options: Processes) -> None:
    """Joins the other processes; to be called before JAX is used. Does nothing if `options` name none.

    Raises InputError if the options contradict each other, no cluster is found, or the others do not come.
    """
    where, number, count = options.distributed, options.process_id, options.processes
    if where is None:
        if number is not None or count is not None:
            raise InputError("--process-id and --processes need --distributed HOST:PORT")
        return
    known = {}
    if where == "auto":
        if number is not None or count is not None:
            raise InputError("--distributed auto finds --process-id and --processes itself; leave them out")
    else:
        if not where.rpartition(":")[2].isdigit():
            raise InputError(f"--distributed is {where!r}; expected auto, or HOST:PORT such as 10.0.0.1:1234")
        if number is None or count is None or not 0 <= number < count:
            raise InputError(
                f"--process-id is {number} and --processes {count}; with --distributed {where} both are needed, and "
                "the first counts from 0 to below the second"
            )
        known = dict(coordinator_address=where, process_id=number, num_processes=count)
        known |= dict(cluster_detection_method="deactivate")
    # Its notices are for the steps of one loop, and Orbax asks for them with the steps of older checkpoints.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            **known, heartbeat_timeout_seconds=HEARTBEAT_SECONDS, shutdown_timeout_seconds=_A_WEEK
        )
    # jax raises ValueError where it finds no cluster, and its run-time's own errors where nobody answers.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"--distributed {where}: the processes did not find each other ({reason}). Start the same command for "
            "every process; where this is neither a TPU pod slice nor a SLURM job step, give --distributed HOST:PORT, "
            "--process-id and --processes."
        ) from error


def leave(code: int, hurry: bool = False) -> NoReturn:
    """Ends this process; in a hurry, without waiting for its threads.

    At its exit one of several waits for the others, unless it failed: they may wait for it.
    """
    if hurry or (jax.distributed.is_initialized() and code):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)


# ---- one of several --------------------------------------------------------------------------------


def is_first() -> bool:
    """Whether this is the process that writes."""
    return jax.process_index() == 0


_barriers = itertools.count()


def barrier() -> None:
    """Waits until every process is here."""
    wait = ocp.multihost.get_barrier_sync_fn(processes=set(range(jax.process_count())))
    wait(key=f"synbrain_{next(_barriers)}", timeout_ms=1000 * _A_WEEK)


@contextlib.contextmanager
def first_then_others() -> Iterator[None]:
    """Process 0 runs the block, then the others do: what it leaves on the disk, they find."""
    if not is_first():
        barrier()
    try:
        yield
    finally:
        if is_first():
            barrier()


def agreed(value: Any) -> Any:
    """The value (JSON) that process 0 has, on every process."""
    if jax.process_count() == 1:
        return value
    text = json.dumps(value).encode()
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = np.frombuffer(text[:length].ljust(length), np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded), np.uint8).tobytes())


def whole(tree: PyTree) -> PyTree:
    """`tree` where this process can read all of it: arrays that are spread over processes are brought to the host."""

    def fetch(leaf):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return multihost_utils.process_allgather(leaf, tiled=True)
        return leaf

    return jax.tree.map(fetch, tree)


# ---- stopping --------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Sigterm:
    received: bool = False
    deferred: bool = False  # a loop looks at `received` when it can stop


_sigterm = _Sigterm()


@contextlib.contextmanager
def sigterm_stops() -> Iterator[None]:
    """Within it, SIGTERM (how schedulers announce that the machine will be taken away) raises `Stopped`: in a
    `StopRequests` block when that is asked, and elsewhere at once, unless there are other processes."""

    def handle(number, frame):
        _sigterm.received = True
        if not _sigterm.deferred and not jax.distributed.is_initialized():
            raise Stopped("stopped; the same command goes on")

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        _sigterm.received = False


class StopRequests:
    """Whether any process of a training loop has been asked to stop: the same answer for all, at the same step.

    Use as a context manager. The answer is a maximum over the mesh, which the devices compute between steps; it is
    looked at one step later, so that nobody waits.
    """

    def __init__(self, mesh: Mesh):
        self._places = NamedSharding(mesh, P(mesh.axis_names))
        self._maximum = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))
        self._asked: jax.Array | None = None

    def __enter__(self) -> "StopRequests":
        _sigterm.deferred = True
        return self

    def __exit__(self, *_) -> None:
        _sigterm.deferred = False

    def received(self) -> bool:
        """To be asked once after each step, by every process."""
        if jax.process_count() == 1:
            return _sigterm.received
        before = self._asked
        mine = np.full(jax.local_device_count(), _sigterm.received, np.int32)
        self._asked = self._maximum(jax.make_array_from_process_local_data(self._places, mine))
        return before is not None and bool(before)
