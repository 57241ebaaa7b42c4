"""The story of one run: python train.py NAME [--workdir DIR] [--section.field value ...]; NAME is a file in configs/.

Started again with the same workdir, it goes on where it was.
"""

import shlex
import sys
import time
from pathlib import Path

import jax

from synbrain_jax import distributed, run, stages
from synbrain_jax.checkpoint import check_workdir, claim_workdir
from synbrain_jax.cli import keep_compiled, plain_errors, run_settings
from synbrain_jax.data import open_data
from synbrain_jax.data.pairs import load_trials
from synbrain_jax.evaluation import write_evaluation
from synbrain_jax.report import write_report
from synbrain_jax.run_files import machine, write_facts
from synbrain_jax.sharding import make_mesh
from synbrain_jax.training import check_batch_sizes


def main(arguments: list[str]) -> None:
    config, workdir = run_settings(arguments, Path(__file__).parent / "configs")
    started = time.monotonic()

    # --- Workdir and devices -----------------------------------------------------------------------------------------
    check_workdir(workdir, config)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    check_batch_sizes(config, mesh)

    # --- Data: one data set for each subject, mostly one -------------------------------------------------------------
    with distributed.first_then_others():
        datasets = open_data(config.data, workdir / "data")
    sized = config.for_tokens(datasets[0].token_shape).for_platform(jax.default_backend())
    stages.check_starts(sized)
    claim_workdir(workdir, config)
    config = sized
    validation = [load_trials(dataset, "validation") for dataset in datasets]
    subjects = list(zip(datasets, stages.folders(workdir, datasets), strict=True))

    # --- Stage 1, BrainVAE; stage 2, the mapper; and how far predictions of unseen trials are off --------------------
    trained = run.train(config, datasets, validation, mesh, workdir)

    # --- The rest is the work of one process, on its own devices -----------------------------------------------------
    if not distributed.is_first():
        return
    for number, (dataset, home) in enumerate(subjects):
        # --- Bundle: everything that synthesis needs, with the distribution of real trials around the prediction -----
        model = run.export(config, trained, number, dataset, validation[number], mesh.local_mesh, home)

        # --- Evaluation, beside baselines and noise ceiling ----------------------------------------------------------
        shift = config.data.shift_test_tokens
        write_evaluation(model, dataset, home, shift_tokens=shift, residuals=run.residuals_of(home))
        write_facts(home, f"python train.py {shlex.join(arguments)}", time.monotonic() - started, config.seed)
        print(write_report(home))
    reports = " ".join(f"{home}/report.md" for _, home in subjects)
    print(f"{time.monotonic() - started:.0f} s on {machine()}. Tables and figures: {reports}")


if __name__ == "__main__":
    keep_compiled()
    with plain_errors(), distributed.sigterm_stops():
        main(sys.argv[1:])
