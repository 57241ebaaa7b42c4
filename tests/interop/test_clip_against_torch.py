"""The tower against Hugging Face's PyTorch CLIP on random weights of three shapes; runs where torch is installed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from synbrain_jax.interop.clip_weights import load_clip_vision
from synbrain_jax.models.clip_vision import CLIPVision

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SHAPES = [
    dict(hidden_size=24, intermediate_size=118, num_hidden_layers=2, num_attention_heads=3, image_size=42),
    dict(hidden_size=40, intermediate_size=64, num_hidden_layers=3, num_attention_heads=5, image_size=31, patch_size=8),
    dict(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=1, image_size=16, patch_size=1),
]


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("sizes", SHAPES, ids=lambda sizes: f"width {sizes['hidden_size']}")
@pytest.mark.parametrize("with_text", [False, True])
def test_tokens_embedding_and_hidden_tokens(tmp_path, compare, sizes, activation, with_text):
    torch.manual_seed(0)
    settings = {"patch_size": 14, **sizes, "hidden_act": activation, "projection_dim": 20}
    if with_text:
        text = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=10)
        config = transformers.CLIPConfig(vision_config=settings, text_config=text, projection_dim=20)
        theirs = transformers.CLIPModel(config)
    else:
        theirs = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**settings))
    with torch.no_grad():
        for parameter in theirs.parameters():  # biases are zero and scales one at first
            spread = 0.2 if parameter.ndim < 2 else parameter.shape[-1] ** -0.5
            parameter.add_(spread * torch.randn(parameter.shape))
        pixels = torch.randn(2, 3, sizes["image_size"], sizes["image_size"])
        vision = theirs.eval().vision_model(pixels)
        hidden = vision.last_hidden_state
        expected = {
            "tokens": theirs.vision_model.post_layernorm(hidden)[:, 1:],
            "pooled": theirs.visual_projection(vision.pooler_output),
            "hidden": hidden,
        }
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    config, params = load_clip_vision(tmp_path)
    ours = jnp.asarray(np.moveaxis(pixels.numpy(), 1, -1))
    model = CLIPVision(config)
    output = jax.jit(model.apply)({"params": params}, ours)
    actual = output._asdict() | {"hidden": model.apply({"params": params}, ours, method="hidden")}
    for name, array in expected.items():
        compare("transformers", name, actual[name], array.numpy(), 2e-5)
