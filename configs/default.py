"""The released models as we would train them, on your arrays of one subject with many pictures and voxels.

Reproduces: nothing yet. Every difference from `paper`, with its reason, is in docs/released_system.md.
Command: python train.py default --data.source subject1.npz --workdir runs/subject1
Hardware: one 80 GB accelerator. Time and score were not measured.
"""

from synbrain_jax.config import Config, DataConfig, OptimizerConfig, Stage1Config, Stage2Config
from synbrain_jax.models.brain_vae import BrainVAEConfig
from synbrain_jax.models.semantic_to_neural import MapperConfig

config = Config(
    name="default",
    data=DataConfig(builder="arrays", normalisation="run_zscore"),
    brain_vae=BrainVAEConfig(),
    mapper=MapperConfig(),
    stage1=Stage1Config(
        steps=16_875,
        batch_size=24,
        optimizer=OptimizerConfig(learning_rate=1e-4, weight_decay=0.05),
        average_share=0.5,
        eval_every=1125,
    ),
    stage2=Stage2Config(
        steps=50_000,
        batch_size=24,
        optimizer=OptimizerConfig(learning_rate=1e-4, clip_norm=1.0, ema_decay=0.9999),
        eval_every=2500,
    ),
    precision="auto",
)
