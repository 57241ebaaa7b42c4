"""The study of adaptation: what is trained on which data, what is kept, and what its numbers are said to show."""

import dataclasses
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from etils import epath
from matplotlib.collections import LineCollection

from synbrain_jax import metrics
from synbrain_jax.adaptation import adapted_config
from synbrain_jax.baselines import baseline_predictions
from synbrain_jax.config import DataConfig
from synbrain_jax.data.pairs import load_trials
from synbrain_jax.errors import InputError
from synbrain_jax.evaluation import stimulus_targets
from synbrain_jax.statistics import Estimate, VoxelR
from synbrain_jax.studies import adapt as room
from synbrain_jax.studies.adapt import Amount, amounts_of, claims, curves, section, study
from synbrain_jax.studies.common import Settings


@pytest.fixture
def settings(two_subjects, tmp_path) -> Settings:
    first, second = (str(dataset.path) for dataset in two_subjects)
    config = tiny.config(data=DataConfig(builder="prepared", source=first, more_sources=(second,)))
    return Settings(config, epath.Path(tmp_path), seeds=(0, 3), quick=True)


# ---- amounts -------------------------------------------------------------------------------------


def test_amounts_go_up_to_what_there_is(two_subjects, monkeypatch):
    first = two_subjects[0]
    assert amounts_of(first) == [Amount("9 stimuli", 36, 9)]
    monkeypatch.setattr(room, "STIMULI", (2, 5, 10))
    counts = first.trials_per_record("train")
    found = amounts_of(first)
    assert [one.stimuli for one in found] == [2, 5]
    assert counts.min() * 2 <= found[0].trials <= counts.max() * 2
    assert amounts_of(first, quick=True) == found[:1]


def test_one_session_comes_first_where_there_are_several(two_subjects, monkeypatch):
    first = two_subjects[0]
    session = np.arange(36) % 3 + 1
    monkeypatch.setattr(type(first), "sessions", lambda self, split: session)
    monkeypatch.setattr(room, "_part", lambda new, amount: new if amount.sessions is None else two_subjects[1])
    session_amount, whole = amounts_of(first)
    counts = two_subjects[1].trials_per_record("train")
    assert session_amount == Amount("1 session", int(counts.sum()), len(counts), sessions=1)
    assert room.least_of([whole, session_amount]) == session_amount
    assert whole.trials == 36
    session[:] = 1
    assert amounts_of(first) == [whole]


# ---- what is trained -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Fake:
    """Stands for a trained system: predicts noise of its own seed, and knows its config."""

    config: object
    seed: int

    @property
    def bundle(self):
        return FakeBundle(self.config)

    def predict(self, tokens):
        return np.random.default_rng(self.seed).normal(size=(len(tokens), 35)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class FakeBundle:
    config: object


@pytest.fixture
def calls(monkeypatch):
    """What was asked of the two functions that train."""
    made = SimpleNamespace(trained=[], adapted=[])

    def trained(settings, seed, datasets, **changes):
        made.trained.append((seed, datasets, changes))
        return [Fake(dataclasses.replace(settings.config, seed=seed), 10 + seed)]

    def adapt(bundle, path, at, how, mesh):
        made.adapted.append((bundle, path, at, how))
        return Fake(bundle.config, (20 if how.readout_weight else 40) + how.seed)

    monkeypatch.setattr(room, "trained", trained)
    monkeypatch.setattr(room, "adapt", adapt)
    return made


def _share(new, prediction) -> float:
    test = load_trials(new, "test")
    ceiling = metrics.noise_ceiling_r(new.voxels.ncsnr, 1)  # each test stimulus has one trial
    reliable = ceiling > 0.3
    r = np.asarray(metrics.voxel_pearson(prediction, stimulus_targets(test)))
    return float(np.median(r[reliable] / ceiling[reliable]))


def _mean_share(new, kind: int) -> float:
    """Of the stand-ins of both seeds."""
    tokens = load_trials(new, "test").tokens
    return float(np.mean([_share(new, Fake(None, kind + seed).predict(tokens)) for seed in (0, 3)]))


@pytest.fixture
def part_of_the_stimuli(monkeypatch):
    """Lets a part be learnt from, though the fixtures' test stimuli are in everybody's training."""
    monkeypatch.setattr(room, "check_unseen", lambda new, sources: None)

    def limit(*counts: int) -> None:
        monkeypatch.setattr(room, "STIMULI", counts)

    return limit


def test_both_learn_from_the_same_few_data_and_ridge_from_all_of_them(
    settings, two_subjects, calls, part_of_the_stimuli
):
    part_of_the_stimuli(4)
    found = study(settings)
    second = two_subjects[1]
    scratch = [call for call in calls.trained if call[2]]
    source = [call for call in calls.trained if not call[2]]
    assert [(seed, datasets[0].voxels.subject) for seed, datasets, _ in source] == [(0, "tiny"), (3, "tiny")]
    for (seed, (part,), changes), (bundle, path, _, how) in zip(scratch, calls.adapted, strict=True):
        expected = second.limited(None, 4).with_validation_share(how.validation_share, how.seed)
        assert (path, how.seed, how.stimuli, how.sessions, how.patience) == (second.path, seed, 4, None, 3)
        for split in ("train", "validation"):
            assert part.stimulus_ids(split) == expected.stimulus_ids(split)
        assert changes["stage1"].patience == changes["stage2"].patience == 3
        assert changes["variability"].folds == bundle.config.variability.folds == 0
        assert changes["stage1"].steps == settings.config.stage1.steps

    test = load_trials(second, "test")
    ridge = baseline_predictions(load_trials(second.limited(None, 4), "train"), test)["ridge"]
    row = found.sections[0].tables[0].rows[0]
    assert row[:3] == ("4 stimuli", 4, int(second.limited(None, 4).trials_per_record("train").sum()))

    expected = {
        "adapted": _mean_share(second, 20),
        "scratch": _mean_share(second, 10),
        "ridge": _share(second, ridge),
    }
    columns = [heading for name, heading in room.ROWS.items() if name != "plain"]
    assert found.sections[0].tables[0].columns[3:] == tuple(columns)
    cells = {name: row[3 + columns.index(room.ROWS[name])] for name in expected}
    for name, value in expected.items():
        assert cells[name].value == pytest.approx(value, abs=1e-5)


def test_without_the_weight_the_least_amount_alone_is_learnt(settings, two_subjects, calls, part_of_the_stimuli):
    part_of_the_stimuli(4, 5)
    found = study(dataclasses.replace(settings, quick=False))
    weights = [(how.stimuli, how.readout_weight) for *_, how in calls.adapted]
    assert weights == 2 * [(4, 4.0), (4, 0.0)] + 2 * [(5, 4.0)]
    scores = found.sections[0].tables[0]
    place = scores.columns.index("adapted, no readout")
    assert [row[place] is None for row in scores.rows] == [False, True]
    adapted, plain = (scores.rows[0][at].value for at in (place - 1, place))
    assert (adapted, plain) == pytest.approx([_mean_share(two_subjects[1], at) for at in (20, 40)], abs=1e-5)
    assert "4 stimuli beats adaptation without the readout" in found.claims[0].text
    assert "with 4 stimuli alone" in found.sections[0].text


def test_a_test_stimulus_that_only_the_source_knows_is_refused(settings, two_subjects, calls, monkeypatch):
    """It may be among all that the new person was trained on, and yet not in the part that is learnt from."""
    first, second = two_subjects
    shared = set(second.stimulus_ids("test")) & set(first.stimulus_ids("train")) & set(second.stimulus_ids("train"))
    assert len(shared) == len(second.stimulus_ids("train"))
    monkeypatch.setattr(room, "STIMULI", (3,))
    with pytest.raises(InputError, match=r"^2 test stimuli of .* are training or validation stimuli of arrays/tiny"):
        study(settings)
    assert not calls.adapted


def test_what_was_predicted_is_not_predicted_again(settings, calls):
    before = study(settings)
    count = len(calls.trained), len(calls.adapted)
    assert count == (4, 2)
    again = study(settings)
    assert (len(calls.trained), len(calls.adapted)) == count
    assert again.sections == before.sections
    picture = settings.folder("adapt") / f"{before.figures[0].name}.png"
    assert len(picture.read_bytes()) > 5000


def test_one_subject_is_not_enough(settings):
    data = dataclasses.replace(settings.config.data, more_sources=())
    alone = dataclasses.replace(settings, config=dataclasses.replace(settings.config, data=data))
    with pytest.raises(InputError, match=r"names one person; .* --change data\.subjects=\[1,2\]"):
        study(alone)


def test_what_is_kept_is_of_this_data_set(settings, two_subjects, calls, tmp_path):
    """And not of another of the same person."""
    study(settings)
    moved = tmp_path.joinpath("moved", *two_subjects[1].path.parts[-3:])
    shutil.copytree(two_subjects[1].path, moved)
    data = dataclasses.replace(settings.config.data, more_sources=(str(moved),))
    study(dataclasses.replace(settings, config=dataclasses.replace(settings.config, data=data)))
    paths = [path for _, path, _, _ in calls.adapted]
    assert paths == [two_subjects[1].path] * 2 + [epath.Path(moved)] * 2
    assert len({at for _, _, at, _ in calls.adapted}) == 4


def test_scratch_is_stopped_and_chosen_as_the_adapted_system_is(settings, calls):
    """Whatever the config says: the paper's takes the last step, or stops by a training loss."""
    config = settings.config
    stage1 = dataclasses.replace(config.stage1, select="last", stop_below=5.0, start_from="last.pth")
    stage2 = dataclasses.replace(config.stage2, select="last", start_from="last.pt")
    changed = dataclasses.replace(config, stage1=stage1, stage2=stage2)
    study(dataclasses.replace(settings, config=changed, seeds=(0,)))
    (changes,) = [changes for _, _, changes in calls.trained if changes]
    (how,) = [how for *_, how in calls.adapted]
    adapted = adapted_config(changed, "", how)
    for name in ("stage1", "stage2"):
        scratch, tuned = changes[name], getattr(adapted, name)
        assert scratch.start_from is None
        assert scratch.select.startswith("val/")
        assert (scratch.select, scratch.patience) == (tuned.select, tuned.patience)
    assert changes["stage1"].stop_below is adapted.stage1.stop_below is None


def test_the_ceiling_is_of_repeats_and_not_of_the_trials_of_a_run(two_subjects):
    new, test = two_subjects[1], load_trials(two_subjects[1], "test")
    order = np.repeat(np.arange(len(test.stimulus)), 6)
    run = np.resize([0, 0, 0, 1, 1, 1], len(order)).astype(np.int32)
    blocks = dataclasses.replace(test, fmri=test.fmri[order], stimulus=test.stimulus[order], run=run, session=0 * run)
    power = new.voxels.ncsnr.astype(float) ** 2
    np.testing.assert_allclose(room.ceiling_r(new, blocks), np.sqrt(power / (power + 1 / 2)), rtol=1e-6)
    unknown = dataclasses.replace(new, voxels=dataclasses.replace(new.voxels, ncsnr=None))
    assert room.ceiling_r(unknown, blocks) is None


# ---- what the numbers say ------------------------------------------------------------------------


def scores(adapted: float, others: dict[str, float], wide: float = 0.01, share: bool = True) -> VoxelR:
    rows = {"adapted": adapted, **others}
    r = {row: Estimate(value, value - wide, value + wide) for row, value in rows.items()}
    lead = {
        row: Estimate(adapted - value, adapted - value - wide, adapted - value + wide) for row, value in others.items()
    }
    half = {row: Estimate(one.value / 2, one.low / 2, one.high / 2) for row, one in r.items()}
    return VoxelR(half, r if share else {}, {row: Estimate(-1.0, -2.0, 0.0) for row in lead}, lead if share else {})


OTHERS = {"scratch": 0.5, "ridge": 0.6, "kernel_ridge": 0.7}


def test_a_claim_holds_where_every_seed_is_above_and_fails_where_every_seed_is_below(settings):
    session, more = Amount("1 session", 600, sessions=1), Amount("9 stimuli", 100, stimuli=9)
    good, bad = scores(0.65, OTHERS), scores(0.605, OTHERS)
    found = {more: [bad, bad], session: [good, bad]}
    made = claims(curves(found)[1], "share")
    assert [claim.holds for claim in made] == [True, None, False]
    assert "1 session" in made[0].text
    assert "+0.150 [+0.140, +0.160], +0.105 [+0.095, +0.115]" in made[0].evidence
    del found[session]
    assert "9 stimuli beats training from scratch" in claims(curves(found)[1], "share")[0].text


def test_rows_are_means_over_seeds_of_shares_or_else_of_r(settings):
    amount = Amount("1 session", 600, sessions=1)
    found = {amount: [scores(0.6, OTHERS), scores(0.8, OTHERS)]}
    made = section("one", "two", found, settings, 9)
    name, _, trials, adapted, *_, kernel = made.tables[0].rows[0]
    assert (name, trials) == ("1 session", 600)
    assert dataclasses.astuple(adapted) == pytest.approx((0.7, 0.69, 0.71))
    assert kernel.value == pytest.approx(0.7)
    assert [row[1] for row in made.tables[1].rows] == ["from scratch", "ridge", "kernel ridge"]
    assert "share" in made.tables[0].title

    found[Amount("9 stimuli", 700, stimuli=9)] = [scores(0.6, OTHERS, share=False)] * 2
    made = section("one", "two", found, settings, 9)
    assert made.tables[0].rows[0][3].value == pytest.approx(0.35)
    assert "median voxel r" in made.tables[0].title
    assert all(claim.holds is None for claim in made.claims)  # leads of r touch 0 here


def test_the_figure_has_a_point_for_every_amount_of_every_row():
    """One session and as many trials of the stimuli that came first stand at the same place."""
    session, same, more = Amount("1 session", 750, 300, 1), Amount("250 stimuli", 750, 250), Amount("500", 1500, 500)
    value = Estimate(0.5, 0.4, 0.6)
    rows = dict.fromkeys(OTHERS, value) | {"adapted": value}
    picture = room.draw({session: {**rows, "plain": value}, same: rows, more: rows}, "one to two", "r")
    (panel,) = picture.axes
    points = {line.get_label(): line.get_xydata().tolist() for line in panel.lines}
    assert points["adapted"] == [[750, 0.5], [750, 0.5], [1500, 0.5]]
    assert points["adapted, no readout"] == [[750, 0.5]]
    (interval,) = [c for c in panel.collections if isinstance(c, LineCollection)]
    np.testing.assert_allclose(interval.get_segments(), [[[750, 0.4], [750, 0.6]]])
