"""The smallest models, configuration and data set that still have every part."""

import json
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from synbrain_jax.checkpoint import abstract_params
from synbrain_jax.config import Config, OptimizerConfig, Stage1Config, Stage2Config
from synbrain_jax.models.brain_vae import BrainVAEConfig
from synbrain_jax.models.semantic_to_neural import MapperConfig
from synbrain_jax.sharding import make_mesh

TOKENS, WIDTH, VOXELS = 4, 8, 40
MESHES = {
    "1": (1, 1, 1),
    "data 8": (8, 1, 1),
    "fsdp 8": (1, 8, 1),
    "2 x 2 x 2": (2, 2, 2),
    "data 4 x fsdp 2": (4, 2, 1),
    "data 4 x tensor 2": (4, 1, 2),
}
TRAIN_TRIALS = (3, 4, 5, 3, 4, 5, 2, 6, 4)  # of each stimulus


def config(**changes) -> Config:
    settings = dict(
        name="tiny",
        brain_vae=BrainVAEConfig.small(
            pool_length=32,
            channels=4,
            channel_mult=(2,),
            latent_tokens=TOKENS,
            latent_dim=WIDTH,
            projector_width=16,
        ),
        mapper=MapperConfig.small(tokens=TOKENS, width=WIDTH, depth=1),
        stage1=Stage1Config(steps=4, batch_size=8, eval_every=2, optimizer=OptimizerConfig(learning_rate=2e-3)),
        stage2=Stage2Config(steps=4, batch_size=8, eval_every=2, optimizer=OptimizerConfig(learning_rate=2e-3)),
        log_every=1,
    )
    return Config(**{**settings, **changes})


def random_params(config: Config, seed: int = 0) -> dict:
    """Parameters of both models in which nothing is at its initial zero."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        kind = path[-1].key
        spread = np.prod(leaf.shape[:-1]) ** -0.5 if kind == "kernel" else 0.2
        return ((kind == "scale") + spread * rng.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree.map_with_path(draw, abstract_params(config))


def write_experiment(
    file: Path, token_count: int = TOKENS, columns: int = 8, trials: tuple[int, ...] = TRAIN_TRIALS, seed: int = 0
) -> None:
    """An .npz for `prepare_arrays`: 9 stimuli, noisy linear responses of 5 x 8 voxels, unequal numbers of trials."""
    rng, stimuli, voxels = np.random.default_rng(seed), len(trials), 5 * columns
    tokens = rng.normal(size=(stimuli, token_count, WIDTH)).astype(np.float32)
    weights = rng.normal(size=(token_count * WIDTH, voxels)) / np.sqrt(token_count * WIDTH)
    stimulus = np.concatenate([np.repeat(np.arange(stimuli), n) for n in (trials, 2, 1)])
    split = np.repeat(["train", "validation", "test"], [sum(trials), 2 * stimuli, stimuli])
    noise = rng.normal(size=(len(stimulus), voxels))
    np.savez(
        file,
        fmri=((tokens.reshape(stimuli, -1) @ weights)[stimulus] + 0.5 * noise).astype(np.float32),
        tokens=tokens[stimulus],
        stimulus_id=stimulus,
        run=np.arange(len(stimulus)) % 4,
        split=split,
        voxel_ijk=np.stack(np.unravel_index(rng.permutation(voxels), (5, columns)), 1),
    )


def mesh_of(name: str) -> Mesh:
    return make_mesh(*MESHES[name], devices=jax.devices()[: np.prod(MESHES[name])])


def log_of(folder: Path) -> list[dict]:
    """The lines that a stage logged."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
