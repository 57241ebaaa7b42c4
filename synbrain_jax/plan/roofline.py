"""How long a compiled program takes at the least: the roofline (Williams et al. 2009) of every instruction.

An instruction takes as long as its arithmetic or its memory traffic, whichever is longer, at the chip's published
rates; what one device does adds up, but traffic that XLA starts ahead runs beside arithmetic. Collectives take what
their bytes take on the links. Between "all of it behind the computation" and "none of it" lies the step. Latencies,
the host and anything that a chip's rates do not say are left out, so that no run is faster.
"""

import collections
import dataclasses

import jax

from synbrain_jax.plan.hlo import Program, collectives, flops
from synbrain_jax.plan.machines import Machine
from synbrain_jax.plan.programs import Planned, bytes_per_device


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device. `resident` is all that must fit at once."""

    parameters: int
    arguments: int
    temporaries: int
    outputs: int
    """That do not take an argument's place."""
    program: int

    @property
    def resident(self) -> int:
        return self.arguments + self.temporaries + self.outputs + self.program


@dataclasses.dataclass(frozen=True)
class Estimate:
    """One call of a program on each device of a machine."""

    memory: Memory
    flops: float
    """Of products, with what is recomputed."""
    useful_flops: float
    traffic: float
    """Bytes between a device and its main memory."""
    collectives: dict[str, tuple[int, float]]
    """How many of each kind, and their bytes together (`hlo.Collective.bytes`)."""
    arithmetic_seconds: float
    traffic_seconds: float
    device_seconds: float
    """Arithmetic and traffic, instruction by instruction."""
    link_seconds: float
    utilisation: float
    """Useful operations over what the machine could do in `seconds[0]`: a ceiling of MFU."""

    @property
    def seconds(self) -> tuple[float, float]:
        """Of a call: communication hidden behind the computation, and not hidden at all."""
        return max(self.device_seconds, self.link_seconds), self.device_seconds + self.link_seconds


def estimate(planned: Planned, compiled: jax.stages.Compiled, machine: Machine) -> Estimate:
    """What the compiled program says."""
    chip = machine.chip
    peak = chip.bfloat16 if planned.dtype == "bfloat16" else chip.float32
    program = Program(compiled.as_text())
    arithmetic = traffic = device = 0.0
    for one in program.executed():
        operations = one.times * flops(one.instruction, one.computation)
        arithmetic += operations
        if one.fused:
            continue
        moved = one.times * program.traffic(one)
        traffic += moved
        if one.instruction.opcode == "fusion":
            operations = one.times * program.flops_inside(one.instruction)
        device += max(operations / peak, moved / chip.bandwidth if not one.ahead else 0.0)
    found = collectives(program, machine.size)
    kinds = collections.defaultdict(lambda: (0, 0.0))
    for c in found:
        kinds[c.kind] = (kinds[c.kind][0] + c.times, kinds[c.kind][1] + c.times * c.bytes)
    links = sum((c.times * machine.seconds(c.kind, c.bytes, c.group) for c in found), 0.0)
    device = max(device, traffic / chip.bandwidth)
    useful = planned.useful_flops / machine.size
    return Estimate(
        memory=_memory(planned, compiled),
        flops=arithmetic,
        useful_flops=useful,
        traffic=traffic,
        collectives=dict(kinds),
        arithmetic_seconds=arithmetic / peak,
        traffic_seconds=traffic / chip.bandwidth,
        device_seconds=device,
        link_seconds=links,
        utilisation=useful / peak / max(device, links),
    )


def _memory(planned: Planned, compiled: jax.stages.Compiled) -> Memory:
    given = compiled.memory_analysis()
    return Memory(
        parameters=bytes_per_device(planned.parameters),
        # XLA leaves out what a program does not use, which is there all the same.
        arguments=max(given.argument_size_in_bytes, bytes_per_device(planned.arguments)),
        temporaries=given.temp_size_in_bytes,
        outputs=given.output_size_in_bytes - given.alias_size_in_bytes,
        program=given.generated_code_size_in_bytes,
    )
