"""The GPU benchmark: its counts of operations against the published ones, and its program on small models."""

import json
import sys

import jax.numpy as jnp
import pytest
from conftest import ROOT

from synbrain_jax.models.brain_vae import BrainVAEConfig
from synbrain_jax.models.clip_vision import CLIPVisionConfig
from synbrain_jax.models.semantic_to_neural import MapperConfig

sys.path.insert(0, str(ROOT))
from benchmarks import gpu
from benchmarks.flops import brain_vae_flops, clip_flops, mapper_flops


def test_operations_of_brain_vae_are_those_that_pytorch_counts():
    encode, decode = brain_vae_flops(BrainVAEConfig.paper(), 15_724)
    assert encode / 1e9 == pytest.approx(157.60, abs=0.005)
    assert decode / 1e9 == pytest.approx(240.17, abs=0.005)
    mean_only, _ = brain_vae_flops(BrainVAEConfig.paper(), 15_724, logvar=False)
    assert (encode - mean_only) / 1e9 == pytest.approx(8.19, abs=0.005)


def test_operations_of_the_mapper_are_those_that_pytorch_counts():
    assert mapper_flops(MapperConfig.paper()) / 1e9 == pytest.approx(141.29, abs=0.01)


def test_operations_of_the_image_tower():
    assert clip_flops(CLIPVisionConfig.bigG_14()) / 1e12 == pytest.approx(0.97, abs=0.01)


def test_relative_error_is_over_all_leaves():
    expected = {"a": jnp.array([3.0]), "b": jnp.array([[4.0]])}
    actual = {"a": jnp.array([3.0]), "b": jnp.array([[4.5]])}
    assert gpu.relative_error(actual, expected) == pytest.approx(0.1)


def test_random_parameters_leave_none_at_its_start():
    shapes = gpu.mapper_shapes(MapperConfig.small())
    params = gpu.random_params(shapes, 3)
    assert float(jnp.abs(params["block_0"]["modulation"]["linear"]["kernel"]).min()) > 0
    assert float(params["final"]["kernel"].std()) == pytest.approx(32**-0.5, rel=0.1)


def test_a_small_run_checks_and_times_and_writes_json(tmp_path, capsys):
    code = gpu.main(
        ["encode", "mapper_train", "--tiny", "--against", "nothing", "--json", str(tmp_path / "found.json")]
    )
    printed = capsys.readouterr().out
    assert code == 0, printed
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["case"] for row in found["rows"]] == ["encode", "mapper_train"]
    for row in found["rows"]:
        assert 0 < row["error"] <= row["error_limit"]
        assert row["fastest"] <= row["seconds"] <= row["slowest"]
        assert row["tflops"] == pytest.approx(row["gflop_each"] * row["batch"] / row["seconds"] / 1e3)
    assert found["ceilings"]["matmul_tflops"] > 0


def test_a_wrong_result_is_told(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "measure", lambda *args, **kwargs: {**ROW, "error": float("nan")})
    assert gpu.main(["encode", "--tiny", "--against", "nothing"]) == 1
    assert "WRONG: encode is nan from float32" in capsys.readouterr().out


ROW = {
    "case": "encode",
    "batch": 2,
    "seconds": 1.0,
    "fastest": 1.0,
    "slowest": 1.0,
    "per_second": 2.0,
    "tflops": 1.0,
    "gflop_each": 500.0,
    "compile_seconds": 1.0,
    "gib": None,
    "error": 0.01,
    "error_limit": 0.05,
}


def test_pytorch_is_compared_at_the_same_batch():
    theirs = {"case": "encode", "batch": 2, "seconds": 1.5, "mode": "eager"}
    assert gpu.compare(theirs, [{**ROW, "batch": 4, "seconds": 9.0}, ROW]).endswith("1.50 x ours")
    assert theirs["ratio"] == 1.5
