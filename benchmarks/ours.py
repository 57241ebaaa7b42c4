"""This package's side of `benchmarks/side_by_side.py`: started by it, never by hand."""

import platform
import time
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.cases import CASES, Sizes, normal
from benchmarks.serving import Stepper, serve


class Ours(Stepper):
    """Steps a case of `benchmarks/cases.py`."""

    def hello(self) -> dict[str, Any]:
        device = jax.devices()[0]
        versions = {"jax": jax.__version__, "python": platform.python_version()}
        return {"platform": device.platform, "device": device.device_kind, "versions": versions}

    def build(self, case: str, batch: int | None, dtype: str, tiny: bool) -> dict[str, Any]:
        """Makes and compiles the case and takes its first step; without `batch`, that of the case on this device."""
        sizes = Sizes.tiny() if tiny else Sizes.full(jax.default_backend())
        batch = batch or sizes.batches[case]
        made = CASES[case](sizes, batch, 0, dtype)
        self._args = made.args
        started = time.perf_counter()
        compiled = made.step.lower(*self._args).compile()
        seconds = time.perf_counter() - started

        def run():
            out = compiled(*self._args)
            if made.trains:
                self._args = (out[0], *self._args[1:])  # the old state was donated
            return out

        self.run = run
        return {"batch": batch, "flops": made.flops, "compile_seconds": seconds, "first": self.step(1)["seconds"]}

    def wait(self, out):
        jax.block_until_ready(out)

    def finite(self) -> bool:
        """Whether all that the last step computed is."""
        floats = (leaf for leaf in jax.tree.leaves(self.out) if jnp.issubdtype(leaf.dtype, jnp.floating))
        return all(bool(jnp.isfinite(leaf).all()) for leaf in floats)

    def product(self, size: int, dtype: str) -> dict[str, float]:
        """A matrix product [size, size, size], the best of three."""
        a, b = (normal(seed, size, size).astype(dtype) for seed in (0, 1))
        matmul = jax.jit(jnp.matmul)
        self.timed(lambda: matmul(a, b))
        return min((self.timed(lambda: matmul(a, b)) for _ in range(3)), key=lambda found: found["seconds"])

    def device_peak_bytes(self) -> int | None:
        """Of an accelerator's memory."""
        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


if __name__ == "__main__":
    serve(Ours())
