"""The story of one run: python train.py NAME [--workdir DIR] [--section.field value ...]; NAME is a file in configs/.

Started again with the same workdir, it goes on where it was.
"""

import sys
import time
from pathlib import Path

import jax

from synbrain_jax import distributed, stages
from synbrain_jax.checkpoint import Bundle, check_workdir, claim_workdir, save_bundle
from synbrain_jax.cli import plain_errors, run_settings
from synbrain_jax.data import open_data
from synbrain_jax.data.pairs import load_trials
from synbrain_jax.evaluation import write_evaluation
from synbrain_jax.report import machine, write_report
from synbrain_jax.sharding import make_mesh
from synbrain_jax.synthesis import SynBrain, load_pretrained
from synbrain_jax.training import check_batch_sizes, fit


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

    # --- Stage 1: BrainVAE -------------------------------------------------------------------------------------------
    brain_vae = fit(stages.stage1(config, datasets, validation), config, mesh, workdir / "stage1")

    # --- Stage 2: the mapper, against the frozen BrainVAE's latents --------------------------------------------------
    encoded = [stages.encode_stimuli(config, dataset, brain_vae, home / "stage2") for dataset, home in subjects]
    targets, latent_stds = zip(*encoded, strict=True)
    stage2 = stages.stage2(config, datasets, validation, brain_vae, targets)
    mapper = fit(stage2, config, mesh, workdir / "stage2")

    # --- The rest is the work of one process, on its own devices -----------------------------------------------------
    params, mesh = distributed.whole({"brain_vae": brain_vae, "mapper": mapper}), mesh.local_mesh
    if not distributed.is_first():
        return
    for (dataset, home), latent_std, held_out in zip(subjects, latent_stds, validation, strict=True):
        # --- Bundle: everything that synthesis needs -----------------------------------------------------------------
        bundle = Bundle.uncorrected(config, params, dataset.voxels, dataset.name, latent_std)
        if config.calibrate:
            bundle = stages.corrected(bundle, SynBrain(bundle, mesh), load_trials(dataset, "train"), held_out)
        save_bundle(home / "bundle", bundle)

        # --- Evaluation, beside baselines and noise ceiling ----------------------------------------------------------
        model = load_pretrained(home / "bundle", mesh)
        write_evaluation(model, dataset, home, shift_tokens=config.data.shift_test_tokens)
        print(write_report(home))
    reports = " ".join(f"{home}/report.md" for _, home in subjects)
    print(f"{time.monotonic() - started:.0f} s on {machine()}. Tables and figures: {reports}")


if __name__ == "__main__":
    with plain_errors(), distributed.sigterm_stops():
        main(sys.argv[1:])
