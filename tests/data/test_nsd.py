"""NSD's files to records: every trial on its own stimulus, the numbers, what survives a kill, and the errors."""

import errno
import gzip
import os
import shutil
import tempfile
import threading
import tracemalloc
from collections import defaultdict
from pathlib import Path

import nibabel
import nsd_layout
import numpy as np
import pytest
import scipy.io
import scipy.stats
from nsd_layout import Layout, read_betas, write_hdf5, write_volume

from synbrain_jax.cli import main, plain_errors
from synbrain_jax.data import builder, nsd, nsd_download, nsd_files
from synbrain_jax.data.nsd import prepare_nsd
from synbrain_jax.data.pairs import Dataset, Record, open_dataset
from synbrain_jax.data.simulate import simulate_nsd
from synbrain_jax.errors import InputError

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def layout(tmp_path_factory) -> Layout:
    return nsd_layout.write_layout(tmp_path_factory.mktemp("nsd"))


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Layout:
    """Subject 1 with five sessions, not to be changed."""
    return nsd_layout.write_layout(tmp_path_factory.mktemp("small"), {1: 5})


@pytest.fixture
def mine(small, tmp_path) -> Layout:
    """A copy of `small` to be broken."""
    shutil.copytree(small.root, tmp_path / "nsd")
    return Layout(tmp_path / "nsd")


def prepared(layout: Layout, data_dir: Path, subject: int = 1, **options) -> Dataset:
    return open_dataset(prepare_nsd(layout.root, subject, data_dir, **dict(tokens=layout.tokens) | options))


def records(dataset: Dataset) -> dict[int, tuple[str, Record]]:
    """Picture -> its split and record."""
    found = {}
    for split in SPLITS:
        source = dataset.records(split)
        for index in range(len(source)):
            picture = int(source[index].stimulus_id)
            assert picture not in found
            found[picture] = (split, source[index])
    return found


def voxel_positions(layout: Layout, subject: int) -> list[tuple[int, int, int]]:
    mask = nibabel.load(layout.roi(subject, "nsdgeneral")).get_fdata()
    x, y, z = mask.shape
    return [(i, j, k) for i in range(x) for j in range(y) for k in range(z) if mask[i, j, k] > 0]


def trials_by_picture(layout: Layout, subject: int, sessions: int) -> dict[int, list[tuple]]:
    """Walks through the experiment as its files tell it: picture -> (trial, session, run, raw values) of each."""
    mat = scipy.io.loadmat(layout.design)
    positions = voxel_positions(layout, subject)
    seen, trial = defaultdict(list), 0
    for session in range(sessions):
        volume = read_betas(layout.session(subject, session + 1))
        within = 0
        for run, moments in enumerate(mat["stimpattern"][session]):
            for stimulus in moments:
                if not stimulus:
                    continue
                number = mat["subjectim"][subject - 1, int(mat["masterordering"][0, trial]) - 1]
                values = np.array([volume[i, j, k, within] for i, j, k in positions])
                seen[int(number) - 1].append((trial, session + 1, session * nsd_layout.RUNS + run, values))
                trial, within = trial + 1, within + 1
        assert within == volume.shape[3]
    return seen


# ---- every trial on its own stimulus ---------------------------------------------------------------------------------


@pytest.mark.parametrize("subject", [1, 3, 4])
def test_every_trial_lands_on_its_own_stimulus(subject, layout, tmp_path, capsys):
    dataset = prepared(layout, tmp_path, subject, normalisation="none")
    assert dataset.path.parent == tmp_path / "nsd" / f"subj{subject:02d}-none"
    expected = trials_by_picture(layout, subject, nsd_layout.SESSIONS[subject])
    found = records(dataset)
    assert found.keys() == expected.keys()
    for picture, (_, record) in found.items():
        trial, session, run, values = zip(*expected[picture], strict=True)
        np.testing.assert_array_equal(record.trial_index, trial)
        np.testing.assert_array_equal(record.session, session)
        np.testing.assert_array_equal(record.run, run)
        np.testing.assert_array_equal(record.fmri, (np.array(values) / 300).astype(np.float32))
        np.testing.assert_array_equal(record.tokens, nsd_layout.token_of(picture))
    assert {len(record.fmri) for _, record in found.values()} >= {1, 2, 3}
    assert max(record.session.max() for _, record in found.values()) == nsd_layout.SESSIONS[subject]
    assert capsys.readouterr().err == ""  # fewer sessions than planned are this subject's own


def test_scale2000_is_what_the_released_script_makes_of_the_same_files(layout, tmp_path):
    dataset = prepared(layout, tmp_path, 1, normalisation="scale2000")
    assert dataset.name == "nsd/subj01-scale2000"
    mat = scipy.io.loadmat(layout.design, squeeze_me=True)
    mask = nibabel.load(layout.roi(1, "nsdgeneral")).get_fdata()
    sessions = [read_betas(layout.session(1, number)).astype(np.float32)[mask > 0].T / 2000 for number in range(1, 41)]
    trials = np.concatenate(sessions)
    rows = {True: {}, False: {}}  # shared or not -> picture -> its trials, in the order of first presentation
    for trial, place in enumerate(mat["masterordering"]):
        picture = int(mat["subjectim"][0, place - 1]) - 1
        rows[bool(place <= nsd_layout.SHARED)].setdefault(picture, []).append(trial)
    held = set(map(int, dataset.stimulus_ids("validation")))
    released = {
        "test": rows[True],
        "train": {picture: where for picture, where in rows[False].items() if picture not in held},
        "validation": {picture: where for picture, where in rows[False].items() if picture in held},
    }
    for split, expected in released.items():
        assert dataset.stimulus_ids(split) == tuple(map(str, expected))
        source = dataset.records(split)
        for index, where in enumerate(expected.values()):
            assert trials[where].dtype == np.float32
            np.testing.assert_array_equal(source[index].fmri, trials[where])


def test_session_zscore_is_scipys_and_an_empty_voxel_is_zero(mine, tmp_path):
    values = read_betas(mine.session(1, 2)).astype(np.int16)
    (i, j, k), *_ = voxel_positions(mine, 1)
    values[i, j, k] = 0  # no data in this session
    write_volume(mine.session(1, 2), values)
    dataset = prepared(mine, tmp_path)
    assert dataset.name == "nsd/subj01"
    assert dataset.voxels.normalisation == "session_zscore"
    mask = np.array(voxel_positions(mine, 1)).T
    z = [
        scipy.stats.zscore(read_betas(mine.session(1, number))[tuple(mask)].T[:, 1:], ddof=1) for number in range(1, 6)
    ]
    by_trial = np.concatenate([record.fmri for _, record in records(dataset).values()])
    trial = np.concatenate([record.trial_index for _, record in records(dataset).values()])
    np.testing.assert_allclose(by_trial[np.argsort(trial), 1:], np.concatenate(z), rtol=1e-6, atol=1e-6)
    session = np.concatenate([record.session for _, record in records(dataset).values()])
    assert (by_trial[session == 2, 0] == 0).all()
    assert (by_trial[session != 2, 0] != 0).all()


def test_both_formats_and_both_at_once_give_the_same(small, mine, tmp_path):
    expected = records(prepared(small, tmp_path / "nifti"))
    for session in (1, 3, 4):
        write_hdf5(mine.session(1, session, "hdf5"), read_betas(mine.session(1, session)).astype(np.int16))
    mine.session(1, 1).unlink()
    mine.session(1, 3).write_bytes(b"not read, as the other is there")
    found = records(prepared(mine, tmp_path / "hdf5"))
    assert found.keys() == expected.keys()
    for picture, (split, record) in found.items():
        assert split == expected[picture][0]
        np.testing.assert_array_equal(record.fmri, expected[picture][1].fmri)


def test_whole_numbers_of_another_type_and_scale_are_read_exactly(mine, tmp_path):
    expected = records(prepared(mine, tmp_path / "int16", normalisation="none"))
    values = read_betas(mine.session(1, 1))
    write_volume(mine.session(1, 1), values.astype(">f4"))
    image = nibabel.Nifti1Image((read_betas(mine.session(1, 2)) / 2 - 3).astype(np.float32), nsd_layout.AFFINE)
    image.header.set_data_dtype(np.float32)
    image.header.set_slope_inter(2, 6)
    content = image.header.copy()
    content["vox_offset"], content["magic"] = 352, b"n+1"
    raw = content.binaryblock + bytes(4) + np.asarray(image.dataobj).tobytes(order="F")
    mine.session(1, 2).write_bytes(gzip.compress(raw))
    found = records(prepared(mine, tmp_path / "others", normalisation="none"))
    for picture, (_, record) in found.items():
        np.testing.assert_array_equal(record.fmri, expected[picture][1].fmri)


# ---- splits ----------------------------------------------------------------------------------------------------------


def shared_pictures(layout: Layout) -> set[int]:
    return {int(number) - 1 for number in scipy.io.loadmat(layout.design)["sharedix"].ravel()}


def test_test_is_what_all_see_and_validation_a_seeded_share_of_the_rest(small, tmp_path):
    shared, seen = shared_pictures(small), set(trials_by_picture(small, 1, 5))
    held = {}
    for seed, share in ((0, 0.1), (1, 0.1), (1, 0.4)):
        dataset = prepared(small, tmp_path / f"{seed} {share}", seed=seed, validation_share=share)
        ids = {split: set(map(int, dataset.stimulus_ids(split))) for split in SPLITS}
        assert ids["test"] == shared & seen
        assert ids["train"] | ids["validation"] == seen - shared
        assert not ids["train"] & ids["validation"]
        assert len(ids["validation"]) == round(share * len(seen - shared))
        held[seed, share] = ids["validation"]
    assert held[0, 0.1] != held[1, 0.1]
    assert dataset.name == "nsd/subj01-seed1"


def test_test515_is_what_all_saw_three_times_and_validation_the_other_shared_ones(layout, tmp_path):
    mat = scipy.io.loadmat(layout.design, squeeze_me=True)
    sessions = (40, 40, 32, 30, 40, 32, 40, 30)  # published
    by_all = shared_pictures(layout)
    for subject, count in enumerate(sessions):
        trials = mat["stimpattern"][:count].sum()
        shown = list(mat["subjectim"][subject][mat["masterordering"][:trials] - 1] - 1)
        by_all = {picture for picture in by_all if shown.count(picture) >= 3}
    assert 2 <= len(by_all) <= nsd_layout.SHARED - 2
    dataset = prepared(layout, tmp_path, 3, test="test515")
    assert dataset.name == "nsd/subj03-test515"
    seen = set(trials_by_picture(layout, 3, 32))
    ids = {split: set(map(int, dataset.stimulus_ids(split))) for split in SPLITS}
    assert ids["test"] == by_all
    assert ids["validation"] == (shared_pictures(layout) & seen) - by_all
    assert ids["train"] == seen - shared_pictures(layout)


def test_where_all_saw_every_shared_one_three_times_validation_is_a_share_of_the_others(mine, tmp_path):
    content = scipy.io.loadmat(mine.design)
    trials = int(content["stimpattern"][:5].sum())
    places = [*range(nsd_layout.SHARED - 5, nsd_layout.SHARED + 4)] * (1 + trials // 9)
    order = np.concatenate([1 + np.array(places)[:trials], content["masterordering"][0, trials:]])
    assert trials >= 27
    design_with(mine, masterordering=order[None], subjectim=content["subjectim"][:1])
    dataset = prepared(mine, tmp_path / "data", test="test515", validation_share=0.5)
    assert [len(dataset.stimulus_ids(split)) for split in SPLITS] == [2, 2, 5]
    assert set(map(int, dataset.stimulus_ids("test"))) <= shared_pictures(mine)


def test_in_another_experiment_the_files_tell_how_many_sessions_there_were(mine):
    content = scipy.io.loadmat(mine.design)
    content = {name: content[name] for name in ("masterordering", "subjectim", "sharedix", "stimpattern")}
    content["subjectim"] = content["subjectim"][:2]
    scipy.io.savemat(mine.design, content)
    design = nsd_files.read_design(mine.root)
    assert nsd_files.sessions_of_all(mine.root, design) == (5, 40)
    counts = [np.unique(design.presentations(1, n).stimulus, return_counts=True) for n in (5, 40)]
    thrice = [set(pictures[times >= 3]) for pictures, times in counts]
    assert set(design.repeated_by_all((5, 40))) == shared_pictures(mine) & thrice[0]
    assert set(design.repeated_by_all((40, 40))) == shared_pictures(mine) & thrice[1]
    assert thrice[0] & shared_pictures(mine) != thrice[1] & shared_pictures(mine)


def test_permuted_labels_change_training_alone(small, tmp_path):
    true, permuted = (records(prepared(small, tmp_path, permute=permute)) for permute in ("none", "trial"))
    assert (tmp_path / "nsd" / "subj01-permuted").exists()
    differs = {
        split
        for picture, (split, record) in true.items()
        if not np.array_equal(record.trial_index, permuted[picture][1].trial_index)
    }
    assert differs == {"train"}


# ---- voxels ----------------------------------------------------------------------------------------------------------


def test_voxels_say_where_they_are_and_how_reliable(small, tmp_path):
    voxels = prepared(small, tmp_path).voxels
    positions = voxel_positions(small, 1)
    np.testing.assert_array_equal(voxels.ijk, positions)
    assert voxels.volume_shape == nsd_layout.SHAPE
    np.testing.assert_array_equal(voxels.affine, nibabel.load(small.roi(1, "nsdgeneral")).affine)
    ncsnr = nibabel.load(small.betas(1, "ncsnr.nii.gz")).get_fdata()
    np.testing.assert_array_equal(voxels.ncsnr, [np.float32(ncsnr[where]) for where in positions])
    np.testing.assert_array_equal(np.sort(voxels.order), np.arange(len(positions)))
    assert voxels.subject == "nsd-subj01"
    labels = nibabel.load(small.roi(1, "prf-visualrois")).get_fdata()
    names = ("V1v", "V1d", "V2v", "V2d", "V3v", "V3d", "hV4")
    expected = {f"prf-visualrois/{name}": [labels[at] == 1 + n for at in positions] for n, name in enumerate(names)}
    assert voxels.rois.keys() == {name for name, inside in expected.items() if any(inside)}
    for name, inside in voxels.rois.items():
        np.testing.assert_array_equal(inside, expected[name])


def test_regions_take_their_names_from_the_tables(mine):
    mask = nibabel.load(mine.roi(1, "nsdgeneral")).get_fdata() > 0
    ones = np.ones(nsd_layout.SHAPE, np.float32)
    for owner, atlas, table in (
        ("subj01", "prf-visualrois", "0 Unknown\t\n1 early\n2 early\n3  late one \n"),
        ("fsaverage", "prf-visualrois", "1 not this one\n"),
        ("fsaverage", "sulci", "0 Unknown 0 0 0 0\n1 calcarine 1 2 3 0\n"),
    ):
        path = mine.table(owner, atlas)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(table)
    labels = np.zeros(nsd_layout.SHAPE, np.float32)
    labels[mask] = np.resize([1, 2, 3, 4, -1], mask.sum())
    write_volume(mine.roi(1, "prf-visualrois"), labels)
    for hemisphere in ("lh", "rh"):
        write_volume(mine.roi(1, f"{hemisphere}.sulci"), ones)
    write_volume(mine.roi(1, "mine"), 2 * ones)
    write_volume(mine.roi(1, "floc-faces"), 2 * ones)
    write_volume(mine.roi(1, "empty"), 0 * ones)
    found = nsd_files.regions(mine.root, 1, mask)
    early = np.isin(labels[mask], (1, 2))
    everywhere = dict.fromkeys(
        ("lh.sulci/calcarine", "rh.sulci/calcarine", "mine/label 2", "floc-faces/FFA-1"), np.ones(mask.sum(), bool)
    )
    expected = {
        "prf-visualrois/early": early,
        "prf-visualrois/late": labels[mask] == 3,
        "prf-visualrois/label 4": labels[mask] == 4,
        **everywhere,
    }
    assert found.keys() == expected.keys()
    for name, inside in found.items():
        np.testing.assert_array_equal(inside, expected[name])


def test_without_a_noise_ceiling_file_the_repeats_tell(layout, tmp_path, capsys):
    path = layout.betas(4, "ncsnr.nii.gz")
    content = path.read_bytes()
    path.unlink()
    try:
        dataset = prepared(layout, tmp_path, 4)
    finally:
        path.write_bytes(content)
    assert "ncsnr.nii.gz: missing" in capsys.readouterr().err
    found = [record for _, record in records(dataset).values()]
    repeats = [[record.fmri[record.run == run].mean(axis=0) for run in np.unique(record.run)] for record in found]
    noise = sum(((group - np.mean(group, axis=0)) ** 2).sum(axis=0) for group in repeats)
    noise /= sum(len(group) - 1 for group in repeats)
    signal = np.maximum(0, np.concatenate(repeats).var(axis=0, ddof=1) - noise)
    np.testing.assert_allclose(dataset.voxels.ncsnr, np.sqrt(signal / noise), rtol=1e-3, atol=1e-3)


def test_the_repeats_recover_the_ceiling_that_was_planted(tmp_path):
    """Through every step from the files on, sessions that drift included."""
    size = dict(subjects=1, sessions=3, stimuli=400, voxels=120, picture_size=8, token_shape=(2, 3))
    root = Path(simulate_nsd(tmp_path / "nsd", **size))
    (root / f"nsddata_betas/ppdata/subj01/func1pt8mm/{nsd_layout.BETAS}/ncsnr.nii.gz").unlink()
    voxels = prepared(Layout(root), tmp_path / "data").voxels
    with np.load(root / "truth/subj01.npz") as truth:
        np.testing.assert_array_equal(voxels.ijk, truth["ijk"])
        ncsnr = np.stack([voxels.ncsnr, truth["ncsnr"]]).astype(np.float64)
    for trials in (1, 3):
        found, planted = ncsnr**2 / (ncsnr**2 + 1 / trials)
        assert abs(np.mean(found - planted)) < 0.02
        assert np.sqrt(np.mean((found - planted) ** 2)) < 0.06


def test_voxels_of_unknown_reliability_are_kept_and_counted(mine, tmp_path, capsys):
    values = np.full(nsd_layout.SHAPE, 0.5, np.float32)
    positions = voxel_positions(mine, 1)
    values[positions[3]] = values[positions[5]] = np.nan
    write_volume(mine.betas(1, "ncsnr.nii.gz"), values)
    voxels = prepared(mine, tmp_path).voxels
    assert f"not a number at 2 of {len(positions)} voxels" in capsys.readouterr().err
    expected = np.full(len(positions), 0.5)
    expected[[3, 5]] = 0
    np.testing.assert_array_equal(voxels.ncsnr, expected)


# ---- killed, crowded, large ------------------------------------------------------------------------------------------


def test_a_killed_preparation_goes_on_at_its_session_and_trusts_no_half_file(small, tmp_path, monkeypatch):
    expected = records(prepared(small, tmp_path / "at once"))
    read, done = nsd_files.read_session, []

    def until_killed(path, *arguments):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(path.name)
        return read(path, *arguments)

    monkeypatch.setattr(nsd_files, "read_session", until_killed)
    with pytest.raises(KeyboardInterrupt):
        prepared(small, tmp_path / "data")
    scratch = tmp_path / "data" / "nsd" / "subj01" / "scratch"
    copies = sorted(scratch.iterdir())
    assert [copy.name[:9] for copy in copies] == ["session01", "session02", "session03"]
    os.truncate(copies[1], 200)
    (scratch.parent / "incomplete.ABCDEF_1.0.0").mkdir()
    done.clear()
    monkeypatch.setattr(nsd_files, "read_session", lambda path, *rest: done.append(path.name) or read(path, *rest))
    found = records(prepared(small, tmp_path / "data"))
    assert [name[6:15] for name in done] == ["session02", "session04", "session05"]
    for picture, (_, record) in found.items():
        np.testing.assert_array_equal(record.fmri, expected[picture][1].fmri)
    done.clear()
    prepared(small, tmp_path / "data")  # all there
    assert done == []
    assert [path.name for path in scratch.parent.iterdir()] == [records_folder(tmp_path / "data").name]


def records_folder(data_dir: Path) -> Path:
    return next((data_dir / "nsd" / "subj01").glob("*.*.*"))


def test_one_process_prepares_while_the_others_wait(tmp_path, capsys):
    entered = threading.Event()

    def second():
        with nsd._alone(tmp_path / "data"):
            entered.set()

    with nsd._alone(tmp_path / "data"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(timeout=0.3)
        assert not entered.is_set()
        with nsd._alone(tmp_path / "other"):
            pass  # others are not in the way
    thread.join(timeout=10)
    assert entered.is_set()
    assert "another process prepares these data" in capsys.readouterr().err


def test_a_disk_without_locks_and_a_bucket_are_no_obstacle(tmp_path, capsys, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(nsd.fcntl, "flock", refuse)
    with nsd._alone(tmp_path / "data"):
        assert "on a disk without locks" in capsys.readouterr().err
    assert nsd._workplace("gs://bucket/data").parent == Path(tempfile.gettempdir())


@pytest.mark.parametrize("kind", ["nii.gz", "hdf5"])
def test_a_session_is_read_piece_by_piece(kind, tmp_path):
    rng = np.random.default_rng(0)
    betas = rng.integers(-100, 100, (24, 24, 24, 120)).astype(np.int16)  # 3.3 MB
    mask = rng.random((24, 24, 24)) < 0.01
    mask[:, :, :5] = False
    path = tmp_path / f"betas_session01.{kind}"
    (write_hdf5 if kind == "hdf5" else write_volume)(path, betas)
    tracemalloc.start()
    found = nsd_files.read_session(path, mask, 120)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(found, betas[mask].T)
    assert peak < 0.8e6


def test_large_splits_are_written_in_several_shards(small, tmp_path, monkeypatch):
    expected = prepared(small, tmp_path / "one")
    monkeypatch.setattr(builder, "_SHARD_BYTES", 500)
    dataset = prepared(small, tmp_path / "many")
    shards = sorted(path.name for path in dataset.path.iterdir() if "train" in path.name)
    assert len(shards) > 2
    assert shards[0].endswith(f"-00000-of-{len(shards):05d}")
    for split in SPLITS:
        assert dataset.stimulus_ids(split) == expected.stimulus_ids(split)
        for index in range(len(expected.records(split))):
            one, other = expected.records(split)[index], dataset.records(split)[index]
            assert one.stimulus_id == other.stimulus_id
            np.testing.assert_array_equal(one.fmri, other.fmri)


# ---- what is refused -------------------------------------------------------------------------------------------------


def cut(path: Path, share: float = 0.6) -> None:
    os.truncate(path, int(share * path.stat().st_size))


def shorter(path: Path) -> None:
    write_volume(path, read_betas(path).astype(np.int16)[..., :-1])


def trailing(path: Path) -> None:
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + b"more"))


def headless(path: Path) -> None:
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-50]))


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-6] ^= 1  # the checksum
    path.write_bytes(bytes(content))


def with_nan(layout: Layout) -> None:
    values = read_betas(layout.session(1, 2)).astype(np.float32)
    values[tuple(np.array(voxel_positions(layout, 1)[:2]).T)] = np.nan
    write_volume(layout.session(1, 2), values)


def as_hdf5(layout: Layout, betas: np.ndarray | None = None) -> Path:
    path = layout.session(1, 2, "hdf5")
    write_hdf5(path, read_betas(layout.session(1, 2)).astype(np.int16) if betas is None else betas)
    return path


def design_with(layout: Layout, **changes) -> None:
    content = scipy.io.loadmat(layout.design)
    kept = {name: content[name] for name in ("masterordering", "subjectim", "sharedix", "stimpattern")} | changes
    scipy.io.savemat(layout.design, {name: value for name, value in kept.items() if value is not None})


def tokens_without(layout: Layout) -> None:
    names = [str(row) for row in range(nsd_layout.PICTURES)]
    seen = sorted(trials_by_picture(layout, 1, 5))
    names.remove(str(seen[0]))
    shutil.rmtree(layout.tokens)
    nsd_layout.write_tokens(layout.tokens, names)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda it: it.design.unlink(), r"nsd_expdesign\.mat: missing.*--download"),
        (lambda it: it.design.write_bytes(b"no mat"), r"nsd_expdesign\.mat: cannot be read as a MATLAB file"),
        (lambda it: cut(it.design), r"nsd_expdesign\.mat: "),
        (lambda it: design_with(it, sharedix=None), r"nsd_expdesign\.mat: the variable 'sharedix'"),
        (lambda it: design_with(it, masterordering=np.ones((1, 7))), r"'stimpattern' has shape .* with 7 ones"),
        (lambda it: design_with(it, subjectim=np.ones((8, 20))), r"'subjectim' has 20 stimuli"),
        (lambda it: it.session(1, 3).unlink(), r"betas_session05 is there, but session 03 is missing"),
        (lambda it: shutil.rmtree(it.betas(1, "")), r"holds no betas_session01\.hdf5 or \.nii\.gz.*--download"),
        (lambda it: cut(it.session(1, 4)), r"betas_session04\.nii\.gz: damaged or cut"),
        (lambda it: cut(it.session(1, 4), 0), r"betas_session04\.nii\.gz: cannot be read as a NIfTI file"),
        (lambda it: flipped(it.session(1, 4)), r"betas_session04\.nii\.gz: damaged or cut \(CRC"),
        (lambda it: headless(it.session(1, 4)), r"session04\.nii\.gz: damaged or cut \(ends in volume \d+ of \d+\)"),
        (lambda it: trailing(it.session(1, 4)), r"session04\.nii\.gz: damaged or cut \(goes on after volume"),
        (lambda it: shorter(it.session(1, 4)), r"betas_session04\.nii\.gz: \d+ trials; expected \d+"),
        (
            lambda it: write_volume(it.session(1, 4), np.zeros((5, 6, 5, 9), np.int16)),
            r"betas_session04\.nii\.gz: volumes of shape \(5, 6, 5\); expected \(5, 6, 4\)",
        ),
        (with_nan, r"betas_session02\.nii\.gz: 2 values \(2 of them NaN\) among"),
        (
            lambda it: write_volume(it.session(1, 2), read_betas(it.session(1, 2)).astype(np.float32) / 300),
            r"betas_session02\.nii\.gz: \d+ values \(0 of them NaN\) .* expected 300 x percent signal change",
        ),
        (lambda it: cut(as_hdf5(it)), r"betas_session02\.hdf5: cannot be read as an HDF5 file, or is cut"),
        (lambda it: as_hdf5(it, np.zeros((4, 6, 5, 9), np.int16)), r"hdf5: volumes of shape \(4, 6, 5\); expected"),
        (lambda it: as_hdf5(it, np.zeros((5, 6, 4, 2), np.int16)), r"hdf5: 2 trials; expected \d+"),
        (lambda it: write_volume(it.roi(1, "nsdgeneral"), np.zeros((5, 6, 4))), r"nsdgeneral.*no voxel is above 0"),
        (lambda it: it.roi(1, "nsdgeneral").unlink(), r"nsdgeneral\.nii\.gz: missing.*--download"),
        (
            lambda it: write_volume(it.roi(1, "prf-visualrois"), np.zeros((5, 6, 3))),
            r"prf-visualrois\.nii\.gz: has shape \(5, 6, 3\); expected \(5, 6, 4\)",
        ),
        (lambda it: cut(it.betas(1, "ncsnr.nii.gz")), r"ncsnr\.nii\.gz: damaged or cut"),
        (tokens_without, r"tokens: lacks tokens of 1 of the \d+ stimuli that the subject saw.*encode-images"),
        (lambda it: shutil.rmtree(it.tokens), r"no complete set of tokens is here"),
    ],
)
def test_what_cannot_be_used_is_named(spoil, message, mine, tmp_path):
    spoil(mine)
    with pytest.raises(InputError, match=message):
        prepared(mine, tmp_path / "data")
    assert not list((tmp_path / "data").glob("nsd/subj01/*.*.*"))


@pytest.mark.parametrize(
    ("subject", "options", "message"),
    [
        (9, {}, "subject 9: the design has subjects 1 to 8"),
        (0, {}, "subject 0: the design has subjects 1 to 8"),
        (2, {}, "subj02.*holds no betas_session01"),
        (1, {"normalisation": "zscore"}, "normalisation 'zscore': expected 'session_zscore' or"),
        (1, {"test": "all"}, "test 'all': expected 'shared' or 'test515'"),
        (1, {"validation_share": 0.0}, r"validation_share 0\.0: expected more than 0"),
        (1, {"validation_share": 1.0}, r"validation_share 1\.0: expected more than 0 and less than 1"),
        (1, {"validation_share": 0.01}, "split 'validation': 0 of the .* a larger validation_share"),
        (1, {"permute": "labels"}, "permute 'labels'"),
        (1, {"betas": "betas_fithrf"}, "betas_fithrf: holds no betas_session01"),
    ],
)
def test_options_that_cannot_be_used_are_named(subject, options, message, small, tmp_path):
    with pytest.raises(InputError, match=message):
        prepared(small, tmp_path, subject, **options)


def test_more_sessions_than_planned_are_refused(mine, tmp_path):
    content = scipy.io.loadmat(mine.design)
    pattern = content["stimpattern"][:4]
    design_with(mine, stimpattern=pattern, masterordering=content["masterordering"][:, : pattern.sum()])
    with pytest.raises(InputError, match=r"betas_session05\.nii\.gz: session 5, but the design has 4 sessions"):
        prepared(mine, tmp_path / "data")


def test_sessions_that_are_not_there_yet_are_told(small, tmp_path, capsys):
    prepared(small, tmp_path)
    assert "sessions 1 to 5 of the subject's 40 are there and used" in capsys.readouterr().err


def test_other_files_under_the_same_name_are_refused(mine, tmp_path):
    prepared(mine, tmp_path / "data")
    with pytest.raises(InputError, match="already prepared from other arrays or with other options"):
        prepared(mine, tmp_path / "data", validation_share=0.3)
    path = mine.session(1, 2)
    values = read_betas(path).astype(np.int16)
    values[0, 0, 0, 0] ^= 1
    write_volume(path, values)
    with pytest.raises(InputError, match="already prepared from other arrays or with other options"):
        prepared(mine, tmp_path / "data")


def test_all_headers_are_looked_at_before_the_first_session_is_read(mine, tmp_path):
    shorter(mine.session(1, 4))
    with pytest.raises(InputError, match="betas_session04"):
        prepared(mine, tmp_path)
    assert not list(tmp_path.glob("**/session*.npy"))


def test_the_cheap_digest_sees_length_beginning_and_end(tmp_path):
    content = np.random.default_rng(0).bytes(300_000)
    changed = [
        content[:-1],
        content + b"0",
        b"0" + content[1:],
        content[:-1] + b"0",
        content[:-70_000] + content[-69_999:],
    ]
    digests = set()
    for number, each in enumerate([content, *changed]):
        path = tmp_path / f"{number}"
        path.write_bytes(each)
        digests.add(nsd_files.cheap_digest(path))
    assert len(digests) == 6


def test_prepare_nsd_is_a_command(small, tmp_path, capsys):
    files = ["--root", os.fspath(small.root), "--tokens", os.fspath(small.tokens), "--data-dir", os.fspath(tmp_path)]
    main(["prepare", "nsd", "--subject", "1", *files, "--normalisation", "none", "--validation-share", "0.2"])
    dataset = open_dataset(capsys.readouterr().out.strip())
    assert dataset.name == "nsd/subj01-none"
    shown = [len(dataset.stimulus_ids(split)) for split in ("train", "validation")]
    assert shown[1] == round(0.2 * sum(shown))


def test_the_command_lists_and_fetches_what_a_subject_needs(small, tmp_path, capsys, monkeypatch):
    who = ["prepare", "nsd", "--root", os.fspath(small.root), "--subject", "4"]
    main([*who, "--list"])
    listed = capsys.readouterr().out
    for key in ("betas_session30.nii.gz", "nsd_expdesign.mat", "nsd_stimuli.hdf5", "ncsnr.nii.gz", "nsdgeneral.nii.gz"):
        assert key in listed
    assert "betas_session31" not in listed
    asked = {}
    monkeypatch.setattr(nsd_download, "download", lambda *where, **options: asked.update(where=where, **options))
    main([*who, "--download", "--betas", "betas_fithrf"])
    assert asked == {"where": (small.root, 4), "betas": "betas_fithrf"}
    with pytest.raises(SystemExit), plain_errors():
        main(who)
    assert "--data-dir and --tokens: both are needed" in capsys.readouterr().err
