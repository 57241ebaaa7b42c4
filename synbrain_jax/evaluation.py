"""A model and its baselines, scored by the same functions against held-out measurements, beside the noise ceiling.

Everything is fitted on training trials; the test split is only predicted and scored. The measured target of a
stimulus is the mean over runs of its mean pattern in each run.

Shape letters: s stimuli, v voxels, n trials, t tokens, d token width.
"""

import dataclasses
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from itertools import chain, cycle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Bool, Float, Int

from synbrain_jax import calibration, metrics
from synbrain_jax.baselines import baseline_predictions
from synbrain_jax.data.pairs import Dataset, Trials, load_trials
from synbrain_jax.data.voxels import Voxels
from synbrain_jax.errors import InputError
from synbrain_jax.files import write_npz, write_text
from synbrain_jax.synthesis import SynBrain
from synbrain_jax.variability import Spread

CEILING_DRAWS = 100
MIN_CEILING_R = 0.3  # of a voxel, to be scored as a share of it: below, the division mostly magnifies noise
MIN_ROI_VOXELS = 10
CONTROL_PREDICTIONS = 500  # at least one shift of the tokens, and all of them where that is fewer predictions
SAMPLES, SAMPLED_STIMULI = 8, 100  # per stimulus, for the figure of samples beside trials
READ_TOGETHER = 64  # stimuli whose tokens are in memory at a time: 110 MB for CLIP's
MAX_SIMULATED_VALUES = 200_000_000  # over all draws: 4 draws at 3,000 trials of 15,724 voxels


# ---- scores ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """What `evaluate` returns.

    report: the content of report.json, {"dataset", "split", "n_stimuli", "n_trials", "n_voxels", "scores"}; where
      stimuli repeat also "reliable" {"ceiling_r_above", "n_voxels"} (`voxel_scores`); where the data set names regions
      also "rois" {name: {"n_voxels", "rows": {row: `voxel_scores`}}} and "rois_left_out" {name: number of voxels},
      those with fewer than MIN_ROI_VOXELS.
    arrays: for figures and re-analysis, float32 unless said: stimulus_id [s] (text), prediction and target [s v],
      voxel_r [v] of the model, voxel_r_ceiling [v] where stimuli repeat, prediction_NAME [s v] of every other row
      but the ceiling, and the `trial_scores` of all these rows, trial_scores_NAME [n 3], with stimulus_of_trial [n]
      (int).
    """

    report: dict[str, Any]
    arrays: dict[str, np.ndarray]


def evaluate(
    model_prediction: Float[np.ndarray, "s v"],
    *,
    train: Trials,
    validation: Trials,
    test: Trials,
    voxels: Voxels,
    dataset: str,
    split: str = "test",
    extra: Mapping[str, Float[np.ndarray, "s v"]] | None = None,
) -> Evaluation:
    """Scores the model's predictions of the stimuli of `test` beside the baselines and the noise ceiling.

    Rows, in this order: model, `extra` (further predictions by name), stimulus_mean (only if every test stimulus
    occurs in training), ridge, kernel_ridge, mean_pattern, noise_ceiling (only if stimuli repeat). `validation`
    serves the noise ceiling alone, whose true signal is estimated from the repeats of all splits.

    Args:
        model_prediction: one pattern per stimulus of `test`, in its order; voxels in the data set's own order.
        split: what `test` is called in the report.

    Raises:
        InputError: a prediction has the wrong shape or is not finite, or a split cannot be scored or learnt from.
    """
    baselines = baseline_predictions(train, test)
    rows = {"model": model_prediction, **(extra or {}), **baselines}
    taken = {"model", "noise_ceiling", *baselines}.intersection(extra or {})
    if taken:
        raise InputError(f"extra: {', '.join(sorted(taken))} is a row of its own; give this prediction another name")
    ceiling = estimate_noise_ceiling(train, validation, test, voxels)
    ceiling_r = None if ceiling is None else ceiling.voxel_r
    scores = {name: score(prediction, test, ceiling_r) for name, prediction in rows.items()}

    target = stimulus_targets(test)
    voxel_r = {name: np.asarray(metrics.voxel_pearson(prediction, target)) for name, prediction in rows.items()}
    arrays = {
        "stimulus_id": np.array(test.stimulus_id),
        "prediction": model_prediction,
        "target": target,
        "voxel_r": voxel_r["model"],
        **{f"prediction_{name}": prediction for name, prediction in rows.items() if name != "model"},
        "stimulus_of_trial": test.stimulus,
        **{f"trial_scores_{name}": trial_scores(prediction, test) for name, prediction in rows.items()},
    }
    report = {
        "dataset": dataset,
        "split": split,
        "n_stimuli": len(test.stimulus_id),
        "n_trials": len(test.fmri),
        "n_voxels": test.fmri.shape[1],
        "scores": scores,
    }
    if ceiling is not None:
        scores["noise_ceiling"] = ceiling.scores
        arrays["voxel_r_ceiling"] = voxel_r["noise_ceiling"] = ceiling.voxel_r
        reliable = int(np.sum(ceiling.voxel_r > MIN_CEILING_R))
        report["reliable"] = {"ceiling_r_above": MIN_CEILING_R, "n_voxels": reliable}
    return Evaluation(report | roi_report(voxel_r, ceiling_r, voxels.rois), arrays)


def roi_report(
    voxel_r: Mapping[str, Float[np.ndarray, "v"]],
    ceiling_r: Float[np.ndarray, "v"] | None,
    rois: Mapping[str, Bool[np.ndarray, "v"]],
) -> dict[str, Any]:
    """`voxel_scores` of every row (model, ridge, ...) in every region, as `Evaluation` says; {} without regions."""
    if not rois:
        return {}
    sizes = {name: int(inside.sum()) for name, inside in rois.items()}
    scored = {name: inside for name, inside in rois.items() if sizes[name] >= MIN_ROI_VOXELS}

    def within(inside: Bool[np.ndarray, "v"]) -> dict[str, dict[str, float]]:
        ceiling = None if ceiling_r is None else ceiling_r[inside]
        return {row: voxel_scores(r[inside], ceiling) for row, r in voxel_r.items()}

    return {
        "rois": {name: {"n_voxels": sizes[name], "rows": within(inside)} for name, inside in scored.items()},
        "rois_left_out": {name: size for name, size in sizes.items() if name not in scored},
    }


def voxel_scores(r: Float[np.ndarray, "v"], ceiling_r: Float[np.ndarray, "v"] | None = None) -> dict[str, float]:
    """Voxel r summarised over voxels, and as a share of what can be reached.

    voxel_r_mean and voxel_r_median are over all v voxels. Where `ceiling_r`, the noise ceiling of r, is given, two more
    are over the reliable voxels alone, those whose ceiling is above MIN_CEILING_R (9 % of variance), and left out if
    there is none: voxel_r_normalised_median, the median of r / ceiling; and voxel_r2_normalised_mean, the mean of r^2
    / ceiling^2, where r below 0 counts as 0 and a share above 1 as 1 (the convention of the Brain Encoding Response
    Generator, BERG).
    """
    scores = {"voxel_r_mean": float(np.mean(r)), "voxel_r_median": float(np.median(r))}
    if ceiling_r is not None and (reliable := ceiling_r > MIN_CEILING_R).any():
        share = r[reliable] / ceiling_r[reliable]
        scores["voxel_r_normalised_median"] = float(np.median(share))
        scores["voxel_r2_normalised_mean"] = float(np.mean(np.clip(share, 0, 1) ** 2))
    return scores


def score(
    prediction: Float[np.ndarray, "s v"], trials: Trials, ceiling_r: Float[np.ndarray, "v"] | None = None
) -> dict[str, float]:
    """All metrics of one prediction per stimulus of `trials`; finite numbers.

    Against the target (`stimulus_targets`): the `voxel_scores`, as a share of the noise ceiling too if it is given;
    pattern_r, mse, cosine (means over stimuli), explained_variance (median over voxels). With prediction and target
    both centred over the stimuli, so that a pattern common to all earns nothing: pattern_r_centred,
    identification_top1, identification_two_way (means over stimuli). Where every run holds every stimulus, centring
    the target is the same as removing each run's mean over its stimuli. Against each single trial, as the SynBrain
    paper reports: trial_mse, trial_pattern_r, trial_cosine (means over trials).

    Raises InputError where the prediction has the wrong shape or is not finite, or `trials` has fewer than two
    stimuli or one without a trial.
    """
    target = stimulus_targets(trials)
    if prediction.shape != target.shape:
        raise InputError(
            f"prediction has shape {prediction.shape}, expected {target.shape}: one pattern of all voxels per stimulus"
        )
    if not np.isfinite(prediction).all():
        raise InputError("prediction holds NaN or infinite values; check the model that made it")
    voxel_r, scores = jax.device_get(
        _scores(prediction, metrics.centred(prediction), target, metrics.centred(target), trials.fmri, trials.stimulus)
    )
    return voxel_scores(voxel_r, ceiling_r) | {name: float(value) for name, value in scores.items()}


@jax.jit
def _scores(
    prediction: Float[Array, "s v"],
    prediction_centred: Float[Array, "s v"],
    target: Float[Array, "s v"],
    target_centred: Float[Array, "s v"],
    fmri: Float[Array, "n v"],
    stimulus: Int[Array, "n"],
) -> tuple[Float[Array, "v"], OrderedDict[str, Float[Array, ""]]]:  # jit would sort a plain dict by name
    of_trial = prediction[stimulus]
    return metrics.voxel_pearson(prediction, target), OrderedDict(
        pattern_r=jnp.mean(metrics.pattern_pearson(prediction, target)),
        pattern_r_centred=jnp.mean(metrics.pattern_pearson(prediction_centred, target_centred)),
        mse=jnp.mean(metrics.mse(prediction, target)),
        cosine=jnp.mean(metrics.cosine(prediction, target)),
        explained_variance=jnp.median(metrics.explained_variance(prediction, target)),
        identification_top1=jnp.mean(metrics.identification_top1(prediction_centred, target_centred)),
        identification_two_way=jnp.mean(metrics.identification_two_way(prediction_centred, target_centred)),
        trial_mse=jnp.mean(metrics.mse(of_trial, fmri)),
        trial_pattern_r=jnp.mean(metrics.pattern_pearson(of_trial, fmri)),
        trial_cosine=jnp.mean(metrics.cosine(of_trial, fmri)),
    )


def trial_scores(prediction: Float[np.ndarray, "s v"], trials: Trials) -> Float[np.ndarray, "n 3"]:
    """MSE, pattern r and cosine of a prediction per stimulus against each single trial."""
    of_trial = prediction[trials.stimulus]
    scores = (metrics.mse, metrics.pattern_pearson, metrics.cosine)
    return np.stack([np.asarray(score(of_trial, trials.fmri)) for score in scores], axis=1)


def stimulus_targets(trials: Trials) -> Float[np.ndarray, "s v"]:
    """The measured response to each stimulus: the mean over runs of its mean pattern in each run, float32.

    Raises InputError below two stimuli, or where a stimulus has no trial.
    """
    n_stimuli = len(trials.stimulus_id)
    if n_stimuli < 2:
        raise InputError(f"the split has {n_stimuli} stimulus; expected at least 2, or no score is defined")
    absent = sorted(set(range(n_stimuli)) - set(trials.stimulus.tolist()))
    if absent:
        raise InputError(f"stimulus '{trials.stimulus_id[absent[0]]}' has no trial in the split; remove it")
    blocks, of_trial = np.unique(np.stack([trials.stimulus, trials.run], axis=1), axis=0, return_inverse=True)
    return metrics.group_means(metrics.group_means(trials.fmri, of_trial.reshape(-1)), blocks[:, 0])


def shifted_tokens_control(
    predict: Callable[[Float[np.ndarray, "s t d"]], Float[np.ndarray, "s v"]], test: Trials
) -> float:
    """Mean pattern_r_centred over cyclic shifts of the tokens: no stimulus is given its own tokens.

    Over all s - 1 shifts where that is at most CONTROL_PREDICTIONS predictions, else over as many as that allows,
    evenly spaced. About -1 / (s - 1) of the true score if the prediction follows the tokens, the true score if it
    ignores them.
    """
    target = metrics.centred(stimulus_targets(test))
    n_shifts = np.clip(CONTROL_PREDICTIONS // len(target), 1, len(target) - 1)
    shifts = np.linspace(0, len(target), n_shifts + 2).round().astype(int)[1:-1]
    shifted = (predict_shifted(predict, test.tokens, int(shift)) for shift in shifts)
    return float(np.mean([metrics.pattern_pearson(metrics.centred(patterns), target) for patterns in shifted]))


def predict_shifted(
    predict: Callable[[Float[np.ndarray, "_ t d"]], Float[np.ndarray, "_ v"]], tokens: Any, shift: int
) -> Float[np.ndarray, "s v"]:
    """What `predict` gives for each stimulus i from the tokens of stimulus i + shift (cyclic), a part at a time.

    `tokens` is [s t d], an array or anything that gives one for some rows.
    """
    given = np.roll(np.arange(len(tokens)), -shift)
    starts = range(0, len(given), READ_TOGETHER)
    return np.concatenate([predict(tokens[given[start : start + READ_TOGETHER]]) for start in starts])


def write_evaluation(
    model: SynBrain,
    dataset: Dataset,
    folder: str | os.PathLike,
    split: str = "test",
    shift_tokens: int = 0,
    residuals: Float[np.ndarray, "m v"] | None = None,
    noise: Spread | None = None,
) -> dict[str, Any]:
    """Evaluates a trained system on a split of a data set; writes report.json and predictions.npz into `folder`.

    Beside the arrays of `Evaluation`, predictions.npz holds, for at most SAMPLED_STIMULI stimuli evenly spaced over the
    split, sampled_id [m] (text), their trials [n v] with trial_stimulus [n], and samples [m k v], calibrated if the
    bundle has a spread, else drawn with that of BrainVAE's posterior if it knows it.

    Args:
        shift_tokens: as a control, the model is given the tokens of stimulus i + shift_tokens for stimulus i.
        residuals: of the trials to which the bundle's spread was fitted. Where it has one, its samples are scored
          against trials, beside what they must beat: "calibration" in the report, a `calibration.Calibration`; without
          the residuals, two of these rows are left out.
        noise: the true distribution of the trials' noise, where it is known.

    Returns:
        The report.

    Raises:
        InputError: the data set is of another brain, or a split cannot be scored or learnt from.
    """
    known = model.bundle.voxels
    if dataset.n_voxels != len(known.order):  # before the baselines, which may take long
        raise InputError(
            f"{dataset.path}: {dataset.n_voxels} voxels of {dataset.voxels.subject}, but the model synthesises "
            f"{len(known.order)} of {known.subject}; give the data set that it was trained on"
        )
    train, validation, test = (load_trials(dataset, name) for name in ("train", "validation", split))
    prediction = predict_shifted(model.predict, test.tokens, shift_tokens)
    evaluation = evaluate(
        prediction,
        train=train,
        validation=validation,
        test=test,
        voxels=dataset.voxels,
        dataset=dataset.name,
        split=split,
    )
    controls = {"shifted_tokens_pattern_r_centred": shifted_tokens_control(model.predict, test)}
    report = {**evaluation.report, "subject": dataset.voxels.subject, "gain": model.bundle.gain, "controls": controls}
    if model.bundle.spread is not None:
        report["calibration"] = _calibration(model, prediction, test, residuals, noise)
    stimuli = np.unique(np.linspace(0, len(test.stimulus_id) - 1, SAMPLED_STIMULI).round().astype(int))
    own = np.isin(test.stimulus, stimuli)
    arrays = {"sampled_id": evaluation.arrays["stimulus_id"][stimuli], "trials": test.fmri[own]}
    arrays["trial_stimulus"] = np.searchsorted(stimuli, test.stimulus[own]).astype(np.int32)
    if model.bundle.spread is not None or model.bundle.latent_std is not None:
        tokens = test.tokens[(stimuli + shift_tokens) % len(test.stimulus_id)]
        variability = "posterior" if model.bundle.spread is None else "calibrated"
        arrays["samples"] = model.synthesize(tokens, jax.random.key(0), k=SAMPLES, variability=variability)
    write_npz(epath.Path(folder) / "predictions.npz", {**evaluation.arrays, **arrays})
    write_text(epath.Path(folder) / "report.json", json.dumps(report, indent=2) + "\n")
    return report


def _calibration(
    model: SynBrain,
    prediction: Float[np.ndarray, "s v"],
    test: Trials,
    residuals: Float[np.ndarray, "m v"] | None,
    noise: Spread | None,
) -> dict[str, Any]:
    rows_key, scores_key = jax.random.split(jax.random.key(1))
    samples = model.bundle.config.variability.samples
    rows, left_out = calibration.standard_rows(model, test.tokens, residuals, rows_key, samples=samples)
    scored = calibration.scores(prediction, test, rows, scores_key, truth=noise, samples=samples)
    return {**dataclasses.asdict(scored), "left_out": left_out, "nll_of_ranks": model.bundle.spread.nll}


# ---- noise ceiling ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class NoiseCeiling:
    """What a perfect predictor would score: the metrics of `score`, and its voxel r for each voxel."""

    scores: dict[str, float]
    voxel_r: Float[np.ndarray, "v"]


def estimate_noise_ceiling(train: Trials, validation: Trials, test: Trials, voxels: Voxels) -> NoiseCeiling | None:
    """Scores of the true mean responses on `test`, given its measurement noise; None if nothing repeats.

    Voxel r: NSD's formula, from `voxels.ncsnr` and the repeats averaged in the target. All other metrics: `score`
    of a simulated truth on simulated measurements, mean over seeded draws. Truth: each stimulus's mean over its
    repeats in all splits, drawn towards the mean pattern until each voxel keeps the signal part of its variance
    (the noise ceiling of that many repeats). Measurement: truth plus real residuals, whole patterns, as many
    trials and repeats as in `test`, so that noise correlations stay. The repeats of one simulated run come from
    one real run where it has enough, so that noise common to a run is common here, and centring removes it.
    A ceiling is an expectation: on few stimuli a lucky test set lets a good prediction pass it.
    """
    splits = [*dict.fromkeys(part for part in (train, validation) if part is not test), test]
    place = {name: index for index, name in enumerate(dict.fromkeys(chain(*(part.stimulus_id for part in splits))))}
    places = [np.array([place[name] for name in part.stimulus_id]) for part in splits]
    stimulus = np.concatenate([index[part.stimulus] for index, part in zip(places, splits, strict=True)])
    run = np.concatenate([part.run for part in splits])
    fmri = np.concatenate([part.fmri for part in splits])
    repeats = metrics.repeats(fmri, stimulus, run)
    n_repeats = np.bincount(repeats.stimulus)
    if voxels.ncsnr is None or n_repeats.max() == 1:
        return None

    means = metrics.group_means(repeats.fmri, repeats.stimulus)
    mean_pattern = means.mean(axis=0)
    kept = np.stack([metrics.noise_ceiling_r(voxels.ncsnr, int(n_repeats[index])) for index in places[-1]])
    truth = (mean_pattern + kept * (means[places[-1]] - mean_pattern)).astype(np.float32)

    in_test = repeats.of_trial[-len(test.fmri) :]
    averaged = np.array([len(np.unique(in_test[test.stimulus == s])) for s in range(len(truth))])
    voxel_r = metrics.noise_ceiling_r(voxels.ncsnr, averaged).astype(np.float32)

    # A mean of K repeats lies closer to them than the truth does: K - 1 parts of K of the noise variance.
    widen = np.sqrt(n_repeats / np.maximum(n_repeats - 1, 1))[stimulus][:, None].astype(np.float32)
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(int(np.clip(MAX_SIMULATED_VALUES // test.fmri.size, 1, CEILING_DRAWS))):
        row = _draw_residuals(rng, repeats, run, test)
        repeat = repeats.fmri[repeats.of_trial[row]]
        residual = fmri[row] - repeat + widen[row] * (repeat - means[stimulus[row]])
        draws.append(score(truth, dataclasses.replace(test, fmri=truth[test.stimulus] + residual)))
    known = voxel_scores(voxel_r, voxel_r)
    scores = known | {name: float(np.mean([draw[name] for draw in draws])) for name in draws[0] if name not in known}
    return NoiseCeiling(scores, voxel_r)


def _draw_residuals(
    rng: np.random.Generator, repeats: metrics.Repeats, run: Int[np.ndarray, "_"], test: Trials
) -> Int[np.ndarray, "n"]:
    """For each trial of `test`, the row of the pooled trials (those of `test` last) that lends its residual."""
    rows_of_repeat = metrics.group_rows(repeats.of_trial)
    run_of_repeat = np.array([run[rows[0]] for rows in rows_of_repeat])
    lenders = np.flatnonzero(np.bincount(repeats.stimulus)[repeats.stimulus] > 1)
    in_test = repeats.of_trial[-len(test.fmri) :]
    row = np.empty(len(test.fmri), int)
    # Runs in random order, those with more repeats earlier; each lends again only when all have lent.
    lending_runs = cycle(dict.fromkeys(run_of_repeat[rng.permutation(lenders)]))
    for test_run, lending_run in zip(np.unique(test.run), lending_runs, strict=False):
        borrowers = np.unique(in_test[test.run == test_run])
        same_run = lenders[run_of_repeat[lenders] == lending_run]
        candidates = same_run if len(same_run) >= len(borrowers) else lenders
        chosen = rng.choice(candidates, len(borrowers), replace=len(candidates) < len(borrowers))
        for borrower, lender in zip(borrowers, chosen, strict=True):
            trials, lent = np.flatnonzero(in_test == borrower), rows_of_repeat[lender]
            row[trials] = rng.choice(lent, len(trials), replace=len(lent) < len(trials))
    return row
