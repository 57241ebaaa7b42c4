"""synbrain_jax: the fMRI response of a person's visual cortex to a picture, synthesised as a distribution.

The models and losses are imported here; data sets, training and evaluation live in their own modules
(`synbrain_jax.data`, `synbrain_jax.training`, `synbrain_jax.evaluation`), which also need TFDS, grain and scikit-learn.
"""

from synbrain_jax import losses, metrics
from synbrain_jax.config import Config, DataConfig, MeshConfig, OptimizerConfig, Stage1Config, Stage2Config
from synbrain_jax.errors import InputError
from synbrain_jax.models.brain_vae import BrainVAE, BrainVAEConfig, BrainVAEOutput, Posterior
from synbrain_jax.models.semantic_to_neural import MapperConfig, SemanticToNeural
from synbrain_jax.sharding import make_mesh
from synbrain_jax.synthesis import SynBrain, load_pretrained

__all__ = [
    "BrainVAE",
    "BrainVAEConfig",
    "BrainVAEOutput",
    "Config",
    "DataConfig",
    "InputError",
    "MapperConfig",
    "MeshConfig",
    "OptimizerConfig",
    "Posterior",
    "SemanticToNeural",
    "Stage1Config",
    "Stage2Config",
    "SynBrain",
    "load_pretrained",
    "losses",
    "make_mesh",
    "metrics",
]
