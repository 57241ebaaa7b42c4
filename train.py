"""The story of one run: python train.py NAME [--workdir DIR] [--section.field value ...]; NAME is a file in configs/.

Started again with the same workdir, it goes on where it was.
"""

import sys
import time
from pathlib import Path

from synbrain_jax import stages
from synbrain_jax.checkpoint import Bundle, check_workdir, claim_workdir, save_bundle
from synbrain_jax.cli import plain_errors, run_settings
from synbrain_jax.data import prepare_data
from synbrain_jax.data.pairs import load_trials, open_dataset
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

    # --- Data --------------------------------------------------------------------------------------------------------
    dataset = open_dataset(prepare_data(config.data, workdir / "data"))
    sized = config.for_tokens(dataset.token_shape)
    stages.check_starts(sized)
    claim_workdir(workdir, config)
    config = sized
    train, validation = load_trials(dataset, "train"), load_trials(dataset, "validation")

    # --- Stage 1: BrainVAE -------------------------------------------------------------------------------------------
    brain_vae = fit(stages.stage1(config, dataset, validation), config, mesh, workdir / "stage1")

    # --- Stage 2: the mapper, against the frozen BrainVAE's latents --------------------------------------------------
    targets, latent_std = stages.encode_stimuli(config, dataset, brain_vae, workdir / "stage2")
    stage2 = stages.stage2(config, dataset, validation, brain_vae, targets)
    mapper = fit(stage2, config, mesh, workdir / "stage2")

    # --- Bundle: everything that synthesis needs ---------------------------------------------------------------------
    params = {"brain_vae": brain_vae, "mapper": mapper}
    bundle = Bundle.uncorrected(config, params, dataset.voxels, dataset.name, latent_std)
    if config.calibrate:
        bundle = stages.corrected(bundle, SynBrain(bundle, mesh), train, validation)
    save_bundle(workdir / "bundle", bundle)

    # --- Evaluation, beside baselines and noise ceiling --------------------------------------------------------------
    model = load_pretrained(workdir / "bundle", mesh)
    write_evaluation(model, dataset, workdir, shift_tokens=config.data.shift_test_tokens)
    print(write_report(workdir))
    print(f"{time.monotonic() - started:.0f} s on {machine()}. Tables and figures: {workdir}/report.md")


if __name__ == "__main__":
    with plain_errors():
        main(sys.argv[1:])
