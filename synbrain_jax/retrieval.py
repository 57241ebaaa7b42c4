"""How well decoded tokens tell which picture was seen: retrieval among a pool, and two-way identification.

Apart from `decoding.py`, because whatever has `decode` can be scored, a decoder of other weights too.

Shape letters: n trials, s pictures, t tokens, d token width, f = t x d token values.
"""

import dataclasses

import numpy as np
import scipy.stats
from jaxtyping import Float, Int

from synbrain_jax import metrics
from synbrain_jax.decoding import Decoder, Examples, rows_about
from synbrain_jax.errors import InputError

POOL = 300  # pictures among which the paper retrieves


@dataclasses.dataclass(frozen=True, eq=False)
class Retrieval:
    """Per picture, so that intervals over pictures can be drawn: chance that it is told from the others of a pool."""

    image: Float[np.ndarray, "s"]  # of all pictures in the pool, the one seen is most like what was decoded
    brain: Float[np.ndarray, "s"]  # of all that was decoded in the pool, its own is most like the picture
    two_way: Float[np.ndarray, "s"]  # what was decoded is more like the picture seen than like another one
    pool: int  # pictures among which is retrieved; chance is 1 / pool, and 0.5 for two_way


def retrieval(
    decoded: Float[np.ndarray, "s t d"],
    tokens: Float[np.ndarray, "s t d"],
    origin: Float[np.ndarray, "t d"],
    pool: int = POOL,
) -> Retrieval:
    """Retrieval by cosine about `origin`, as by the release (which has none: zeros give its numbers).

    The release draws pools of 300 out of more pictures again and again; here is the mean over all possible pools, in
    closed form: of s - 1 others k are at least as similar as the picture itself, and a pool has none of them with the
    probability of a hypergeometric distribution. So a tie is no retrieval; in two_way it counts half.

    Args:
        decoded: what was decoded for each picture.
        origin: what is subtracted from all tokens; the mean tokens of the decoder's training, without which pictures
          near the mean are retrieved too often.
        pool: pictures in a pool, or all where there are fewer.

    Raises:
        InputError: fewer than two pictures.
    """
    if len(tokens) < 2 or len(decoded) != len(tokens):
        raise InputError(
            f"{len(decoded)} decoded and {len(tokens)} true sets of tokens; retrieval needs as many of both, at least 2"
        )
    decoded, true = (_unit(rows_about(values, origin)) for values in (decoded, tokens))
    similarity = decoded @ true.T
    own = np.diagonal(similarity)
    pool = min(pool, len(tokens))

    def hits(rivals: Int[np.ndarray, "s"]) -> Float[np.ndarray, "s"]:
        return scipy.stats.hypergeom.pmf(0, len(tokens) - 1, rivals, pool - 1)

    less, equal = similarity < own[:, None], similarity == own[:, None]
    return Retrieval(
        image=hits((similarity >= own[:, None]).sum(axis=1) - 1),
        brain=hits((similarity >= own).sum(axis=0) - 1),
        two_way=(less.sum(axis=1) + 0.5 * (equal.sum(axis=1) - 1)) / (len(tokens) - 1),
        pool=pool,
    )


def retrieval_of_means(
    decoder: Decoder, trials: Examples, origin: Float[np.ndarray, "t d"], pool: int = POOL
) -> Retrieval:
    """`retrieval` where each picture's trials are averaged before they are decoded. Every picture needs a trial."""
    return retrieval(decoder.decode(metrics.group_means(trials.fmri, trials.stimulus)), trials.tokens, origin, pool)


def retrieval_of_trials(
    decoder: Decoder, trials: Examples, origin: Float[np.ndarray, "t d"], pool: int = POOL
) -> Retrieval:
    """Mean `retrieval` of single trials: the first of every picture, then the second, as far as all have one."""
    rows = metrics.group_rows(trials.stimulus)
    decoded = decoder.decode(trials.fmri)
    rounds = [
        retrieval(decoded[[own[r] for own in rows]], trials.tokens, origin, pool) for r in range(min(map(len, rows)))
    ]
    means = {name: np.mean([getattr(one, name) for one in rounds], axis=0) for name in ("image", "brain", "two_way")}
    return Retrieval(**means, pool=rounds[0].pool)


def _unit(rows: Float[np.ndarray, "n f"]) -> Float[np.ndarray, "n f"]:
    rows = rows.astype(np.float64)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, length, out=np.zeros_like(rows), where=length > 0)
