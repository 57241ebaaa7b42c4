"""`python -m benchmarks PROGRAM ...` runs benchmarks/PROGRAM.py; `python -m benchmarks CASE ...`, side_by_side.py."""

import importlib
import sys
from pathlib import Path

from benchmarks import side_by_side

FILES = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.py"))}
PROGRAMS = [
    name for name, path in FILES.items() if not name.startswith("_") and "def main(arguments" in path.read_text()
]


def run(arguments: list[str]) -> int | None:
    """The program or the cases that the first argument names."""
    if arguments and arguments[0] in PROGRAMS:
        return importlib.import_module(f"benchmarks.{arguments[0]}").main(arguments[1:])
    return side_by_side.main(arguments, programs=PROGRAMS)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
