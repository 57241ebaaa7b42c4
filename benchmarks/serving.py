"""Programs that stay alive and take one step when asked: the process's side, and that of the program that asks.

Requests and replies are JSON, a line each, over the process's stdin and stdout. Needs nothing but Python, since one of
the two programs that are compared has no jax and the other no torch.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CLOCK_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


class Stepper:
    """A process's side. A subclass has `run`, which takes a step and returns what it computed, and `wait` for that."""

    run: Callable[[], Any]
    out: Any = None

    def wait(self, out: Any) -> None:
        """Returns once `out` is computed."""

    def timed(self, run: Callable[[], Any], times: int = 1) -> dict[str, float]:
        """Seconds of one call of `run`, on the clock and of all processors."""
        self.out = None  # two results need not fit into memory
        started, used = time.perf_counter(), time.process_time()
        for _ in range(times):
            self.out = run()
        self.wait(self.out)
        seconds, used = time.perf_counter() - started, time.process_time() - used
        return {"seconds": seconds / times, "cpu_seconds": used / times}

    def step(self, times: int) -> dict[str, float]:
        return self.timed(self.run, times)


def serve(stepper: Stepper) -> None:
    """Answers [method, arguments] of stdin with what the method returns, until stdin ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no reply
    for line in sys.stdin:
        method, arguments = json.loads(line)
        print(json.dumps(getattr(stepper, method)(**arguments)), file=replies, flush=True)


class WorkerDied(RuntimeError):
    """A process ended before it answered; the text has its last words."""


class Worker:
    """A process that runs `serve`, as the program that asks sees it."""

    def __init__(self, name: str, command: list[str], environment: dict[str, str], folder: str | os.PathLike):
        self.name = name
        errors, path = tempfile.mkstemp()  # a pipe that nobody reads would fill
        self._errors = Path(path)
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            self._process = subprocess.Popen(command, env=environment, cwd=folder, **pipes)
        except OSError as error:
            self._errors.unlink()
            raise WorkerDied(f"{name} cannot be started: {error}") from error
        finally:
            os.close(errors)

    def ask(self, method: str, **arguments: Any) -> Any:
        """What `method` of the process's `Stepper` returns. Raises WorkerDied."""
        try:
            print(json.dumps([method, arguments]), file=self._process.stdin, flush=True)
            reply = self._process.stdout.readline()
        except OSError:
            reply = ""
        if not reply:
            code = self._process.wait()
            words = self._errors.read_text(errors="replace").strip().splitlines()[-20:] or [
                "(it wrote nothing to stderr)"
            ]
            raise WorkerDied("\n".join([f"{self.name} ended with code {code} when asked to {method}:", *words]))
        return json.loads(reply)

    def peak_bytes(self) -> int | None:
        """The largest resident memory so far, of the host; None where there is no /proc."""
        try:
            with open(f"/proc/{self._process.pid}/status") as file:
                return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM"))
        except (OSError, StopIteration):
            return None

    def cpu_seconds(self) -> float:
        """Processor time so far, of all its threads; 0 where there is no /proc."""
        try:
            with open(f"/proc/{self._process.pid}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS

    def close(self) -> None:
        """Ends the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        self._errors.unlink(missing_ok=True)
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # of what was not read
                pipe.close()
