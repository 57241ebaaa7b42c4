"""How fast the system is on one GPU, in bfloat16: every case against the rates that this very GPU reaches.

    python -m benchmarks gpu                             # all cases, and torch.compile where torch is installed
    python -m benchmarks gpu vae_train --batch 24
    python -m benchmarks gpu --tiny                      # small models, on whatever there is: does it work?

Needs jax, flax, optax, orbax and numpy. Each case is checked first (relative error by norm against float32 with exact
products, fresh random parameters and inputs), then timed: a window is many steps put on the device's queue and one wait
for the last; the seconds are the median window's. MFU counts the floating-point operations of convolutions and matrix
products that the mathematics needs (a training step: three times the forward pass), over the seconds, over the rate of
a large matrix product measured here.
"""

import argparse
import dataclasses
import importlib.util
import json
import platform
import secrets
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.cases import CASES, Sizes, normal

H100_TFLOPS, H100_TBYTES = 989.4, 3.35  # data sheet, SXM: dense bfloat16, memory
AGAINST = ["vae_train", "mapper_train", "synthesis"]  # what PyTorch is asked for unless told: its compiler takes long
LARGEST_ERROR = 0.05  # of bfloat16 against float32; of a gradient: twice that


def seconds_per_step(step: Callable, args: tuple, trains: bool, window: float, windows: int = 5) -> list[float]:
    """Seconds of one step in each window, of about `window` seconds, after a warm-up; `trains` as in `Case`."""

    def run(times, state):
        for _ in range(times):
            out = step(*(state, *args[1:]) if trains else args)
            state = out[0] if trains else state
        return jax.block_until_ready(state if trains else out)

    def timed(times, state):
        start = time.perf_counter()
        out = run(times, state)
        return (time.perf_counter() - start) / times, out if trains else state

    state = run(2, args[0]) if trains else args[0]
    seconds, state = timed(2, state)
    steps = max(2, round(window / seconds))
    found = []
    for _ in range(windows):
        seconds, state = timed(steps, state)
        found.append(seconds)
    return found


def ceilings(size: int, window: float) -> dict[str, float]:
    """Rates of this device on random numbers: TFLOP/s of a bfloat16 product [size, size, size], and TB/s (read and
    written) of a copy of float32."""
    a, b = (normal(seed, size, size).astype(jnp.bfloat16) for seed in (0, 1))
    matmul = statistics.median(seconds_per_step(jax.jit(jnp.matmul), (a, b), False, window))
    x = normal(2, 4 * size, 4 * size)
    moved = statistics.median(seconds_per_step(jax.jit(jnp.negative), (x,), False, window))
    return {"matmul_tflops": 2 * size**3 / matmul / 1e12, "copy_tbytes": 2 * x.nbytes / moved / 1e12}


def measure(name: str, sizes: Sizes, batch: int, window: float, check: bool) -> dict[str, Any]:
    """Builds, checks and times one case."""
    case = CASES[name](sizes, batch, secrets.randbelow(2**30), "bfloat16")
    start = time.perf_counter()
    step = case.step.lower(*case.args).compile()
    compile_seconds = time.perf_counter() - start
    memory = step.memory_analysis()
    error = case.error(step) if check else None
    times = seconds_per_step(step, case.args, case.trains, window)
    seconds = statistics.median(times)
    return {
        "case": name,
        "batch": batch,
        "seconds": seconds,
        "fastest": min(times),
        "slowest": max(times),
        "per_second": batch / seconds,
        "tflops": case.flops / seconds / 1e12,
        "gflop_each": case.flops / batch / 1e9,
        "compile_seconds": compile_seconds,
        "gib": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30 if memory else None,
        "error": error,
        "error_limit": LARGEST_ERROR * (2 if name.endswith("train") else 1),
    }


def pytorch(names: list[str], sizes: Sizes, tiny: bool) -> list[dict[str, Any]]:
    """The same cases through torch.compile, in a process of its own; none where torch is not installed."""
    if importlib.util.find_spec("torch") is None:
        return []
    cases = [f"{name}:{sizes.batches[name]}" for name in names]
    command = [sys.executable, "-m", "benchmarks.pytorch_cases", "--modes", "compile", *cases]
    done = subprocess.run([*command, *(["--tiny"] if tiny else [])], stdout=subprocess.PIPE, text=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def describe(row: dict[str, Any], rates: dict[str, float]) -> str:
    """One line of the table."""
    if "failed" in row:
        return f"{row['case']:13} {row['batch']:5} {row['failed'][:100]}"
    error = "" if row["error"] is None else f"{row['error']:.1e}"
    memory = "" if row["gib"] is None else f"{row['gib']:.1f}"
    return (
        f"{row['case']:13} {row['batch']:5} {1e3 * row['seconds']:9.2f} "
        f"{1e3 * (row['slowest'] - row['fastest']):7.2f} {row['per_second']:9.1f} {row['tflops']:8.1f} "
        f"{100 * row['tflops'] / rates['matmul_tflops']:6.1f} {100 * row['tflops'] / H100_TFLOPS:6.1f} "
        f"{memory:>6} {row['compile_seconds']:8.1f} {error:>8}"
    )


def compare(theirs: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """One line about PyTorch; `ratio` is added to its row where the same case was timed here."""
    if "failed" in theirs:
        return f"{theirs['case']:13} {theirs['batch']:5} {theirs['failed'][:100]}"
    key = (theirs["case"], theirs["batch"])
    ours = [row["seconds"] for row in rows if (row["case"], row["batch"]) == key and "seconds" in row]
    theirs["ratio"] = theirs["seconds"] / ours[0] if ours else None
    ratio = f"{theirs['ratio']:.2f} x ours" if ours else ""
    return f"{theirs['case']:13} {theirs['batch']:5} {1e3 * theirs['seconds']:9.2f} ms  {ratio}"


HEADER = (
    f"{'case':13} {'batch':>5} {'ms':>9} {'spread':>7} {'per s':>9} {'TFLOP/s':>8} {'MFU %':>6} {'sheet%':>6} "
    f"{'GiB':>6} {'compile':>8} {'error':>8}"
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], help="default: all")
    parser.add_argument("--tiny", action="store_true", help="small models: does the program work?")
    parser.add_argument("--against", choices=["pytorch", "nothing"], default="pytorch")
    parser.add_argument("--batch", type=int, help="of every case; default: what fills an 80 GB GPU")
    parser.add_argument("--no-check", action="store_true", help="time only")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args(arguments)
    names = options.cases or list(CASES)
    sizes, window = (Sizes.tiny(), 0.01) if options.tiny else (Sizes.full(), 0.5)

    if options.batch:
        sizes = dataclasses.replace(sizes, batches=dict.fromkeys(CASES, options.batch))

    torch_rows = []
    if options.against == "pytorch":  # first, while this process holds no memory of the GPU
        torch_rows = pytorch(options.cases or AGAINST, sizes, options.tiny)
    device = jax.devices()[0]
    found = {
        "device": device.device_kind,
        "versions": {"jax": jax.__version__, "python": platform.python_version()},
        "date": time.strftime("%Y-%m-%d"),
        "ceilings": ceilings(256 if options.tiny else 8192, window),
        "rows": [],
        "pytorch": torch_rows,
    }
    rates = found["ceilings"]
    print(f"{device.device_kind}, jax {jax.__version__}, Python {platform.python_version()}, {found['date']}")
    print(f"matrix product {rates['matmul_tflops']:.0f} TFLOP/s, copy {rates['copy_tbytes']:.2f} TB/s\n{HEADER}")
    for name in names:
        batch = sizes.batches[name]
        try:
            row = measure(name, sizes, batch, window, check=not options.no_check)
        except jax.errors.JaxRuntimeError as error:  # no memory for it
            row = {"case": name, "batch": batch, "failed": str(error).splitlines()[0]}
        found["rows"].append(row)
        print(describe(row, rates), flush=True)
        jax.clear_caches()
    for row in torch_rows:
        print(f"PyTorch {row['mode']:8} {compare(row, found['rows'])}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    wrong = [row for row in found["rows"] if row.get("error") is not None and not row["error"] <= row["error_limit"]]
    for row in wrong:
        print(f"WRONG: {row['case']} is {row['error']:.2e} from float32; at most {row['error_limit']} was expected")
    return 1 if wrong or any("failed" in row for row in found["rows"]) else 0
