"""Where a data set's voxels lie, how reliable they are, and in which order the models read them.

Shape letters: v voxels, n trials.
"""

import dataclasses
import os
from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float, Int

from synbrain_jax import metrics
from synbrain_jax.errors import InputError
from synbrain_jax.files import read_npz, write_npz

_ROI = "roi:"  # what an array of the file is called that says which voxels a region holds


@dataclasses.dataclass(frozen=True, eq=False)
class Voxels:
    """The voxels of one data set, in the order of its fMRI arrays.

    A model is fed `fmri[:, order]` and its output is put back with `output[:, np.argsort(order)]`.
    """

    subject: str
    normalisation: str
    ijk: Int[np.ndarray, "v 3"] | None  # int32 position in the volume; None if unknown
    volume_shape: tuple[int, int, int] | None
    affine: Float[np.ndarray, "4 4"] | None  # float64, voxel position to millimetres; None if unknown
    ncsnr: Float[np.ndarray, "v"] | None  # float32, of ONE repeat; None if no stimulus repeats
    order: Int[np.ndarray, "v"]  # int32, Hilbert order; the identity if ijk is unknown
    # "atlas/region" -> the voxels in it; regions may overlap
    rois: Mapping[str, Bool[np.ndarray, "v"]] = dataclasses.field(default_factory=dict)

    def save(self, path: str | os.PathLike) -> None:
        """Writes one .npz; a reader sees the old file or the whole new one, never a part."""
        arrays = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "rois"}
        arrays |= {_ROI + name: inside for name, inside in self.rois.items()}
        write_npz(path, {name: np.asarray(value) for name, value in arrays.items() if value is not None})

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Voxels":
        """Reads what `save` wrote.

        Raises:
            InputError: the file is missing or is not a voxel file.
        """
        arrays = read_npz(path)
        missing = {"subject", "normalisation", "order"} - arrays.keys()
        if missing:
            raise InputError(f"{os.fspath(path)}: not a voxel file ({', '.join(sorted(missing))} missing).")
        shape = arrays.get("volume_shape")
        return cls(
            subject=str(arrays["subject"]),
            normalisation=str(arrays["normalisation"]),
            ijk=arrays.get("ijk"),
            volume_shape=None if shape is None else tuple(int(size) for size in shape),
            affine=arrays.get("affine"),
            ncsnr=arrays.get("ncsnr"),
            order=arrays["order"],
            rois={name.removeprefix(_ROI): arrays[name] for name in arrays if name.startswith(_ROI)},
        )

    def select(self, chosen: Int[np.ndarray, "w"] | Bool[np.ndarray, "v"]) -> "Voxels":
        """The chosen voxels, by number in the order given or by a mask; `order` is found anew among them."""
        ijk, ncsnr = (None if values is None else values[chosen] for values in (self.ijk, self.ncsnr))
        order = np.arange(len(self.order[chosen]), dtype=np.int32) if ijk is None else hilbert_order(ijk)
        rois = {name: inside[chosen] for name, inside in self.rois.items()}
        return dataclasses.replace(self, ijk=ijk, ncsnr=ncsnr, order=order, rois=rois)


def hilbert_order(ijk: Int[np.ndarray, "v axes"]) -> Int[np.ndarray, "v"]:
    """Returns the voxels (int32 indices) in the order in which a Hilbert curve visits their positions.

    Neighbours in the result are neighbours in the volume wherever the mask allows it. Axes along which all
    voxels agree are left out, so a slice gets a plane-filling curve. Voxels at the same position keep
    their order. Method: J. Skilling, "Programming the Hilbert curve", AIP Conf. Proc. 707 (2004) 381-387.
    """
    position = ijk.astype(np.int64) - ijk.min(axis=0)
    x = list(position[:, np.ptp(position, axis=0) > 0].T)
    if not x:
        return np.arange(len(ijk), dtype=np.int32)
    planes = [1 << bit for bit in reversed(range(int(position.max()).bit_length()))]
    for q in planes[:-1]:  # undo the rotations, from the coarsest cube down
        for axis in range(len(x)):
            inverted = (x[axis] & q) != 0
            exchanged = np.where(inverted, 0, (x[0] ^ x[axis]) & (q - 1))
            x[0] ^= np.where(inverted, q - 1, exchanged)
            x[axis] ^= exchanged
    for axis in range(1, len(x)):  # Gray code across the axes
        x[axis] ^= x[axis - 1]
    flips = np.zeros_like(x[0])
    for q in planes[:-1]:
        flips ^= np.where(x[-1] & q, q - 1, 0)
    digits = [((coordinate ^ flips) & q) != 0 for q in planes for coordinate in x]
    return np.lexsort(digits[::-1]).astype(np.int32)  # the last key is the most significant; stable


def repeat_ncsnr(
    fmri: Float[np.ndarray, "n v"], stimulus: Int[np.ndarray, "n"], run: Int[np.ndarray, "n"]
) -> Float[np.ndarray, "v"] | None:
    """Noise-ceiling signal-to-noise ratio of one repeat per voxel, float32; None where no stimulus repeats.

    `metrics.repeats` says what a repeat is, `metrics.ncsnr` what the ratio is. Where all runs hold the same stimuli,
    each run's mean over its stimuli is removed first.
    """
    units = metrics.repeats(fmri, stimulus, run)
    if len(np.unique(units.stimulus)) == len(units.stimulus):
        return None
    values = units.fmri.copy()
    run_of_unit = run[[rows[0] for rows in metrics.group_rows(units.of_trial)]]
    members = metrics.group_rows(run_of_unit)
    if len({frozenset(units.stimulus[rows]) for rows in members}) == 1:
        for rows in members:
            values[rows] -= values[rows].mean(axis=0)
    return metrics.ncsnr(values, units.stimulus).astype(np.float32)
