"""The user's own experiment: arrays in an .npz file or a folder of .npy files, checked, split and written as records.

    fmri                [n, v] response of each voxel on each trial
    stimulus_id         [n] number or text: which stimulus was shown on the trial
    tokens              [n, t, d] what the image encoder makes of it, or [s, t, d], one row per stimulus, together with
    tokens_stimulus_id  [s] the stimulus of each row; without the axis t, t is 1
    run                 [n] optional number: trials of one run were measured together
    session             [n] optional number of the scan session
    split               [n] optional "train", "validation" or "test"
    voxel_ijk           [v, 3] or [v, 2] optional position of each voxel in the volume
    affine              [4, 4] optional, position to millimetres
    volume_shape        [3] optional

Shape letters: n trials, v voxels, s stimuli, t tokens, d token width.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from jaxtyping import Int

from synbrain_jax.data.array_files import check_finite, pieces, read_fields
from synbrain_jax.data.builder import SPLITS, PairsBuilder, Source, prepare, source_of_trials
from synbrain_jax.data.tokens import StoredTokens, open_tokens
from synbrain_jax.data.voxels import Voxels, hilbert_order
from synbrain_jax.errors import InputError

SPLIT_SHARE = 0.1  # of the stimuli, for validation and again for test, where nothing else says how to split


@dataclasses.dataclass(frozen=True)
class _Field:
    shape: str
    ndim: tuple[int, ...]
    kinds: str  # NumPy dtype kinds
    required: bool = False


Fields = Mapping[str, np.ndarray | StoredTokens]
_NUMBERS, _INTEGERS, _LABELS = "fiu", "iu", "iuU"
_KIND_NAMES = {_NUMBERS: "numbers", _INTEGERS: "integers", _LABELS: "integers or strings", "U": "strings"}
_FIELDS = {
    "fmri": _Field("[n, v]", (2,), _NUMBERS, required=True),
    "stimulus_id": _Field("[n]", (1,), _LABELS, required=True),
    "tokens": _Field("[n or s, t, d] or [n or s, d]", (2, 3), _NUMBERS, required=True),
    "tokens_stimulus_id": _Field("[s]", (1,), _LABELS),
    "run": _Field("[n]", (1,), _INTEGERS),
    "session": _Field("[n]", (1,), _INTEGERS),
    "split": _Field("[n]", (1,), "U"),
    "voxel_ijk": _Field("[v, 3] or [v, 2]", (2,), _INTEGERS),
    "affine": _Field("[4, 4]", (2,), _NUMBERS),
    "volume_shape": _Field("[3]", (1,), _INTEGERS),
}


class Arrays(PairsBuilder, skip_registration=True):
    """One record per stimulus and split, from arrays that were already checked."""

    name = "arrays"

    def __init__(self, *, source: Source, **kwargs: Any):
        self._given = source
        super().__init__(**kwargs)

    def _load(self) -> Source:
        return self._given


def prepare_arrays(
    source: str | os.PathLike,
    data_dir: str | os.PathLike,
    *,
    name: str,
    normalisation: str = "none",
    validation_runs: Sequence[int] = (),
    test_runs: Sequence[int] = (),
    permute: str = "none",
    seed: int = 0,
    tokens: str | os.PathLike | None = None,
) -> epath.Path:
    """Writes the user's arrays under `data_dir` unless they are there, and returns the prepared folder.

    Trials are split by the field `split`; or by runs; or, where neither is given, by stimulus: a tenth of the stimuli
    (at least two) to validation, a tenth to test, chosen by `seed`.

    Args:
        source: an .npz file, or a folder with FIELD.npy (which are memory-mapped) and .npz files. Its name stands
            for the subject.
        name: of the data set among those in `data_dir`.
        normalisation: "none"; "run_zscore" to scale each voxel to mean 0 and variance 1 within each run; "scale2000" to
            divide by 2000, as the SynBrain release does with int16 betas.
        validation_runs, test_runs: runs that are held out; give both or neither.
        permute: "none", or "trial" to permute the stimulus labels among the training trials (a control).
        seed: of the split and of the permutation.
        tokens: a folder that `synbrain encode-images` wrote; its tokens and the pictures' names stand in for the fields
            `tokens` and `tokens_stimulus_id`, which `source` then must not have.

    Raises:
        InputError: a field or an option cannot be used, or `name` already stands for other arrays. Nothing is left in
            `data_dir` then.
    """
    if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII):
        raise InputError(f"name '{name}': expected letters, digits, '_', '-' and '.', as it becomes a folder.")
    if normalisation not in ("none", "run_zscore", "scale2000"):
        raise InputError(f"normalisation '{normalisation}': expected 'none', 'run_zscore' or 'scale2000'.")
    fields = read_fields(source, known=tuple(_FIELDS))
    where = os.fspath(source)
    if tokens is not None:
        fields |= _encoded(where, fields, tokens)
    _check_fields(where, fields)
    fmri = fields["fmri"]
    stimulus_id, stimulus, token_row = _stimuli(where, fields)
    token_rows = fields["tokens"] if fields["tokens"].ndim == 3 else fields["tokens"][:, None, :]
    run = fields.get("run", np.zeros(len(fmri))).astype(np.int32)
    if normalisation == "run_zscore":
        fmri = _RunScaled(where, fmri, run)
    elif normalisation == "scale2000":
        fmri = _Divided(fmri, 2000.0)
    options = {
        "normalisation": normalisation,
        "validation_runs": [int(r) for r in validation_runs],
        "test_runs": [int(r) for r in test_runs],
        "permute": permute,
        "seed": seed,
    }
    given = source_of_trials(
        voxels=_voxels(where, fields, subject=pathlib.Path(source).stem, normalisation=normalisation),
        stimulus_id=stimulus_id,
        tokens_of=lambda index: token_rows[token_row[index]],
        fmri=fmri,
        stimulus=stimulus,
        run=run,
        split=_split(where, fields, stimulus, options),
        session=fields.get("session"),
        permute=permute,
        seed=seed,
        fingerprint=_fingerprint(fields, options),
    )
    config = tfds.core.BuilderConfig(name=name)
    return prepare(Arrays(source=given, data_dir=epath.Path(data_dir).expanduser(), config=config))


def _encoded(where: str, fields: Fields, folder: str | os.PathLike) -> Fields:
    """The fields that say what was shown, from a folder of tokens."""
    twice = sorted(fields.keys() & {"tokens", "tokens_stimulus_id"})
    if twice:
        raise InputError(f"{where}: has a field '{twice[0]}', so do not give the tokens {os.fspath(folder)} too.")
    stored = open_tokens(folder)
    return {"tokens": stored.tokens, "tokens_stimulus_id": np.array(stored.stimulus_id)}


def _check_fields(where: str, fields: Fields) -> None:
    """Checks each array by itself, then the lengths that must agree."""
    for name, field in _FIELDS.items():
        if name not in fields:
            if field.required:
                raise InputError(f"{where}: field '{name}' {field.shape} is missing.")
            continue
        array = fields[name]
        if array.ndim not in field.ndim:
            raise InputError(f"{where}: field '{name}' has shape {array.shape}; expected {field.shape}.")
        if array.dtype.kind not in field.kinds:
            raise InputError(f"{where}: field '{name}' holds {array.dtype}; expected {_KIND_NAMES[field.kinds]}.")
    n, v = fields["fmri"].shape
    for name in ("stimulus_id", "run", "session", "split"):
        if name in fields and len(fields[name]) != n:
            raise InputError(
                f"{where}: field '{name}' has {len(fields[name])} entries, but 'fmri' has {n} trials (rows)."
            )
    rows, what = n, "'fmri' has {} trials (rows); for one row per stimulus add 'tokens_stimulus_id'"
    if "tokens_stimulus_id" in fields:
        rows, what = len(fields["tokens_stimulus_id"]), "'tokens_stimulus_id' has {} entries"
    if len(fields["tokens"]) != rows:
        raise InputError(f"{where}: field 'tokens' has {len(fields['tokens'])} rows, but {what.format(rows)}.")
    for name, shapes in {"voxel_ijk": [(v, 3), (v, 2)], "affine": [(4, 4)], "volume_shape": [(3,)]}.items():
        if name in fields and fields[name].shape not in shapes:
            expected = " or ".join(map(str, shapes))
            raise InputError(f"{where}: field '{name}' has shape {fields[name].shape}; expected {expected}.")
    for name in ("run", "session"):
        if name in fields and not np.array_equal(fields[name].astype(np.int32), fields[name]):
            raise InputError(f"{where}: field '{name}' holds numbers beyond 32 bits; number the {name}s 0, 1, 2, ...")
    for name in ("fmri", "tokens", "affine"):
        if isinstance(fields.get(name), np.ndarray):  # tokens that were stored were finite
            check_finite(where, name, fields[name])


def _stimuli(where: str, fields: Fields) -> tuple[tuple[str, ...], Int[np.ndarray, "n"], Int[np.ndarray, "s"]]:
    """Returns the names of the stimuli, the stimulus of each trial, and the row of `tokens` of each stimulus."""
    tokens, shown = fields["tokens"], fields["stimulus_id"]
    if "tokens_stimulus_id" in fields:
        names = fields["tokens_stimulus_id"].astype(str)
        row_of = {str(name): row for row, name in enumerate(names)}
        if len(row_of) < len(names):
            twice = next(name for row, name in enumerate(names) if row_of[str(name)] != row)
            raise InputError(f"{where}: field 'tokens_stimulus_id' holds '{twice}' twice.")
        unknown = sorted(set(shown.astype(str)) - row_of.keys())
        if unknown:
            listed = ", ".join(map(repr, map(str, unknown[:3])))
            raise InputError(
                f"{where}: field 'tokens_stimulus_id' lacks {len(unknown)} of the stimuli in 'stimulus_id': {listed}"
                + (", ..." if len(unknown) > 3 else ".")
            )
        stimulus = np.array([row_of[name] for name in shown.astype(str)], dtype=np.int32)
        return tuple(row_of), stimulus, np.arange(len(names))
    names, first, stimulus = np.unique(shown, return_index=True, return_inverse=True)
    for start, piece in pieces(tokens):
        same_stimulus = first[stimulus[start : start + len(piece)]]
        differs = (piece != tokens[same_stimulus]).reshape(len(piece), -1).any(axis=1)
        if differs.any():
            row = int(np.argmax(differs))
            raise InputError(
                f"{where}: field 'tokens' differs between trials {same_stimulus[row]} and {start + row}, which show "
                f"the same stimulus '{shown[start + row]}'. Give each stimulus one embedding."
            )
    return tuple(str(name) for name in names), stimulus.astype(np.int32), first


def _split(where: str, fields: Fields, stimulus: Int[np.ndarray, "n"], options: Mapping[str, Any]) -> np.ndarray:
    """Returns "train", "validation" or "test" for each trial; none of the three is empty."""
    held_out = {"validation": options["validation_runs"], "test": options["test_runs"]}
    if "split" in fields:
        if any(held_out.values()):
            raise InputError(f"{where}: has a field 'split', so give neither validation_runs nor test_runs.")
        split = fields["split"].astype(str)
        unknown = sorted(set(split) - set(SPLITS))
        if unknown:
            raise InputError(f"{where}: field 'split' holds '{unknown[0]}'; expected train, validation or test.")
    elif any(held_out.values()):
        split = _split_by_runs(where, fields, held_out)
    else:
        split = _split_by_stimuli(where, stimulus, options["seed"])
    for name in SPLITS:
        shown = len(np.unique(stimulus[split == name]))
        if shown < 2:
            raise InputError(
                f"{where}: split '{name}' has {shown} different stimuli; expected at least 2, or no correlation over "
                "stimuli is defined. Give a field 'split', or other validation_runs and test_runs."
            )
    return split


def _split_by_runs(where: str, fields: Fields, held_out: Mapping[str, list[int]]) -> np.ndarray:
    if "run" not in fields:
        raise InputError(f"{where}: field 'run' [n] is missing, but validation_runs or test_runs are given.")
    run = fields["run"]
    split = np.full(len(run), "train", dtype="<U10")
    for name, runs in held_out.items():
        if not runs:
            raise InputError(f"{name}_runs: empty; give validation_runs and test_runs, or neither.")
        absent = sorted(set(runs) - set(run.tolist()))
        if absent:
            raise InputError(f"{name}_runs: run {absent[0]} does not occur in field 'run' of {where}.")
        split[np.isin(run, runs)] = name
    both = sorted(set(held_out["validation"]) & set(held_out["test"]))
    if both:
        raise InputError(f"run {both[0]}: in validation_runs and in test_runs; validation must never see test trials.")
    return split


def _split_by_stimuli(where: str, stimulus: Int[np.ndarray, "n"], seed: int) -> np.ndarray:
    shown = np.random.default_rng([seed, 0]).permutation(np.unique(stimulus))
    each = max(2, round(SPLIT_SHARE * len(shown)))
    if len(shown) < 6:
        raise InputError(
            f"{where}: field 'stimulus_id' holds {len(shown)} different stimuli, too few to hold some out for "
            "validation and test. Give a field 'split', or validation_runs and test_runs."
        )
    return np.select(
        [np.isin(stimulus, shown[:each]), np.isin(stimulus, shown[each : 2 * each])], ["validation", "test"], "train"
    )


def _voxels(where: str, fields: Fields, *, subject: str, normalisation: str) -> Voxels:
    n_voxels = fields["fmri"].shape[1]
    ijk, shape, affine = (fields.get(name) for name in ("voxel_ijk", "volume_shape", "affine"))
    if ijk is not None:
        ijk = np.pad(ijk, ((0, 0), (0, 3 - ijk.shape[1]))).astype(np.int32)
        shape = ijk.max(axis=0) + 1 if shape is None else shape
        if ((ijk < 0) | (ijk >= shape)).any():
            voxel = int(np.argmax(((ijk < 0) | (ijk >= shape)).any(axis=1)))
            raise InputError(
                f"{where}: field 'voxel_ijk' puts voxel {voxel} at {ijk[voxel].tolist()}, outside the 'volume_shape' "
                f"{shape.tolist()}. Positions count from 0."
            )
        _, first, count = np.unique(ijk, axis=0, return_index=True, return_counts=True)
        if (count > 1).any():
            voxel = int(first[np.argmax(count > 1)])
            raise InputError(
                f"{where}: field 'voxel_ijk' puts {count.max()} voxels at {ijk[voxel].tolist()} (voxel {voxel} is the "
                "first); expected a position of its own for each."
            )
    return Voxels(
        subject=subject,
        normalisation=normalisation,
        ijk=ijk,
        volume_shape=None if shape is None else tuple(int(size) for size in shape),
        affine=None if affine is None else affine.astype(np.float64),
        ncsnr=None,
        order=np.arange(n_voxels, dtype=np.int32) if ijk is None else hilbert_order(ijk),
    )


def _fingerprint(fields: Fields, options: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
    for name in sorted(fields):
        if isinstance(fields[name], StoredTokens):
            digest.update(fields[name].fingerprint.encode())
            continue
        digest.update(f"{name} {fields[name].dtype.str} {fields[name].shape}".encode())
        for _, piece in pieces(fields[name]):
            digest.update(piece.tobytes())
    return digest.hexdigest()


class _Divided:
    """fmri [n, v] divided by a number, computed where it is indexed."""

    def __init__(self, fmri: np.ndarray, by: float):
        self._fmri, self._by = fmri, by

    def __getitem__(self, key: Any) -> np.ndarray:
        return (self._fmri[key].astype(np.float64) / self._by).astype(np.float32)


class _RunScaled:
    """fmri [n, v] with every voxel scaled to mean 0 and variance 1 within each run, computed where it is indexed."""

    def __init__(self, where: str, fmri: np.ndarray, run: Int[np.ndarray, "n"]):
        runs, self._run, counts = np.unique(run, return_inverse=True, return_counts=True)
        if counts.min() < 2:
            raise InputError(
                f"{where}: run {runs[counts.argmin()]} has a single trial, which run_zscore would turn into zeros. "
                "Use normalisation 'none', or leave the run out."
            )
        self._fmri = fmri
        self._mean, variance = np.zeros((2, len(runs), fmri.shape[1]))
        for start, piece in pieces(fmri):
            for r, rows in self._rows_of_runs(start, piece):
                self._mean[r] += rows.sum(axis=0) / counts[r]
        for start, piece in pieces(fmri):  # a second pass: a difference of large sums would lose the variance
            for r, rows in self._rows_of_runs(start, piece):
                variance[r] += ((rows - self._mean[r]) ** 2).sum(axis=0) / counts[r]
        sd = np.sqrt(variance)
        self._sd = np.where(sd > 1e-9 * np.abs(self._mean), sd, np.inf)  # a constant voxel: 0, not its rounding error

    def _rows_of_runs(self, start: int, piece: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        run = self._run[start : start + len(piece)]
        for r in np.unique(run):
            yield r, piece[run == r].astype(np.float64)

    def __getitem__(self, key: Any) -> np.ndarray:
        rows, columns = key if isinstance(key, tuple) else (key, slice(None))
        index = self._run[rows]
        scaled = (self._fmri[rows, columns] - self._mean[:, columns][index]) / self._sd[:, columns][index]
        return scaled.astype(np.float32)
