"""Study: do synthetic responses help to decode what a person saw, where there are few real ones?

The first subject's system is adapted to the second subject, the new person, with the few pictures that this person saw
first, and with nothing else of this person. It synthesises responses to pictures that are not among them: those of the
other people, and of this person's the rest, of which only the tokens are used. Decoders learn from the few real trials,
from real and synthetic ones, or from synthetic ones alone, and are scored by the real trials of test pictures. No
synthetic trial is of these, and as long as they are in no other person's training, which is not checked, nothing has
learnt from them. With one subject, the system is trained on those few pictures from scratch.

What is chosen (penalty, weight of synthetic trials, when to stop, how many synthetic trials) is chosen by a share of
the few real pictures. Above 4,000 voxels, those of the highest signal-to-noise ratio in the few real trials (evenly
spaced ones where no picture repeats) are decoded from; tokens of more than 4,096 values are averaged over their places
first.

Shape letters: n trials, s pictures, v voxels, t tokens, d token width.
"""

import dataclasses
import hashlib
import io
import itertools
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from etils import epath
from jaxtyping import Float, Int

from synbrain_jax import decoding, figures, files, metrics
from synbrain_jax.adaptation import adapt
from synbrain_jax.config import AdaptationConfig
from synbrain_jax.data.pairs import Dataset, Records, Trials, load_trials, open_dataset
from synbrain_jax.data.tokens import StoredTokens
from synbrain_jax.decoding import Decoder, Examples, Moments, NetworkSettings
from synbrain_jax.document import Document
from synbrain_jax.errors import InputError
from synbrain_jax.retrieval import retrieval_of_means, retrieval_of_trials
from synbrain_jax.studies.augment_page import DECODERS, FIGURE, REAL, SCORES, Outcome, alone, arm, curves, sections
from synbrain_jax.studies.common import Settings, check_unseen, document, homes, mesh_of, open_subjects, trained
from synbrain_jax.synthesis import SynBrain

AMOUNTS = (60, 250)  # pictures of the new person; the paper's hour is 250
RATIOS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # synthetic trials for each real one
VARIABILITY = {"mode": "none", "calibrated": "calibrated"}  # of both kinds of synthetic responses
VALIDATION_SHARE = 0.2
MAX_VOXELS, MAX_TOKEN_VALUES = 4000, 4096
_PICTURES_AT_ONCE = 256

Synthesize = Callable[..., Float[np.ndarray, "s k v"]]  # `SynBrain.synthesize`


def study(settings: Settings) -> Document:
    """Decodes with every amount of real and synthetic data and every seed; what is done is not done again.

    Raises:
        InputError: there are too few pictures, or none that the new person was not shown.
    """
    started = time.monotonic()
    subjects = open_subjects(settings)
    ratios = (1.0, 8.0) if settings.quick else RATIOS
    new = open_dataset(subjects[min(1, len(subjects) - 1)].path)
    amounts = _amounts(new, settings.quick)
    if len(subjects) > 1:
        for amount in amounts:
            check_unseen(new.limited(None, amount), subjects[:1])
    draws = 200 if settings.quick else 2000
    outcomes = {
        amount: Outcome([_scores_of(settings, seed, subjects, amount, ratios) for seed in settings.seeds], draws)
        for amount in amounts
    }
    drawn = io.BytesIO()
    curves(outcomes, ratios).savefig(drawn, format="png", dpi=figures.DPI)
    files.write_bytes(settings.folder("augment") / f"{FIGURE}.png", drawn.getvalue())
    return document(settings, "Augmentation", started, sections(outcomes, ratios))


def _amounts(new: Dataset, quick: bool) -> tuple[int, ...]:
    there = len(new.stimulus_ids("train"))
    fitting = tuple(amount for amount in AMOUNTS if amount < there) or (there // 2,)
    return fitting[:1] if quick else fitting


# ---- one amount of real data, one seed --------------------------------------------------------------


def _scores_of(
    settings: Settings, seed: int, subjects: Sequence[Dataset], amount: int, ratios: Sequence[float]
) -> dict[str, np.ndarray]:
    """DECODER/ARM/SCORE -> [s], and DECODER/ARM/agreement -> []; kept beside the adapted system."""
    new = subjects[0] if len(subjects) == 1 else subjects[1]
    small = open_dataset(new.path).limited(None, amount).with_validation_share(VALIDATION_SHARE, seed)
    pictures = unseen_pictures(subjects, small)
    if not pictures:
        raise InputError(
            f"{new.name}: all of its pictures are among the {amount} that it learns from or in its test; augmentation "
            "needs others. Give data with more pictures, or more subjects"
        )
    home, system = _system(settings, seed, subjects, small, amount)
    seen = [f"{one.path}" for one in subjects]  # whose pictures are synthesised
    told = hashlib.sha256(repr((ratios, VALIDATION_SHARE, NetworkSettings(), decoding.PENALTIES, seen)).encode())
    file = home / f"scores-{told.hexdigest()[:8]}.npz"
    if not file.exists():
        files.write_npz(file, dict(_decode(system().synthesize, small, pictures, ratios, seed)))
    return files.read_npz(file)


def _system(
    settings: Settings, seed: int, subjects: Sequence[Dataset], small: Dataset, amount: int
) -> tuple[epath.Path, Callable[[], SynBrain]]:
    """The folder of the system that has learnt from `small` and from nothing else of this person; and how to get it.

    The spread of its samples is that of the held-out real trials about what it predicts.
    """
    own = settings.config
    from_validation = dataclasses.replace(own.variability, folds=1)
    if len(subjects) == 1:
        changes = dict(variability=from_validation)
        return homes(settings, seed, [small], **changes)[0], lambda: trained(settings, seed, [small], **changes)[0]
    how = AdaptationConfig(
        stimuli=amount,
        validation_share=VALIDATION_SHARE,
        mapper_steps=max(1, own.stage2.steps // 2),
        seed=seed,
    )
    told = hashlib.sha256(f"{small.path} {how} {from_validation}".encode()).hexdigest()[:8]
    home = homes(settings, seed, subjects[:1])[0] / f"augment-{small.voxels.subject}-{told}"

    def adapted() -> SynBrain:
        source = trained(settings, seed, subjects[:1])[0].bundle
        config = dataclasses.replace(source.config, variability=from_validation)
        return adapt(dataclasses.replace(source, config=config), small.path, home, how, mesh_of(settings))

    return home, adapted


def unseen_pictures(subjects: Sequence[Dataset], small: Dataset) -> list[tuple[Records, int]]:
    """Where the tokens are of every picture of anybody's training or validation that `small` does not have, nor tests.

    In the data sets' order, each picture once. Of the subject of `small` all that is prepared counts.
    """
    known = {name for split in ("train", "validation", "test") for name in small.stimulus_ids(split)}
    found: dict[str, tuple[Records, int]] = {}
    for dataset in map(open_dataset, (one.path for one in subjects)):
        for split in ("train", "validation"):
            records = dataset.records(split)
            for place, name in enumerate(dataset.stimulus_ids(split)):
                if name not in known:
                    found.setdefault(name, (records, place))
    return list(found.values())


def _decode(
    synthesize: Synthesize,
    small: Dataset,
    pictures: Sequence[tuple[Records, int]],
    ratios: Sequence[float],
    seed: int,
) -> Iterator[tuple[str, np.ndarray]]:
    train, held_out, test = (load_trials(small, split) for split in ("train", "validation", "test"))
    voxels = best_voxels(train)
    train, held_out, test = (_examples(trials, voxels) for trials in (train, held_out, test))
    origin = train.mean_tokens()
    count = round(max(ratios) * len(train.fmri))
    order = np.random.default_rng(seed).permutation(len(pictures))[:count]
    shown = [pictures[place] for place in order]
    synthetic = {kind: synthesised(synthesize, shown, count, kind, seed, voxels) for kind in VARIABILITY}
    fits = {"ridge": _ridges, "network": _networks}
    for name in DECODERS:
        for of_arm, decoders in fits[name](train, held_out, synthetic, ratios, seed):
            decoder, agreement = decoding.choose(decoders, held_out, origin)
            yield f"{name}/{of_arm}/agreement", np.array(agreement)
            for way, score in (("", retrieval_of_means), ("trial_", retrieval_of_trials)):
                told = score(decoder, test, origin)
                yield from ((f"{name}/{of_arm}/{way}{which}", getattr(told, which)) for which in SCORES)
    yield "pool", np.array(told.pool)


def best_voxels(train: Trials) -> Int[np.ndarray, "v"]:
    """All, or where there are more than MAX_VOXELS so many, of the highest `metrics.ncsnr`; ascending.

    Where no picture repeats, which leaves the ratio unknown, evenly spaced ones.
    """
    count = train.fmri.shape[1]
    if count <= MAX_VOXELS:
        return np.arange(count)
    if len(train.stimulus) == len(train.stimulus_id):
        return np.linspace(0, count - 1, MAX_VOXELS).round().astype(int)
    return np.sort(np.argsort(-metrics.ncsnr(train.fmri, train.stimulus), kind="stable")[:MAX_VOXELS])


def _examples(trials: Trials, voxels: Int[np.ndarray, "v"]) -> Examples:
    return Examples.alike(trials.fmri[:, voxels], decoded_tokens(trials.tokens), trials.stimulus)


def decoded_tokens(tokens: Float[np.ndarray, "s t d"] | StoredTokens) -> Float[np.ndarray, "s u d"]:
    """The tokens, or where they have more than MAX_TOKEN_VALUES values their mean over places [s 1 d]."""
    if np.prod(tokens.shape[1:]) <= MAX_TOKEN_VALUES:
        return tokens[:]
    parts = (tokens[start : start + _PICTURES_AT_ONCE] for start in range(0, len(tokens), _PICTURES_AT_ONCE))
    return np.concatenate([part.mean(axis=1, keepdims=True) for part in parts])


def synthesised(
    synthesize: Synthesize,
    pictures: Sequence[tuple[Records, int]],
    count: int,
    kind: str,
    seed: int,
    voxels: Int[np.ndarray, "v"],
) -> Examples:
    """`count` synthetic trials: one of each picture, then another one of each; of the mode they are the same."""
    samples = -(-count // len(pictures))
    fmri = np.empty((samples, len(pictures), len(voxels)), np.float32)
    tokens = []
    for start in range(0, len(pictures), _PICTURES_AT_ONCE):
        part = pictures[start : start + _PICTURES_AT_ONCE]
        whole = np.stack([records[place].tokens for records, place in part]).astype(np.float32)
        made = synthesize(whole, jax.random.key(seed), k=samples, variability=VARIABILITY[kind], first=start)
        fmri[:, start : start + len(part)] = made.swapaxes(0, 1)[:, :, voxels]
        tokens.append(decoded_tokens(whole))
    stimulus = np.tile(np.arange(len(pictures)), samples)
    return Examples.alike(fmri.reshape(-1, len(voxels))[:count], np.concatenate(tokens), stimulus[:count])


# ---- what decoders learn from ----------------------------------------------------------------------

# Arm -> decoders among which validation chooses.
Arms = Iterator[tuple[str, Sequence[Decoder]]]


def _weights(ratio: float) -> tuple[float, ...]:
    """Of a synthetic trial: that of a real one, or so that all of them count half as much as all real ones."""
    return tuple(dict.fromkeys((1.0, 0.5 / ratio)))


def _rows(trials: Examples, start: int, stop: int) -> Examples:
    fields = ("fmri", "stimulus", "weight")
    return dataclasses.replace(trials, **{field: getattr(trials, field)[start:stop] for field in fields})


def _ridges(
    train: Examples, held_out: Examples, synthetic: dict[str, Examples], ratios: Sequence[float], seed: int
) -> Arms:
    yield REAL, decoding.fit_ridges(train)
    real = Moments.of(train)
    for kind, trials in synthetic.items():
        counts = [round(ratio * len(train.fmri)) for ratio in ratios]
        parts = (Moments.of(_rows(trials, *ends)) for ends in itertools.pairwise((0, *counts)))
        for ratio, sums in zip(ratios, itertools.accumulate(parts, Moments.plus), strict=True):
            fits = [decoding.fit_ridges(real.plus(sums, weight)) for weight in _weights(ratio)]
            yield arm(kind, ratio), [decoder for of_weight in fits for decoder in of_weight]
        yield alone(kind, ratios), decoding.fit_ridges(sums)


def _networks(
    train: Examples, held_out: Examples, synthetic: dict[str, Examples], ratios: Sequence[float], seed: int
) -> Arms:
    origin = train.mean_tokens()

    def fitted(trials: Examples) -> Decoder:
        return decoding.fit_network(trials, held_out, origin, NetworkSettings(), seed)

    yield REAL, [fitted(train)]
    for kind, trials in synthetic.items():
        for ratio in ratios:
            more = _rows(trials, 0, round(ratio * len(train.fmri)))
            yield arm(kind, ratio), [fitted(train.with_more(more, weight)) for weight in _weights(ratio)]
        yield alone(kind, ratios), [fitted(more)]
