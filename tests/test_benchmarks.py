"""The benchmarks: counts of operations against the published ones, programs on small models, two programs in turn."""

import ast
import json
import os
import sys
import time

import jax.numpy as jnp
import pytest
from conftest import ROOT

from synbrain_jax.models.brain_vae import BrainVAEConfig
from synbrain_jax.models.clip_vision import CLIPVisionConfig
from synbrain_jax.models.semantic_to_neural import MapperConfig

sys.path.insert(0, str(ROOT))
from benchmarks import cases, gpu, report, serving, side_by_side
from benchmarks.__main__ import PROGRAMS, run
from benchmarks.flops import brain_vae_flops, clip_flops, mapper_flops
from benchmarks.ours import Ours


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
    assert cases.relative_error(actual, expected) == pytest.approx(0.1)


def test_random_parameters_leave_none_at_its_start():
    shapes = cases.mapper_shapes(MapperConfig.small())
    params = cases.random_params(shapes, 3)
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


# --- side by side ---

FAKE = """
import os, sys, time
from benchmarks.serving import Stepper, serve

side, log, seconds = sys.argv[1], sys.argv[2], [float(value) for value in sys.argv[3:]]

class Fake(Stepper):
    steps = 0
    def hello(self):
        print("not a reply")
        return {"platform": "cpu", "device": "cpu", "versions": {"fake": side}}
    def build(self, case, batch, dtype, tiny, **rest):
        self.case = case
        return {"batch": batch or 3, "flops": 6e9, "first": 9.0} | ({"compile_seconds": 2.0} if side == "ours" else {})
    def step(self, times):
        self.steps += 1
        with open(log, "a") as file:
            print(side, file=file)
        if self.case == "vae_train" and side == "eager" and self.steps == 3:
            sys.exit("out of memory, said the other side")
        if self.case == "clip" and side == "eager" and self.steps == 3:
            os.kill(os.getpid(), 9)
        # Not timed: the first step, and the first of each turn.
        value = 100.0 if self.steps % 2 == 0 or self.steps == 1 else seconds[self.steps // 2 - 1]
        return {"seconds": value, "cpu_seconds": 2 * value}
    def finite(self):
        return side != "eager" or self.steps <= {"encode": 0, "mapper_train": 1}.get(self.case, 99)
    def product(self, size, dtype):
        return {"seconds": 2 * size**3 / {"ours": 20e9, "eager": 40e9, "compile": 30e9}[side]}
    def device_peak_bytes(self):
        return {"ours": 3 * 2**30, "eager": None, "compile": 2**29}[side]

serve(Fake())
"""
SECONDS = {"ours": [1.0, 2.0, 4.0], "eager": [3.0, 3.0, 3.0], "compile": [1.0, 4.0, 4.0]}


@pytest.fixture
def fakes(monkeypatch, tmp_path):
    """Sides that tell of every step in a file and say how long they took; returns the file and the processes."""
    program, log, started = tmp_path / "fake.py", tmp_path / "log", []
    program.write_text(FAKE)

    def start(side, python, threads):
        command = [sys.executable, os.fspath(program), side, os.fspath(log), *map(str, SECONDS[side])]
        started.append(serving.Worker(f"PyTorch ({side})", command, side_by_side.environment(threads), tmp_path))
        return started[-1]

    monkeypatch.setattr(side_by_side, "start", start)
    return log, started


def test_programs_step_in_turn_and_are_compared_turn_by_turn(fakes, tmp_path, capsys):
    log, started = fakes
    place = tmp_path / "found.json"
    assert run(["forward", "--modes", "eager", "compile", "--pairs", "3", "--json", str(place)]) == 0
    assert log.read_text().split() == [
        *("ours", "eager", "compile"),  # once without the clock, then three turns
        *("ours", "ours", "eager", "eager", "compile", "compile") * 3,
    ]
    found = json.loads(place.read_text())
    (row,) = found["rows"]
    assert row["ratios"]["eager"] == {
        "by_pair": [3.0, 1.5, 0.75],
        "median": 1.5,
        "min": 0.75,
        "max": 3.0,
        "of_minima": 3.0,
        "of_cpu_seconds": 1.5,
    }
    assert row["ratios"]["compile"]["by_pair"] == [1.0, 2.0, 1.0]
    printed = capsys.readouterr().out
    assert report.cpu_model() in printed
    assert "python -m benchmarks forward --modes eager compile --pairs 3 --json found.json" in printed
    lines = [line for line in printed.splitlines() if line.startswith("| forward")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    # 6 GFLOP in 2, 3 and 4 s, and products of up to 40 GFLOP/s; a first step of 9 s is 6 or 5 s longer than the others.
    assert cells[0][:9] == [
        "forward, eager", "3", "2.00 (1.00)", "3.00 (3.00)", "**1.50** (0.75 to 3.00)", "3.00", "1.50", "3 / 2", "8 / 5"
    ]  # fmt: skip
    assert cells[1][:7] == [
        "forward, compile", "3", "2.00 (1.00)", "4.00 (1.00)", "**1.00** (1.00 to 2.00)", "1.00", "1.00"
    ]  # fmt: skip
    assert [line[9] for line in cells] == ["2.0 / 6.0", "2.0 / 5.0"]
    assert cells[1][10] == "3.00 / 0.50"
    assert all(worker._process.returncode is not None for worker in started)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("vae_train", ["ended with code 1", "out of memory, said the other side"]),
        ("clip", ["ended with code -9"]),
        ("encode", ["what PyTorch (eager) computes is not finite"]),
        ("mapper_train", ["3 of 3", "what PyTorch (eager) computes is no longer finite"]),
    ],
)
def test_a_side_that_fails_is_an_error_and_not_a_hang(fakes, capsys, case, words):
    assert run([case, "forward", "--pairs", "3"]) == 1
    printed = capsys.readouterr()
    assert f"FAILED: {case}" in printed.out
    assert "| forward, eager" in printed.out  # the next case is measured all the same
    assert all(word in printed.err for word in words), printed.err
    assert all(worker._process.returncode is not None for worker in fakes[1])


def test_a_side_that_cannot_start_is_an_error(capsys):
    worker = serving.Worker("theirs", [sys.executable, "-c", "import no_such_module"], {}, ROOT)
    with pytest.raises(serving.WorkerDied, match=r"(?s)asked to hello.*no_such_module"):
        worker.ask("hello")
    worker.close()
    with pytest.raises(serving.WorkerDied, match="cannot be started"):
        serving.Worker("theirs", ["no-such-python"], {}, ROOT)


def test_processors_that_a_waiting_program_keeps_busy_are_told(fakes, monkeypatch, capsys):
    clock = iter(range(10**6))
    monkeypatch.setattr(serving.Worker, "cpu_seconds", lambda self: float(next(clock)))
    run(["forward", "--pairs", "3"])
    # A second between two readings; the other takes 3 s.
    assert "NOT IDLE: in forward, ours kept 0.33 processors busy" in capsys.readouterr().out


def test_a_process_tells_what_it_used():
    used = "import time, sys; x = bytearray(200 * 2**20); [None for _ in iter(lambda: time.process_time() < .3, False)]"
    worker = serving.Worker("one", [sys.executable, "-c", f"{used}; print(1, flush=True); input(); input()"], {}, ROOT)
    assert worker.ask("anything") == 1
    assert worker.peak_bytes() > 200 * 2**20
    assert 0.25 < worker.cpu_seconds() < 5
    worker.close()


def test_whole_programs_are_measured(monkeypatch, capsys):
    burn = "import time; x = bytearray(300 * 2**20); print('7 records/s')\nwhile time.process_time() < .4: pass"
    monkeypatch.setitem(side_by_side.PROGRAMS, "input_pipeline", (["-c", burn], []))
    monkeypatch.setitem(side_by_side.PROGRAMS, "haxby", (["-c", "raise SystemExit('no disk')"], []))
    assert side_by_side.main(["haxby", "input_pipeline"]) == 1
    printed = capsys.readouterr()
    (line,) = (line for line in printed.out.splitlines() if line.startswith("| input_pipeline"))
    seconds, used, peak = (float(cell) for cell in line.split("|")[2:5])
    assert 0.3 < used <= seconds + 0.1
    assert peak > 0.29
    assert "    7 records/s" in printed.out
    assert "FAILED: haxby: haxby ended with code 1" in printed.out
    assert "no disk" in printed.err


def test_the_processor_is_named(tmp_path):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nflags\t\t: fpu\nmodel name\t: Fast(R): 9000 CPU\n")
    assert report.cpu_model(tmp_path / "cpuinfo") == "Fast(R): 9000 CPU"
    assert report.cpu_model(tmp_path / "nothing")


def test_cores_are_those_that_are_asked_for(monkeypatch):
    before, seen = os.sched_getaffinity(0), []
    monkeypatch.setattr(side_by_side, "measure", lambda *args: seen.append(os.sched_getaffinity(0)) or {"case": "x"})
    side_by_side.main(["forward", "--threads", "1"])
    assert seen == [{min(before)}]
    assert os.sched_getaffinity(0) == before
    with pytest.raises(SystemExit):
        side_by_side.main(["forward", "--threads", "1000"])


def test_our_side_steps_a_training_case():
    ours = Ours()
    built = ours.build("mapper_train", None, "float32", tiny=True)
    assert built["batch"] == 2
    assert built["flops"] == 3 * 2 * mapper_flops(MapperConfig.small())
    started = time.perf_counter()
    seconds = ours.step(3)["seconds"]
    assert 0 < 3 * seconds <= time.perf_counter() - started
    assert int(ours.out[0].step) == 4  # the one of `build` among them
    assert ours.finite()
    ours.out = {"a": jnp.array([1.0, jnp.nan])}
    assert not ours.finite()
    assert ours.product(16, "float32")["seconds"] > 0


@pytest.mark.parametrize("case", ["encode", "mapper_train"])
def test_cases_compute_in_the_type_that_is_asked_for(case):
    texts = {}
    for dtype in ("bfloat16", "float32"):
        made = cases.CASES[case](cases.Sizes.tiny(), 2, 0, dtype)
        texts[dtype] = made.step.lower(*made.args).as_text()
    assert "bf16" in texts["bfloat16"]
    assert "bf16" not in texts["float32"]


def test_the_command_knows_its_cases_and_programs(capsys):
    assert list(cases.CASES) == side_by_side.CASES
    assert cases.CASES.keys() == cases.CPU_BATCHES.keys()
    assert {"gpu", "input_pipeline"} <= set(PROGRAMS)
    assert not {name for name in PROGRAMS if name.startswith("_")}
    with pytest.raises(SystemExit):
        run(["gpu", "--help"])
    assert "usage: python -m benchmarks gpu" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(["--help"])
    assert "gpu, input_pipeline" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("files", "forbidden"),
    [
        (["ours", "cases", "flops", "serving", "report", "side_by_side", "__main__"], {"torch"}),
        (["pytorch_side", "pytorch_cases", "pytorch_baseline", "serving"], {"jax", "flax", "synbrain_jax"}),
    ],
)
def test_neither_side_imports_the_other(files, forbidden):
    for name in files:
        nodes = list(ast.walk(ast.parse((ROOT / "benchmarks" / f"{name}.py").read_text())))
        imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        assert not {module.partition(".")[0] for module in imported} & forbidden
        assert {module.partition(".")[2] for module in imported if module.startswith("benchmarks.")} <= {*files}
