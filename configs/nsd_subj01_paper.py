"""The Natural Scenes Dataset, one person, as SynBrain was released, bug for bug (`paper`), on NSD's own files.

Reproduces: models, losses, optimisation, stop rule, scale of the betas and order of the voxels of the release (arXiv
2508.10298). Of the 9,000 training pictures 90 are validation, because a run always validates; nothing is chosen by it.
Command: python train.py nsd_subj01_paper --data.source nsd --data.tokens tokens --workdir runs/nsd_subj01_paper
Hardware: one 80 GB accelerator, float32. Disk: 10.4 GB of records. Host memory: about 4 GB for training, 13 GB while
the baselines are fitted. All computed, not measured, as is the time: stages 1 and 2 are 4.8e17 and 7.0e17 floating-
point operations, about 3 hours together at 100 TFLOP/s; the stop rule may end stage 1 early.
Expected: not measured with this package. The paper's scores are against single trials and on its own scale.
"""

from synbrain_jax.config import Config, DataConfig, OptimizerConfig, Stage1Config, Stage2Config
from synbrain_jax.models.brain_vae import BrainVAEConfig
from synbrain_jax.models.semantic_to_neural import MapperConfig

config = Config(
    name="nsd_subj01_paper",
    seed=1024,
    data=DataConfig(
        builder="nsd", subjects=(1,), normalisation="scale2000", voxel_order="given", validation_share=0.01
    ),
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
