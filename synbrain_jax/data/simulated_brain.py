"""Simulated people who look at pictures: what each voxel of each brain answers, and by which noise, is known exactly.

A picture is a point s of a latent space, s ~ N(0, I). A voxel answers with a linear function of s plus a smooth
nonlinear one: random cosines (as in random Fourier features, Rahimi and Recht 2007, NeurIPS) without their linear part.
The weights of both are smooth over the volume. Most of them follow maps that all brains share, at corresponding places
of a template; the rest is a brain's own. Trials add noise of known covariance: a few smooth patterns of the whole brain
and independent noise of each voxel. `simulate.py` writes such brains as the files of a real data set.

Shape letters: m pictures, d latent dimensions, v voxels, r noise patterns, n trials.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import numpy as np
from jaxtyping import Float, Int, Int16

from synbrain_jax.errors import InputError

ATLASES = {
    "prf-visualrois": ("V1v", "V1d", "V2v", "V2d", "V3v", "V3d", "hV4"),
    "floc-faces": ("OFA", "FFA-1", "FFA-2", "mTL-faces", "aTL-faces"),
    "streams": ("early", "midventral", "midlateral", "midparietal", "ventral", "lateral", "parietal"),
}
VOXEL_MM = 1.8
_FACE_PLACES = ((0.5, -0.7, -0.4), (0.45, -0.5, -0.65), (0.4, -0.3, -0.75), (0.4, 0.0, -0.8), (0.3, 0.5, -0.6))
_COSINES, _REFERENCE = 32, 4096
# One stream of random numbers per purpose.
_ANATOMY, _SHARED, _OWN, _FUNCTION, _RELIABILITY, _NOISE, _SIZE, _DRIFT = range(8)


@dataclasses.dataclass(frozen=True)
class Simulation:
    """What is simulated. With the defaults 1,125 pictures of a subject are its own, and 125 are shown to all."""

    subjects: int = 2
    """People, each with a volume, a mask and voxels of its own."""
    sessions: int = 5
    """Scan sessions, of 12 runs each."""
    stimuli: int = 1250
    """Pictures of each subject, every one shown three times over the sessions. A tenth of them all subjects share."""
    voxels: int = 600
    """In the region of interest of the first subject; the others have 0.8 to 1.1 times as many."""
    latent_dim: int = 4
    """Dimensions of a picture that tokens and responses depend on."""
    nonlinear: float = 0.5
    """Share of a voxel's response variance that no linear function of the latent explains, 0 to 1."""
    gain: float = 1.0
    """Frequency of the nonlinear part: the larger, the more pictures are needed to learn it."""
    ncsnr: float = 0.6
    """Standard deviation of the response over that of one trial's noise, median over voxels."""
    noise_rank: int = 8
    """Noise patterns that the voxels of a brain share; 0: independent noise only."""
    noise_shared: float = 0.4
    """Share of each voxel's noise variance that these patterns make, 0 to below 1."""
    own_tuning: float = 0.3
    """Share of the weights' variance that a subject does not share with the others, 0 to 1."""
    missing_sessions: int = 0
    """The last sessions that every second subject did not come to, so that it saw some pictures once or twice."""
    token_shape: tuple[int, int] = (12, 32)
    """Tokens and their width."""
    picture_size: int = 64
    """Pixels along a side."""
    betas_format: Literal["nii.gz", "hdf5"] = "nii.gz"
    """Of the responses' files."""
    seed: int = 0

    def __post_init__(self):
        least = {"subjects": 1, "sessions": 1, "stimuli": 20, "voxels": 20, "latent_dim": 1, "noise_rank": 0, "seed": 0}
        for field, smallest in {**least, "missing_sessions": 0, "picture_size": 8}.items():
            _check(getattr(self, field) >= smallest, field, getattr(self, field), f"at least {smallest}")
        _check(self.subjects <= 99, "subjects", self.subjects, "at most 99")
        for field in ("nonlinear", "own_tuning"):
            _check(0 <= getattr(self, field) <= 1, field, getattr(self, field), "0 to 1")
        for field in ("gain", "ncsnr"):
            _check(getattr(self, field) > 0, field, getattr(self, field), "above 0")
        _check(0 <= self.noise_shared < 1, "noise_shared", self.noise_shared, "0 to below 1")
        _check(self.missing_sessions < self.sessions, "missing_sessions", self.missing_sessions, "less than sessions")
        _check(self.noise_rank <= self.voxels // 2, "noise_rank", self.noise_rank, "at most half of voxels")
        _check(min(self.token_shape) >= 1, "token_shape", self.token_shape, "two positive numbers")


def _check(condition: bool, field: str, given: object, expected: str) -> None:
    if not condition:
        raise InputError(f"{field} is {given}; expected {expected}.")


@dataclasses.dataclass(frozen=True, eq=False)
class Anatomy:
    """Where a subject's voxels are. Label volumes are [x, y, z] int16: -1 off the cortex, 0 in no region of it."""

    affine: Float[np.ndarray, "4 4"]  # float64, to millimetres
    nsdgeneral: Int16[np.ndarray, "x y z"]  # 1 in the region of interest
    labels: Mapping[str, Int16[np.ndarray, "x y z"]]  # atlas -> volume, from 1 in the order of ATLASES
    ijk: Int[np.ndarray, "v 3"]  # of the region of interest, last axis fastest
    template: Float[np.ndarray, "v 3"]  # their places in the brain that all share, a ball of radius 1; right, front, up


@dataclasses.dataclass(frozen=True, eq=False)
class Truth:
    """How a subject's voxels respond, in percent signal change, before a session's drift."""

    response: Float[np.ndarray, "m v"]  # without noise
    noise_factor: Float[np.ndarray, "v r"]  # the noise covariance is noise_factor @ noise_factor.T + diag(noise_diag)
    noise_diag: Float[np.ndarray, "v"]
    ncsnr: Float[np.ndarray, "v"]  # of one trial, over the subject's pictures

    @property
    def noise_variance(self) -> Float[np.ndarray, "v"]:
        """Of one trial, of each voxel."""
        return (self.noise_factor**2).sum(axis=1) + self.noise_diag

    def ceiling_r(self, pictures: Int[np.ndarray, "k"], trials: Int[np.ndarray, "k"]) -> Float[np.ndarray, "v"]:
        """Correlation of the true responses to some pictures with the means of that many trials of each."""
        signal = self.response[pictures].var(axis=0)
        return np.sqrt(signal / (signal + self.noise_variance * np.mean(1 / trials)))


def anatomy(simulation: Simulation, number: int) -> Anatomy:
    """The brain of subject `number`, which counts from 1."""
    rng = np.random.default_rng([simulation.seed, _ANATOMY, number])
    voxels = simulation.voxels if number == 1 else round(simulation.voxels * rng.uniform(0.8, 1.1))
    side = (12 * voxels) ** (1 / 3)
    shape = tuple(int(np.ceil(side * stretch + rng.uniform(0, 2))) for stretch in (0.9, 1.15, 0.97))
    middle = (np.array(shape) - 1) / 2
    ball = (np.indices(shape).reshape(3, -1).T - middle) / (0.96 * np.array(shape) / 2)
    turn = rng.uniform(-0.3, 0.3)
    template = ball @ np.array([[np.cos(turn), np.sin(turn), 0], [-np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    radius = np.linalg.norm(ball, axis=1)
    cortex = (radius >= 0.5) & (radius <= 1)
    posterior = np.flatnonzero(cortex)[np.argsort(template[cortex, 1], kind="stable")[:voxels]]
    region = np.sort(posterior)
    affine = np.diag([VOXEL_MM, VOXEL_MM, VOXEL_MM, 1.0])
    affine[:3, 3] = -VOXEL_MM * middle
    return Anatomy(
        affine=affine,
        nsdgeneral=_volume(shape, cortex, region, np.ones(voxels)),
        labels={name: _volume(shape, cortex, region, label) for name, label in _labels(template[region]).items()},
        ijk=np.stack(np.unravel_index(region, shape), axis=1).astype(np.int32),
        template=template[region],
    )


def _volume(
    shape: tuple[int, int, int], cortex: np.ndarray, region: np.ndarray, label: np.ndarray
) -> Int16[np.ndarray, "x y z"]:
    volume = np.where(cortex, 0, -1).astype(np.int16)
    volume[region] = label
    return volume.reshape(shape)


def _labels(template: Float[np.ndarray, "v 3"]) -> dict[str, Int[np.ndarray, "v"]]:
    """Regions by place alone: from the back to the front, and from bottom to top."""
    _, y, z = template.T
    depth = np.argsort(np.argsort(y)) / len(y)
    height = np.digitize(z, (-0.3, 0.3))  # 0 ventral, 1 lateral, 2 parietal
    streams = np.where(depth < 0.4, 1, np.where(depth < 0.65, 2, 5) + height)
    area = np.digitize(abs(z), (0.2, 0.4, 0.7))
    retinotopic = np.where((streams == 1) & (area < 3), 1 + 2 * area + (z > 0), 0)
    mirrored = np.concatenate([abs(template[:, :1]), template[:, 1:]], axis=1)
    distance = np.linalg.norm(mirrored[:, None] - np.array(_FACE_PLACES), axis=2)
    faces = np.where(distance.min(axis=1) < 0.25, 1 + distance.argmin(axis=1), 0)
    return {
        "prf-visualrois": np.where(streams == 2, len(ATLASES["prf-visualrois"]), retinotopic),
        "floc-faces": faces,
        "streams": streams,
    }


def true_responses(
    simulation: Simulation, number: int, template: Float[np.ndarray, "v 3"], latent: Float[np.ndarray, "m d"]
) -> Truth:
    """Responses of subject `number` to its pictures, and its noise.

    Over these pictures each voxel's response has exactly the variance that `ncsnr` says.
    """
    seed = simulation.seed
    shared = smooth_fields(np.random.default_rng([seed, _SHARED]), template, simulation.latent_dim + _COSINES)
    own = smooth_fields(np.random.default_rng([seed, _OWN, number]), template, simulation.latent_dim + _COSINES)
    weights = np.sqrt(1 - simulation.own_tuning) * shared + np.sqrt(simulation.own_tuning) * own
    linear = _standardised(latent @ weights[:, : simulation.latent_dim].T)
    bent = _standardised(nonlinear_features(simulation, latent) @ weights[:, simulation.latent_dim :].T)
    signal = _standardised(np.sqrt(1 - simulation.nonlinear) * linear + np.sqrt(simulation.nonlinear) * bent)

    rng = np.random.default_rng([seed, _RELIABILITY, number])
    field = smooth_fields(rng, template, 1)[:, 0] + 0.7 * rng.normal(size=len(template))
    ncsnr = simulation.ncsnr * np.maximum(0, 1 + 0.5 * (field - np.median(field)) / field.std())
    size, mean = smooth_fields(np.random.default_rng([seed, _SIZE, number]), template, 2).T
    total = 2 * np.exp(0.3 * size)  # standard deviation over trials
    noise_sd = total / np.sqrt(1 + ncsnr**2)

    loadings = np.zeros((len(template), 0))
    shared_share = simulation.noise_shared if simulation.noise_rank else 0.0
    if simulation.noise_rank:
        rng = np.random.default_rng([seed, _NOISE, number])
        # Orthogonal, else fields of a small region are nearly the same few.
        loadings = np.linalg.qr(smooth_fields(rng, template, simulation.noise_rank)).Q
        loadings *= np.sqrt(shared_share) * (noise_sd / np.linalg.norm(loadings, axis=1))[:, None]
    return Truth(
        response=1 + 0.5 * mean + noise_sd * ncsnr * signal,
        noise_factor=loadings,
        noise_diag=(1 - shared_share) * noise_sd**2,
        ncsnr=ncsnr,
    )


def nonlinear_features(simulation: Simulation, latent: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "m f"]:
    """Random cosines of the latent, less what is linear in it (by regression over many points of the latent space)."""
    rng = np.random.default_rng([simulation.seed, _FUNCTION])
    waves = simulation.gain * rng.normal(size=(simulation.latent_dim, _COSINES))
    phases = rng.uniform(0, 2 * np.pi, _COSINES)
    reference = rng.normal(size=(_REFERENCE, simulation.latent_dim))
    linear, *_ = np.linalg.lstsq(_with_one(reference), np.cos(reference @ waves + phases), rcond=None)
    return np.cos(latent @ waves + phases) - _with_one(latent) @ linear


def trial_noise(truth: Truth, rng: np.random.Generator, trials: int) -> Float[np.ndarray, "n v"]:
    """Noise of independent trials, in percent signal change."""
    patterns = rng.normal(size=(trials, truth.noise_factor.shape[1])) @ truth.noise_factor.T
    return patterns + np.sqrt(truth.noise_diag) * rng.normal(size=(trials, len(truth.noise_diag)))


def session_drift(
    simulation: Simulation, number: int, session: int, template: Float[np.ndarray, "v 3"]
) -> tuple[Float[np.ndarray, "v"], Float[np.ndarray, "v"]]:
    """Gain, and offset in percent signal change, of each voxel in a session: about 10 % and 0.5."""
    rng = np.random.default_rng([simulation.seed, _DRIFT, number, session])
    gain, offset = smooth_fields(rng, template, 2).T
    return np.exp(0.1 * gain), 0.5 * offset


def smooth_fields(
    rng: np.random.Generator, template: Float[np.ndarray, "v 3"], count: int, length: float = 0.35
) -> Float[np.ndarray, "v f"]:
    """Random functions of a place, about Gaussian processes of variance 1 whose correlation falls off over `length`.

    The same random numbers give the same functions, wherever they are evaluated.
    """
    waves, phases = rng.normal(size=(3, 128)) / length, rng.uniform(0, 2 * np.pi, 128)
    return np.cos(template @ waves + phases) @ rng.normal(size=(128, count)) / 8  # sqrt(2 / 128)


def _standardised(values: Float[np.ndarray, "m v"]) -> Float[np.ndarray, "m v"]:
    return (values - values.mean(axis=0)) / values.std(axis=0)


def _with_one(latent: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "m e"]:
    return np.concatenate([np.ones((len(latent), 1)), latent], axis=1)
