"""What synthesising onto the disk costs, against the number of stimuli, voxels, samples, tokens, and the batch.

    python -m benchmarks synthesis_scale [--json FILE] [--png FILE] [--rounds 3] [--folder FOLDER]

Small models of random parameters, about two minutes on two cores. Each size is varied alone, the others staying as in
`BASE`; all points are run once without a clock, which compiles them, and then in turn, in another order every round.
Seconds are the best round's, the disk's included (every batch is synced); memory is by how much the process's peak lies
above what it held before, on the host, in the round where that was least. To the seconds a line a + b x is fitted (R2),
and the exponent between the two largest sizes is given: 1 is linear, 0 means that the size is not what costs.

Then the overlap: the same work computed but not written, written but not computed, and both at once.
"""

import argparse
import ctypes
import dataclasses
import json
import os
import platform
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from synbrain_jax.checkpoint import Bundle, abstract_params
from synbrain_jax.config import Config
from synbrain_jax.data.voxels import Voxels
from synbrain_jax.files import map_array
from synbrain_jax.models.brain_vae import BrainVAEConfig
from synbrain_jax.models.semantic_to_neural import MapperConfig
from synbrain_jax.response_files import ResponseFolder
from synbrain_jax.streaming import stream_tokens
from synbrain_jax.synthesis import SynBrain
from synbrain_jax.variability import Spread


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of one synthesis."""

    stimuli: int = 128
    voxels: int = 2_000
    batch: int = 32
    k: int = 4
    tokens: int = 16


BASE = Sizes()
VARIED = {
    "stimuli": (128, 256, 512, 1_024),
    "voxels": (500, 2_000, 8_000, 32_000),
    "batch": (2, 8, 32, 128),
    "k": (1, 4, 16, 64),
    "tokens": (16, 64, 256, 512),
}
OVERLAP = Sizes(stimuli=256, voxels=16_000, k=8, batch=32)
WHY = {
    "stimuli": "linear: batches are alike; memory stays",
    "voxels": "a part is fixed (the models work on a pooled length); noise, copy and disk are linear",
    "batch": "the same work: small batches pay for each call and each sync, and one batch overlaps with nothing",
    "k": "a part is fixed (mapper and decoder run once a stimulus); noise, copy and disk are linear",
    "tokens": "linear, until attention, quadratic in the tokens, is the larger part",
}


def system(sizes: Sizes) -> SynBrain:
    """Small models of random parameters, with a spread of rank 8."""
    rng = np.random.default_rng(0)
    brain_vae = BrainVAEConfig.small(latent_tokens=sizes.tokens, latent_dim=32)
    config = Config(name="scale", brain_vae=brain_vae, mapper=MapperConfig.small(tokens=sizes.tokens, width=32))
    params = jax.tree.map(lambda leaf: 0.1 * rng.standard_normal(leaf.shape, np.float32), abstract_params(config))
    order = np.arange(sizes.voxels, dtype=np.int32)
    voxels = Voxels("scale", "none", None, None, None, None, order)
    spread = Spread(rng.standard_normal((sizes.voxels, 8), np.float32), np.ones(sizes.voxels, np.float32))
    return SynBrain(dataclasses.replace(Bundle.uncorrected(config, params, voxels, "scale", None), spread=spread))


class Point:
    """One synthesis, to be run again and again."""

    def __init__(self, sizes: Sizes, folder: Path):
        self.sizes, self.out = sizes, folder / "out"
        self.system = system(sizes)
        self.file = folder / f"tokens-{sizes.stimuli}-{sizes.tokens}.npy"
        if not self.file.exists():
            shape = (sizes.stimuli, *self.system.token_shape)
            np.save(self.file, np.random.default_rng(1).standard_normal(shape, np.float32))
        self.draw = dict(k=sizes.k, variability="calibrated", batch_size=sizes.batch)
        self.key = jax.random.key(0)

    def stream(self) -> None:
        """To the disk, as `synbrain synthesize` does."""
        stream_tokens(self.system, map_array(self.file), self.out, self.key, **self.draw)

    def compute(self) -> None:
        """Without the disk."""
        sampler, tokens = self.system.sampler(self.key, **self.draw), map_array(self.file)
        parts = (tokens[start : start + sampler.rows] for start in range(0, len(tokens), sampler.rows))
        for _, voxels in sampler.responses(parts):
            np.asarray(voxels)

    def write(self) -> None:
        """The disk alone, of numbers that are there."""
        sampler = self.system.sampler(self.key, **self.draw)
        batch = np.random.default_rng(2).standard_normal((sampler.rows, *sampler.sample_shape), np.float32)
        with ResponseFolder(self.out, {}, sampler.sample_shape) as folder:
            for start in range(0, self.sizes.stimuli, sampler.rows):
                folder.append(batch[: self.sizes.stimuli - start])
            folder.finish({})

    def timed(self, run: Callable[[], None]) -> tuple[float, float | None]:
        """Seconds, and MiB of the peak above what was held before (Linux; else None)."""
        before = _reset_peak()
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
        peak = None if before is None else (_status("VmHWM") - before) / 2**10
        shutil.rmtree(self.out, ignore_errors=True)
        return seconds, peak


def _reset_peak() -> int | None:
    """What this process holds, in KiB, when the allocator has given back what is free; the peak counts from here."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except (AttributeError, OSError):
        return None


def _status(name: str) -> int:
    """A line of Linux's account of this process, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def fit(x: np.ndarray, seconds: np.ndarray) -> dict[str, float]:
    """The line through the points by least squares, its R2, and the exponent between the last two."""
    slope, start = np.polyfit(x, seconds, 1)
    residual = seconds - (start + slope * x)
    r2 = 1 - (residual**2).sum() / ((seconds - seconds.mean()) ** 2).sum()
    exponent = np.log(seconds[-1] / seconds[-2]) / np.log(x[-1] / x[-2])
    return {"seconds_fixed": start, "seconds_each": slope, "r2": r2, "exponent": exponent}


def scale(rounds: int, folder: Path) -> dict[str, Any]:
    """Runs all points; for each size that is varied, its values, seconds of all rounds, peaks and the fit."""
    names = [(name, value) for name, values in VARIED.items() for value in values]
    points = {sizes: Point(sizes, folder) for sizes in {dataclasses.replace(BASE, **{n: v}) for n, v in names}}
    for point in points.values():
        point.timed(point.stream)
    found = {sizes: [] for sizes in points}
    shuffled = random.Random(0)
    for _ in range(rounds):
        for sizes in shuffled.sample(sorted(points, key=dataclasses.astuple), len(points)):
            found[sizes].append(points[sizes].timed(points[sizes].stream))
    result = {}
    for name, values in VARIED.items():
        rows = [found[dataclasses.replace(BASE, **{name: value})] for value in values]
        seconds = np.array([min(second for second, _ in row) for row in rows])
        peaks = [min(peak for _, peak in row) if row[0][1] is not None else None for row in rows]
        result[name] = {
            "values": values,
            "seconds": [[second for second, _ in row] for row in rows],
            "peak_mib": peaks,
            **fit(np.array(values, float), seconds),
            "why": WHY[name],
        }
    return result


def overlap(rounds: int, folder: Path) -> dict[str, Any]:
    """Seconds, in turn, of computing, of writing and of both at once, for `OVERLAP`."""
    point = Point(OVERLAP, folder)
    runs = {"compute": point.compute, "write": point.write, "both": point.stream}
    for run in runs.values():
        point.timed(run)
    found = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            found[name].append(point.timed(run)[0])
    megabytes = 4e-6 * point.sizes.stimuli * point.sizes.k * point.sizes.voxels
    return {"megabytes": megabytes, "seconds": found}


def draw(result: dict[str, Any], file: Path) -> None:
    """A panel for each size, and one for the overlap."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(12, 7), layout="constrained")
    for axis, (name, found) in zip(axes.flat, result["scale"].items(), strict=False):
        x, best = np.array(found["values"], float), [min(row) for row in found["seconds"]]
        axis.plot(x, best, "o-", color="C0", label="seconds, best")
        axis.plot(x, [max(row) for row in found["seconds"]], "_", color="C0", label="slowest")
        line = found["seconds_fixed"] + found["seconds_each"] * x
        if name != "batch":
            axis.plot(x, np.where(line > min(best) / 2, line, np.nan), ":", color="0.5", label="a + b x")
        axis.set(xscale="log", yscale="log", xlabel=name, ylabel="seconds")
        axis.set_xticks(x, [f"{value:,.0f}" for value in x])
        axis.xaxis.minorticks_off()
        if found["peak_mib"][0] is not None:
            memory = axis.twinx()
            memory.plot(x, found["peak_mib"], "s--", color="C1")
            axis.plot([], [], "s--", color="C1", label="peak memory, MiB (right)")
            memory.set(ylim=(0, 1.3 * max(found["peak_mib"]) + 1))
            memory.tick_params(axis="y", colors="C1")
        fitted = "" if name == "batch" else f", R2 {found['r2']:.3f}"
        axis.set_title(f"{name}: exponent at the end {found['exponent']:.2f}{fitted}", fontsize=10)
    axes.flat[0].legend(loc="upper left", fontsize=8)
    seconds = {name: min(values) for name, values in result["overlap"]["seconds"].items()}
    axis = axes.flat[-1]
    axis.barh(["both at once", "write alone", "compute alone"], [seconds[n] for n in ("both", "write", "compute")])
    axis.axvline(seconds["compute"] + seconds["write"], linestyle=":", color="0.5")
    axis.set(xlabel="seconds (dotted: one after the other)")
    axis.set_title(f"overlap, {result['overlap']['megabytes']:,.0f} MB", fontsize=10)
    figure.savefig(file, dpi=110)


def main(arguments: list[str]) -> None:
    """Prints the table; writes JSON and a picture."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks synthesis_scale", description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("synthesis_scale.json"))
    parser.add_argument("--png", type=Path, default=Path("synthesis_scale.png"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; default: the system's temporary one")
    given = parser.parse_args(arguments)
    where = {"machine": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    result = {"jax": jax.__version__, "device": jax.devices()[0].device_kind, **where, "base": dataclasses.asdict(BASE)}
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        result["scale"] = scale(given.rounds, Path(folder))
        result["overlap"] = overlap(given.rounds, Path(folder))
    given.json.write_text(json.dumps(result, indent=1))
    draw(result, given.png)
    print(f"{result['device']}, jax {result['jax']}, {where['cores']} cores, load {where['load']:.1f}; {BASE}")
    for name, found in result["scale"].items():
        best = [min(row) for row in found["seconds"]]
        cells = zip(found["values"], best, found["peak_mib"], strict=True)
        listed = ", ".join(f"{v:,}: {s:.3f} s {'' if m is None else f'{m:.0f} MiB'}".strip() for v, s, m in cells)
        print(
            f"{name:8} {listed}\n         exponent at the end {found['exponent']:.2f}, R2 of a line {found['r2']:.3f}"
        )
        print(f"         {found['why']}")
    compute, write, both = (statistics.median(result["overlap"]["seconds"][n]) for n in ("compute", "write", "both"))
    hidden = (compute + write - both) / min(compute, write)
    print(
        f"overlap: compute {compute:.2f} s, write {write:.2f} s, both {both:.2f} s; {hidden:.0%} of the shorter hidden"
    )
