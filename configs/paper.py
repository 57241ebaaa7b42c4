"""The released SynBrain system, bug for bug, on your arrays of one subject (NSD: raw int16 betas, CLIP bigG tokens).

Reproduces: models, losses, optimisation and stop rule of the release (arXiv 2508.10298), for 27,000 trials and more
than one device or one; docs/released_system.md has the list, and where it differs from what we would do (`default`).
An epoch is 27,000 / 24 = 1,125 steps: give a field `split` with all training pictures, or set --stage1.eval-every.
Command: python train.py paper --data.source subject1.npz --workdir runs/subject1
Hardware: one 80 GB accelerator. Time and score were not measured with this package.
"""

from synbrain_jax.config import Config, DataConfig, OptimizerConfig, Stage1Config, Stage2Config
from synbrain_jax.models.brain_vae import BrainVAEConfig
from synbrain_jax.models.semantic_to_neural import MapperConfig

config = Config(
    name="paper",
    seed=1024,
    data=DataConfig(builder="arrays", normalisation="scale2000", voxel_order="given"),
    brain_vae=BrainVAEConfig.paper(),
    mapper=MapperConfig.paper(),
    stage1=Stage1Config(
        steps=16_875,
        batch_size=24,
        optimizer=OptimizerConfig(learning_rate=1e-4, weight_decay=0.05),
        kl_weight=0.001,
        clip_weight=1000.0,
        loss_scale="sum",
        contrast_size=12,
        eval_every=1125,
        stop_below=350.0,
        select="last",
    ),
    stage2=Stage2Config(
        steps=50_000,
        batch_size=24,
        optimizer=OptimizerConfig(learning_rate=1e-4, clip_norm=1.0, ema_decay=0.9999),
        target="trial",
        eval_every=2500,
        select="last",
    ),
    calibrate=False,
)
