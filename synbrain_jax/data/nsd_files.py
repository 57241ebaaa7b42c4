"""The Natural Scenes Dataset's own files: design, betas, volumes, and the names of regions.

A room of its own because it knows NSD's folders and formats and nothing of records. What is where:
Allen et al. (2022), Nature Neuroscience 25:116-126, and the NSD data manual.

Shape letters: n trials, v voxels, k stimuli; x y z a volume.
"""

import dataclasses
import gzip
import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import scipy.io
from jaxtyping import Bool, Float, Int, Int16, Shaped

from synbrain_jax.errors import InputError
from synbrain_jax.files import read_text

BETAS = "betas_fithrf_GLMdenoise_RR"
SESSIONS = (40, 40, 32, 30, 40, 32, 40, 30)  # of NSD's eight subjects; 40 were planned for each
MASK = "nsdgeneral"
_REPEATS = 3  # presentations that were planned of every stimulus
_DESIGN = {"masterordering": "trial order", "subjectim": "stimuli", "sharedix": "shared stimuli", "stimpattern": "runs"}
_SESSION_FILE = re.compile(r"betas_session(\d+)\.(?:hdf5|nii\.gz)")
# Published names of the regions, from label 1 on, for folders without label tables.
_REGIONS = {
    "prf-visualrois": ("V1v", "V1d", "V2v", "V2d", "V3v", "V3d", "hV4"),
    "prf-eccrois": ("ecc0pt5", "ecc1", "ecc2", "ecc4", "ecc4+"),
    "floc-faces": ("OFA", "FFA-1", "FFA-2", "mTL-faces", "aTL-faces"),
    "floc-bodies": ("EBA", "FBA-1", "FBA-2", "mTL-bodies"),
    "floc-places": ("OPA", "PPA", "RSC"),
    "floc-words": ("OWFA", "VWFA-1", "VWFA-2", "mfs-words", "mTL-words"),
    "streams": ("early", "midventral", "midlateral", "midparietal", "ventral", "lateral", "parietal"),
}


def subject_name(subject: int) -> str:
    """How NSD's folders call a subject: subj01."""
    return f"subj{subject:02d}"


# ---- the experiment --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Presentations:
    """What one subject was shown, trial by trial."""

    stimulus: Int[np.ndarray, "n"]  # int64 row of nsd_stimuli.hdf5, from 0
    session: Int[np.ndarray, "n"]  # int32 scan session, from 1
    run: Int[np.ndarray, "n"]  # int32 run within the whole experiment, from 0


@dataclasses.dataclass(frozen=True, eq=False)
class Design:
    """The experiment as it was planned, nsd_expdesign.mat, counted from 0."""

    order: Int[np.ndarray, "n"]  # int64 place among the subject's stimuli, for every trial; the same for all subjects
    stimuli: Int[np.ndarray, "subjects k"]  # int64 rows of nsd_stimuli.hdf5
    shared: Int[np.ndarray, "_"]  # int64 rows of the stimuli that are shown to all subjects
    run_lengths: Int[np.ndarray, "sessions runs"]  # int64 stimulus trials of each run

    @property
    def session_lengths(self) -> Int[np.ndarray, "sessions"]:
        """Stimulus trials (int64) of each session."""
        return self.run_lengths.sum(axis=1)

    def presentations(self, subject: int, sessions: int) -> Presentations:
        """The trials of a subject's first sessions. Raises InputError if the design lacks the subject."""
        if not 1 <= subject <= len(self.stimuli):
            raise InputError(f"subject {subject}: the design has subjects 1 to {len(self.stimuli)}.")
        lengths = self.run_lengths[:sessions].ravel()
        run = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        session = 1 + run // self.run_lengths.shape[1]
        return Presentations(self.stimuli[subject - 1, self.order[: len(run)]], session.astype(np.int32), run)

    def repeated_by_all(self, sessions: Sequence[int]) -> Int[np.ndarray, "_"]:
        """Rows (int64) of the shared stimuli that every subject saw three times in as many sessions as given for each.

        In NSD these are 515.
        """
        repeated = self.shared
        for subject, count in enumerate(sessions, start=1):
            shown, times = np.unique(self.presentations(subject, count).stimulus, return_counts=True)
            repeated = np.intersect1d(repeated, shown[times >= _REPEATS])
        return repeated


def read_design(root: str | os.PathLike) -> Design:
    """Reads nsd_expdesign.mat. Raises InputError if it is missing, damaged or does not fit together."""
    path = design_file(root)
    if not path.exists():
        raise InputError(f"{path}: missing. {_fetch_hint(root)}")
    try:
        content = scipy.io.loadmat(path, variable_names=list(_DESIGN))
    # A damaged file makes SciPy's reader raise almost anything.
    except Exception as error:
        raise InputError(f"{path}: cannot be read as a MATLAB file ({error}). Fetch it again.") from error
    for name, what in _DESIGN.items():
        if name not in content or content[name].dtype.kind not in "iuf":
            raise InputError(f"{path}: the variable '{name}' ({what}) is missing. Fetch the file again.")
    order, stimuli, shared, pattern = (content[name].astype(np.int64) for name in _DESIGN)
    if pattern.ndim != 3 or pattern.min() < 0 or pattern.max() > 1 or pattern.sum() != order.size:
        raise InputError(
            f"{path}: 'stimpattern' has shape {pattern.shape} and marks {pattern.sum()} trials; expected [sessions, "
            f"runs, trials] of 0 and 1, with {order.size} ones, as 'masterordering' has entries."
        )
    if order.min() < 1 or order.max() > stimuli.shape[1] or stimuli.min() < 1 or shared.min() < 1:
        raise InputError(
            f"{path}: 'masterordering' goes from {order.min()} to {order.max()}, 'subjectim' has {stimuli.shape[1]} "
            f"stimuli from {stimuli.min()}, 'sharedix' goes from {shared.min()}; expected numbers from 1 that fit."
        )
    return Design(order.ravel() - 1, stimuli - 1, shared.ravel() - 1, pattern.sum(axis=2))


def design_file(root: str | os.PathLike) -> Path:
    """Where the design lies."""
    return Path(root) / "nsddata" / "experiments" / "nsd" / "nsd_expdesign.mat"


# ---- betas -----------------------------------------------------------------------------------------------------------


def session_files(root: str | os.PathLike, subject: int, betas: str = BETAS) -> tuple[Path, ...]:
    """A subject's files of betas, session 1 first; the .hdf5 where a session is there as .nii.gz too.

    Raises:
        InputError: there is none, or one before the last is missing.
    """
    folder = betas_folder(root, subject, betas)
    found = _numbered(folder)
    if not found:
        raise InputError(f"{folder}: holds no betas_session01.hdf5 or .nii.gz. {_fetch_hint(root)}")
    missing = [number for number in range(1, max(found)) if number not in found]
    if missing:
        listed = ", ".join(f"{number:02d}" for number in missing)
        raise InputError(
            f"{folder}: betas_session{max(found):02d} is there, but session {listed} is missing; the trials after it "
            f"could not be told apart. {_fetch_hint(root)}"
        )
    return tuple(found[number] for number in sorted(found))


def sessions_of_all(root: str | os.PathLike, design: Design, betas: str = BETAS) -> tuple[int, ...]:
    """The number of sessions of every subject: the published ones of NSD; in another experiment, by its files.

    Where a subject's files are not there, the sessions that were planned count.
    """
    planned = len(design.run_lengths)
    if len(design.stimuli) == len(SESSIONS) and planned == max(SESSIONS):
        return SESSIONS
    subjects = range(1, len(design.stimuli) + 1)
    return tuple(len(_numbered(betas_folder(root, subject, betas))) or planned for subject in subjects)


def betas_folder(root: str | os.PathLike, subject: int, betas: str = BETAS) -> Path:
    """Where a subject's betas of a version lie."""
    return Path(root) / "nsddata_betas" / "ppdata" / subject_name(subject) / "func1pt8mm" / betas


def _numbered(folder: Path) -> dict[int, Path]:
    files = sorted(folder.iterdir(), reverse=True) if folder.is_dir() else []  # .nii.gz before .hdf5, which replaces it
    return {int(match[1]): file for file in files if (match := _SESSION_FILE.fullmatch(file.name))}


def read_session(path: Path, mask: Bool[np.ndarray, "x y z"], n_trials: int) -> Int16[np.ndarray, "n v"]:
    """Reads the betas of one session at the mask's voxels, which come in C order of [x, y, z].

    In memory at once are the result and one volume (.nii.gz) or one slice of all trials (.hdf5).

    Returns:
        300 x percent signal change.

    Raises:
        InputError: the file is damaged, cut, of another shape, or holds numbers that are not int16.
    """
    check_session(path, mask.shape, n_trials)
    read = _hdf5_trials if path.suffix == ".hdf5" else _nifti_trials
    betas = np.empty((n_trials, int(mask.sum())), np.int16)
    try:
        for trials, voxels, values in read(path, mask):
            betas[trials, voxels] = _whole_numbers(path, values)
    except InputError:
        raise
    # A damaged file makes gzip, zlib and h5py raise almost anything.
    except Exception as error:
        raise InputError(f"{path}: damaged or cut ({error or type(error).__name__}). Fetch it again.") from error
    return betas


def check_session(path: Path, shape: tuple[int, ...], n_trials: int) -> None:
    """Raises InputError unless the file's header tells of `n_trials` volumes of this shape. Reads nothing else."""
    if path.suffix == ".hdf5":
        with _hdf5(path) as file:
            found = file["betas"].shape[::-1]  # HDF5 has MATLAB's axes in reverse
    else:
        found = _nifti(path).shape
    if found[:3] != shape:
        raise InputError(f"{path}: volumes of shape {found[:3]}; expected {shape}, as {MASK}.nii.gz has.")
    if found[3:] != (n_trials,):
        raise InputError(
            f"{path}: {' x '.join(map(str, found[3:])) or 'no'} trials; expected {n_trials}, as 'stimpattern' of the "
            "design has in this session. Fetch it again."
        )


def _nifti_trials(path: Path, mask: np.ndarray):
    """Volume by volume, in one pass: nibabel would decompress from the beginning for each."""
    proxy = _nifti(path).dataobj
    size = mask.size * proxy.dtype.itemsize
    with gzip.open(path) as stream:
        stream.seek(proxy.offset)
        for trial in range(proxy.shape[3]):
            content = stream.read(size)
            if len(content) < size:
                raise EOFError(f"ends in volume {trial} of {proxy.shape[3]}")
            values = np.frombuffer(content, proxy.dtype).reshape(mask.shape, order="F")[mask]
            if (proxy.slope, proxy.inter) != (1, 0):
                values = values * proxy.slope + proxy.inter
            yield trial, slice(None), values
        if stream.read(1):  # reading to the end also compares the checksum
            raise EOFError(f"goes on after volume {proxy.shape[3]}, the last")


def _hdf5_trials(path: Path, mask: np.ndarray):
    """Slice by slice: NSD's files keep all trials of a voxel together."""
    number = np.cumsum(mask).reshape(mask.shape) - 1  # of each voxel within the mask
    with _hdf5(path) as file:
        for z in np.flatnonzero(mask.any(axis=(0, 1))):
            x, y = (np.flatnonzero(mask[:, :, z].any(axis=other)) for other in (1, 0))
            box = (slice(x[0], x[-1] + 1), slice(y[0], y[-1] + 1))
            values = file["betas"][:, z, box[1], box[0]].transpose(0, 2, 1)
            inside = mask[:, :, z][box]
            yield slice(None), number[:, :, z][box][inside], values[:, inside]


def _whole_numbers(path: Path, values: np.ndarray) -> Int16[np.ndarray, "..."]:
    with np.errstate(invalid="ignore"):
        whole = values.astype(np.int16)
    wrong = np.count_nonzero(whole != values)
    if wrong:
        nan = np.count_nonzero(np.isnan(values))
        raise InputError(
            f"{path}: {wrong} values ({nan} of them NaN) among {values.size} at voxels of {MASK} are not int16; "
            "expected 300 x percent signal change in whole numbers, as NSD publishes it. Fetch the file again."
        )
    return whole


# ---- volumes ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Volume:
    """One value per voxel."""

    values: Shaped[np.ndarray, "x y z"]
    affine: Float[np.ndarray, "4 4"]  # float64, voxel position to millimetres


def read_volume(path: Path, shape: tuple[int, ...] | None = None) -> Volume:
    """Reads a 3-D .nii.gz. Raises InputError if it is missing, damaged, or not of `shape` where that is given."""
    image = _nifti(path)
    if len(image.shape) != 3 or shape not in (None, image.shape):
        raise InputError(f"{path}: has shape {image.shape}; expected {shape or 'three axes'}, as {MASK}.nii.gz has.")
    try:
        return Volume(np.asarray(image.dataobj), np.asarray(image.affine, np.float64))
    # A damaged file makes gzip, zlib and nibabel raise almost anything.
    except Exception as error:
        raise InputError(f"{path}: damaged or cut ({error or type(error).__name__}). Fetch it again.") from error


def regions(root: str | os.PathLike, subject: int, mask: Bool[np.ndarray, "x y z"]) -> dict[str, Bool[np.ndarray, "v"]]:
    """Which of the mask's voxels each region holds, by "atlas/region"; regions without a voxel are left out.

    Names come from the label tables (.ctab), else from the NSD manual; "atlas/label 3" where neither knows. An atlas
    that is there for the hemispheres alone counts as two.
    """
    folder = roi_folder(root, subject)
    atlases = {file.name.removesuffix(".nii.gz") for file in folder.glob("*.nii.gz")}
    result = {}
    for atlas in sorted(atlases):
        whole = atlas.removeprefix("lh.").removeprefix("rh.")
        if whole == MASK or (whole != atlas and whole in atlases):
            continue
        labels = read_volume(folder / f"{atlas}.nii.gz", mask.shape).values[mask]
        names = _label_names(root, subject, whole)
        for label in np.unique(labels[labels > 0]):
            name = f"{atlas}/{names.get(int(label), f'label {label:g}')}"
            result[name] = (labels == label) | result.get(name, False)
    return result


def roi_folder(root: str | os.PathLike, subject: int) -> Path:
    """Where a subject's volumes of regions lie."""
    return Path(root) / "nsddata" / "ppdata" / subject_name(subject) / "func1pt8mm" / "roi"


def _label_names(root: str | os.PathLike, subject: int, atlas: str) -> dict[int, str]:
    for owner in (subject_name(subject), "fsaverage"):
        table = Path(root) / "nsddata" / "freesurfer" / owner / "label" / f"{atlas}.mgz.ctab"
        if table.exists():
            rows = (line.split() for line in read_text(table).splitlines())
            return {int(row[0]): row[1] for row in rows if len(row) > 1 and row[0].isdecimal()}
    return dict(enumerate(_REGIONS.get(atlas, ()), start=1))


# ---- files -----------------------------------------------------------------------------------------------------------


def cheap_digest(path: Path) -> str:
    """SHA-256 of a file's length, beginning and end; of a .nii.gz the end holds the checksum of all."""
    size, some = path.stat().st_size, 2**16
    with path.open("rb") as stream:
        beginning = stream.read(some)
        stream.seek(max(0, size - some))
        return hashlib.sha256(b"%d " % size + beginning + stream.read()).hexdigest()


def _fetch_hint(root: str | os.PathLike) -> str:
    return (
        f"Give the folder that holds nsddata/ and nsddata_betas/ as --root, or fetch what is missing into {root}: "
        "`synbrain prepare nsd --download`."
    )


def _nifti(path: Path):
    """The image, of which nibabel has read the header."""
    try:
        import nibabel
    except ImportError as error:
        raise InputError(
            f"{path}: reading NIfTI files needs the package nibabel; pip install 'synbrain-jax[nsd]'"
        ) from error
    if not path.exists():
        raise InputError(f"{path}: missing. Fetch it: `synbrain prepare nsd --download`.")
    try:
        return nibabel.Nifti1Image.from_filename(path)
    # A damaged header makes nibabel raise almost anything.
    except Exception as error:
        raise InputError(f"{path}: cannot be read as a NIfTI file ({error}). Fetch it again.") from error


def _hdf5(path: Path):
    """The open file, whose data set `betas` has four axes."""
    try:
        import h5py
    except ImportError as error:
        raise InputError(f"{path}: reading HDF5 needs the package h5py; pip install 'synbrain-jax[nsd]'") from error
    try:
        file = h5py.File(path, "r")
        betas = file.get("betas")
    except (OSError, RuntimeError, KeyError) as error:
        raise InputError(f"{path}: cannot be read as an HDF5 file, or is cut ({error}). Fetch it again.") from error
    if not isinstance(betas, h5py.Dataset) or betas.ndim != 4:
        file.close()
        raise InputError(f"{path}: holds no data set 'betas' [trials, z, y, x]. Fetch it again.")
    return file
