"""Study: do synthetic responses behave as measured ones do, across trials, brains, categories and pictures?

All of it on the test split, which nothing was fitted to. Each number is a row of draws of stimuli, the same draws for
every seed and comparison: seeds are averaged draw by draw, and so are differences and shares. What took long is kept
beside each trained system.

Shape letters: s stimuli, n trials, k samples, v voxels, r regions, d draws, c categories.
"""

import csv
import dataclasses
import functools
import hashlib
import io
import time
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from etils import epath
from jaxtyping import Bool, Float, Int
from tqdm import tqdm

from synbrain_jax import consistency as measure
from synbrain_jax.consistency import Responses
from synbrain_jax.data.pairs import Dataset, Trials, load_trials
from synbrain_jax.data.voxels import Voxels
from synbrain_jax.document import Document
from synbrain_jax.errors import InputError
from synbrain_jax.evaluation import MIN_ROI_VOXELS, stimulus_targets
from synbrain_jax.files import read_npz, read_text, write_npz
from synbrain_jax.metrics import group_means
from synbrain_jax.models.brain_vae import BrainVAE
from synbrain_jax.models.semantic_to_neural import SemanticToNeural
from synbrain_jax.statistics import in_parts, resamples, standardised, weighted_r
from synbrain_jax.studies.common import Settings, document, homes, open_subjects, trained
from synbrain_jax.studies.consistency_figures import Across, Drawn, Result
from synbrain_jax.studies.consistency_page import sections
from synbrain_jax.synthesis import SynBrain, Variability, model_order

DRAWS, QUICK_DRAWS = 500, 60
SPLITS, QUICK_SPLITS = 4, 1  # random halves of the trials
FEW_STIMULI = 12  # up to so many, each is a category of its own
CLUSTERS = 5
MAX_REGIONS = 24
MAX_SAMPLES = 20  # per stimulus
MAX_LATENT_VALUES = 50_000_000  # 200 MB
EVERYWHERE = "all voxels"
_VERSION = 3  # of the numbers in a scores file


@dataclasses.dataclass(frozen=True, eq=False)
class Categories:
    """What the stimuli of all brains show."""

    names: tuple[str, ...]
    of: Mapping[str, int]  # stimulus -> index of its category; others have none
    origin: str  # in words

    def masks(self, stimulus_id: Sequence[str]) -> dict[str, Bool[np.ndarray, "s"]]:
        """Category -> which stimuli it holds, of those with two sides."""
        found = np.array([self.of.get(name, -1) for name in stimulus_id])
        masks = {name: found == index for index, name in enumerate(self.names)}
        return {name: inside for name, inside in masks.items() if inside.any() and not inside.all()}


@dataclasses.dataclass(frozen=True, eq=False)
class Brain:
    """One subject's test split."""

    subject: str
    test: Trials
    voxels: Voxels
    trials: Responses
    rois: Mapping[str, Bool[np.ndarray, "v"]]
    inside: Mapping[str, Bool[np.ndarray, "s"]]  # category -> its stimuli
    counts: Float[np.ndarray, "d s"]

    @property
    def category(self) -> Int[np.ndarray, "s"]:
        """Place in `inside` of each stimulus's category; -1 where it has none."""
        return np.where(self.masks.any(axis=0), self.masks.argmax(axis=0), -1)

    @property
    def masks(self) -> Bool[np.ndarray, "c s"]:
        return np.stack(list(self.inside.values()))


def study(settings: Settings) -> Document:
    """Tables, figures and claims of all trained systems of `settings`."""
    started = time.monotonic()
    datasets = open_subjects(settings)
    draws, splits = (QUICK_DRAWS, QUICK_SPLITS) if settings.quick else (DRAWS, SPLITS)
    tests = [load_trials(dataset, "test") for dataset in datasets]
    categories = categories_of(settings.categories, tests)
    brains = [_brain(*pair, categories, draws) for pair in zip(datasets, tests, strict=True)]
    seeds: list[list[Drawn]] = []
    measured: list[Drawn] = []
    with tqdm(total=(1 + len(settings.seeds)) * len(brains), desc="consistency", unit="scores", disable=None) as bar:
        for brain in brains:
            measured.append(_measured(brain, splits))
            bar.update()
        for seed in settings.seeds:
            scores = []
            for dataset, brain in zip(datasets, brains, strict=True):  # a system of its own for each
                (system,), (home,) = (find(settings, seed, [dataset]) for find in (trained, homes))
                scores.append(_kept(home, brain, functools.partial(_synthetic, system, brain, seed)))
                bar.update()
            seeds.append(scores)
    across = [_across(brains, [one["responses"] for one in scores], draws) for scores in seeds]
    results = [
        Result(
            brain.subject, brain.voxels, real, [scores[i] for scores in seeds], tuple(brain.inside), tuple(brain.rois)
        )
        for i, (brain, real) in enumerate(zip(brains, measured, strict=True))
    ]
    folder = settings.folder("consistency")
    made = sections(results, across, categories.origin, settings.seeds, folder)
    return document(settings, "Consistency and interpretation", started, made)


def _brain(dataset: Dataset, test: Trials, categories: Categories, draws: int) -> Brain:
    rois = {name: inside for name, inside in dataset.voxels.rois.items() if inside.sum() >= MIN_ROI_VOXELS}
    every = {EVERYWHERE: np.ones(dataset.n_voxels, bool)}
    inside = categories.masks(test.stimulus_id)
    if not inside:
        raise InputError(f"{dataset.name}: no category divides its {len(test.stimulus_id)} test stimuli into two sides")
    return Brain(
        subject=dataset.voxels.subject,
        test=test,
        voxels=dataset.voxels,
        trials=Responses(test.fmri, test.stimulus, _runs(test)),
        rois=every | dict(list(rois.items())[:MAX_REGIONS]),
        inside=inside,
        counts=resamples(len(test.stimulus_id), draws),
    )


def _runs(test: Trials) -> Int[np.ndarray, "n"]:
    """The run of each trial; where no stimulus is in two of them, or runs are unknown, each trial is its own."""
    blocks = np.unique(np.stack([test.stimulus, test.run]), axis=1)
    return test.run if blocks.shape[1] > len(test.stimulus_id) else np.arange(len(test.run))


# ---- categories ------------------------------------------------------------------------------------


def categories_of(given: str | None, tests: Sequence[Trials]) -> Categories:
    """The file's categories; without one the stimuli themselves if they are few, else clusters of their tokens."""
    stimuli = {name: (test, i) for test in reversed(tests) for i, name in enumerate(test.stimulus_id)}
    if given is not None:
        return _read_categories(given, stimuli)
    if len(stimuli) <= FEW_STIMULI:
        names = tuple(stimuli)
        return Categories(names, {name: i for i, name in enumerate(names)}, "each stimulus is a category")
    features = np.stack([np.mean(test.tokens[i], axis=0, dtype=np.float32) for test, i in stimuli.values()])
    found = measure.clusters(features, CLUSTERS).tolist()
    names = tuple(f"cluster {number + 1}" for number in range(max(found) + 1))
    origin = f"no categories were given: they are {len(names)} k-means clusters of the test pictures' mean tokens"
    return Categories(names, dict(zip(stimuli, found, strict=True)), origin)


def _read_categories(file: str, stimuli: Mapping[str, object]) -> Categories:
    path = epath.Path(file).expanduser()
    if path.suffix == ".npz":
        arrays = read_npz(path)
        rows = list(zip(*(arrays[key].astype(str).tolist() for key in _COLUMNS if key in arrays), strict=False))
    else:
        lines = csv.DictReader(io.StringIO(read_text(path)))
        rows = [tuple(line[key] for key in _COLUMNS) for line in lines if set(_COLUMNS) <= line.keys()]
    given = {row[0]: row[1] for row in rows if len(row) == 2 and row[0] in stimuli and row[1]}
    names = tuple(dict.fromkeys(given.values()))
    if len(names) < 2 and len(given) in (0, len(stimuli)):
        raise InputError(
            f"{path}: names {len(names)} categories for {len(given)} of the {len(stimuli)} test stimuli; expected a "
            f".csv with the header {','.join(_COLUMNS)}, or an .npz of two arrays of these names, in which test "
            f"stimuli (such as '{next(iter(stimuli))}') are of two categories or of one and none"
        )
    return Categories(names, {name: names.index(of) for name, of in given.items()}, f"categories are those of {path}")


_COLUMNS = ("stimulus_id", "category")


# ---- scores of one brain ---------------------------------------------------------------------------


def _measured(brain: Brain, splits: int) -> Drawn:
    """What real trials have in common with other real trials."""
    scores = {"trial, trial": _agreement(brain.counts, brain.trials)}
    maps, rdms, times = [], [], []
    for seed in range(splits):
        half = measure.halves(brain.trials, seed)
        parts = [brain.trials.of(half == side) for side in (0, 1)]
        if len(np.unique(parts[0].stimulus)) < len(brain.test.stimulus_id):
            return scores  # some stimuli were measured once
        maps.append(_map_scores(brain, *(measure.moments(part) for part in parts))["r"])
        rdms.append(_rdm_scores(brain, *(_means(part) for part in parts)))
        times.append(len(half) / (half == 0).sum())
    again = functools.partial(measure.spearman_brown, times=float(np.mean(times)))
    return scores | {"t map, again": again(np.mean(maps, axis=0)), "rdm, again": again(np.mean(rdms, axis=0))}


def _synthetic(system: SynBrain, brain: Brain, seed: int) -> Drawn:
    """What synthetic responses have in common with real ones, and the responses; what figures need has no draws."""
    tokens, trials = brain.test.tokens, brain.trials
    expected = system.predict(tokens)
    k = int(np.clip(np.bincount(trials.stimulus).max(), 2, MAX_SAMPLES))
    variability = _variability(system)
    samples = system.synthesize(tokens, jax.random.key(seed), k=k, variability=variability)
    sampled = measure.as_responses(samples)
    once = measure.as_responses(expected[:, None])
    scores = {
        "responses": expected,
        "variability": np.array(variability),
        "sample, trial": _agreement(brain.counts, sampled, trials),
        "expected, trial": _agreement(brain.counts, once, trials),
        "sample, sample": _agreement(brain.counts, sampled),
    }
    alike = measure.as_many(samples, trials)
    real, made = measure.moments(trials), measure.moments(alike)
    scores |= {f"t map, {name}": values for name, values in _map_scores(brain, real, made).items()}
    scores |= _region_scores(brain, alike)
    target = stimulus_targets(brain.test)
    scores["rdm, expected"] = _rdm_scores(brain, target, expected)
    scores["rdm, samples"] = _rdm_scores(brain, target, _means(alike))
    scores |= {"figure rdm real": measure.rdm(target), "figure rdm made": measure.rdm(expected)}
    return scores | {"figure category": brain.category} | _latent_scores(system, brain)


def _agreement(
    counts: Float[np.ndarray, "d s"], one: Responses, another: Responses | None = None
) -> Float[np.ndarray, "3 d"]:
    """Correlation with responses to the same stimulus, with those to others, and the difference."""
    found = measure.agreement(one, another)
    return np.stack([measure.weighted_mean(r, counts) for r in (found.own, found.other, found.own - found.other)])


def _means(responses: Responses) -> Float[np.ndarray, "s v"]:
    return group_means(responses.fmri, responses.stimulus)


def _variability(system: SynBrain) -> Variability:
    if system.bundle.spread is not None:
        return "calibrated"
    return "latent_noise" if system.bundle.latent_std is None else "posterior"


def _map_scores(brain: Brain, real: measure.Moments, made: measure.Moments) -> Drawn:
    """r and dice [d c] of the most selective voxels; of all stimuli the dice of significant ones, and their numbers.

    In a draw some stimuli are there twice and others not at all, which makes maps noisier than those of all stimuli:
    the draws are shifted to have what all stimuli give as their mean.
    """
    masks = brain.masks

    def of_part(counts: Float[np.ndarray, "d s"]) -> Float[np.ndarray, "d c 2"]:
        t = [measure.contrasts(side, masks, counts).t for side in (real, made)]
        return np.stack([measure.row_r(*t), measure.dice(*map(measure.top, t))], axis=-1).swapaxes(0, 1)

    drawn = in_parts(of_part, brain.counts, width=len(masks) * real.total.shape[1])
    drawn[brain.counts @ masks.T == 0] = np.nan  # draws without the category
    drawn[1:] = np.clip(drawn[1:] + drawn[0] - _mean_over_draws(drawn[1:]), (-1, 0), 1)
    both = [measure.contrasts(side, masks, brain.counts[:1]) for side in (real, made)]
    chosen = [measure.significant(one.t[:, 0], one.freedom[:, 0]) for one in both]
    return {
        "r": drawn[..., 0],
        "dice": drawn[..., 1],
        "significant": np.stack([measure.dice(*chosen), *(one.sum(axis=1) for one in chosen)], axis=1),
        "figure": np.stack([one.t[:, 0] for one in both], axis=1),
    }


def _mean_over_draws(drawn: Float[np.ndarray, "d c 2"]) -> Float[np.ndarray, "c 2"]:
    return np.stack([measure.known_mean(values) for values in drawn.T], axis=1)


def _region_scores(brain: Brain, made: Responses) -> Drawn:
    """d' [2 c r] of every region, real and synthetic; and how what regions do not share correlates [d].

    Over regions and categories, each category's d' less its mean over regions, which says only how strong a stimulus
    the category is for all. "all voxels" is no region.
    """
    sides = []
    for one in (brain.trials, made):
        of = measure.moments(dataclasses.replace(one, fmri=measure.region_means(one.fmri, brain.rois)))
        sides.append(measure.contrasts(of, brain.masks, brain.counts).d_prime.swapaxes(0, 1))
    found = {"d prime": np.stack([side[0] for side in sides])}
    own = [name != EVERYWHERE for name in brain.rois]
    if sum(own) > 1:
        parts = [side[:, :, own] - side[:, :, own].mean(axis=2, keepdims=True) for side in sides]
        r = measure.row_r(*(part.reshape(len(part), -1) for part in parts))
        r[1:] = np.clip(r[1:] + r[0] - np.nanmean(r[1:]), -1, 1)  # as in `_map_scores`
        found["d prime, r"] = r
    return found


def _rdm_scores(brain: Brain, one: Float[np.ndarray, "s v"], another: Float[np.ndarray, "s v"]) -> np.ndarray:
    """Spearman correlation of the RDMs of every region [d r]."""
    rdms = [[measure.rdm(side[:, inside]) for side in (one, another)] for inside in brain.rois.values()]
    return np.stack([measure.rdm_r(*pair, brain.counts) for pair in rdms], axis=1)


def _latent_scores(system: SynBrain, brain: Brain) -> Drawn:
    """How the mapper's latents lie among BrainVAE's latents of the trials."""
    config, params = system.bundle.config, system.bundle.params
    brain_vae, mapper = BrainVAE(config.brain_vae), SemanticToNeural(config.mapper)
    order = model_order(config.data.voxel_order, system.bundle.voxels.order)
    encode = jax.jit(lambda params, fmri: brain_vae.apply({"params": params}, fmri, method="encode").mean)
    place = jax.jit(lambda params, tokens: mapper.apply({"params": params}, tokens, method="predict_latent"))
    s, n = len(brain.test.stimulus_id), len(brain.trials.stimulus)
    wanted = min(s, int(MAX_LATENT_VALUES / np.prod(system.token_shape) * s / (n + s)))
    if wanted < 3:
        return {}
    chosen = np.unique(np.linspace(0, s - 1, wanted).round().astype(int))
    rows = np.isin(brain.trials.stimulus, chosen)
    stimulus = np.searchsorted(chosen, brain.trials.stimulus[rows])
    trials = Responses(
        _in_batches(encode, params["brain_vae"], brain.trials.fmri[rows][:, order]), stimulus, brain.trials.run[rows]
    )
    mapped = _in_batches(place, params["mapper"], brain.test.tokens[chosen])
    counts = brain.counts[:, chosen]
    plane = measure.latent_plane(trials.fmri, stimulus, mapped)
    spread = mapped.var(axis=0).sum() / _means(trials).var(axis=0).sum()
    return {
        "latent, trial": _agreement(counts, trials),
        "latent, mapped": _agreement(counts, measure.as_responses(mapped[:, None]), trials),
        "latent spread": np.array([spread]),
        "figure latent trials": plane.trials,
        "figure latent mapped": plane.mapped,
        "figure latent share": plane.share,
        "figure latent stimulus": stimulus,
        "figure latent category": brain.category[chosen],
    }


def _in_batches(function, params, values: Float[np.ndarray, "n ..."], size: int = 32) -> Float[np.ndarray, "n f"]:
    params = jax.device_put(params)
    parts = []
    for start in range(0, len(values), size):
        part = values[start : start + size]
        padded = np.pad(part, [(0, size - len(part))] + [(0, 0)] * (part.ndim - 1))
        parts.append(np.asarray(function(params, padded))[: len(part)].reshape(len(part), -1))
    return np.concatenate(parts)


def _kept(home: epath.Path, brain: Brain, scores) -> Drawn:
    """What `scores()` gives, kept beside the system for the same trials, categories and draws."""
    what = hashlib.sha256(f"{_VERSION} {brain.counts.shape} {list(brain.rois)} {brain.test.stimulus_id}".encode())
    for array in (brain.trials.stimulus, *brain.inside.values()):
        what.update(np.ascontiguousarray(array).tobytes())
    file = home / f"consistency-{what.hexdigest()[:8]}.npz"
    if not file.exists():
        write_npz(file, scores())
    return read_npz(file)


# ---- several brains --------------------------------------------------------------------------------


def _across(brains: Sequence[Brain], made: Sequence[Float[np.ndarray, "_ _"]], draws: int) -> Across | None:
    """Responses and RDMs of the stimuli that all brains saw; None for one brain, or without three of them."""
    shared = [name for name in brains[0].test.stimulus_id if all(name in brain.test.stimulus_id for brain in brains)]
    names = [name for name in brains[0].rois if all(name in brain.rois for brain in brains)]
    if len(brains) < 2 or len(shared) < 3:
        return None
    real, synthetic, rdms = [], [], []
    for brain, responses in zip(brains, made, strict=True):
        rows = [brain.test.stimulus_id.index(name) for name in shared]
        sides = stimulus_targets(brain.test)[rows], responses[rows]
        for side, profiles in zip(sides, (real, synthetic), strict=True):
            profiles.append(measure.region_means(side, {name: brain.rois[name] for name in names}))
        rdms.append([[measure.rdm(side[:, brain.rois[name]]) for name in names] for side in sides])
    counts = resamples(len(shared), draws)

    def profile_r(one, another) -> Float[np.ndarray, "d r"]:
        return weighted_r(standardised(one), standardised(another), counts)

    def similarity_r(one, another) -> Float[np.ndarray, "d r"]:
        return np.stack([measure.rdm_r(x, y, counts) for x, y in zip(one, another, strict=True)], axis=1)

    return Across(
        stimuli=len(shared),
        rois=tuple(names),
        profiles=measure.across_brains(real, synthetic, profile_r),
        similarity=measure.across_brains(*zip(*rdms, strict=True), similarity_r),
    )
