"""The whole way from the Natural Scenes Dataset's files to a score, on a laptop: simulated brains with a known truth.

Reproduces: nothing measured in people. It shows the commands of `nsd_subj01`, and how close the model comes to what can
be known, which only a simulation tells.
Commands: synbrain simulate nsd --out sim
          python train.py nsd_sim --data.source sim --data.tokens sim/tokens --workdir runs/nsd_sim
Hardware: 2 CPU cores (AMD EPYC), 4 GiB; 134 s with --variability.folds 0, several minutes with the 3 of this file.
Expected, seed 0, median voxel r as a share of the noise ceiling: .877 (ridge .791, kernel ridge .951, mean_pattern 0).
Chosen on the validation pictures alone, where the mean voxel r is .564 (ridge .521, kernel ridge .614, the true
response .671): without the voxel term in stage 2 and with 1,500 steps it is .552, with ten times the weight .554. Most
of what is lost is lost by BrainVAE, which gives the true responses back with .597.
"""

from synbrain_jax.config import Config, DataConfig, OptimizerConfig, Stage1Config, Stage2Config, VariabilityConfig
from synbrain_jax.models.brain_vae import BrainVAEConfig
from synbrain_jax.models.semantic_to_neural import MapperConfig

config = Config(
    name="nsd_sim",
    data=DataConfig(builder="nsd", normalisation="session_zscore"),
    brain_vae=BrainVAEConfig.small(),
    mapper=MapperConfig.small(depth=3),
    stage1=Stage1Config(
        steps=500,
        batch_size=24,
        optimizer=OptimizerConfig(learning_rate=2e-3, schedule="cosine", weight_decay=0.05),
        average_share=0.5,
        eval_every=100,
    ),
    stage2=Stage2Config(
        steps=600,
        batch_size=64,
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="cosine", clip_norm=1.0, ema_decay=0.99),
        voxel_weight=1.0,
        eval_every=100,
        select="val/voxel_r",
    ),
    variability=VariabilityConfig(folds=3),
    log_every=50,
)
