"""How the tests compile: most of their time is compilation, so as little of it as can be. Imports no jax, which reads
the flags when it starts."""

import importlib.metadata

_FLAGS = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")  # half the time; later versions have no other emitters


def quick(devices: int = 1) -> str:
    """Of XLA_FLAGS, for so many virtual devices."""
    return " ".join([f"--xla_force_host_platform_device_count={devices}", *_FLAGS])
