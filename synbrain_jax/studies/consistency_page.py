"""What the study of consistency puts on its page: tables, and claims that follow from the numbers.

A room beside `consistency.py`, which makes the numbers, and `consistency_figures.py`, which draws them. Seeds are
averaged draw by draw, so that an interval is that of their mean over other stimuli. Shape letters: d draws,
c categories.
"""

import io
from collections.abc import Sequence

import numpy as np
from etils import epath
from jaxtyping import Float

from synbrain_jax.consistency import known_mean
from synbrain_jax.document import Claim, Figure, Section, Table
from synbrain_jax.figures import DPI
from synbrain_jax.files import write_bytes
from synbrain_jax.statistics import Estimate, interval
from synbrain_jax.studies.consistency_figures import (
    KINDS,
    Across,
    Result,
    dissimilarities,
    latents,
    regions,
    t_maps,
)

ALMOST = 0.9  # of what real data reach: from there on synthetic data count as just as good

Row = Float[np.ndarray, " d"]


def sections(
    results: Sequence[Result],
    across: Sequence[Across | None],
    origin: str,
    seeds: Sequence[int],
    folder: epath.Path,
) -> list[Section]:
    """All of the page; the figures are written into `folder`. `across` has one entry a seed."""
    several = None if across[0] is None else list(across)
    pictures = {
        "t_maps": t_maps(results[0]),
        "regions": regions(results, several),
        "rdms": dissimilarities(results[0]),
    }
    if "figure latent trials" in results[0].seeds[0]:
        pictures["latents"] = latents(results[0])
    for name, picture in pictures.items():
        buffer = io.BytesIO()
        picture.savefig(buffer, format="png", dpi=DPI)
        write_bytes(folder / f"{name}.png", buffer.getvalue())
    return [
        _across_trials(results, seeds),
        _selectivity(results, origin),
        _similarity(results),
        _across_brains(several, len(results)),
        *([_latents(results)] if "latents" in pictures else []),
    ]


# ---- numbers ---------------------------------------------------------------------------------------


def estimate(drawn: Row) -> Estimate | None:
    """None where there is no number."""
    return interval(drawn) if np.isfinite(drawn[0]) else None


def share(part: Row, whole: Row) -> Row:
    """Of each draw; all NaN where the whole cannot be told from nothing."""
    of_all = estimate(whole)
    if of_all is None or of_all.low is None or of_all.low <= 0:
        return np.full(len(part), np.nan)
    return np.where(whole > 0, part / np.where(whole > 0, whole, 1), np.nan)


def judged(text: str, drawn: Row, words: str, least: float, most: float = np.inf) -> Claim:
    """A claim that a number is from `least` to `most`.

    It holds if the whole interval is within, does not if all of it is outside, and else cannot be told.
    """
    found = estimate(drawn)
    if found is None or found.low is None:
        why = "too little was measured twice, or what it is a share of cannot be told from 0"
        return Claim(text, None, f"{words}: no number; {why}")
    inside, outside = least <= found.low and found.high <= most, found.high < least or found.low > most
    holds = True if inside else False if outside else None
    wanted = f"at least {least:g}" if np.isinf(most) else f"{least:g} to {most:g}"
    return Claim(text, holds, f"{words}: {_said(found)}; expected {wanted}")


def _said(found: Estimate) -> str:
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


# ---- across trials ---------------------------------------------------------------------------------

_ROWS = {
    "trial, trial": "two real trials",
    "sample, trial": "synthetic sample, real trial",
    "expected, trial": "expected response, real trial",
    "sample, sample": "two synthetic samples",
}


def _across_trials(results: Sequence[Result], seeds: Sequence[int]) -> Section:
    tables, claims = [], []
    for one in results:
        drawn = {name: one.real[name] if name in one.real else one.mean(name) for name in _ROWS}
        most = drawn["trial, trial"][2]
        rows = [
            (_ROWS[name], *map(estimate, values), estimate(share(values[2], most))) for name, values in drawn.items()
        ]
        columns = ("pattern correlation of", "same stimulus", "other stimuli", "difference", "share of two trials'")
        each = ", ".join(f"{scores['sample, trial'][2][0]:.3f}" for scores in one.seeds)
        note = (
            "Mean over stimuli, of patterns centred over stimuli. Two trials are of different runs, where stimuli were "
            f"shown in several. Difference of a sample and a trial with seeds {', '.join(map(str, seeds))}: {each}."
        )
        tables.append(Table(f"{one.subject}: agreement of single responses", columns, tuple(rows), note))
        claims += [
            judged(
                f"{one.subject}: a synthetic sample agrees with a real trial as well as another trial does",
                share(drawn["sample, trial"][2], most),
                "difference as a share of that of two trials",
                ALMOST,
            ),
            judged(
                f"{one.subject}: a synthetic sample agrees with a real trial as it does with another sample",
                share(drawn["sample, trial"][2], drawn["sample, sample"][2]),
                "difference as a share of that of two samples",
                ALMOST,
                round(2 - ALMOST, 9),
            ),
            judged(
                f"{one.subject}: the expected response agrees with a real trial better than another trial does",
                drawn["expected, trial"][2] - most,
                "difference less that of two trials",
                0.0,
            ),
        ]
    kinds = sorted({str(scores["variability"]) for one in results for scores in one.seeds})
    text = (
        "How much a response to a stimulus resembles another response to it, beyond what responses to any two stimuli "
        f"have in common. Samples are drawn with variability {' and '.join(kinds)}. Samples that vary around the "
        "prediction as real trials do agree with each other as they do with a trial; around a perfect prediction both "
        "are as two trials agree. Samples that hardly vary are more alike, and closer to a trial, as the expected "
        "response is, which has no noise of its own."
    )
    return Section("Across trials", text, tuple(tables), claims=tuple(claims))


# ---- selectivity -----------------------------------------------------------------------------------


def _selectivity(results: Sequence[Result], origin: str) -> Section:
    tables, claims = [], []
    for one in results:
        r, dice = one.mean("t map, r"), one.mean("t map, dice")
        significant = one.mean("t map, significant")
        again = one.real.get("t map, again", np.full_like(r, np.nan))
        named = [
            (name, *map(estimate, (r[:, c], again[:, c], dice[:, c])), *_significant(significant[c]))
            for c, name in enumerate(one.categories)
        ]
        mean_r, mean_again, mean_dice = map(known_mean, (r, again, dice))
        named.append(
            ("mean", *map(estimate, (mean_r, mean_again, mean_dice)), *_significant(known_mean(significant.T)))
        )
        columns = (
            "category against the others",
            "r of t maps",
            "r of real with more real data",
            "Dice, top 10 %",
            "Dice, q < .05",
            "voxels, real",
            "voxels, synthetic",
        )
        note = (
            "Welch's t over trials, of real trials and of as many synthetic samples. More real data: two halves of the "
            "real trials, stepped up to their full number (Spearman-Brown). q < .05: false discovery rate of Benjamini "
            "and Hochberg, one-sided, of all stimuli as they are (trials count as independent, so real trials that "
            "share a run's noise pass too often); without interval. Draws hold some stimuli twice and others not "
            "at all and give noisier maps: they are shifted to have the number of all stimuli as their mean."
        )
        tables.append(Table(f"{one.subject}: category t maps", columns, tuple(named), note))
        tables.append(_region_table(one))
        claims.append(
            judged(
                f"{one.subject}: synthetic t maps resemble the real ones as well as other real data would",
                share(mean_r, mean_again),
                "mean r of the t maps as a share of real with real",
                ALMOST,
            )
        )
        if one.has("d prime, r"):
            claims.append(
                judged(
                    f"{one.subject}: where regions differ in selectivity (d'), synthetic data differ as real data do",
                    one.mean("d prime, r"),
                    "correlation of d' over regions and categories, less each category's mean over regions",
                    0.5,
                )
            )
    text = f"Which voxels and regions respond to one category of stimuli more than to the others; {origin}."
    caption = (
        f"t maps of {results[0].subject}, first seed: real trials, as many synthetic samples, and voxel by voxel. The "
        "line is where both are equal."
    )
    return Section("Category selectivity", text, tuple(tables), (Figure("t_maps", caption),), tuple(claims))


def _significant(values: Float[np.ndarray, "3"]) -> tuple[float | None, int, int]:
    return (float(values[0]) if np.isfinite(values[0]) else None, round(values[1]), round(values[2]))


def _region_table(one: Result) -> Table:
    real, made = one.mean("d prime")
    rows = []
    for region, name in enumerate(one.rois):
        ours, theirs = real[:, region], made[:, region]
        preferred = (one.categories[int(np.argmax(side))] for side in (ours, theirs))
        rows.append((name, *preferred, float(ours.max()), float(theirs[np.argmax(ours)])))
    note = (
        "d': difference of the region's mean response to the category's trials and to the others', over the root mean "
        "of both variances."
    )
    if one.has("d prime, r"):
        r = _said(interval(one.mean("d prime, r")))
        note += f" Correlation over regions and categories, less each category's mean over regions: {r}."
    columns = ("region", "prefers, real", "prefers, synthetic", "d' of the first, real", "d' of the first, synthetic")
    return Table(f"{one.subject}: selectivity of regions", columns, tuple(rows), note)


# ---- similarity of stimuli -------------------------------------------------------------------------


def _similarity(results: Sequence[Result]) -> Section:
    tables, claims = [], []
    for one in results:
        expected, samples = one.mean("rdm, expected"), one.mean("rdm, samples")
        again = one.real.get("rdm, again", np.full_like(expected, np.nan))
        ceiling = np.sqrt(again)
        rows = [
            (name, *(estimate(values[:, r]) for values in (expected, samples, again, ceiling)),
             estimate(share(expected[:, r], ceiling[:, r])))
            for r, name in enumerate(one.rois)
        ]  # fmt: skip
        columns = ("region", "expected", "samples", "more real data", "ceiling", "expected / ceiling")
        note = (
            "Spearman correlation with the RDM of the real mean responses (1 - Pearson, centred over stimuli), of the "
            "expected responses, of the means of as many samples as there are trials, and of as much further real data "
            "(two halves of the trials, Spearman-Brown). Ceiling: the square root of the last, about what noise-free "
            "responses reach."
        )
        tables.append(Table(f"{one.subject}: representational similarity", columns, tuple(rows), note))
        claims.append(
            judged(
                f"{one.subject}: stimuli are as similar to each other in expected responses as noise lets one see",
                share(expected[:, 0], ceiling[:, 0]),
                f"correlation of the RDMs of {one.rois[0]} as a share of its ceiling",
                ALMOST,
            )
        )
    figures = (
        Figure("regions", "Representational similarity by region, and agreement between brains; bars are intervals."),
        Figure("rdms", f"Dissimilarity of the stimuli in {results[0].subject}, sorted by category; ranks, first seed."),
    )
    text = "Which stimuli a region responds to alike, in real and in synthetic responses."
    return Section("Representational similarity", text, tuple(tables), figures, tuple(claims))


# ---- across brains ---------------------------------------------------------------------------------


_NOTHING = (
    "Nothing to compare: one brain, or several that did not see the same test stimuli. Of the Natural Scenes Dataset "
    "`--change data.subjects=[1,2]` takes two people."
)


def _across_brains(across: Sequence[Across] | None, brains: int) -> Section:
    title = "Across brains"
    if across is None:
        return Section(title, _NOTHING)
    tables, claims = [], []
    for what, name in (("profiles", "mean response of regions"), ("similarity", "RDMs of regions")):
        drawn = {kind: np.mean([getattr(one, what)[kind] for one in across], axis=0) for kind in KINDS}
        rows = [(region, *(estimate(drawn[kind][:, r]) for kind in KINDS)) for r, region in enumerate(across[0].rois)]
        rows.append(("mean", *(estimate(drawn[kind].mean(axis=1)) for kind in KINDS)))
        note = f"Over {across[0].stimuli} stimuli that all {brains} brains saw; mean over pairs of brains."
        tables.append(Table(f"Correlation of the {name}", ("region", *KINDS.values()), tuple(rows), note))
        claims.append(
            judged(
                f"One brain's synthetic responses agree with another's real ones as well as its real ones do ({name})",
                (drawn["real, synthetic"] - drawn["real, real"]).mean(axis=1),
                "difference of the correlations, mean over regions",
                0.0,
            )
        )
    text = (
        "The same stimuli in several brains. Synthetic responses have no measurement noise, and those of all brains "
        "depend on the same tokens: that they agree with each other more than real ones do is no success by itself."
    )
    return Section(title, text, tuple(tables), claims=tuple(claims))


# ---- latents ---------------------------------------------------------------------------------------


def _latents(results: Sequence[Result]) -> Section:
    rows, claims = [], []
    for one in results:
        trial, mapped = one.mean("latent, trial"), one.mean("latent, mapped")
        spread = float(one.mean("latent spread")[0])
        rows.append((one.subject, estimate(trial[2]), estimate(mapped[2]), spread))
        claims.append(
            judged(
                f"{one.subject}: the mapper's latent is nearer to the latents of its stimulus than another trial's is",
                mapped[2] - trial[2],
                "difference of the correlations",
                0.0,
            )
        )
    columns = ("subject", "two trials", "mapper, trial", "spread of the mapper's")
    note = (
        "Correlation of latents of the same stimulus less that of different stimuli, centred over stimuli. Spread: "
        "variance over stimuli of the mapper's latents as a share of that of the trials' mean latents, with noise."
    )
    table = Table("BrainVAE's latents of trials and the mapper's latents", columns, tuple(rows), note)
    caption = (
        f"Latents of {results[0].subject}, first seed: dots are trials, outlined markers the mapper's of a stimulus."
    )
    text = "The plane is that of the first two principal components of the stimuli's mean trial latents."
    return Section("Latents", text, (table,), (Figure("latents", caption),), tuple(claims))
