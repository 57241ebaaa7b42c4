"""Study: with little data of a new brain, is a system that is adapted better than one trained from scratch, or ridge?

The first subject's system, trained on all its data, is adapted to each other subject on its first scan session and on
the stimuli that it saw first, more and more of them. From the same data a system with the same settings is trained from
scratch, and both ridge baselines are fitted. Both networks hold the same share of the stimuli out for validation, which
picks their checkpoints and stops them; the baselines cross-validate on all. Everything is scored on the test split.
With the amount that the claims are about the system is adapted without `readout_weight`, too, as in SynBrain.

Intervals are over test stimuli, for each seed; a number for all seeds is their mean, with the mean of the ends.

Shape letters: s stimuli, v voxels.
"""

import dataclasses
import hashlib
import io
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from etils import epath
from jaxtyping import Float
from matplotlib.figure import Figure as Picture
from matplotlib.ticker import NullLocator

from synbrain_jax import figures, metrics
from synbrain_jax.adaptation import adapt, chosen_by_validation
from synbrain_jax.baselines import baseline_predictions
from synbrain_jax.config import AdaptationConfig
from synbrain_jax.data.pairs import Dataset, Trials, load_trials, open_dataset
from synbrain_jax.document import Claim, Document, Figure, Section, Table
from synbrain_jax.errors import InputError
from synbrain_jax.evaluation import MIN_CEILING_R, stimulus_targets
from synbrain_jax.files import read_npz, write_bytes, write_npz
from synbrain_jax.statistics import Estimate, VoxelR, voxel_r_intervals
from synbrain_jax.studies.common import (
    Settings,
    check_unseen,
    document,
    homes,
    mean_estimate,
    mesh_of,
    open_subjects,
    trained,
)

_DEFAULT = AdaptationConfig()
STIMULI = (250, 500, 1000, 2000, 4000, 8000)
VALIDATION_SHARE, PATIENCE = 0.1, 3
ROWS = {
    "adapted": "adapted",
    "plain": "adapted, no readout",
    "scratch": "from scratch",
    "ridge": "ridge",
    "kernel_ridge": "kernel ridge",
}
_RIVALS = {**ROWS, "plain": "adaptation without the readout", "scratch": "training from scratch"}
_LINES = dict(zip(ROWS, (figures.BLUE, "#56B4E9", figures.VERMILION, figures.GREY, "#009E73"), strict=True))
_MARKERS = dict(zip(ROWS, "ovs^D", strict=True))


@dataclasses.dataclass(frozen=True)
class Amount:
    """How much of the new brain's data is learnt from: the first scan sessions, or the stimuli that came first."""

    name: str
    trials: int = 0
    stimuli: int = 0
    sessions: int | None = None


def study(settings: Settings) -> Document:
    """Adapts and trains with every amount of data and every seed; what is done is not done again.

    Raises InputError where the config has fewer than two subjects.
    """
    started = time.monotonic()
    source, *others = open_subjects(settings)
    if not others:
        raise InputError(
            "data.subjects names one person; the study of adaptation needs another: --change data.subjects=[1,2], or "
            "for prepared data data.more_sources"
        )
    # All that is prepared, whatever the config says of the source's.
    others = [open_dataset(new.path) for new in others]
    for new in others:
        for amount in amounts_of(new, settings.quick):
            check_unseen(_part(new, amount), [source])
    sections = [_subject(settings, source, new) for new in others]
    return document(settings, "Adaptation", started, sections)


def amounts_of(new: Dataset, quick: bool = False) -> list[Amount]:
    """One session, where the data set knows sessions and has several; and the stimuli seen first, up to all of them.

    `quick`: the first of these.
    """
    total = len(new.stimulus_ids("train"))
    counts = [count for count in STIMULI if count <= total] or [total]
    asked = [Amount(f"{count:,} stimuli", stimuli=count) for count in counts]
    if len(np.unique(new.sessions("train"))) > 1:
        asked.insert(0, Amount("1 session", sessions=1))
    if quick:
        del asked[1:]
    return [dataclasses.replace(one, **_counts(_part(new, one))) for one in asked]


def _counts(part: Dataset) -> dict[str, int]:
    per_stimulus = part.trials_per_record("train")
    return dict(stimuli=len(per_stimulus), trials=int(per_stimulus.sum()))


def least_of(amounts: Iterable[Amount]) -> Amount:
    """The one that the claims are about: a session, or else the least data."""
    return min(amounts, key=lambda one: (one.sessions is None, one.trials))


def _part(new: Dataset, amount: Amount) -> Dataset:
    return new.limited(amount.sessions, None if amount.sessions else amount.stimuli)


# ---- predictions, kept -----------------------------------------------------------------------------


def _predictions(
    settings: Settings, seed: int, source: Dataset, new: Dataset, test: Trials, amount: Amount, plain: bool
) -> dict[str, Float[np.ndarray, "s v"]]:
    """Of both networks, for the test stimuli; `plain`: and of one adapted without the weight."""
    part = _part(new, amount).with_validation_share(VALIDATION_SHARE, seed)
    own = settings.config
    scratch = dict(
        stage1=chosen_by_validation(own.stage1, PATIENCE),
        stage2=chosen_by_validation(own.stage2, PATIENCE),
        variability=dataclasses.replace(own.variability, folds=0),
    )
    how = AdaptationConfig(
        sessions=amount.sessions,
        stimuli=None if amount.sessions else amount.stimuli,
        validation_share=VALIDATION_SHARE,
        mapper_steps=max(1, own.stage2.steps // 2),
        patience=PATIENCE,
        seed=seed,
    )

    def adapted(how: AdaptationConfig) -> Float[np.ndarray, "s v"]:
        what = f"{new.path} {json.dumps(dataclasses.asdict(how), sort_keys=True)}"
        told = hashlib.sha256(what.encode()).hexdigest()[:8]
        at = homes(settings, seed, [source])[0] / f"few-{new.voxels.subject}-{told}"

        def predict() -> Float[np.ndarray, "s v"]:
            bundle = trained(settings, seed, [source])[0].bundle
            without_spread = dataclasses.replace(bundle.config, variability=scratch["variability"])
            system = adapt(dataclasses.replace(bundle, config=without_spread), new.path, at, how, mesh_of(settings))
            return system.predict(test.tokens)

        return _kept(at / "test.npz", predict)

    def from_scratch() -> Float[np.ndarray, "s v"]:
        return trained(settings, seed, [part], **scratch)[0].predict(test.tokens)

    found = {"adapted": adapted(how)}
    if plain:
        found["plain"] = adapted(dataclasses.replace(how, readout_weight=0.0))
    return found | {"scratch": _kept(homes(settings, seed, [part], **scratch)[0] / "test.npz", from_scratch)}


def _kept(file: epath.Path, predict: Callable[[], Float[np.ndarray, "s v"]]) -> Float[np.ndarray, "s v"]:
    if not file.exists():
        write_npz(file, {"prediction": predict()})
    return read_npz(file)["prediction"]


def _baselines(settings: Settings, new: Dataset, test: Trials, amount: Amount) -> dict[str, Float[np.ndarray, "s v"]]:
    part = _part(new, amount)
    told = hashlib.sha256(f"{new.path} {new.voxels.normalisation} {part.stimulus_ids('train')}".encode())
    file = settings.workdir / "baselines" / f"{new.voxels.subject}-{amount.trials}-{told.hexdigest()[:8]}.npz"
    if not file.exists():
        found = baseline_predictions(load_trials(part, "train"), test)
        write_npz(file, {name: found[name] for name in ("ridge", "kernel_ridge")})
    return read_npz(file)


# ---- one new brain ---------------------------------------------------------------------------------


def _subject(settings: Settings, source: Dataset, new: Dataset) -> Section:
    test, draws = load_trials(new, "test"), 200 if settings.quick else 2000
    target, ceiling = stimulus_targets(test), ceiling_r(new, test)
    found: dict[Amount, list[VoxelR]] = {}
    amounts = amounts_of(new, settings.quick)
    for amount in amounts:
        baselines = _baselines(settings, new, test, amount)
        plain = amount == least_of(amounts) and not settings.quick
        found[amount] = [
            voxel_r_intervals(
                {**_predictions(settings, seed, source, new, test, amount, plain), **baselines},
                target,
                ceiling,
                min_ceiling_r=MIN_CEILING_R,
                draws=draws,
                seed=seed,
            )
            for seed in settings.seeds
        ]
    return section(source.voxels.subject, new.voxels.subject, found, settings, len(target))


def ceiling_r(new: Dataset, test: Trials) -> Float[np.ndarray, "v"] | None:
    """Of each voxel, what a perfect predictor's r comes to; None where nothing tells.

    A repeat is what `metrics.repeats` says, not a trial: those of a run share noise.
    """
    if new.voxels.ncsnr is None:
        return None
    averaged = np.bincount(metrics.repeats(test.fmri, test.stimulus, test.run).stimulus)
    return metrics.noise_ceiling_r(new.voxels.ncsnr, averaged)


def section(
    source: str, new: str, found: Mapping[Amount, Sequence[VoxelR]], settings: Settings, n_stimuli: int
) -> Section:
    """Tables, figure and claims of one new brain, from the scores of each amount and seed; writes the figure."""
    values, leads = curves(found)
    shown = [row for row in ROWS if any(row in rows for rows in values.values())]
    what = "share of the noise ceiling, median voxel" if _shared(found) else "median voxel r"
    figure = f"adaptation-{new}"
    drawn = io.BytesIO()
    draw(values, f"{source} to {new}", what).savefig(drawn, format="png", dpi=figures.DPI)
    write_bytes(settings.folder("adapt") / f"{figure}.png", drawn.getvalue())
    scores = Table(
        title=f"{source} to {new}: {what}, {n_stimuli} test stimuli",
        columns=("learnt from", "stimuli", "trials", *(ROWS[row] for row in shown)),
        rows=tuple(
            (amount.name, amount.stimuli, amount.trials, *(rows.get(row) for row in shown))
            for amount, rows in values.items()
        ),
        note=(
            f"With 95 % bootstrap intervals over stimuli: means of {len(settings.seeds)} seeds' values, and of their "
            "intervals' ends."
        ),
    )
    differences = Table(
        title=f"Adapted less another, {what}, by seed",
        columns=("learnt from", "less", *(f"seed {seed}" for seed in settings.seeds)),
        rows=tuple(
            (amount.name, ROWS[row], *by_seed) for amount, others in leads.items() for row, by_seed in others.items()
        ),
        note="Paired: both of the same resamples of the test stimuli.",
    )
    caption = (
        f"Responses of {new} predicted from few data: {what}, against the trials learnt from. Lines are means of "
        f"{len(settings.seeds)} seeds, bands the mean 95 % intervals over stimuli."
    )
    return Section(
        title=f"Adaptation from {source} to {new}",
        text=(
            f"Adapted: all of BrainVAE, with a weight of {_DEFAULT.readout_weight:g} for what it reads out of the "
            "source mapper's latents (SynBrain has no such term), then of the mapper the part "
            f"`{_DEFAULT.part}`, for at most half as many steps as the source's. {VALIDATION_SHARE:.0%} of the "
            "stimuli are held out for validation, of the system that is trained from scratch too; the regressions are "
            "fitted to all."
            + (f" No readout: the same without that weight, with {least_of(values).name} alone." * ("plain" in shown))
        ),
        tables=(scores, differences),
        figures=(Figure(figure, caption),),
        claims=tuple(claims(leads, what)),
    )


def _shared(found: Mapping[Amount, Sequence[VoxelR]]) -> bool:
    """Whether every score is known as a share of the ceiling."""
    return all(one.share for scores in found.values() for one in scores)


def curves(
    found: Mapping[Amount, Sequence[VoxelR]],
) -> tuple[dict[Amount, dict[str, Estimate]], dict[Amount, dict[str, list[Estimate]]]]:
    """For each amount, every row's score over seeds, and by seed how far the adapted system is above each other row."""
    score, lead = ("share", "lead_share") if _shared(found) else ("r", "lead")
    values = {
        amount: {row: mean_estimate([getattr(one, score)[row] for one in seeds]) for row in getattr(seeds[0], score)}
        for amount, seeds in found.items()
    }
    leads = {
        amount: {row: [getattr(one, lead)[row] for one in seeds] for row in getattr(seeds[0], lead)}
        for amount, seeds in found.items()
    }
    return values, leads


def claims(leads: Mapping[Amount, Mapping[str, Sequence[Estimate]]], what: str) -> list[Claim]:
    """With one session, or else the least data: is the adapted system better than each other row, in every seed?"""
    least, made = least_of(leads), []
    for row, by_seed in leads[least].items():
        told = ", ".join(f"{one.value:+.3f} [{one.low:+.3f}, {one.high:+.3f}]" for one in by_seed)
        above, below = all(one.low > 0 for one in by_seed), all(one.high < 0 for one in by_seed)
        made.append(
            Claim(
                f"Adaptation with {least.name} beats {_RIVALS[row]} (the interval is above 0 in all seeds)",
                True if above else False if below else None,
                f"{what}, adapted less {ROWS[row]}, by seed: {told}",
            )
        )
    return made


def draw(values: Mapping[Amount, Mapping[str, Estimate]], title: str, what: str) -> Picture:
    """Every row against the number of trials learnt from."""
    picture = Picture((figures.WIDTH * 0.75, 4.8), layout="constrained")
    panel = picture.subplots()
    ordered = sorted(values.items(), key=lambda pair: pair[0].trials)
    for row, label in ROWS.items():
        points = [(amount.trials, rows[row]) for amount, rows in ordered if row in rows]
        if not points:
            continue
        trials, line = zip(*points, strict=True)
        style = dict(color=_LINES[row], marker=_MARKERS[row], label=label)
        if len(line) == 1:  # of which no band would be seen
            panel.vlines(trials, line[0].low, line[0].high, color=_LINES[row], linewidth=1.8)
        panel.plot(trials, [one.value for one in line], linewidth=1.8, markersize=5, **style)
        panel.fill_between(
            trials, [one.low for one in line], [one.high for one in line], color=_LINES[row], alpha=0.12, linewidth=0
        )
    panel.set_xscale("log")
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_xticks(
        [amount.trials for amount, _ in ordered],
        [f"{amount.name}\n{amount.trials:,} trials" for amount, _ in ordered],
        fontsize=9,
    )
    panel.set_xlabel("learnt from, of the new person")
    panel.set_ylabel(what)
    panel.set_title(title, fontsize=12)
    panel.grid(alpha=0.3)
    panel.legend(frameon=False)
    return picture
