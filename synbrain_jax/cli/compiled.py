"""Programs that XLA has compiled are kept on the disk, so that a command's second start compiles nothing."""

import hashlib
import os
import platform
from pathlib import Path

import jax

_VARIABLE = "JAX_COMPILATION_CACHE_DIR"
_MOST_BYTES = 4 * 2**30


def keep_compiled() -> None:
    """Turns on JAX's persistent compilation cache, in the user's cache folder.

    Where the variable JAX_COMPILATION_CACHE_DIR is set, JAX follows it alone; set and empty, nothing is kept. There is
    a folder for each kind of processor, because a program for one may not run on another that shares the disk.
    """
    if _VARIABLE in os.environ:
        return
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", os.fspath(root / "synbrain_jax" / _processor()))
    jax.config.update("jax_compilation_cache_max_size", _MOST_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def _processor() -> str:
    """A name for this kind of processor."""
    told = platform.processor() or platform.machine()
    features = Path("/proc/cpuinfo")
    if features.exists():
        own = (
            line for line in features.read_text().splitlines() if line.startswith(("model name", "flags", "Features"))
        )
        told += "".join(sorted(set(own)))
    return hashlib.sha256(told.encode()).hexdigest()[:12]
