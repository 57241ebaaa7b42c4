"""The part of the encoding study that says whether synthetic responses vary as real trials do.

From the "calibration" of each seed's report.json; what each number is, `calibration.py` says.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from synbrain_jax.data.pairs import Dataset
from synbrain_jax.document import Claim, Section, Table
from synbrain_jax.statistics import Estimate
from synbrain_jax.studies.common import mean_estimate

LEVELS = ("50", "80", "95")
RATIO, COVERAGE_OFF = (0.9, 1.1), 0.02  # what counts as calibrated
MATCH, MATCH_OF_PERFECT, MATCH_OF_RESAMPLED = (
    0.8,
    0.7,
    0.95,
)  # of noise correlations; the first where the truth is known
NAMES = {
    "independent": "independent Gaussian",
    "ledoit_wolf": "Ledoit-Wolf",
    "resampled": "resampled residuals",
    "posterior": "BrainVAE's posterior",
    "latent_noise": "latent noise, the paper's (nf 1)",
    "calibrated": "calibrated",
}


def calibration_section(dataset: Dataset, reports: Sequence[Mapping[str, Any]]) -> Section:
    """One table of all rows, means over the seeds' `reports`, and what it says of the calibrated one."""
    rows = {name: _row([report["rows"][name] for report in reports]) for name in NAMES if name in reports[0]["rows"]}
    ceilings = [report["ceiling"] for report in reports if report["ceiling"] is not None]
    ceiling = float(np.mean([one["perfect_model"] for one in ceilings])) if ceilings else None
    true = reports[0]["real_truth_match"] is not None
    columns = ["", "variance ratio", *(f"in {level} %" for level in LEVELS), "noise correlations"]
    columns += ["with the true ones"] * true + ["nats per voxel", "energy score", "energy above calibrated", "CRPS"]
    cells = []
    for name, row in rows.items():
        entry = [NAMES[name], row["ratio"], *row["coverage"], row["match"]]
        entry += [row["truth_match"]] * true + [row["nll"], row["energy"], row["difference"], row["crps"]]
        cells.append(tuple(entry))
    first = reports[0]
    note = (
        f"About the model's prediction of {first['n_trials']} held-out trials; means of {len(reports)} seeds. Variance "
        "ratio: the median voxel's synthetic variance over the trials' mean square. In 50, 80, 95 %: share of trials "
        "within the central interval. Noise correlations: agreement (Pearson, over pairs of voxels) with those of "
        f"deviations {first['noise']}"
    )
    if ceiling is not None:
        note += f", which a perfect model would match by {ceiling:.3f} (split halves of {ceilings[0]['halves_of']})"
    note += (
        ". Nats: negative log-likelihood. The energy score is of whole patterns; its difference has a 95 % interval "
        f"over blocks (a block: {first['block']}). Deviations of the posterior and of latent noise are pooled over "
        "stimuli."
    )
    if first["left_out"]:
        note += " Left out: " + "; ".join(f"{NAMES[name]}: {why}" for name, why in first["left_out"].items()) + "."
    best = {"variance ratio": 1.0, "noise correlations": "high", "nats per voxel": "low", "energy score": "low"}
    best |= {f"in {level} %": int(level) / 100 for level in LEVELS} | {"CRPS": "low"}
    table = Table(title="Distributions of trials around the same prediction", columns=tuple(columns), rows=tuple(cells))
    table = Table(table.title, table.columns, table.rows, note, best)
    return Section(
        title=f"Variability, {dataset.voxels.subject}",
        tables=(table,),
        claims=tuple(_claims(reports, ceiling, true)),
    )


def _row(seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over seeds."""

    def mean(values: Sequence[float | None]) -> float | None:
        return None if None in values else float(np.mean(values))

    differences = [Estimate(**one["energy_difference"]) for one in seeds if one["energy_difference"] is not None]
    return {
        "ratio": mean([one["variance_ratio"][1] for one in seeds]),
        "coverage": [mean([one["coverage"][level] for one in seeds]) for level in LEVELS],
        "match": mean([one["correlation_match"] for one in seeds]),
        "truth_match": mean([one["truth_match"] for one in seeds]),
        "nll": mean([one["nll"] for one in seeds]),
        "energy": mean([one["energy_score"] for one in seeds]),
        "difference": mean_estimate(differences),
        "crps": mean([one["crps"] for one in seeds]),
    }


def _claims(reports: Sequence[Mapping[str, Any]], ceiling: float | None, true: bool) -> Iterator[Claim]:
    """Each must hold for every seed."""
    own = [report["rows"]["calibrated"] for report in reports]
    ratios = [one["variance_ratio"][1] for one in own]
    yield Claim(
        f"Calibrated samples vary about the prediction as trials do (median voxel, ratio {RATIO[0]} to {RATIO[1]})",
        all(RATIO[0] <= ratio <= RATIO[1] for ratio in ratios),
        f"ratio by seed: {_listed(ratios)}",
    )
    for level in LEVELS:
        inside = [one["coverage"][level] for one in own]
        yield Claim(
            f"Their {level} % intervals hold {level} % of trials (within {COVERAGE_OFF})",
            all(abs(share - int(level) / 100) <= COVERAGE_OFF for share in inside),
            f"share by seed: {_listed(inside)}",
        )
    if true:
        matches = [one["truth_match"] for one in own]
        yield Claim(
            f"Their noise correlations match the true ones by at least {MATCH}",
            min(matches) >= MATCH,
            f"match by seed: {_listed(matches)}",
        )
    matches = [one["correlation_match"] for one in own]
    if ceiling and None not in matches:
        shares = [match / ceiling for match in matches]
        yield Claim(
            f"Their noise correlations reach {MATCH_OF_PERFECT} of what a perfect model would match",
            min(shares) >= MATCH_OF_PERFECT,
            f"share by seed: {_listed(shares)}",
        )
    if "resampled" in reports[0]["rows"] and None not in matches:
        others = [report["rows"]["resampled"]["correlation_match"] for report in reports]
        shares = [match / other for match, other in zip(matches, others, strict=True)]
        yield Claim(
            f"They match {MATCH_OF_RESAMPLED} of what resampled training residuals match",
            min(shares) >= MATCH_OF_RESAMPLED,
            f"share by seed: {_listed(shares)}",
        )
    for other in ("independent", "ledoit_wolf"):
        if other in reports[0]["rows"]:
            gains = [report["rows"][other]["nll"] - one["nll"] for report, one in zip(reports, own, strict=True)]
            yield Claim(
                f"Trials are likelier under them than under the row {NAMES[other]}",
                min(gains) > 0,
                f"nats per voxel, by seed: {_listed(gains)}",
            )
    for other, worse in (("independent", True), ("latent_noise", True), ("ledoit_wolf", False), ("resampled", False)):
        if other in reports[0]["rows"]:
            found = [Estimate(**report["rows"][other]["energy_difference"]) for report in reports]
            told = ", ".join(f"{one.value:+.4f} [{one.low:+.4f}, {one.high:+.4f}]" for one in found)
            if worse:
                text = f"Their energy score is better than that of the row {NAMES[other]}"
                holds = all(one.low > 0 for one in found)
            else:
                text = f"Their energy score is not worse than that of the row {NAMES[other]}, within the interval"
                holds = all(one.high >= 0 for one in found)
            yield Claim(text, holds, f"that row's score less theirs, by seed: {told}")


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)
