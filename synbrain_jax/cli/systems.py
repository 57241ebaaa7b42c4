"""`synbrain encode-images`, `synthesize`, `evaluate` and `calibrate`: pictures, trained systems and their scores."""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
from tyro.conf import arg

from synbrain_jax.errors import InputError
from synbrain_jax.files import map_array, read_npz, write_npy, write_npz
from synbrain_jax.synthesis import Variability, load_pretrained


@dataclasses.dataclass(frozen=True)
class _PictureOptions:
    """How pictures become tokens."""

    preprocessing: Literal["released", "hugging_face"] = "released"
    """The release's, which squeezes a picture into a square; or Hugging Face's, which cuts the middle out."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Numbers that the tower computes with: bfloat16 is for GPUs and TPUs, and keeps 3 digits."""
    background: tuple[int, int, int] = (255, 255, 255)
    """Red, green, blue behind transparent pictures."""
    heads: int | None = None
    """The tower's attention heads, for an open_clip checkpoint of unusual width."""
    activation: Literal["gelu", "quick_gelu"] | None = None
    """Of the tower, for an open_clip checkpoint; OpenAI's need quick_gelu."""

    def open(self, images: Path, clip: str):
        """The pictures, and the encoder with its weights."""
        from synbrain_jax.data.pictures import open_pictures
        from synbrain_jax.encoding import load_encoder

        pictures = open_pictures(images, self.background)
        if passed_over := pictures.passed_over:
            what = f"{len(passed_over)} (no pictures by their suffix, or links to folders), e.g. {passed_over[0]}"
            print(f"note: {images}: files passed over: {what}", file=sys.stderr)
        tower = {name: getattr(self, name) for name in ("preprocessing", "dtype", "heads", "activation")}
        return pictures, load_encoder(clip, **tower)


def encode_images(
    images: Path,
    clip: str,
    out: Path,
    batch_size: int = 32,
    options: Annotated[_PictureOptions, arg(name="")] = _PictureOptions(),
) -> None:
    """Turn pictures into CLIP tokens; given again after a stop, it goes on.

    The folder can be given to `prepare arrays` and to `synthesize` as --tokens, and TFDS reads it. Pictures that cannot
    be read are listed in unreadable.txt there, and the rest is encoded.

    Args:
        images: Folder of pictures, .txt list of files, .hdf5 file with imgBrick, or TFDS folder.
        clip: CLIP weights: an open_clip checkpoint, a Hugging Face folder, or ORG/NAME in Hugging Face's hub.
        out: Folder for the tokens.
        batch_size: Pictures per call of the compiled function.
    """
    from synbrain_jax import encoding

    pictures, encoder = options.open(images, clip)
    result = encoding.encode_images(pictures, encoder, out, batch_size=batch_size)
    print(f"{out}: {result.encoded} pictures x {encoder.token_shape[0]} tokens x {encoder.token_shape[1]}")
    _report_unreadable(result.unreadable, len(pictures), f" All are listed in {out / encoding.UNREADABLE_FILE}.")


def _report_unreadable(unreadable: Mapping[str, str], count: int, more: str = "") -> None:
    """Warns of pictures that were left out; ends the program if there was no other."""
    if not unreadable:
        return
    listed = "".join(f"\n  {why}" for why in list(unreadable.values())[:10])
    rest = f"\n  and {len(unreadable) - 10} more" if len(unreadable) > 10 else ""
    kind = "error" if len(unreadable) == count else "warning"
    print(f"{kind}: {len(unreadable)} of {count} pictures could not be read.{more}{listed}{rest}", file=sys.stderr)
    if kind == "error":
        raise SystemExit(1)


def synthesize(
    model: Path,
    out: Path,
    tokens: Path | None = None,
    images: Path | None = None,
    clip: str | None = None,
    k: int = 1,
    variability: Variability = "none",
    noise_factor: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
    nifti: Path | None = None,
    options: Annotated[_PictureOptions, arg(name="")] = _PictureOptions(),
) -> None:
    """Synthesise fMRI, from pictures (--images and --clip) or from their tokens (--tokens).

    Writes `fmri` [stimuli, k, voxels] float32; `stimulus_id`, the pictures' names or what the tokens had; `voxel_ijk`
    if the voxels' positions are known; and `unreadable` [pictures, 2], names and reasons, if some pictures could not be
    read; these have no row. An .npy holds `fmri` alone.

    A folder is for any number of stimuli: fmri.npy and the others as NAME.npy, written while they are computed, in
    memory that does not grow. Given again after a stop, the command goes on; fmri.npy appears when it is whole.

    Args:
        model: Bundle folder of a trained system.
        out: .npz or .npy file to write; or a folder, whose name has no suffix.
        tokens: .npy [stimuli, tokens, width], or .npz with `tokens` and optionally the rows' `tokens_stimulus_id` (or
            `stimulus_id`), or a folder that `encode-images` wrote.
        images: Folder of pictures, .txt list of files, .hdf5 file with imgBrick, or TFDS folder.
        clip: CLIP weights: an open_clip checkpoint, a Hugging Face folder, or ORG/NAME in Hugging Face's hub.
        k: Samples per stimulus.
        variability: What the samples vary by: "calibrated" as real trials do, if the bundle knows how they do; "none"
            repeats the expected response.
        noise_factor: Multiplies the noise; what is calibrated is so at 1.
        seed: Of the samples.
        batch_size: Stimuli per call of the compiled function.
        nifti: .nii.gz or .nii file to write, too: volumes in the person's own space, where a brain viewer shows them.
            Along the fourth axis come the samples of the first stimulus, then those of the second, and so on.
    """
    from synbrain_jax import streaming

    streamed = out.is_dir() or not out.suffix
    if not streamed and out.suffix not in (".npz", ".npy"):
        raise InputError(f"--out {out}: expected a name that ends in .npz or .npy, or, for a folder, has no suffix")
    if streamed and nifti is not None:
        raise InputError(f"--nifti takes responses that fit into memory; give an --out that ends in .npz, not {out}")
    if (tokens is None) == (images is None) or (images is None) != (clip is None):
        raise InputError("expected either --tokens, or --images and --clip")
    draw = dict(k=k, variability=variability, noise_factor=noise_factor, batch_size=batch_size)
    key = jax.random.key(seed)
    if images is None:
        names, given = _read_tokens(tokens)
        system = _load_system(model, nifti)
        if streamed:
            result = streaming.stream_tokens(system, given, out, key, stimulus_id=names, **draw)
        else:
            result = streaming.Responses(names, system.synthesize(given, key, **draw), {})
    else:
        pictures, encoder = options.open(images, clip)
        system = _load_system(model, nifti, encoder.mesh)
        if streamed:
            result = streaming.stream_pictures(system, encoder, pictures, out, key, **draw)
        else:
            result = streaming.synthesize_pictures(system, encoder, pictures, key, **draw)
        where = f"{out / 'unreadable.npy'}" if streamed else f"the array 'unreadable' of {out}"
        listed = f" All will be in {where}." if out.suffix != ".npy" and len(result.fmri) else ""
        _report_unreadable(result.unreadable, len(pictures), listed)
    if not streamed:
        beside = {"stimulus_id": result.stimulus_id, "voxel_ijk": system.bundle.voxels.ijk}
        _write_responses(out, result.fmri, beside, result.unreadable)
    if nifti is not None:
        from synbrain_jax.interop.nifti import save_nifti

        order = f"volume {k} i + j: stimulus i, sample j (from 0)"
        save_nifti(nifti, result.fmri.reshape(-1, result.fmri.shape[-1]), system.bundle.voxels, description=order)
        print(f"{nifti}: {len(result.fmri) * k} volumes")
    print("{}: {} stimuli x {} samples x {} voxels".format(out, *result.fmri.shape))


def _write_responses(out: Path, fmri: np.ndarray, beside: Mapping[str, Any], unreadable: Mapping[str, str]) -> None:
    """One .npz of what is known, or an .npy of the responses alone."""
    if out.suffix == ".npz":
        beside = {**beside, "unreadable": list(unreadable.items()) or None}
        write_npz(out, {"fmri": fmri} | {name: np.asarray(one) for name, one in beside.items() if one is not None})
        return
    if unreadable:
        raise InputError(f"--out {out}: an .npy cannot say which pictures have no row; give a name that ends in .npz")
    write_npy(out, fmri)


def _load_system(model: Path, nifti: Path | None, mesh: jax.sharding.Mesh | None = None):
    """The trained system; InputError if its voxels cannot be written as `nifti`."""
    system = load_pretrained(model, mesh)
    if nifti is not None:
        from synbrain_jax.interop.nifti import check_nifti

        check_nifti(nifti, system.bundle.voxels)
    return system


def _read_tokens(source: Path) -> tuple[np.ndarray | None, Any]:
    """Names of the stimuli, if known, and tokens; those of a folder or an .npy are read when they are sliced."""
    if source.is_dir():
        from synbrain_jax.data.tokens import open_tokens

        stored = open_tokens(source)
        return np.array(stored.stimulus_id), stored.tokens
    given = read_npz(source) if source.suffix == ".npz" else {"tokens": map_array(source)}
    if "tokens" not in given:
        raise InputError(f"{source}: no array 'tokens'; it holds {', '.join(given) or 'nothing'}")
    names = given.get("tokens_stimulus_id", given.get("stimulus_id"))
    if names is not None and names.shape != given["tokens"].shape[:1]:
        raise InputError(
            f"{source}: {len(given['tokens'])} rows of tokens but {names.size} stimulus ids; expected equal"
        )
    return names, given["tokens"]


def evaluate(model: Path, data: Path, out: Path, split: str = "test", shift_tokens: int = 0) -> None:
    """Score a trained system beside its baselines on a prepared data set.

    Prints the table, and writes report.json and predictions.npz.

    Args:
        model: Bundle folder of a trained system.
        data: Prepared data set folder.
        out: Folder for the results.
        split: Split to score; the baselines learn from "train", or as much of it as the model did.
        shift_tokens: Control: stimulus i gets the tokens of stimulus i + this.
    """
    from synbrain_jax.data.pairs import open_dataset
    from synbrain_jax.evaluation import write_evaluation
    from synbrain_jax.report import format_table

    system = load_pretrained(model)
    learned = system.bundle.config.data
    dataset = open_dataset(data).limited(learned.sessions, learned.stimuli)
    print(format_table(write_evaluation(system, dataset, out, split, shift_tokens)))


def calibrate(model: Path, data: Path, out: Path) -> None:
    """Correct a system's predictions, and learn how real trials vary around them, on a prepared data set.

    train.py does so at its end. This is for a system that was converted, or trained before.

    Args:
        model: Bundle folder of a trained system.
        data: Prepared data set folder, of the same brain.
        out: Bundle folder to write.
    """
    from synbrain_jax.checkpoint import save_bundle
    from synbrain_jax.data.pairs import open_dataset
    from synbrain_jax.run import calibrated

    system = load_pretrained(model)
    learned = system.bundle.config.data
    dataset = open_dataset(data).limited(learned.sessions, learned.stimuli)
    save_bundle(out, calibrated(system.bundle, dataset, system.mesh))
    print(f"{out}: corrected, and calibrated on the validation trials of {dataset.name}")
