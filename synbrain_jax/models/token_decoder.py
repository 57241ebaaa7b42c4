"""A small residual network from measured fMRI to the tokens of the picture that was seen.

The shape of MindEye's backbone (Scotti et al. 2023, NeurIPS): one linear layer from voxels to a hidden width, residual
blocks, one linear layer to the tokens; small enough for a few hundred trials. The hidden state runs past the blocks
unchanged, so that what is linear in the voxels need not go through any nonlinearity.

Shape letters: b batch, v voxels, t tokens, d token width.
"""

import dataclasses

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from synbrain_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class TokenDecoderConfig:
    """Architecture. Output is [tokens, width]; the number of voxels is that of the first input."""

    tokens: int
    width: int
    hidden: int = 256
    depth: int = 1
    """Residual blocks."""
    dropout: float = 0.3
    """Share of the hidden state, and of each block's, that training leaves out."""

    def __post_init__(self):
        for field, least in {"tokens": 1, "width": 1, "hidden": 1, "depth": 0}.items():
            if getattr(self, field) < least:
                raise InputError(f"decoder.{field} is {getattr(self, field)}; expected at least {least}")
        if not 0 <= self.dropout < 1:
            raise InputError(f"decoder.dropout is {self.dropout}; expected 0 to below 1")


class TokenDecoder(nn.Module):
    """fMRI to tokens. With `training`, the random stream "dropout" is needed."""

    config: TokenDecoderConfig

    @nn.compact
    def __call__(self, fmri: Float[Array, "b v"], training: bool = False) -> Float[Array, "b t d"]:
        config = self.config

        def dropped(x: Array) -> Array:
            return nn.Dropout(config.dropout, deterministic=not training)(x)

        hidden = dropped(nn.Dense(config.hidden, name="into")(fmri))
        for number in range(config.depth):
            inner = nn.LayerNorm(name=f"norm_{number}")(hidden)
            inner = jax.nn.gelu(nn.Dense(config.hidden, name=f"block_{number}_in")(inner))
            hidden = hidden + nn.Dense(config.hidden, name=f"block_{number}_out")(dropped(inner))
        tokens = nn.Dense(config.tokens * config.width, name="out")(hidden)
        return tokens.reshape(len(fmri), config.tokens, config.width)
