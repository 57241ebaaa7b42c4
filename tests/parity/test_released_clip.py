"""The image tower on the weights of open_clip and of Hugging Face: outputs, and values on the way."""

import golden_set
import jax
import jax.numpy as jnp
import pytest
from golden_set import load
from safetensors.numpy import save_file

from synbrain_jax.interop.clip_weights import load_clip_vision
from synbrain_jax.models.clip_vision import CLIPVision

FILE = "clip_open_clip_tiny.npz"
OPEN_CLIP = load(FILE)
TOLERANCE = 2e-5


def channels_last(pictures):
    return jnp.asarray(pictures.transpose(0, 2, 3, 1))


@pytest.fixture(scope="module")
def open_clip(tmp_path_factory):
    """The tower of the stored weights, as open_clip would save them."""
    path = tmp_path_factory.mktemp("open_clip") / "open_clip_model.safetensors"
    save_file({key.removeprefix("w/"): array for key, array in OPEN_CLIP.items() if key.startswith("w/")}, path)
    return load_clip_vision(path, heads=int(OPEN_CLIP["cfg/heads"]))


def test_the_sizes_are_those_that_the_weights_were_made_with(open_clip):
    config, _ = open_clip
    names = {"image": "image_size", "patch": "patch_size", "layers": "depth", "out": "embed_dim"}
    sizes = {key.removeprefix("cfg/"): int(value) for key, value in OPEN_CLIP.items() if key.startswith("cfg/")}
    assert sizes == {name: getattr(config, names.get(name, name)) for name in sizes}
    assert config.mlp_width == int(config.width * float(OPEN_CLIP["mlp_ratio"]))
    assert config.activation == "gelu"


@pytest.mark.parametrize(("pixels", "prefix"), [("normalised", ""), ("src_preprocessed", "src_")])
def test_tokens_and_embedding(open_clip, compare, pixels, prefix):
    config, params = open_clip
    output = jax.jit(CLIPVision(config).apply)({"params": params}, channels_last(OPEN_CLIP[pixels]))
    for name in output._fields:
        compare(FILE, prefix + name, getattr(output, name), OPEN_CLIP[prefix + name], TOLERANCE)


def test_values_on_the_way(open_clip, compare):
    config, params = open_clip
    model, pixels = CLIPVision(config), channels_last(OPEN_CLIP["normalised"])
    _, captured = model.apply({"params": params}, pixels, capture_intermediates=True, mutable="intermediates")
    values = captured["intermediates"]
    seen = {
        "ln_pre_out": values["ln_pre"]["__call__"][0],
        "block0_out": values["blocks"]["__call__"][0][0],
        "transformer_out": model.apply({"params": params}, pixels, method="hidden"),
        "ln_post_out": values["ln_post"]["__call__"][0],
    }
    assert {f"mid/{name}" for name in seen} == {key for key in OPEN_CLIP if key.startswith("mid/")}
    for name, value in seen.items():
        compare(FILE, f"mid/{name}", value, OPEN_CLIP[f"mid/{name}"], TOLERANCE)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_hugging_face(compare, activation):
    name = f"clip_hf_tiny_{activation}"
    expected = load(f"{name}/expected.npz")
    config, params = load_clip_vision(golden_set.folder / name)
    assert config.activation == activation
    model, pixels = CLIPVision(config), channels_last(expected.pop("pixel_values"))

    @jax.jit
    def run(params):
        return model.apply({"params": params}, pixels), model.apply({"params": params}, pixels, method="hidden")

    output, hidden = run(params)
    actual = {"tokens": output.tokens, "image_embeds": output.pooled, "last_hidden_state": hidden}
    assert actual.keys() == expected.keys()
    for key, array in expected.items():
        compare(f"{name}/expected.npz", key, actual[key], array, TOLERANCE)
