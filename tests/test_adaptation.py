"""Adaptation to another brain: what is tuned and what is not, from which values, on which data, until when."""

import dataclasses
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict
from golden_set import relative_error

from synbrain_jax import adaptation, stages, training
from synbrain_jax.checkpoint import Bundle, load_bundle, save_bundle
from synbrain_jax.cli import main
from synbrain_jax.config import AdaptationConfig, OptimizerConfig, Stage1Config, Stage2Config
from synbrain_jax.data.arrays import prepare_arrays
from synbrain_jax.data.pairs import load_trials
from synbrain_jax.errors import InputError
from synbrain_jax.sharding import make_mesh
from synbrain_jax.synthesis import SynBrain, load_pretrained, model_order
from synbrain_jax.training import step_program

OPTIMIZER = OptimizerConfig(learning_rate=4e-3, ema_decay=0.5)
CONFIG = tiny.config(
    seed=7,
    stage1=Stage1Config(steps=4, batch_size=8, eval_every=2, optimizer=OPTIMIZER, select="last", stop_below=1e3),
    stage2=Stage2Config(steps=4, batch_size=8, eval_every=2, optimizer=OPTIMIZER, voxel_weight=1.0),
)
PARAMS = tiny.random_params(CONFIG)
ONE = make_mesh(devices=jax.devices()[:1])
PARTS = ("mlp", "attn", "all", "lora")
BLOCK = {
    "mlp": {("block_0", "mlp", name, kind) for name in ("fc1", "fc2") for kind in ("kernel", "bias")},
    "attn": {("block_0", "attn", name, kind) for name in ("qkv", "proj") for kind in ("kernel", "bias")},
}


@pytest.fixture(scope="module")
def source(tiny_dataset) -> Bundle:
    return Bundle.uncorrected(CONFIG, PARAMS, tiny_dataset.voxels, tiny_dataset.name, None)


@pytest.fixture(scope="module")
def new(two_subjects):
    """The data set of another brain."""
    return two_subjects[1]


# ---- few data ------------------------------------------------------------------------------------


def test_the_validation_share_is_stimuli_with_all_their_trials(tiny_dataset):
    before = load_trials(tiny_dataset, "train")
    shared = tiny_dataset.with_validation_share(0.4, seed=3)
    train, validation = (load_trials(shared, split) for split in ("train", "validation"))
    assert (len(train.stimulus_id), len(validation.stimulus_id)) == (5, 4)  # of 9
    assert sorted(train.stimulus_id + validation.stimulus_id) == sorted(before.stimulus_id)
    for part in (train, validation):
        for place, name in enumerate(part.stimulus_id):
            old = before.stimulus_id.index(name)
            np.testing.assert_array_equal(part.fmri[part.stimulus == place], before.fmri[before.stimulus == old])
            np.testing.assert_array_equal(part.tokens[place], before.tokens[old])
    assert shared.stimulus_ids("test") == tiny_dataset.stimulus_ids("test")
    others = {tiny_dataset.with_validation_share(0.4, seed).stimulus_ids("validation") for seed in range(4)}
    assert len(others) > 1
    assert len(tiny_dataset.with_validation_share(1e-3, 0).stimulus_ids("validation")) == 2


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 0.9])
def test_a_share_that_leaves_too_little_is_refused(tiny_dataset, share):
    with pytest.raises(InputError, match=rf"^validation_share is {share} of the 9 training stimuli of .* at least 2"):
        tiny_dataset.with_validation_share(share, 0)


# ---- what is tuned -------------------------------------------------------------------------------


def expected_paths(part: str) -> set[tuple[str, ...]]:
    """Of the mapper's parameters, those that a part changes."""
    if part == "all":
        return set(flatten_dict(PARAMS["mapper"]))
    if part == "lora":
        return {path for path in BLOCK["mlp"] | BLOCK["attn"] if path[-1] == "kernel"}
    return BLOCK[part]


@pytest.mark.parametrize("part", PARTS)
def test_a_part_and_the_rest_are_the_mapper(part):
    split = adaptation.tuned_part(PARAMS["mapper"], AdaptationConfig(part=part, lora_rank=2))
    jax.tree.map(np.testing.assert_array_equal, adaptation._join(split.frozen, split.tuned), PARAMS["mapper"])
    if part != "lora":
        assert set(flatten_dict(split.tuned)) == expected_paths(part)
        assert not set(flatten_dict(split.tuned)) & set(flatten_dict(split.frozen))


def test_low_rank_changes_are_added_to_the_kernels():
    split = adaptation.tuned_part(PARAMS["mapper"], AdaptationConfig(part="lora", lora_rank=2))
    rng = np.random.default_rng(0)
    factors = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), split.tuned)
    joined, flat = flatten_dict(adaptation._join(split.frozen, factors)), flatten_dict(factors)
    for path, before in flatten_dict(PARAMS["mapper"]).items():
        expected = before.astype(np.float64)
        if path in expected_paths("lora"):
            a, b = (flat[*path[:-1], name] for name in ("lora_a", "lora_b"))
            assert (a.shape, b.shape) == ((before.shape[0], 2), (2, before.shape[1]))
            expected = expected + a.astype(np.float64) @ b
        np.testing.assert_allclose(joined[path], expected, rtol=1e-5, atol=1e-5)
    drawn = np.concatenate([np.ravel(leaf) for path, leaf in flatten_dict(split.tuned).items() if path[-1] == "lora_a"])
    assert 0.2 < np.std(drawn) < 0.5  # 8 to 32 inputs: 1 / sqrt(8) to 1 / sqrt(32)
    with pytest.raises(InputError, match=r"lora_rank is 8; expected less than 8, the rank of block_0/attn/proj|qkv"):
        adaptation.tuned_part(PARAMS["mapper"], AdaptationConfig(part="lora", lora_rank=8))


@pytest.fixture(scope="module")
def whole_stage(new):
    """The stage of the whole mapper."""
    dataset = new.with_validation_share(0.4, 0)
    vae = jax.tree.map(jnp.asarray, PARAMS["brain_vae"])
    targets = np.zeros((len(dataset.stimulus_ids("train")), tiny.TOKENS, tiny.WIDTH), np.float32)
    return stages.stage2(CONFIG, [dataset], [load_trials(dataset, "validation")], vae, [targets])


@pytest.mark.parametrize("part", ["attn", "lora"])
def test_the_optimizer_holds_the_part_alone_and_the_loss_is_the_whole_mappers(part, whole_stage):
    whole, split = whole_stage, adaptation.tuned_part(PARAMS["mapper"], AdaptationConfig(part=part, lora_rank=2))
    stage = adaptation._only(split, whole, ONE)

    state = step_program(stage.init, stage.loss, stage.config, ONE).target
    count = sum(leaf.size for leaf in jax.tree.leaves(split.tuned))
    for tree in (state.params, state.ema, state.opt_state[1].mu, state.opt_state[1].nu):
        assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == count
    if part == "lora":
        kernels = flatten_dict(PARAMS["mapper"])
        assert count == 2 * sum(sum(kernels[path].shape) for path in expected_paths("lora"))
    batch = next(whole.batches)
    other = jax.tree.map(lambda leaf: leaf + np.float32(0.1), split.tuned)
    joined = adaptation._join(split.frozen, other)
    found, _ = jax.jit(stage.loss)(other, stage.frozen, batch, None)
    expected, _ = jax.jit(whole.loss)(joined, whole.frozen, batch, None)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    assert stage.validate(other) == pytest.approx(whole.validate(joined), rel=1e-5)


@pytest.mark.parametrize("loss_scale", ["voxel", "sum"])
def test_what_brain_vae_reads_out_of_the_sources_latents_is_in_its_loss(new, loss_scale):
    config = dataclasses.replace(CONFIG, stage1=dataclasses.replace(CONFIG.stage1, loss_scale=loss_scale))
    trials = load_trials(new, "train")
    plain = stages.stage1(config, [new], [trials])
    stage = adaptation.with_readout(plain, config, PARAMS["mapper"], 3.0, ONE, new, trials)
    fmri, tokens = trials.fmri[:6], trials.tokens[trials.stimulus[:6]]
    changed = jax.tree.map(lambda leaf: leaf * 1.1, PARAMS["brain_vae"])  # the source's mapper, not its BrainVAE
    order = model_order(config.data.voxel_order, new.voxels.order)
    batch = {"fmri": fmri[:, order], "tokens": tokens}

    total, terms = jax.jit(stage.loss)(changed, stage.frozen, batch, None)
    before, others = jax.jit(plain.loss)(changed, {}, batch, None)
    decoded = SynBrain(Bundle.uncorrected(config, {**PARAMS, "brain_vae": changed}, new.voxels, new.name, None))
    error = np.square(decoded.predict(tokens).astype(np.float64) - fmri).mean()
    assert float(terms["readout"]) == pytest.approx(error, rel=1e-4)
    scale = {"voxel": 1, "sum": fmri.shape[1]}[loss_scale]
    assert float(total) == pytest.approx(float(before) + 3 * scale * error, rel=1e-4)
    assert float(others["loss"]) == float(before)
    logged = {name: float(value) for name, value in terms.items() if name != "readout"}
    assert logged == pytest.approx({name: float(value) for name, value in others.items()}, rel=1e-4)

    rows = np.linspace(0, len(trials.fmri) - 1, len(trials.fmri) // 8 * 8).round().astype(int)  # full batches of 8
    held_out = decoded.predict(trials.tokens)[trials.stimulus[rows]].astype(np.float64) - trials.fmri[rows]
    expected = plain.validate(changed) | {"readout": np.square(held_out).mean()}
    assert stage.validate(changed) == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow  # three training steps to compile
def test_the_readout_is_the_same_in_parts_of_a_batch_and_nearly_in_bfloat16(new):
    trials = load_trials(new, "train")
    rows = np.arange(8)
    order = model_order(CONFIG.data.voxel_order, new.voxels.order)
    batch = {"fmri": trials.fmri[rows][:, order], "tokens": trials.tokens[trials.stimulus[rows]]}
    found = {}
    for name, accumulate, dtype in (("whole", 1, "float32"), ("parts", 2, "float32"), ("half", 1, "bfloat16")):
        stage1 = dataclasses.replace(CONFIG.stage1, accumulate=accumulate, contrast_size=4)
        vae, mapper = (dataclasses.replace(model, dtype=dtype) for model in (CONFIG.brain_vae, CONFIG.mapper))
        config = dataclasses.replace(CONFIG, stage1=stage1, brain_vae=vae, mapper=mapper)
        plain = stages.stage1(config, [new], [trials])
        stage = adaptation.with_readout(plain, config, PARAMS["mapper"], 3.0, ONE, new, trials)
        program = step_program(stage.init, stage.loss, stage.config, ONE)
        state = adaptation._start_at(PARAMS["brain_vae"], stage1)(program.target)
        _, terms = program.step(state, stage.frozen, batch, jax.random.key(0))
        found[name] = float(terms["readout"])
    assert found["parts"] == pytest.approx(found["whole"], rel=1e-5)
    assert found["half"] == pytest.approx(found["whole"], rel=0.03)
    assert found["half"] != found["whole"]


# ---- the run -------------------------------------------------------------------------------------

SETTINGS = AdaptationConfig(stimuli=5, validation_share=0.4, brain_vae_rate=2.0, seed=3, part="lora", lora_rank=2)


@pytest.fixture(scope="module")
def adapted(source, new, tmp_path_factory):
    """The workdir and the system."""
    workdir = tmp_path_factory.mktemp("adapted") / "run"
    return workdir, adaptation.adapt(source, new.path, workdir, SETTINGS, ONE)


def test_all_of_brain_vae_changes_and_of_the_mapper_the_part(adapted):
    found = {path: np.asarray(leaf) for path, leaf in flatten_dict(adapted[1].bundle.params).items()}
    before = flatten_dict(PARAMS)
    changed = {path for path, leaf in found.items() if not np.array_equal(leaf, before[path])}
    mapper = {("mapper", *path) for path in expected_paths("lora")}
    assert changed == mapper | {path for path in before if path[0] == "brain_vae"}


def test_the_result_is_a_system_of_the_new_brain(adapted, new):
    workdir, system = adapted
    bundle = load_bundle(workdir / "bundle")
    np.testing.assert_array_equal(bundle.voxels.order, new.voxels.order)
    assert bundle.dataset == new.name
    config = bundle.config
    assert (config.data.builder, config.data.source, config.data.stimuli) == ("prepared", os.fspath(new.path), 5)
    assert (config.seed, config.stage1.patience, config.stage1.select) == (3, 3, "val/loss")
    assert config.stage1.stop_below is config.stage1.start_from is config.stage2.start_from is None
    rates = (config.stage1.optimizer.learning_rate, config.stage2.optimizer.learning_rate)
    assert rates == pytest.approx((8e-3, 4e-3))
    trials = load_trials(new.limited(stimuli=5).with_validation_share(0.4, 3), "train")
    predicted = system.predict(trials.tokens)[trials.stimulus]
    np.testing.assert_allclose(predicted.mean(0), trials.fmri.mean(0), atol=1e-5)  # what the offset is for


def test_training_begins_where_the_source_ended_on_the_new_brains_validation(adapted, new):
    trials = load_trials(new.limited(stimuli=5).with_validation_share(0.4, 3), "validation")
    stage = stages.stage1(adapted[1].bundle.config, [new], [trials])
    first = next(line for line in tiny.log_of(adapted[0] / "stage1") if "val/loss" in line)
    assert first["step"] == 0
    expected = stage.validate(PARAMS["brain_vae"])
    assert {name: first[f"val/{name}"] for name in expected} == pytest.approx(expected, rel=1e-5)
    last = [line["val/loss"] for line in tiny.log_of(adapted[0] / "stage1") if "val/loss" in line][-1]
    assert last < first["val/loss"]
    for name in ("train/readout", "val/readout"):
        readouts = [line[name] for line in tiny.log_of(adapted[0] / "stage1") if name in line]
        assert readouts[-1] < readouts[0]


@pytest.mark.slow  # test_faults stops stages and goes on
def test_a_killed_adaptation_ends_with_the_same_bits(adapted, source, new, tmp_path, monkeypatch):
    workdir, expected = adapted
    real, count = training.shard_batch, iter(range(7))  # 4 of the first stage

    def until(batch, mesh):
        if next(count, None) is None:
            raise KeyboardInterrupt
        return real(batch, mesh)

    monkeypatch.setattr(training, "shard_batch", until)
    with pytest.raises(KeyboardInterrupt):
        adaptation.adapt(source, new.path, tmp_path / "run", SETTINGS, ONE)
    monkeypatch.setattr(training, "shard_batch", real)
    assert (tmp_path / "run" / "stage2" / "checkpoints" / "2").exists()
    assert not (tmp_path / "run" / "stage2" / "selected.json").exists()
    found = adaptation.adapt(source, new.path, tmp_path / "run", SETTINGS, ONE).bundle
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.bundle.params)
    np.testing.assert_array_equal(found.offset, expected.bundle.offset)
    for stage in ("stage1", "stage2"):
        assert tiny.log_of(tmp_path / "run" / stage) == tiny.log_of(workdir / stage)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (dict(lora_rank=3), "lora_rank: 2 here, 3 given"),
        (dict(part="mlp"), "part: 'lora' here, 'mlp' given"),
        (dict(readout_weight=0.0), "readout_weight: 4.0 here, 0.0 given"),
        (dict(mapper_rate=0.5), "stage2.optimizer.learning_rate: 0.004 here, 0.002 there"),
        (dict(stimuli=4), "data.stimuli: 5 here, 4 there"),
    ],
)
def test_a_folder_belongs_to_one_adaptation(adapted, source, new, change, told):
    with pytest.raises(InputError, match="belongs to another") as error:
        adaptation.adapt(source, new.path, adapted[0], dataclasses.replace(SETTINGS, **change), ONE)
    assert told in str(error.value)


def test_a_folder_belongs_to_one_source(adapted, source, new):
    params = jax.tree.map(np.copy, PARAMS)
    params["mapper"]["final"]["bias"][0] += 1e-3
    with pytest.raises(InputError, match=r"belongs to another adaptation \(source: \d+ here, \d+ given\)"):
        adaptation.adapt(dataclasses.replace(source, params=params), new.path, adapted[0], SETTINGS, ONE)


def test_another_encoder_is_named_and_nothing_is_left_behind(source, tmp_path):
    tiny.write_experiment(tmp_path / "other.npz", token_count=3)
    data = prepare_arrays(tmp_path / "other.npz", tmp_path / "data", name="other")
    with pytest.raises(InputError, match=r"tokens are \[3, 8\], but the system to adapt takes \[4, 8\]"):
        adaptation.adapt(source, data, tmp_path / "run", AdaptationConfig(), ONE)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("field", ["lora_rank", "brain_vae_steps", "mapper_steps", "eval_every", "patience"])
def test_settings_out_of_range_are_named(field):
    with pytest.raises(InputError, match=rf"^{field} is 0; expected at least 1$"):
        AdaptationConfig(**{field: 0})


@pytest.mark.parametrize("field", ["brain_vae_rate", "mapper_rate"])
def test_a_learning_rate_is_above_0(field):
    with pytest.raises(InputError, match=rf"^{field} is 0.0; expected above 0$"):
        AdaptationConfig(**{field: 0.0})


def test_a_weight_is_not_negative():
    with pytest.raises(InputError, match=r"^readout_weight is -1.0; expected at least 0$"):
        AdaptationConfig(readout_weight=-1.0)


@pytest.mark.slow  # everything compiled again for eight devices
def test_the_command_leaves_what_train_leaves_on_any_mesh(adapted, source, new, tmp_path: Path, capsys):
    """On 8 devices, a system that predicts what one device's does."""
    save_bundle(tmp_path / "source", source)
    folders = [os.fspath(folder) for folder in (tmp_path / "source", new.path, tmp_path / "run")]
    settings = ["--stimuli=5", "--validation-share=.4", "--brain-vae-rate=2", "--seed=3", "--part=lora"]
    mesh = ["--lora-rank=2", "--mesh.data=2", "--mesh.fsdp=2", "--mesh.tensor=2"]
    main(["adapt", "--from", folders[0], "--data", folders[1], "--workdir", folders[2], *settings, *mesh])
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (report["subject"], report["n_voxels"]) == ("second", 35)
    assert f"{report['scores']['model']['mse']:.3f}" in capsys.readouterr().out
    assert (tmp_path / "run" / "figures" / "loss_curves.png").stat().st_size > 5000
    found, tokens = load_pretrained(tmp_path / "run" / "bundle"), load_trials(new, "test").tokens
    expected = adapted[1].predict(tokens)
    assert relative_error(found.predict(tokens), expected) < 1e-3
