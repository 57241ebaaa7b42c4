"""The Natural Scenes Dataset, four people, one model: the subjects with all 40 sessions, as in `nsd_subj01`.

Reproduces: nothing yet. No parameter depends on the number of voxels, so one BrainVAE and one mapper learn from all;
each batch is of one person, in a seeded schedule. Each gets a bundle, with the same models and their own voxels and
correction: WORKDIR/nsd-subj01/bundle and so on, with a report beside it.
Command: python train.py nsd_multisubject --data.source nsd --data.tokens tokens --workdir runs/nsd_multisubject
Hardware: one 80 GB accelerator, bfloat16. Disk: 41 GB of records and 55 GB of targets in the workdir. Host memory: as
for one person, for each is evaluated by itself. All computed, not measured, as is the time: twice the steps of
`nsd_subj01` are about two hours at 300 TFLOP/s.
Expected: not measured. How well one mapper without knowledge of the person can serve four brains is an open question:
the latents of a picture are only as alike as BrainVAE makes them. Compare with `nsd_subj01`.
"""

from synbrain_jax.config import Config, DataConfig, OptimizerConfig, Stage1Config, Stage2Config
from synbrain_jax.models.brain_vae import BrainVAEConfig
from synbrain_jax.models.semantic_to_neural import MapperConfig

config = Config(
    name="nsd_multisubject",
    data=DataConfig(builder="nsd", subjects=(1, 2, 5, 7), normalisation="session_zscore"),
    brain_vae=BrainVAEConfig(),
    mapper=MapperConfig(),
    stage1=Stage1Config(
        steps=33_750,
        batch_size=24,
        optimizer=OptimizerConfig(learning_rate=1e-4, weight_decay=0.05),
        average_share=0.5,
        eval_every=2250,
    ),
    stage2=Stage2Config(
        steps=100_000,
        batch_size=24,
        optimizer=OptimizerConfig(learning_rate=1e-4, clip_norm=1.0, ema_decay=0.9999),
        eval_every=5000,
    ),
    precision="auto",
)
