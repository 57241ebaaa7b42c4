"""How fast the system is on one GPU, in bfloat16: every case against the rates that this very GPU reaches.

    python -m benchmarks gpu                             # all cases, and torch.compile where torch is installed
    python -m benchmarks gpu vae_train --batch 24
    python -m benchmarks gpu --tiny                      # small models, on whatever there is: does it work?

Needs jax, flax, optax, orbax and numpy. Each case is checked first (relative error by norm against float32 with exact
products, fresh random parameters and inputs), then timed: a window is many steps put on the device's queue and one wait
for the last; the seconds are the median window's. MFU counts the floating-point operations of convolutions and matrix
products that the mathematics needs (a training step: three times the forward pass), over the seconds, over the rate of
a large matrix product measured here.
"""

import argparse
import dataclasses
import importlib.util
import json
import platform
import secrets
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from benchmarks.flops import brain_vae_flops, clip_flops, mapper_flops
from synbrain_jax.checkpoint import Bundle
from synbrain_jax.config import Config, OptimizerConfig, Stage1Config, Stage2Config
from synbrain_jax.data.voxels import Voxels
from synbrain_jax.encoding import encode_batch
from synbrain_jax.models.brain_vae import BrainVAE, BrainVAEConfig, brain_vae_shapes
from synbrain_jax.models.clip_vision import CLIPVisionConfig, clip_vision_shapes
from synbrain_jax.models.semantic_to_neural import MapperConfig, SemanticToNeural, mapper_shapes
from synbrain_jax.sharding import make_mesh
from synbrain_jax.stages import brain_vae_loss, mapper_loss
from synbrain_jax.synthesis import jit_decoder
from synbrain_jax.training import step_program

H100_TFLOPS, H100_TBYTES = 989.4, 3.35  # data sheet, SXM: dense bfloat16, memory
AGAINST = ["vae_train", "mapper_train", "synthesis"]  # what PyTorch is asked for unless told: its compiler takes long
QUICK = {"xla_gpu_autotune_level": "0"}  # of programs that are not timed
LARGEST_ERROR = 0.05  # of bfloat16 against float32; of a gradient: twice that


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Models and batches of all cases."""

    vae: BrainVAEConfig
    mapper: MapperConfig
    clip: CLIPVisionConfig
    voxels: int
    picture: int
    batches: dict[str, int]

    @classmethod
    def full(cls) -> "Sizes":
        """The released system on subject 1, in batches that fill an 80 GB GPU (the release trains with 24)."""
        return cls(
            BrainVAEConfig.paper(),
            MapperConfig.paper(),
            CLIPVisionConfig.bigG_14(),
            voxels=15_724,
            picture=425,
            batches={**dict.fromkeys(CASES, 64), "mapper_train": 96},
        )

    @classmethod
    def tiny(cls) -> "Sizes":
        return cls(
            BrainVAEConfig.small(),
            MapperConfig.small(),
            CLIPVisionConfig(image_size=28, width=8, depth=2, heads=2, mlp_width=20, embed_dim=6),
            voxels=150,
            picture=40,
            batches=dict.fromkeys(CASES, 2),
        )


# --- cases ---


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing to time: a jitted `step(*args)`. That of training is given its own first output as first argument."""

    flops: float  # of one batch
    step: Callable
    args: tuple
    error: Callable[[Callable], float]
    """Of what `step`, compiled, computes: relative to float32."""
    trains: bool = False


def random_params(shapes: PyTree, seed: int | Array, dtype=jnp.float32) -> PyTree:
    """Every parameter drawn, also those that start at zero or one: normal with the variance 1 / fan-in."""

    def scale(path, numbers):
        name, stacked = path[-1].key, path[0].key == "blocks"
        fan_in = np.prod(numbers.shape[stacked:-1]) if name == "kernel" else 400
        return numbers * jnp.asarray(fan_in**-0.5, dtype) + (name == "scale")

    leaves, tree = jax.tree.flatten(shapes)
    ends = np.cumsum([leaf.size for leaf in leaves])

    @jax.jit
    def make(key):
        numbers = jax.random.normal(key, (ends[-1],), dtype)  # one program for all
        parts = [numbers[end - leaf.size : end].reshape(leaf.shape) for leaf, end in zip(leaves, ends, strict=True)]
        return jax.tree.map_with_path(scale, jax.tree.unflatten(tree, parts))

    # Its numbers depend on the compiler, and take it no time.
    return make(jax.random.key(seed, impl="rbg") if isinstance(seed, int) else seed)


def normal(seed: int, *shape: int, scale: float = 1.0) -> Array:
    return scale * jax.random.normal(jax.random.key(seed), shape)


def one_device() -> Mesh:
    return make_mesh(devices=jax.devices()[:1])


def relative_error(actual: PyTree, expected: PyTree) -> float:
    """Norm of the difference over the norm of what is expected, over all leaves."""

    def norm(tree):
        return np.sqrt(sum(float(jnp.square(leaf.astype(jnp.float32)).sum()) for leaf in jax.tree.leaves(tree)))

    difference = jax.tree.map(lambda a, b: a.astype(jnp.float32) - b.astype(jnp.float32), actual, expected)
    return float(norm(difference) / norm(expected))


def exactly(function: Callable, *args: Any) -> Any:
    """Of a float32 function, with products that are not rounded to fewer digits; compiled with little search."""
    with jax.default_matmul_precision("highest"):
        return jax.jit(function, compiler_options=QUICK)(*args)


def inference_case(make: Callable[[str], Callable], params: PyTree, inputs: Array, flops: float) -> Case:
    """`make(dtype)(params, inputs)`; two samples of what is timed are compared with float32."""

    def error(step):
        wanted = exactly(make("float32"), jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params), inputs[:2])
        return relative_error(step(params, inputs)[:2], wanted)

    return Case(len(inputs) * flops, jax.jit(make("bfloat16")), (params, inputs), error)


def vae_params(sizes: Sizes, seed: int) -> PyTree:
    return random_params(brain_vae_shapes(sizes.vae), seed)


def forward_case(sizes: Sizes, batch: int, seed: int) -> Case:
    """BrainVAE: encode, decode the mean."""

    def make(dtype):
        model = BrainVAE(dataclasses.replace(sizes.vae, dtype=dtype))
        return lambda params, fmri: model.apply({"params": params}, fmri).reconstruction

    flops = sum(brain_vae_flops(sizes.vae, sizes.voxels, logvar=False))
    return inference_case(make, vae_params(sizes, seed), normal(seed, batch, sizes.voxels), flops)


def encode_case(sizes: Sizes, batch: int, seed: int) -> Case:
    """BrainVAE: the posterior's mean."""

    def make(dtype):
        model = BrainVAE(dataclasses.replace(sizes.vae, dtype=dtype))
        return lambda params, fmri: model.apply({"params": params}, fmri, method="encode").mean

    flops = brain_vae_flops(sizes.vae, sizes.voxels, logvar=False)[0]
    return inference_case(make, vae_params(sizes, seed), normal(seed, batch, sizes.voxels), flops)


def train_case(
    make_loss: Callable, settings, shapes: PyTree, frozen: PyTree, data: dict[str, Array], flops: float, seed: int
) -> Case:
    """A whole step as `training.fit` makes it; the check is of the gradient on two samples."""
    program = step_program(
        lambda key: random_params(shapes, key), make_loss("bfloat16"), settings, one_device(), "bfloat16"
    )
    few = {name: rows[:2] for name, rows in data.items()}

    def error(_):
        def gradient(dtype):
            return lambda params, frozen, few: jax.grad(lambda p: make_loss(dtype)(p, frozen, few, None)[0])(params)

        params = random_params(shapes, seed)
        ours = jax.jit(gradient("bfloat16"), compiler_options=QUICK)(params, frozen, few)
        return relative_error(ours, exactly(gradient("float32"), params, frozen, few))

    key = jax.random.key(seed)
    batch = len(data["tokens"])
    return Case(3 * batch * flops, program.step, (program.init(key), frozen, data, key), error, trains=True)


def vae_train_case(sizes: Sizes, batch: int, seed: int) -> Case:
    """Stage 1 as configs/paper.py has it: sampled posterior, three losses, AdamW."""
    settings = Stage1Config(loss_scale="sum", clip_weight=1000.0)

    def make_loss(dtype):
        return brain_vae_loss(BrainVAE(dataclasses.replace(sizes.vae, dtype=dtype)), settings)

    data = {
        "fmri": normal(seed, batch, sizes.voxels, scale=0.3),
        "tokens": normal(seed + 1, batch, sizes.mapper.tokens, sizes.mapper.width),
    }
    flops = sum(brain_vae_flops(sizes.vae, sizes.voxels))
    return train_case(make_loss, settings, brain_vae_shapes(sizes.vae), {}, data, flops, seed)


def mapper_train_case(sizes: Sizes, batch: int, seed: int) -> Case:
    """Stage 2 on latents that are there: clipping, AdamW, moving average."""
    settings = Stage2Config(optimizer=OptimizerConfig(clip_norm=1.0, ema_decay=0.9999))

    def make_loss(dtype):
        mapper = SemanticToNeural(dataclasses.replace(sizes.mapper, dtype=dtype))
        return mapper_loss(mapper, BrainVAE(sizes.vae), settings)

    shape = (batch, sizes.mapper.tokens, sizes.mapper.width)
    data = {"tokens": normal(seed, *shape), "latent": normal(seed + 1, *shape), "fmri": jnp.zeros((batch, 1))}
    return train_case(make_loss, settings, mapper_shapes(sizes.mapper), {}, data, mapper_flops(sizes.mapper), seed)


def make_bundle(sizes: Sizes, params: PyTree, dtype: str) -> Bundle:
    config = Config(
        name="benchmark",
        brain_vae=dataclasses.replace(sizes.vae, dtype=dtype),
        mapper=dataclasses.replace(sizes.mapper, dtype=dtype),
    )
    order = np.arange(sizes.voxels, dtype=np.int32)
    voxels = Voxels("benchmark", "none", ijk=None, volume_shape=None, affine=None, ncsnr=None, order=order)
    return Bundle.uncorrected(config, params, voxels, "none", None)


def system_params(sizes: Sizes, seed: int) -> PyTree:
    return {"mapper": random_params(mapper_shapes(sizes.mapper), seed), "brain_vae": vae_params(sizes, seed + 1)}


def synthesis_case(sizes: Sizes, batch: int, seed: int) -> Case:
    """What `SynBrain.synthesize` has the device do for a batch of tokens that is there."""
    mesh, bundles = one_device(), {dtype: make_bundle(sizes, {}, dtype) for dtype in ("bfloat16", "float32")}
    tokens = normal(seed, batch, sizes.mapper.tokens, sizes.mapper.width)
    rest = np.arange(batch, dtype=np.int32), jax.random.key(0), np.zeros(tokens.shape[1:], np.float32)

    def make(dtype):
        decode = jit_decoder(bundles[dtype], mesh)
        return lambda params, tokens: decode(
            params, tokens, rest[0][: len(tokens)], rest[1], rest[2], k=1, varied=False
        )[:, 0]

    flops = mapper_flops(sizes.mapper) + brain_vae_flops(sizes.vae, sizes.voxels)[1]
    return inference_case(make, system_params(sizes, seed), tokens, flops)


def clip_case(sizes: Sizes, batch: int, seed: int) -> Case:
    """8-bit pictures to tokens, with the resize; the weights are bfloat16."""
    params = random_params(clip_vision_shapes(sizes.clip), seed, jnp.bfloat16)
    side = sizes.picture
    pictures = jax.random.randint(jax.random.key(seed), (batch, side, side, 3), 0, 256, jnp.int32).astype(jnp.uint8)

    def make(dtype):
        config = dataclasses.replace(sizes.clip, dtype=dtype)
        return lambda params, pictures: encode_batch(config, params, pictures)

    return inference_case(make, params, pictures, clip_flops(sizes.clip))


CASES = {
    "forward": forward_case,
    "encode": encode_case,
    "vae_train": vae_train_case,
    "mapper_train": mapper_train_case,
    "synthesis": synthesis_case,
    "clip": clip_case,
}


# --- measuring ---


def seconds_per_step(step: Callable, args: tuple, trains: bool, window: float, windows: int = 5) -> list[float]:
    """Seconds of one step in each window, of about `window` seconds, after a warm-up; `trains` as in `Case`."""

    def run(times, state):
        for _ in range(times):
            out = step(*(state, *args[1:]) if trains else args)
            state = out[0] if trains else state
        return jax.block_until_ready(state if trains else out)

    def timed(times, state):
        start = time.perf_counter()
        out = run(times, state)
        return (time.perf_counter() - start) / times, out if trains else state

    state = run(2, args[0]) if trains else args[0]
    seconds, state = timed(2, state)
    steps = max(2, round(window / seconds))
    found = []
    for _ in range(windows):
        seconds, state = timed(steps, state)
        found.append(seconds)
    return found


def ceilings(size: int, window: float) -> dict[str, float]:
    """Rates of this device on random numbers: TFLOP/s of a bfloat16 product [size, size, size], and TB/s (read and
    written) of a copy of float32."""
    a, b = (normal(seed, size, size).astype(jnp.bfloat16) for seed in (0, 1))
    matmul = statistics.median(seconds_per_step(jax.jit(jnp.matmul), (a, b), False, window))
    x = normal(2, 4 * size, 4 * size)
    moved = statistics.median(seconds_per_step(jax.jit(jnp.negative), (x,), False, window))
    return {"matmul_tflops": 2 * size**3 / matmul / 1e12, "copy_tbytes": 2 * x.nbytes / moved / 1e12}


def measure(name: str, sizes: Sizes, batch: int, window: float, check: bool) -> dict[str, Any]:
    """Builds, checks and times one case."""
    case = CASES[name](sizes, batch, secrets.randbelow(2**30))
    start = time.perf_counter()
    step = case.step.lower(*case.args).compile()
    compile_seconds = time.perf_counter() - start
    memory = step.memory_analysis()
    error = case.error(step) if check else None
    times = seconds_per_step(step, case.args, case.trains, window)
    seconds = statistics.median(times)
    return {
        "case": name,
        "batch": batch,
        "seconds": seconds,
        "fastest": min(times),
        "slowest": max(times),
        "per_second": batch / seconds,
        "tflops": case.flops / seconds / 1e12,
        "gflop_each": case.flops / batch / 1e9,
        "compile_seconds": compile_seconds,
        "gib": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30 if memory else None,
        "error": error,
        "error_limit": LARGEST_ERROR * (2 if name.endswith("train") else 1),
    }


def pytorch(names: list[str], sizes: Sizes, tiny: bool) -> list[dict[str, Any]]:
    """The same cases through torch.compile, in a process of its own; none where torch is not installed."""
    if importlib.util.find_spec("torch") is None:
        return []
    cases = [f"{name}:{sizes.batches[name]}" for name in names]
    command = [sys.executable, "-m", "benchmarks.pytorch_baseline", "--modes", "compile", *cases]
    done = subprocess.run([*command, *(["--tiny"] if tiny else [])], stdout=subprocess.PIPE, text=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def describe(row: dict[str, Any], rates: dict[str, float]) -> str:
    """One line of the table."""
    if "failed" in row:
        return f"{row['case']:13} {row['batch']:5} {row['failed'][:100]}"
    error = "" if row["error"] is None else f"{row['error']:.1e}"
    memory = "" if row["gib"] is None else f"{row['gib']:.1f}"
    return (
        f"{row['case']:13} {row['batch']:5} {1e3 * row['seconds']:9.2f} "
        f"{1e3 * (row['slowest'] - row['fastest']):7.2f} {row['per_second']:9.1f} {row['tflops']:8.1f} "
        f"{100 * row['tflops'] / rates['matmul_tflops']:6.1f} {100 * row['tflops'] / H100_TFLOPS:6.1f} "
        f"{memory:>6} {row['compile_seconds']:8.1f} {error:>8}"
    )


def compare(theirs: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """One line about PyTorch; `ratio` is added to its row where the same case was timed here."""
    if "failed" in theirs:
        return f"{theirs['case']:13} {theirs['batch']:5} {theirs['failed'][:100]}"
    key = (theirs["case"], theirs["batch"])
    ours = [row["seconds"] for row in rows if (row["case"], row["batch"]) == key and "seconds" in row]
    theirs["ratio"] = theirs["seconds"] / ours[0] if ours else None
    ratio = f"{theirs['ratio']:.2f} x ours" if ours else ""
    return f"{theirs['case']:13} {theirs['batch']:5} {1e3 * theirs['seconds']:9.2f} ms  {ratio}"


HEADER = (
    f"{'case':13} {'batch':>5} {'ms':>9} {'spread':>7} {'per s':>9} {'TFLOP/s':>8} {'MFU %':>6} {'sheet%':>6} "
    f"{'GiB':>6} {'compile':>8} {'error':>8}"
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], help="default: all")
    parser.add_argument("--tiny", action="store_true", help="small models: does the program work?")
    parser.add_argument("--against", choices=["pytorch", "nothing"], default="pytorch")
    parser.add_argument("--batch", type=int, help="of every case; default: what fills an 80 GB GPU")
    parser.add_argument("--no-check", action="store_true", help="time only")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args(arguments)
    names = options.cases or list(CASES)
    sizes, window = (Sizes.tiny(), 0.01) if options.tiny else (Sizes.full(), 0.5)

    if options.batch:
        sizes = dataclasses.replace(sizes, batches=dict.fromkeys(CASES, options.batch))

    torch_rows = []
    if options.against == "pytorch":  # first, while this process holds no memory of the GPU
        torch_rows = pytorch(options.cases or AGAINST, sizes, options.tiny)
    device = jax.devices()[0]
    found = {
        "device": device.device_kind,
        "versions": {"jax": jax.__version__, "python": platform.python_version()},
        "date": time.strftime("%Y-%m-%d"),
        "ceilings": ceilings(256 if options.tiny else 8192, window),
        "rows": [],
        "pytorch": torch_rows,
    }
    rates = found["ceilings"]
    print(f"{device.device_kind}, jax {jax.__version__}, Python {platform.python_version()}, {found['date']}")
    print(f"matrix product {rates['matmul_tflops']:.0f} TFLOP/s, copy {rates['copy_tbytes']:.2f} TB/s\n{HEADER}")
    for name in names:
        batch = sizes.batches[name]
        try:
            row = measure(name, sizes, batch, window, check=not options.no_check)
        except jax.errors.JaxRuntimeError as error:  # no memory for it
            row = {"case": name, "batch": batch, "failed": str(error).splitlines()[0]}
        found["rows"].append(row)
        print(describe(row, rates), flush=True)
        jax.clear_caches()
    for row in torch_rows:
        print(f"PyTorch {row['mode']:8} {compare(row, found['rows'])}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    wrong = [row for row in found["rows"] if row.get("error") is not None and not row["error"] <= row["error_limit"]]
    for row in wrong:
        print(f"WRONG: {row['case']} is {row['error']:.2e} from float32; at most {row['error_limit']} was expected")
    return 1 if wrong or any("failed" in row for row in found["rows"]) else 0
