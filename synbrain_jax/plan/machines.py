"""Accelerators by name: their published rates, and descriptions that XLA compiles for without having one.

Rates are those of dense matrix products, main memory and links, as the makers publish them: cloud.google.com/tpu/docs
(pages v4, v5e, v5p, v6e; a chip's bidirectional inter-chip bandwidth, divided by its ports and by two) and NVIDIA's
data sheet of the H100 SXM and of NVLink 4. The memory of a TPU is what XLA lets a program have.
"""

import dataclasses
import math
import os
import re

import jax
from jax.experimental import topologies

from synbrain_jax.errors import InputError

GIB = 2**30
_HOST = 8  # GPUs that NVLink connects


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator. Rates are operations or bytes a second."""

    name: str
    platform: str
    memory: float
    bandwidth: float
    bfloat16: float
    float32: float
    """Of products of float32 arrays at JAX's default precision: bfloat16 on TPUs, TensorFloat-32 on GPUs."""
    link: float
    """In one direction of one link between neighbours, for GPUs of all of NVLink."""
    ring: int = 0
    """A slice closes to a ring along an axis whose length is a multiple of this; 0: there are no axes."""
    network: float = math.inf
    """Of a GPU to those outside its host, in one direction."""


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "tpu", 31.75 * GIB, 1228e9, 275e12, 275e12, 50e9, ring=4),
        Chip("v5e", "tpu", 15.75 * GIB, 819e9, 197e12, 197e12, 50e9, ring=16),
        Chip("v5p", "tpu", 95.74 * GIB, 2765e9, 459e12, 459e12, 100e9, ring=4),
        Chip("v6e", "tpu", 31.25 * GIB, 1638e9, 918e12, 918e12, 100e9, ring=16),
        Chip("h100", "cuda", 79.1 * GIB, 3352e9, 989.4e12, 494.7e12, 450e9, network=50e9),
    )
}
# From small to large. XLA compiles for no fewer than four v5e chips; 1x1 is one of these.
SLICES = {
    "v4": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4"),
    "v5e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
    "v6e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "h100": ("1", "2", "4", "8", "16", "32", "64", "128"),
}
# libtpu looks for the TPU that it runs on, and complains where there is none.
_LIBTPU = dict(
    TPU_SKIP_MDS_QUERY="1",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    TPU_ACCELERATOR_TYPE="v5litepod-8",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_WORKER_ID="0",
)
# What XLA's CUDA backend asks a driver about a card.
_H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 8 patch: 0 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  device_memory_size: 84929347584
}
"""


@dataclasses.dataclass(frozen=True)
class Machine:
    """Several equal chips; `shape` is that of a TPU's slice, or (number,) of GPUs."""

    chip: Chip
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def devices(self) -> list[jax.Device]:
        """Devices to compile for, none of which has to exist.

        Raises:
            InputError: the compiler for this kind of chip is not installed, or does not know the shape.
        """
        for name, value in _LIBTPU.items():
            os.environ.setdefault(name, value)
        if self.chip.platform == "tpu":
            whole = "2x2" if self.shape == (1, 1) else "x".join(map(str, self.shape))
            description = dict(platform="tpu", topology_name=f"{self.chip.name}:{whole}")
        else:
            hosts = math.ceil(self.size / _HOST)
            description = dict(platform="cuda", target_config=_H100, topology=f"1x{hosts}x{self.size // hosts}")
        try:
            return topologies.get_topology_desc(**description).devices[: self.size]
        # What is missing decides which of JAX's and the plugins' errors comes.
        except Exception as error:
            extra = {"tpu": "tpu", "cuda": "cuda12"}[self.chip.platform]
            cause = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise InputError(
                f"--topology {self}: XLA cannot compile for it here ({cause}). It needs the plugin of the extra "
                f"{extra}: pip install -e '.[{extra}]'"
            ) from error

    def seconds(self, kind: str, whole: int, group: int) -> float:
        """How long a collective takes at the links' published rates, without latency.

        Rings along every axis of the slice at once, each a part of the array; what is not closed to a ring has half
        the rate. Groups smaller than the machine are taken to lie along its slowest axis. Beyond one host, GPUs
        reduce inside the host first, and each sends its share through its own network card.

        Args:
            kind: one of `hlo.COLLECTIVES`.
            whole: bytes of the array that the group has together (for all-to-all and collective-permute: each device).
            group: devices that take part.
        """
        if group == 1:
            return 0.0
        if kind == "collective-permute":  # mostly to both neighbours at once
            return whole / self.chip.link / (2 if self.chip.ring else 1)
        rings = 2 if kind == "all-reduce" else 1
        if self.chip.platform == "cuda":
            inside = min(group, _HOST)
            hosts = max(1, group // _HOST)
            if kind == "all-to-all":
                outside = (hosts - 1) / hosts
                return whole * max((inside - 1) / group / self.chip.link, outside / self.chip.network)
            within = rings * whole * (inside - 1) / inside / self.chip.link
            return within + rings * whole / inside * (hosts - 1) / hosts / self.chip.network
        rates = [self.chip.link * (2 if length % self.chip.ring == 0 else 1) for length in self.shape if length > 1]
        if kind == "all-to-all":  # a quarter of what gathering the whole array takes, axis by axis
            return sum(whole * length / 4 / rate for length, rate in zip(_axes(self.shape, group), rates, strict=False))
        rate = sum(rates) if group == self.size else min(rates)
        return rings * whole * (group - 1) / group / rate


def _axes(shape: tuple[int, ...], group: int) -> list[int]:
    """How far a group of devices stretches along each axis that is longer than 1."""
    lengths = []
    for length in shape:
        if length > 1:
            lengths.append(min(length, group))
            group = max(1, group // length)
    return lengths


def machine(topology: str) -> Machine:
    """The machine that a name such as "v5e:4x4" or "h100:8" means. Raises InputError if it is not known."""
    name, _, shape = topology.lower().partition(":")
    sizes = tuple(int(size) for size in shape.split("x")) if re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) else ()
    if name not in CHIPS or not sizes:
        known = ", ".join(f"{chip}:{shapes[-3]}" for chip, shapes in SLICES.items())
        raise InputError(f"--topology {topology}: expected a chip and a shape, such as {known}")
    if shape not in SLICES[name]:
        raise InputError(f"--topology {topology}: expected {name} in one of the shapes {', '.join(SLICES[name])}")
    return Machine(CHIPS[name], sizes)


def machines(chip: Chip) -> list[Machine]:
    """All machines of a chip, from small to large."""
    return [machine(f"{chip.name}:{shape}") for shape in SLICES[chip.name]]
