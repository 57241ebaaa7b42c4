"""What a training loop makes of SIGTERM and of damage: it goes on, and ends with the bits that it would have had."""

import dataclasses
import itertools
import json
import os
import shutil
import signal
import warnings

import jax
import numpy as np
import pytest
import tiny
from test_training import CONFIG, FALLING, MESH, assert_same_bits, toy

from synbrain_jax import training
from synbrain_jax.checkpoint import Checkpoints
from synbrain_jax.distributed import StopRequests, sigterm_stops
from synbrain_jax.errors import InputError, Stopped
from synbrain_jax.training import fit

STEPS = 12
SPARSE = dataclasses.replace(CONFIG, log_every=5)  # so that terms are neither logged nor validated when it stops


def sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder and result of a stage that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, fit(toy(FALLING), SPARSE, MESH, folder)


def fit_with_sigterm(at: int, stage, folder) -> None:
    """`fit`, which gets SIGTERM while step `at` of this call is under way."""
    real, count = training.shard_batch, itertools.count(1)

    def shard_batch(batch, mesh):
        if next(count) == at:
            sigterm()
        return real(batch, mesh)

    with pytest.MonkeyPatch.context() as patch, sigterm_stops():
        patch.setattr(training, "shard_batch", shard_batch)
        fit(stage, SPARSE, MESH, folder)


def steps_of(folder) -> list[int]:
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())


@pytest.mark.parametrize("at", [1, 3, 8])
def test_sigterm_saves_at_that_step_and_the_stage_ends_with_the_same_bits(whole, tmp_path, at):
    with pytest.raises(Stopped, match=rf"^stopped: stage1 is saved at step {at}, and the same command goes on$"):
        fit_with_sigterm(at, toy(FALLING), tmp_path)
    assert steps_of(tmp_path)[-1] == at
    assert not (tmp_path / "selected.json").exists()
    stage = toy(FALLING[at // 3 :])
    assert_same_bits(fit(stage, SPARSE, MESH, tmp_path), whole[1])
    assert tiny.log_of(tmp_path) == tiny.log_of(whole[0])
    assert (tmp_path / "selected.json").read_text() == (whole[0] / "selected.json").read_text()


def test_sigterm_at_every_step_changes_nothing(whole, tmp_path):
    """Also not what the rule for an early end sees: the mean over all steps since the last validation."""

    def watched(stage, seen):
        return dataclasses.replace(stage, stop=lambda terms: seen.append(terms))

    expected, seen = [], []
    fit(watched(toy(FALLING), expected), SPARSE, MESH, tmp_path / "uninterrupted")
    for step in range(1, STEPS + 1):
        with pytest.raises(Stopped, match=f"at step {step},"):
            fit_with_sigterm(1, watched(toy(FALLING[(step - 1) // 3 :]), seen), tmp_path / "stopped")
        assert len(steps_of(tmp_path / "stopped")) <= 3
    assert_same_bits(fit(toy([]), SPARSE, MESH, tmp_path / "stopped"), whole[1])
    assert len(expected) == 4
    assert seen == expected
    for name in ("metrics.jsonl", "selected.json"):
        assert (tmp_path / "stopped" / name).read_text() == (whole[0] / name).read_text()


@pytest.mark.parametrize(("select", "values", "best"), [("last", FALLING, 3), ("val/mse", [1.0, 2.0], 3)])
def test_a_step_that_was_saved_for_a_stop_is_no_result(tmp_path, select, values, best):
    with pytest.raises(Stopped):
        fit_with_sigterm(5, toy(values, select=select), tmp_path)
    with Checkpoints(tmp_path / "checkpoints", SPARSE, "max" if select == "last" else "min") as checkpoints:
        assert checkpoints.latest == 5
        assert checkpoints.selected()[0] == best


def test_sigterm_ends_a_program_at_once_outside_of_the_loop():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="the same command goes on"), sigterm_stops():
        sigterm()
    with sigterm_stops(), StopRequests(MESH) as requests:
        assert not requests.received()
        sigterm()
        assert requests.received()
    with sigterm_stops(), StopRequests(MESH) as requests:
        assert not requests.received()  # that was another run
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_loss_that_is_not_finite_is_not_saved_for_a_stop(tmp_path):
    with pytest.raises(training.NonFiniteLoss, match="at step 2 "):
        fit_with_sigterm(2, toy(FALLING, bad_element=8 + 3), tmp_path)
    assert steps_of(tmp_path) == []


def test_a_start_from_a_given_state_that_was_killed_before_it_was_saved_is_logged_once(tmp_path):
    def start(target):
        return jax.tree.map(lambda leaf: jax.device_put(np.ones(leaf.shape, leaf.dtype), leaf.sharding), target)

    def killed(*_):
        raise KeyboardInterrupt

    stage = dataclasses.replace(toy([5.0], steps=2), start=start)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            fit(stage, SPARSE, MESH, tmp_path)
    assert [line["step"] for line in tiny.log_of(tmp_path)] == [1]
    fit(dataclasses.replace(toy([5.0, 4.0], steps=2), start=start), SPARSE, MESH, tmp_path)
    assert [line["step"] for line in tiny.log_of(tmp_path) if "val/mse" in line] == [1, 2]


# ---- damage --------------------------------------------------------------------------------------


def cut_short(folder):
    """As a file system may leave files whose ends were not yet written when the power went."""
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("at", [7, 9])
def test_after_damage_the_stage_goes_on_from_the_checkpoint_before(whole, tmp_path, at):
    """Step 7 was saved for a stop; step 9 is validated, and the best so far."""
    with pytest.raises(Stopped):
        fit_with_sigterm(at, toy(FALLING), tmp_path)
    cut_short(tmp_path / "checkpoints" / str(at) / "state")
    with pytest.warns(UserWarning, match=f"damaged checkpoints are removed .step {at}: "):
        result = fit(toy(FALLING[2:]), SPARSE, MESH, tmp_path)  # from step 6
    assert_same_bits(result, whole[1])
    assert tiny.log_of(tmp_path) == tiny.log_of(whole[0])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_result_of_a_stage_that_has_ended_is_an_error(tmp_path):
    fit(toy([4.0, 1.0, 2.0, 3.0]), SPARSE, MESH, tmp_path)
    step = json.loads((tmp_path / "selected.json").read_text())["step"]
    cut_short(tmp_path / "checkpoints" / str(step) / "state")
    with pytest.raises(
        InputError, match=rf"checkpoints/{step}: this checkpoint cannot be read .* Delete {tmp_path} to"
    ):
        fit(toy([]), SPARSE, MESH, tmp_path)


@pytest.mark.parametrize("what", ["note", "."])
def test_a_stage_that_has_ended_gives_what_was_selected_or_nothing(tmp_path, what):
    """And not the best of what is left, though that can be read."""
    fit(toy([4.0, 1.0, 2.0, 3.0]), SPARSE, MESH, tmp_path)
    assert steps_of(tmp_path) == [6, 9, 12]
    shutil.rmtree(tmp_path / "checkpoints" / "6" / what)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a note cannot be read
        with pytest.raises(InputError, match="checkpoints/6: this checkpoint cannot be read"):
            fit(toy([]), SPARSE, MESH, tmp_path)


def test_terms_come_back_from_a_checkpoint_with_all_their_bits():
    values = np.random.default_rng(0).normal(size=20).astype(np.float32)
    stage = toy([])
    position = json.loads(
        json.dumps(training._position(stage, [{"loss": value} for value in values[:9]], [{"loss": values[9]}]))
    )
    logged, pending = training._go_on(stage, position)
    np.testing.assert_array_equal([term["loss"] for term in logged + pending], values[:10])
    assert {term["loss"].dtype for term in logged + pending} == {np.dtype(np.float32)}
