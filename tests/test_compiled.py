"""What commands have compiled is found by their next start, and nobody else's setting is touched."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tiny

from synbrain_jax.checkpoint import Bundle, save_bundle
from synbrain_jax.variability import Spread

COUNTED = """
import json, sys
import jax
counts = {}
jax.monitoring.register_event_listener(lambda event, **_: counts.update({event: counts.get(event, 0) + 1}))
from synbrain_jax import cli
cli.main(sys.argv[1:])
folder = jax.config.jax_compilation_cache_dir
print(json.dumps({event.rpartition("/")[2]: count for event, count in counts.items()} | {"folder": folder}))
"""


@pytest.fixture(scope="module")
def arguments(tiny_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("system")
    config = tiny.config()
    bundle = Bundle.uncorrected(config, tiny.random_params(config), tiny_dataset.voxels, "tiny", None)
    n_voxels = len(bundle.offset)
    spread = Spread(np.ones((n_voxels, 2), np.float32), np.ones(n_voxels, np.float32))
    bundle = dataclasses.replace(bundle, spread=spread)
    save_bundle(folder / "bundle", bundle)
    np.save(folder / "tokens.npy", np.ones((3, tiny.TOKENS, tiny.WIDTH), np.float32))
    given = ["--model", folder / "bundle", "--tokens", folder / "tokens.npy", "--out", folder / "out.npy"]
    return ["synthesize", *map(str, given), "--variability", "calibrated"]


def counted(arguments, **environment) -> dict:
    env = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    command = [sys.executable, "-c", COUNTED, *arguments]
    done = subprocess.run(command, env={**env, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_second_start_compiles_nothing(arguments, tmp_path):
    first, second = (counted(arguments, JAX_PLATFORMS="cpu", XDG_CACHE_HOME=str(tmp_path)) for _ in range(2))
    assert first["folder"].startswith(str(tmp_path / "synbrain_jax"))
    assert first.get("cache_hits", 0) < first["compile_requests_use_cache"]
    assert second["cache_hits"] == second["compile_requests_use_cache"] == first["compile_requests_use_cache"]


@pytest.mark.slow  # two more starts of a program
def test_a_folder_of_the_users_own_is_used_instead_and_an_empty_name_means_none(arguments, tmp_path):
    own = counted(arguments, JAX_PLATFORMS="cpu", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own"))
    assert own["folder"] == str(tmp_path / "own")
    none = counted(arguments, JAX_PLATFORMS="cpu", JAX_COMPILATION_CACHE_DIR="", XDG_CACHE_HOME=str(tmp_path / "home"))
    assert none["folder"] == ""
    assert none.get("cache_hits", 0) == 0
    assert not (tmp_path / "home").exists()
