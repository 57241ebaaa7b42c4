"""What the benchmarks say about the machine they ran on, and their tables."""

import os
import platform
import time
from collections.abc import Sequence
from typing import Any

GIB = 2**30


def cpu_model(told: str | os.PathLike = "/proc/cpuinfo") -> str:
    """As the kernel names it; the architecture where it does not."""
    try:
        with open(told) as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def memory_gib() -> float | None:
    """Of the machine; None where it does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    except (AttributeError, ValueError, OSError):
        return None


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load() -> float:
    """Programs that wanted to run, averaged over the last minute."""
    return os.getloadavg()[0]


def describe_machine() -> dict[str, Any]:
    return {"cpu": cpu_model(), "cores": cores(), "memory_gib": memory_gib(), "date": time.strftime("%Y-%m-%d")}


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Text and numbers in columns of equal width; the first column is text, the others are flushed right."""
    widths = [max(3, *map(len, column)) for column in zip(columns, *rows, strict=True)]

    def line(cells):
        aligned = (f"{cell:{'<' if i == 0 else '>'}{widths[i]}}" for i, cell in enumerate(cells))
        return "| " + " | ".join(aligned) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(columns), line(rule), *map(line, rows)])
