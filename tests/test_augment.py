"""The augmentation study: which pictures, which synthetic trials, and claims that follow from the numbers."""

import dataclasses
import functools
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from etils import epath

from synbrain_jax import decoding
from synbrain_jax.checkpoint import Bundle
from synbrain_jax.config import Config, VariabilityConfig
from synbrain_jax.data.arrays import prepare_arrays
from synbrain_jax.data.pairs import load_trials, open_dataset
from synbrain_jax.decoding import Examples, NetworkSettings
from synbrain_jax.document import load
from synbrain_jax.errors import InputError
from synbrain_jax.statistics import Estimate, paired_difference
from synbrain_jax.studies import augment, augment_page
from synbrain_jax.studies.augment_page import CHOSEN, REAL, Outcome
from synbrain_jax.studies.common import Settings
from synbrain_jax.synthesis import SynBrain

VOXELS = 30
WEIGHTS = np.random.default_rng(5).normal(size=(12, VOXELS)) / 3


def tokens_of(name: str) -> np.ndarray:
    """[3 4], bfloat16 values."""
    return np.random.default_rng(int(name)).integers(-8, 9, (3, 4)).astype(np.float32) / 8


def response(tokens: np.ndarray) -> np.ndarray:
    return tokens.reshape(len(tokens), 12) @ WEIGHTS


def prepared(folder, subject: str, train, validation, test, repeats: int = 2):
    """A data set of linear, noisy responses to pictures whose names are numbers."""
    names = np.repeat([*train, *validation, *test], repeats)
    split = np.repeat(["train", "validation", "test"], [len(part) * repeats for part in (train, validation, test)])
    tokens = np.stack([tokens_of(name) for name in names])
    noise = np.random.default_rng(0).normal(size=(len(names), VOXELS))
    fmri = (response(tokens) + 0.7 * noise).astype(np.float32)
    folder.mkdir(parents=True)
    np.savez(folder / "x.npz", fmri=fmri, tokens=tokens, stimulus_id=names, run=np.arange(len(names)) % 2, split=split)
    return open_dataset(prepare_arrays(folder / "x.npz", folder / "data", name=subject))


def numbers(start: int, stop: int) -> list[str]:
    return [f"{number:03d}" for number in range(start, stop)]


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """The first saw a picture that the second learns from, one that it validates, and in its test one of its test."""
    folder = tmp_path_factory.mktemp("people")
    first = prepared(
        folder / "a", "a", [*numbers(0, 300), "400", "450"], numbers(300, 310), ["900", *numbers(930, 940)]
    )
    second = prepared(folder / "b", "b", numbers(400, 430), numbers(450, 455), numbers(900, 930))
    return [first, second]


class Truth:
    """A system that knows the true responses; the mode is exact, samples have the trials' noise."""

    calls = 0

    def synthesize(self, tokens, key, *, k, variability, first):
        self.calls += 1
        noise = np.random.default_rng(first).normal(size=(len(tokens), k, VOXELS))
        assert variability in ("none", "calibrated")
        return (response(tokens)[:, None] + 0.7 * (variability == "calibrated") * noise).astype(np.float32)


# ---- which pictures, which trials ------------------------------------------------------------------


def test_pictures_are_those_that_the_new_person_was_not_shown(people):
    small = people[1].limited(None, 10).with_validation_share(0.2, 0)
    found = augment.unseen_pictures(people, small)
    names = [records[place].stimulus_id for records, place in found]
    kept = {*small.stimulus_ids("train"), *small.stimulus_ids("validation")}
    assert len(kept) == 10
    everything = {*numbers(0, 310), *numbers(400, 430), *numbers(450, 455)}
    assert len(names) == len(set(names))
    assert set(names) == everything - kept
    limited = [one.limited(None, 5) for one in people]
    assert len(augment.unseen_pictures(limited, small)) == len(found)


class Counting:
    """Tells which picture and sample a response is of."""

    def synthesize(self, tokens, key, *, k, variability, first):
        picture = first + np.arange(len(tokens))
        assert variability == "calibrated"
        values = picture[:, None, None] + 100 * np.arange(k)[:, None] + 0.001 * np.arange(5)
        return values.astype(np.float32)


def test_synthetic_trials_take_each_picture_once_before_any_twice(people, monkeypatch):
    monkeypatch.setattr(augment, "_PICTURES_AT_ONCE", 3)
    pictures = augment.unseen_pictures(people, people[1])[:7]
    trials = augment.synthesised(Counting().synthesize, pictures, 17, "calibrated", 0, np.array([1, 4]))
    sample, picture = np.divmod(np.arange(17), 7)
    np.testing.assert_array_equal(trials.stimulus, picture)
    np.testing.assert_allclose(trials.fmri, (picture + 100 * sample)[:, None] + [0.001, 0.004], atol=1e-4)
    np.testing.assert_array_equal(trials.tokens, [tokens_of(f"{number:03d}") for number in range(7)])
    np.testing.assert_array_equal(trials.weight, np.ones(17))


def test_large_data_are_cut_to_the_best_voxels_and_to_mean_tokens(people, monkeypatch):
    train = load_trials(people[1], "train")
    assert len(augment.best_voxels(train)) == VOXELS
    np.testing.assert_array_equal(augment.decoded_tokens(train.tokens), train.tokens)
    monkeypatch.setattr(augment, "MAX_VOXELS", 4)
    monkeypatch.setattr(augment, "MAX_TOKEN_VALUES", 11)
    fmri = train.fmri.copy()
    good = [3, 8, 20, 21]
    fmri[:, good] = 5 * train.stimulus[:, None] + 0.1 * fmri[:, good]
    np.testing.assert_array_equal(augment.best_voxels(dataclasses.replace(train, fmri=fmri)), good)
    parts = {field: getattr(train, field)[::2] for field in ("fmri", "stimulus", "run", "session")}
    once = dataclasses.replace(train, **parts)
    np.testing.assert_array_equal(augment.best_voxels(once), [0, 10, 19, 29])
    means = train.tokens.mean(axis=1)[:, None]
    np.testing.assert_allclose(augment.decoded_tokens(train.tokens), means, atol=1e-6)


def test_decoders_learn_from_real_trials_and_the_first_synthetic_ones(monkeypatch):
    """Each with the weight of a real trial, or all together with half that of all real ones."""
    rng = np.random.default_rng(0)

    def trials(count):
        return Examples.alike(rng.normal(size=(count, 3)), rng.normal(size=(count, 1, 2)), np.arange(count))

    train, synthetic, new = trials(10), trials(40), rng.normal(size=(5, 3))
    expected = {
        REAL: [train],
        "+ 0.5x mode": [train.with_more(augment._rows(synthetic, 0, 5), weight) for weight in (1.0,)],
        "+ 4x mode": [train.with_more(synthetic, weight) for weight in (1.0, 0.125)],
        "4x mode alone": [synthetic],
    }
    given = (train, trials(4), {"mode": synthetic}, (0.5, 4.0), 0)
    ridges = dict(augment._ridges(*given))
    assert ridges.keys() == expected.keys()
    for name, examples in expected.items():
        fits = [decoder for one in examples for decoder in decoding.fit_ridges(one)]
        for found, fit in zip(ridges[name], fits, strict=True):
            np.testing.assert_allclose(found.decode(new), fit.decode(new), rtol=1e-4, atol=1e-4)

    stand_in = decoding.fit_ridges(train)[0]
    learnt_from = []
    monkeypatch.setattr(decoding, "fit_network", lambda one, *_: learnt_from.append(one) or stand_in)
    assert list(dict(augment._networks(*given))) == list(expected)
    for found, examples in zip(learnt_from, [one for each in expected.values() for one in each], strict=True):
        np.testing.assert_array_equal(found.fmri, examples.fmri)
        np.testing.assert_array_equal(found.weight, examples.weight)


# ---- the whole study -------------------------------------------------------------------------------


@pytest.fixture
def small_study(people, tmp_path, monkeypatch):
    """Settings, and a system that stands in for the adapted one."""
    system = Truth()
    monkeypatch.setattr(augment, "AMOUNTS", (20, 400))
    monkeypatch.setattr(augment, "open_subjects", lambda settings: people)
    monkeypatch.setattr(
        augment, "_system", lambda settings, seed, *_: (epath.Path(tmp_path) / f"seed{seed}", lambda: system)
    )
    settings = functools.partial(NetworkSettings, hidden=32, steps=60, batch_size=32)
    monkeypatch.setattr(augment, "NetworkSettings", settings)
    return Settings(
        tiny.config(), epath.Path(tmp_path), seeds=(0, 1), command="synbrain experiment augment tiny", quick=True
    ), system


def test_true_responses_help_and_what_is_done_is_not_done_again(small_study):
    settings, system = small_study
    made = augment.study(settings)
    folder = settings.folder("augment")
    made.save(folder)
    assert load(folder) == made
    assert (folder / "retrieval.png").read_bytes().startswith(b"\x89PNG")
    calls = system.calls
    assert calls > 0
    again = augment.study(settings)
    assert system.calls == calls
    assert again.sections == made.sections

    verdicts = {claim.text: claim for claim in made.claims}
    of = "(ridge, 20 real pictures, mean of seeds)"
    assert verdicts[f"Synthetic data improve brain retrieval with little real data {of}"].holds
    falls = verdicts[f"Image retrieval falls with 8x synthetic data, as in the paper's Table 13 {of}"]
    assert falls.holds is False
    assert len(verdicts) == 12
    arms = [row[0] for row in made.sections[1].tables[0].rows]
    assert arms == [
        REAL, "+ 1x mode", "+ 8x mode", "8x mode alone", "+ 1x calibrated", "+ 8x calibrated", "8x calibrated alone",
        CHOSEN, "chance",
    ]  # fmt: skip
    assert made.sections[1].tables[0].rows[-1][1:4] == (1 / 30, 1 / 30, 0.5)


def test_the_system_learns_from_the_few_real_pictures_alone(people, tmp_path, monkeypatch):
    """Of the new person nothing else is handed on, neither to adaptation nor to training from scratch."""
    called, adapted = [], object.__new__(SynBrain)

    def stand_in(settings, seed, datasets, **changes):
        called.append((seed, datasets, changes))
        return [SimpleNamespace(bundle=Bundle(tiny.config(), {}, datasets[0].voxels, "a", None, np.zeros(VOXELS), 1.0))]

    def adapting(source, data, workdir, how, mesh):
        called.append((source.config.variability.folds, data, workdir, how))
        return adapted

    monkeypatch.setattr(augment, "homes", lambda *_, **__: [epath.Path(tmp_path)])
    monkeypatch.setattr(augment, "trained", stand_in)
    monkeypatch.setattr(augment, "adapt", adapting)
    config = Config("tiny", variability=VariabilityConfig(folds=0))
    settings = Settings(config, epath.Path(tmp_path), seeds=(3,))
    small = people[1].limited(None, 10).with_validation_share(0.2, 3)
    home, system = augment._system(settings, 3, people, small, 10)
    assert called == []
    assert system() is adapted
    (seed, learnt_from, _), (folds, data, workdir, how) = called
    assert (seed, learnt_from) == (3, people[:1])
    assert (folds, data, workdir) == (1, small.path, home)
    assert (how.stimuli, how.sessions, how.validation_share, how.seed) == (10, None, 0.2, 3)
    again = open_dataset(data).limited(how.sessions, how.stimuli).with_validation_share(how.validation_share, how.seed)
    for split in ("train", "validation"):
        assert again.stimulus_ids(split) == small.stimulus_ids(split)

    called.clear()
    augment._system(settings, 3, people[1:], small, 10)[1]()
    [(seed, learnt_from, changes)] = called
    assert (seed, learnt_from, changes["variability"].folds) == (3, [small], 1)


def test_a_person_who_saw_every_picture_is_refused(small_study, people, monkeypatch):
    settings, _ = small_study
    monkeypatch.setattr(augment, "open_subjects", lambda settings: people[1:])
    monkeypatch.setattr(augment, "unseen_pictures", lambda subjects, small: [])
    with pytest.raises(InputError, match="needs others"):
        augment.study(settings)


def test_a_test_picture_that_the_source_knows_and_the_decoder_does_not_is_refused(small_study, tmp_path, monkeypatch):
    """Though it is among all the pictures that the new person was shown."""
    settings, _ = small_study
    first = prepared(tmp_path / "a", "a", [*numbers(0, 20), "429"], numbers(20, 25), numbers(930, 940))
    second = prepared(tmp_path / "b", "b", numbers(400, 430), numbers(450, 455), ["429", *numbers(900, 930)])
    monkeypatch.setattr(augment, "open_subjects", lambda settings: [first, second])
    assert "429" not in second.limited(None, 20).stimulus_ids("train")
    with pytest.raises(InputError, match=r"^1 test stimuli of .*'429' among them, are training or validation stimuli"):
        augment.study(settings)


# ---- what the page says ----------------------------------------------------------------------------


def scores(image=0.5, brain=0.5, agreement=0.5, **changes):
    """Of one seed, 40 test pictures: the same everywhere, but for DECODER/ARM -> (image, brain, agreement)."""
    arms = [REAL, *(augment_page.arm(kind, r) for kind in augment_page.KINDS for r in (1.0, 8.0))]
    arms += [augment_page.alone(kind, (1.0, 8.0)) for kind in augment_page.KINDS]
    found = {"pool": np.array(40)}
    for decoder in augment_page.DECODERS:
        for name in arms:
            values = changes.get(f"{decoder}/{name}", (image, brain, agreement))
            for score, value in zip(("image", "brain", "two_way"), (*values[:2], 0.9), strict=True):
                for way in ("", "trial_"):
                    found[f"{decoder}/{name}/{way}{score}"] = np.arange(40) < value * 40
            found[f"{decoder}/{name}/agreement"] = np.array(values[2])
    return found


def test_arms_are_chosen_by_validation_seed_by_seed():
    one = scores(**{"ridge/+ 8x mode": (1.0, 0.25, 0.9), "network/+ 1x mode": (1.0, 1.0, 0.4)})
    other = scores(**{"ridge/+ 1x calibrated": (0.0, 0.75, 0.6)})
    outcome = Outcome([one, other], draws=50)
    assert outcome.chosen("ridge") == ["+ 8x mode", "+ 1x calibrated"]
    assert outcome.chosen("network") == [REAL, REAL]
    np.testing.assert_array_equal(outcome.values("ridge", CHOSEN, "image"), np.full(40, 0.5))
    assert outcome.values("ridge", CHOSEN, "brain").mean() == 0.5
    assert outcome.estimate("ridge", "+ 8x mode", "trial_brain").value == (0.25 + 0.5) / 2


def test_differences_are_paired_by_picture():
    outcome = Outcome([scores(**{"ridge/+ 1x mode": (0.75, 0.5, 0.5)})], draws=400)
    difference = outcome.difference("ridge", "+ 1x mode", REAL, "image")
    first, second = np.arange(40) < 30, np.arange(40) < 20
    assert difference == paired_difference(first * 1.0, second * 1.0, 40, draws=400)
    assert difference.value == 0.25
    assert outcome.difference("ridge", "+ 1x mode", REAL, "brain") == Estimate(0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("low", "high", "sign", "verdict"),
    [
        (0.1, 0.3, 1, True),
        (0.1, 0.3, -1, False),
        (-0.3, -0.1, 1, False),
        (-0.3, -0.1, -1, True),
        (-0.1, 0.3, 1, None),
        (0.0, 0.0, 1, False),
    ],
)
def test_a_claim_holds_where_the_whole_interval_is_on_its_side(low, high, sign, verdict):
    assert augment_page._holds(Estimate(0.2, low, high), sign) is verdict


def test_claims_and_tables_follow_the_numbers():
    as_in_the_paper = {
        "ridge/+ 1x calibrated": (0.5, 0.9, 0.9),
        "ridge/+ 8x calibrated": (0.2, 0.6, 0.5),
        "ridge/+ 8x mode": (0.5, 0.2, 0.5),
    }
    other_seed = as_in_the_paper | {"ridge/+ 8x calibrated": (0.2, 0.7, 0.5)}
    outcome = Outcome([scores(**as_in_the_paper), scores(**other_seed)], draws=400)
    sections = augment_page.sections({60: outcome}, (1.0, 8.0))
    ridge, network = (
        [claim.holds for claim in sections[0].claims if f"({decoder}," in claim.text]
        for decoder in ("ridge", "network")
    )
    assert ridge == [True] * 6
    assert network == [False] * 6  # no difference at all
    evidence = sections[0].claims[4].evidence
    assert evidence.startswith("brain retrieval, + 8x calibrated less + 1x calibrated: -0.250 [-0.3")
    assert evidence.endswith("], by seed -0.300, -0.200")
    paper = sections[0].tables[0]
    assert [row[:3] for row in paper.rows] == [
        (REAL, 0.94, 0.776), ("+ 1x calibrated", 0.879, 0.82), ("+ 8x calibrated", 0.671, 0.688)
    ]  # fmt: skip
    assert [row[4].value for row in paper.rows] == pytest.approx([0.5, 0.9, 0.65])
    gains = {row[0]: row[1:] for row in sections[1].tables[1].rows}
    assert gains["+ 8x calibrated"][0].value == pytest.approx(-0.3)
    assert gains[CHOSEN][1].value == pytest.approx(0.4)
    assert sections[1].tables[3].rows == sections[1].tables[1].rows  # of single trials, here as good


def test_every_amount_has_its_claims():
    better = {"ridge/+ 1x mode": (0.5, 0.9, 0.9)}
    outcomes = {250: Outcome([scores()], draws=50), 60: Outcome([scores(**better)], draws=50)}
    claims = augment_page.sections(outcomes, (1.0, 8.0))[0].claims
    assert len(claims) == 24
    improve = [claim for claim in claims if "Synthetic data improve brain retrieval from single trials" in claim.text]
    assert [(claim.text.split("(")[1], claim.holds) for claim in improve] == [
        ("ridge, 60 real pictures, mean of seeds)", True),
        ("network, 60 real pictures, mean of seeds)", False),
        ("ridge, 250 real pictures, mean of seeds)", False),
        ("network, 250 real pictures, mean of seeds)", False),
    ]
    assert improve[0].evidence.startswith(
        "brain retrieval from single trials, chosen by validation less real only: +0.4"
    )


def test_the_figure_shows_every_amount_and_kind():
    outcomes = {60: Outcome([scores()], draws=50), 250: Outcome([scores(image=0.75, brain=1.0)], draws=50)}
    drawn = augment_page.curves(outcomes, (1.0, 8.0))
    panels = drawn.axes
    assert panels[1].get_ylim()[0] == 0
    assert panels[1].get_ylim()[1] >= 1  # of both panels of a row
    assert [panel.get_title() for panel in panels[:2]] == ["ridge: image retrieval", "ridge: brain retrieval"]
    lines = {line.get_label(): line.get_ydata() for line in panels[0].lines}
    np.testing.assert_allclose(lines["60 real pictures, mode"], [0.5] * 3)
    np.testing.assert_allclose(lines["250 real pictures, calibrated"], [0.75] * 3)
    np.testing.assert_allclose(lines["chance"], [1 / 40] * 2)


def test_pictures_of_the_test_that_the_source_has_learnt_from_are_refused(small_study, people, tmp_path, monkeypatch):
    leaking = prepared(tmp_path / "c", "c", [*numbers(0, 20), "901"], [*numbers(20, 25), "902"], numbers(30, 40))
    monkeypatch.setattr(augment, "open_subjects", lambda settings: [leaking, people[1]])
    with pytest.raises(InputError, match=r"2 test stimuli of .*, '901' among them, are training or validation"):
        augment.study(small_study[0])
