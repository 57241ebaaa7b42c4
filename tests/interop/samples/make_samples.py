"""How the samples beside this file were made, by torch 2.13.0: `python make_samples.py` in an environment with torch.

expected.npz holds the arrays; a bfloat16 array is stored as the float32 array of the same values.
"""

import argparse
import warnings
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
warnings.simplefilter("ignore")


def as_array(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).contiguous().numpy()


base = torch.arange(24, dtype=torch.float32).reshape(4, 6) / 7
tensors = {
    "float32": base,
    "float16": torch.linspace(-2, 2, 5).half(),
    "bfloat16": torch.linspace(-3, 3, 7).bfloat16(),
    "int64": torch.tensor([2**40, -1, 0]),
    "transposed": base.T,
    "every second": base[::2, 1::2],
    "scalar": torch.tensor(0.75),
    "empty": torch.zeros(0, 5),
    "expanded by one": base[:1].expand(1, 6),
    "permuted": (torch.arange(60.0) * torch.arange(60.0)).reshape(3, 4, 5).permute(2, 0, 1),
}
state = OrderedDict(tensors)
state._metadata = OrderedDict([("", {"version": 1})])
content = {
    "model": state,
    "args": argparse.Namespace(
        lr=1e-4, name="ünicode", betas=(0.9, 0.999), resume=None, ema=True, sizes=[1, 300, 70000]
    ),
    "opt": {"state": {0: {"step": torch.tensor(3.0)}, 1: {}}, "param_groups": [{"params": [0, 1]}]},
    "steps": -5,
    "large": 2**40,
}

np.savez(HERE / "expected.npz", **{name: as_array(tensor) for name, tensor in tensors.items()})
torch.save(content, HERE / "zip.pt")
torch.save(content, HERE / "legacy.pt", _use_new_zipfile_serialization=False)
torch.save(content, HERE / "zip_protocol_5.pt", pickle_protocol=5)
torch.save(content, HERE / "legacy_protocol_4.pt", pickle_protocol=4, _use_new_zipfile_serialization=False)

# As if the tensors had been on a GPU, and with a negated view, whose sign stands in the metadata.
torch.serialization.register_package(-1, lambda storage: "cuda:0", lambda storage, location: None)
torch.save({"on a GPU": base}, HERE / "cuda.pt", _use_new_zipfile_serialization=False)
torch.save({"negated": torch._neg_view(base)}, HERE / "negated.pt")
torch.jit.save(torch.jit.script(torch.nn.Identity()), HERE / "script.pt")
