"""A small data set in the file layout of the Natural Scenes Dataset (Allen et al. 2022), with a known truth.

What is real about it: the layout, the units and indices, several brains, a design in which every picture of a subject
comes three times and a tenth of them is shown to all, sessions that drift. What is not: the pictures are drawn, their
tokens are a function of what is drawn, and the brains are those of `simulated_brain.py`. Beside NSD's folders come
`tokens` (as `synbrain encode-images` writes them, of all pictures) and `truth`.

Shape letters: p pictures, m pictures of a subject, d latent dimensions, t w tokens, v voxels, n trials.
"""

import dataclasses
import importlib
import json
import os
import shutil
from collections.abc import Callable
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import scipy.io
from etils import epath
from jaxtyping import Float, Int, UInt8
from tqdm import tqdm

from synbrain_jax.data.nsd_files import BETAS, subject_name
from synbrain_jax.data.simulated_brain import (
    ATLASES,
    Anatomy,
    Simulation,
    anatomy,
    session_drift,
    trial_noise,
    true_responses,
)
from synbrain_jax.data.tokens import MANIFEST_FILE, finish, shard_path, write_shard
from synbrain_jax.errors import InputError
from synbrain_jax.files import read_text, write_npz, write_text

RUNS, POSITIONS = 12, 75  # runs of a session, moments of a run at which a trial may begin
REPEATS = 3
_ABOUT = (
    "ceiling_r_median: median over voxels of the correlation that the true response has with the measured means over "
    "the shared pictures. No model exceeds it but by chance. Details: simulate_nsd's docstring."
)
_UNITS = 300  # int16 units of 1 % signal change
# One stream of random numbers per purpose, other than those of simulated_brain.
_EXPERIMENT, _PICTURES, _TOKENS, _TRIALS, _ELSEWHERE = range(100, 105)


@dataclasses.dataclass(frozen=True, eq=False)
class Experiment:
    """Who sees what when. Indices are from 0, other than in NSD's files."""

    latent: Float[np.ndarray, "p d"]  # of all pictures
    shown: Int[np.ndarray, "subjects m"]  # picture of each of a subject's m; the first columns are those of all
    shared: int  # how many all subjects see
    order: Int[np.ndarray, "n"]  # which of the subject's m is shown in each trial; the same for all subjects
    trials: Int[np.ndarray, "sessions runs"]  # number of trials


def simulate_nsd(out: str | os.PathLike, **settings: Any) -> epath.Path:
    """Writes a simulated data set to the new folder `out`, whole or not at all, and returns it.

    The same settings give the same numbers. Responses are rounded to NSD's int16, 300 units per percent signal change.

    `truth/subjAA.npz` holds, of the voxels in nsdgeneral with positions `ijk` [v, 3] (last axis fastest):
      response [m, v] float32: the noise-free response to each of the subject's pictures, whose 0-based numbers in
        nsd_stimuli.hdf5 are `picture` [m]. Percent signal change before drift: what was measured in a session is
        `gain` x (response + noise) + `offset` (both [sessions, v]), so of the true response session z-scoring keeps
        everything but the scale and mean of each voxel, and correlations with it are those before drift;
      noise_factor [v, r], noise_diag [v]: covariance of one trial's noise, factor @ factor.T + diag(noise_diag);
      ncsnr [v]: of one trial, over the subject's pictures; what ncsnr.nii.gz has, too;
      ceiling_r [v]: correlation of the true response with the measured means over the shared pictures that the subject
        saw, which no model exceeds but by chance;
      latent [m, d], template [v, 3]: the pictures' latents, and the voxels' places in the brain that all share.
    `truth/truth.json` has the settings and each subject's median ceiling.

    Args:
        out: must not exist.
        settings: fields of `simulated_brain.Simulation`.

    Raises:
        InputError: `out` exists, a setting is out of range, or nibabel or h5py is missing.
    """
    simulation, out = Simulation(**settings), epath.Path(out).expanduser()
    for package in ("h5py", "nibabel"):
        _package(package)
    if out.exists():
        raise InputError(f"{out}: already exists; give a new folder for the simulated data set, or delete this one.")
    experiment = design(simulation)
    unfinished = out.with_name(out.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        _write_design(unfinished, simulation, experiment)
        _write_pictures(unfinished, simulation, experiment)
        _write_tokens(unfinished / "tokens", simulation, experiment)
        numbers = range(1, simulation.subjects + 1)
        with tqdm(total=len(numbers) * simulation.sessions, desc="simulate", unit="session", disable=None) as bar:
            stated = {
                subject_name(n): _write_subject(unfinished, simulation, experiment, n, bar.update) for n in numbers
            }
        known = {"about": _ABOUT, "settings": dataclasses.asdict(simulation), "subjects": stated}
        write_text(unfinished / "truth" / "truth.json", json.dumps(known, indent=1) + "\n")
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return out


def statement(out: str | os.PathLike) -> str:
    """What `truth/truth.json` of a simulated data set says, for people."""
    subjects = json.loads(read_text(epath.Path(out) / "truth" / "truth.json"))["subjects"]
    lines = [
        f"{name}: {said['sessions']} sessions, {said['voxels']} voxels, median ncsnr {said['ncsnr_median']:.3f}; the "
        f"true response has a median r of {said['ceiling_r_median']:.3f} with the measured test means"
        for name, said in subjects.items()
    ]
    return "\n".join([f"{os.fspath(out)}: simulated; the truth is in {os.fspath(out)}/truth", *lines])


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"simulating NSD's files needs the package {name}; pip install 'synbrain-jax[nsd]'") from error


def design(simulation: Simulation) -> Experiment:
    """Draws the pictures' latents, who sees which, and when: no picture twice in a run.

    Raises:
        InputError: the trials do not fit into the sessions, or do not fill them.
    """
    rng = np.random.default_rng([simulation.seed, _EXPERIMENT])
    own = simulation.stimuli - simulation.stimuli // 10
    shared, used = simulation.stimuli - own, simulation.stimuli + (simulation.subjects - 1) * own
    count = used + 1 + used // 20  # a few are never shown
    drawn = rng.permutation(count)[:used]
    common = np.sort(drawn[:shared])
    shown = np.stack([np.concatenate([common, of_one]) for of_one in drawn[shared:].reshape(simulation.subjects, own)])

    n, most = REPEATS * simulation.stimuli, RUNS * POSITIONS
    per_session = _even_parts(n, simulation.sessions)
    if not 1 <= per_session.min() <= per_session.max() <= most:
        fitting = f"{-(-n // most)} to {n}"
        raise InputError(f"sessions is {simulation.sessions}; expected {fitting} for {simulation.stimuli} stimuli.")
    trials = np.stack([_even_parts(total, RUNS) for total in per_session])
    run = np.repeat(np.arange(trials.size), trials.ravel())
    order = rng.permutation(np.repeat(np.arange(simulation.stimuli), REPEATS))
    while len(again := _later_in_run(order, run)):
        for place in again:
            other = rng.integers(n)
            order[[place, other]] = order[[other, place]]
    latent = rng.normal(size=(count, simulation.latent_dim))
    return Experiment(latent, shown, shared, order, trials)


def _even_parts(total: int | np.integer, parts: int) -> Int[np.ndarray, "parts"]:
    """Sizes that differ by at most one, the larger ones spread evenly."""
    return np.diff(-(-np.arange(parts + 1) * total // parts))


def _later_in_run(order: Int[np.ndarray, "n"], run: Int[np.ndarray, "n"]) -> Int[np.ndarray, "_"]:
    """The trials whose picture came before in the same run."""
    _, first = np.unique(np.stack([run, order]), axis=1, return_index=True)
    return np.setdiff1d(np.arange(len(order)), first)


# ---- what all subjects share -----------------------------------------------------------------------------------------


def _write_design(root: epath.Path, simulation: Simulation, experiment: Experiment) -> None:
    counts = experiment.trials
    pattern = np.zeros((*counts.shape, POSITIONS))
    for place, count in np.ndenumerate(counts):
        pattern[place][np.arange(count) * POSITIONS // count] = 1
    variables = {
        "masterordering": experiment.order[None] + 1.0,
        "subjectim": experiment.shown + 1.0,
        "sharedix": experiment.shown[:1, : experiment.shared] + 1.0,
        "stimpattern": pattern,
    }
    folder = root / "nsddata" / "experiments" / "nsd"
    folder.mkdir(parents=True)
    scipy.io.savemat(os.fspath(folder / "nsd_expdesign.mat"), variables)


def _write_pictures(root: epath.Path, simulation: Simulation, experiment: Experiment) -> None:
    folder = root / "nsddata_stimuli" / "stimuli" / "nsd"
    folder.mkdir(parents=True)
    size, count = simulation.picture_size, len(experiment.latent)
    with _package("h5py").File(os.fspath(folder / "nsd_stimuli.hdf5"), "w") as file:
        brick = file.create_dataset("imgBrick", (count, size, size, 3), np.uint8)
        for picture, latent in enumerate(experiment.latent):
            rng = np.random.default_rng([simulation.seed, _PICTURES, picture])
            brick[picture] = draw_picture(latent, size, rng)


def draw_picture(latent: Float[np.ndarray, "d"], size: int, rng: np.random.Generator) -> UInt8[np.ndarray, "h w 3"]:
    """A disc on a grating. The latent says hue, orientation, frequency and the disc's size; chance says where it is."""
    hue, orientation, frequency, radius = np.tanh(np.resize(latent, 4) / 1.5)
    phase, x0, y0 = rng.uniform(0, 2 * np.pi), *rng.uniform(-0.5, 0.5, 2)
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    angle = 0.45 * np.pi * orientation
    wave = np.sin(np.pi * (3 + 2.5 * frequency) * (x * np.cos(angle) + y * np.sin(angle)) + phase)
    edge = (0.35 + 0.3 * radius - np.hypot(x - x0, y - y0)) * size / 4
    inside = 1 / (1 + np.exp(-np.clip(edge, -30, 30)))[:, :, None]
    colours = 0.5 + 0.5 * np.cos(2 * np.pi * (0.4 * hue + np.arange(3) / 3 + np.array([[0], [0.5]])))
    picture = inside * colours[0] + (1 - inside) * colours[1] * (0.6 + 0.4 * wave[:, :, None])
    return np.round(255 * picture).astype(np.uint8)


def token_values(simulation: Simulation, latent: Float[np.ndarray, "p d"]) -> Float[np.ndarray, "p t w"]:
    """tanh of a fixed linear map of the latent, plus noise with standard deviation 0.1; float32."""
    rng = np.random.default_rng([simulation.seed, _TOKENS])
    mix = rng.normal(size=(simulation.latent_dim, *simulation.token_shape)) / np.sqrt(simulation.latent_dim)
    values = np.tanh(np.tensordot(latent, mix, axes=1))
    return (values + 0.1 * rng.normal(size=values.shape)).astype(np.float32)


def _write_tokens(folder: epath.Path, simulation: Simulation, experiment: Experiment) -> None:
    folder.mkdir(parents=True)
    values = token_values(simulation, experiment.latent).astype(ml_dtypes.bfloat16)
    names = [str(picture) for picture in range(len(values))]
    write_shard(shard_path(folder, 0, 1), names, values)
    settings = json.dumps({"simulated": dataclasses.asdict(simulation)}, indent=1)
    write_text(folder / MANIFEST_FILE, settings + "\n")
    finish(folder, [names], simulation.token_shape)


# ---- one subject -----------------------------------------------------------------------------------------------------


def _write_subject(
    root: epath.Path, simulation: Simulation, experiment: Experiment, number: int, advance: Callable[[], Any]
) -> dict[str, Any]:
    """Writes a subject's files and returns what truth.json says of it."""
    place = anatomy(simulation, number)
    latent = experiment.latent[experiment.shown[number - 1]]
    truth = true_responses(simulation, number, place.template, latent)
    _write_anatomy(root, number, place)
    folder = root / "nsddata_betas" / "ppdata" / subject_name(number) / "func1pt8mm" / BETAS
    folder.mkdir(parents=True)
    ncsnr = np.zeros(place.nsdgeneral.shape, np.float32)
    ncsnr[tuple(place.ijk.T)] = truth.ncsnr
    _save_volume(folder / "ncsnr.nii.gz", ncsnr, place)

    sessions = simulation.sessions - (simulation.missing_sessions if number % 2 == 0 else 0)
    ends = np.cumsum(experiment.trials.sum(axis=1))
    gains, offsets = [], []
    for session, order in enumerate(np.split(experiment.order, ends[:-1])[:sessions], start=1):
        gain, offset = session_drift(simulation, number, session, place.template)
        rng = np.random.default_rng([simulation.seed, _TRIALS, number, session])
        noisy = truth.response[order] + trial_noise(truth, rng, len(order))
        _write_betas(folder, simulation, number, session, place, gain * noisy + offset)
        gains.append(gain)
        offsets.append(offset)
        advance()

    seen, trials = np.unique(experiment.order[: ends[sessions - 1]], return_counts=True)
    common = seen < experiment.shared
    if common.sum() < 2:
        raise InputError(
            f"stimuli is {simulation.stimuli}: {subject_name(number)} sees {common.sum()} of the pictures that all see "
            f"in its {sessions} sessions; expected at least 2, for a ceiling. Simulate more stimuli."
        )
    ceiling = truth.ceiling_r(seen[common], trials[common])
    known = {
        "response": truth.response.astype(np.float32),
        "picture": experiment.shown[number - 1],
        "ijk": place.ijk,
        "template": place.template,
        "latent": latent,
        "noise_factor": truth.noise_factor,
        "noise_diag": truth.noise_diag,
        "ncsnr": truth.ncsnr,
        "ceiling_r": ceiling,
        "gain": np.stack(gains),
        "offset": np.stack(offsets),
    }
    write_npz(root / "truth" / f"{subject_name(number)}.npz", known)
    return {
        "sessions": sessions,
        "voxels": len(place.ijk),
        "shared_pictures_seen": int(common.sum()),
        "ncsnr_median": float(np.median(truth.ncsnr)),
        "ceiling_r_median": float(np.median(ceiling)),
    }


def _write_anatomy(root: epath.Path, number: int, place: Anatomy) -> None:
    rois = root / "nsddata" / "ppdata" / subject_name(number) / "func1pt8mm" / "roi"
    names = root / "nsddata" / "freesurfer" / subject_name(number) / "label"
    rois.mkdir(parents=True)
    names.mkdir(parents=True)
    _save_volume(rois / "nsdgeneral.nii.gz", place.nsdgeneral, place)
    right = np.arange(place.nsdgeneral.shape[0])[:, None, None] >= place.nsdgeneral.shape[0] / 2
    for atlas, labels in place.labels.items():
        _save_volume(rois / f"{atlas}.nii.gz", labels, place)
        for side, there in (("lh", ~right), ("rh", right)):
            _save_volume(rois / f"{side}.{atlas}.nii.gz", np.where(there, labels, -1).astype(np.int16), place)
        table = [f"{value} {name}\n" for value, name in enumerate(("Unknown", *ATLASES[atlas]))]
        write_text(names / f"{atlas}.mgz.ctab", "".join(table))


def _write_betas(
    folder: epath.Path,
    simulation: Simulation,
    number: int,
    session: int,
    place: Anatomy,
    measured: Float[np.ndarray, "n v"],
) -> None:
    """A session's file: what was measured in the region of interest, noise on the rest of the cortex, 0 elsewhere."""
    volume = np.zeros((*place.nsdgeneral.shape, len(measured)), np.int16)
    cortex = place.nsdgeneral == 0
    rng = np.random.default_rng([simulation.seed, _ELSEWHERE, number, session])
    volume[cortex] = _int16(1 + 2 * rng.normal(size=(cortex.sum(), len(measured))))
    volume[tuple(place.ijk.T)] = _int16(measured.T)
    path = folder / f"betas_session{session:02d}.{simulation.betas_format}"
    if simulation.betas_format == "nii.gz":
        _save_volume(path, volume, place)
        return
    with _package("h5py").File(os.fspath(path), "w") as file:
        file["betas"] = volume.T  # MATLAB's order of axes, reversed


def _int16(percent: np.ndarray) -> np.ndarray:
    return np.clip(np.round(_UNITS * percent), -(2**15), 2**15 - 1).astype(np.int16)


def _save_volume(path: epath.Path, volume: np.ndarray, place: Anatomy) -> None:
    image = _package("nibabel").Nifti1Image(volume, place.affine)
    image.header.set_xyzt_units("mm", "sec" if volume.ndim == 4 else None)
    image.to_filename(os.fspath(path))
