"""From pictures to the normalised pixels that the CLIP tower takes, as the release makes them and as Hugging Face does.

The release resizes with kornia 0.7.3 (`resize`, bicubic, align_corners, antialias) to the tower's square, whatever the
picture's shape. If a side shrinks, both are first blurred by a Gaussian of sigma (factor - 1) / 2 whose window ends at
2 sigma (borders reflected); then Keys' cubic convolution (1981) with a = -0.75 interpolates between the corners' pixels
(borders repeated). Both steps are linear and act on rows and columns by themselves, so that a matrix for each does
everything. Positions between pixels are computed in float32, as there: in float64 they differ by up to 1e-5.

`released` runs in JAX, one compiled program for each size of picture. `released_on_host` computes the same in NumPy, at
a cost that does not grow with the number of different sizes.

Shape letters: b batch, h w a picture, y x the resized picture, s the tower's square, c channels.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jaxtyping import Array, Float, UInt8

from synbrain_jax.errors import InputError

# Of the pictures that OpenAI trained CLIP on; red, green, blue.
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


@functools.partial(jax.jit, static_argnames="size")
def released(images: UInt8[Array, "b h w 3"] | Float[Array, "b h w 3"], size: int = 224) -> Float[Array, "b s s 3"]:
    """The release's pixels, float32, of 8-bit pictures or of pictures in [0, 1]. The resize's overshoot is kept."""
    return _normalised(resize(_unit(images), (size, size)))


def released_on_host(image: UInt8[np.ndarray, "h w 3"], size: int = 224) -> Float[np.ndarray, "s s 3"]:
    """`released` of one picture, in NumPy."""
    pixels = _unit(image)
    if image.shape[:2] != (size, size):
        rows, columns = _weights(image.shape[:2], (size, size))
        pixels = _times(columns, _times(rows, pixels).swapaxes(0, 1)).swapaxes(0, 1)
    return _normalised(pixels[None])[0]


def resize(images: Float[Array, "b h w c"], size: tuple[int, int]) -> Float[Array, "b y x c"]:
    """kornia's bicubic, antialiased, corner-aligned resize to `size` (rows, columns); the same size: unchanged."""
    if images.shape[1:3] == size:
        return images
    # A matrix for each channel, and channels first: XLA (jax 0.10) cannot compile the plain products for GPUs when they
    # are as large as a batch's.
    weights = (one.toarray() for one in _weights(images.shape[1:3], size))
    rows, columns = (jnp.broadcast_to(one, (images.shape[-1], *one.shape)) for one in weights)
    # GPUs and TPUs would round the factors to TF32 or bfloat16.
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    planes = product("cyh,bchw->bcyw", rows, jnp.moveaxis(images, -1, 1))
    return jnp.moveaxis(product("cxw,bcyw->bcyx", columns, planes), 1, -1)


def hugging_face(
    images: Sequence[UInt8[np.ndarray, "_ _ 3"]], processor_config: Mapping[str, Any] | None = None
) -> Float[np.ndarray, "b s s 3"]:
    """The pixels of transformers' CLIPImageProcessorPil, float32, of 8-bit pictures of any sizes.

    Unless configured otherwise: shorter side to 224 by Pillow's bicubic, the central square, normalised.

    Args:
        processor_config: what a `preprocessor_config.json` says; None: the class's defaults.

    Raises:
        InputError: transformers does not take the configuration, or it does not make squares of three channels.
    """
    settings = dict(return_tensors="np", input_data_format="channels_last")
    try:
        processor = _processor(json.dumps(dict(processor_config or {}), sort_keys=True))
        pixels = [processor(images=image, **settings)["pixel_values"][0] for image in images]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"preprocessor_config: transformers' CLIPImageProcessorPil cannot use it ({error})") from error
    side = pixels[0].shape[-1]
    if any(array.shape != (3, side, side) for array in pixels):
        raise InputError(
            "preprocessor_config: the pixels it makes are not squares of one size; set do_resize and do_center_crop to "
            "true, and crop_size to the tower's image size."
        )
    return np.stack(pixels).transpose(0, 2, 3, 1)


def _unit(images):
    """Float32 in [0, 1]; the division is torchvision's."""
    return images.astype(np.float32) / np.float32(255 if images.dtype == np.uint8 else 1)


def _normalised(pixels):
    return (pixels - MEAN[None, None, None]) / STD[None, None, None]


@functools.lru_cache(maxsize=512)
def _weights(given: tuple[int, int], size: tuple[int, int]) -> tuple[scipy.sparse.csr_array, scipy.sparse.csr_array]:
    """Float32 matrices [y, h] and [x, w]; both sides are blurred if one shrinks."""
    blurred = any(old > new for old, new in zip(given, size, strict=True))
    return tuple(_axis(old, new, blurred) for old, new in zip(given, size, strict=True))


def _axis(old: int, new: int, blurred: bool) -> scipy.sparse.csr_array:
    scale = np.float32(old - 1) / np.float32(new - 1) if new > 1 else np.float32(0)
    position = scale * np.arange(new, dtype=np.float32)
    before = np.minimum(np.floor(position).astype(int), old - 1)
    t = (position - before)[:, None] + np.arange(1, -3, -1)  # distances to the four neighbours, the left ones positive
    weights = _banded(np.clip(before[:, None] + np.arange(-1, 3), 0, old - 1), _keys(np.abs(t)), old)
    if blurred:
        sigma = max((old / new - 1) / 2, 0.001)
        reach = int(max(4 * sigma, 3)) // 2
        x = np.arange(-reach, reach + 1)
        window = np.exp(-(x**2) / (2 * sigma**2))
        reflected = np.pad(np.arange(old), reach, mode="reflect")
        taps = np.broadcast_to(window / window.sum(), (old, len(x)))
        weights = weights @ _banded(reflected[np.arange(old)[:, None] + np.arange(len(x))], taps, old)
    return weights.astype(np.float32)


def _keys(distance: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution kernel."""
    a, x = -0.75, distance
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, far)


def _banded(columns: np.ndarray, values: np.ndarray, width: int) -> scipy.sparse.csr_array:
    """Matrix with `values[i]` at `columns[i]` of row i; values at the same place are summed."""
    rows = np.repeat(np.arange(len(columns)), columns.shape[1])
    return scipy.sparse.csr_array((values.ravel(), (rows, columns.ravel())), shape=(len(columns), width))


def _times(matrix: scipy.sparse.csr_array, array: np.ndarray) -> np.ndarray:
    """The matrix applied to the array's first axis."""
    return (matrix @ array.reshape(len(array), -1)).reshape(-1, *array.shape[1:])


@functools.lru_cache(maxsize=4)
def _processor(config: str) -> Any:
    """transformers' processor; imported here because only this needs it."""
    from transformers import CLIPImageProcessorPil

    return CLIPImageProcessorPil.from_dict(json.loads(config))
