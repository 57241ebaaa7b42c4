"""The step and the loop: against AdamW in NumPy, over meshes, killed and resumed."""

import dataclasses
import json

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from golden_set import relative_error

from synbrain_jax import training
from synbrain_jax.checkpoint import Checkpoints
from synbrain_jax.config import Config, OptimizerConfig, Stage1Config, Stage2Config
from synbrain_jax.errors import InputError, NonFiniteLoss
from synbrain_jax.losses import soft_clip
from synbrain_jax.sharding import make_mesh
from synbrain_jax.training import (
    Stage,
    check_batch_sizes,
    clip_by_global_norm,
    fit,
    init_state,
    learning_rate,
    make_optimizer,
    make_train_step,
)

# ---- learning rate, optimizer, average -----------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (dict(), lambda i: 0.3),
        (dict(schedule="cosine"), lambda i: 0.3 * 0.5 * (1 + np.cos(np.pi * i / 20))),
        (dict(warmup_steps=5), lambda i: 0.3 * min(i / 5, 1)),
        (
            dict(warmup_steps=5, schedule="cosine"),
            lambda i: 0.3 * i / 5 if i < 5 else 0.3 * 0.5 * (1 + np.cos(np.pi * (i - 5) / 15)),
        ),
        (dict(warmup_steps=40), lambda i: 0.3 * i / 40),
        (dict(warmup_steps=40, schedule="cosine"), lambda i: 0.3 * i / 40),
    ],
    ids=["constant", "cosine", "warmup", "warmup and cosine", "long warmup", "long warmup and cosine"],
)
def test_learning_rate_in_closed_form(settings, expected):
    rate = learning_rate(OptimizerConfig(learning_rate=0.3, **settings), steps=20)
    found = [float(rate(i)) for i in range(21)]
    np.testing.assert_allclose(found, [expected(i) for i in range(21)], rtol=1e-6, atol=1e-8)


def adamw(params, gradient, settings, steps, total):
    """Algorithm 2 of Loshchilov and Hutter (2019), in float64, on a flat vector; the gradient is clipped before."""
    m, v, path = np.zeros_like(params), np.zeros_like(params), []
    for i in range(steps):
        g = gradient(params, i)
        norm = np.sqrt(np.sum(g**2))
        if settings.clip_norm is not None and norm > settings.clip_norm:
            g = g * settings.clip_norm / norm
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        m_hat, v_hat = m / (1 - 0.9 ** (i + 1)), v / (1 - 0.999 ** (i + 1))
        rate = settings.learning_rate * (0.5 * (1 + np.cos(np.pi * i / total)) if settings.schedule == "cosine" else 1)
        params = params - rate * (m_hat / (np.sqrt(v_hat) + 1e-8) + settings.weight_decay * params)
        path.append(params)
    return np.array(path)


CURVATURE = np.array([0.5, 1.0, 2.0, 4.0, 8.0, 16.0], np.float32)


def toy_params(_=None):
    kernel = jnp.array([[1.0, -2.0], [0.5, 3.0]])
    return {"final": {"kernel": kernel, "bias": jnp.array([0.1, -0.4])}}


def flat(params) -> np.ndarray:
    return np.concatenate([np.ravel(params["final"][name]) for name in ("kernel", "bias")]).astype(np.float64)


def quadratic(params, frozen, batch, key):
    """0.5 sum curvature (p - target)^2: its gradient is known."""
    p = jnp.concatenate([params["final"]["kernel"].ravel(), params["final"]["bias"]])
    value = 0.5 * jnp.sum(CURVATURE * jnp.square(p - batch["target"]))
    return value, {"loss": value, "draw": jax.random.uniform(key)}


@pytest.mark.parametrize(
    "settings",
    [
        OptimizerConfig(learning_rate=0.1),
        OptimizerConfig(learning_rate=0.1, weight_decay=0.3),
        OptimizerConfig(learning_rate=0.1, weight_decay=0.3, clip_norm=4.0, schedule="cosine", ema_decay=0.8),
    ],
    ids=["plain", "decay", "everything"],
)
def test_steps_are_adamw_with_clipping_decay_and_average(settings):
    steps, total, seed = 8, 12, 5
    targets = np.random.default_rng(0).normal(size=(steps, 6)).astype(np.float32)
    optimizer = make_optimizer(settings, total)
    state = init_state(toy_params, optimizer, settings.ema_decay is not None, jax.random.key(0))
    step = jax.jit(make_train_step(quadratic, optimizer, settings.ema_decay))
    found, draws, losses, norms = [], [], [], []
    for i in range(steps):
        state, terms = step(state, {}, {"target": targets[i]}, jax.random.key(seed))
        found.append(flat(state.params))
        losses.append(terms["loss"])
        draws.append(terms["draw"])
        norms.append(terms["grad_norm"])
    expected = adamw(flat(toy_params()), lambda p, i: CURVATURE * (p - targets[i]), settings, steps, total)
    np.testing.assert_allclose(found, expected, atol=2e-6)  # optax's own Adam is 1e-5 off

    before = np.concatenate([[flat(toy_params())], expected[:-1]])
    gradients = CURVATURE * (before - targets)
    np.testing.assert_allclose(norms, np.linalg.norm(gradients, axis=1), rtol=1e-4)  # before clipping
    np.testing.assert_allclose(losses, (gradients**2 / CURVATURE).sum(1) / 2, rtol=1e-4)
    keys = [jax.random.fold_in(jax.random.key(seed), i) for i in range(steps)]
    np.testing.assert_array_equal(draws, [jax.random.uniform(key) for key in keys])
    assert int(state.step) == steps

    if settings.ema_decay is None:
        assert state.ema is None
        np.testing.assert_array_equal(flat(state.result), flat(state.params))
    else:
        d = settings.ema_decay
        weights = (1 - d) * d ** np.arange(steps - 1, -1, -1)
        average = d**steps * flat(toy_params()) + weights @ expected
        np.testing.assert_allclose(flat(state.result), average, atol=1e-5)


def test_clipping_bites_in_the_test_above():
    targets = np.random.default_rng(0).normal(size=(8, 6))
    assert np.linalg.norm(CURVATURE * (flat(toy_params()) - targets[0])) > 2 * 4.0


# ---- accumulation --------------------------------------------------------------------------------


def contrastive(params, frozen, batch, key):
    """Linear latents, contrasted with tokens in pairs that follow one another, and a random term."""
    latents = (batch["x"] @ params["kernel"]).reshape(-1, 2, 3)
    value = soft_clip(latents, batch["tokens"], 0.5, contrast_size=2)
    draw = jax.random.uniform(key)
    return value + frozen * draw * jnp.sum(params["kernel"]), {"loss": value, "draw": draw}


def contrastive_step(accumulate, frozen=0.0, group=2):
    """Gradient and terms of one step."""
    rng = np.random.default_rng(1)
    batch = {"x": rng.normal(size=(12, 4)), "tokens": rng.normal(size=(12, 2, 3))}
    batch = jax.tree.map(jnp.float32, batch)
    params = {"kernel": jnp.float32(rng.normal(size=(4, 6)))}
    optimizer = optax.trace(0.0)  # its state is the gradient
    step = make_train_step(contrastive, optimizer, None, accumulate=accumulate, group=group)
    state = init_state(lambda _: params, optimizer, False, jax.random.key(0))
    state, terms = jax.jit(step)(state, jnp.float32(frozen), batch, jax.random.key(5))
    return state.opt_state.trace["kernel"], terms


@pytest.mark.parametrize("accumulate", [2, 3, 6])
def test_parts_of_whole_groups_give_the_gradient_of_the_batch(accumulate):
    (gradient, terms), (expected, expected_terms) = contrastive_step(accumulate), contrastive_step(1)
    assert relative_error(gradient, expected) < 1e-6
    assert float(terms["loss"]) == pytest.approx(float(expected_terms["loss"]), rel=1e-6)
    cut, _ = contrastive_step(accumulate, group=1)  # other pairs
    assert relative_error(cut, expected) > 1e-2


def test_each_part_draws_its_own_random_numbers():
    key = jax.random.fold_in(jax.random.key(5), 0)
    draws = [float(jax.random.uniform(jax.random.fold_in(key, part))) for part in range(3)]
    gradient, terms = contrastive_step(3, frozen=1.0)
    assert float(terms["draw"]) == pytest.approx(np.mean(draws), rel=1e-6)
    np.testing.assert_allclose(gradient - contrastive_step(3)[0], np.mean(draws), atol=1e-6)


# ---- the loop, on a problem that compiles at once ------------------------------------------------


def regression(params, frozen, batch, key):
    """A noisy linear regression: the loss depends on batch, key and frozen parameters."""
    kernel, bias = params["final"]["kernel"], params["final"]["bias"]
    noise = jax.random.normal(key, batch["y"].shape)
    error = batch["x"] @ kernel + bias[None] - batch["y"] + 0.1 * noise
    loss = jnp.mean(jnp.square(error)) + frozen["shift"]
    return loss, {"loss": loss, "draw": jax.random.uniform(key)}


def toy_batches(bad_element=None):
    rng = np.random.default_rng(3)
    x = rng.normal(size=(400, 2)).astype(np.float32)
    y = (x @ [[1.0, 2.0], [-1.0, 0.5]]).astype(np.float32)
    if bad_element is not None:
        x[bad_element] = np.nan
    elements = grain.MapDataset.range(400).map(lambda i: {"x": x[i], "y": y[i]}).repeat()
    return iter(elements.batch(8).to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


class Validation:
    """Gives the numbers of a script and remembers what it was shown."""

    def __init__(self, values):
        self.values, self.shown = iter(values), []

    def __call__(self, params):
        self.shown.append(jax.tree.map(np.array, params))
        value = next(self.values)
        return {"mse": value, "loss": 0.0, "voxel_r": value}


def toy(values, steps=12, bad_element=None, loss=regression, ema_decay=0.9, **changes):
    optimizer = OptimizerConfig(learning_rate=0.05, schedule="cosine", clip_norm=1.0, ema_decay=ema_decay)
    kind = Stage2Config if changes.get("select") == "val/voxel_r" else Stage1Config
    settings = {"steps": steps, "batch_size": 8, "eval_every": 3, "select": "val/mse", "optimizer": optimizer}
    return Stage(
        name="stage1",
        config=kind(**{**settings, **changes}),
        init=toy_params,
        loss=loss,
        frozen={"shift": np.float32(0.25)},
        batches=toy_batches(bad_element),
        validate=Validation(values),
    )


CONFIG = Config(name="toy", seed=11, log_every=1)
MESH = make_mesh(2, 2, 2)
FALLING = [4.0, 3.0, 2.0, 1.0]


def assert_same_bits(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder and result of a stage that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, fit(toy(FALLING), CONFIG, MESH, folder)


def test_the_loop_is_the_step_over_the_batches(whole):
    """Against the plain step on one device, with keys and batches by hand."""
    folder, result = whole
    stage = toy([])
    optimizer = make_optimizer(stage.config.optimizer, 12)
    state = init_state(toy_params, optimizer, True, jax.random.key(11))
    step = jax.jit(make_train_step(regression, optimizer, 0.9))
    expected = []
    for _ in range(12):
        state, terms = step(state, stage.frozen, next(stage.batches), jax.random.key(11))
        expected.append(terms)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), result, state.ema)
    logged = [line for line in tiny.log_of(folder) if "train/loss" in line]
    for name in ("loss", "draw", "grad_norm"):
        np.testing.assert_allclose(
            [line[f"train/{name}"] for line in logged], [terms[name] for terms in expected], rtol=1e-5
        )


def test_logged_numbers_are_means_since_the_last_log(whole, tmp_path):
    fit(toy(FALLING), dataclasses.replace(CONFIG, log_every=5), MESH, tmp_path)
    every, coarse = (
        {line["step"]: line["train/loss"] for line in tiny.log_of(folder) if "train/loss" in line}
        for folder in (whole[0], tmp_path)
    )
    assert list(coarse) == [3, 5, 6, 9, 10, 12]
    for start, stop in ((0, 3), (3, 5), (5, 6), (6, 9), (9, 10), (10, 12)):
        mean = np.mean([every[step] for step in range(start + 1, stop + 1)])
        assert coarse[stop] == pytest.approx(mean, rel=1e-6)


def fit_until(after: int, stage: Stage, folder) -> None:
    """`fit`, which ends as a killed process does when step `after` + 1 asks for its batch."""
    real, count = training.shard_batch, iter(range(after))

    def until(batch, mesh):
        if next(count, None) is None:
            raise KeyboardInterrupt
        return real(batch, mesh)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "shard_batch", until)
        with pytest.raises(KeyboardInterrupt):
            fit(stage, CONFIG, MESH, folder)


@pytest.mark.parametrize("after", [2, 3, 8])
def test_an_interrupted_stage_ends_with_the_same_bits(whole, tmp_path, after):
    fit_until(after, toy(FALLING), tmp_path)
    stage = toy(FALLING[after // 3 :])
    assert_same_bits(fit(stage, CONFIG, MESH, tmp_path), whole[1])
    assert len(stage.validate.shown) == 4 - after // 3  # it did go on and not begin again
    assert tiny.log_of(tmp_path) == tiny.log_of(whole[0])

    finished = toy([])
    assert_same_bits(fit(finished, CONFIG, MESH, tmp_path), whole[1])  # read, not trained
    assert tiny.log_of(tmp_path) == tiny.log_of(whole[0])


def test_a_stage_goes_on_over_another_mesh(whole, tmp_path):
    fit_until(7, toy(FALLING), tmp_path)
    result = fit(toy(FALLING[2:]), CONFIG, make_mesh(devices=jax.devices()[:1]), tmp_path)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), result, whole[1])


@pytest.mark.parametrize(
    ("values", "select", "best", "ema_decay"),
    [
        ([3.0, 1.0, 2.0, 2.0], "val/mse", 1, 0.9),
        ([3.0, 1.0, 2.0, 2.0], "val/voxel_r", 0, None),
        ([np.nan, 2.0, 2.0, np.inf], "val/mse", 2, None),
        ([1.0, 2.0, 3.0, np.nan], "val/voxel_r", 2, 0.9),
    ],
)
def test_the_result_is_what_was_validated_best(tmp_path, values, select, best, ema_decay):
    stage = toy(values, select=select, ema_decay=ema_decay)
    result = fit(stage, CONFIG, MESH, tmp_path)
    assert_same_bits(result, stage.validate.shown[best])
    noted = json.loads((tmp_path / "selected.json").read_text())
    assert noted == {"step": 3 * (best + 1), "metric": select, "value": values[best]}


def test_the_last_checkpoint_may_be_the_result(tmp_path):
    stage = toy([1.0, 5.0, 2.0, 3.0], select="last")
    assert_same_bits(fit(stage, CONFIG, MESH, tmp_path), stage.validate.shown[3])
    assert json.loads((tmp_path / "selected.json").read_text()) == {"step": 12, "metric": "last", "value": 12.0}


def test_a_stage_may_stop_early_before_it_saves(tmp_path):
    """The rule sees the means since the last validation; a second start reads the result and trains nothing."""
    seen = []

    def stop(terms):
        seen.append(terms["loss"])
        return len(seen) == 3

    stage = dataclasses.replace(toy(FALLING, select="last"), stop=stop)
    result = fit(stage, CONFIG, MESH, tmp_path)
    assert_same_bits(result, stage.validate.shown[1])
    lines = tiny.log_of(tmp_path)
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    np.testing.assert_allclose(seen, np.reshape(losses, (3, 3)).mean(1), rtol=1e-6)
    assert json.loads((tmp_path / "selected.json").read_text())["step"] == 6

    again = toy([], select="last")
    assert_same_bits(fit(again, CONFIG, MESH, tmp_path), result)
    assert again.validate.shown == []
    assert tiny.log_of(tmp_path) == lines


def test_a_stage_that_stops_before_its_first_checkpoint_has_no_result(tmp_path):
    stage = dataclasses.replace(toy(FALLING, select="last"), stop=lambda terms: True)
    with pytest.raises(
        InputError, match="stage1: there is no checkpoint to take: it began at step 0 and ended at step 3"
    ):
        fit(stage, CONFIG, MESH, tmp_path)


@pytest.mark.parametrize(
    ("values", "patience", "best", "shown"),
    [
        ([3.0, 1.0, 2.0, 2.0, 0.5, 0.1], 2, 1, 4),
        ([3.0, 1.0, 2.0, 2.0, 0.5, 0.1], 3, 5, 6),
        ([1.0, 2.0, 1.0, 2.0, 2.0, 0.1], 2, 2, 5),  # as good as the best: it begins anew
        ([np.nan, 2.0, np.inf, 3.0, 4.0, 5.0], 1, 1, 3),
    ],
)
def test_a_stage_ends_when_validation_has_been_worse_too_often(tmp_path, values, patience, best, shown):
    stage = toy(values, steps=18, patience=patience)
    result = fit(stage, CONFIG, MESH, tmp_path)
    assert_same_bits(result, stage.validate.shown[best])
    assert len(stage.validate.shown) == shown
    assert max(line["step"] for line in tiny.log_of(tmp_path)) == 3 * shown


@pytest.mark.parametrize("after", [4, 9, 12])
def test_patience_outlives_an_interruption(tmp_path, after, monkeypatch):
    """Before the best, after it, and when it is over and only that has not been noted."""
    values = [3.0, 1.0, 2.0, 2.0, 0.5, 0.1]
    whole = fit(toy(values, steps=18, patience=2), CONFIG, MESH, tmp_path / "whole")
    if after < 12:
        fit_until(after, toy(values, steps=18, patience=2), tmp_path / "killed")
    else:
        with monkeypatch.context() as patch:
            patch.setattr(Checkpoints, "selected", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                fit(toy(values, steps=18, patience=2), CONFIG, MESH, tmp_path / "killed")
    stage = toy(values[after // 3 :], steps=18, patience=2)
    assert_same_bits(fit(stage, CONFIG, MESH, tmp_path / "killed"), whole)
    assert len(stage.validate.shown) == 4 - after // 3
    assert tiny.log_of(tmp_path / "killed") == tiny.log_of(tmp_path / "whole")


def test_a_start_that_nothing_betters_is_the_result(tmp_path):
    program = training.step_program(toy_params, regression, toy([]).config, MESH)
    stage = dataclasses.replace(toy([1.0, 2.0, 3.0], patience=2), start=lambda target: program.init(jax.random.key(11)))
    assert_same_bits(fit(stage, CONFIG, MESH, tmp_path), toy_params())
    assert [line["step"] for line in tiny.log_of(tmp_path) if "val/mse" in line] == [0, 3, 6]


def test_the_fixed_position_table_does_not_decay():
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1, weight_decay=0.5), 4)
    params = {"pos_embed": jnp.ones((2, 2)), "final": {"kernel": jnp.ones((2, 2))}}
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_array_equal(updates["pos_embed"], np.zeros((2, 2)))
    np.testing.assert_allclose(updates["final"]["kernel"], np.full((2, 2), -0.05), rtol=1e-6)


@pytest.mark.parametrize("norm", [0.5, 1.0, 1.0000005, 3.0])
def test_clipping_divides_by_the_norm_plus_1e_6(norm):
    """PyTorch's documented rule: min(1, limit / (norm + 1e-6))."""
    grads = {"a": jnp.full((4,), norm / 2)}
    clipped, _ = clip_by_global_norm(1.0).update(grads, ())
    expected = norm / 2 * min(1.0, 1.0 / (norm + 1e-6))
    np.testing.assert_allclose(clipped["a"], np.full(4, expected), rtol=1.5e-7)


def test_the_last_step_is_validated_too(tmp_path):
    stage = toy([2.0, 1.0, 3.0], steps=7)
    fit(stage, CONFIG, MESH, tmp_path)
    assert [line["step"] for line in tiny.log_of(tmp_path) if "val/mse" in line] == [3, 6, 7]


@pytest.mark.parametrize(("step", "log_every"), [(1, 1), (1, 4), (5, 4), (8, 4), (8, 20)])
def test_a_loss_that_is_not_finite_stops_at_its_step(tmp_path, step, log_every):
    stage = toy(FALLING, bad_element=8 * (step - 1) + 3)
    config = dataclasses.replace(CONFIG, log_every=log_every)
    with pytest.raises(NonFiniteLoss, match=rf"^stage1: the loss is not finite at step {step} \(.*loss nan") as error:
        fit(stage, config, MESH, tmp_path)
    assert "stage1.optimizer.learning_rate" in str(error.value)
    with Checkpoints(tmp_path / "checkpoints", config, "min") as checkpoints:
        assert (checkpoints.latest or 0) == (step - 1) // 3 * 3
    assert len(stage.validate.shown) == (step - 1) // 3


def test_a_part_of_the_loss_that_is_not_finite_stops_too(tmp_path):
    """Of adaptation's, what is logged as the loss is not all of it."""
    stage = toy(FALLING)

    def loss(*given):
        total, terms = stage.loss(*given)
        return total, {**terms, "readout": jnp.inf * jnp.ones_like(total)}

    with pytest.raises(NonFiniteLoss, match=r"^stage1: the loss is not finite at step 1 \(.*readout inf"):
        fit(dataclasses.replace(stage, loss=loss), CONFIG, MESH, tmp_path)


def test_a_number_that_validation_does_not_give_is_named(tmp_path):
    stage = toy(FALLING, select="val/kl")
    with pytest.raises(
        InputError, match=r"^stage1\.select is 'val/kl'; expected one of val/mse, val/loss, val/voxel_r$"
    ):
        fit(stage, CONFIG, MESH, tmp_path)


def test_the_loss_is_traced_once_and_the_old_state_is_given_away(tmp_path, monkeypatch):
    traces, seen = [], []

    def counted(params, frozen, batch, key):
        traces.append(1)
        return regression(params, frozen, batch, key)

    def look(params):  # without a copy, which would hold on to the memory
        seen.append(params)
        return {"mse": 0.0}

    save = Checkpoints.save
    # So would a checkpoint that is being written.
    monkeypatch.setattr(Checkpoints, "save", lambda self, step, *rest: save(self, step, *rest) if step == 12 else None)
    stage = dataclasses.replace(toy([], loss=counted, ema_decay=None), validate=look)
    fit(stage, CONFIG, MESH, tmp_path)
    assert len(traces) == 1
    deleted = [[leaf.is_deleted() for leaf in jax.tree.leaves(params)] for params in seen]
    assert deleted == [[True, True]] * 3 + [[False, False]]  # the next step took their memory


def test_the_first_parameters_depend_on_the_seed_and_not_on_the_mesh(tmp_path):
    def init(key):
        return {"final": {"kernel": jax.random.normal(key, (8, 4)), "bias": jnp.zeros(4)}}

    def loss(params, frozen, batch, key):
        value = 0.0 * params["final"]["kernel"].sum()
        return value, {"loss": value}

    expected = jax.random.normal(jax.random.key(11), (8, 4))
    found = []
    for name in tiny.MESHES:
        stage = dataclasses.replace(toy([1.0], steps=1, ema_decay=None, loss=loss), init=init)
        found.append(fit(stage, CONFIG, tiny.mesh_of(name), tmp_path / name)["final"]["kernel"])
        np.testing.assert_array_equal(found[0], found[-1])
    np.testing.assert_allclose(found[0], expected, rtol=1e-6)


def test_frozen_parameters_and_initial_ones_are_not_given_away(tmp_path):
    frozen, initial = {"shift": jnp.float32(0.25)}, toy_params()
    stage = dataclasses.replace(toy(FALLING), frozen=frozen, init=lambda key: initial)
    fit(stage, CONFIG, make_mesh(devices=jax.devices()[:1]), tmp_path)
    assert float(frozen["shift"]) == 0.25
    np.testing.assert_array_equal(flat(initial), flat(toy_params()))


def test_a_batch_that_the_mesh_cannot_split_is_named():
    for name, sizes in (("stage1", (6, 8)), ("stage2", (8, 6))):
        config = Config(name="x", stage1=Stage1Config(batch_size=sizes[0]), stage2=Stage2Config(batch_size=sizes[1]))
        with pytest.raises(InputError, match=rf"^{name}\.batch_size is 6; it must be a multiple of 4"):
            check_batch_sizes(config, MESH)
        check_batch_sizes(config, make_mesh(1, 2, 4))
        config = Config(name="x", **{name: dataclasses.replace(getattr(config, name), batch_size=12, accumulate=2)})
        expected = rf"^{name}\.batch_size is 12; .* multiple of 4, .* times {name}\.accumulate = 2$"
        with pytest.raises(InputError, match=expected):
            check_batch_sizes(config, MESH)
        check_batch_sizes(config, make_mesh(1, 2, 4))
