"""Pictures to tokens on disk and on to fMRI: the numbers, what survives a kill, and what happens to bad pictures."""

import dataclasses
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
import tiny
from etils import epath
from PIL import Image

from synbrain_jax import encoding
from synbrain_jax.checkpoint import Bundle, save_bundle
from synbrain_jax.cli import main, plain_errors
from synbrain_jax.config import DataConfig
from synbrain_jax.data import prepare_data
from synbrain_jax.data.arrays import prepare_arrays
from synbrain_jax.data.pairs import open_dataset
from synbrain_jax.data.pictures import Pictures, open_pictures
from synbrain_jax.data.tokens import StoredTokens, open_tokens, write_shard
from synbrain_jax.data.voxels import Voxels
from synbrain_jax.encoding import PictureEncoder, encode_images, load_encoder
from synbrain_jax.errors import InputError
from synbrain_jax.interop.clip_weights import load_clip_vision
from synbrain_jax.models.clip_vision import CLIPVision, CLIPVisionConfig, clip_vision_shapes
from synbrain_jax.preprocessing import hugging_face, released_on_host
from synbrain_jax.sharding import make_mesh
from synbrain_jax.streaming import synthesize_pictures
from synbrain_jax.synthesis import SynBrain

CLIP = Path(__file__).parent / "golden" / "clip_hf_tiny_gelu"  # 28 pixels, tokens [4, 32]
CONFIG = CLIPVisionConfig(
    image_size=28, patch_size=14, width=tiny.WIDTH, depth=1, heads=2, mlp_width=12, embed_dim=4
)  # tokens [4, 8], as the tiny system takes
ONE = make_mesh(devices=jax.devices()[:1])


def random_params(seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), clip_vision_shapes(CONFIG))


PARAMS = random_params()


def make_encoder(**options) -> PictureEncoder:
    return PictureEncoder(CONFIG, PARAMS, **dict(mesh=ONE) | options)


@pytest.fixture(scope="module")
def encoder() -> PictureEncoder:
    return make_encoder()


def make_pictures(sizes, where="memory", before=lambda index: None) -> Pictures:
    """Random pictures of (height, width), the same at every call; a size of None cannot be read."""

    def read(index):
        before(index)
        if sizes[index] is None:
            raise InputError(f"picture {index}: the picture\nis damaged")
        return np.random.default_rng(index).integers(0, 256, (*sizes[index], 3), dtype=np.uint8)

    return Pictures(where, tuple(f"p{index}.png" for index in range(len(sizes))), (255, 255, 255), read)


def tower(pixels):
    """Tokens of normalised pixels, by the tower alone."""
    return np.asarray(CLIPVision(CONFIG).apply({"params": PARAMS}, jnp.asarray(pixels)).tokens)


def assert_close_as_bfloat16(found, expected):
    """Half a unit in bfloat16's last place is 2^-9; twice that, as a difference of 1e-6 may turn the rounding."""
    np.testing.assert_allclose(found, expected, rtol=2**-8, atol=1e-4)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(encoding, "_SHARD", 4)


SIZES = [(20, 30)] * 5 + [(31, 28), (28, 28), (40, 9), (20, 30), (7, 50), (12, 12)]
PICTURES = make_pictures(SIZES)


# ---- the numbers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_tokens_are_the_towers_of_the_preprocessed_pictures(encoder, batch_size, tmp_path):
    pictures = make_pictures(SIZES)
    result = encode_images(pictures, encoder, tmp_path, batch_size=batch_size)
    assert (result.encoded, result.unreadable) == (len(SIZES), {})
    expected = tower([released_on_host(pictures[i], 28) for i in range(len(SIZES))])
    stored = open_tokens(tmp_path)
    assert stored.stimulus_id == pictures.names
    assert stored.tokens.shape == (len(SIZES), 4, 8)
    assert_close_as_bfloat16(stored.tokens[:], expected)
    assert np.ptp(expected, axis=0).max() > 0.1  # the pictures do differ
    assert (tmp_path / "unreadable.txt").read_text() == ""


def test_eight_devices_give_the_same(encoder, tmp_path):
    pictures = make_pictures(SIZES)
    spread = make_encoder(mesh=make_mesh(2, 2, 2))
    assert spread.rows(5) == 8
    encode_images(pictures, encoder, tmp_path / "one", batch_size=8)
    encode_images(pictures, spread, tmp_path / "eight", batch_size=5)
    assert_close_as_bfloat16(open_tokens(tmp_path / "eight").tokens[:], open_tokens(tmp_path / "one").tokens[:])


def test_a_batch_is_whole_and_stays_spread(encoder):
    """So that no program is compiled for each number of pictures; the padding is dropped on the host."""
    spread = make_encoder(mesh=make_mesh(2, 2, 2))
    tokens = spread.encode([PICTURES[0]], 8)
    assert tokens.shape == (8, 4, 8)
    assert [shard.data.shape for shard in tokens.addressable_shards] == [(2, 4, 8)] * 8
    assert_close_as_bfloat16(np.asarray(tokens[:1], np.float32), tower([released_on_host(PICTURES[0], 28)]))


def test_the_description_is_of_the_weights_wherever_they_are(encoder):
    """By the recipe, from the host's arrays; the encoder keeps none."""
    spread = make_encoder(mesh=make_mesh(2, 2, 2))
    assert not any(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(vars(spread)))
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(PARAMS):
        digest.update(jax.tree_util.keystr(path).encode() + leaf.tobytes())
    assert spread.description["tower"]["weights"] == digest.hexdigest()
    assert spread.description == encoder.description


def test_hugging_faces_preprocessing(tmp_path):
    pictures = make_pictures([(40, 60), (70, 33), (28, 28)])
    encode_images(pictures, make_encoder(preprocessing="hugging_face"), tmp_path)
    config = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    expected = tower(hugging_face([pictures[i] for i in range(3)], config))
    assert_close_as_bfloat16(open_tokens(tmp_path).tokens[:], expected)


def test_many_sizes_compile_two_programs(tmp_path):
    """One resizes on the devices, for the first picture's size; the other takes what was resized on the host."""
    encoder = make_encoder()
    sizes = [(20, 30)] * 4 + [(20 + i, 33) for i in range(12)] + [(20, 30)] * 4
    encode_images(make_pictures(sizes), encoder, tmp_path, batch_size=2)
    assert encoder._encode._cache_size() == 2


def test_large_pictures_are_shrunk_while_they_are_read(monkeypatch, tmp_path):
    monkeypatch.setattr(encoding, "_LARGEST_ON_DEVICE", 20 * 30)
    sent = []
    monkeypatch.setattr(PictureEncoder, "encode", recorded(PictureEncoder.encode, sent))
    for sizes in ([(20, 30)] * 2, [(20, 31)] * 2):
        encode_images(make_pictures(sizes), make_encoder(), tmp_path / str(sizes[0][1]))
    assert [[array.shape for array in batch] for batch in sent] == [[(20, 30, 3)] * 2, [(28, 28, 3)] * 2]


def recorded(method, seen):
    def call(self, prepared, rows):
        seen.append(prepared)
        return method(self, prepared, rows)

    return call


def test_bfloat16_weights_and_computation_are_close(tmp_path):
    pictures = make_pictures(SIZES)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    half = PictureEncoder(dataclasses.replace(CONFIG, dtype="bfloat16"), params, mesh=ONE)
    encode_images(pictures, half, tmp_path)
    expected = tower([released_on_host(pictures[i], 28) for i in range(len(SIZES))])
    difference = open_tokens(tmp_path).tokens[:] - expected
    assert 1e-4 < np.sqrt(np.mean(difference**2) / np.mean(expected**2)) < 0.05


# ---- on disk -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored_folder(encoder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "_SHARD", 4)
        encode_images(make_pictures(SIZES), encoder, folder, batch_size=4)
    return folder


def test_tfds_reads_the_folder(stored_folder):
    source = tfds.builder_from_directory(stored_folder).as_data_source("train")
    stored = open_tokens(stored_folder)
    assert [record["stimulus_id"].decode() for record in source] == list(stored.stimulus_id)
    assert source[3]["tokens"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(source[3]["tokens"].astype(np.float32), stored.tokens[3])
    assert len(list(stored_folder.glob("*.array_record-*-of-00003"))) == 3


def test_stored_tokens_are_indexed_like_an_array(stored_folder):
    tokens = open_tokens(stored_folder).tokens
    array = np.stack([tokens[i] for i in range(len(tokens))])
    assert (array.shape, array.dtype) == (tokens.shape, tokens.dtype)
    for rows in (-1, np.int32(4), slice(2, 7), slice(None, None, -3), slice(0, 0), [5, 1, 1], np.array([0, -2])):
        np.testing.assert_array_equal(tokens[rows], array[rows])
    for wrong in (len(array), -len(array) - 1):
        with pytest.raises(IndexError):
            tokens[wrong]
    with pytest.raises(TypeError):
        tokens["a"]


def test_a_folder_without_a_complete_set_is_named(stored_folder, tmp_path):
    with pytest.raises(InputError, match=r"no complete set of tokens is here \(stimuli\.npz is missing\)"):
        open_tokens(tmp_path)
    shutil.copytree(stored_folder, tmp_path / "other")
    np.savez(tmp_path / "other" / "stimuli.npz", stimulus_id=np.array(["a"]))
    with pytest.raises(InputError, match="11 records but 1 names"):
        open_tokens(tmp_path / "other")


def experiment(names) -> dict[str, np.ndarray]:
    """Twelve trials of the first six pictures."""
    fmri = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)
    return dict(fmri=fmri, stimulus_id=np.array(names[:6] * 2), split=np.repeat(["train", "validation", "test"], 4))


def test_arrays_take_their_tokens_from_the_folder(stored_folder, tmp_path):
    stored = open_tokens(stored_folder)
    fields = experiment(stored.stimulus_id)
    np.savez(tmp_path / "bare.npz", **fields)
    np.savez(tmp_path / "full.npz", **fields, tokens=stored.tokens[:], tokens_stimulus_id=np.array(stored.stimulus_id))
    bare = DataConfig(builder="arrays", source=str(tmp_path / "bare.npz"), tokens=str(stored_folder))
    full = DataConfig(builder="arrays", source=str(tmp_path / "full.npz"))
    found, expected = (open_dataset(*prepare_data(config, tmp_path / "data")) for config in (bare, full))
    for split in ("train", "validation", "test"):
        assert found.stimulus_ids(split) == expected.stimulus_ids(split)
        for one, other in zip(found.records(split), expected.records(split), strict=True):
            np.testing.assert_array_equal(one.tokens, other.tokens)
            np.testing.assert_array_equal(one.fmri, other.fmri)
    with pytest.raises(InputError, match=r"full\.npz: has a field 'tokens', so do not give the tokens"):
        prepare_arrays(tmp_path / "full.npz", tmp_path / "data", name="both", tokens=stored_folder)


def test_other_tokens_are_another_data_set(stored_folder, encoder, tmp_path):
    np.savez(tmp_path / "bare.npz", **experiment(open_tokens(stored_folder).stimulus_id))
    files = ["--source", tmp_path / "bare.npz", "--data-dir", tmp_path / "data", "--tokens", stored_folder]
    main(["prepare", "arrays", "--name", "a", *map(os.fspath, files)])
    prepare_arrays(tmp_path / "bare.npz", tmp_path / "data", name="a", tokens=stored_folder)  # the same: no error
    other = PictureEncoder(CONFIG, random_params(1), mesh=ONE)
    encode_images(make_pictures(SIZES), other, tmp_path / "tokens")
    with pytest.raises(InputError, match="already prepared from other arrays"):
        prepare_arrays(tmp_path / "bare.npz", tmp_path / "data", name="a", tokens=tmp_path / "tokens")


# ---- killed and started again ------------------------------------------------------------------------------

INTERRUPTED = """
import sys, time
sys.path.append("tests")
import test_encoding as t
t.encoding._SHARD = 4
hang = lambda index: time.sleep(600) if index == 13 else None
pictures = t.make_pictures([(20, 30)] * 18, before=hang)
t.encode_images(pictures, t.make_encoder(), sys.argv[1], batch_size=2, num_threads=1)
"""


@pytest.mark.usefixtures("small_shards")
def test_killed_and_started_again_it_goes_on(encoder, tmp_path):
    out = tmp_path / "tokens"
    process = subprocess.Popen([sys.executable, "-c", INTERRUPTED, os.fspath(out)], cwd=Path(__file__).parents[1])
    until = time.monotonic() + 120
    while not list(out.glob("*-00001-of-00005")):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {path: path.stat() for path in out.glob("*-of-00005")}
    assert len(done) == 2
    with pytest.raises(InputError, match="no complete set of tokens"):
        open_tokens(out)
    (out / "tokens-train.array_record-00002-of-00005.unfinished").write_bytes(b"half a shard")

    read = []
    pictures = make_pictures([(20, 30)] * 18, before=read.append)
    assert encode_images(pictures, encoder, out, batch_size=2).encoded == 18
    assert sorted(read) == [0, *range(8, 18)]  # the first one's size is looked up
    assert all(path.stat() == before for path, before in done.items())
    assert not list(out.glob("*.unfinished"))

    read.clear()
    before = files_of(out)
    assert encode_images(pictures, encoder, out, batch_size=2).encoded == 18
    assert read == []
    assert files_of(out) == before

    encode_images(pictures, encoder, tmp_path / "whole", batch_size=2)
    np.testing.assert_array_equal(open_tokens(out).tokens[:], open_tokens(tmp_path / "whole").tokens[:])


@pytest.mark.usefixtures("small_shards")
def test_stopped_before_the_end_it_only_ends(encoder, tmp_path):
    """All shards are there but not the file that makes the set complete; the batch size may have changed."""
    pictures = make_pictures([*SIZES, None])
    result = encode_images(pictures, encoder, tmp_path, batch_size=2)
    before = files_of(tmp_path)
    (tmp_path / "stimuli.npz").unlink()
    (tmp_path / "dataset_info.json").write_text("{")
    assert encode_images(pictures, encoder, tmp_path, batch_size=7) == result
    assert files_of(tmp_path) == before


@pytest.mark.usefixtures("small_shards")
def test_a_failure_leaves_the_complete_shards(encoder, tmp_path):
    def fail(index):
        if index == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_images(make_pictures(SIZES, before=fail), encoder, tmp_path, batch_size=2, num_threads=0)
    assert [path.name[-14:] for path in sorted(tmp_path.glob("*-of-*"))] == ["00000-of-00003"]
    assert encode_images(make_pictures(SIZES), encoder, tmp_path, batch_size=2).encoded == len(SIZES)


@pytest.mark.usefixtures("small_shards")
def test_a_shard_that_cannot_be_written_stops_the_run(encoder, tmp_path, monkeypatch):
    def write(path, *_):
        if "-00000-of-" in path.name:
            raise OSError("the disk is full")
        (tmp_path / path.name).touch()

    monkeypatch.setattr(encoding, "write_shard", write)
    with pytest.raises(OSError, match="the disk is full"):
        encode_images(PICTURES, encoder, tmp_path, batch_size=4)
    assert not (tmp_path / "stimuli.npz").exists()


def test_a_cut_shard_is_named(encoder, tmp_path):
    encode_images(PICTURES, encoder, tmp_path)
    shard = next(tmp_path.glob("*-00000-of-*"))
    whole = shard.read_bytes()
    for size in (5000, len(whole) - 1, None):
        shard.unlink() if size is None else shard.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"-00000-of-00001: the shard is damaged \(.*\)\. Delete it and give"):
            open_tokens(tmp_path)
        if size is not None:
            with pytest.raises(InputError, match=r"-00000-of-00001: the shard is damaged"):
                encode_images(PICTURES, encoder, tmp_path)
    encode_images(PICTURES, encoder, tmp_path)
    assert len(open_tokens(tmp_path).tokens[:]) == len(SIZES)


@pytest.mark.parametrize("content", ['{"source": "a', "3"])
def test_a_damaged_manifest_is_named(content, encoder, tmp_path):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(InputError, match=r"manifest\.json: is damaged .* Delete the folder"):
        encode_images(PICTURES, encoder, tmp_path)


def test_a_place_for_something_else_is_refused(encoder, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file: is a file; expected a folder"):
        encode_images(PICTURES, encoder, tmp_path / "file")
    (tmp_path / "features.json").touch()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match="holds another data set"):
        encode_images(PICTURES, encoder, tmp_path)
    assert sorted(tmp_path.iterdir()) == before


def test_a_shard_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="zip"):
        write_shard(epath.Path(tmp_path) / "shard", ["a", "b"], np.zeros((1, 2, 3), jnp.bfloat16))
    assert not list(tmp_path.iterdir())


def changed(array):
    array = array.copy()
    array.flat[0] += 1
    return array


@pytest.mark.parametrize(
    ("pictures", "options", "message"),
    [
        (make_pictures(SIZES, "elsewhere"), {}, r"source: '/.*memory' there, '/.*elsewhere' here"),
        (make_pictures(SIZES[:-1]), {}, r"pictures: 0 new, 1 gone, e\.g\. 'p10\.png'"),
        (make_pictures([*SIZES, (3, 3)]), {}, r"pictures: 1 new, 0 gone, e\.g\. 'p11\.png'"),
        (dataclasses.replace(PICTURES, names=PICTURES.names[::-1]), {}, "pictures: in another order"),
        (dataclasses.replace(PICTURES, background=(0, 0, 0)), {}, r"background: \[255, 255, 255\] there"),
        (PICTURES, {"preprocessing": "hugging_face"}, "preprocessing: 'released' there, {'size'"),
        (PICTURES, {"config": dataclasses.replace(CONFIG, heads=1)}, "tower.heads: 2 there, 1 here"),
        (PICTURES, {"params": jax.tree.map(changed, PARAMS)}, "tower.weights: '"),
    ],
    ids=["source", "fewer", "more", "order", "background", "preprocessing", "tower", "weights"],
)
def test_a_folder_takes_no_tokens_of_something_else(pictures, options, message, stored_folder):
    options = dict(config=CONFIG, params=PARAMS, mesh=ONE) | options
    before = files_of(stored_folder)
    with pytest.raises(InputError, match=message):
        encode_images(pictures, PictureEncoder(**options), stored_folder)
    assert files_of(stored_folder) == before


# ---- bad pictures ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_shards")
def test_pictures_that_cannot_be_read_are_named_and_the_rest_is_encoded(encoder, tmp_path):
    """The first one, some of a shard, a whole shard, the last one."""
    sizes = [None, (20, 30), None, (9, 9), *[None] * 4, (20, 30), (20, 30), None]
    pictures = make_pictures(sizes)
    result = encode_images(pictures, encoder, tmp_path, batch_size=2)
    bad = [i for i, size in enumerate(sizes) if size is None]
    assert result.encoded == 4
    assert result.unreadable == {f"p{i}.png": f"picture {i}: the picture is damaged" for i in bad}
    lines = [f"p{i}.png\tpicture {i}: the picture is damaged\n" for i in bad]
    assert (tmp_path / "unreadable.txt").read_text() == "".join(lines)
    stored = open_tokens(tmp_path)
    assert stored.stimulus_id == ("p1.png", "p3.png", "p8.png", "p9.png")
    assert_close_as_bfloat16(stored.tokens[:], tower([released_on_host(pictures[i], 28) for i in (1, 3, 8, 9)]))
    assert encode_images(pictures, encoder, tmp_path, batch_size=2) == result


def test_if_none_can_be_read_only_the_list_is_left(encoder, tmp_path):
    (tmp_path / "mine.txt").write_text("a file of the user")
    result = encode_images(make_pictures([None] * 3), encoder, tmp_path)
    assert (result.encoded, len(result.unreadable)) == (0, 3)
    assert {path.name for path in tmp_path.iterdir()} == {"mine.txt", "unreadable.txt"}
    assert encode_images(make_pictures([(20, 30)] * 3), encoder, tmp_path).encoded == 3


def test_a_picture_that_was_repaired_after_a_kill_is_no_longer_listed(encoder, tmp_path):
    """Killed between the note of a shard and the shard itself."""
    encode_images(make_pictures([(20, 30), None]), encoder, tmp_path)
    for path in [*tmp_path.glob("*.array_record-*"), tmp_path / "stimuli.npz"]:
        path.unlink()
    result = encode_images(make_pictures([(20, 30)] * 2), encoder, tmp_path)
    assert (result.encoded, result.unreadable) == (2, {})
    assert (tmp_path / "unreadable.txt").read_text() == ""


def test_a_programming_error_is_not_a_bad_picture(encoder, tmp_path):
    def fail(index):
        if index == 3:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        encode_images(make_pictures(SIZES, before=fail), encoder, tmp_path)


def test_tokens_that_are_not_finite_are_refused(tmp_path):
    broken = jax.tree.map(lambda leaf: leaf * np.float32(np.nan), PARAMS)
    with pytest.raises(InputError, match=r"picture 'p0\.png': its tokens are not finite"):
        encode_images(make_pictures(SIZES), PictureEncoder(CONFIG, broken, mesh=ONE), tmp_path)
    assert not list(tmp_path.glob("*.array_record-*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preprocessing": "plain"}, "preprocessing is 'plain'"),
        ({"preprocessing": "hugging_face", "processor_config": {}}, "makes pictures of side 224; the tower takes 28"),
    ],
)
def test_an_encoder_that_cannot_work_is_refused_at_once(options, message):
    with pytest.raises(InputError, match=message):
        make_encoder(**options)


def test_a_batch_holds_something(encoder, tmp_path):
    with pytest.raises(InputError, match="batch_size is 0"):
        encode_images(make_pictures(SIZES), encoder, tmp_path, batch_size=0)


# ---- on to fMRI --------------------------------------------------------------------------------------------


def make_bundle(width=tiny.WIDTH) -> Bundle:
    config = tiny.config()
    config = dataclasses.replace(
        config,
        brain_vae=dataclasses.replace(config.brain_vae, latent_dim=width),
        mapper=dataclasses.replace(config.mapper, width=width),
    )
    voxels = Voxels("s", "none", None, None, None, None, np.arange(tiny.VOXELS, dtype=np.int32))
    std = np.full((tiny.TOKENS, width), 0.5, np.float32)
    return Bundle.uncorrected(config, tiny.random_params(config), voxels, "test/tiny", std)


@pytest.fixture(scope="module")
def system() -> SynBrain:
    return SynBrain(make_bundle(), ONE)


@pytest.mark.parametrize("options", [{}, {"k": 2, "variability": "posterior", "noise_factor": 0.5}])
def test_pictures_to_fmri_is_tokens_to_fmri(system, encoder, options, tmp_path):
    """Through the disk and directly, the tokens being rounded the same way; samples do not know about batches."""
    pictures = make_pictures([*SIZES[:6], None, *SIZES[6:]])
    encode_images(pictures, encoder, tmp_path, batch_size=4)
    stored, key = open_tokens(tmp_path), jax.random.key(3)
    expected = system.synthesize(stored.tokens[:], key, batch_size=4, **options)
    found = synthesize_pictures(system, encoder, pictures, key, batch_size=4, **options)
    assert tuple(found.stimulus_id) == stored.stimulus_id
    assert list(found.unreadable) == ["p6.png"]
    np.testing.assert_allclose(found.fmri, expected, atol=2e-6 * np.abs(expected).max())
    assert np.ptp(expected, axis=0).min() > 1e-4


def test_no_picture_gives_no_response(system, encoder):
    found = synthesize_pictures(system, encoder, make_pictures([None]), k=2)
    assert (found.stimulus_id, found.fmri.shape) == ([], (0, 2, tiny.VOXELS))


def test_another_tower_than_the_models_is_refused_before_a_picture_is_read(encoder):
    read = []
    with pytest.raises(InputError, match=r"gives tokens \[4, 8\] but the model expects \[4, 16\]"):
        synthesize_pictures(SynBrain(make_bundle(16), ONE), encoder, make_pictures(SIZES, before=read.append))
    assert read == []


@pytest.mark.parametrize(("options", "message"), [({"k": -1}, "k is -1"), ({"variability": "posterior"}, "give a key")])
def test_wrong_options_are_refused_before_a_picture_is_read(system, encoder, options, message):
    read = []
    with pytest.raises(InputError, match=message):
        synthesize_pictures(system, encoder, make_pictures(SIZES, before=read.append), **options)
    assert read == []


# ---- the commands ------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    """Five pictures of three kinds in a folder, and two files that are none."""
    (tmp_path / "pictures").mkdir()
    pictures = make_pictures([(42, 42), (42, 42), (30, 50), (28, 28), (42, 42)])
    for index, kind in enumerate(["png", "jpg", "gif", "png", "bmp"]):
        Image.fromarray(pictures[index]).save(tmp_path / "pictures" / f"{index}.{kind}")
    (tmp_path / "pictures" / "5.png").touch()
    (tmp_path / "pictures" / "6.jpg").write_text("words")
    return tmp_path / "pictures"


NAMES = ("0.png", "1.jpg", "2.gif", "3.png", "4.bmp")


def test_the_commands_lead_from_pictures_to_fmri(folder, tmp_path, capsys):
    """Both ways, in one command and by way of tokens, with a Hugging Face tower."""
    common = ["--clip", os.fspath(CLIP), "--images", os.fspath(folder), "--batch-size", "8"]
    main(["encode-images", *common, "--out", os.fspath(tmp_path / "tokens")])
    captured = capsys.readouterr()
    assert "tokens: 5 pictures x 4 tokens x 32" in captured.out
    assert "warning: 2 of 7 pictures could not be read. All are listed in " in captured.err
    assert "6.jpg: not a picture" in captured.err
    config, params = load_clip_vision(CLIP)
    pictures = open_pictures(folder)
    pixels = np.stack([released_on_host(pictures[i], 28) for i in range(5)])
    expected = CLIPVision(config).apply({"params": params}, jnp.asarray(pixels)).tokens
    stored = open_tokens(tmp_path / "tokens")
    assert stored.stimulus_id == NAMES
    assert_close_as_bfloat16(stored.tokens[:], expected)

    save_bundle(tmp_path / "bundle", make_bundle(32))
    common += ["--model", os.fspath(tmp_path / "bundle"), "--k", "2", "--variability", "posterior"]
    main(["synthesize", *common, "--out", os.fspath(tmp_path / "direct.npz")])
    captured = capsys.readouterr()
    assert "5 stimuli x 2 samples x 40 voxels" in captured.out
    assert "2 of 7 pictures could not be read" in captured.err
    tokens = ["--tokens", os.fspath(tmp_path / "tokens"), *common[4:]]
    main(["synthesize", *tokens, "--out", os.fspath(tmp_path / "stored.npz")])
    direct, stored = (np.load(tmp_path / f"{name}.npz") for name in ("direct", "stored"))
    assert tuple(direct["stimulus_id"]) == tuple(stored["stimulus_id"]) == NAMES
    np.testing.assert_allclose(direct["fmri"], stored["fmri"], atol=2e-6 * np.abs(stored["fmri"]).max())


def test_stored_tokens_are_read_in_parts(stored_folder, system, tmp_path, monkeypatch):
    sizes, read = [], StoredTokens.__getitem__

    def counted(self, rows):
        found = read(self, rows)
        sizes.append(len(found) if found.ndim == 3 else 1)
        return found

    save_bundle(tmp_path / "bundle", make_bundle())
    arguments = ["--model", tmp_path / "bundle", "--tokens", stored_folder, "--out", tmp_path / "out.npz"]
    monkeypatch.setattr(StoredTokens, "__getitem__", counted)
    main(["synthesize", *map(os.fspath, arguments), "--batch-size", "1", "--k", "2", "--variability", "posterior"])
    assert max(sizes) == 8 < len(SIZES)
    expected = system.synthesize(open_tokens(stored_folder).tokens[:], jax.random.key(0), k=2, variability="posterior")
    found = np.load(tmp_path / "out.npz")["fmri"]
    np.testing.assert_allclose(found, expected, atol=2e-6 * np.abs(expected).max())


def test_rows_that_are_left_out_are_told(folder, tmp_path, capsys):
    """Every one of them in an .npz, however many; an .npy cannot tell."""
    for index in range(12):
        (folder / f"empty{index}.png").touch()
    with open(os.path.join(os.fsencode(folder), b"caf\xe9.png"), "wb") as file:
        file.write((folder / "0.png").read_bytes())
    save_bundle(tmp_path / "bundle", make_bundle(32))
    arguments = ["--clip", CLIP, "--images", folder, "--model", tmp_path / "bundle", "--batch-size", "8", "--out"]
    with pytest.raises(SystemExit), plain_errors():
        main(["synthesize", *map(os.fspath, arguments), os.fspath(tmp_path / "out.npy")])
    assert "out.npy: an .npy cannot say which pictures have no row" in capsys.readouterr().err
    assert not (tmp_path / "out.npy").exists()
    main(["synthesize", *map(os.fspath, arguments), os.fspath(tmp_path / "out.npz")])
    assert "and 5 more" in capsys.readouterr().err
    found = np.load(tmp_path / "out.npz")
    assert tuple(found["stimulus_id"]) == NAMES
    bad = {"5.png", "6.jpg", r"caf\xe9.png", *(f"empty{index}.png" for index in range(12))}
    assert set(found["unreadable"][:, 0]) == bad
    assert {why.split(": ")[1] for name, why in found["unreadable"] if "empty" in name} == {
        "the file is empty; expected a picture."
    }
    main(["encode-images", *map(os.fspath, [*arguments[:4], "--out", tmp_path / "tokens"])])
    assert "note: " not in capsys.readouterr().err
    assert open_tokens(tmp_path / "tokens").stimulus_id == NAMES
    assert r"caf\xe9.png" in (tmp_path / "tokens" / "unreadable.txt").read_text()


def test_files_that_are_passed_over_are_told(folder, tmp_path, capsys):
    (folder / "7.heic").touch()
    main(
        ["encode-images", "--clip", os.fspath(CLIP), "--images", os.fspath(folder), "--out", os.fspath(tmp_path / "t")]
    )
    assert f"note: {folder}: files passed over: 1 (no pictures" in capsys.readouterr().err


def test_a_processor_comes_from_the_hub_with_the_weights(tmp_path, monkeypatch):
    shutil.copytree(CLIP, tmp_path / "hub")
    config = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}, "image_std": [0.5, 0.5, 0.5]}
    (tmp_path / "hub" / "preprocessor_config.json").write_text(json.dumps(config))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: os.fspath(tmp_path / "hub"))
    encoder = load_encoder("org/name", mesh=ONE, preprocessing="hugging_face")
    assert encoder.description["preprocessing"] == config


def test_options_of_the_command_reach_the_encoder(folder, tmp_path):
    shutil.copytree(CLIP, tmp_path / "clip")
    config = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}, "image_mean": [0.5, 0.5, 0.5]}
    (tmp_path / "clip" / "preprocessor_config.json").write_text(json.dumps(config))
    arguments = ["--clip", os.fspath(tmp_path / "clip"), "--images", os.fspath(folder), "--batch-size", "8"]
    arguments += ["--preprocessing", "hugging_face", "--dtype", "bfloat16", "--background", "1", "2", "3"]
    main(["encode-images", *arguments, "--out", os.fspath(tmp_path / "tokens")])
    manifest = json.loads((tmp_path / "tokens" / "manifest.json").read_text())
    assert manifest["preprocessing"] == config
    assert manifest["tower"]["dtype"] == "bfloat16"
    assert manifest["background"] == [1, 2, 3]
    (tmp_path / "clip" / "preprocessor_config.json").write_text("{")
    with pytest.raises(InputError, match=r"preprocessor_config\.json: not JSON"):
        load_encoder(tmp_path / "clip")


@pytest.mark.parametrize("command", ["encode-images", "synthesize"])
def test_if_no_picture_can_be_read_the_command_fails(command, folder, tmp_path, capsys):
    for name in NAMES:
        (folder / name).unlink()
    save_bundle(tmp_path / "bundle", make_bundle(32))
    arguments = [command, "--clip", os.fspath(CLIP), "--images", os.fspath(folder), "--out"]
    model = [] if command == "encode-images" else ["--model", os.fspath(tmp_path / "bundle")]
    with pytest.raises(SystemExit) as raised, plain_errors():
        main([*arguments, os.fspath(tmp_path / "out.npz"), *model])
    assert raised.value.code == 1
    assert "error: 2 of 2 pictures could not be read" in capsys.readouterr().err
    assert not (tmp_path / "out.npz").is_file()


@pytest.mark.parametrize(
    "given", [[], ["--tokens", "a.npy", "--images", "b", "--clip", "c"], ["--images", "b"], ["--clip", "c"]]
)
def test_tokens_or_pictures_with_a_tower(given, capsys):
    with pytest.raises(SystemExit) as raised, plain_errors():
        main(["synthesize", "--model", "m", "--out", "o.npz", *given])
    assert raised.value.code == 2
    assert "expected either --tokens, or --images and --clip" in capsys.readouterr().err


def test_every_kind_of_source_gives_the_same_tokens(encoder, tmp_path):
    """A brick, a folder, a list and a TFDS data set of the same four pictures."""
    images = np.random.default_rng(0).integers(0, 256, (4, 20, 30, 3), dtype=np.uint8)
    (tmp_path / "folder").mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "folder" / f"{index}.png")
    with h5py.File(tmp_path / "brick.hdf5", "w") as file:
        file["imgBrick"] = images
    (tmp_path / "list.txt").write_text("".join(f"folder/{index}.png\n" for index in range(4)))
    sources = ["folder", "brick.hdf5", "list.txt", image_dataset(tmp_path, tmp_path / "folder")]
    expected = tower([released_on_host(image, 28) for image in images])
    names = []
    for number, source in enumerate(sources):
        out = tmp_path / f"tokens{number}"
        encode_images(open_pictures(tmp_path / source), encoder, out, batch_size=4)
        stored = open_tokens(out)
        assert_close_as_bfloat16(stored.tokens[:], expected)
        names.append(stored.stimulus_id[2])
    assert names == ["2.png", "2", "folder/2.png", "train/2"]


def image_dataset(data_dir: Path, folder: Path) -> Path:
    class Snaps(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        code_path = None
        name = "snaps"

        def _info(self):
            features = tfds.features.FeaturesDict({"image": tfds.features.Image(shape=(None, None, 3))})
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, _):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for index, file in enumerate(sorted(folder.iterdir())):
                yield index, {"image": io.BytesIO(file.read_bytes())}

    builder = Snaps(data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare(download_dir=data_dir / "nothing")
    return builder.data_dir
