"""Test-wide settings: eight virtual CPU devices, strict ranks, and shapes checked on every public call."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_rank_promotion", "raise")
# Every jaxtyping annotation of the package is checked at run time, in the tests only.
install_import_hook("synbrain_jax", "beartype.beartype")
