"""Responses on disk: the bits of `synthesize`, whatever stopped the writing; overlapped, and in memory that stays."""

import dataclasses
import fcntl
import json
import os
import resource
import threading
import tracemalloc
import weakref
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from test_encoding import make_bundle as make_picture_bundle
from test_encoding import make_encoder, make_pictures
from test_synthesis import BUNDLE, KEY, ONE, make_bundle

from synbrain_jax import response_files, synthesis
from synbrain_jax.cli import main, plain_errors, systems
from synbrain_jax.data.tokens import StoredTokens
from synbrain_jax.errors import InputError, NotStored
from synbrain_jax.files import map_array
from synbrain_jax.response_files import ResponseFolder
from synbrain_jax.streaming import stream_pictures, stream_tokens
from synbrain_jax.synthesis import SynBrain, one_ahead

ROWS, K = 4, 2
DRAW = dict(k=K, variability="posterior", batch_size=ROWS)
TOKENS = np.random.default_rng(1).normal(size=(11, tiny.TOKENS, tiny.WIDTH)).astype(np.float32)  # 4 + 4 + 3


@pytest.fixture(scope="module")
def model() -> SynBrain:
    return SynBrain(BUNDLE, ONE)


@pytest.fixture(scope="module")
def expected(model) -> np.ndarray:
    return model.synthesize(TOKENS, KEY, **DRAW)


class Interrupted(Exception):
    pass


@pytest.fixture
def sent(model, monkeypatch):
    """Numbers of the first stimulus of each batch that was sent to the devices; `stop_at` interrupts before one."""

    class Sent(list):
        stop_at = None

    batches, real = Sent(), model._decode

    def decode(params, tokens, index, **settings):
        if index[0] == batches.stop_at:
            raise Interrupted
        batches.append(int(index[0]))
        return real(params, tokens, index, **settings)

    monkeypatch.setattr(model, "_decode", decode)
    return batches


def interrupted(sent, at, model, out, tokens=TOKENS) -> None:
    """Leaves `out` as something does that goes wrong when the batch of stimulus `at` is to be sent."""
    sent.stop_at = at
    with pytest.raises(Interrupted):
        stream_tokens(model, tokens, out, KEY, **DRAW)
    sent.stop_at = None
    sent.clear()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 4, 9, 11])
def test_the_file_holds_what_synthesize_gives(model, count, tmp_path):
    """For tails of 0, 1, 4, 1 and 3 stimuli: NumPy alone reads it."""
    expected = model.synthesize(TOKENS[:count], KEY, **DRAW)
    ids = np.array([f"p{i}" for i in range(count)])
    found = stream_tokens(model, TOKENS[:count], tmp_path / "new" / "out", KEY, stimulus_id=ids, **DRAW)
    fmri = np.load(tmp_path / "new" / "out" / "fmri.npy", mmap_mode="r")
    assert fmri.dtype == np.float32
    np.testing.assert_array_equal(fmri, expected)
    np.testing.assert_array_equal(found.fmri, expected)
    np.testing.assert_array_equal(np.load(tmp_path / "new" / "out" / "stimulus_id.npy"), ids)
    assert names(tmp_path / "new" / "out") == ["fmri.npy", "stimulus_id.npy", "synthesis.json"]


def test_tokens_on_disk_and_of_other_types_are_those_numbers(model, expected, tmp_path):
    np.save(tmp_path / "tokens.npy", TOKENS)
    stored = StoredTokens(lambda row: TOKENS[row], TOKENS.shape)
    for number, tokens in enumerate([map_array(tmp_path / "tokens.npy"), stored, TOKENS.astype(np.float64)]):
        found = stream_tokens(model, tokens, tmp_path / f"{number}", KEY, **DRAW)
        np.testing.assert_array_equal(found.fmri, expected)


# ---- stopped ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("at", "left"), [(8, [4, 8]), (4, [0, 4, 8])])
def test_what_was_interrupted_goes_on_with_the_same_bits(model, sent, expected, at, left, tmp_path):
    """Behind the last batch that was fetched, which is the one before the last that was sent."""
    interrupted(sent, at, model, tmp_path / "out")
    assert not (tmp_path / "out" / "fmri.npy").exists()
    found = stream_tokens(model, TOKENS, tmp_path / "out", KEY, **DRAW)
    assert sent == left
    np.testing.assert_array_equal(found.fmri, expected)


HALF = ROWS * K * tiny.VOXELS * 4 // 2


@pytest.mark.parametrize(
    ("fmri", "journal", "left"),
    [
        (lambda whole: whole + b"x" * HALF, lambda lines: lines, [4, 8]),
        (lambda whole: whole + b"x" * 2 * HALF, lambda lines: lines + b'{"seen": 8, "rows": 8, "unread', [4, 8]),
        (lambda whole: whole + b"x" * HALF, lambda lines: lines + lines.replace(b"4", b"8"), [4, 8]),
        (lambda whole: whole[:-1], lambda lines: lines, [0, 4, 8]),
        (lambda whole: whole[:50], lambda lines: b"", [0, 4, 8]),
        (lambda whole: None, lambda lines: lines, [0, 4, 8]),
    ],
    ids=["half a batch", "not noted", "noted too early", "cut off", "half a header", "gone"],
)
def test_half_a_batch_is_not_taken_for_one(model, sent, expected, fmri, journal, left, tmp_path):
    """What a kill or a power cut may leave, at each point of writing a batch."""
    interrupted(sent, 8, model, tmp_path)
    file, notes = tmp_path / "fmri.npy.unfinished", tmp_path / "batches.jsonl"
    content = fmri(file.read_bytes())
    file.unlink() if content is None else file.write_bytes(content)
    notes.write_bytes(journal(notes.read_bytes()))
    found = stream_tokens(model, TOKENS, tmp_path, KEY, **DRAW)
    assert sent == left
    np.testing.assert_array_equal(found.fmri, expected)


def test_a_batch_is_on_the_disk_before_it_is_noted(model, tmp_path, monkeypatch):
    """Or a power cut could leave a note of what is not there."""
    on_disk, noted = [0], []
    monkeypatch.setattr(response_files.os, "fsync", lambda file: on_disk.append(os.fstat(file).st_size))
    write = response_files._write

    def recorded(file, content):
        if file.name.endswith("batches.jsonl"):
            noted.append((json.loads(content)["rows"], on_disk[-1]))
        write(file, content)

    monkeypatch.setattr(response_files, "_write", recorded)
    stream_tokens(model, TOKENS, tmp_path, KEY, **DRAW)
    row = K * tiny.VOXELS * 4
    header = on_disk[-1] - len(TOKENS) * row
    assert noted == [(rows, header + rows * row) for rows in (4, 8, 11)]


def test_a_kill_at_the_very_end_computes_nothing_again(model, sent, expected, tmp_path, monkeypatch):
    def killed(self, target):
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(Interrupted):
            stream_tokens(model, TOKENS, tmp_path, KEY, **DRAW)
    assert not (tmp_path / "fmri.npy").exists()
    sent.clear()
    found = stream_tokens(model, TOKENS, tmp_path, KEY, **DRAW)
    assert sent == []
    np.testing.assert_array_equal(found.fmri, expected)


def test_what_is_finished_is_not_made_again(model, sent, expected, tmp_path):
    stream_tokens(model, TOKENS, tmp_path, KEY, **DRAW)
    before = (tmp_path / "fmri.npy").stat()
    sent.clear()
    found = stream_tokens(model, TOKENS, tmp_path, KEY, **DRAW)
    assert sent == []
    assert (tmp_path / "fmri.npy").stat().st_mtime_ns == before.st_mtime_ns
    np.testing.assert_array_equal(found.fmri, expected)
    (tmp_path / "fmri.npy").write_bytes((tmp_path / "fmri.npy").read_bytes()[:-1])
    with pytest.raises(InputError, match=r"fmri\.npy: cannot be read"):
        stream_tokens(model, TOKENS, tmp_path, KEY, **DRAW)


def test_a_full_disk_is_told_and_what_was_written_is_kept(model, sent, expected, tmp_path):
    """A limit to the size of files is as much of a full disk as a user can make: 1.5 batches fit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (128 + 3 * HALF, hard))
    try:
        with pytest.raises(NotStored, match=r"cannot be written .*What was whole before is kept"):
            stream_tokens(model, TOKENS, tmp_path, KEY, **DRAW)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    sent.clear()
    np.testing.assert_array_equal(stream_tokens(model, TOKENS, tmp_path, KEY, **DRAW).fmri, expected)
    assert sent == [4, 8]


# ---- made otherwise --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("finished", [False, True])
def test_responses_that_were_made_otherwise_are_not_mixed(model, sent, finished, tmp_path):
    if finished:
        stream_tokens(model, TOKENS, tmp_path, KEY, **DRAW)
    else:
        interrupted(sent, 8, model, tmp_path)
    kept = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    other = TOKENS.copy()
    other[5, 0, 0] += 1
    for given, key, ids, changes, told in (
        (TOKENS, jax.random.key(6), None, {}, r"key: \[0, 5\] there, \[0, 6\] here"),
        (TOKENS, KEY, None, {"k": 3}, "k: 2 there, 3 here"),
        (TOKENS, KEY, None, {"variability": "latent_noise"}, "variability: 'posterior' there, 'latent_noise' here"),
        (TOKENS, KEY, None, {"noise_factor": 0.5}, "noise_factor: 1.0 there, 0.5 here"),
        (TOKENS, KEY, None, {"batch_size": 5}, "batch_size: 4 there, 5 here"),
        (TOKENS[:10], KEY, None, {}, "tokens: '"),
        (other, KEY, None, {}, "tokens: '"),
        (TOKENS, KEY, np.arange(11), {}, "tokens: '"),
    ):
        with pytest.raises(InputError, match=rf"made otherwise \({told}"):
            stream_tokens(model, given, tmp_path, key, stimulus_id=ids, **DRAW | changes)
    with pytest.raises(InputError, match=r"made otherwise \(model: '"):
        stream_tokens(SynBrain(make_bundle(gain=0.5), ONE), TOKENS, tmp_path, KEY, **DRAW)
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == kept


def test_a_model_is_another_with_anything_that_synthesis_uses(model):
    other = tiny.random_params(BUNDLE.config, seed=1)
    spread = dataclasses.replace(BUNDLE.spread, independent=2 * BUNDLE.spread.independent)
    changes = [{"gain": 0.5}, {"offset": BUNDLE.offset + 1}, {"latent_std": None}, {"spread": None}, {"spread": spread}]
    changes += [{"params": {**BUNDLE.params, part: other[part]}} for part in ("mapper", "brain_vae")]
    changes += [{"voxels": dataclasses.replace(BUNDLE.voxels, order=BUNDLE.voxels.order[::-1])}]
    bundles = [BUNDLE, make_bundle(prediction="v"), make_bundle(voxel_order="given")]
    bundles += [dataclasses.replace(BUNDLE, **change) for change in changes]
    assert len({SynBrain(bundle, ONE).digest for bundle in bundles}) == len(bundles)
    assert model.digest == SynBrain(make_bundle(), ONE).digest


def test_what_nothing_depends_on_may_differ(model, sent, tmp_path):
    """The seed, where nothing is drawn."""
    for seed in (1, 2):
        stream_tokens(model, TOKENS, tmp_path, jax.random.key(seed), k=K, noise_factor=float(seed), batch_size=ROWS)
    assert sent == [0, 4, 8]


def test_tokens_that_were_written_again_are_others(model, tmp_path):
    """Of a large file a row may have changed that is not looked at."""
    np.save(tmp_path / "tokens.npy", TOKENS)
    stream_tokens(model, map_array(tmp_path / "tokens.npy"), tmp_path / "out", KEY, **DRAW)
    os.utime(tmp_path / "tokens.npy", (1, 1))
    with pytest.raises(InputError, match=r"made otherwise \(tokens: '"):
        stream_tokens(model, map_array(tmp_path / "tokens.npy"), tmp_path / "out", KEY, **DRAW)
    for fingerprint, again in (("a", True), ("b", False)):
        stored = StoredTokens(lambda row: TOKENS[row], TOKENS.shape, fingerprint)
        if again:
            stream_tokens(model, stored, tmp_path / "stored", KEY, **DRAW)
        else:
            with pytest.raises(InputError, match=r"made otherwise \(tokens: '"):
                stream_tokens(model, stored, tmp_path / "stored", KEY, **DRAW)


def test_other_peoples_files_are_left_alone(model, tmp_path):
    np.save(tmp_path / "fmri.npy", np.zeros(3))
    with pytest.raises(InputError, match=r"holds other data \(fmri\.npy\)\. Give another folder"):
        stream_tokens(model, TOKENS, tmp_path, KEY, **DRAW)
    with pytest.raises(InputError, match=r"fmri\.npy: is a file; expected a folder"):
        stream_tokens(model, TOKENS, tmp_path / "fmri.npy", KEY, **DRAW)
    assert names(tmp_path) == ["fmri.npy"]
    assert np.load(tmp_path / "fmri.npy").shape == (3,)


def test_two_processes_do_not_write_one_folder(model, tmp_path):
    lock = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(InputError, match="another process is writing this folder"):
        stream_tokens(model, TOKENS, tmp_path, KEY, **DRAW)
    os.close(lock)
    stream_tokens(model, TOKENS, tmp_path, KEY, **DRAW)


def test_wrong_tokens_are_named_and_leave_nothing(model, tmp_path):
    bad = TOKENS.copy()
    bad[6, 2, 1] = np.nan
    with pytest.raises(InputError, match=r"tokens of stimulus 6 \(from 0\) hold values that are NaN"):
        stream_tokens(model, bad, tmp_path / "out", KEY, **DRAW)
    with pytest.raises(InputError, match=r"shape \[11, 3, 8\]; this model expects \[stimuli, 4, 8\]"):
        stream_tokens(model, TOKENS[:, 1:], tmp_path / "out", KEY, **DRAW)
    with pytest.raises(InputError, match="give a key"):
        stream_tokens(model, TOKENS, tmp_path / "out", **DRAW)
    assert names(tmp_path) == []


# ---- overlap and memory ----------------------------------------------------------------------------------------------


def test_an_element_is_handed_out_when_the_next_is_made():
    events = []

    def made():
        for number in range(3):
            events.append(f"made {number}")
            yield number

    for number in one_ahead(made()):
        events.append(f"used {number}")
    assert events == ["made 0", "made 1", "used 0", "made 2", "used 1", "used 2"]
    assert list(one_ahead(iter([]))) == []


def test_synthesize_sends_a_batch_before_it_fetches_the_one_before(model, monkeypatch):
    events, real = [], model._decode

    class Watched:
        def __getattr__(self, name):
            return getattr(np, name)

        @staticmethod
        def asarray(array, *args):
            if isinstance(array, jax.Array):
                events.append(f"fetched {int(array[0, 0, 0])}")
            return np.asarray(array, *args)

    def decode(params, tokens, index, **settings):
        events.append(f"sent {int(index[0])}")
        return real(params, tokens, index, **settings) * 0 + index[0].astype(np.float32)

    def copy(self):
        events.append("on its way")
        real_copy(self)

    kind = type(jax.device_put(0.0))
    real_copy = kind.copy_to_host_async
    monkeypatch.setattr(kind, "copy_to_host_async", copy)
    monkeypatch.setattr(model, "_decode", decode)
    monkeypatch.setattr(synthesis, "np", Watched())
    model.synthesize(TOKENS, KEY, **DRAW)
    assert events.count("on its way") == 3
    events = [event for event in events if event != "on its way"]
    assert events == ["sent 0", "sent 4", "fetched 0", "sent 8", "fetched 4", "fetched 8"]


def test_batches_are_sent_while_another_is_written(model, expected, tmp_path, monkeypatch):
    """The first batch is not on the disk before the third is sent; one that waited for the disk would never end."""
    third, real, real_decode = threading.Event(), ResponseFolder.append, model._decode

    def decode(params, tokens, index, **settings):
        found = real_decode(params, tokens, index, **settings)
        if index[0] == 8:
            third.set()
        return found

    def append(self, *args):
        assert third.wait(timeout=30), "nothing was sent meanwhile"
        real(self, *args)

    monkeypatch.setattr(model, "_decode", decode)
    monkeypatch.setattr(ResponseFolder, "append", append)
    np.testing.assert_array_equal(stream_tokens(model, TOKENS, tmp_path, KEY, **DRAW).fmri, expected)


@pytest.fixture
def idle(monkeypatch):
    """A system whose devices give copies of a constant at once; those that still live are counted at each batch."""
    model, alive, counts = SynBrain(BUNDLE, ONE), [], []

    def decode(params, tokens, index, *, k, **settings):
        found = jax.device_put(np.zeros((len(tokens), k, tiny.VOXELS), np.float32))
        alive[:] = [one for one in alive if one() is not None] + [weakref.ref(found)]
        counts.append(len(alive))
        return found

    monkeypatch.setattr(model, "_decode", decode)
    model.counts = counts
    return model


def test_memory_does_not_grow_with_the_number_of_stimuli(idle, tmp_path):
    """Peaks of 100 and 4,000 stimuli, whose responses take 1.3 MB and whose tokens .5 MB."""
    peaks = []
    for count in (100, 100, 4_000):
        np.save(tmp_path / f"{count}.npy", np.zeros((count, tiny.TOKENS, tiny.WIDTH), np.float32))
        tokens = map_array(tmp_path / f"{count}.npy")
        tracemalloc.start()
        found = stream_tokens(idle, tokens, tmp_path / f"out{len(peaks)}", k=K, batch_size=20)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert found.fmri.nbytes == 4_000 * K * tiny.VOXELS * 4
    assert peaks[2] - peaks[1] < 150_000, peaks
    assert 2 <= max(idle.counts) <= 3


# ---- pictures --------------------------------------------------------------------------------------------------------

SIZES = [(20, 30)] * 3 + [None] * 2 + [(20, 30)] * 2 + [None] * 5 + [(20, 30)] * 2  # batches of 3, 2, 0 and 2 rows


@pytest.fixture(scope="module")
def pictured():
    return SynBrain(make_picture_bundle(), ONE), make_encoder()


def test_pictures_are_streamed_around_those_that_cannot_be_read(pictured, tmp_path):
    """The bits of a run that nothing stopped, those of `synthesize` up to rounding, and rows that have names."""
    whole = stream_pictures(*pictured, make_pictures(SIZES), tmp_path / "whole", KEY, **DRAW)
    read = []

    def stop(index):
        read.append(index)
        if index == 12:
            raise Interrupted

    with pytest.raises(Interrupted):
        stream_pictures(*pictured, make_pictures(SIZES, before=stop), tmp_path / "out", KEY, num_threads=0, **DRAW)
    noted = [json.loads(line) for line in (tmp_path / "out" / "batches.jsonl").read_text().splitlines()]
    done = noted[-1]["seen"]
    assert 4 <= done < len(SIZES)
    read.clear()
    pictures = make_pictures(SIZES, before=read.append)
    found = stream_pictures(*pictured, pictures, tmp_path / "out", KEY, num_threads=0, **DRAW)
    assert sorted(set(read) - {0}) == list(range(done, len(SIZES)))  # the first one tells the size
    np.testing.assert_array_equal(found.fmri, whole.fmri)
    good = [i for i, size in enumerate(SIZES) if size]
    assert np.load(tmp_path / "out" / "stimulus_id.npy").tolist() == [f"p{i}.png" for i in good]
    bad = np.load(tmp_path / "out" / "unreadable.npy")
    assert bad[:, 0].tolist() == [f"p{i}.png" for i, size in enumerate(SIZES) if not size]
    assert bad[0, 1] == "picture 3: the picture is damaged"
    again = stream_pictures(*pictured, pictures, tmp_path / "out", KEY, **DRAW)
    assert again.unreadable == found.unreadable == dict(bad.tolist())
    assert names(tmp_path / "out") == ["fmri.npy", "stimulus_id.npy", "synthesis.json", "unreadable.npy"]
    alone = [make_pictures([None] * i + [(20, 30)]) for i in good]
    tokens = [pictured[1].encode([one[len(one) - 1]], ROWS)[0] for one in alone]
    expected = pictured[0].synthesize(np.asarray(tokens, np.float32), KEY, **DRAW)
    np.testing.assert_allclose(found.fmri, expected, atol=2e-6 * np.abs(expected).max())


def test_other_pictures_or_another_tower_are_told(pictured, tmp_path):
    stream_pictures(*pictured, make_pictures(SIZES[:2]), tmp_path, KEY, **DRAW)
    with pytest.raises(InputError, match=r"made otherwise \(pictures: '2, \w+' there, '3, \w+' here\)"):
        stream_pictures(*pictured, make_pictures(SIZES[:3]), tmp_path, KEY, **DRAW)
    other = make_encoder(preprocessing="hugging_face")
    with pytest.raises(InputError, match=r"made otherwise \(preprocessing"):
        stream_pictures(pictured[0], other, make_pictures(SIZES[:2]), tmp_path, KEY, **DRAW)


def test_pictures_of_which_none_can_be_read_leave_nothing(pictured, tmp_path):
    found = stream_pictures(*pictured, make_pictures([None] * 5), tmp_path / "out", KEY, **DRAW)
    assert found.fmri.shape == (0, K, tiny.VOXELS)
    assert len(found.unreadable) == 5
    assert names(tmp_path) == []


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_writes_a_folder_and_an_npz_alike(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(systems, "load_pretrained", lambda path, mesh: model)
    np.savez(tmp_path / "tokens.npz", tokens=TOKENS, stimulus_id=np.arange(11))
    command = ["synthesize", "--model", "bundle", "--tokens", "tokens.npz", "--k", "2", "--variability", "posterior"]
    command = [os.fspath(tmp_path / word) if word in ("bundle", "tokens.npz") else word for word in command]
    command += ["--batch-size", str(ROWS), "--seed", "5", "--out"]
    for out in ("out", "out", "out.npz"):
        main([*command, os.fspath(tmp_path / out)])
        assert "11 stimuli x 2 samples x 40 voxels" in capsys.readouterr().out
    whole = np.load(tmp_path / "out.npz")
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "fmri.npy"), whole["fmri"])
    assert np.load(tmp_path / "out" / "stimulus_id.npy").tolist() == whole["stimulus_id"].tolist() == list(range(11))
    for more, told in (
        (["out", "--seed", "6"], "made otherwise (key: [0, 5] there, [0, 6] here)"),
        (["new", "--nifti", "brain.nii"], "--nifti takes responses that fit into memory"),
        (["out.csv"], "expected a name that ends in .npz or .npy, or, for a folder, has no suffix"),
    ):
        with pytest.raises(SystemExit) as ended, plain_errors():
            main([*command, os.fspath(tmp_path / more[0]), *more[1:]])
        assert ended.value.code == 2
        assert told in capsys.readouterr().err
