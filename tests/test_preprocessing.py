"""Preprocessing against plain loops, Pillow, and transformers' own processor."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import correlate1d

from synbrain_jax.errors import InputError
from synbrain_jax.preprocessing import MEAN, STD, hugging_face, released, released_on_host, resize

RNG = np.random.default_rng(0)


def picture(height, width, channels=3):
    return RNG.integers(0, 256, (height, width, channels), dtype=np.uint8)


def cubic(distance):
    """Keys' kernel by its four conditions: pieces of degree 3, 1 at 0, 0 at 1 and 2, slope -0.75 at 1."""
    a, x = -0.75, abs(distance)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def plain_resize(image, size):
    """The recipe step by step, pixel by pixel, in float64 but for the positions."""
    image = image.astype(np.float64)
    factors = [old / new for old, new in zip(image.shape, size, strict=False)]
    if max(factors) > 1:
        for axis, factor in enumerate(factors):
            sigma = max((factor - 1) / 2, 0.001)
            taps = int(max(4 * sigma, 3))
            taps += 1 - taps % 2
            kernel = np.exp(-((np.arange(taps) - taps // 2) ** 2) / (2 * sigma**2))
            image = correlate1d(image, kernel / kernel.sum(), axis=axis, mode="mirror")
    for axis, new in enumerate(size):
        old = image.shape[axis]
        image = np.moveaxis(image, axis, 0)
        out = np.zeros((new, *image.shape[1:]))
        for i in range(new):
            position = np.float32(i) * (np.float32(old - 1) / np.float32(max(new - 1, 1))) if new > 1 else 0
            for near in range(int(position) - 1, int(position) + 3):
                out[i] += cubic(float(position) - near) * image[min(max(near, 0), old - 1)]
        image = np.moveaxis(out, 0, axis)
    return image


SIZES = [(7, 7), (5, 9), (30, 12), (12, 31), (3, 40), (64, 8), (8, 100), (2, 2), (1, 9), (1, 1)]


@pytest.mark.parametrize("given_size", SIZES)
def test_resize_is_the_recipe(given_size):
    image = picture(*given_size).astype(np.float32) / 255
    found = resize(jnp.asarray(image[None]), (8, 8))[0]
    np.testing.assert_allclose(found, plain_resize(image, (8, 8)), atol=2e-6)


def test_resize_to_a_rectangle_and_to_one_pixel():
    image = picture(20, 11).astype(np.float32) / 255
    for size in ((5, 33), (1, 1), (1, 4)):
        np.testing.assert_allclose(resize(jnp.asarray(image[None]), size)[0], plain_resize(image, size), atol=2e-6)


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 24))
@settings(max_examples=30, deadline=None)
def test_the_host_computes_the_same(height, width, size):
    image = picture(height, width)
    found = released_on_host(image, size)
    assert found.dtype == np.float32
    expected = image if (height, width) == (size, size) else plain_resize(image, (size, size))
    np.testing.assert_allclose(found, (expected / 255 - MEAN) / STD, atol=2e-5)


def test_released_is_the_resize_then_clips_normalisation():
    images = np.stack([picture(20, 30), picture(20, 30)])
    found = released(jnp.asarray(images), 14)
    for image, pixels in zip(images, found, strict=True):
        np.testing.assert_allclose(pixels, (plain_resize(image / 255, (14, 14)) - MEAN) / STD, atol=1e-5)
    np.testing.assert_allclose(released(jnp.asarray(images / np.float32(255)), 14), found, atol=1e-6)


def test_the_resizes_overshoot_is_not_clipped():
    image = np.zeros((10, 10, 3), np.uint8)
    image[:, 5:] = 255
    pixels = np.asarray(released(jnp.asarray(image[None]), 28))[0] * STD + MEAN
    assert pixels.min() < -0.01
    assert pixels.max() > 1.01


def test_a_picture_of_the_towers_size_is_only_normalised():
    image = picture(16, 16)
    expected = ((image / np.float32(255)).astype(np.float32) - MEAN) / STD
    np.testing.assert_array_equal(released_on_host(image, 16), expected)
    np.testing.assert_allclose(released(jnp.asarray(image[None]), 16)[0], expected, atol=1e-6)


def test_one_program_for_each_size_of_picture():
    before = released._cache_size()
    for shape in ((2, 21, 33), (2, 21, 33), (2, 33, 21)):
        released(jnp.zeros((*shape, 3), jnp.uint8), 14)
    assert released._cache_size() - before == 2


# ---- Hugging Face's ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("given_size", [(28, 28), (40, 61), (100, 31), (9, 12)])
def test_hugging_face_is_pillows_resize_and_the_middle(given_size):
    image = picture(*given_size)
    height, width = given_size
    size = 28
    short = min(height, width)
    sides = [size if side == short else int(size * side / short) for side in (width, height)]
    resized = np.asarray(Image.fromarray(image).resize(sides, Image.Resampling.BICUBIC)).astype(np.float32)
    top, left = (resized.shape[0] - size) // 2, (resized.shape[1] - size) // 2
    expected = (resized[top : top + size, left : left + size] / 255 - MEAN) / STD
    config = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    found = hugging_face([image, image], config)
    assert found.shape == (2, size, size, 3)
    np.testing.assert_allclose(found, np.stack([expected] * 2), atol=2e-6)


@pytest.mark.parametrize("config", [None, {"size": 30, "crop_size": 24, "image_std": [1, 1, 1], "resample": 2}])
def test_hugging_face_is_transformers_processor_bit_for_bit(config, tmp_path):
    from transformers import CLIPImageProcessorPil

    images = [picture(50, 70), picture(64, 33)]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config or {}))
    processor = CLIPImageProcessorPil.from_pretrained(tmp_path)
    expected = processor(images=[Image.fromarray(image) for image in images], return_tensors="np")["pixel_values"]
    found = hugging_face(images, config)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected.transpose(0, 2, 3, 1))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"do_center_crop": False}, "not squares of one size"),
        ({"size": {"shortest_edge": 20, "longest": 3}}, "cannot use it"),
        ({"image_mean": [0.5]}, "cannot use it"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_named(config, message):
    with pytest.raises(InputError, match=message):
        hugging_face([picture(20, 30)], config)
