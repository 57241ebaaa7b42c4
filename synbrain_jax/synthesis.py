"""From a picture's tokens to fMRI: mapper, decoder and their correction as one jitted, batched, sharded call.

Shape letters: s stimuli, b batch, t tokens, d token width, k samples, v voxels.
"""

import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray

from synbrain_jax.checkpoint import Bundle, load_bundle
from synbrain_jax.data.tokens import StoredTokens
from synbrain_jax.errors import InputError
from synbrain_jax.models.brain_vae import BrainVAE
from synbrain_jax.models.semantic_to_neural import SemanticToNeural
from synbrain_jax.sharding import batch_parts, batch_sharding, make_mesh, on_mesh, replicated
from synbrain_jax.variability import deviations

Variability = Literal["none", "calibrated", "posterior", "latent_noise"]

_Element = TypeVar("_Element")

# Standard deviations of the latent [t d]; or of the voxels, the `Spread`'s factor [v r] and independent variance [v].
Noise = Array | np.ndarray | tuple[Array | np.ndarray, Array | np.ndarray]


class SynBrain:
    """A trained system: `synthesize(tokens)` gives voxels. Made by `load_pretrained`."""

    def __init__(self, bundle: Bundle, mesh: Mesh | None = None):
        self.bundle = bundle
        self.mesh = make_mesh() if mesh is None else mesh
        self._params = jax.device_put(bundle.params, replicated(self.mesh))
        self._decode = jit_decoder(bundle, self.mesh)

    @property
    def token_shape(self) -> tuple[int, int]:
        """Tokens per stimulus and their width."""
        return self.bundle.config.mapper.tokens, self.bundle.config.mapper.width

    def synthesize(
        self,
        tokens: Float[np.ndarray, "s t d"] | Float[Array, "s t d"] | StoredTokens,
        key: PRNGKeyArray | None = None,
        *,
        k: int = 1,
        variability: Variability = "none",
        noise_factor: float = 1.0,
        batch_size: int = 32,
        first: int = 0,
    ) -> Float[np.ndarray, "s k v"]:
        """Synthetic responses, float32, in the units and voxel order of the data set the system was trained on.

        Args:
            tokens: one set of tokens per stimulus, as in training. Those on the devices are not copied to the host, and
                those on disk are read batch by batch.
            key: needed unless `variability` is "none". Sample j of stimulus i depends on the key, i and j only: not on
                k, nor on how stimuli are batched.
            k: samples per stimulus.
            variability: "none", the expected response, k times; "calibrated", the expected response plus noise of the
                covariance that real trials have around it (the bundle's `Spread`); "posterior", the latent drawn with
                the spread of BrainVAE's posterior averaged over training trials; "latent_noise", the latent plus
                standard normal noise (SynBrain, section 3.4). The last two are the model's spread and not that of real
                trials, which is many times larger.
            noise_factor: multiplies the noise; what is calibrated is so at 1.
            batch_size: stimuli per call of the compiled function, rounded up to a multiple of the devices. Every batch
                is padded to it, so that one program serves any number of stimuli.
            first: number of the first stimulus, for those who hand over many stimuli in parts.

        Raises:
            InputError: tokens of another shape than the model's, or values that are not finite; no key; "posterior"
                or "calibrated" for a bundle without that spread.
        """
        xp = jnp if isinstance(tokens, jax.Array) else np
        if not isinstance(tokens, StoredTokens):
            tokens = tokens.astype(np.float32) if xp is jnp else np.asarray(tokens, np.float32)
        self.check_shape(tokens)
        # What was stored was finite.
        if not isinstance(tokens, StoredTokens) and (bad := int(xp.count_nonzero(~xp.isfinite(tokens)))):
            raise InputError(f"tokens hold {bad} values that are NaN or infinite")
        sampler = self.sampler(key, k=k, variability=variability, noise_factor=noise_factor, batch_size=batch_size)
        parts = (tokens[start : start + sampler.rows] for start in range(0, len(tokens), sampler.rows))
        out, done = np.empty((len(tokens), *sampler.sample_shape), np.float32), 0
        for count, voxels in sampler.responses(parts, first):
            out[done : done + count] = np.asarray(voxels)[:count]
            done += count
        return out

    def sampler(
        self,
        key: PRNGKeyArray | None = None,
        *,
        k: int = 1,
        variability: Variability = "none",
        noise_factor: float = 1.0,
        batch_size: int = 32,
    ) -> "Sampler":
        """What `synthesize` calls for each batch; arguments and errors are its."""
        if variability not in get_args(Variability):
            raise InputError(f"variability is {variability!r}; expected one of {', '.join(get_args(Variability))}")
        if variability != "none" and key is None:
            raise InputError(f"variability {variability!r} draws random numbers: give a key, e.g. jax.random.key(0)")
        if variability == "posterior" and self.bundle.latent_std is None:
            raise InputError(
                "this bundle does not know the spread of BrainVAE's posterior over its training trials (it was made "
                "from the release's weights); use 'latent_noise' or 'none'"
            )
        if variability == "calibrated" and self.bundle.spread is None:
            raise InputError(
                "this bundle does not know how real trials vary around its predictions (its variability.folds was 0, "
                "too few trials were held out, or it is older): learn it with `synbrain calibrate`, or use "
                "'posterior', 'latent_noise' or 'none'"
            )
        if k < 1 or batch_size < 1:
            raise InputError(f"k is {k} and batch_size {batch_size}; both must be at least 1")
        noise = jax.device_put(self._noise(variability, np.float32(noise_factor)), replicated(self.mesh))
        key = jax.random.key(0) if key is None else key
        call = functools.partial(self._decode, self._params, key=key, noise=noise, k=k, varied=variability != "none")
        parts = batch_parts(self.mesh)
        return Sampler(call, -(-batch_size // parts) * parts, (k, len(self.bundle.offset)), self.mesh)

    def check_shape(self, tokens: np.ndarray | Array | StoredTokens) -> None:
        """Raises InputError unless `tokens` are [stimuli, *token_shape]."""
        if tokens.ndim != 3 or tokens.shape[1:] != self.token_shape:
            expected = f"[stimuli, {self.token_shape[0]}, {self.token_shape[1]}]"
            raise InputError(f"tokens have shape {list(tokens.shape)}; this model expects {expected}")

    @functools.cached_property
    def digest(self) -> str:
        """Changes with anything in the bundle that synthesis depends on. Reads every parameter."""
        bundle, config = self.bundle, self.bundle.config
        spread = None if bundle.spread is None else (bundle.spread.factor, bundle.spread.independent)
        arrays = (bundle.params, bundle.voxels.order, bundle.latent_std, bundle.offset, bundle.gain, spread)
        digest = hashlib.sha256(repr((config.mapper, config.brain_vae, config.data.voxel_order)).encode())
        for path, leaf in jax.tree.leaves_with_path(arrays):
            digest.update(f"{jax.tree_util.keystr(path)} {np.shape(leaf)}".encode())
            digest.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8))
        return digest.hexdigest()

    def _noise(self, variability: Variability, times: np.float32) -> Noise:
        if variability == "calibrated":
            spread = self.bundle.spread
            return times * spread.factor, times**2 * spread.independent
        std = {"none": 0.0, "posterior": self.bundle.latent_std, "latent_noise": 1.0}[variability]
        return np.broadcast_to(times * np.asarray(std, np.float32), self.token_shape)

    def predict(
        self, tokens: Float[np.ndarray, "s t d"] | Float[Array, "s t d"] | StoredTokens, batch_size: int = 32
    ) -> Float[np.ndarray, "s v"]:
        """The expected response to each stimulus: `synthesize` without variability."""
        return self.synthesize(tokens, batch_size=batch_size)[:, 0]


class Sampler:
    """Synthesis with its settings: a call sends a batch to the devices, and does not wait for what they make of it."""

    def __init__(self, call: Callable[..., Array], rows: int, sample_shape: tuple[int, int], mesh: Mesh):
        self._call, self._mesh = call, mesh
        self.rows = rows  # stimuli per call at most, a multiple of the devices
        self.sample_shape = sample_shape  # k, v

    def __call__(self, tokens: Float[np.ndarray, "n t d"] | Float[Array, "n t d"], first: int) -> Float[Array, "b k v"]:
        """Responses, on their way to the host; b is `rows`, and rows behind n are padding. `first`: number of row 0."""
        xp = jnp if isinstance(tokens, jax.Array) else np
        padded = xp.pad(tokens.astype(np.float32, copy=False), ((0, self.rows - len(tokens)), (0, 0), (0, 0)))
        index = np.arange(first, first + self.rows, dtype=np.int32)
        index, padded = jax.device_put((index, padded), batch_sharding(self._mesh))
        voxels = self._call(padded, index)
        voxels.copy_to_host_async()
        return voxels

    def responses(
        self, parts: Iterable[np.ndarray | Array], first: int = 0
    ) -> Iterator[tuple[int, Float[Array, "b k v"]]]:
        """Of batches of tokens, each as for a call: how many stimuli each has, and its responses.

        Those of one batch are handed out when the next one has been sent to the devices.
        """

        def sent():
            number = first
            for part in parts:
                yield len(part), self(part, number)
                number += len(part)

        return one_ahead(sent())


def one_ahead(elements: Iterator[_Element]) -> Iterator[_Element]:
    """Yields each element when the next one has been made: what that sends to the devices, they do meanwhile."""
    waiting = next(elements, None)
    while waiting is not None:
        coming = next(elements, None)
        yield waiting
        waiting = coming


def jit_decoder(bundle: Bundle, mesh: Mesh) -> Callable[..., Float[Array, "b k v"]]:
    """The compiled function over `mesh`: of parameters, tokens, stimulus numbers, key and noise; k and varied fixed.

    Of the bundle's parameters nothing is used.
    """
    return jax.jit(
        on_mesh(functools.partial(_decode_batch, bundle), mesh),
        static_argnames=("k", "varied"),
        out_shardings=batch_sharding(mesh),
    )


def load_pretrained(path: str | os.PathLike, mesh: Mesh | None = None) -> SynBrain:
    """The trained system in a bundle folder, on `mesh` (default: all devices). Raises InputError for anything else."""
    return SynBrain(load_bundle(path), mesh)


def _decode_batch(
    bundle: Bundle,
    params: dict,
    tokens: Float[Array, "b t d"],
    index: Int[Array, " b"],
    key: PRNGKeyArray,
    noise: Noise,
    *,
    k: int,
    varied: bool,
) -> Float[Array, "b k v"]:
    config = bundle.config
    mapper, brain_vae = SemanticToNeural(config.mapper), BrainVAE(config.brain_vae)
    mean = mapper.apply({"params": params["mapper"]}, tokens, method="predict_latent")
    inverse = np.argsort(model_order(bundle.config.data.voxel_order, bundle.voxels.order))
    offset, gain = jnp.asarray(bundle.offset), bundle.gain

    def decode(latent):
        pattern = brain_vae.apply({"params": params["brain_vae"]}, latent, len(offset), method="decode")
        return pattern[:, inverse]

    decoded = decode(mean)
    expected = offset[None] + gain * decoded
    if not varied:
        return jnp.repeat(expected[:, None], k, axis=1)

    def sample(j):
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(key, i), j))(index)
        if isinstance(noise, tuple):
            return expected + jax.vmap(functools.partial(deviations, *noise))(keys)
        normal = jax.vmap(lambda one: jax.random.normal(one, noise.shape))(keys)
        # The gain corrects the expected response; deviations from it are the decoder's own.
        return expected + decode(mean + noise[None] * normal) - decoded

    return jax.lax.map(sample, jnp.arange(k)).swapaxes(0, 1)


def model_order(voxel_order: str, order: Int[np.ndarray, " v"]) -> Int[np.ndarray, " v"]:
    """The permutation that takes the data set's voxels to the model's: `order` for "hilbert", none for "given"."""
    return order if voxel_order == "hilbert" else np.arange(len(order), dtype=np.int32)
