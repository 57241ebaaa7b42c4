"""`synbrain convert`: the released checkpoints to and from bundles."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg, subcommand

from synbrain_jax.errors import InputError
from synbrain_jax.files import write_bytes


def _from_torch(
    brain_vae: Path,
    mapper: Path,
    out: Path,
    weights: Literal["ema", "raw"] = "ema",
    heads: int | None = None,
    voxels: int | None = None,
    data: Path | None = None,
) -> Callable[[], str]:
    """The PyTorch release's checkpoints to a bundle.

    Args:
        brain_vae: Stage 1, last.pth (or a .safetensors file).
        mapper: Stage 2, last.pt (or a .safetensors file).
        out: Bundle folder to write.
        weights: "ema" takes the moving average of the mapper's weights, as the release does; "raw" the weights.
        heads: Attention heads of the mapper, if the checkpoint does not say.
        voxels: Number of voxels of the brain, if the checkpoint does not say or says it wrong.
        data: Prepared data set of that brain, instead of `voxels`: the bundle then knows where its voxels are.
    """
    from synbrain_jax.checkpoint import save_bundle
    from synbrain_jax.interop.torch_weights import bundle_from_released

    def run() -> str:
        options = {"averaged": weights == "ema", "heads": heads, "voxels": voxels}
        if data is not None and voxels is not None:
            raise InputError("--data and --voxels both say which brain it is; give one of them")
        if data is not None:
            from synbrain_jax.data.pairs import open_dataset

            dataset = open_dataset(data)
            options |= {"voxels": dataset.voxels, "dataset": dataset.name}
        bundle = bundle_from_released(brain_vae, mapper, **options)
        save_bundle(out, bundle)
        return f"{out}: a bundle for {len(bundle.offset)} voxels; use it as --model {out}"

    return run


def _to_torch(model: Path, out: Path) -> Callable[[], str]:
    """A bundle to PyTorch state dicts, as brain_vae.safetensors and mapper.safetensors.

    Args:
        model: Bundle folder of a trained system.
        out: Folder for the two files.
    """
    import safetensors.numpy

    from synbrain_jax.checkpoint import load_bundle
    from synbrain_jax.interop.torch_weights import released_from_bundle

    def run() -> str:
        for name, state_dict in released_from_bundle(load_bundle(model)).items():
            write_bytes(out / f"{name}.safetensors", safetensors.numpy.save(state_dict))
        return f"{out}: brain_vae.safetensors, mapper.safetensors"

    return run


_Convert = (
    Annotated[Callable, subcommand("from-torch", constructor=_from_torch)]
    | Annotated[Callable, subcommand("to-torch", constructor=_to_torch)]
)


def convert(direction: Annotated[_Convert, arg(name="")]) -> None:
    """Exchange weights with the PyTorch release. PyTorch is not needed."""
    print(direction())
