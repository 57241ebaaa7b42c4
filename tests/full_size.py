"""One step of each stage of the paper preset and one synthesis at full size, batch 1; prints figures as JSON."""

import dataclasses
import json
import resource
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from synbrain_jax.checkpoint import Bundle
from synbrain_jax.cli import run_settings
from synbrain_jax.data.voxels import Voxels
from synbrain_jax.models.brain_vae import BrainVAE
from synbrain_jax.models.semantic_to_neural import SemanticToNeural
from synbrain_jax.stages import brain_vae_loss, mapper_loss
from synbrain_jax.synthesis import SynBrain
from synbrain_jax.training import init_state, make_optimizer, make_train_step

VOXELS = 15_724


def one_step(init, loss, settings, frozen, batch):
    """Terms of the first step and the state after it."""
    optimizer, decay = make_optimizer(settings.optimizer, settings.steps), settings.optimizer.ema_decay
    state = jax.jit(lambda key: init_state(init, optimizer, decay is not None, key))(jax.random.key(0))
    step = jax.jit(make_train_step(loss, optimizer, decay), donate_argnums=0)
    state, terms = step(state, frozen, batch, jax.random.key(1))
    return {name: float(value) for name, value in terms.items()}, state


def size(params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def main() -> dict:
    config, _ = run_settings(["paper"], Path(__file__).parents[1] / "configs")
    # One sample has nothing to be contrasted with.
    stage1 = dataclasses.replace(config.stage1, batch_size=1, contrast_size=1)
    stage2 = dataclasses.replace(config.stage2, batch_size=1)
    vae, mapper = BrainVAE(config.brain_vae), SemanticToNeural(config.mapper)
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.normal(size=(1, config.mapper.tokens, config.mapper.width)), jnp.float32)
    batch = {"fmri": jnp.asarray(rng.normal(0, 0.3, (1, VOXELS)), jnp.float32), "tokens": tokens}

    terms1, state = one_step(
        lambda key: vae.init(key, jnp.zeros((1, 8)))["params"], brain_vae_loss(vae, stage1), stage1, {}, batch
    )
    brain_vae = state.params
    del state  # the moments
    latent = jax.jit(lambda params, fmri: vae.apply({"params": params}, fmri, method="encode").mean)
    target = latent(brain_vae, batch["fmri"])
    terms2, state = one_step(
        lambda key: mapper.init(key, tokens)["params"], mapper_loss(mapper, vae, stage2), stage2, brain_vae, batch
    )
    result = state.result
    del state
    order = np.arange(VOXELS, dtype=np.int32)
    voxels = Voxels("s", "scale2000", ijk=None, volume_shape=None, affine=None, ncsnr=None, order=order)
    bundle = Bundle.uncorrected(config, {"brain_vae": brain_vae, "mapper": result}, voxels, "none", None)
    pattern = SynBrain(bundle).predict(np.asarray(tokens), batch_size=1)
    return {
        "parameters": [size(brain_vae), size(result)],
        "stage1": terms1,
        "stage2": terms2,
        "mean_square_latent": float(jnp.square(target).mean()),
        "pattern": [list(pattern.shape), bool(np.isfinite(pattern).all()), float(pattern.std())],
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


if __name__ == "__main__":
    json.dump(main(), sys.stdout)
