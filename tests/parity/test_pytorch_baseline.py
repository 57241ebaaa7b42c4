"""The PyTorch models that benchmarks compare with, against the released system. Needs torch; nothing else does."""

import importlib

import numpy as np
import pytest
from golden_set import load, load_json, relative_error

torch = pytest.importorskip("torch")
baseline = importlib.import_module("benchmarks.pytorch_baseline")

SIZES = load_json("config.json")


def with_weights(model, file: str):
    model.load_state_dict({name: torch.from_numpy(array) for name, array in load(file).items()}, strict=True)
    return model.eval()


def numbers(array: np.ndarray):
    return torch.from_numpy(array)


def test_brain_vae_is_the_released_one():
    sizes, stored = SIZES["brainvae"], load("brainvae_forward.npz")
    net = {name: sizes["ddconfig"][name] for name in ("ch", "z_channels", "ada_length", "num_res_blocks")}
    net |= {name: sizes["ddconfig"][name] for name in ("num_down_blocks", "num_up_blocks")}
    wide = {name: sizes[name] for name in ("hidden_dim", "linear_dim", "embed_dim")}
    model = baseline.BrainVAE(ch_mult=tuple(sizes["ddconfig"]["ch_mult"]), **net, **wide)
    model = with_weights(model, "brainvae_params.npz")
    x, tokens, noise = (numbers(stored[name]) for name in ("x", "clip", "eps"))
    with torch.no_grad():
        losses, z, reconstruction, posterior = baseline.vae_losses(model, x, tokens, noise)
        found = {
            "posterior_mean": posterior.mean,
            "posterior_logvar": posterior.logvar,
            "sampled_z": z,
            "sampled_recon": reconstruction,
            "sampled_total_loss": losses.total,
            "recon": model(x),
            "decode_out": model.decode(numbers(stored["decode_z"]), x.shape[-1]),
        }
    for name, value in found.items():
        assert relative_error(value.numpy(), stored[name]) < 1e-5, name


def test_mapper_is_the_released_one():
    sizes, stored = SIZES["sit"], load("sit_forward.npz")
    names = ("num_patches", "hidden_size", "depth", "num_heads", "mlp_ratio")
    model = with_weights(baseline.SiT(**{name: sizes[name] for name in names}), "sit_params.npz")
    loss = baseline.sit_loss(model, numbers(stored["loss_images"]), numbers(stored["loss_fmri"]))
    loss.backward()
    with torch.no_grad():
        output = baseline.sample_one_step(model, numbers(stored["x"]))
    assert relative_error(output.numpy(), stored["y_t0"]) < 1e-5
    assert relative_error(loss.detach().numpy(), stored["loss_x"]) < 1e-5
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert relative_error(parameter.grad.numpy(), stored[f"grad_x/{name}"]) < 1e-4, name
