"""Random numbers in the file layout of the Natural Scenes Dataset: real numbers of sessions, few trials, tiny volumes.

Written from the NSD manual, and apart from the package's simulator, so that one does not share the other's mistakes.
"""

import dataclasses
import os
from pathlib import Path

import h5py
import ml_dtypes
import nibabel
import numpy as np
import scipy.io
from etils import epath

from synbrain_jax.data import tokens

SESSIONS = {1: 40, 3: 32, 4: 30}
SHAPE = (5, 6, 4)
TOKENS = (2, 3)
SHARED, OWN, RUNS, MOMENTS = 12, 78, 3, 4
PICTURES = SHARED + 8 * OWN
AFFINE = np.array([[1.8, 0, 0, -70], [0, 1.8, 0, -90], [0, 0, 1.8, -60], [0, 0, 0, 1]])
BETAS = "betas_fithrf_GLMdenoise_RR"


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a subject's files are."""

    root: Path

    @property
    def design(self) -> Path:
        return self.root / "nsddata/experiments/nsd/nsd_expdesign.mat"

    @property
    def tokens(self) -> Path:
        return self.root / "tokens"

    def roi(self, subject: int, atlas: str) -> Path:
        return self.root / f"nsddata/ppdata/subj{subject:02d}/func1pt8mm/roi/{atlas}.nii.gz"

    def table(self, owner: str, atlas: str) -> Path:
        return self.root / f"nsddata/freesurfer/{owner}/label/{atlas}.mgz.ctab"

    def betas(self, subject: int, name: str) -> Path:
        return self.root / f"nsddata_betas/ppdata/subj{subject:02d}/func1pt8mm/{BETAS}/{name}"

    def session(self, subject: int, session: int, kind: str = "nii.gz") -> Path:
        return self.betas(subject, f"betas_session{session:02d}.{kind}")


def write_layout(root: Path, sessions: dict[int, int] = SESSIONS, seed: int = 0) -> Layout:
    """Writes everything that the subjects, with so many sessions each, need."""
    rng = np.random.default_rng(seed)
    layout = Layout(root)
    lengths = write_design(layout, rng)
    for subject, count in sessions.items():
        mask = rng.choice([-1, 0, 1], SHAPE, p=[0.4, 0.4, 0.2]).astype(np.float32)
        write_volume(layout.roi(subject, "nsdgeneral"), mask)
        write_volume(layout.roi(subject, "prf-visualrois"), rng.integers(-1, 8, SHAPE).astype(np.float32))
        write_volume(layout.roi(subject, "lh.prf-visualrois"), np.ones(SHAPE, np.float32))
        write_volume(layout.betas(subject, "ncsnr.nii.gz"), rng.uniform(0, 1, SHAPE).astype(np.float32))
        for session in range(1, count + 1):
            betas = rng.integers(-(2**15), 2**15, (*SHAPE, lengths[session - 1])).astype(np.int16)
            write_volume(layout.session(subject, session), betas)
    write_tokens(layout.tokens, [str(row) for row in range(PICTURES)])
    return layout


def write_design(layout: Layout, rng: np.random.Generator) -> np.ndarray:
    """NSD's design for eight subjects and 40 sessions; returns the number of trials of each session."""
    pattern = np.zeros((40, RUNS, MOMENTS), np.uint8)
    for run in pattern.reshape(-1, MOMENTS):
        run[rng.choice(MOMENTS, rng.integers(1, 4), replace=False)] = 1
    each = SHARED + OWN
    order = 1 + rng.permutation(np.repeat(np.arange(each), 1 + pattern.sum() // each))[: pattern.sum()]
    names = 1 + rng.permutation(PICTURES)
    shared, own = names[:SHARED], names[SHARED:].reshape(8, OWN)
    stimuli = np.concatenate([np.tile(shared, (8, 1)), own], axis=1)
    content = {
        "masterordering": order[None].astype(np.uint16),
        "subjectim": stimuli.astype(np.int32),
        "sharedix": np.sort(shared)[None].astype(np.float64),
        "stimpattern": pattern,
    }
    layout.design.parent.mkdir(parents=True)
    scipy.io.savemat(layout.design, content, do_compression=True)
    return pattern.sum(axis=(1, 2))


def write_volume(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.Nifti1Image(values, AFFINE).to_filename(path)


def write_hdf5(path: Path, betas: np.ndarray) -> None:
    """Betas [x, y, z, n] as MATLAB writes them: axes in reverse, all trials of a voxel in one chunk."""
    with h5py.File(path, "w") as file:
        file.create_dataset("betas", data=betas.transpose(3, 2, 1, 0), chunks=(betas.shape[3], 1, 1, 1))


def read_betas(path: Path) -> np.ndarray:
    """What nibabel reads of a file, float64 [x, y, z, n]."""
    return nibabel.load(path).get_fdata()


def token_of(picture: int) -> np.ndarray:
    """Tokens of a picture, exact in bfloat16."""
    return np.arange(6).reshape(TOKENS) + np.array([picture % 128, picture // 128])[:, None].astype(np.float32)


def write_tokens(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True)
    values = np.stack([token_of(int(name)) for name in names]).astype(ml_dtypes.bfloat16)
    (folder / tokens.MANIFEST_FILE).write_text("{}")
    tokens.write_shard(tokens.shard_path(epath.Path(folder), 0, 1), names, values)
    tokens.finish(epath.Path(os.fspath(folder)), [names], TOKENS)
