"""The Natural Scenes Dataset, one person: the released models, trained as we would (`default`), on NSD's own files.

Reproduces: nothing yet. Subject 1 has 9,000 pictures of their own, of which a tenth is validation, and 1,000 shared
ones, which are the test; --data.subjects 2 (or 5, 7) takes another person, --data.sessions 1 the first scan session
alone, --data.stimuli 250 the paper's hour of data.
Command: python train.py nsd_subj01 --data.source nsd --data.tokens tokens --workdir runs/nsd_subj01
Hardware: one 80 GB accelerator, bfloat16. Disk: 10.4 GB of records and 13.8 GB of targets in the workdir. Host memory:
about 4 GB for training, 13 GB while the baselines are fitted. All computed, not measured, as is the time: stages 1 and
2 are 4.8e17 and 5.1e17 floating-point operations, about half an hour each at 300 TFLOP/s.
Expected: not measured.
"""

from synbrain_jax.config import Config, DataConfig, OptimizerConfig, Stage1Config, Stage2Config
from synbrain_jax.models.brain_vae import BrainVAEConfig
from synbrain_jax.models.semantic_to_neural import MapperConfig

config = Config(
    name="nsd_subj01",
    data=DataConfig(builder="nsd", subjects=(1,), normalisation="session_zscore"),
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
