"""Command lines: `synbrain VERB`, and what `train.py` takes."""

import contextlib
import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro
from tyro.conf import arg, subcommand

from synbrain_jax.config import Config, nearest
from synbrain_jax.errors import InputError, NonFiniteLoss
from synbrain_jax.files import read_array, read_npz, write_npy, write_npz
from synbrain_jax.synthesis import Variability, load_pretrained

# ---- synbrain ------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    """The `synbrain` command."""
    verbs = {"prepare": prepare, "synthesize": synthesize, "evaluate": evaluate, "report": report}
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
    normalisation: Literal["none", "run_zscore"] = "none",
    validation_runs: tuple[int, ...] = (),
    test_runs: tuple[int, ...] = (),
    permute: Literal["none", "trial"] = "none",
) -> Callable[[], os.PathLike]:
    """Your own experiment.

    Args:
        source: An .npz file, or a folder of .npy files: fmri, tokens, stimulus_id, run, ...
        data_dir: Folder for prepared data sets.
        name: Name of this one.
        normalisation: "run_zscore" z-scores each voxel within each run.
        validation_runs: Runs held out for validation.
        test_runs: Runs held out for the test.
        permute: "trial" permutes the stimulus labels of the training trials, as a control.
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
    )


_Prepare = (
    Annotated[Callable, subcommand("haxby2001", constructor=_haxby2001)]
    | Annotated[Callable, subcommand("arrays", constructor=_arrays)]
)


def prepare(data: Annotated[_Prepare, arg(name="")]) -> None:
    """Write a data set as the records that training reads, and print its folder."""
    print(data())


def synthesize(
    model: Path,
    tokens: Path,
    out: Path,
    k: int = 1,
    variability: Variability = "none",
    noise_factor: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
) -> None:
    """Synthesise fMRI from tokens.

    Writes `fmri` [rows of tokens, k, voxels] float32. An .npz also gets `stimulus_id` if the tokens had them, and
    `voxel_ijk` if the voxels' positions are known.

    Args:
        model: Bundle folder of a trained system.
        tokens: .npy [stimuli, tokens, width], or .npz with `tokens` and optionally the rows' `tokens_stimulus_id` (or
            `stimulus_id`).
        out: .npz or .npy file to write.
        k: Samples per stimulus.
        variability: What the samples vary by; "none" repeats the expected response.
        noise_factor: Multiplies the latent noise.
        seed: Of the samples.
        batch_size: Stimuli per call of the compiled function.
    """
    if out.suffix not in (".npz", ".npy"):
        raise InputError(f"--out {out}: expected a name that ends in .npz or .npy")
    given = read_npz(tokens) if tokens.suffix == ".npz" else {"tokens": read_array(tokens)}
    if "tokens" not in given:
        raise InputError(f"{tokens}: no array 'tokens'; it holds {', '.join(given) or 'nothing'}")
    names = given.get("tokens_stimulus_id", given.get("stimulus_id"))
    if names is not None and names.shape != given["tokens"].shape[:1]:
        raise InputError(
            f"{tokens}: {len(given['tokens'])} rows of tokens but {names.size} stimulus ids; expected equal"
        )
    system = load_pretrained(model)
    fmri = system.synthesize(
        given["tokens"],
        jax.random.key(seed),
        k=k,
        variability=variability,
        noise_factor=noise_factor,
        batch_size=batch_size,
    )
    if out.suffix == ".npy":
        write_npy(out, fmri)
    else:
        ijk = system.bundle.voxels.ijk
        known = {"stimulus_id": names, "voxel_ijk": ijk}
        write_npz(out, {"fmri": fmri, **{name: value for name, value in known.items() if value is not None}})
    print(f"{out}: {fmri.shape[0]} stimuli x {fmri.shape[1]} samples x {fmri.shape[2]} voxels")


def evaluate(model: Path, data: Path, out: Path, split: str = "test", shift_tokens: int = 0) -> None:
    """Score a trained system beside its baselines on a prepared data set.

    Prints the table, and writes report.json and predictions.npz.

    Args:
        model: Bundle folder of a trained system.
        data: Prepared data set folder.
        out: Folder for the results.
        split: Split to score; the baselines learn from "train".
        shift_tokens: Control: stimulus i gets the tokens of stimulus i + this.
    """
    from synbrain_jax.data.pairs import open_dataset
    from synbrain_jax.evaluation import write_evaluation
    from synbrain_jax.report import format_table

    print(format_table(write_evaluation(load_pretrained(model), open_dataset(data), out, split, shift_tokens)))


def report(workdir: tyro.conf.Positional[Path]) -> None:
    """Draw the figures and tables of a finished run again.

    Args:
        workdir: Folder that train.py wrote.
    """
    from synbrain_jax.report import write_report

    print(write_report(workdir))


# ---- train.py ------------------------------------------------------------------------------------


def run_settings(arguments: list[str], folder: Path) -> tuple[Config, Path]:
    """Configuration and workdir of `train.py NAME [--workdir DIR] [--section.field value ...]`; `folder` holds NAME.py.

    Raises InputError for an unknown NAME; unknown or misspelt options end the program with a suggestion.
    """
    known = sorted(path.stem for path in folder.glob("*.py"))
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: train.py NAME [options]\n\nNAME is one of: {', '.join(known)}\nOptions: train.py NAME --help")
        raise SystemExit(0)
    name = arguments[0]
    if name not in known:
        raise InputError(f"{name!r} is not an experiment in {folder.name}/{nearest(name, known)}")
    spec = importlib.util.spec_from_file_location(f"configs.{name}", folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def settings(config: Annotated[Config, arg(name="")] = module.config, workdir: Path = Path("runs") / name):
        return config, workdir

    return tyro.cli(settings, args=arguments[1:], prog=f"train.py {name}", description=module.__doc__)


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Ends the program with one line on stderr: exit code 2 for wrong input, 1 for a diverged loss, 130 for Ctrl-C."""
    try:
        yield
    except InputError as error:
        code, message = 2, f"error: {error}"
    except NonFiniteLoss as error:
        code, message = 1, f"error: {error}"
    except KeyboardInterrupt:
        code, message = 130, "stopped. The same command goes on from the last checkpoint."
    else:
        return
    print(message, file=sys.stderr)
    raise SystemExit(code)
