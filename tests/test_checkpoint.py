"""Checkpoints and bundles: every bit comes back, the right ones are kept, and what is broken is named."""

import dataclasses
import gc
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny
from etils import epath
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from synbrain_jax.checkpoint import (
    Bundle,
    Checkpoints,
    _sum_of_values,
    check_workdir,
    claim_workdir,
    load_bundle,
    save_bundle,
)
from synbrain_jax.config import Config, DataConfig, MeshConfig, OptimizerConfig
from synbrain_jax.data.voxels import Voxels
from synbrain_jax.errors import InputError
from synbrain_jax.sharding import make_mesh
from synbrain_jax.training import init_state, make_optimizer
from synbrain_jax.variability import Spread

CONFIG = Config(name="x")


def assert_same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert one.tobytes() == other.tobytes()


def as_target(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree)


def training_state(seed=0):
    """A state as `fit` has it, with optimizer state and average, and one bfloat16 parameter."""
    rng = np.random.default_rng(seed)

    def init(_):
        kernel = jnp.asarray(rng.normal(size=(8, 4)), jnp.float32)
        return {"final": {"kernel": kernel, "bias": jnp.asarray(rng.normal(size=4), jnp.bfloat16)}}

    optimizer = make_optimizer(OptimizerConfig(clip_norm=1.0, schedule="cosine", weight_decay=0.1), 10)
    state = init_state(init, optimizer, True, jax.random.key(0))
    updates, opt_state = optimizer.update(jax.tree.map(jnp.cos, state.params), state.opt_state, state.params)
    params = jax.tree.map(jnp.add, state.params, updates)
    return state.replace(params=params, opt_state=opt_state, step=state.step + 7)


def save_values(folder, mode, values, leave_out=()):
    """Checkpoints of steps 1, 2, ... with these validation values; the state is the step's number."""
    with Checkpoints(folder, CONFIG, mode) as checkpoints:
        for step, value in enumerate(values, start=1):
            if step not in leave_out:
                checkpoints.save(step, {"n": jnp.full((3,), step)}, {"place": step}, value)


def kept(folder) -> list[int]:
    return sorted(int(path.name) for path in Path(folder).iterdir() if path.name.isdigit())


def test_a_state_and_the_position_in_the_data_come_back_bit_by_bit(tmp_path):
    state = training_state()
    position = {"next_index": 40, "ünïcode": [1, {"a": None}]}
    with Checkpoints(tmp_path, CONFIG, "min") as checkpoints:
        assert checkpoints.latest is None
        checkpoints.save(7, state, position, 0.5)
    with Checkpoints(tmp_path, CONFIG, "min") as checkpoints:
        assert checkpoints.latest == 7
        restored, where = checkpoints.restore(7, as_target(state))
        assert checkpoints.selected() == (7, 0.5)
    assert_same_bits(restored, state)
    assert where == position


def test_a_checkpoint_holds_the_state_of_its_step_though_the_next_steps_overwrite_it(tmp_path):
    """The write is asynchronous and the step donates its state."""
    advance = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)
    state = {"kernel": jnp.zeros((1024, 1024)), "bias": jnp.zeros(5)}
    with Checkpoints(tmp_path, CONFIG, "min") as checkpoints:
        for step in (1, 2):
            state = advance(state)
            checkpoints.save(step, state, {}, 1.0)
            for _ in range(3):
                state = advance(state)
        for step, expected in ((1, 1.0), (2, 5.0)):
            restored, _ = checkpoints.restore(step, as_target(state))
            for leaf in jax.tree.leaves(restored):
                np.testing.assert_array_equal(leaf, expected)


def test_a_state_goes_onto_another_mesh(tmp_path):
    devices = jax.devices()
    small, large = make_mesh(1, 2, 1, devices=devices[:2]), make_mesh(2, 2, 2)
    state = jax.device_put(
        {"kernel": np.arange(32.0, dtype=np.float32).reshape(8, 4), "bias": np.arange(4)},
        {"kernel": NamedSharding(large, P("fsdp", "tensor")), "bias": NamedSharding(large, P())},
    )
    with Checkpoints(tmp_path, CONFIG, "min") as checkpoints:
        checkpoints.save(1, state, {}, 0.0)
        for mesh in (small, make_mesh(devices=devices[5:6])):
            places = {"kernel": NamedSharding(mesh, P(None, "fsdp")), "bias": NamedSharding(mesh, P())}
            target = jax.tree.map(
                lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), state, places
            )
            restored, _ = checkpoints.restore(1, target)
            assert_same_bits(restored, state)
            assert jax.tree.map(lambda leaf: leaf.sharding, restored) == places


@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_two_latest_and_the_best_are_kept(tmp_path, mode):
    values = np.array([3.0, 1.0, 2.0, 5.0, 4.0, 4.5])
    save_values(tmp_path, mode, values if mode == "min" else -values)
    assert kept(tmp_path) == [2, 5, 6]
    with Checkpoints(tmp_path, CONFIG, mode) as checkpoints:
        assert checkpoints.selected() == (2, 1.0 if mode == "min" else -1.0)
        assert checkpoints.latest == 6
        restored, where = checkpoints.restore(2, {"n": jax.ShapeDtypeStruct((3,), jnp.int32)})
        np.testing.assert_array_equal(restored["n"], 2)
        assert where == {"place": 2}


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_never_selected(tmp_path, mode, bad):
    save_values(tmp_path, mode, [bad, 7.0, bad, bad, bad])
    assert kept(tmp_path) == [2, 4, 5]
    with Checkpoints(tmp_path, CONFIG, mode) as checkpoints:
        assert checkpoints.selected() == (2, 7.0)


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize(
    ("values", "expected"),
    [([1.0, 1.0], 2), ([1.0, 1.0, 0.0, 0.0, 0.0], 2), ([1.0, 0.0, 1.0, 0.0, 0.0, 0.0], 3), ([np.nan] * 4, 4)],
    ids=["both latest", "both old", "apart", "none finite"],
)
def test_of_equal_values_the_later_is_selected(tmp_path, mode, values, expected):
    sign = 1 if mode == "max" else -1
    save_values(tmp_path, mode, [sign * value for value in values])
    with Checkpoints(tmp_path, CONFIG, mode) as checkpoints:
        assert checkpoints.selected()[0] == expected


def test_the_best_survives_a_restart(tmp_path):
    save_values(tmp_path, "min", [1.0, 2.0, 3.0])
    with Checkpoints(tmp_path, CONFIG, "min") as checkpoints:
        for step in (4, 5):
            checkpoints.save(step, {"n": jnp.full((3,), step)}, {}, 2.0)
        assert checkpoints.selected() == (1, 1.0)
    assert kept(tmp_path) == [1, 4, 5]


def test_a_checkpoint_that_was_cut_short_does_not_count(tmp_path):
    """What a kill leaves of a step is a folder under a temporary name, as Orbax writes it."""
    save_values(tmp_path, "min", [1.0, 2.0])
    shutil.copytree(tmp_path / "2", tmp_path / "3.orbax-checkpoint-tmp")
    with Checkpoints(tmp_path, CONFIG, "min") as checkpoints:
        assert checkpoints.latest == 2
        checkpoints.save(3, {"n": jnp.full((3,), 3)}, {}, 0.5)
        assert checkpoints.selected() == (3, 0.5)


def test_a_checkpoint_without_a_value_is_gone_on_from_and_never_selected(tmp_path):
    with Checkpoints(tmp_path, CONFIG, "max") as checkpoints:
        for step, value in enumerate([None, 2.0, 1.0, None, None], start=1):
            assert checkpoints.selected() == {1: None, 2: None}.get(step, (2, 2.0))
            checkpoints.save(step, {"n": jnp.full((3,), step)}, {}, value)
        assert checkpoints.selected() == (2, 2.0)
        assert checkpoints.newest({"n": jax.ShapeDtypeStruct((3,), jnp.int32)})[0] == 5
    assert kept(tmp_path) == [2, 4, 5]
    with Checkpoints(tmp_path, CONFIG, "max") as checkpoints:
        assert checkpoints.selected() == (2, 2.0)


# ---- damage --------------------------------------------------------------------------------------

SAVED = {
    "kernel": np.random.default_rng(0).normal(size=(48, 32)).astype(np.float32),
    "bias": np.arange(5, dtype=np.float32),
    "half": np.linspace(0, 1, 7).astype(jnp.bfloat16),
    "step": np.int32(3),
}


@pytest.fixture(scope="module")
def three_saved(tmp_path_factory):
    """A folder with steps 1 to 3, of which step 1 has the best value."""
    folder = tmp_path_factory.mktemp("three") / "checkpoints"
    with Checkpoints(folder, CONFIG, "min") as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, jax.tree.map(jnp.asarray, SAVED), {"place": step}, float(step))
    return folder


def target_of(tree):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree)


def largest_file(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(file: Path, place: float):
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 4
    file.write_bytes(content)


DAMAGES = {
    "values cut short": lambda step: (f := largest_file(step / "state")).write_bytes(f.read_bytes()[:900]),
    "values flipped": lambda step: flip(largest_file(step / "state"), 0.6),
    "values gone": lambda step: largest_file(step / "state").unlink(),
    "state gone": lambda step: shutil.rmtree(step / "state"),
    "index flipped": lambda step: flip(step / "state" / "manifest.ocdbt", 0.5),
    "names cut short": lambda step: (step / "state" / "_METADATA").write_text("{"),
    "shapes cut short": lambda step: (step / "state" / "array_metadatas" / "process_0").write_text("["),
    "note gone": lambda step: (step / "note" / "metadata").unlink(),
    "note cut short": lambda step: (step / "note" / "metadata").write_text('{"value": 1.0, "pos'),
    "place changed": lambda step: (f := step / "note" / "metadata").write_text(
        f.read_text().replace('"place": 3', '"place": 2')
    ),
    "empty": lambda step: [shutil.rmtree(step), step.mkdir()],
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:.*will not be selected")
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(three_saved, tmp_path, damage):
    shutil.copytree(three_saved, tmp_path / "c")
    damage(tmp_path / "c" / "3")
    with Checkpoints(tmp_path / "c", CONFIG, "min") as checkpoints:
        with pytest.warns(UserWarning, match=r"c: damaged checkpoints are removed \(step 3: .+\)$"):
            step, state, position = checkpoints.newest(target_of(SAVED))
        assert (step, position) == (2, {"place": 2})
        assert_same_bits(state, SAVED)
        assert checkpoints.selected() == (1, 1.0)
        checkpoints.save(3, state, {"place": 33}, 0.5)  # the place is free
        assert checkpoints.newest(target_of(SAVED))[::2] == (3, {"place": 33})
        assert checkpoints.selected() == (3, 0.5)
    gc.collect()


def test_what_the_first_process_can_read_is_not_taken_for_damaged_by_another(three_saved, tmp_path, monkeypatch):
    """It would go on from another step than the others, or wait for them for ever."""

    def stale(*_, **__):
        raise OSError("stale handle")

    shutil.copytree(three_saved, tmp_path / "c")
    with Checkpoints(tmp_path / "c", CONFIG, "min") as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints._manager, "restore", stale)
            with pytest.raises(InputError, match=r"c/3: this checkpoint cannot be read \(stale handle\)"):
                checkpoints.newest(target_of(SAVED))
        assert checkpoints.newest(target_of(SAVED))[0] == 3


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_where_nothing_can_be_read_nothing_is_removed(three_saved, tmp_path):
    shutil.copytree(three_saved, tmp_path / "c")
    for step in (1, 2, 3):
        DAMAGES["values flipped"](tmp_path / "c" / str(step))
    with Checkpoints(tmp_path / "c", CONFIG, "min") as checkpoints:
        with pytest.raises(InputError, match=r"c: no checkpoint can be read \(step 3: its values have changed"):
            checkpoints.newest(target_of(SAVED))
        with pytest.raises(InputError, match=r"c/2: this checkpoint cannot be read \(its values have changed since"):
            checkpoints.restore(2, target_of(SAVED))
    other = dict(SAVED, kernel=np.zeros((32, 48), np.float32))  # a model of another shape finds no damage
    with Checkpoints(three_saved, CONFIG, "min") as checkpoints, pytest.raises(InputError, match=r"shape \(48, 32\)"):
        checkpoints.newest(target_of(other))
    assert kept(tmp_path / "c") == kept(three_saved) == [1, 2, 3]
    gc.collect()


@pytest.mark.parametrize("reader", ["_read_alone", "_jitted_sum"])  # what looks at it first, and what restores it
def test_too_little_memory_is_no_damage(three_saved, tmp_path, monkeypatch, reader):
    def exhausted(*_):
        raise MemoryError

    shutil.copytree(three_saved, tmp_path / "c")
    monkeypatch.setattr(f"synbrain_jax.checkpoint.{reader}", exhausted)
    with Checkpoints(tmp_path / "c", CONFIG, "min") as checkpoints, pytest.raises(MemoryError):
        checkpoints.newest(target_of(SAVED))
    assert kept(tmp_path / "c") == [1, 2, 3]


def test_a_best_checkpoint_whose_note_is_damaged_is_missed_aloud(three_saved, tmp_path):
    shutil.copytree(three_saved, tmp_path / "c")
    DAMAGES["note cut short"](tmp_path / "c" / "1")
    with (
        pytest.warns(UserWarning, match=r"c/1: will not be selected, as its note cannot be read \(.+\)$"),
        Checkpoints(tmp_path / "c", CONFIG, "min") as checkpoints,
    ):
        assert checkpoints.selected() == (2, 2.0)


def test_the_sum_of_values_is_what_it_says_and_sees_every_bit():
    total = 0
    for number, name in enumerate(sorted(SAVED)):  # the order of a dict's leaves
        words = np.atleast_1d(SAVED[name]).view(f"u{SAVED[name].dtype.itemsize}").ravel(order="F").tolist()
        total += (2 * number + 1) * sum(word * (2 * place + 1) for place, word in enumerate(words))
    assert int(_sum_of_values(SAVED, np)) == int(_sum_of_values(SAVED)) == total % 2**32
    mesh = make_mesh(2, 2, 2)
    spread = dict(SAVED, kernel=jax.device_put(SAVED["kernel"], NamedSharding(mesh, P("fsdp", ("tensor", "data")))))
    assert int(_sum_of_values(spread)) == total % 2**32
    rng = np.random.default_rng(1)
    for name, leaf in SAVED.items():
        for _ in range(20):
            changed = bytearray(leaf.tobytes())
            changed[rng.integers(len(changed))] ^= 1 << rng.integers(8)
            other = np.frombuffer(bytes(changed), leaf.dtype).reshape(leaf.shape)
            assert int(_sum_of_values(dict(SAVED, **{name: other}), np)) != total % 2**32


# ---- bundles -------------------------------------------------------------------------------------


def make_bundle(seed: int) -> Bundle:
    config = tiny.config(seed=seed)
    rng = np.random.default_rng(seed)
    grid = np.stack(np.unravel_index(np.arange(tiny.VOXELS), (2, 4, 5)), 1).astype(np.int32)
    voxels = Voxels(
        subject="s",
        normalisation="none",
        ijk=grid,
        volume_shape=(2, 4, 5),
        affine=rng.normal(size=(4, 4)),
        ncsnr=rng.random(tiny.VOXELS, np.float32),
        order=rng.permutation(tiny.VOXELS).astype(np.int32),
    )
    return Bundle(
        config=config,
        params=tiny.random_params(config, seed),
        voxels=voxels,
        dataset="arrays/tïny",
        latent_std=rng.random((tiny.TOKENS, tiny.WIDTH), np.float32),
        offset=rng.random(tiny.VOXELS, np.float32),
        gain=1 / 3,
        spread=Spread(rng.random((tiny.VOXELS, 3), np.float32), rng.random(tiny.VOXELS, np.float32), {0: 1.5, 3: 0.1}),
    )


def assert_same_bundle(actual: Bundle, expected: Bundle):
    assert_same_bits(actual.params, expected.params)
    assert (actual.config, actual.dataset, actual.gain) == (expected.config, expected.dataset, expected.gain)
    for name in ("latent_std", "offset"):
        assert_same_bits(getattr(actual, name), getattr(expected, name))
    for name in ("factor", "independent"):
        assert_same_bits(getattr(actual.spread, name), getattr(expected.spread, name))
    assert actual.spread.nll == expected.spread.nll
    for field in dataclasses.fields(Voxels):
        one, other = getattr(actual.voxels, field.name), getattr(expected.voxels, field.name)
        if isinstance(other, np.ndarray):
            assert_same_bits(one, other)
        else:
            assert one == other


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("bundle") / "bundle"
    save_bundle(path, make_bundle(0))
    return path


def test_a_bundle_comes_back_bit_by_bit(saved):
    assert_same_bundle(load_bundle(saved), make_bundle(0))


def test_a_bundle_need_not_know_a_spread_of_trials(tmp_path):
    """As those that an earlier version wrote; one with a spread is replaced by it."""
    for bundle in (make_bundle(0), dataclasses.replace(make_bundle(0), spread=None)):
        save_bundle(tmp_path / "bundle", bundle)
    assert not (tmp_path / "bundle" / "spread.npz").exists()
    assert load_bundle(tmp_path / "bundle").spread is None


def test_a_spread_of_other_voxels_is_named(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "b")
    Spread(np.zeros((7, 2), np.float32), np.ones(7, np.float32)).save(tmp_path / "b" / "spread.npz")
    with pytest.raises(InputError, match=r"spread\.npz: 7 voxels, but the bundle has 40"):
        load_bundle(tmp_path / "b")


def test_a_bundle_of_sharded_parameters_comes_back_on_one_device(tmp_path):
    bundle = make_bundle(1)
    spread = jax.device_put(bundle.params, NamedSharding(make_mesh(devices=jax.devices()[2:4]), P()))
    save_bundle(tmp_path / "bundle", dataclasses.replace(bundle, params=spread))
    loaded = load_bundle(tmp_path / "bundle")
    assert_same_bundle(loaded, bundle)
    assert {leaf.sharding.device_set.pop() for leaf in jax.tree.leaves(loaded.params)} == {jax.devices()[0]}


def test_a_bundle_replaces_the_one_that_is_there_and_leaves_nothing_else(tmp_path):
    save_bundle(tmp_path / "bundle", make_bundle(0))
    (tmp_path / "bundle.unfinished").mkdir()
    (tmp_path / "bundle.unfinished" / "of a killed run").touch()
    save_bundle(tmp_path / "bundle", make_bundle(1))
    assert_same_bundle(load_bundle(tmp_path / "bundle"), make_bundle(1))
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert not (tmp_path / "bundle" / "of a killed run").exists()


def test_a_kill_at_any_rename_leaves_a_bundle_to_go_back_to(tmp_path, monkeypatch):
    """The old bundle, or the new one, is there under its name or as bundle.replaced; and the next save works."""
    save_bundle(tmp_path / "bundle", make_bundle(0))
    for allowed, expected in ((0, "bundle"), (1, "bundle.replaced")):
        with monkeypatch.context() as patch:
            killed_after(allowed, patch)
            with pytest.raises(KeyboardInterrupt):
                save_bundle(tmp_path / "bundle", make_bundle(1))
        assert_same_bundle(load_bundle(tmp_path / expected), make_bundle(0))
    with monkeypatch.context() as patch:  # before anything is renamed, what was put aside is back
        killed_after(1, patch)
        with pytest.raises(KeyboardInterrupt):
            save_bundle(tmp_path / "bundle", make_bundle(1))
    assert_same_bundle(load_bundle(tmp_path / "bundle"), make_bundle(0))
    save_bundle(tmp_path / "bundle", make_bundle(1))
    assert_same_bundle(load_bundle(tmp_path / "bundle"), make_bundle(1))
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def killed_after(renames: int, patch) -> None:
    """The process ends when a folder of bundles is renamed once more than this."""
    kind, left = type(epath.Path("/")), iter(range(renames))
    real = kind.rename

    def rename(self, target):
        if self.name.startswith("bundle") and next(left, None) is None:
            raise KeyboardInterrupt
        return real(self, target)

    patch.setattr(kind, "rename", rename)


def test_a_bundle_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no space left")

    save_bundle(tmp_path / "bundle", make_bundle(0))
    monkeypatch.setattr(ocp.Checkpointer, "save", fail)
    for name in ("bundle", "first"):
        with pytest.raises(OSError, match="no space left"):
            save_bundle(tmp_path / name, make_bundle(1))
    assert_same_bundle(load_bundle(tmp_path / "bundle"), make_bundle(0))
    assert not (tmp_path / "first").exists()


@pytest.mark.parametrize("part", ["config.json", "voxels.npz", "synthesis.npz", "params"])
def test_a_missing_part_is_named(saved, tmp_path, part):
    shutil.copytree(saved, tmp_path / "b")
    missing = tmp_path / "b" / part
    shutil.rmtree(missing) if missing.is_dir() else missing.unlink()
    with pytest.raises(InputError, match=rf"b is not a bundle: {part} missing\. Give the `bundle` folder"):
        load_bundle(tmp_path / "b")


def test_a_folder_that_is_no_bundle_is_named(tmp_path):
    with pytest.raises(InputError, match=r"config\.json, voxels\.npz, synthesis\.npz, params missing"):
        load_bundle(tmp_path / "nowhere")


@pytest.mark.parametrize("part", ["config.json", "voxels.npz", "synthesis.npz"])
def test_a_truncated_part_is_named(saved, tmp_path, part):
    shutil.copytree(saved, tmp_path / "b")
    file = tmp_path / "b" / part
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(InputError) as error:
        load_bundle(tmp_path / "b")
    assert part in str(error.value)


def test_an_array_missing_from_a_part_is_named(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "b")
    file = tmp_path / "b" / "synthesis.npz"
    with np.load(file) as arrays:
        rest = {name: arrays[name] for name in arrays.files if name != "offset"}
    np.savez(file, **rest)
    with pytest.raises(InputError, match="offset"):
        load_bundle(tmp_path / "b")


def array_files(params: Path) -> list[Path]:
    return [path for path in params.rglob("*") if path.is_file() and path.parent.name == "d"]


def truncate(params: Path):
    for file in array_files(params):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def remove(params: Path):
    for file in array_files(params):
        file.unlink()


def empty(params: Path):
    shutil.rmtree(params)
    params.mkdir()


# TensorStore warns of the reads that failed after the first.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", [truncate, remove, empty])
def test_damaged_parameters_are_one_clear_error(saved, tmp_path, damage):
    shutil.copytree(saved, tmp_path / "b")
    damage(tmp_path / "b" / "params")
    with pytest.raises(InputError, match="params"):
        load_bundle(tmp_path / "b")
    gc.collect()  # so that the warnings come here


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_parameters_of_another_architecture_are_one_clear_error(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "b")
    config = tiny.config()
    wider = dataclasses.replace(config, brain_vae=dataclasses.replace(config.brain_vae, projector_width=24))
    (tmp_path / "b" / "config.json").write_text(wider.to_json())
    with pytest.raises(InputError, match="params"):
        load_bundle(tmp_path / "b")
    gc.collect()


# ---- workdirs ------------------------------------------------------------------------------------


def test_a_workdir_belongs_to_one_configuration(tmp_path):
    config = tiny.config()
    check_workdir(tmp_path / "new", config)
    assert not (tmp_path / "new").exists()
    claim_workdir(tmp_path / "new", config)
    check_workdir(tmp_path / "new", config)
    other = dataclasses.replace(config, seed=3, data=DataConfig(shift_test_tokens=1))
    with pytest.raises(InputError) as error:
        check_workdir(tmp_path / "new", other)
    assert f"{tmp_path / 'new'} belongs to another run (seed: 0 here, 3 there; data.shift_test_tokens" in str(
        error.value
    )


def test_a_run_goes_on_over_another_mesh_and_with_other_logs(tmp_path):
    config = tiny.config()
    claim_workdir(tmp_path, config)
    other = dataclasses.replace(config, mesh=MeshConfig(data=2, fsdp=4), log_every=7)
    check_workdir(tmp_path, other)
    with pytest.raises(InputError, match=r"another run \(seed: 0 here, 3 there\)"):
        check_workdir(tmp_path, dataclasses.replace(other, seed=3))
    claim_workdir(tmp_path, other)
    assert Config.from_json((tmp_path / "config.json").read_text()) == other


def test_a_workdir_whose_configuration_is_damaged_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"name": "x"')
    with pytest.raises(InputError, match=r"config\.json"):
        check_workdir(tmp_path, CONFIG)
