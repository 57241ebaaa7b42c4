"""PyTorch's side of `benchmarks/side_by_side.py`: started by it, never by hand. Needs torch and NumPy, and no jax."""

import platform
from typing import Any

import torch

from benchmarks.pytorch_cases import cases, compiler, settings
from benchmarks.serving import Stepper, serve


class PyTorch(Stepper):
    """Steps a case of `benchmarks/pytorch_cases.py`."""

    def hello(self) -> dict[str, Any]:
        return {"versions": {"torch": torch.__version__, "python": platform.python_version()}}

    def build(
        self, case: str, batch: int, dtype: str, tiny: bool, mode: str, fused: bool, threads: int
    ) -> dict[str, Any]:
        """Makes the case and takes its first step, in which torch.compile compiles."""
        torch.set_num_threads(threads)
        settings()
        self.run = cases(tiny, dtype, fused)[case](batch, compiler(mode))
        return {"first": self.step(1)["seconds"]}

    def wait(self, out):
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def finite(self) -> bool:
        """Whether the last step's result, or its loss, is."""
        return bool(torch.isfinite(self.out).all())

    def product(self, size: int, dtype: str) -> dict[str, float]:
        """A matrix product [size, size, size], the best of three."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
        self.timed(lambda: a @ b)
        return min((self.timed(lambda: a @ b) for _ in range(3)), key=lambda found: found["seconds"])

    def device_peak_bytes(self) -> int | None:
        """Of an accelerator's memory."""
        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


if __name__ == "__main__":
    serve(PyTorch())
