"""Reads the text of a compiled program: what each device computes, moves and sends.

XLA's own `cost_analysis` counts the body of a loop once and is empty for GPUs. Here every instruction counts as often
as it runs, by the trip counts that XLA records, and products count wherever they end up: in fusions, in TPUs'
convolutions, in calls of cuDNN and cuBLAS. A leaf: text in, numbers out.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# They name or rename memory that others fill and read.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "partition-id", "replica-id"),
    *("while", "call", "conditional", "after-all", "opt-barrier", "add-dependency", "async-update", "async-done"),
    *("copy-done", "slice-done", "all-reduce-done", "all-gather-done", "collective-permute-done"),
}
_SLICES = ("slice", "dynamic-slice", "gather")
_BITS = dict(pred=8, token=0, opaque=0, s4=4, u4=4, bf16=16)  # the rest: by the number in the name
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\dm\d\w*)?)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(r"(?:calls|to_apply|body|called_computations|branch_computations)=\{?((?:%?[\w.\-]+(?:, )?)+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation. `shape` and `attributes` are XLA's text."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    def attribute(self, pattern: str) -> str | None:
        """The first group of a pattern in the attributes; None if it is not there."""
        found = re.search(pattern, self.attributes)
        return found and found[1]

    @property
    def collective(self) -> str | None:
        """Which of `COLLECTIVES` it is, or starts."""
        kind = self.opcode.removesuffix("-start")
        return kind if kind in COLLECTIVES else None

    @property
    def target(self) -> str:
        """What a custom call calls; "" for others."""
        return self.attribute(r'custom_call_target="([^"]*)"') or ""


Computation = Mapping[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Executed:
    """An instruction, the computation in which it is, how often it runs, and whether it is a part of a fusion."""

    instruction: Instruction
    computation: Computation
    times: int
    fused: bool

    @property
    def ahead(self) -> bool:
        """Whether it runs beside what follows, until it is waited for."""
        return self.instruction.opcode in ("copy-start", "slice-start", "async-start")


class Program:
    """A compiled module, from `Compiled.as_text()`."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        for line in text.splitlines():
            if header := _COMPUTATION.match(line):
                current = self.computations.setdefault(header[2], {})
                if header[1]:
                    self.entry = header[2]
            elif found := _INSTRUCTION.match(line):
                instruction = _parse(found[1], line[found.end() :])
                current[instruction.name] = instruction

    def executed(self) -> Iterator[Executed]:
        """Every instruction that runs; a collective that XLA spread over several fusions comes once."""
        channels = set()
        for one in self._walk(self.entry, 1, False):
            if one.instruction.collective:
                channel = one.instruction.attribute(r"channel_id=(\d+)")
                if channel in channels:
                    continue
                channels |= {channel} - {None}
            yield one

    def _walk(self, name: str, times: int, fused: bool) -> Iterator[Executed]:
        computation = self.computations[name]
        for instruction in computation.values():
            yield Executed(instruction, computation, times, fused)
            if instruction.opcode in ("reduce", "reduce-window", "sort", "scatter", "map", "select-and-scatter"):
                continue  # what they apply is scalar
            if instruction.collective:
                continue
            inside = fused or instruction.opcode == "fusion"
            repeats = self.trips(instruction) if instruction.opcode == "while" else 1
            for called in _CALLED.finditer(instruction.attributes):
                for inner in re.findall(r"[\w.\-]+", called[1]):
                    if inner in self.computations:
                        yield from self._walk(inner, times * repeats, inside)

    def trips(self, loop: Instruction) -> int:
        """How often a loop runs: as XLA says, or else by what its counter is compared with and grows by, from 0."""
        if known := loop.attribute(r'known_trip_count":\{"n":"(\d+)"'):
            return int(known)
        condition, body = (self.computations[loop.attribute(rf"{name}=%?([\w.\-]+)")] for name in ("condition", "body"))
        *_, compare = condition.values()
        counter, bound = (condition[name] for name in compare.operands)
        if bound.opcode != "constant" or counter.opcode != "get-tuple-element":
            return 1
        place = int(counter.attribute(r"index=(\d+)"))
        *_, root = body.values()
        grown = [body[name] for name in body[root.operands[place]].operands]
        steps = [int(one.attributes) for one in grown if one.opcode == "constant"]
        return math.ceil(int(bound.attributes) / steps[0]) if steps else int(bound.attributes)

    def counts(self) -> collections.Counter:
        """How many instructions of each opcode there are, those in fusions and loops once; a custom call goes by its
        target."""
        return collections.Counter(one.instruction.target or one.instruction.opcode for one in self.executed())

    def flops(self) -> float:
        """Floating-point operations of the matrix products and convolutions of one run, on one device."""
        return sum((one.times * flops(one.instruction, one.computation) for one in self.executed()), 0.0)

    def flops_inside(self, fusion: Instruction) -> float:
        """`flops` of one run of a fusion."""
        parts = self._walk(fusion.attribute(r"calls=%?([\w.\-]+)"), 1, True)
        return sum((part.times * flops(part.instruction, part.computation) for part in parts), 0.0)

    def traffic(self, one: Executed) -> int:
        """Bytes that an instruction reads from and writes to the device's main memory, each time it runs.

        What lies in a TPU's vector memory, or is a part of a fusion, costs nothing; of an array that is only sliced or
        gathered from, or updated in place, the piece counts.
        """
        instruction = one.instruction
        if one.fused or instruction.collective or instruction.opcode in _FREE:
            return 0
        operands = [one.computation[name].shape for name in instruction.operands]
        if instruction.opcode in ("copy-start", "slice-start"):  # the shape has both ends; the smaller is moved
            ends = sorted(_split(instruction.shape)[:2], key=array_bytes)
            return sum(array_bytes(ends[0]) for end in ends if main_memory_bytes(end))
        written = main_memory_bytes(instruction.shape)
        if instruction.opcode == "dynamic-update-slice":
            return 2 * main_memory_bytes(operands[1])
        if instruction.opcode in _SLICES:
            return 2 * written
        read = [main_memory_bytes(shape) for shape in operands]
        if instruction.opcode == "fusion":
            inner = self.computations[instruction.attribute(r"calls=%?([\w.\-]+)")]
            parameters = [i for i in inner.values() if i.opcode == "parameter"]
            for parameter in parameters:
                number = int(parameter.attributes)
                uses = [i for i in inner.values() if parameter.name in i.operands]
                if uses and all(use.opcode in _SLICES and use.operands[0] == parameter.name for use in uses):
                    read[number] = min(read[number], sum(main_memory_bytes(use.shape) for use in uses))
                elif uses and all(
                    use.opcode == "dynamic-update-slice" and use.operands[0] == parameter.name for use in uses
                ):
                    pieces = sum(main_memory_bytes(inner[use.operands[1]].shape) for use in uses)
                    written -= max(0, min(read[number], written) - pieces)
                    read[number] = 0
        return written + sum(read)


def _parse(name: str, rest: str) -> Instruction:
    rest = re.sub(r"/\*.*?\*/", "", rest)
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end + 1 :]
    opcode, _, rest = rest.partition("(")
    end = _closing("(" + rest, 0) - 1
    inside, attributes = rest[:end], rest[end + 1 :]
    if opcode in ("constant", "parameter"):
        return Instruction(name, shape, opcode, (), inside)  # its value or number
    return Instruction(name, shape, opcode, tuple(re.findall(r"%([\w.\-]+)", inside)), attributes)


def _closing(text: str, start: int) -> int:
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.start()
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


def _split(shape: str) -> list[str]:
    """The arrays of a shape."""
    return [found[0] for found in _ARRAY.finditer(shape)]


@functools.lru_cache(maxsize=4096)
def _array(shape: str) -> tuple[str, tuple[int, ...]]:
    kind, sizes = _ARRAY.search(shape).group(1, 2)
    return kind, tuple(int(size) for size in sizes.split(",") if size)


def array_bytes(shape: str) -> int:
    """Bytes of all arrays of a shape, without padding: (f32[2,3]{1,0}, bf16[4]{0}) has 32."""
    return sum(_bytes(array) for array in _split(shape))


def main_memory_bytes(shape: str) -> int:
    """`array_bytes` of those arrays that are in a device's main memory, which XLA calls space 0."""
    return sum(_bytes(array) for array in _split(shape) if not re.search(r"S\([1-9]\d*\)", array))


@functools.lru_cache(maxsize=4096)
def _bytes(array: str) -> int:
    kind, sizes = _array(array)
    bits = _BITS.get(kind) if kind in _BITS else int(re.search(r"\d+", kind)[0])
    return math.prod(sizes) * bits // 8


# ---- products --------------------------------------------------------------------------------------------------------


def flops(instruction: Instruction, computation: Computation) -> float:
    """Twice the multiplications of a dot, a convolution, or a call of a library for them; 0 for anything else."""
    if instruction.opcode == "dot":
        contracted = [
            int(i) for i in (instruction.attribute(r"lhs_contracting_dims=\{([\d,]+)\}") or "").split(",") if i
        ]
        _, left = _array(computation[instruction.operands[0]].shape)
        return 2.0 * _size(instruction.shape) * math.prod(left[i] for i in contracted)
    if instruction.opcode == "convolution":
        shapes = [computation[name].shape for name in instruction.operands] + [instruction.shape]
        return _convolution(instruction, *shapes)
    if instruction.opcode == "custom-call":
        operands = [computation[name].shape for name in instruction.operands]
        output = _split(instruction.shape)[0]
        match instruction.target:
            case "__cudnn$convForward" | "__cudnn$convBiasActivationForward":
                return _convolution(instruction, operands[0], operands[1], output)
            case "__cudnn$convBackwardInput":  # of the forward one's output and kernel; as many multiplications
                return _convolution(instruction, output, operands[1], operands[0])
            case "__cudnn$convBackwardFilter":
                return _convolution(instruction, operands[0], output, operands[1])
            case target if "gemm" in target or "matmul" in target:
                contracted = re.findall(
                    r"\d+", instruction.attribute(r'lhs_contracting_dimensions":\[([^\]]*)\]') or ""
                )
                _, left = _array(operands[0])
                return 2.0 * _size(output) * math.prod(left[int(i)] for i in contracted)
    return 0.0


def _size(shape: str) -> int:
    return math.prod(_array(shape)[1])


def _convolution(instruction: Instruction, image: str, kernel: str, output: str) -> float:
    """Twice the pairs of a kernel's and an image's element that meet; padding and holes of a dilation are not met."""
    image_labels, rest = instruction.attribute(r"dim_labels=(\S+?)(?:,|$)").split("_")
    kernel_labels, output_labels = rest.split("->")
    sizes = [_array(shape)[1] for shape in (image, kernel, output)]
    window = instruction.attribute(r"window=\{([^}]*)\}") or ""
    dimensions = sum(label.isdigit() for label in kernel_labels)

    def numbers(name: str, default: int) -> list[list[int]]:
        given = re.search(rf"\b{name}=(\S+)", window)
        parts = given[1].split("x") if given else [str(default)] * dimensions
        return [[int(n) for n in part.split("_")] for part in parts]

    stride, pad = numbers("stride", 1), numbers("pad", 0)
    image_dilation, kernel_dilation = numbers("lhs_dilate", 1), numbers("rhs_dilate", 1)
    met = 1
    for i in range(dimensions):
        lengths = [
            size[labels.index(str(i))]
            for size, labels in zip(sizes, (image_labels, kernel_labels, output_labels), strict=True)
        ]
        met *= _meetings(*lengths, stride[i][0], pad[i][0], image_dilation[i][0], kernel_dilation[i][0])
    batch, features = sizes[2][output_labels.index("b")], sizes[2][output_labels.index("f")]
    return 2.0 * batch * features * sizes[1][kernel_labels.index("i")] * met


@functools.lru_cache(maxsize=4096)
def _meetings(image: int, kernel: int, output: int, stride: int, pad: int, holes: int, spread: int) -> int:
    """Pairs of output and kernel positions along an axis at which there is an element of the image."""
    if kernel <= output:
        return sum(_hits(tap * spread - pad, stride, output, image, holes) for tap in range(kernel))
    return sum(_hits(place * stride - pad, spread, kernel, image, holes) for place in range(output))


def _hits(first: int, step: int, count: int, image: int, holes: int) -> int:
    """How many of `first`, `first + step`, ... (`count` of them) are holes * j for a j from 0 to image - 1."""
    return sum(1 for p in range(first, first + step * count, step) if not p % holes and 0 <= p // holes < image)


# ---- communication ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Collective:
    """What one device sends and receives in one kind of collective."""

    kind: str
    bytes: int
    """Of the whole array that the group has together: what is reduced, or what is there when it is gathered."""
    group: int
    """Devices that take part in one."""
    times: int


def collectives(program: Program, devices: int) -> list[Collective]:
    """Every collective of one run, in XLA's order."""
    found = []
    for one in program.executed():
        if kind := one.instruction.collective:
            operands = sum(array_bytes(one.computation[name].shape) for name in one.instruction.operands)
            group = _group(one.instruction, devices)
            whole = operands * group if kind == "all-gather" else operands
            found.append(Collective(kind, whole, group, one.times))
    return found


def _group(instruction: Instruction, devices: int) -> int:
    """Devices in a group: of {{0,1},{2,3}} or [2,4]<=[8] or mesh['x'=2,'y'=4] {'y'} the last size."""
    if listed := instruction.attribute(r"replica_groups=\{\{([\d,]+)\}"):
        return listed.count(",") + 1
    if shape := instruction.attribute(r"replica_groups=\[([\d,]+)\]<="):
        return int(shape.split(",")[-1])
    if mesh := instruction.attribute(r"replica_groups=mesh\[([^\]]*)\]"):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh))
        axes = re.findall(r"'(\w+)'", instruction.attribute(r"replica_groups=mesh\[[^\]]*\] \{([^}]*)\}") or "")
        return math.prod(int(sizes[axis]) for axis in axes)
    return 2 if instruction.opcode.startswith("collective-permute") else devices
