"""The Natural Scenes Dataset (Allen et al. 2022, Nature Neuroscience 25:116-126), from its own files to records.

Two passes, so that no more than a session is in memory: the betas at the voxels of `nsdgeneral` are copied session by
session into a scratch folder beside the result, from where a killed preparation goes on; then the records, one for each
stimulus, are written from memory maps of these copies.

Shape letters: s stimuli, n trials, v voxels.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from jaxtyping import Bool, Float, Int
from tqdm import tqdm

import synbrain_jax.data.nsd_files as nsd_files
from synbrain_jax.data.builder import SPLITS, PairsBuilder, Source, prepare, source_of_trials
from synbrain_jax.data.nsd_files import BETAS, MASK, Design, Presentations
from synbrain_jax.data.tokens import EncodedPictures, open_tokens
from synbrain_jax.data.voxels import Voxels, hilbert_order
from synbrain_jax.errors import InputError
from synbrain_jax.files import write_npy

NORMALISATIONS = ("session_zscore", "scale2000", "none")
TESTS = ("shared", "test515")
_DIVISOR = {"scale2000": 2000, "none": 300}  # of the int16 that the files hold


class Nsd(PairsBuilder, skip_registration=True):
    """One record per stimulus that the subject saw, with its one to three trials; a configuration per subject."""

    name = "nsd"

    def __init__(self, *, source: Source, **kwargs: Any):
        self._given = source
        super().__init__(**kwargs)

    def _load(self) -> Source:
        return self._given


def prepare_nsd(
    root: str | os.PathLike,
    subject: int,
    data_dir: str | os.PathLike,
    *,
    tokens: str | os.PathLike,
    normalisation: str = "session_zscore",
    test: str = "shared",
    validation_share: float = 0.1,
    betas: str = BETAS,
    seed: int = 0,
    permute: str = "none",
) -> epath.Path:
    """Writes a subject's data under `data_dir` unless they are there, and returns the prepared folder.

    The data set's voxels are those where `nsdgeneral` is above 0, in C order of the volume, which is the order of the
    SynBrain release. Records come in the order in which the stimuli were first presented, as the release's rows do, and
    so do the trials of each. Killed and called again, it goes on at the session where it was. Several processes may
    prepare the same subject: one works, the others wait. A voxel without data in a session (zeros in NSD's
    files) is 0 there.

    Args:
        root: folder with NSD's own layout: nsddata, nsddata_betas.
        subject: from 1.
        tokens: folder that `synbrain encode-images` wrote from nsd_stimuli.hdf5.
        normalisation: "session_zscore": each voxel less its mean over the trials of a session, divided by its standard
            deviation there (n - 1), 0 where it is constant; what NSD's noise ceilings are of. "scale2000": what the
            files hold divided by 2000, as in the release. "none": percent signal change.
        test: "shared": the stimuli that are shown to all subjects are the test. "test515": of these only the ones that
            all subjects saw three times (515 in NSD), and the other shared ones are the validation, as in the Brain
            Encoding Response Generator; `validation_share` counts only where there are fewer than two such.
        validation_share: of the stimuli that are not shared, chosen by `seed`, the part that is the validation.
        betas: version of the betas.
        permute: "none", or "trial" to permute the stimulus labels among the training trials (a control).
        seed: of the split and of the permutation.

    Raises:
        InputError: a file or an option cannot be used, or `data_dir` has this subject with these options from other
            files. The message names it. Sessions that were already copied are kept for the next call.
    """
    _check_options(normalisation, test, validation_share)
    given = _Given.read(Path(root).expanduser(), subject, betas)
    shown = _in_order(given.presentations.stimulus)
    split = _split(given, shown, test=test, share=validation_share, seed=seed)
    options = {
        "normalisation": normalisation,
        "test": test,
        "validation_share": validation_share,
        "betas": betas,
        "permute": permute,
        "seed": seed,
    }
    stored = open_tokens(tokens)
    voxels, rows = given.voxels(normalisation), _rows_of_tokens(tokens, stored, shown.stimuli)
    fingerprint = _fingerprint(given, voxels, stored, {"subject": subject, **options})

    place = _workplace(data_dir) / "nsd" / _configuration(subject, options)
    copies = tuple(
        place / "scratch" / f"session{number:02d}-{key[:16]}.npy" for number, key in enumerate(given.keys, start=1)
    )
    source = source_of_trials(
        voxels=voxels,
        stimulus_id=tuple(map(str, shown.stimuli)),
        tokens_of=lambda index: stored.tokens[int(rows[index])],
        fmri=_Normalised(copies, given.design.session_lengths, normalisation),
        stimulus=shown.stimulus,
        run=given.presentations.run,
        session=given.presentations.session,
        split=split[shown.stimulus],
        permute=permute,
        seed=seed,
        fingerprint=fingerprint,
    )
    if voxels.ncsnr is not None:
        source = dataclasses.replace(source, voxels=lambda: voxels)
    config = tfds.core.BuilderConfig(name=place.name)
    builder = Nsd(source=source, data_dir=epath.Path(data_dir).expanduser(), config=config)
    with _alone(place):
        if not epath.Path(builder.data_dir).exists():
            for left in place.glob("incomplete.*"):  # what a killed process left, as nobody else is here
                shutil.rmtree(left)
            _copy_sessions(given, copies)
        folder = prepare(builder)
        shutil.rmtree(place / "scratch", ignore_errors=True)
    return folder


def _check_options(normalisation: str, test: str, validation_share: float) -> None:
    if normalisation not in NORMALISATIONS:
        raise InputError(f"normalisation '{normalisation}': expected {' or '.join(map(repr, NORMALISATIONS))}.")
    if test not in TESTS:
        raise InputError(f"test '{test}': expected {' or '.join(map(repr, TESTS))}.")
    if not 0 < validation_share < 1:
        raise InputError(f"validation_share {validation_share}: expected more than 0 and less than 1.")


def _workplace(data_dir: str | os.PathLike) -> Path:
    """`data_dir` itself, unless it is in a bucket, which cannot be locked nor mapped into memory."""
    if "://" in os.fspath(data_dir):
        return Path(tempfile.gettempdir()) / f"synbrain-{os.getuid()}"
    return Path(data_dir).expanduser()


# ---- what was given --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class _Given:
    """A subject's files, found and looked at, with the betas unread."""

    root: Path
    subject: int
    betas: str
    design: Design
    sessions: tuple[Path, ...]
    presentations: Presentations
    mask: Bool[np.ndarray, "x y z"]
    affine: Float[np.ndarray, "4 4"]

    @classmethod
    def read(cls, root: Path, subject: int, betas: str) -> "_Given":
        design = nsd_files.read_design(root)
        design.presentations(subject, 0)  # an unknown subject is told before missing files
        sessions = nsd_files.session_files(root, subject, betas)
        planned = len(design.run_lengths)
        if len(sessions) > planned:
            raise InputError(f"{sessions[planned]}: session {planned + 1}, but the design has {planned} sessions.")
        expected = nsd_files.sessions_of_all(root, design, betas)[subject - 1]
        if len(sessions) < expected:
            _note(
                f"{sessions[0].parent}: sessions 1 to {len(sessions)} of the subject's {expected} are there and used."
            )
        file = nsd_files.roi_folder(root, subject) / f"{MASK}.nii.gz"
        volume = nsd_files.read_volume(file)
        mask = volume.values > 0
        if not mask.any():
            raise InputError(f"{file}: no voxel is above 0; expected the mask of visual cortex. Fetch it again.")
        presentations = design.presentations(subject, len(sessions))
        return cls(root, subject, betas, design, sessions, presentations, mask, volume.affine)

    @functools.cached_property
    def keys(self) -> tuple[str, ...]:
        """One text per session that changes with the betas and with the mask."""
        mask = hashlib.sha256(self.mask.tobytes()).hexdigest()
        return tuple(
            hashlib.sha256(f"{mask} {file.name} {nsd_files.cheap_digest(file)}".encode()).hexdigest()
            for file in self.sessions
        )

    def voxels(self, normalisation: str) -> Voxels:
        ijk = np.argwhere(self.mask).astype(np.int32)
        return Voxels(
            subject=f"nsd-{nsd_files.subject_name(self.subject)}",
            normalisation=normalisation,
            ijk=ijk,
            volume_shape=self.mask.shape,
            affine=self.affine,
            ncsnr=self._ncsnr(),
            order=hilbert_order(ijk),
            rois=nsd_files.regions(self.root, self.subject, self.mask),
        )

    def _ncsnr(self) -> Float[np.ndarray, "v"] | None:
        file = nsd_files.betas_folder(self.root, self.subject, self.betas) / "ncsnr.nii.gz"
        if not file.exists():
            _note(f"{file}: missing; the noise ceiling will be estimated from the repeats instead.")
            return None
        ncsnr = nsd_files.read_volume(file, self.mask.shape).values[self.mask].astype(np.float32)
        unknown = ~np.isfinite(ncsnr)
        if unknown.any():
            _note(f"{file}: not a number at {unknown.sum()} of {len(ncsnr)} voxels; 0, which is no signal, there.")
        return np.where(unknown, np.float32(0), ncsnr)


@dataclasses.dataclass(frozen=True, eq=False)
class _Shown:
    stimuli: Int[np.ndarray, "s"]  # rows of nsd_stimuli.hdf5 in the order of first presentation
    stimulus: Int[np.ndarray, "n"]  # int32 index into `stimuli` of each trial


def _in_order(rows: Int[np.ndarray, "n"]) -> _Shown:
    stimuli, first, index = np.unique(rows, return_index=True, return_inverse=True)
    order = np.argsort(first)
    return _Shown(stimuli[order], np.argsort(order)[index].astype(np.int32))


def _split(given: _Given, shown: _Shown, *, test: str, share: float, seed: int) -> np.ndarray:
    """Returns "train", "validation" or "test" for each of the subject's stimuli [s]."""
    shared = np.isin(shown.stimuli, given.design.shared)
    tested, held = shared, np.zeros_like(shared)
    if test == "test515":
        sessions = nsd_files.sessions_of_all(given.root, given.design, given.betas)
        tested = np.isin(shown.stimuli, given.design.repeated_by_all(sessions))
        held = shared & ~tested
    if held.sum() < 2:
        own = np.flatnonzero(~shared)
        chosen = np.random.default_rng([seed, 0]).permutation(own)[: round(share * len(own))]
        held[chosen] = True
    split = np.select([tested, held], ["test", "validation"], "train")
    for name in SPLITS:
        count = np.count_nonzero(split == name)
        if count < 2:
            raise InputError(
                f"split '{name}': {count} of the {len(split)} stimuli that subject {given.subject} saw in "
                f"{len(given.sessions)} sessions; expected at least 2. Use more sessions, a larger validation_share, "
                "or test='shared'."
            )
    return split


def _rows_of_tokens(
    folder: str | os.PathLike, stored: EncodedPictures, stimuli: Int[np.ndarray, "s"]
) -> Int[np.ndarray, "s"]:
    row_of = {name: row for row, name in enumerate(stored.stimulus_id)}
    missing = [str(stimulus) for stimulus in stimuli if str(stimulus) not in row_of]
    if missing:
        raise InputError(
            f"{os.fspath(folder)}: lacks tokens of {len(missing)} of the {len(stimuli)} stimuli that the subject saw, "
            f"e.g. {', '.join(missing[:3])} (rows of nsd_stimuli.hdf5, from 0); it has "
            f"{', '.join(stored.stimulus_id[:3])}, ... Encode that file: `synbrain encode-images --images "
            ".../nsd_stimuli.hdf5`."
        )
    return np.array([row_of[str(stimulus)] for stimulus in stimuli])


def _fingerprint(given: _Given, voxels: Voxels, stored: EncodedPictures, options: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps([options, given.keys], sort_keys=True).encode())
    digest.update(stored.tokens.fingerprint.encode())
    digest.update(nsd_files.design_file(given.root).read_bytes())
    for name, array in {**voxels.rois, "ncsnr": voxels.ncsnr, "affine": voxels.affine}.items():
        digest.update(name.encode() + (b"" if array is None else array.tobytes()))
    return digest.hexdigest()


def _configuration(subject: int, options: dict[str, Any]) -> str:
    """subj01, and what is unlike the default, so that several preparations of a subject live beside each other."""
    parts = [nsd_files.subject_name(subject)]
    parts += [
        options[name]
        for name, usual in (("normalisation", NORMALISATIONS[0]), ("test", TESTS[0]))
        if options[name] != usual
    ]
    parts += [options["betas"]] if options["betas"] != BETAS else []
    parts += ["permuted"] if options["permute"] != "none" else []
    parts += [f"seed{options['seed']}"] if options["seed"] else []
    return "-".join(parts)


# ---- the two passes --------------------------------------------------------------------------------------------------


def _copy_sessions(given: _Given, copies: Sequence[Path]) -> None:
    """The first pass: betas at the mask's voxels, a file per session that is whole or absent."""
    lengths = [int(length) for length in given.design.session_lengths]
    work = [
        (file, copy, n_trials)
        for file, copy, n_trials in zip(given.sessions, copies, lengths, strict=False)
        if not _is_copy(copy, (n_trials, int(given.mask.sum())))
    ]
    for file, _, n_trials in work:  # before hours of reading
        nsd_files.check_session(file, given.mask.shape, n_trials)
    done = len(copies) - len(work)
    for file, copy, n_trials in tqdm(
        work, desc="read betas", unit="session", initial=done, total=len(copies), disable=None
    ):
        write_npy(copy, nsd_files.read_session(file, given.mask, n_trials))


def _is_copy(path: Path, shape: tuple[int, int]) -> bool:
    try:
        return np.load(path, mmap_mode="r").shape == shape
    except (OSError, ValueError):
        return False


class _Normalised:
    """fmri [n, v] float32 of the copied sessions, read and normalised where it is indexed."""

    def __init__(self, copies: Sequence[Path], lengths: Int[np.ndarray, "sessions"], normalisation: str):
        self._copies, self._normalisation = copies, normalisation
        self._ends = np.cumsum(lengths[: len(copies)])

    @functools.cached_property
    def _sessions(self) -> list[np.ndarray]:
        return [np.load(path, mmap_mode="r") for path in self._copies]

    @functools.cached_property
    def _moments(self) -> list[tuple[Float[np.ndarray, "v"], Float[np.ndarray, "v"]]]:
        """Each session's mean and standard deviation, which is infinite where nothing varies."""
        moments = [(session.mean(axis=0), session.std(axis=0, ddof=1)) for session in self._sessions]
        return [(mean, np.where(sd > 0, sd, np.inf)) for mean, sd in moments]

    def __getitem__(self, key: Any) -> Float[np.ndarray, "rows columns"]:
        rows, columns = key if isinstance(key, tuple) else (key, slice(None))
        rows = np.arange(self._ends[-1])[rows]
        session = np.searchsorted(self._ends, rows, side="right")
        result = np.empty((len(rows), len(range(self._sessions[0].shape[1])[columns])), np.float32)
        for number in np.unique(session):
            here = session == number
            first = self._ends[number - 1] if number else 0
            held = self._sessions[number][rows[here] - first, columns].astype(np.float32)
            if self._normalisation == "session_zscore":
                mean, sd = (moment[columns] for moment in self._moments[number])
                result[here] = (held - mean) / sd
            else:
                result[here] = held / np.float32(_DIVISOR[self._normalisation])
        return result


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits until no other process is inside for the same folder; the system lets go of it for a killed one."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _note(f"{folder}: another process prepares these data; waiting for it.")
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            _note(f"{folder}: on a disk without locks; see that one process only prepares these data.")
        yield
    finally:
        os.close(handle)


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)
