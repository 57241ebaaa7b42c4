"""The released SynBrain models and optimisation, on your arrays of one subject (NSD: betas / 2000, CLIP bigG tokens).

Reproduces: the architecture, losses, batch size, learning rates, weight averaging and one-trial-per-step targets of
the release (arXiv 2508.10298). It runs for the full 15 epochs of 27,000 trials and selects by validation, where the
release stops at a training loss, and contrasts 24 samples where the release contrasts 12 on each of 2 GPUs.
Command: python train.py paper --data.source subject1.npz --workdir runs/subject1
Hardware: one 80 GB accelerator. Time and score were not measured with this package.
"""

from synbrain_jax.config import Config, DataConfig, OptimizerConfig, Stage1Config, Stage2Config
from synbrain_jax.models.brain_vae import BrainVAEConfig
from synbrain_jax.models.semantic_to_neural import MapperConfig

config = Config(
    name="paper",
    seed=1024,
    data=DataConfig(builder="arrays", voxel_order="given"),
    brain_vae=BrainVAEConfig.paper(),
    mapper=MapperConfig.paper(),
    stage1=Stage1Config(
        steps=16_875,
        batch_size=24,
        optimizer=OptimizerConfig(learning_rate=1e-4, weight_decay=0.05),
        kl_weight=0.001,
        clip_weight=1000.0,
        loss_scale="sum",
        eval_every=1125,
    ),
    stage2=Stage2Config(
        steps=50_001,
        batch_size=24,
        optimizer=OptimizerConfig(learning_rate=1e-4, clip_norm=1.0, ema_decay=0.9999),
        target="trial",
        eval_every=2500,
    ),
    calibrate=False,
)
