"""This package beside its PyTorch equivalent: the same case in two programs that stay alive and step in turn, warm.

    python -m benchmarks CASE ... [--against pytorch] [--modes eager compile] [--pytorch PYTHON] [--json FILE]
    python -m benchmarks forward encode --pairs 7 --threads 2
    python -m benchmarks haxby input_pipeline            # whole programs, which have no counterpart
    python -m benchmarks forward --tiny                  # small models: does it work?

A turn is one step of ours and then one of each mode of PyTorch, so that whatever else the machine does disturbs all of
them; the ratio is theirs over ours, turn by turn. Each case has fresh processes, hence its own peak memory. Seconds are
taken inside the processes. FLOP/s count what the mathematics needs (`benchmarks/flops.py`; a training step is three
forward passes), and their share is of the fastest matrix product that either program made in the same run.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import GIB, describe_machine, load, markdown_table
from benchmarks.serving import Worker, WorkerDied

ROOT = Path(__file__).parents[1]
CASES = ["forward", "encode", "vae_train", "mapper_train", "synthesis", "clip"]
PROGRAMS = {
    "input_pipeline": (["-m", "benchmarks", "input_pipeline"], ["--records", "48", "--batches", "2"]),
    "haxby": (["train.py", "haxby"], ["--stage1.steps", "2", "--stage2.steps", "2", "--variability.folds", "0"]),
}
"""Arguments of Python, and those that make it quick."""
OURS = "ours"
BUSY = 0.05  # processors that a waiting program may keep busy before it is told
COLUMNS = [
    "case",
    "batch",
    "ours s: median (min)",
    "PyTorch s: median (min)",
    "PyTorch / ours, by pair: median (min to max)",
    "of minima",
    "of CPU s",
    "GFLOP/s, ours / PyTorch",
    "% of product",
    "compile s",
    "peak GiB",
    "load",
]


# --- processes ---


def environment(threads: int) -> dict[str, str]:
    """Of the compared programs.

    OpenMP's threads, by default, spin for a while after each parallel region. With other programs about, PyTorch then
    takes many times as long, and what waits for its turn must leave the cores alone: so they sleep. XLA's threads do.
    """
    changes = {
        "JAX_COMPILATION_CACHE_DIR": "",  # what is compiled is not kept, nor taken from where it was
        "OMP_WAIT_POLICY": "passive",  # of GNU's OpenMP, and what follows of Intel's
        "KMP_BLOCKTIME": "0",
        "OMP_NUM_THREADS": str(threads),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # two programs share a GPU
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    return {**os.environ, **changes}


def start(side: str, python: str, threads: int) -> Worker:
    """The process of a side: "ours", or a mode of PyTorch."""
    module = "benchmarks.ours" if side == OURS else "benchmarks.pytorch_side"
    command = [sys.executable if side == OURS else python, "-m", module]
    name = "ours" if side == OURS else f"PyTorch ({side}, {python})"
    return Worker(name, command, environment(threads), ROOT)


# --- measuring ---


def take_turns(
    workers: dict[str, Worker], pairs: int, steps: int, tell: Callable[[str], None]
) -> dict[str, dict[str, list[float]]]:
    """Of each side the `seconds`, `cpu_seconds` of a step in each turn, and processors it kept busy while it waited.

    A step before them in each turn is not counted: memory that a program has freed may meanwhile be another's, or on a
    virtual machine the host's, and costs seconds to get again.
    """
    found = {side: {"seconds": [], "cpu_seconds": [], "busy_waiting": []} for side in workers}
    for pair in range(pairs):
        for side, worker in workers.items():
            others = {name: other for name, other in workers.items() if name != side}
            worker.ask("step", times=1)
            before = {name: other.cpu_seconds() for name, other in others.items()}
            reply = worker.ask("step", times=steps)
            for name, other in others.items():
                waited = other.cpu_seconds() - before[name]
                found[name]["busy_waiting"].append(waited / (steps * reply["seconds"]))
            for quantity in ("seconds", "cpu_seconds"):
                found[side][quantity].append(reply[quantity])
        last = ", ".join(f"{side} {times['seconds'][-1]:.3g} s" for side, times in found.items())
        tell(f"  {pair + 1} of {pairs}: {last}")
    return found


def ratios(ours: dict[str, list[float]], theirs: dict[str, list[float]]) -> dict[str, Any]:
    """Theirs over ours: turn by turn, and what that comes to."""
    by_pair = [b / a for a, b in zip(ours["seconds"], theirs["seconds"], strict=True)]
    cpu = [b / a for a, b in zip(ours["cpu_seconds"], theirs["cpu_seconds"], strict=True) if a > 0]
    return {
        "by_pair": by_pair,
        "median": statistics.median(by_pair),
        "min": min(by_pair),
        "max": max(by_pair),
        "of_minima": min(theirs["seconds"]) / min(ours["seconds"]),
        "of_cpu_seconds": statistics.median(cpu) if cpu else None,
    }


def measure(case: str, options: argparse.Namespace, tell: Callable[[str], None]) -> dict[str, Any]:
    """Starts the processes of a case, checks what they compute, and takes turns. Raises WorkerDied."""
    workers: dict[str, Worker] = {}
    loads = [load()]
    try:
        # One after the other: what one needs only while it builds is free again when the next one does.
        ours = workers[OURS] = start(OURS, options.pytorch, options.threads)
        hello = {OURS: ours.ask("hello")}
        on_cpu = hello[OURS]["platform"] == "cpu"
        dtype = options.dtype or ("float32" if on_cpu else "bfloat16")
        built = {OURS: ours.ask("build", case=case, batch=options.batch, dtype=dtype, tiny=options.tiny)}
        batch = built[OURS]["batch"]
        same = dict(case=case, batch=batch, dtype=dtype, tiny=options.tiny)
        for mode in options.modes if options.against == "pytorch" else ():
            worker = workers[mode] = start(mode, options.pytorch, options.threads)
            hello[mode] = worker.ask("hello")
            fused = options.adamw == "fused"
            built[mode] = worker.ask("build", **same, mode=mode, fused=fused, threads=options.threads)
        for worker in workers.values():
            worker.ask("step", times=1)
            if not worker.ask("finite"):
                raise WorkerDied(f"{case}: what {worker.name} computes is not finite")
        times = take_turns(workers, options.pairs, options.steps, tell)
        for worker in workers.values():
            if not worker.ask("finite"):
                raise WorkerDied(f"{case}: what {worker.name} computes is no longer finite")
        peaks = {side: (worker.ask("device_peak_bytes"), worker.peak_bytes()) for side, worker in workers.items()}
        size = 128 if options.tiny else 2048 if on_cpu else 8192
        fastest = dict.fromkeys(workers, float("inf"))
        for _ in range(2):
            for side, worker in workers.items():
                fastest[side] = min(fastest[side], worker.ask("product", size=size, dtype=dtype)["seconds"])
    finally:
        for worker in workers.values():
            worker.close()
    loads.append(load())
    sides = {}
    for side, found in times.items():
        median = statistics.median(found["seconds"])
        device, host = peaks[side]
        # PyTorch compiles in its first step, ours before it.
        compile_seconds = built[side].get("compile_seconds", max(0.0, built[side]["first"] - median))
        sides[side] = {
            **hello[side],
            **found,
            "median": median,
            "min": min(found["seconds"]),
            "flops_per_second": built[OURS]["flops"] / median,
            "compile_seconds": compile_seconds,
            "peak_bytes": host,
            "device_peak_bytes": device,
            "product_flops_per_second": 2 * size**3 / fastest[side],
        }
    row = {"case": case, "batch": batch, "dtype": dtype, "flops": built[OURS]["flops"], "load": loads, "sides": sides}
    row["ratios"] = {side: ratios(sides[OURS], found) for side, found in sides.items() if side != OURS}
    return row


def measure_program(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """A whole program: seconds on the clock and of processors, and peak memory, of all its processes."""
    command, quick = PROGRAMS[name]
    loads = [load()]
    with tempfile.TemporaryDirectory() as folder:
        place = ["--workdir", os.path.join(folder, "run")] if name == "haxby" else []
        arguments = [sys.executable, *command, *place, *(quick if options.tiny else [])]
        with open(os.path.join(folder, "printed"), "w+", errors="replace") as printed:
            started = time.perf_counter()
            process = subprocess.Popen(
                arguments, cwd=ROOT, env=environment(options.threads), stdout=printed, stderr=subprocess.STDOUT
            )
            _, status, used = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - started
            process.returncode = os.waitstatus_to_exitcode(status)
            printed.seek(0)
            lines = printed.read().strip().splitlines()[-20:]
    if process.returncode:
        raise WorkerDied("\n".join([f"{name} ended with code {process.returncode}:", *lines]))
    peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    row = {"case": name, "load": [*loads, load()], "seconds": seconds, "cpu_seconds": used.ru_utime + used.ru_stime}
    return {**row, "peak_bytes": peak, "printed": lines}


# --- telling ---


def best_product(rows: Sequence[dict[str, Any]], dtype: str) -> float:
    """The rate of the fastest matrix product of the run, of any side, in FLOP/s."""
    sides = [side for row in rows if row.get("dtype") == dtype for side in row["sides"].values()]
    return max(side["product_flops_per_second"] for side in sides)


def cells(row: dict[str, Any], mode: str | None, product: float) -> list[str]:
    """A line of the table: a case, beside one mode of PyTorch or alone."""
    sides = [row["sides"][side] for side in (OURS, mode) if side]

    def both(text: Callable[[dict[str, Any]], str]) -> str:
        return " / ".join(map(text, sides))

    def peak(side):
        n_bytes = side["device_peak_bytes"] or side["peak_bytes"]
        return "?" if n_bytes is None else f"{n_bytes / GIB:.2f}"

    times = [f"{side['median']:#.3g} ({side['min']:#.3g})" for side in sides]
    ratio = ["", "", ""]
    if mode:
        found = row["ratios"][mode]
        cpu = found["of_cpu_seconds"]
        spread = f"({found['min']:.2f} to {found['max']:.2f})"
        ratio = [f"**{found['median']:.2f}** {spread}", f"{found['of_minima']:.2f}", f"{cpu:.2f}" if cpu else "?"]
    return [
        row["case"] + (f", {mode}" if mode else ""),
        str(row["batch"]),
        *(times if mode else [*times, ""]),
        *ratio,
        both(lambda side: f"{side['flops_per_second'] / 1e9:.0f}"),
        both(lambda side: f"{100 * side['flops_per_second'] / product:.0f}"),
        both(lambda side: f"{side['compile_seconds']:.1f}"),
        both(peak),
        f"{max(row['load']):.1f}",
    ]


def describe(found: dict[str, Any]) -> str:
    """Markdown: the machine, versions and command, a table of cases, one of whole programs, and what is to be known."""
    machine = found["machine"]
    cases = [row for row in found["rows"] if "sides" in row]
    programs = [row for row in found["rows"] if "seconds" in row]
    memory = "" if machine["memory_gib"] is None else f", {machine['memory_gib']:.0f} GiB"
    lines = [f"{machine['date']}, {machine['cpu']}, cores used: {machine['cores']}{memory}; `{found['command']}`."]
    if cases:
        sides = {side: about for row in cases for side, about in row["sides"].items()}
        versions = {side: ", ".join(f"{k} {v}" for k, v in about["versions"].items()) for side, about in sides.items()}
        lines.append("Versions: " + "; ".join(f"{side} {text}" for side, text in versions.items()) + ".")
        table = []
        for dtype in dict.fromkeys(row["dtype"] for row in cases):
            product = best_product(cases, dtype)
            each = {
                side: max(r["sides"][side]["product_flops_per_second"] for r in cases if side in r["sides"])
                for side in sides
            }
            rates = ", ".join(f"{side} {rate / 1e9:.0f}" for side, rate in each.items())
            lines.append(f"Type {dtype}; matrix product, GFLOP/s: {rates}.")
            for row in cases:
                table += [cells(row, mode, product) for mode in row["ratios"] or [None] if row["dtype"] == dtype]
        lines += ["", markdown_table(COLUMNS, table)]
    if programs:
        columns = ["program", "seconds", "CPU seconds", "peak GiB", "load"]
        table = [
            [
                r["case"],
                f"{r['seconds']:.1f}",
                f"{r['cpu_seconds']:.1f}",
                f"{r['peak_bytes'] / GIB:.2f}",
                f"{max(r['load']):.1f}",
            ]
            for r in programs
        ]
        lines += ["", markdown_table(columns, table)]
        rates = [f"    {line}" for r in programs if r["case"] == "input_pipeline" for line in r["printed"]]
        lines += ["", *rates] if rates else []
    for row in cases:
        for side, about in row["sides"].items():
            busy = statistics.median(about["busy_waiting"] or [0.0])
            if busy > BUSY:
                lines.append(f"NOT IDLE: in {row['case']}, {side} kept {busy:.2f} processors busy while it waited.")
    lines += [f"FAILED: {row['case']}: {row['failed']}" for row in found["rows"] if "failed" in row]
    return "\n".join(lines)


def make_parser(programs: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog=f"Named first, these have options of their own (PROGRAM --help): {', '.join(programs)}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "cases", nargs="+", choices=[*CASES, *PROGRAMS], metavar="CASE", help=", ".join([*CASES, *PROGRAMS])
    )
    parser.add_argument("--against", choices=["pytorch", "nothing"], default="pytorch")
    parser.add_argument(
        "--modes", nargs="+", choices=["eager", "compile"], default=["eager"], help="of PyTorch (eager)"
    )
    parser.add_argument("--pytorch", default=sys.executable, metavar="PYTHON", help="one that has torch (this one)")
    parser.add_argument(
        "--adamw", choices=["fused", "default"], default="fused", help="PyTorch's; the release: default"
    )
    parser.add_argument("--pairs", type=int, default=5, help="turns (5)")
    parser.add_argument("--steps", type=int, default=1, help="in a turn (1); more where a step takes milliseconds")
    parser.add_argument("--batch", type=int, help="of every case (1 or 4 on a CPU, what fills an 80 GB GPU elsewhere)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of computation (float32 on a CPU)")
    parser.add_argument("--threads", type=int, help="cores of all programs, the first that are allowed (all)")
    parser.add_argument("--tiny", action="store_true", help="small models: does the program work?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    return parser


def main(arguments: list[str], programs: Sequence[str] = ()) -> int:
    """Measures each case, prints the tables. `programs`: other first arguments that the command line knows."""
    parser = make_parser(programs)
    options = parser.parse_args(arguments)
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count()))
    options.threads = options.threads or len(allowed)
    for name in ("threads", "pairs", "steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; it must be at least 1")
    if options.threads > len(allowed):
        parser.error(f"--threads is {options.threads}; {len(allowed)} cores are allowed here")
    if options.threads < len(allowed):  # for the processes to inherit: XLA takes as many threads as there are cores
        os.sched_setaffinity(0, allowed[: options.threads])
    short = [Path(word).name if os.sep in word else word for word in arguments]
    try:
        found = measure_all(options, f"python -m benchmarks {shlex.join(short)}")
    finally:
        if options.threads < len(allowed):
            os.sched_setaffinity(0, allowed)
    print(describe(found))
    return 1 if any("failed" in row for row in found["rows"]) else 0


def measure_all(options: argparse.Namespace, command: str) -> dict[str, Any]:
    """Every case in turn; one that fails does not end the others."""

    def tell(line):
        print(line, file=sys.stderr, flush=True)

    found = {"machine": describe_machine(), "command": command, "rows": []}
    for name in options.cases:
        tell(f"{name} (load {load():.1f})")
        try:
            row = measure_program(name, options) if name in PROGRAMS else measure(name, options, tell)
        except WorkerDied as error:
            tell(str(error))
            row = {"case": name, "failed": str(error).splitlines()[0]}
        found["rows"].append(row)
        if options.json:  # after each case: a run takes long
            options.json.write_text(json.dumps(found, indent=1))
    return found
