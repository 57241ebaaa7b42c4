"""Does bigG/14 fit? Compiles what `encode-images` runs, ahead of time, for 8 TPU v5e chips and 8 H100, anywhere.

    pip install -e . 'jax[tpu]' jax-cuda12-plugin jax-cuda12-pjrt
    JAX_PLATFORMS=cpu python benchmarks/aot_clip.py

No accelerator is needed and none is used: libtpu and XLA's CUDA plugin compile for a description of one. The
plugins' versions must be jax's own. The program takes 8-bit pictures of 425 x 425 and gives tokens; memory is that of
each device, and the seconds are the compiler's. `synbrain plan` does the same for whole runs.
"""

import functools
import itertools
import time

import jax
import jax.numpy as jnp

from synbrain_jax.encoding import encode_batch
from synbrain_jax.models.clip_vision import CLIPVisionConfig, clip_vision_shapes
from synbrain_jax.plan.machines import GIB, machine
from synbrain_jax.sharding import batch_sharding, make_mesh, on_mesh, param_sharding

MESHES = [dict(data=8), dict(data=4, tensor=2), dict(data=1, tensor=8), dict(data=1, fsdp=8)]
BATCHES = [64, 512]  # pictures at once, on all devices together
SIDE = 425  # of the pictures, as in the Natural Scenes Dataset


def compile_for(devices, dtype: str, batch: int, mesh_sizes: dict[str, int]) -> jax.stages.Compiled:
    """`encode_batch` of `batch` pictures, over all devices; parameters and computation have `dtype`."""
    config = CLIPVisionConfig.bigG_14(dtype=dtype)
    mesh = make_mesh(**mesh_sizes, devices=devices)
    shapes = clip_vision_shapes(config)
    params = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=place),
        shapes,
        param_sharding(shapes, mesh),
    )
    images = jax.ShapeDtypeStruct((batch, SIDE, SIDE, 3), jnp.uint8, sharding=batch_sharding(mesh))
    encode = jax.jit(on_mesh(functools.partial(encode_batch, config), mesh), out_shardings=batch_sharding(mesh))
    return encode.lower(params, images).compile()


def main() -> None:
    print(f"jax {jax.__version__}; bigG/14; GiB for each device")
    columns = " ".join(f"{column:>9}" for column in ("arguments", "outputs", "temporary", "total", "there is"))
    print(f"{'target':12} {'mesh':25} {'type':8} {'batch':>5} {columns} fits seconds")
    for target in map(machine, ("v5e:2x4", "h100:8")):
        devices, available = target.devices(), target.chip.memory
        cases = [("bfloat16", *case) for case in itertools.product(MESHES, BATCHES)]
        for dtype, sizes, batch in [*cases, ("float32", MESHES[0], BATCHES[0])]:
            start = time.perf_counter()
            memory = compile_for(devices, dtype, batch, sizes).memory_analysis()
            seconds = time.perf_counter() - start
            parts = (memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes)
            mesh = " ".join(f"{axis}={size}" for axis, size in sizes.items())
            columns = " ".join(f"{n_bytes / GIB:9.2f}" for n_bytes in (*parts, sum(parts), available))
            verdict = "yes" if sum(parts) < available else "NO"
            print(f"{target!s:12} {mesh:25} {dtype:8} {batch:5} {columns} {verdict:>4} {seconds:7.0f}", flush=True)


if __name__ == "__main__":
    main()
