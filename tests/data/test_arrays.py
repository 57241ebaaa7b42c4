"""The user's own arrays: what is written for good ones, and one clear error with nothing left for bad ones."""

import numpy as np
import pytest
import scipy.stats

from synbrain_jax.data import arrays as arrays_module
from synbrain_jax.data.array_files import pieces, read_fields
from synbrain_jax.data.arrays import prepare_arrays
from synbrain_jax.data.pairs import Dataset, load_trials, open_dataset
from synbrain_jax.data.voxels import hilbert_order
from synbrain_jax.errors import InputError

N, V, S = 24, 6, 8
SPLITS = ("train", "validation", "test")


def experiment(**changes) -> dict[str, np.ndarray]:
    """24 trials: 8 stimuli, numbered 30, 29, ... 23, once in each of 3 runs; a field that is None is left out."""
    rng = np.random.default_rng(0)
    fields = dict(
        fmri=rng.normal(3, 2, (N, V)).astype(np.float32),
        stimulus_id=np.tile(30 - np.arange(S), 3),
        tokens=rng.normal(size=(S, 4, 2)).astype(np.float32),
        tokens_stimulus_id=np.arange(23, 31),
        run=np.repeat([1, 2, 5], S),
    )
    return {name: value for name, value in (fields | changes).items() if value is not None}


def write(path, fields):
    """As .npz, or as a folder of .npy files, by the name."""
    if path.suffix == ".npz":
        np.savez(path, **fields)
    else:
        path.mkdir()
        for name, array in fields.items():
            np.save(path / f"{name}.npy", array)
    return path


def prepared(tmp_path, fields=None, file="mine.npz", **options) -> Dataset:
    source = write(tmp_path / file, experiment() if fields is None else fields)
    return open_dataset(prepare_arrays(source, tmp_path / "data", **(dict(name="mine") | options)))


def contents(dataset: Dataset) -> dict[str, np.ndarray]:
    """Everything in the records, by split and stimulus."""
    return {
        f"{split} {record.stimulus_id} {name}": getattr(record, name)
        for split in SPLITS
        for record in dataset.records(split)
        for name in ("tokens", "fmri", "trial_index", "run", "session")
    }


def assert_same_contents(one: Dataset, other: Dataset):
    expected = contents(other)
    for key, value in contents(one).items():
        np.testing.assert_array_equal(value, expected.pop(key))
    assert not expected


@pytest.mark.parametrize("file", ["mine.npz", "mine"])
def test_records_hold_the_trials_of_each_stimulus(tmp_path, file):
    fields = experiment()
    dataset = prepared(tmp_path, fields, file)
    assert (dataset.name, dataset.token_shape, dataset.n_voxels) == ("arrays/mine", (4, 2), V)
    assert (dataset.voxels.subject, dataset.voxels.normalisation) == ("mine", "none")
    seen = []
    for split in SPLITS:
        for record in dataset.records(split):
            rows = np.flatnonzero(fields["stimulus_id"] == int(record.stimulus_id))
            np.testing.assert_array_equal(record.trial_index, rows)
            np.testing.assert_array_equal(record.run, fields["run"][rows])
            np.testing.assert_array_equal(record.fmri, fields["fmri"][rows])
            np.testing.assert_allclose(record.tokens, fields["tokens"][int(record.stimulus_id) - 23], rtol=2**-8)
            seen.append(int(record.stimulus_id))
    assert sorted(seen) == list(range(23, 31))
    assert [len(dataset.stimulus_ids(split)) for split in SPLITS] == [4, 2, 2]


def test_every_way_to_hand_over_the_same_experiment_gives_the_same_records(tmp_path):
    fields = experiment()
    reference = prepared(tmp_path, fields)
    per_trial = fields["tokens"][fields["stimulus_id"] - 23]
    variants = {
        "per_trial": fields | {"tokens": per_trial, "tokens_stimulus_id": None},
        "text": fields | {name: fields[name].astype(str) for name in ("stimulus_id", "tokens_stimulus_id")},
        "double": fields
        | {"fmri": np.asfortranarray(fields["fmri"], np.float64), "run": fields["run"].astype(np.uint8)},
    }
    for name, variant in variants.items():
        assert_same_contents(prepared(tmp_path, experiment(**variant), name, name=name), reference)
    flat = experiment(tokens=per_trial.reshape(N, 8), tokens_stimulus_id=None)
    tokens = {
        record.stimulus_id: record.tokens for record in prepared(tmp_path, flat, "flat", name="flat").records("train")
    }
    for record in reference.records("train"):
        np.testing.assert_array_equal(tokens[record.stimulus_id], record.tokens.reshape(1, 8))


def test_a_folder_may_mix_npy_and_npz_and_maps_the_large_arrays(tmp_path):
    fields = experiment()
    folder = write(tmp_path / "mixed", {name: fields.pop(name) for name in ("fmri", "tokens")})
    np.savez(folder / "labels.npz", **fields)
    (folder / "notes.txt").write_text("not an array")
    read = read_fields(folder, known=tuple(experiment()))
    assert {name for name, array in read.items() if isinstance(array, np.memmap)} == {"fmri", "tokens"}
    mixed = open_dataset(prepare_arrays(folder, tmp_path / "data", name="mixed"))
    assert_same_contents(mixed, prepared(tmp_path))


def test_a_run_may_be_missing(tmp_path):
    trials = load_trials(prepared(tmp_path, experiment(run=None)), "train")
    assert (trials.run == 0).all()


def test_stimuli_are_split_by_the_seed_and_the_tenths_round(tmp_path):
    n = 40
    fields = dict(fmri=np.ones((n, 2)), stimulus_id=np.arange(n), tokens=np.ones((n, 3)))
    datasets = [prepared(tmp_path, fields, f"{seed}.npz", name=f"seed{seed}", seed=seed) for seed in (0, 1)]
    for dataset in datasets:
        ids = [dataset.stimulus_ids(split) for split in SPLITS]
        assert [len(each) for each in ids] == [32, 4, 4]
        assert sorted(int(name) for each in ids for name in each) == list(range(n))
    assert set(datasets[0].stimulus_ids("test")) != set(datasets[1].stimulus_ids("test"))


def test_runs_or_a_field_can_say_how_to_split(tmp_path):
    by_runs = prepared(tmp_path, validation_runs=[2], test_runs=[5])
    assert {split: set(load_trials(by_runs, split).run) for split in SPLITS} == {
        "train": {1},
        "validation": {2},
        "test": {5},
    }
    split = np.repeat(["train", "validation", "test"], S)
    by_field = prepared(tmp_path, experiment(split=split), "field.npz", name="field")
    assert_same_contents(by_field, by_runs)


def test_run_zscore_agrees_with_scipy_and_spares_a_dead_voxel(tmp_path, monkeypatch):
    monkeypatch.setattr("synbrain_jax.data.array_files._PIECE_BYTES", 5 * V * 4)  # pieces that straddle the runs
    fields = experiment(split=np.repeat(["train", "validation", "test"], S))
    fields["fmri"] = fields["fmri"] + 1000 * fields["run"][:, None].astype(np.float32)
    fields["fmri"][fields["run"] == 2, 3] = 0.1
    dataset = prepared(tmp_path, fields, normalisation="run_zscore")
    assert dataset.voxels.normalisation == "run_zscore"
    for split, run in zip(SPLITS, (1, 2, 5), strict=True):
        measured = fields["fmri"][fields["run"] == run].astype(np.float64)
        alive = [voxel for voxel in range(V) if (voxel, run) != (3, 2)]
        expected = np.zeros_like(measured)
        expected[:, alive] = scipy.stats.zscore(measured[:, alive], axis=0)
        for record in dataset.records(split):
            np.testing.assert_allclose(record.fmri, expected[record.trial_index % S], atol=1e-4)


def test_scale2000_divides_integer_betas(tmp_path):
    betas = np.random.default_rng(4).integers(-(2**15), 2**15, (N, V), dtype=np.int16)
    fields = experiment(split=np.repeat(["train", "validation", "test"], S)) | {"fmri": betas}
    dataset = prepared(tmp_path, fields, normalisation="scale2000")
    assert dataset.voxels.normalisation == "scale2000"
    expected = (betas / 2000).astype(np.float32)  # NumPy divides int16 in float64
    for split in SPLITS:
        for record in dataset.records(split):
            np.testing.assert_array_equal(record.fmri, expected[record.trial_index])


def test_the_noise_ceiling_ratio_is_of_the_normalised_data(tmp_path):
    fields = experiment()
    plain = prepared(tmp_path, fields, normalisation="run_zscore")
    scaled = fields | {"fmri": fields["fmri"] * fields["run"][:, None].astype(np.float32) + 5}
    rescaled = prepared(tmp_path, scaled, "scaled.npz", name="scaled", normalisation="run_zscore")
    np.testing.assert_allclose(rescaled.voxels.ncsnr, plain.voxels.ncsnr, atol=1e-3)
    once = prepared(tmp_path, {k: v[:S] for k, v in fields.items()}, "once.npz", name="once")
    assert once.voxels.ncsnr is None


@pytest.mark.parametrize("axes", [2, 3])
def test_positions_give_the_hilbert_order(tmp_path, axes):
    cells = np.random.default_rng(1).permutation(8**axes)[:V]
    ijk = np.stack(np.unravel_index(cells, (8,) * axes), axis=1)
    geometry = dict(voxel_ijk=ijk, affine=np.diag([2.0, 2, 2, 1]), volume_shape=np.array([8, 8, 8]))
    voxels = prepared(tmp_path, experiment(**geometry)).voxels
    np.testing.assert_array_equal(voxels.order, hilbert_order(ijk))
    np.testing.assert_array_equal(voxels.ijk[:, :axes], ijk)
    assert (voxels.ijk[:, axes:] == 0).all()
    np.testing.assert_array_equal(voxels.affine, geometry["affine"])
    assert voxels.volume_shape == (8, 8, 8)
    unknown = prepared(tmp_path, file="unknown.npz", name="unknown").voxels
    np.testing.assert_array_equal(unknown.order, np.arange(V))
    assert unknown.ijk is unknown.affine is unknown.volume_shape is None


def test_labels_can_be_permuted_among_training_trials(tmp_path):
    options = dict(validation_runs=[2], test_runs=[5])
    true = prepared(tmp_path, **options)
    permuted = prepared(tmp_path, file="permuted.npz", name="permuted", permute="trial", **options)
    kept, moved = contents(true), contents(permuted)
    for key, value in kept.items():
        same = np.array_equal(value, moved[key])
        assert same or key.startswith("train")
    assert any(not np.array_equal(value, moved[key]) for key, value in kept.items())
    order = [np.argsort(load_trials(each, "train").fmri[:, 0]) for each in (true, permuted)]
    fmri = [load_trials(each, "train").fmri[rows] for each, rows in zip((true, permuted), order, strict=True)]
    np.testing.assert_array_equal(*fmri)


def test_the_same_name_is_the_same_data_or_an_error(tmp_path, monkeypatch):
    fields = experiment()
    dataset = prepared(tmp_path, fields)
    again = write(tmp_path / "again", fields)  # the same arrays, from other files
    with monkeypatch.context() as patch:
        patch.setattr(arrays_module.Arrays, "_generate_examples", None)  # it would fail if it wrote
        assert prepare_arrays(again, tmp_path / "data", name="mine") == dataset.path
    fields["fmri"][5, 2] += 1
    changed = write(tmp_path / "changed.npz", fields)
    for source, options in ((changed, {}), (again, {"seed": 1}), (again, {"normalisation": "run_zscore"})):
        with pytest.raises(InputError, match=r"mine.*already prepared from other arrays or with other options"):
            prepare_arrays(source, tmp_path / "data", name="mine", **options)
    assert_same_contents(open_dataset(dataset.path), dataset)


def with_value(array: np.ndarray, value: float, *places) -> np.ndarray:
    array = array.copy()
    for place in places:
        array[place] = value
    return array


FMRI, TOKENS = experiment()["fmri"], experiment()["tokens"]
BAD_FIELDS = {
    "missing": (dict(fmri=None), r"field 'fmri' \[n, v\] is missing"),
    "missing tokens": (dict(tokens=None), r"field 'tokens' \[n or s, t, d\] or \[n or s, d\] is missing"),
    "misspelt": (dict(stimulus_ids=np.arange(N)), r"unknown field 'stimulus_ids'; did you mean 'stimulus_id'\?"),
    "unrelated": (dict(qqq=np.arange(N)), "unknown field 'qqq'; known: affine, fmri, run"),
    "ndim": (dict(fmri=FMRI[..., None]), r"field 'fmri' has shape \(24, 6, 1\); expected \[n, v\]"),
    "text fmri": (dict(fmri=FMRI.astype(str)), "field 'fmri' holds <U32; expected numbers"),
    "float ids": (dict(stimulus_id=np.ones(N)), "field 'stimulus_id' holds float64; expected integers or strings"),
    "length": (dict(run=np.arange(N - 2)), r"field 'run' has 22 entries, but 'fmri' has 24 trials \(rows\)"),
    "token rows": (dict(tokens=TOKENS[:5]), "field 'tokens' has 5 rows, but 'tokens_stimulus_id' has 8 entries"),
    "token rows per trial": (dict(tokens_stimulus_id=None), "field 'tokens' has 8 rows, but 'fmri' has 24 trials"),
    "voxels": (
        dict(voxel_ijk=np.zeros((V + 1, 3), int)),
        r"field 'voxel_ijk' has shape \(7, 3\); expected \(6, 3\) or",
    ),
    "affine": (dict(affine=np.eye(3)), r"field 'affine' has shape \(3, 3\); expected \(4, 4\)"),
    "one nan": (dict(fmri=with_value(FMRI, np.nan, (7, 2))), r"'fmri' holds 1 value that is NaN .* first at \[7, 2\]"),
    "inf": (
        dict(tokens=with_value(TOKENS, np.inf, (2, 3, 1), (5, 0, 0))),
        r"'tokens' holds 2 values that are NaN or infinite, the first at \[2, 3, 1\]",
    ),
    "beyond float32": (dict(fmri=with_value(FMRI.astype(float), 1e39, (0, 4))), r"'fmri' holds 1 value .* \[0, 4\]"),
    "objects": (dict(stimulus_id=np.array(["a"] * N, dtype=object)), "holds Python objects, which are not loaded"),
    "empty": (dict(fmri=np.zeros((0, V))), r"empty, its shape is \(0, 6\)"),
    "unknown stimulus": (
        dict(stimulus_id=np.arange(N) + 7),
        r"'tokens_stimulus_id' lacks 16 of the stimuli in 'stimulus_id': '10', '11', '12', \.\.\.",
    ),
    "twice": (dict(tokens_stimulus_id=np.array([23, 24, 25, 26, 27, 28, 29, 23])), "holds '23' twice"),
    "tokens disagree": (
        dict(tokens_stimulus_id=None, tokens=with_value(np.tile(TOKENS, (3, 1, 1)), 9, (17, 0, 0))),
        "'tokens' differs between trials 1 and 17, which show the same stimulus '29'",
    ),
    "wide run": (dict(run=np.arange(N) + 2**40), "field 'run' holds numbers beyond 32 bits"),
    "split name": (dict(split=np.repeat(["train", "val", "test"], S)), "field 'split' holds 'val'; expected train"),
    "one place for two": (dict(voxel_ijk=np.zeros((V, 3), int)), r"'voxel_ijk' puts 6 voxels at \[0, 0, 0\]"),
    "negative": (dict(voxel_ijk=np.arange(3 * V).reshape(V, 3) - 1), r"'voxel_ijk' puts voxel 0 at \[-1, 0, 1\]"),
    "a split of one stimulus": (
        dict(split=np.array((["test"] + ["validation"] * 2 + ["train"] * 5) * 3)),
        "split 'test' has 1 different stimuli",
    ),
    "empty split": (dict(split=np.repeat(["train", "test"], [S, 2 * S])), "split 'validation' has 0 different stimuli"),
    "outside": (
        dict(voxel_ijk=np.tile([1, 2, 9], (V, 1)), volume_shape=np.array([8, 8, 8])),
        r"puts voxel 0 at \[1, 2, 9\], outside the 'volume_shape' \[8, 8, 8\]",
    ),
    "few stimuli": (
        dict(stimulus_id=np.repeat([23, 24], S + 4)),
        "holds 2 different stimuli, too few to hold some out",
    ),
}


@pytest.mark.parametrize("file", ["mine.npz", "mine"])
@pytest.mark.parametrize(("changes", "message"), BAD_FIELDS.values(), ids=BAD_FIELDS)
def test_a_bad_field_is_named_and_nothing_is_left(tmp_path, monkeypatch, file, changes, message):
    monkeypatch.setattr("synbrain_jax.data.array_files._PIECE_BYTES", 100)
    source = write(tmp_path / file, experiment(**changes))
    with pytest.raises(InputError, match=message) as error:
        prepare_arrays(source, tmp_path / "data", name="mine")
    assert str(source) in str(error.value)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(name="a/b"), "name 'a/b': expected letters"),
        (dict(normalisation="zscore"), "normalisation 'zscore': expected 'none', 'run_zscore' or"),
        (dict(permute="stimulus"), "permute 'stimulus': expected 'none' or 'trial'"),
        (dict(test_runs=[2]), "validation_runs: empty; give validation_runs and test_runs, or neither"),
        (dict(test_runs=[2], validation_runs=[9]), "validation_runs: run 9 does not occur in field 'run'"),
        (dict(test_runs=[2], validation_runs=[2]), "run 2: in validation_runs and in test_runs"),
        (dict(test_runs=[1, 2], validation_runs=[5]), "split 'train' has 0 different stimuli"),
    ],
)
def test_a_bad_option_is_named_and_nothing_is_left(tmp_path, options, message):
    source = write(tmp_path / "mine.npz", experiment())
    with pytest.raises(InputError, match=message):
        prepare_arrays(source, tmp_path / "data", **(dict(name="mine") | options))
    assert not (tmp_path / "data").exists()


def test_options_that_the_fields_do_not_allow_are_refused(tmp_path):
    runs = dict(validation_runs=[2], test_runs=[5])
    cases = [
        (experiment(run=None), runs, r"field 'run' \[n\] is missing, but validation_runs or test_runs are given"),
        (experiment(split=np.repeat(SPLITS, S)), runs, "has a field 'split', so give neither"),
        (experiment(run=np.arange(N)), dict(normalisation="run_zscore"), "run 0 has a single trial"),
    ]
    for number, (fields, options, message) in enumerate(cases):
        source = write(tmp_path / f"{number}.npz", fields)
        with pytest.raises(InputError, match=message):
            prepare_arrays(source, tmp_path / "data", name="mine", **options)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
def test_a_truncated_file_is_named(tmp_path, share):
    for source, file in ((tmp_path / "folder", "folder/fmri.npy"), (tmp_path / "mine.npz", "mine.npz")):
        write(source, experiment())
        content = (tmp_path / file).read_bytes()
        (tmp_path / file).write_bytes(content[: int(share * len(content))])
        with pytest.raises(InputError, match=rf"{file}: .*(truncated|not a whole NumPy array file)"):
            prepare_arrays(source, tmp_path / "data", name="mine")
    assert not (tmp_path / "data").exists()


def test_damage_inside_an_npz_is_named(tmp_path):
    source = write(tmp_path / "mine.npz", experiment())
    content = bytearray(source.read_bytes())
    at = content.index(FMRI.tobytes()[:16])
    content[at] ^= 0xFF
    source.write_bytes(content)
    with pytest.raises(InputError, match=r"mine\.npz: cannot be read, it is damaged or truncated"):
        prepare_arrays(source, tmp_path / "data", name="mine")


def test_a_path_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "table.csv").write_text("1,2")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "fmri.npy").write_text("1,2,3,4,5,6")
    twice = write(tmp_path / "twice", experiment())
    np.savez(twice / "more.npz", run=np.arange(N))
    for source, message in {
        "absent": "absent: no such file or folder",
        "empty": r"empty: the folder holds no \.npy or \.npz file",
        "table.csv": r"table\.csv: expected an \.npz file or a folder",
        "bad": r"bad/fmri\.npy: not a whole NumPy array file",
        "twice": "field 'run' is also in another file of the folder",
    }.items():
        with pytest.raises(InputError, match=message):
            prepare_arrays(tmp_path / source, tmp_path / "data", name="mine")
    assert not (tmp_path / "data").exists()


def test_pieces_cover_an_array_in_bounded_parts(monkeypatch):
    monkeypatch.setattr("synbrain_jax.data.array_files._PIECE_BYTES", 100)
    array = np.arange(33.0).reshape(11, 3)
    parts = list(pieces(array))
    np.testing.assert_array_equal(np.concatenate([part for _, part in parts]), array)
    assert [start for start, _ in parts] == [0, 4, 8]
