"""Preprocessing against the release's: kornia's resize, and what the tower is given."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from golden_set import load

from synbrain_jax.preprocessing import MEAN, STD, released, released_on_host, resize

KORNIA, CLIP = load("kornia_resize.npz"), load("clip_open_clip_tiny.npz")
FILE = "kornia_resize.npz"


def channels_last(array):
    return np.moveaxis(array, 1, -1)


@pytest.mark.parametrize("name", sorted(key.removesuffix("/x_u8") for key in KORNIA if key.endswith("/x_u8")))
def test_resize(compare, name):
    rows, columns = map(int, re.fullmatch(r"r\d+x\d+_(\d+)x(\d+)", name).groups())
    pictures = channels_last(KORNIA[f"{name}/x_u8"]).astype(np.float32) / 255
    resized = resize(jnp.asarray(pictures), (rows, columns))
    compare(FILE, f"{name}/y", resized, channels_last(KORNIA[f"{name}/y"]), 2e-6)


@pytest.mark.parametrize("name", sorted({key.split("/")[0] for key in KORNIA if "/base" in key}))
@pytest.mark.parametrize("where", ["devices", "host"])
def test_pictures_of_the_natural_scenes_datasets_size(compare, name, where):
    """A coarse picture with its pixels repeated; the release's result is stored in parts."""
    given, size = map(int, re.fullmatch(r"r(\d+)_(\d+)", name).groups())
    stored = {key.removeprefix(f"{name}/"): value for key, value in KORNIA.items() if key.startswith(f"{name}/")}
    base = channels_last(next(stored[key] for key in stored if key.startswith("base")))
    times = given // base.shape[1]
    pictures = base.repeat(times, axis=1).repeat(times, axis=2)
    on_host = [released_on_host(picture, size) for picture in pictures]
    pixels = np.asarray(released(pictures, size) if where == "devices" else on_host)
    resized = pixels.astype(np.float64) * STD + MEAN
    row, column = stored["crop_rc"]
    for key, expected in stored.items():
        if key == "channel_mean":
            compare(FILE, f"{name}/{key}", resized.mean(axis=(1, 2)), expected, 2e-6)
        elif key == "channel_std":
            compare(FILE, f"{name}/{key}", resized.std(axis=(1, 2), ddof=1), expected, 2e-6)
        elif key == "y_corner":
            compare(FILE, f"{name}/{key}", resized[:, :4, -4:], channels_last(expected), 4e-6)
        elif found := re.fullmatch(r"y_every(\d+)", key):
            every = int(found[1])
            compare(FILE, f"{name}/{key}", resized[:, ::every, ::every], channels_last(expected), 4e-6)
        elif found := re.fullmatch(r"(y|normalised)_crop(\d+)", key):
            side = int(found[2])
            of = pixels if found[1] == "normalised" else resized
            crop = of[:, row : row + side, column : column + side]
            compare(FILE, f"{name}/{key}", crop, channels_last(expected), 4e-6)
        else:
            assert key == "crop_rc" or key.startswith("base"), f"nothing compares {key}"


@pytest.mark.parametrize(("given", "expected"), [("image", "normalised"), ("src_image", "src_preprocessed")])
def test_the_towers_input(compare, given, expected):
    pixels = released(channels_last(CLIP[given]), int(CLIP["cfg/image"]))
    compare("clip_open_clip_tiny.npz", expected, pixels, channels_last(CLIP[expected]), 2e-6)
