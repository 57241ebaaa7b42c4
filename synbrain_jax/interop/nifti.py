"""Patterns of voxels as NIfTI volumes, and back: the way to the tools that show and analyse brains.

The volume is the data set's own: its matrix, and the affine that the data's files had. Nothing is resampled, so that
`from_volume(to_volume(patterns, voxels), voxels)` gives back every bit. A room of its own because it writes and reads
another program's format.

Shape letters: v voxels, n patterns.
"""

import gzip
import os
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float, Int

from synbrain_jax.data.voxels import Voxels
from synbrain_jax.errors import InputError

_MOST = 2**15 - 1  # what a NIfTI-1 header can say of an axis
_MILLIMETRES = 0.01  # by which affines may differ that went through a header's float32 or a text file


def to_volume(
    patterns: Float[np.ndarray, "v"] | Float[np.ndarray, "n v"], voxels: Voxels, fill: float = 0.0
) -> "nibabel.Nifti1Image":
    """A 3-D image of one pattern, or a 4-D image with pattern after pattern along the fourth axis; float32.

    Args:
        patterns: in the data set's own order of voxels.
        voxels: where they are; the image gets their affine (millimetres).
        fill: value outside the voxels, e.g. NaN.

    Raises:
        InputError: the positions or the affine are unknown, there are more than 32,767 patterns, or nibabel is missing.
    """
    place = _places(voxels)
    volume = np.full((*patterns.shape[:-1], *voxels.volume_shape), fill, np.float32)
    volume[(..., *place)] = patterns
    volume = np.moveaxis(volume, 0, -1) if patterns.ndim == 2 else volume
    return _nibabel().Nifti1Image(volume, voxels.affine, _header(volume.shape, voxels))


def from_volume(image: Any, voxels: Voxels) -> Float[np.ndarray, "v"] | Float[np.ndarray, "n v"]:
    """The inverse of `to_volume`: the voxels' values in a 3-D image [v], in each volume of a 4-D image [n v]; float32.

    Args:
        image: what `nibabel.load` or `to_volume` gives.

    Raises:
        InputError: the image has another matrix or affine than the voxels, or theirs are unknown.
    """
    place = _places(voxels)
    what = image.get_filename() or "the image"
    if len(image.shape) not in (3, 4) or image.shape[:3] != voxels.volume_shape:
        raise InputError(
            f"{what}: has shape {image.shape}; expected {voxels.volume_shape}, with or without a fourth axis, as the "
            f"voxels of {voxels.subject}. Give a volume in the space of that data set."
        )
    if not np.allclose(image.affine, voxels.affine, rtol=0, atol=_MILLIMETRES):
        raise InputError(
            f"{what}: has the affine {np.round(image.affine, 3).tolist()}; expected that of the voxels of "
            f"{voxels.subject}, {np.round(voxels.affine, 3).tolist()}. Give a volume in the space of that data set."
        )
    values = np.asarray(image.dataobj)[place].astype(np.float32)
    return np.ascontiguousarray(values.T)


def save_nifti(
    path: str | os.PathLike,
    patterns: Float[np.ndarray, "v"] | Float[np.ndarray, "n v"],
    voxels: Voxels,
    fill: float = 0.0,
    description: str = "",
) -> None:
    """Writes the image of `to_volume` as .nii.gz or .nii, whole or not at all.

    Volume by volume: a thousand volumes of NSD's size would take 2.8 GB at once.

    Args:
        description: for the header, of which it keeps the first 79 bytes.

    Raises:
        InputError: as `to_volume`, or the name has another ending.
    """
    check_nifti(path, voxels)
    place = _places(voxels)
    header = _header((*voxels.volume_shape, *patterns.shape[:-1]), voxels)
    header["descrip"] = description.encode("ascii", "replace")[:79]
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    volume = np.full(voxels.volume_shape, fill, np.float32)
    try:
        with unfinished.open("wb") as raw, _packed(raw, path.name) as file:
            header.write_to(file)
            for pattern in np.atleast_2d(patterns):
                volume[place] = pattern
                file.write(volume.tobytes(order="F"))
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def check_nifti(path: str | os.PathLike, voxels: Voxels) -> None:
    """Raises InputError where `save_nifti` would, so that a long computation need not end with it."""
    if not os.fspath(path).endswith((".nii", ".nii.gz")):
        raise InputError(f"{os.fspath(path)}: expected a name that ends in .nii.gz or .nii")
    _places(voxels)
    _nibabel()


def _packed(raw: Any, name: str) -> Any:
    # No name and no time inside, so that the same numbers give the same file.
    return gzip.GzipFile("", "wb", compresslevel=1, fileobj=raw, mtime=0) if name.endswith(".gz") else raw


def _header(shape: tuple[int, ...], voxels: Voxels) -> Any:
    if max(shape) > _MOST:
        raise InputError(
            f"{max(shape):,} volumes: a NIfTI file holds at most {_MOST:,}; write fewer stimuli, or fewer samples of "
            "each, into one file"
        )
    header = _nibabel().Nifti1Header()
    header.set_data_dtype(np.float32)
    header.set_data_shape(shape)
    header.set_sform(voxels.affine, code="scanner")
    header.set_zooms((*np.linalg.norm(voxels.affine[:3, :3], axis=0), *[1.0] * (len(shape) - 3)))
    header.set_xyzt_units(xyz="mm")
    header.set_slope_inter(1, 0)
    return header


def _places(voxels: Voxels) -> tuple[Int[np.ndarray, "v"], Int[np.ndarray, "v"], Int[np.ndarray, "v"]]:
    unknown = [name for name in ("ijk", "volume_shape", "affine") if getattr(voxels, name) is None]
    if unknown:
        raise InputError(
            f"the voxels of {voxels.subject} have no place in a volume ({', '.join(unknown)} unknown), which NIfTI "
            "needs. Prepare the data set with voxel_ijk, volume_shape and affine, and train on that."
        )
    if len(np.unique(voxels.ijk, axis=0)) < len(voxels.ijk):
        raise InputError(
            f"the voxels of {voxels.subject}: two of them have the same voxel_ijk, and a volume cannot hold both; "
            "prepare the data set with the right voxel_ijk"
        )
    return tuple(voxels.ijk.T)


def _nibabel() -> Any:
    try:
        import nibabel
    except ImportError as error:
        raise InputError("NIfTI files need the package nibabel; pip install 'synbrain-jax[nsd]'") from error
    return nibabel
