"""The record format and the batch pipeline, on a data set whose fMRI says which trial it is."""

import io
import json
import sys

import grain
import ml_dtypes
import numpy as np
import pytest
import tensorflow_datasets as tfds

from synbrain_jax.data import builder as builder_module
from synbrain_jax.data import pairs
from synbrain_jax.data.arrays import Arrays
from synbrain_jax.data.batches import training_batches
from synbrain_jax.data.builder import prepare, source_of_trials
from synbrain_jax.data.pairs import Dataset, load_trials, open_dataset
from synbrain_jax.data.tokens import StoredTokens
from synbrain_jax.data.voxels import Voxels
from synbrain_jax.errors import InputError

COUNTS = (1, 2, 3, 5, 8)  # training trials of the stimuli
N = sum(COUNTS)
STIMULUS = np.repeat(np.arange(5, dtype=np.int32), COUNTS)


def experiment() -> dict[str, np.ndarray]:
    """19 training trials of 5 stimuli, shuffled in time, then 2 of validation and 3 of test.

    The fMRI is the identity matrix: a mean over m trials holds 1/m at each of them and 0 elsewhere.
    """
    rng = np.random.default_rng(0)
    return dict(
        tokens=rng.normal(size=(5, 3, 2)).astype(np.float32),
        fmri=np.eye(N + 5, dtype=np.float32),
        stimulus=np.concatenate([rng.permutation(STIMULUS), [0, 1, 4, 4, 2]]).astype(np.int32),
        run=rng.integers(0, 4, N + 5).astype(np.int32),
        session=np.tile([3, 5, 8], 8).astype(np.int32),
        split=np.repeat(["train", "validation", "test"], [N, 2, 3]),
    )


def make_builder(folder) -> Arrays:
    arrays = experiment()
    geometry = Voxels("subj01", "none", None, None, None, None, np.arange(N + 5, dtype=np.int32))
    names = tuple(f"bild-{i}-ü" for i in range(5))
    tokens = arrays.pop("tokens")
    source = source_of_trials(voxels=geometry, stimulus_id=names, tokens_of=tokens.__getitem__, **arrays)
    return Arrays(source=source, data_dir=folder, config=tfds.core.BuilderConfig(name="tiny"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    return open_dataset(prepare(make_builder(tmp_path_factory.mktemp("data"))))


def take(iterator, count: int) -> list[dict[str, np.ndarray]]:
    return [next(iterator) for _ in range(count)]


def assert_batches_equal(actual, expected):
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def trials_of(batches) -> list[int]:
    """Which training trial each element of the batches is."""
    fmri = np.concatenate([batch["fmri"] for batch in batches])
    np.testing.assert_array_equal(np.sort(fmri, axis=1)[:, -2:], [[0, 1]] * len(fmri))
    return fmri.argmax(axis=1).tolist()


def test_records_give_back_the_experiment(dataset):
    arrays = experiment()
    assert (dataset.name, dataset.splits) == ("arrays/tiny", ("train", "validation", "test"))
    assert (dataset.token_shape, dataset.n_voxels) == ((3, 2), N + 5)
    for split, shown in (("train", [0, 1, 2, 3, 4]), ("validation", [0, 1]), ("test", [2, 4])):
        records = dataset.records(split)
        assert len(records) == len(shown)
        assert dataset.stimulus_ids(split) == tuple(f"bild-{i}-ü" for i in shown)
        np.testing.assert_array_equal(dataset.trials_per_record(split), [len(record.fmri) for record in records])
        for record, stimulus in zip(records, shown, strict=True):
            rows = np.flatnonzero((arrays["stimulus"] == stimulus) & (arrays["split"] == split))
            assert record.stimulus_id == f"bild-{stimulus}-ü"
            np.testing.assert_array_equal(record.trial_index, rows)
            np.testing.assert_array_equal(record.run, arrays["run"][rows])
            np.testing.assert_array_equal(record.fmri, arrays["fmri"][rows])
            np.testing.assert_array_equal(record.session, arrays["session"][rows])
            np.testing.assert_array_equal(record.tokens, arrays["tokens"][stimulus].astype(ml_dtypes.bfloat16))
            assert (record.tokens.dtype, record.fmri.dtype) == (ml_dtypes.bfloat16, np.float32)


def test_load_trials_puts_the_trials_of_each_record_together(dataset):
    arrays, trials = experiment(), load_trials(dataset, "train")
    rows = trials.fmri.argmax(axis=1)
    np.testing.assert_array_equal(np.sort(rows), np.arange(N))
    np.testing.assert_array_equal(trials.stimulus, STIMULUS)
    np.testing.assert_array_equal(arrays["stimulus"][rows], STIMULUS)
    np.testing.assert_array_equal(trials.run, arrays["run"][rows])
    np.testing.assert_array_equal(trials.session, arrays["session"][rows])
    assert {trials.stimulus.dtype, trials.run.dtype, trials.session.dtype} == {np.dtype(np.int32)}
    assert trials.tokens.dtype == np.float32
    np.testing.assert_allclose(trials.tokens, arrays["tokens"], rtol=2**-8)
    assert trials.stimulus_id == dataset.stimulus_ids("train")


def test_many_tokens_stay_on_disk(dataset, monkeypatch):
    small = load_trials(dataset, "train")
    monkeypatch.setattr(pairs, "_CACHED_BYTES", 0)
    large = load_trials(dataset, "train")
    assert isinstance(large.tokens, StoredTokens)
    assert (large.tokens.shape, large.tokens.dtype) == (small.tokens.shape, small.tokens.dtype)
    for rows in (3, -1, slice(1, 4), slice(3, 9), [2], np.array([4, 0, 0])):
        np.testing.assert_array_equal(large.tokens[rows], small.tokens[rows])
    for name in ("stimulus_id", "fmri", "stimulus", "run", "session"):
        np.testing.assert_array_equal(getattr(large, name), getattr(small, name))


def test_rows_of_stored_tokens_count_from_either_end():
    read = []
    stored = StoredTokens(lambda row: np.full((1, 1), read.append(row) or row), (3, 1, 1))
    np.testing.assert_array_equal(stored[[-1, 0]].ravel(), [2, 0])
    np.testing.assert_array_equal(stored[-2:].ravel(), [1, 2])
    assert float(stored[-3].item()) == 0
    assert read == [2, 0, 1, 2, 0]
    for rows in (3, [3], np.array([0, -4])):
        with pytest.raises(IndexError):
            stored[rows]


@pytest.mark.parametrize(("sessions", "stimuli"), [(None, None), (2, None), (None, 3), (2, 2), (3, 5)])
def test_a_limited_data_set_is_that_of_a_shorter_experiment(dataset, sessions, stimuli):
    arrays = experiment()
    early = sorted(set(arrays["session"]))[:sessions]
    rows = {split: np.flatnonzero(arrays["split"] == split) for split in dataset.splits}
    for split in ("train", "validation"):
        rows[split] = np.array([row for row in rows[split] if arrays["session"][row] in early])
    presented = list(dict.fromkeys(arrays["stimulus"][rows["train"]]))
    rows["train"] = np.array([row for row in rows["train"] if arrays["stimulus"][row] in presented[:stimuli]])

    limited = dataset.limited(sessions, stimuli)
    for split, of_split in rows.items():
        records, shown = limited.records(split), np.unique(arrays["stimulus"][of_split])
        assert limited.stimulus_ids(split) == tuple(f"bild-{index}-ü" for index in shown)
        for record, index, count in zip(records, shown, limited.trials_per_record(split), strict=True):
            expected = of_split[arrays["stimulus"][of_split] == index]
            assert (record.stimulus_id, len(expected)) == (f"bild-{index}-ü", count)
            np.testing.assert_array_equal(record.trial_index, expected)
            np.testing.assert_array_equal(record.fmri.argmax(axis=1), expected)
            np.testing.assert_array_equal(record.tokens, arrays["tokens"][index].astype(ml_dtypes.bfloat16))
    batches = take(training_batches([limited], "train", batch_size=1, seed=0), len(rows["train"]))
    assert sorted(trials_of(batches)) == rows["train"].tolist()
    np.testing.assert_array_equal(np.sort(load_trials(limited, "train").fmri.argmax(axis=1)), rows["train"])


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (dict(sessions=0), "data.sessions is 0; arrays/tiny has 3 scan sessions"),
        (dict(sessions=4), "data.sessions is 4; arrays/tiny has 3 scan sessions"),
        (dict(sessions=1), "no trial of arrays/tiny's validation split is from the first 1 of its 3 scan sessions"),
        (dict(stimuli=0), "data.stimuli is 0; expected 1 to 5"),
        (dict(stimuli=6), "data.stimuli is 6; expected 1 to 5, the training stimuli of arrays/tiny"),
    ],
)
def test_a_limit_that_cannot_be_met_is_named(dataset, limits, message):
    with pytest.raises(InputError, match=message):
        dataset.limited(**limits)


def test_without_sessions_there_is_no_first_one(tiny_dataset):
    with pytest.raises(InputError, match="arrays/tiny has no numbers of scan sessions"):
        tiny_dataset.limited(sessions=1)


def test_the_permutation_control_moves_labels_of_training_trials_only():
    arrays = experiment()
    geometry = Voxels("subj01", "none", None, None, None, None, np.arange(N + 5, dtype=np.int32))
    tokens = arrays.pop("tokens")

    def labels(split: str, **options) -> dict[int, str]:
        source = source_of_trials(
            voxels=geometry, stimulus_id=tuple("abcde"), tokens_of=tokens.__getitem__, **arrays, **options
        )
        return {int(trial): r.stimulus_id for r in source.records[split] for trial in r.trial_index}

    true, permuted, other = (labels("train", **o) for o in ({}, {"permute": "trial"}, {"permute": "trial", "seed": 1}))
    assert true.keys() == permuted.keys()
    assert sorted(true.values()) == sorted(permuted.values())
    assert len({tuple(sorted(each.items())) for each in (true, permuted, other)}) == 3
    assert labels("train", permute="trial") == permuted
    for split in ("validation", "test"):
        assert labels(split, permute="trial") == labels(split)
    with pytest.raises(InputError, match="permute 'stimulus': expected 'none' or 'trial'"):
        labels("train", permute="stimulus")


def test_each_trial_comes_once_per_epoch_in_a_new_order_and_no_batch_is_short(dataset):
    batches = take(training_batches([dataset], "train", batch_size=4, seed=0), N)  # 4 epochs of 19
    assert {batch["fmri"].shape for batch in batches} == {(4, N + 5)}
    epochs = np.reshape(trials_of(batches), (4, N))
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(N), (4, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    tokens = experiment()["tokens"][experiment()["stimulus"][epochs.ravel()]]
    np.testing.assert_allclose(np.concatenate([batch["tokens"] for batch in batches]), tokens, rtol=2**-8)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_batches_depend_on_the_seed_and_nothing_else(dataset, share):
    settings = dict(batch_size=4, average_share=share)
    first = take(training_batches([dataset], "train", seed=7, num_threads=0, **settings), 8)
    assert_batches_equal(take(training_batches([dataset], "train", seed=7, num_threads=2, **settings), 8), first)
    other = take(training_batches([dataset], "train", seed=8, **settings), 8)
    assert any((one["tokens"] != two["tokens"]).any() for one, two in zip(first, other, strict=True))


def test_processes_share_out_the_global_batch(dataset):
    settings = dict(batch_size=6, seed=3, average_share=0.5)
    whole = take(training_batches([dataset], "train", **settings), 8)
    parts = [
        take(training_batches([dataset], "train", process_index=p, process_count=3, **settings), 8) for p in range(3)
    ]
    for step, batch in enumerate(whole):
        for name, values in batch.items():
            np.testing.assert_array_equal(np.concatenate([part[step][name] for part in parts]), values)


@pytest.mark.parametrize("unit", ["trial", "stimulus"])
@pytest.mark.parametrize("num_threads", [0, 2])
def test_a_restored_iterator_goes_on_with_exactly_the_next_batch(dataset, unit, num_threads):
    def batches(process: int = 0) -> grain.DatasetIterator:
        share = 0.5 if unit == "trial" else 0.0
        return training_batches(
            [dataset],
            "train",
            batch_size=4,
            seed=1,
            unit=unit,
            average_share=share,
            process_index=process,
            process_count=2,
            num_threads=num_threads,
        )

    iterator = batches()
    take(iterator, 7)
    state = json.dumps(iterator.get_state())
    expected = take(iterator, 5)
    resumed = batches()
    resumed.set_state(json.loads(state))
    assert_batches_equal(take(resumed, 5), expected)
    iterator.set_state(json.loads(state))  # also back in time, with batches already read ahead
    assert_batches_equal(take(iterator, 5), expected)
    colleague = batches(process=1)
    take(colleague, 7)
    assert json.dumps(colleague.get_state()) == state
    assert len(state) < 200


def test_averages_are_of_distinct_trials_of_one_stimulus_and_of_powers_of_two(dataset):
    batches = take(training_batches([dataset], "train", batch_size=N, seed=0, average_share=1.0), 200)
    fmri = np.concatenate([batch["fmri"] for batch in batches])
    sizes = np.count_nonzero(fmri, axis=1)
    np.testing.assert_allclose(fmri, (fmri > 0) / sizes[:, None], rtol=1e-6)
    stimulus_of = experiment()["stimulus"]
    drawn: dict[int, list[int]] = {index: [] for index in range(5)}
    for row, size in zip(fmri, sizes, strict=True):
        (stimulus,) = set(stimulus_of[np.flatnonzero(row)])
        drawn[int(stimulus)].append(int(size))
    assert {index: sorted(set(each)) for index, each in drawn.items()} == {
        0: [1],
        1: [2],
        2: [2],
        3: [2, 4],
        4: [2, 4, 8],
    }
    # 1,600 draws from {2, 4, 8}: 5 standard deviations of a uniform draw's count are 94
    np.testing.assert_allclose(np.unique(drawn[4], return_counts=True)[1], 1600 / 3, atol=94)


def test_average_share_is_the_probability_of_an_average(dataset):
    batches = take(training_batches([dataset], "train", batch_size=N, seed=0, average_share=0.25), 200)
    fmri = np.concatenate([batch["fmri"] for batch in batches])
    averaged = np.count_nonzero(fmri, axis=1) > 1
    expected = 0.25 * 18 / 19  # the stimulus with one trial has no average
    assert abs(averaged.mean() - expected) < 5 * np.sqrt(expected * (1 - expected) / len(fmri))
    single = fmri[~averaged].argmax(axis=1)
    assert set(single) == set(range(N))


def test_order_permutes_the_voxels(dataset):
    order = np.random.default_rng(0).permutation(N + 5)
    settings = dict(batch_size=5, seed=0)
    for unit, share in (("trial", 0.0), ("trial", 1.0), ("stimulus", 0.0)):
        plain = next(training_batches([dataset], "train", unit=unit, average_share=share, **settings))
        permuted = next(
            training_batches([dataset], "train", unit=unit, average_share=share, orders=[order], **settings)
        )
        np.testing.assert_array_equal(permuted["fmri"], plain["fmri"][:, order])


def test_stimuli_come_once_per_epoch_with_mean_weight_and_target(dataset, tmp_path):
    targets = np.lib.format.open_memmap(tmp_path / "latent.npy", "w+", np.float32, (5, 3, 2))
    targets[:] = np.random.default_rng(2).normal(size=targets.shape)
    batches = take(training_batches([dataset], "train", batch_size=2, seed=0, unit="stimulus", targets=[targets]), 10)
    fmri, latent, tokens, weight = (
        np.concatenate([batch[name] for batch in batches]) for name in ("fmri", "latent", "tokens", "weight")
    )
    arrays = experiment()
    stimulus = arrays["stimulus"][fmri.argmax(axis=1)]
    np.testing.assert_array_equal(np.sort(stimulus.reshape(4, 5), axis=1), np.tile(np.arange(5), (4, 1)))
    means = np.stack([arrays["fmri"][:N][arrays["stimulus"][:N] == index].mean(axis=0) for index in range(5)])
    np.testing.assert_allclose(fmri, means[stimulus], rtol=1e-6)
    np.testing.assert_allclose(weight, np.array(COUNTS)[stimulus] / np.mean(COUNTS), rtol=1e-6)
    np.testing.assert_array_equal(latent, targets[stimulus])
    np.testing.assert_allclose(tokens, arrays["tokens"][stimulus], rtol=2**-8)
    assert {fmri.dtype, latent.dtype, weight.dtype} == {np.dtype(np.float32)}
    assert tokens.dtype == ml_dtypes.bfloat16
    assert "latent" not in next(training_batches([dataset], "train", batch_size=2, seed=0, unit="stimulus"))


def test_a_data_set_too_large_to_keep_gives_the_same_batches(dataset, monkeypatch):
    kept = take(training_batches([dataset], "train", batch_size=4, seed=5), 12)
    records = dataset.records("train")
    assert records[1] is records[1]
    monkeypatch.setattr(pairs, "_CACHED_BYTES", 0)
    records = dataset.records("train")
    assert records[1] is not records[1]
    assert_batches_equal(take(training_batches([dataset], "train", batch_size=4, seed=5), 12), kept)


@pytest.mark.parametrize(("keep", "reads"), [(True, 1), (False, 3)])
def test_kept_records_are_decoded_once(keep, reads):
    class Source:
        read = 0

        def __len__(self):
            return 1

        def __getitem__(self, index):
            self.read += 1
            zero = np.zeros((1, 1), np.float32)
            numbers = dict.fromkeys(("trial_index", "run", "session"), np.zeros(1, np.int32))
            return {"stimulus_id": b"a", "tokens": zero, "fmri": zero, **numbers}

    source = Source()
    records = pairs.Records(source, np.arange(1), [np.arange(1)], keep)
    assert [records[index].stimulus_id for index in (0, -1, 0)] == ["a"] * 3
    assert source.read == reads
    with pytest.raises(IndexError):
        records[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(split="training"), "split 'training': arrays/tiny has train, validation, test"),
        (dict(batch_size=5, process_count=2), "batch_size 5: expected a positive multiple of the 2 processes"),
        (dict(process_index=2, process_count=2), "process_index 2: expected 0 to 1"),
        (dict(seed=-1), "seed -1"),
        (dict(unit="session"), "unit 'session': expected 'trial' or 'stimulus'"),
        (dict(average_share=1.5), "average_share 1.5: expected a probability"),
        (dict(unit="stimulus", average_share=0.5), "average_share: a stimulus is already the mean"),
        (dict(targets=[np.zeros((5, 3, 2), np.float32)]), "only unit 'stimulus' takes them"),
        (dict(unit="stimulus", targets=[np.zeros((4, 3, 2), np.float32)]), "4 rows, but the split has 5 records"),
        (dict(orders=[np.arange(5)]), "order: expected each of 0 to 23 once"),
    ],
)
def test_an_argument_that_does_not_fit_is_named(dataset, settings, message):
    with pytest.raises(InputError, match=message):
        training_batches([dataset], **(dict(split="train", batch_size=4, seed=0) | settings))


def test_a_folder_without_a_prepared_data_set_says_how_to_get_one(dataset, tmp_path):
    with pytest.raises(InputError, match=r"no prepared data set is here .* `synbrain prepare`"):
        open_dataset(tmp_path / "nothing")
    for file in dataset.path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert open_dataset(tmp_path).splits == dataset.splits
    (tmp_path / "voxels.npz").unlink()
    with pytest.raises(InputError, match=r"voxels\.npz is missing"):
        open_dataset(tmp_path)


def test_records_of_another_format_are_refused(dataset, tmp_path):
    for file in dataset.path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes().replace(b'"run"', b'"ran"'))
    with pytest.raises(InputError, match=r"records hold fmri, ran, .* expected fmri, run"):
        open_dataset(tmp_path)


def test_preparing_is_silent_and_a_failure_leaves_nothing(tmp_path, monkeypatch, capfd):
    data_dir = tmp_path / "new" / "data"

    def full_disk(*_):
        assert list(data_dir.rglob("*.array_record*"))  # the records are there, unfinished
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Voxels, "save", full_disk)
        with pytest.raises(OSError, match="no space left"):
            prepare(make_builder(data_dir))
    assert list(tmp_path.iterdir()) == []
    folder = prepare(make_builder(data_dir))
    assert sorted(file.name for file in data_dir.iterdir()) == ["arrays"]
    written = {file.name: (file.read_bytes(), file.stat().mtime) for file in folder.iterdir()}
    assert prepare(make_builder(data_dir)) == folder
    assert {file.name: (file.read_bytes(), file.stat().mtime) for file in folder.iterdir()} == written
    assert capfd.readouterr() == ("", "")


def test_a_process_that_comes_second_uses_what_the_first_wrote(tmp_path, monkeypatch):
    winner, loser = make_builder(tmp_path), make_builder(tmp_path)
    save = Voxels.save

    def save_after_the_other(self, path):
        monkeypatch.setattr(Voxels, "save", save)
        prepare(winner)
        self.save(path)

    monkeypatch.setattr(Voxels, "save", save_after_the_other)
    folder = prepare(loser)
    assert open_dataset(folder).splits == ("train", "validation", "test")
    assert [path.name for path in folder.parent.iterdir()] == ["1.1.0"]


def test_progress_bars_stay_where_there_is_a_terminal(monkeypatch):
    switched_off = []
    monkeypatch.setattr(tfds, "disable_progress_bar", lambda: switched_off.append(True))
    for is_terminal, expected in ((True, []), (False, [True])):
        stream = io.StringIO()
        stream.isatty = lambda answer=is_terminal: answer
        monkeypatch.setattr(sys, "stderr", stream)
        with builder_module._quiet():
            pass
        assert switched_off == expected
