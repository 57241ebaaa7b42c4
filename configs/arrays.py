"""Your own experiment, from arrays: fmri [n, v], tokens [n, t, d], stimulus_id [n], run [n] in an .npz or .npy files.

Reproduces: nothing; the same small models and settings as `haxby`, sized to your tokens. For many thousand voxels
and pictures start from `paper`.
Command: python train.py arrays --data.source my_experiment.npz --workdir runs/mine
Hardware: for a few hundred voxels, 2 CPU cores and 4 GiB for about two minutes.
"""

from synbrain_jax.config import Config, DataConfig, OptimizerConfig, Stage1Config, Stage2Config
from synbrain_jax.models.brain_vae import BrainVAEConfig
from synbrain_jax.models.semantic_to_neural import MapperConfig

config = Config(
    name="arrays",
    data=DataConfig(builder="arrays"),
    brain_vae=BrainVAEConfig.small(latent_tokens=0, latent_dim=0),
    mapper=MapperConfig.small(tokens=0, width=0),
    stage1=Stage1Config(
        steps=400,
        optimizer=OptimizerConfig(learning_rate=2e-3, schedule="cosine", weight_decay=0.05),
        average_share=0.5,
        eval_every=50,
    ),
    stage2=Stage2Config(
        steps=1500,
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="cosine", clip_norm=1.0, ema_decay=0.99),
        eval_every=250,
    ),
    log_every=50,
)
