"""Command lines: `synbrain VERB`, and what `train.py` takes."""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import logging
import os
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro
from tyro.conf import arg, subcommand

from synbrain_jax.config import Config, nearest
from synbrain_jax.data.simulated_brain import Simulation
from synbrain_jax.distributed import Processes, leave, start
from synbrain_jax.errors import InputError, NonFiniteLoss, NotStored, Stopped
from synbrain_jax.files import read_array, read_npz, read_text, write_bytes, write_npy, write_npz
from synbrain_jax.synthesis import Variability, load_pretrained

# ---- synbrain ------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    """The `synbrain` command."""
    verbs = {
        "prepare": prepare,
        "encode-images": encode_images,
        "synthesize": synthesize,
        "evaluate": evaluate,
        "report": report,
        "convert": convert,
        "simulate": simulate,
        "plan": plan,
    }
    with plain_errors():
        tyro.extras.subcommand_cli_from_dict(verbs, prog="synbrain", args=arguments)


def _haxby2001(data_dir: Path, permute: Literal["none", "trial"] = "none") -> Callable[[], os.PathLike]:
    """The packaged slice of Haxby et al. (2001).

    Args:
        data_dir: Folder for prepared data sets.
        permute: "trial" permutes the stimulus labels of the training trials, as a control.
    """
    from synbrain_jax.data.haxby import prepare_haxby

    return functools.partial(prepare_haxby, data_dir, permute=permute)


def _arrays(
    source: Path,
    data_dir: Path,
    name: str = "arrays",
    normalisation: Literal["none", "run_zscore", "scale2000"] = "none",
    validation_runs: tuple[int, ...] = (),
    test_runs: tuple[int, ...] = (),
    permute: Literal["none", "trial"] = "none",
    tokens: Path | None = None,
) -> Callable[[], os.PathLike]:
    """Your own experiment.

    Args:
        source: An .npz file, or a folder of .npy files: fmri, tokens, stimulus_id, run, ...
        data_dir: Folder for prepared data sets.
        name: Name of this one.
        normalisation: "run_zscore" z-scores each voxel within each run; "scale2000" divides by 2000.
        validation_runs: Runs held out for validation.
        test_runs: Runs held out for the test.
        permute: "trial" permutes the stimulus labels of the training trials, as a control.
        tokens: Folder that `encode-images` wrote, in place of the arrays tokens and tokens_stimulus_id.
    """
    from synbrain_jax.data.arrays import prepare_arrays

    return functools.partial(
        prepare_arrays,
        source,
        data_dir,
        name=name,
        normalisation=normalisation,
        validation_runs=validation_runs,
        test_runs=test_runs,
        permute=permute,
        tokens=tokens,
    )


def _nsd(
    root: Path,
    subject: int,
    data_dir: Path | None = None,
    tokens: Path | None = None,
    normalisation: Literal["session_zscore", "scale2000", "none"] = "session_zscore",
    test: Literal["shared", "test515"] = "shared",
    validation_share: float = 0.1,
    betas: str = "betas_fithrf_GLMdenoise_RR",
    permute: Literal["none", "trial"] = "none",
    seed: int = 0,
    show: Annotated[bool, arg(name="list")] = False,
    download: bool = False,
) -> Callable[[], os.PathLike | str]:
    """A subject of the Natural Scenes Dataset, from the files that NSD publishes. Given again after a stop, it goes on.

    Args:
        root: Folder with NSD's own layout: nsddata, nsddata_betas.
        subject: 1 to 8.
        data_dir: Folder for prepared data sets.
        tokens: Folder that `encode-images` wrote from nsd_stimuli.hdf5.
        normalisation: "session_zscore" z-scores each voxel within each session; "scale2000" divides what the files hold
            by 2000, as the SynBrain release does; "none" is percent signal change.
        test: "shared" tests on the 1,000 pictures that were meant for all subjects; "test515" on the 515 that all saw
            three times, and validates on the other shared ones.
        validation_share: Of the pictures that are not shared.
        betas: Version of the betas.
        permute: "trial" permutes the stimulus labels of the training trials, as a control.
        seed: Of the validation pictures and of the permutation.
        show: Print the files in NSD's bucket that this subject needs, and stop.
        download: Fetch those files into `root`, and stop. NSD asks you to agree to its terms first.
    """
    if show or download:
        from synbrain_jax.data import nsd_download

        return functools.partial(nsd_download.show if show else nsd_download.download, root, subject, betas=betas)
    if data_dir is None or tokens is None:
        raise InputError("--data-dir and --tokens: both are needed, except with --list or --download")
    from synbrain_jax.data.nsd import prepare_nsd

    return functools.partial(
        prepare_nsd,
        root,
        subject,
        data_dir,
        tokens=tokens,
        normalisation=normalisation,
        test=test,
        validation_share=validation_share,
        betas=betas,
        seed=seed,
        permute=permute,
    )


_Prepare = (
    Annotated[Callable, subcommand("haxby2001", constructor=_haxby2001)]
    | Annotated[Callable, subcommand("arrays", constructor=_arrays)]
    | Annotated[Callable, subcommand("nsd", constructor=_nsd)]
)


def prepare(data: Annotated[_Prepare, arg(name="")]) -> None:
    """Write a data set as the records that training reads, and print its folder."""
    print(data())


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

    Writes `fmri` [stimuli, k, voxels] float32. An .npz also gets `stimulus_id`, the pictures' names or what the tokens
    had, `voxel_ijk` if the voxels' positions are known, and `unreadable` [pictures, 2], names and reasons, if some
    pictures could not be read; these have no row.

    Args:
        model: Bundle folder of a trained system.
        out: .npz or .npy file to write.
        tokens: .npy [stimuli, tokens, width], or .npz with `tokens` and optionally the rows' `tokens_stimulus_id` (or
            `stimulus_id`), or a folder that `encode-images` wrote.
        images: Folder of pictures, .txt list of files, .hdf5 file with imgBrick, or TFDS folder.
        clip: CLIP weights: an open_clip checkpoint, a Hugging Face folder, or ORG/NAME in Hugging Face's hub.
        k: Samples per stimulus.
        variability: What the samples vary by; "none" repeats the expected response.
        noise_factor: Multiplies the latent noise.
        seed: Of the samples.
        batch_size: Stimuli per call of the compiled function.
        nifti: .nii.gz or .nii file to write, too: volumes in the person's own space, where a brain viewer shows them.
            Along the fourth axis come the samples of the first stimulus, then those of the second, and so on.
    """
    if out.suffix not in (".npz", ".npy"):
        raise InputError(f"--out {out}: expected a name that ends in .npz or .npy")
    if (tokens is None) == (images is None) or (images is None) != (clip is None):
        raise InputError("expected either --tokens, or --images and --clip")
    draw = dict(k=k, variability=variability, noise_factor=noise_factor, batch_size=batch_size)
    key, unreadable = jax.random.key(seed), {}
    if images is None:
        names, given = _read_tokens(tokens)
        system = _load_system(model, nifti)
        fmri = system.synthesize(given, key, **draw)
    else:
        from synbrain_jax.encoding import synthesize_pictures

        pictures, encoder = options.open(images, clip)
        system = _load_system(model, nifti, encoder.mesh)
        result = synthesize_pictures(system, encoder, pictures, key, **draw)
        unreadable = result.unreadable
        listed = (
            f" All will be in the array 'unreadable' of {out}." if out.suffix == ".npz" and len(result.fmri) else ""
        )
        _report_unreadable(unreadable, len(pictures), listed)
        if unreadable and out.suffix == ".npy":
            raise InputError(
                f"--out {out}: an .npy cannot say which pictures have no row; give a name that ends in .npz"
            )
        names, fmri = np.array(result.stimulus_id), result.fmri
    if out.suffix == ".npy":
        write_npy(out, fmri)
    else:
        known = {"stimulus_id": names, "voxel_ijk": system.bundle.voxels.ijk}
        known["unreadable"] = np.array(list(unreadable.items())) if unreadable else None
        write_npz(out, {"fmri": fmri, **{name: value for name, value in known.items() if value is not None}})
    if nifti is not None:
        from synbrain_jax.interop.nifti import save_nifti

        order = f"volume {k} i + j: stimulus i, sample j (from 0)"
        save_nifti(nifti, fmri.reshape(-1, fmri.shape[-1]), system.bundle.voxels, description=order)
        print(f"{nifti}: {fmri.shape[0] * k} volumes")
    print(f"{out}: {fmri.shape[0]} stimuli x {fmri.shape[1]} samples x {fmri.shape[2]} voxels")


def _load_system(model: Path, nifti: Path | None, mesh: jax.sharding.Mesh | None = None):
    """The trained system; InputError if its voxels cannot be written as `nifti`."""
    system = load_pretrained(model, mesh)
    if nifti is not None:
        from synbrain_jax.interop.nifti import check_nifti

        check_nifti(nifti, system.bundle.voxels)
    return system


def _read_tokens(source: Path) -> tuple[np.ndarray | None, Any]:
    """Names of the stimuli, if known, and tokens; those of a folder are read when they are sliced."""
    if source.is_dir():
        from synbrain_jax.data.tokens import open_tokens

        stored = open_tokens(source)
        return np.array(stored.stimulus_id), stored.tokens
    given = read_npz(source) if source.suffix == ".npz" else {"tokens": read_array(source)}
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


def report(workdir: tyro.conf.Positional[Path]) -> None:
    """Draw the figures and tables of a finished run again.

    Args:
        workdir: Folder that train.py wrote.
    """
    from synbrain_jax.report import write_report

    print(write_report(workdir))


def _from_torch(
    brain_vae: Path,
    mapper: Path,
    out: Path,
    weights: Literal["ema", "raw"] = "ema",
    heads: int | None = None,
    voxels: int | None = None,
    data: Path | None = None,
) -> Callable[[], str]:
    """The PyTorch release's checkpoints to a bundle.

    Args:
        brain_vae: Stage 1, last.pth (or a .safetensors file).
        mapper: Stage 2, last.pt (or a .safetensors file).
        out: Bundle folder to write.
        weights: "ema" takes the moving average of the mapper's weights, as the release does; "raw" the weights.
        heads: Attention heads of the mapper, if the checkpoint does not say.
        voxels: Number of voxels of the brain, if the checkpoint does not say or says it wrong.
        data: Prepared data set of that brain, instead of `voxels`: the bundle then knows where its voxels are.
    """
    from synbrain_jax.checkpoint import save_bundle
    from synbrain_jax.interop.torch_weights import bundle_from_released

    def run() -> str:
        options = {"averaged": weights == "ema", "heads": heads, "voxels": voxels}
        if data is not None and voxels is not None:
            raise InputError("--data and --voxels both say which brain it is; give one of them")
        if data is not None:
            from synbrain_jax.data.pairs import open_dataset

            dataset = open_dataset(data)
            options |= {"voxels": dataset.voxels, "dataset": dataset.name}
        bundle = bundle_from_released(brain_vae, mapper, **options)
        save_bundle(out, bundle)
        return f"{out}: a bundle for {len(bundle.offset)} voxels; use it as --model {out}"

    return run


def _to_torch(model: Path, out: Path) -> Callable[[], str]:
    """A bundle to PyTorch state dicts, as brain_vae.safetensors and mapper.safetensors.

    Args:
        model: Bundle folder of a trained system.
        out: Folder for the two files.
    """
    import safetensors.numpy

    from synbrain_jax.checkpoint import load_bundle
    from synbrain_jax.interop.torch_weights import released_from_bundle

    def run() -> str:
        for name, state_dict in released_from_bundle(load_bundle(model)).items():
            write_bytes(out / f"{name}.safetensors", safetensors.numpy.save(state_dict))
        return f"{out}: brain_vae.safetensors, mapper.safetensors"

    return run


_Convert = (
    Annotated[Callable, subcommand("from-torch", constructor=_from_torch)]
    | Annotated[Callable, subcommand("to-torch", constructor=_to_torch)]
)


def convert(direction: Annotated[_Convert, arg(name="")]) -> None:
    """Exchange weights with the PyTorch release. PyTorch is not needed."""
    print(direction())


def simulate(
    layout: tyro.conf.Positional[Literal["nsd"]], out: Path, settings: Annotated[Simulation, arg(name="")]
) -> None:
    """Simulate an experiment with a known truth, to learn the commands or to test a model.

    Args:
        layout: "nsd": files, units and indices as in the Natural Scenes Dataset.
        out: New folder for it.
    """
    from synbrain_jax.data.simulate import simulate_nsd, statement

    print(statement(simulate_nsd(out, **dataclasses.asdict(settings))))


def plan(
    config: tyro.conf.Positional[Path],
    topology: str,
    change: tuple[str, ...] = (),
    voxels: int = 15_724,
    samples: int = 32,
    programs: tuple[Literal["stage1", "stage2", "synthesis", "encoding"], ...] = (
        "stage1",
        "stage2",
        "synthesis",
        "encoding",
    ),
) -> None:
    """Say whether a run fits a TPU slice or GPUs, and how long it takes at the least, without having them.

    Compiles the steps of both stages, synthesis and image encoding for that machine (minutes for each), and prints what
    each chip holds, computes and sends. Needs XLA's compiler for it: the extra tpu or cuda12.

    Args:
        config: Name of a file in configs/, path of such a file, or a run's config.json.
        topology: v5e:2x4, v5p:4x4x4, h100:8, ...
        change: Settings to change, as stage1.batch_size=1024 mesh.tensor=2 brain_vae.remat=true.
        voxels: Of the brain; hardly matters.
        samples: Pictures at once in synthesis and encoding, on all chips together.
        programs: What to compile.
    """
    from synbrain_jax import plan as planning

    jax.config.update("jax_platforms", "cpu")  # or it would look for the devices that it compiles for
    settings = _changed(_config(config), change)
    print(planning.plan(settings, topology, voxels=voxels, samples=samples, programs=programs))


def _config(where: Path) -> Config:
    """That of a name, an experiment's file, or a run's config.json."""
    if where.suffix == ".json":
        return Config.from_json(read_text(where))
    path = where if where.suffix == ".py" else Path("configs") / f"{where}.py"
    if not path.is_file():
        known = sorted(found.stem for found in path.parent.glob("*.py"))
        raise InputError(f"{where}: there is no experiment {path}{nearest(path.stem, known) if known else ''}")
    return _experiment(path).config


def _changed(config: Config, changes: Sequence[str]) -> Config:
    """`config` with settings such as "stage1.batch_size=1024"; values as in JSON, or plain text."""
    tree = json.loads(config.to_json())
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals:
            raise InputError(f"--change {change}: expected a setting and a value, as in stage1.batch_size=1024")
        *parents, last = name.split(".")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        try:
            place[last] = json.loads(value)
        except json.JSONDecodeError:
            place[last] = value
    return Config.from_json(json.dumps(tree))


# ---- train.py ------------------------------------------------------------------------------------


_ONE_PROCESS = Processes()


def run_settings(arguments: list[str], folder: Path) -> tuple[Config, Path]:
    """Configuration and workdir of `train.py NAME [--workdir DIR] [--section.field value ...]`; `folder` holds NAME.py.

    Joins the other processes, where `--distributed` says that there are any. Raises InputError for an unknown NAME, or
    if they are not found; unknown or misspelt options end the program with a suggestion.
    """
    known = sorted(path.stem for path in folder.glob("*.py"))
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: train.py NAME [options]\n\nNAME is one of: {', '.join(known)}\nOptions: train.py NAME --help")
        raise SystemExit(0)
    name = arguments[0]
    if name not in known:
        raise InputError(f"{name!r} is not an experiment in {folder.name}/{nearest(name, known)}")
    module = _experiment(folder / f"{name}.py")

    def settings(
        config: Annotated[Config, arg(name="")] = module.config,
        workdir: Path = Path("runs") / name,
        processes: Annotated[Processes, arg(name="")] = _ONE_PROCESS,
    ):
        return config, workdir, processes

    *result, processes = tyro.cli(settings, args=arguments[1:], prog=f"train.py {name}", description=module.__doc__)
    start(processes)
    return tuple(result)


def _experiment(path: Path) -> types.ModuleType:
    """The module of a file in configs/."""
    spec = importlib.util.spec_from_file_location(f"configs.{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Ends the program with one line on stderr: exit code 2 for wrong input, 1 for a diverged loss, a full disk or
    another process that is gone, 0 for SIGTERM, 130 for Ctrl-C."""
    with _quiet_threads():
        hurry = False
        try:
            yield
        except InputError as error:
            code, message = 2, f"error: {error}"
        except (NonFiniteLoss, OSError) as error:
            code, message, hurry = 1, f"error: {error}", isinstance(error, NotStored)
        except Exception as error:
            if not jax.distributed.is_initialized():
                raise
            if not isinstance(error, jax.errors.JaxRuntimeError):
                traceback.print_exc()
            first = (str(error).splitlines() or [type(error).__name__])[0]
            code = 1
            message = (
                f"error: {first}. Did another process of this run end first? The same commands go on with the run."
            )
        except Stopped as stop:
            code, message = 0, str(stop)
        except KeyboardInterrupt:
            code, message = 130, "stopped. The same command goes on from the last checkpoint."
        else:
            return
        print(message, file=sys.stderr)
        leave(code, hurry)


@contextlib.contextmanager
def _quiet_threads() -> Iterator[None]:
    """Hides what the threads of Orbax and TensorStore print, at length, of errors that they raise as well."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels, hook = [logger.level for logger in loggers], sys.unraisablehook

    def unraisable(error):
        if str(error.exc_value) != "Event loop is closed":
            hook(error)

    sys.unraisablehook = unraisable
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
