"""What a run says while it trains: a bar on a terminal or plain lines, JSON lines and TensorBoard in its folder.

A room of its own so that the training loop holds nothing but training.
"""

import json
import os
import sys
import time

from etils import epath, epy
from tqdm import tqdm

from synbrain_jax.distributed import is_first
from synbrain_jax.files import read_text, write_text

with epy.lazy_imports():  # not needed to make a step
    import tensorboardX

SELECTED_FILE = "selected.json"  # appears when a stage has ended


class Progress:
    """The log of one stage from step `start` to `steps`. Use as a context manager.

    What a killed run wrote after its last checkpoint is dropped, because those steps are run again; and if it had none
    (`resumed` is false), all that it wrote.
    """

    def __init__(self, folder: str | os.PathLike, name: str, start: int, steps: int, resumed: bool = True):
        self._folder, self._name, self._start, self._steps = epath.Path(folder), name, start, steps
        self._first = start + 1 if resumed else 0
        self._lines = self._folder / "metrics.jsonl"
        kept = []
        if self._lines.exists():
            lines = [line for line in read_text(self._lines).splitlines() if line.endswith("}")]
            kept = [line + "\n" for line in lines if json.loads(line)["step"] < self._first]
        write_text(self._lines, "".join(kept))

    def __enter__(self) -> "Progress":
        self._events = tensorboardX.SummaryWriter(os.fspath(self._folder / "events"), purge_step=self._first)
        self._terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=self._steps, initial=self._start, desc=self._name, unit="step", disable=not self._terminal
        )
        self._shown: dict[str, str] = {}
        self._since = time.monotonic()
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()
        self._events.close()

    def log(self, step: int, kind: str, numbers: dict[str, float]) -> None:
        """Records `numbers` of a step under "kind/name"."""
        named = {f"{kind}/{name}": value for name, value in numbers.items()}
        with self._lines.open("a") as file:
            file.write(json.dumps({"step": step, **named}) + "\n")
        for name, value in named.items():
            self._events.add_scalar(name, value, step)
        self._shown |= {name: f"{value:.4g}" for name, value in named.items() if name.endswith(("/loss", "/mse"))}
        if self._terminal:
            self._bar.set_postfix(self._shown)
            return
        elapsed, done = time.monotonic() - self._since, step - self._start
        shown = "  ".join(f"{name} {value:.4g}" for name, value in named.items())
        rate = "start"
        if done:
            rate = f"{done / elapsed:.1f} steps/s, {(self._steps - step) * elapsed / done:.0f} s left"
        print(f"{self._name} {step}/{self._steps}  {shown}  ({rate})", file=sys.stderr, flush=True)

    def advance(self, step: int) -> None:
        """Moves the bar to `step`."""
        self._bar.update(step - self._bar.n)

    def write_selected(self, step: int, metric: str, value: float) -> None:
        """Notes which checkpoint validation picked."""
        text = json.dumps({"step": step, "metric": metric, "value": value})
        write_text(self._folder / SELECTED_FILE, text + "\n")


def selected_step(folder: str | os.PathLike) -> int | None:
    """The checkpoint that validation picked; None if the stage has not ended, or the note of it is not whole."""
    try:
        return json.loads((epath.Path(folder) / SELECTED_FILE).read_text())["step"]
    except (OSError, ValueError):
        return None


class Silence:
    """Takes what `Progress` takes, in the processes that do not write, and does nothing."""

    def __enter__(self) -> "Silence":
        return self

    def _nothing(self, *_) -> None:
        pass

    __exit__ = log = advance = write_selected = _nothing


def open_progress(
    folder: str | os.PathLike, name: str, start: int, steps: int, resumed: bool = True
) -> Progress | Silence:
    """A `Progress`, if this is the process that writes."""
    return Progress(folder, name, start, steps, resumed) if is_first() else Silence()
