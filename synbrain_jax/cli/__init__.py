"""Command lines: `synbrain VERB`, and what `train.py` takes."""

import tyro

from synbrain_jax.cli.adapt import adapt
from synbrain_jax.cli.compiled import keep_compiled
from synbrain_jax.cli.convert import convert
from synbrain_jax.cli.ending import plain_errors
from synbrain_jax.cli.experiments import plan, run_settings
from synbrain_jax.cli.prepare import prepare, simulate
from synbrain_jax.cli.studies import experiment, report
from synbrain_jax.cli.systems import calibrate, encode_images, evaluate, synthesize

__all__ = ["keep_compiled", "main", "plain_errors", "run_settings"]


def main(arguments: list[str] | None = None) -> None:
    """The `synbrain` command."""
    verbs = {
        "prepare": prepare,
        "encode-images": encode_images,
        "synthesize": synthesize,
        "evaluate": evaluate,
        "calibrate": calibrate,
        "experiment": experiment,
        "report": report,
        "adapt": adapt,
        "convert": convert,
        "simulate": simulate,
        "plan": plan,
    }
    keep_compiled()
    with plain_errors():
        tyro.extras.subcommand_cli_from_dict(verbs, prog="synbrain", args=arguments)
