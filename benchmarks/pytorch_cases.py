"""Times the models of `benchmarks/pytorch_baseline.py`. Needs torch, and neither jax nor the package.

    python -m benchmarks.pytorch_cases [CASE[:BATCH] ...] [--modes eager compile] [--dtype float32] [--tiny]

The cases are those of `benchmarks/cases.py`: parameters in float32 and computation in bfloat16 (autocast) unless told,
TF32 products and cuDNN's search on GPUs, eager and through torch.compile, AdamW's fused kernel. One JSON object a line.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.pytorch_baseline import BrainVAE, SiT, VisionTower, sample_one_step, sit_loss, vae_losses

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's pixels


def settings() -> None:
    """What a GPU is at its fastest with."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True


def cases(
    tiny: bool, dtype: str = "bfloat16", fused: bool = True
) -> dict[str, Callable[[int, Callable], Callable[[], Tensor]]]:
    """What makes the step of each case, of a batch and of what compiles. A step returns its result, or its loss.

    `fused`: of AdamW; the release takes PyTorch's default, a loop over parameters, which is slower.
    """
    sizes = dict(ch=32, ada_length=64, z_channels=12, hidden_dim=32, linear_dim=16, embed_dim=32) if tiny else {}
    sit_sizes = dict(num_patches=12, hidden_size=32, depth=2, num_heads=2) if tiny else {}
    tower_sizes = dict(image_size=28, width=8, depth=2, heads=2, hidden=20) if tiny else {}
    voxels, tokens, side = (150, (12, 32), 40) if tiny else (15_724, (256, 1664), 425)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    autocast = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")

    def random(*shape, scale=1.0):
        return scale * torch.randn(shape, device=device)

    def inference(function, x):
        @torch.no_grad()
        def step():
            with autocast:
                return function(x)

        return step

    def forward(batch, compiled):
        return inference(compiled(BrainVAE(**sizes).to(device)), random(batch, 1, voxels))

    def encode(batch, compiled):
        vae = BrainVAE(**sizes).to(device)
        mean = compiled(lambda x: vae.pre_projector_mean(vae.encoder(x)))
        return inference(mean, random(batch, 1, voxels))

    def synthesis(batch, compiled):
        vae, sit = BrainVAE(**sizes).to(device), SiT(**sit_sizes).to(device)
        return inference(compiled(lambda x: vae.decode(sample_one_step(sit, x), voxels)), random(batch, *tokens))

    def clip(batch, compiled):
        """From 8-bit pictures. The resize is PyTorch's and not kornia's, as the release's is: next to nothing of it."""
        with torch.device("meta"):
            tower = VisionTower(**tower_sizes).eval()
        tower = tower.to_empty(device=device)
        for parameter in tower.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        size = 28 if tiny else 224
        mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (MEAN, STD))

        def encode(pictures):
            pixels = pictures.permute(0, 3, 1, 2).float() / 255
            pixels = F.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True)
            return tower((pixels - mean) / std)

        return inference(compiled(encode), torch.randint(256, (batch, side, side, 3), dtype=torch.uint8, device=device))

    def vae_train(batch, compiled):
        vae = BrainVAE(**sizes).to(device)
        optimizer = torch.optim.AdamW(vae.parameters(), 1e-4, weight_decay=0.05, fused=fused)
        x, clip = random(batch, 1, voxels, scale=0.3), random(batch, *tokens)
        loss = compiled(lambda noise: vae_losses(vae, x, clip, noise)[0].total)

        def step():
            with autocast:
                total = loss(random(batch, *tokens))
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            optimizer.step()
            return total.detach()

        return step

    def mapper_train(batch, compiled):
        sit = SiT(**sit_sizes).to(device)
        ema = copy.deepcopy(sit).requires_grad_(False)
        trained = [p for p in sit.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, 1e-4, weight_decay=0.0, fused=fused)
        images, latents = random(batch, *tokens), random(batch, *tokens)
        loss = compiled(lambda: sit_loss(sit, images, latents))

        def step():
            with autocast:
                total = loss()
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            torch._foreach_lerp_(list(ema.parameters()), list(sit.parameters()), 1e-4)
            return total.detach()

        return step

    return {f.__name__: f for f in (forward, encode, vae_train, mapper_train, synthesis, clip)}


def compiler(mode: str) -> Callable:
    """Of a mode's models: "eager" or "compile"."""
    return torch.compile if mode == "compile" else lambda function: function


def seconds_per_step(step: Callable[[], None], window: float, windows: int = 5) -> list[float]:
    """Seconds of one step in each window of about `window` seconds, after a warm-up."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for _ in range(3):
        step()
    wait()
    start = time.perf_counter()
    step()
    wait()
    steps = max(2, round(window / (time.perf_counter() - start)))
    found = []
    for _ in range(windows):
        start = time.perf_counter()
        for _ in range(steps):
            step()
        wait()
        found.append((time.perf_counter() - start) / steps)
    return found


def measure(name: str, batch: int, mode: str, tiny: bool, dtype: str) -> dict:
    """Builds and times one case; why, where that fails."""
    torch.compiler.reset()
    start = time.perf_counter()
    row = {"case": name, "batch": batch, "mode": mode, "torch": torch.__version__}
    try:
        step = cases(tiny, dtype)[name](batch, compiler(mode))
        step()
        ready = time.perf_counter() - start
        seconds = seconds_per_step(step, 0.01 if tiny else 0.5)
    except RuntimeError as error:  # no memory, or what the compiler cannot do
        return row | {"failed": str(error).splitlines()[0]}
    times = {"seconds": statistics.median(seconds), "fastest": min(seconds), "slowest": max(seconds)}
    return row | times | {"compile_seconds": ready}


def main() -> None:
    parser = argparse.ArgumentParser(description="times the released system's models in PyTorch")
    parser.add_argument("cases", nargs="*", help="NAME or NAME:BATCH")
    parser.add_argument("--modes", nargs="*", default=["eager", "compile"], choices=["eager", "compile"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    settings()
    known = cases(options.tiny)
    for case in options.cases or known:
        name, _, batch = case.partition(":")
        for mode in options.modes if name in known else ():
            print(json.dumps(measure(name, int(batch or 24), mode, options.tiny, options.dtype)), flush=True)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
