"""Will it fit, and how long will it take? `synbrain plan` asks XLA's compiler, and needs no accelerator.

The programs of a run are compiled for a description of the machine (`programs.py`, `machines.py`); what the compiler
gives says how much memory they need and what each chip computes, moves and sends (`hlo.py`); published rates make times
of it (`roofline.py`). Nothing is run: memory is the compiler's own figure, times are lower bounds.
"""

import dataclasses
import re
import time

import jax

from synbrain_jax.config import Config
from synbrain_jax.errors import InputError
from synbrain_jax.plan.machines import GIB, Machine, machine, machines
from synbrain_jax.plan.programs import NAMES, Planned, bytes_per_device, plan_programs
from synbrain_jax.plan.roofline import Estimate, estimate
from synbrain_jax.sharding import make_mesh
from synbrain_jax.training import check_batch_sizes


@dataclasses.dataclass(frozen=True)
class Line:
    """One program on one machine."""

    planned: Planned
    estimate: Estimate | None
    """None: the compiler refused, mostly because it does not fit."""
    refusal: str
    compile_seconds: float

    def fits(self, on: Machine) -> bool:
        """Whether everything that must be in a chip's memory at once is less than there is."""
        return self.estimate is not None and self.estimate.memory.resident <= on.chip.memory


def plan(
    config: Config, topology: str, *, voxels: int = 15_724, samples: int = 32, programs: tuple[str, ...] = NAMES
) -> str:
    """Compiles a run's programs for a machine, and returns a Markdown table of what they need there.

    Args:
        config: as for training; `mesh` must fit the machine.
        topology: such as "v5e:4x4" or "h100:8".
        voxels: of the brain; hardly matters.
        samples: pictures at once in synthesis and encoding, on all chips together.
        programs: some of `NAMES`.

    Raises:
        InputError: an unknown topology or program, no compiler for it, or a mesh or batch that does not fit it.
    """
    if unknown := set(programs) - set(NAMES):
        raise InputError(f"--programs {' '.join(sorted(unknown))}: expected some of {' '.join(NAMES)}")
    target = machine(topology)
    config = config.for_platform("tpu" if target.chip.platform == "tpu" else "gpu")
    sizes = config.mesh
    mesh = make_mesh(sizes.data, sizes.fsdp, sizes.tensor, devices=target.devices())
    check_batch_sizes(config, mesh)
    lines = [_compile(one, target) for one in plan_programs(config, mesh, voxels, samples, programs)]
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    head = (
        f"{config.name} on {target}: {target.size} x {target.chip.memory / GIB:.2f} GiB, mesh {axes}, "
        f"{voxels:,} voxels (jax {jax.__version__})"
    )
    return "\n".join([head, "", *_table(lines, target), "", *_smallest(lines, target, config, voxels)])


def _compile(planned: Planned, target: Machine) -> Line:
    start = time.perf_counter()
    try:
        compiled = planned.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        return Line(planned, None, _refusal(str(error)), time.perf_counter() - start)
    seconds = time.perf_counter() - start
    return Line(planned, estimate(planned, compiled, target), "", seconds)


def _refusal(message: str) -> str:
    """Why XLA does not compile a program: for lack of memory (with the first figure in its message) or otherwise."""
    if "RESOURCE_EXHAUSTED" not in message:
        return f"XLA fails: {message.splitlines()[0][:80].replace('|', '/')}"
    figure = re.search(r"([\d.]+[KMG])\b", message)
    return f"no: needs {figure[1]}iB" if figure else "no"


def _table(lines: list[Line], target: Machine) -> list[str]:
    def row(title: str, cell) -> str:
        cells = [cell(line) if line.estimate or title in _WITHOUT_ESTIMATE else "" for line in lines]
        return f"| {title} | {' | '.join(cells)} |"

    def gib(part: str):
        return lambda line: f"{getattr(line.estimate.memory, part) / GIB:.2f}"

    def fits(line: Line) -> str:
        return line.refusal or ("yes" if line.fits(target) else "no")

    def sent(kind: str):
        def cell(line: Line) -> str:
            count, size = line.estimate.collectives.get(kind, (0, 0))
            return f"{count}: {size / 1e6:,.1f}" if count else ""

        return cell

    def hours(line: Line) -> str:
        if line.planned.calls is None:
            return f"{1e-6 * _middle(line.estimate) / line.planned.samples * 1e9 / 3.6:.2g} a million"
        return f"{line.planned.calls * _middle(line.estimate) / 3600:.2f}"

    kinds = sorted({kind for line in lines if line.estimate for kind in line.estimate.collectives})
    rates = f"{target.chip.bandwidth / 1e9:,.0f} GB/s"
    rows = [
        row("samples a call, on all chips", lambda line: str(line.planned.samples)),
        row("products in", lambda line: line.planned.dtype),
        row("**per chip:** parameters, GiB", gib("parameters")),
        row("arguments (state, batch), GiB", gib("arguments")),
        row("temporaries, GiB", gib("temporaries")),
        row("other outputs, GiB", gib("outputs")),
        row("program, GiB", gib("program")),
        row("all, GiB", gib("resident")),
        row("fits", fits),
        row("products, TFLOP", lambda line: f"{line.estimate.flops / 1e12:.3f}"),
        row("of them useful, TFLOP", lambda line: f"{line.estimate.useful_flops / 1e12:.3f}"),
        row("memory traffic, GB", lambda line: f"{line.estimate.traffic / 1e9:.1f}"),
        *(row(f"{kind}, number: MB", sent(kind)) for kind in kinds),
        row("**at published rates:** products, ms", lambda line: f"{1e3 * line.estimate.arithmetic_seconds:.1f}"),
        row(f"memory traffic at {rates}, ms", lambda line: f"{1e3 * line.estimate.traffic_seconds:.1f}"),
        row("links, ms", lambda line: f"{1e3 * line.estimate.link_seconds:.2f}"),
        row("a call, links hidden to not hidden, ms", lambda line: "{:.1f} to {:.1f}".format(*_milliseconds(line))),
        row("MFU at most", lambda line: f"{line.estimate.utilisation:.0%}"),
        row("hours for the run", hours),
        row("seconds to compile", lambda line: f"{line.compile_seconds:.0f}"),
    ]
    names = " | ".join(line.planned.name for line in lines)
    return [f"| | {names} |", "|---|" + "---:|" * len(lines), *rows]


_WITHOUT_ESTIMATE = ("samples a call, on all chips", "products in", "fits", "seconds to compile")


def _milliseconds(line: Line) -> tuple[float, float]:
    hidden, exposed = line.estimate.seconds
    return 1e3 * hidden, 1e3 * exposed


def _middle(result: Estimate) -> float:
    return sum(result.seconds) / 2


def _smallest(lines: list[Line], target: Machine, config: Config, voxels: int) -> list[str]:
    """For each program the smallest machine of this chip that it should fit, from what it needs on this one.

    Arguments are computed for every machine. Temporaries beyond one copy of the gradients or parameters are taken to be
    proportional to the samples on a chip.
    """
    found = []
    for line in lines:
        if line.estimate is None:
            continue
        memory, parts = line.estimate.memory, target.size
        copied = min(memory.temporaries, sum(leaf.size * 4 for leaf in jax.tree.leaves(line.planned.parameters)))
        fixed = memory.resident - memory.arguments - memory.temporaries + copied
        for smaller in machines(target.chip):
            if line.planned.samples % smaller.size:
                continue
            arguments = _arguments(line.planned.name, smaller, config, voxels, line.planned.samples)
            needed = fixed + arguments + (memory.temporaries - copied) * parts / smaller.size
            if needed <= target.chip.memory:
                time_there = _middle(line.estimate) * parts / smaller.size
                whole = f", {line.planned.calls * time_there / 3600:.1f} hours" if line.planned.calls else ""
                found.append(f"{line.planned.name} {smaller} ({needed / GIB:.1f} GiB{whole})")
                break
        else:
            found.append(f"{line.planned.name}: none with this batch")
    if not found:
        return []
    return [f"Smallest that should fit with these batches, not compiled: {'; '.join(found)}."]


def _arguments(name: str, on: Machine, config: Config, voxels: int, samples: int) -> int:
    """Bytes of a program's arguments on each chip of a machine, all of whose chips split the batch."""
    (planned,) = plan_programs(config, make_mesh(devices=on.devices()), voxels, samples, (name,))
    return bytes_per_device(planned.arguments)
