"""Does bigG/14 fit? Compiles what `encode-images` runs, ahead of time, for 8 TPU v5e chips and 8 H100, anywhere.

    pip install -e . 'jax[tpu]' jax-cuda12-plugin jax-cuda12-pjrt
    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python benchmarks/aot_clip.py

No accelerator is needed and none is used: libtpu and XLA's CUDA plugin compile for a description of one. The
plugins' versions must be jax's own. The program takes 8-bit pictures of 425 x 425 and gives tokens; memory is that of
each device, and the seconds are the compiler's. What libtpu says about its environment is harmless.
"""

import functools
import itertools
import time

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from synbrain_jax.encoding import encode_batch
from synbrain_jax.models.clip_vision import CLIPVisionConfig, clip_vision_shapes
from synbrain_jax.sharding import batch_sharding, make_mesh, state_sharding

H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 8 patch: 0 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  device_memory_size: 84929347584
}
"""
GIB = 2**30
# Name, topology of its devices, and the memory that programs may use on each.
TARGETS = [
    ("TPU v5e 2x4", dict(platform="tpu", topology_name="v5e:2x4"), 15.75 * GIB),
    ("8 x H100", dict(platform="cuda", target_config=H100, topology="1x1x8"), 79.1 * GIB),
]
MESHES = [dict(data=8), dict(data=4, tensor=2), dict(data=1, tensor=8)]
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
        state_sharding(shapes, mesh),
    )
    images = jax.ShapeDtypeStruct((batch, SIDE, SIDE, 3), jnp.uint8, sharding=batch_sharding(mesh))
    encode = jax.jit(functools.partial(encode_batch, config), out_shardings=batch_sharding(mesh))
    return encode.lower(params, images).compile()


def main() -> None:
    print(f"jax {jax.__version__}; bigG/14; GiB for each device")
    columns = " ".join(f"{column:>9}" for column in ("arguments", "outputs", "temporary", "total", "there is"))
    print(f"{'target':12} {'mesh':25} {'type':8} {'batch':>5} {columns} fits seconds")
    for name, description, available in TARGETS:
        devices = topologies.get_topology_desc(**description).devices
        cases = [("bfloat16", *case) for case in itertools.product(MESHES, BATCHES)]
        for dtype, sizes, batch in [*cases, ("float32", MESHES[0], BATCHES[0])]:
            start = time.perf_counter()
            memory = compile_for(devices, dtype, batch, sizes).memory_analysis()
            seconds = time.perf_counter() - start
            parts = (memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes)
            mesh = " ".join(f"{axis}={size}" for axis, size in sizes.items())
            columns = " ".join(f"{n_bytes / GIB:9.2f}" for n_bytes in (*parts, sum(parts), available))
            verdict = "yes" if sum(parts) < available else "NO"
            print(f"{name:12} {mesh:25} {dtype:8} {batch:5} {columns} {verdict:>4} {seconds:7.0f}", flush=True)


if __name__ == "__main__":
    main()
