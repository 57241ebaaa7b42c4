"""The release's checkpoints in and out: every bit, every key, every way in which a file can be wrong."""

import copy
import dataclasses
import json
import math
import os

import golden_set
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tiny
from flax.traverse_util import flatten_dict
from torch_writer import pickled, tensor, zip_file

from synbrain_jax import load_pretrained
from synbrain_jax.checkpoint import Bundle
from synbrain_jax.cli import main
from synbrain_jax.config import DataConfig, OptimizerConfig, Stage1Config, Stage2Config
from synbrain_jax.data.pairs import load_trials
from synbrain_jax.data.voxels import Voxels
from synbrain_jax.errors import InputError
from synbrain_jax.evaluation import write_evaluation
from synbrain_jax.interop import torch_weights
from synbrain_jax.interop.torch_file import TorchFile
from synbrain_jax.interop.torch_training import check_start, training_state
from synbrain_jax.interop.torch_weights import (
    from_released,
    read_brain_vae,
    read_mapper,
    released_array,
    released_key,
    to_released,
)
from synbrain_jax.models.brain_vae import BrainVAE, BrainVAEConfig, brain_vae_shapes
from synbrain_jax.models.semantic_to_neural import MapperConfig, mapper_shapes
from synbrain_jax.sharding import make_mesh, state_sharding
from synbrain_jax.stages import check_starts, stage1, stage2
from synbrain_jax.synthesis import SynBrain
from synbrain_jax.training import fit, init_state, make_optimizer, make_train_step

VAE_FILE, MAPPER_FILE = golden_set.folder / "ckpt_vae" / "last.pth", golden_set.folder / "ckpt_sit" / "last.pt"
VOXELS = Voxels("s", "none", ijk=None, volume_shape=None, affine=None, ncsnr=None, order=np.arange(tiny.VOXELS))
KINDS = {np.dtype(np.float32): "FloatStorage", np.dtype(ml_dtypes.bfloat16): "BFloat16Storage"}
KINDS |= {np.dtype(np.float16): "HalfStorage", np.dtype(np.int64): "LongStorage"}


def stored(path, name, prefix=""):
    """A state dict straight from a checkpoint."""
    with TorchFile(path) as file:
        return {key.removeprefix(prefix): value.read() for key, value in file.content[name].items()}


def save(path, content):
    """Writes a checkpoint whose arrays are tensors."""
    storages = {}

    def convert(value):
        if isinstance(value, dict):
            return {key: convert(item) for key, item in value.items()}
        if not isinstance(value, np.ndarray):
            return value
        key = str(len(storages))
        storages[key] = value.tobytes()
        strides = tuple(math.prod(value.shape[axis + 1 :]) for axis in range(value.ndim))
        return tensor(value.shape, strides, key=key, size=value.size, kind=KINDS[value.dtype])

    path.write_bytes(zip_file(pickled(convert(content)), storages))
    return path


def assert_same_bits(actual, expected):
    assert actual.keys() == expected.keys()
    for key in expected:
        assert (actual[key].dtype, actual[key].shape) == (expected[key].dtype, expected[key].shape), key
        assert actual[key].tobytes() == expected[key].tobytes(), key


# ---- there and back ----------------------------------------------------------------------------------------


def test_brain_vae_comes_back_bit_for_bit():
    _, params = read_brain_vae(VAE_FILE)
    assert_same_bits(to_released(params), stored(VAE_FILE, "model", "module."))


@pytest.mark.parametrize(("averaged", "name"), [(True, "ema"), (False, "model")])
def test_mapper_comes_back_bit_for_bit(averaged, name):
    _, params = read_mapper(MAPPER_FILE, averaged=averaged)
    assert_same_bits(to_released(params), stored(MAPPER_FILE, name))


def test_the_average_and_the_weights_differ():
    ema, model = (stored(MAPPER_FILE, name) for name in ("ema", "model"))
    assert all(np.abs(ema[key] - model[key]).max() > 0 for key in model if key != "pos_embed")


def test_convert_and_back_from_the_command_line(tmp_path, capsys):
    bundle, out, again = (os.fspath(tmp_path / name) for name in ("bundle", "torch", "again"))
    voxels = ["--voxels", "83"]
    main(
        ["convert", "from-torch", "--brain-vae", str(VAE_FILE), "--mapper", str(MAPPER_FILE), "--out", bundle, *voxels]
    )
    assert f"{bundle}: a bundle for 83 voxels" in capsys.readouterr().out
    main(["convert", "to-torch", "--model", bundle, "--out", out])
    vae, mapper = (safetensors.numpy.load_file(f"{out}/{name}.safetensors") for name in ("brain_vae", "mapper"))
    assert_same_bits(vae, stored(VAE_FILE, "model", "module."))
    assert_same_bits(mapper, stored(MAPPER_FILE, "ema"))

    files = ["--brain-vae", f"{out}/brain_vae.safetensors", "--mapper", f"{out}/mapper.safetensors"]
    heads = ["--heads", str(golden_set.mapper_config().heads)]
    main(["convert", "from-torch", *files, "--out", again, *voxels, *heads])
    models = [load_pretrained(path) for path in (bundle, again)]
    assert models[0].bundle.config == models[1].bundle.config

    expected = golden_set.load("ckpt_sit/expected.npz")
    patterns = models[0].predict(expected["x"])
    np.testing.assert_array_equal(patterns, models[1].predict(expected["x"]))
    vae = BrainVAE(models[0].bundle.config.brain_vae)
    params = {"params": golden_set.on_device(read_brain_vae(VAE_FILE)[1])}
    direct = jax.jit(lambda latent: vae.apply(params, latent, 83, method="decode"))(jnp.asarray(expected["y_ema_t0"]))
    assert golden_set.relative_error(patterns, np.asarray(direct)) <= 2e-5
    with pytest.raises(InputError, match="does not know the spread of BrainVAE's posterior"):
        models[0].synthesize(expected["x"], jax.random.key(0), variability="posterior")


def test_convert_takes_the_raw_weights_and_the_brain_of_a_data_set(tmp_path, tiny_dataset):
    files = ["--brain-vae", str(VAE_FILE), "--mapper", str(MAPPER_FILE), "--out", str(tmp_path / "bundle")]
    main(["convert", "from-torch", *files, "--weights", "raw", "--data", str(tiny_dataset.path)])
    bundle = load_pretrained(tmp_path / "bundle").bundle
    np.testing.assert_array_equal(bundle.voxels.ijk, tiny_dataset.voxels.ijk)
    assert (bundle.dataset, len(bundle.offset)) == (tiny_dataset.name, tiny.VOXELS)
    model = stored(MAPPER_FILE, "model")
    assert_same_bits(
        {"pos_embed": np.asarray(bundle.params["mapper"]["pos_embed"])[None]}, {"pos_embed": model["pos_embed"]}
    )


def test_a_brain_in_other_units_or_two_brains_are_refused(tiny_dataset):
    voxels = dataclasses.replace(tiny_dataset.voxels, normalisation="run_zscore")
    with pytest.raises(InputError, match="prepared with normalisation 'run_zscore', but the release"):
        torch_weights.bundle_from_released(VAE_FILE, MAPPER_FILE, voxels=voxels)
    files = ["--brain-vae", str(VAE_FILE), "--mapper", str(MAPPER_FILE), "--out", "never"]
    with pytest.raises(SystemExit):
        main(["convert", "from-torch", *files, "--voxels", "5", "--data", str(tiny_dataset.path)])


def test_a_converted_bundle_can_be_evaluated(tmp_path, tiny_dataset):
    config = tiny.config(data=DataConfig(voxel_order="given"))
    bundle = Bundle.uncorrected(config, tiny.random_params(config), tiny_dataset.voxels, "x", None)
    write_evaluation(SynBrain(bundle), tiny_dataset, tmp_path)
    with np.load(tmp_path / "predictions.npz") as arrays:
        assert "samples" not in arrays.files
        assert {"trials", "trial_stimulus"} <= set(arrays.files)


def test_the_number_of_voxels_is_read_off_the_checkpoint():
    with TorchFile(MAPPER_FILE) as file:
        number = file.content["args"]["num_voxels"]
    bundle = torch_weights.bundle_from_released(VAE_FILE, MAPPER_FILE)
    assert len(bundle.offset) == number
    assert bundle.config.data.voxel_order == "given"


def test_a_mapper_trained_here_is_exported_with_its_position_table():
    config = tiny.config()
    params = tiny.random_params(config)
    bundle = Bundle.uncorrected(config, params, VOXELS, "none", None)
    exported = torch_weights.released_from_bundle(bundle)["mapper"]
    again = from_released(exported, mapper_shapes(dataclasses.replace(config.mapper, positions="stored")), "exported")
    assert again.pop("pos_embed").shape == (tiny.TOKENS, tiny.WIDTH)
    jax.tree.map(np.testing.assert_array_equal, again, params["mapper"])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_becomes_float32(tmp_path, dtype):
    half = {key: value.astype(dtype) for key, value in stored(MAPPER_FILE, "model").items()}
    arguments = {"model_head": golden_set.mapper_config().heads}
    path = save(tmp_path / "last.pt", {"model": half, "ema": half, "args": arguments})
    _, params = read_mapper(path)
    assert_same_bits(to_released(params), {key: value.astype(np.float32) for key, value in half.items()})


# ---- the published sizes -----------------------------------------------------------------------------------


def published(name):
    """Key -> an array of the published shape that takes no memory."""
    lines = (golden_set.OWN / name).read_text().splitlines()[1:]
    rows = [line.split("\t") for line in lines]
    return {key: np.broadcast_to(np.float32(0), [int(n) for n in shape.split(",")]) for key, shape, *_ in rows}


@pytest.mark.parametrize(
    ("name", "config_of", "config", "shapes", "count"),
    [
        ("brainvae_state_dict_keys.tsv", torch_weights.brain_vae_config, BrainVAEConfig.paper(), brain_vae_shapes, 230),
        (
            "sit_state_dict_keys.tsv",
            lambda tensors, where: torch_weights.mapper_config(tensors, where, heads=13),
            MapperConfig.paper(),
            mapper_shapes,
            89,
        ),
    ],
    ids=["brain_vae", "mapper"],
)
def test_every_published_tensor_has_its_place(name, config_of, config, shapes, count):
    tensors = published(name)
    assert len(tensors) == count
    assert config_of(tensors, name) == config
    ours = {}
    for path, leaf in flatten_dict(shapes(config)).items():
        key = released_key(path)
        ours[key] = released_array(key, np.broadcast_to(np.int8(0), leaf.shape)).shape
    assert ours == {key: tensor.shape for key, tensor in tensors.items()}


# ---- files that are wrong ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vae_tensors():
    return stored(VAE_FILE, "model", "module.")


def read_changed(tmp_path, tensors):
    path = tmp_path / "changed.safetensors"
    path.write_bytes(safetensors.numpy.save(tensors))
    return read_brain_vae(path)


SOME_KEYS = [
    "encoder.conv_in.weight",
    "encoder.conv_in.bias",
    "encoder.down.0.block.0.conv1.bias",
    "encoder.mid.attn_1.q.weight",
    "encoder.conv_out.weight",
    "pre_projector_mean.0.bias",
    "pre_projector_logvar.8.weight",
    "post_projector.8.bias",
    "decoder.norm_out.weight",
]


@pytest.mark.parametrize("key", SOME_KEYS)
def test_a_missing_extra_or_misshapen_tensor_is_named(tmp_path, vae_tensors, key):
    without = {name: value for name, value in vae_tensors.items() if name != key}
    with pytest.raises(InputError, match=rf"changed\.safetensors: {key} missing"):
        read_changed(tmp_path, without)
    with pytest.raises(InputError, match=rf"{key}\.copy not expected"):
        read_changed(tmp_path, vae_tensors | {f"{key}.copy": vae_tensors[key]})
    wrong = np.concatenate([vae_tensors[key]] * 2)
    with pytest.raises(InputError, match=rf"{key} has shape \[{wrong.shape[0]}.*expected \[{len(vae_tensors[key])}"):
        read_changed(tmp_path, vae_tensors | {key: wrong})


def test_a_state_dict_alone_is_taken_with_or_without_the_prefix(tmp_path, vae_tensors):
    prefixed = {f"module.{key}": value for key, value in vae_tensors.items()}
    bare = save(tmp_path / "bare.pt", vae_tensors)
    for config, params in (read_changed(tmp_path, prefixed), read_brain_vae(bare)):
        assert config == golden_set.brain_vae_config("ckpt_brainvae")
        assert_same_bits(to_released(params), vae_tensors)


def test_weights_that_are_not_finite_are_named(tmp_path, vae_tensors):
    key = SOME_KEYS[0]
    with pytest.raises(InputError, match=rf"{key} holds values that are NaN or infinite"):
        read_changed(tmp_path, vae_tensors | {key: np.full_like(vae_tensors[key], np.nan)})


def test_a_block_that_is_missing_whole_is_named(tmp_path):
    with TorchFile(MAPPER_FILE) as file:
        arguments = dict(file.content["args"])
    last = f"blocks.{golden_set.mapper_config().depth - 1}."
    weights = {key: value for key, value in stored(MAPPER_FILE, "ema").items() if not key.startswith(last)}
    path = save(tmp_path / "last.pt", {"model": weights, "ema": weights, "args": {**arguments, "betas": None}})
    with pytest.raises(InputError, match=rf"{last}adaLN_modulation.1.bias.* missing"):
        read_mapper(path)


def test_integers_are_no_weights(tmp_path, vae_tensors):
    key = SOME_KEYS[0]
    with pytest.raises(InputError, match=rf"{key} holds int64. All must hold float32, float16, bfloat16"):
        read_changed(tmp_path, vae_tensors | {key: vae_tensors[key].astype(np.int64)})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds list; expected a checkpoint of the release"),
        ({"weights": {}}, "holds weights; expected a checkpoint of the release"),
        ({"model": {"a": 1}}, "'model': 'a' is a int; expected named tensors"),
        ({"model": {"a": np.zeros(1, np.float32), "module.a": np.zeros(1, np.float32)}}, "with and without the prefix"),
        ({"model": {"a": np.zeros(1, np.float32)}}, "encoder.conv_in.bias is missing"),
        ({"a": np.zeros(1, np.float32)}, "encoder.conv_in.bias is missing"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        read_brain_vae(save(tmp_path / "last.pth", content))


def test_a_mapper_file_that_does_not_say_enough(tmp_path, capsys):
    weights = stored(MAPPER_FILE, "model")
    path = save(tmp_path / "last.pt", {"model": weights})
    with pytest.raises(InputError, match="does not say how many attention heads"):
        read_mapper(path)
    with pytest.raises(InputError, match="holds no moving average"):
        read_mapper(path, heads=1)
    assert read_mapper(path, heads=1, averaged=False)[0].heads == 1
    path = save(tmp_path / "last.pt", {"model": weights, "ema": weights, "args": {"model_head": 1, "qk_norm": True}})
    with pytest.raises(InputError, match="qk_norm"):
        read_mapper(path)
    path = save(tmp_path / "last.pt", {"model": weights, "ema": weights, "args": {"model_head": 1}})
    with pytest.raises(InputError, match="does not say how many voxels"):
        torch_weights.bundle_from_released(VAE_FILE, path)
    with pytest.raises(SystemExit) as stop:
        main(
            [
                "convert",
                "from-torch",
                "--brain-vae",
                str(MAPPER_FILE),
                "--mapper",
                str(path),
                "--out",
                str(tmp_path / "b"),
            ]
        )
    assert stop.value.code == 2
    assert "last.pt: encoder.conv_in.bias is missing" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_two_models_that_do_not_fit_each_other(tmp_path, vae_tensors):
    config = tiny.config()
    bundle = Bundle.uncorrected(config, tiny.random_params(config), VOXELS, "none", None)
    path = tmp_path / "mapper.safetensors"
    path.write_bytes(safetensors.numpy.save(torch_weights.released_from_bundle(bundle)["mapper"]))
    with pytest.raises(InputError, match=r"last\.pth and .*mapper\.safetensors are not of one system: .*on \[4, 8\]"):
        torch_weights.bundle_from_released(VAE_FILE, path, heads=2, voxels=9)


# ---- training that goes on ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Checkpoints in the release's layout of the smallest models, after 2 made-up steps."""
    config = tiny.config(
        mapper=MapperConfig.small(tokens=tiny.TOKENS, width=tiny.WIDTH, depth=1, positions="stored"),
        stage1=Stage1Config(steps=4, batch_size=8, eval_every=4, select="last"),
        stage2=Stage2Config(steps=4, batch_size=8, eval_every=4, select="last", target="trial"),
    )
    params = tiny.random_params(config)
    folder = tmp_path_factory.mktemp("started")
    rng = np.random.default_rng(5)
    files = {}
    for name, tree in params.items():
        weights = to_released(tree)
        entries = {
            i: {
                "step": np.full((), 2, np.float32),
                "exp_avg": 0.1 * rng.normal(size=value.shape).astype(np.float32),
                "exp_avg_sq": rng.random(value.shape, np.float32),
            }
            for i, (key, value) in enumerate(weights.items())
            if key != "pos_embed"
        }
        groups = [{"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.05, "amsgrad": False}]
        files[name] = {"model": weights, "optimizer": {"state": entries, "param_groups": groups}}
    files["brain_vae"]["model"] = {f"module.{key}": value for key, value in files["brain_vae"]["model"].items()}
    files["mapper"]["opt"] = files["mapper"].pop("optimizer")
    files["mapper"] |= {"ema": {key: 0.5 * value for key, value in files["mapper"]["model"].items()}, "steps": 3}
    save(folder / "last.pth", files["brain_vae"])
    save(folder / "last.pt", files["mapper"])
    return config, params, files, folder


def start_of(stage):
    """The state that `fit` would begin with, and the plain step."""
    optimizer = make_optimizer(stage.config.optimizer, stage.config.steps)
    averaged = stage.config.optimizer.ema_decay is not None
    fresh = jax.eval_shape(lambda: init_state(stage.init, optimizer, averaged, jax.random.key(0)))
    places = state_sharding(fresh, make_mesh(devices=jax.devices()[:1]))
    target = jax.tree.map(lambda a, at: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=at), fresh, places)
    return stage.start(target), jax.jit(make_train_step(stage.loss, optimizer, stage.config.optimizer.ema_decay))


# Stage 1 takes 20 s, and is in tests/parity/test_released_training.py, too.
@pytest.mark.parametrize("name", [pytest.param("stage1", marks=pytest.mark.slow), "stage2"])
def test_a_stage_goes_on_where_pytorch_stopped(started, tiny_dataset, tmp_path, name):
    config, params, files, folder = started
    file = folder / {"stage1": "last.pth", "stage2": "last.pt"}[name]
    settings = dataclasses.replace(getattr(config, name), start_from=str(file))
    stage1_too = dataclasses.replace(config.stage1, start_from=str(folder / "last.pth"))
    config = dataclasses.replace(config, **{"stage1": stage1_too, name: settings})

    def stage():
        validation = load_trials(tiny_dataset, "validation")
        if name == "stage1":
            return stage1(config, [tiny_dataset], [validation])
        return stage2(config, [tiny_dataset], [validation], params["brain_vae"], [None])

    by_hand = stage()
    state, step = start_of(by_hand)
    first = {"stage1": 2, "stage2": 3}[name]
    assert int(state.step) == first
    content = files[{"stage1": "brain_vae", "stage2": "mapper"}[name]]
    weights = {key.removeprefix("module."): value for key, value in content["model"].items()}
    assert_same_bits(to_released(state.params), weights)
    if name == "stage2":
        assert_same_bits(to_released(state.ema), content["ema"])
    adam = next(part for part in state.opt_state if hasattr(part, "nu"))
    assert int(adam.count) == 2
    entries = content.get("optimizer", content.get("opt"))["state"]
    for moment, field in ((adam.mu, "exp_avg"), (adam.nu, "exp_avg_sq")):
        given = {
            key: entries[i][field] if i in entries else np.zeros_like(weights[key]) for i, key in enumerate(weights)
        }
        assert_same_bits(to_released(moment), given)

    for _ in range(4 - first):
        batch = jax.tree.map(jnp.asarray, next(by_hand.batches))
        state, _ = step(state, by_hand.frozen, batch, jax.random.key(config.seed))
    result = fit(stage(), config, make_mesh(devices=jax.devices()[:1]), tmp_path)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), result, state.result)
    if name == "stage2":
        np.testing.assert_array_equal(state.params["pos_embed"], params["mapper"]["pos_embed"])  # never trained


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("optimizer"), "optimizer state: is missing"),
        (lambda content: content["optimizer"].pop("param_groups"), "no param_groups"),
        (lambda content: content["optimizer"]["param_groups"][0].update(amsgrad=True), "amsgrad is True; only False"),
        (lambda content: content["optimizer"]["param_groups"][0].update(betas=[0.9, 0.99]), r"betas is \[0.9, 0.99\]"),
        (lambda content: content["optimizer"]["state"].pop(0), "nothing for decoder.conv_in.bias"),
        (lambda content: content["optimizer"]["state"][3].pop("exp_avg"), "nothing for .*was it frozen"),
        (lambda content: content["optimizer"]["state"][3].update(step=7), r"steps 2, 7 for"),
        (lambda content: content["optimizer"]["state"][3].update(step=float("nan")), "step of .* is nan"),
        (lambda content: content["optimizer"]["state"].update({9999: {}}), "entries and steps"),
        (
            lambda content: content["optimizer"]["state"][0].update(exp_avg=np.zeros(3, np.float32)),
            r"exp_avg: decoder\.conv_in\.\w+ has shape \[3\], expected",
        ),
        (lambda content: content["optimizer"]["state"][0].update(exp_avg=3), "nothing for decoder.conv_in.bias"),
        (lambda content: content["model"].popitem(), "weights: .* missing"),
    ],
)
def test_a_state_that_cannot_go_on_is_named(started, tiny_dataset, tmp_path, change, message):
    config, _, files, _ = started
    content = copy.deepcopy(files["brain_vae"])
    change(content)
    path = save(tmp_path / "last.pth", content)
    optimizer = make_optimizer(OptimizerConfig(), 4)
    shapes = brain_vae_shapes(config.brain_vae)
    fresh = jax.eval_shape(
        lambda: init_state(lambda _: jax.tree.map(jnp.zeros_like, shapes), optimizer, False, jax.random.key(0))
    )
    with pytest.raises(InputError, match=message):
        training_state(path, fresh)
    if "NaN" not in message:  # seen without reading the tensors
        with pytest.raises(InputError, match=message):
            check_start(path, shapes)


@pytest.mark.parametrize("steps", [1, 2, 9])
def test_a_start_may_itself_be_the_result(started, tiny_dataset, tmp_path, steps):
    """A run that has no more steps, or that the stop rule ends at once, as the release ended."""
    config, params, _, folder = started
    settings = dataclasses.replace(
        config.stage1, steps=steps, stop_below=1e9, start_from=str(folder / "last.pth"), eval_every=4
    )
    config = dataclasses.replace(config, stage1=settings)
    stage = stage1(config, [tiny_dataset], [load_trials(tiny_dataset, "validation")])
    result = fit(stage, config, make_mesh(devices=jax.devices()[:1]), tmp_path)
    jax.tree.map(np.testing.assert_array_equal, result, params["brain_vae"])
    assert json.loads((tmp_path / "selected.json").read_text())["step"] == 2


def test_files_to_start_from_are_checked_before_training(started, tmp_path):
    config, _, _, folder = started
    good = {"stage1": "last.pth", "stage2": "last.pt"}

    def starts(**files):
        stages = {
            name: dataclasses.replace(getattr(config, name), start_from=str(folder / file))
            for name, file in files.items()
        }
        return dataclasses.replace(config, **stages)

    check_starts(starts(**good))
    check_starts(config)
    with pytest.raises(InputError, match=r"nothing\.pt"):
        check_starts(starts(**good | {"stage2": "nothing.pt"}))
    with pytest.raises(InputError, match=r"last\.pth, weights: .* missing"):
        check_starts(starts(stage1="last.pth", stage2="last.pth"))
    with pytest.raises(InputError, match=r"stage2\.start_from is given but stage1.start_from is not"):
        starts(stage2="last.pt")
