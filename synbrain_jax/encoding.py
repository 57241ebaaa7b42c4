"""Pictures to tokens on all devices: reading ahead, preprocessing, the tower, and tokens on disk.

Pictures of the first one's size go to the devices as they are, 8 bits a colour, and are resized there; others are
resized on the host while they are read. So one resize is compiled, however many sizes there are.

Shape letters: b batch, h w a picture, s the tower's square, t tokens, d token width.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath, epy
from jax.sharding import Mesh
from jaxtyping import Array, BFloat16, Float, PyTree, UInt8
from tqdm import tqdm

from synbrain_jax.data.pictures import Pictures
from synbrain_jax.data.tokens import MANIFEST_FILE, STIMULI_FILE, check_shard, finish, shard_path, write_shard
from synbrain_jax.errors import InputError
from synbrain_jax.files import read_text, write_text
from synbrain_jax.interop.clip_weights import PROCESSOR, load_clip_vision, local_clip
from synbrain_jax.models.clip_vision import CLIPVision, CLIPVisionConfig
from synbrain_jax.preprocessing import hugging_face, released, released_on_host
from synbrain_jax.sharding import batch_parts, batch_sharding, make_mesh, on_mesh, param_sharding

# Imported when first used: models, losses and steps serve where these are not installed.
with epy.lazy_imports():
    import grain

UNREADABLE_FILE = "unreadable.txt"
_SHARD = 256  # pictures, about: what a killed run loses at most
_LARGEST_ON_DEVICE = 2**20  # pixels; a larger picture is cheaper to shrink than to copy


class PictureEncoder:
    """Preprocessing and image tower on the devices of a mesh."""

    def __init__(
        self,
        config: CLIPVisionConfig,
        params: PyTree,
        *,
        mesh: Mesh | None = None,
        preprocessing: str = "released",
        processor_config: Mapping[str, Any] | None = None,
    ):
        """Places the parameters.

        Args:
            config, params: of the tower.
            mesh: all devices unless given.
            preprocessing: "released", the release's, which squeezes any picture into a square; or "hugging_face", that
                of transformers' processor, which cuts the square out of the middle.
            processor_config: for "hugging_face", its `preprocessor_config.json`; None: OpenAI's, at the tower's size.
        """
        if preprocessing not in ("released", "hugging_face"):
            raise InputError(f"preprocessing is {preprocessing!r}; expected 'released' or 'hugging_face'")
        self.config, self.mesh = config, make_mesh() if mesh is None else mesh
        self.token_shape = (config.tokens, config.width)
        self._processor_config = None
        if preprocessing == "hugging_face":
            self._processor_config = _processor_config(config.image_size, processor_config)
        self._params = jax.device_put(params, param_sharding(params, self.mesh))
        self._encode = jit_encoder(config, self.mesh)

    @functools.cached_property
    def description(self) -> dict[str, Any]:
        """What the tokens depend on besides the pictures; plain values. Reads every parameter."""
        digest = hashlib.sha256()
        for path, leaf in jax.tree.leaves_with_path(self._params):
            digest.update(jax.tree_util.keystr(path).encode())
            # Of a copy, because an array keeps on the host what was fetched of it.
            digest.update(np.ascontiguousarray(jnp.copy(leaf)).reshape(-1).view(np.uint8))
        preprocessing = "released" if self._processor_config is None else self._processor_config
        tower = {**dataclasses.asdict(self.config), "weights": digest.hexdigest()}
        return {"tower": tower, "preprocessing": preprocessing}

    def rows(self, batch_size: int) -> int:
        """`batch_size`, rounded up to a multiple of the devices among which a batch is split."""
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; it must be at least 1")
        parts = batch_parts(self.mesh)
        return math.ceil(batch_size / parts) * parts

    def prepare(self, picture: UInt8[np.ndarray, "h w 3"], kept_size: tuple[int, int] | None) -> np.ndarray:
        """The host's part: the picture as it is if it has `kept_size`, else its normalised pixels [s, s, 3]."""
        if self._processor_config is not None:
            return hugging_face([picture], self._processor_config)[0]
        return picture if picture.shape[:2] == kept_size else released_on_host(picture, self.config.image_size)

    def encode(self, prepared: Sequence[np.ndarray], rows: int) -> BFloat16[Array, "b t d"]:
        """Tokens, on the devices, of at most `rows` prepared pictures; b is `rows`, the rest being padding."""
        if len({array.dtype for array in prepared}) > 1:
            size = self.config.image_size
            prepared = [released_on_host(array, size) if array.dtype == np.uint8 else array for array in prepared]
        images = np.zeros((rows, *prepared[0].shape), prepared[0].dtype)
        images[: len(prepared)] = prepared
        images = jax.device_put(images, batch_sharding(self.mesh))
        return self._encode(self._params, images)


def load_encoder(
    clip: str | os.PathLike,
    *,
    mesh: Mesh | None = None,
    preprocessing: str = "released",
    dtype: Literal["float32", "bfloat16"] = "float32",
    heads: int | None = None,
    activation: Literal["gelu", "quick_gelu"] | None = None,
) -> PictureEncoder:
    """The encoder of CLIP weights; arguments as of `load_clip_vision` and `PictureEncoder`.

    For "hugging_face" the `preprocessor_config.json` beside the weights counts, if there is one. `dtype` is that of the
    weights and of the computation.
    """
    path = local_clip(clip)
    config, params = load_clip_vision(path, heads=heads, activation=activation, dtype=dtype)
    file = path / PROCESSOR
    try:
        processor_config = json.loads(read_text(file)) if file.exists() else None
    except json.JSONDecodeError as error:
        raise InputError(f"{file}: not JSON ({error})") from error
    config = dataclasses.replace(config, dtype=dtype)
    return PictureEncoder(config, params, mesh=mesh, preprocessing=preprocessing, processor_config=processor_config)


def _processor_config(size: int, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The given configuration if it makes what a tower for `size` takes; by default OpenAI's at that size."""
    config = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}} if given is None else given
    side = hugging_face([np.zeros((32, 48, 3), np.uint8)], config).shape[1]
    if side != size:
        raise InputError(f"preprocessor_config: makes pictures of side {side}; the tower takes {size}")
    return dict(config)


def encode_batch(
    config: CLIPVisionConfig, params: PyTree, images: UInt8[Array, "b h w 3"] | Float[Array, "b s s 3"]
) -> BFloat16[Array, "b t d"]:
    """What the devices do: tokens of 8-bit pictures or of normalised pixels, rounded as data sets hold them."""
    pixels = released(images, config.image_size) if images.dtype == jnp.uint8 else images
    return CLIPVision(config).apply({"params": params}, pixels).tokens.astype(jnp.bfloat16)


def jit_encoder(config: CLIPVisionConfig, mesh: Mesh) -> Callable[[PyTree, Array], BFloat16[Array, "b t d"]]:
    """`encode_batch` compiled over `mesh`."""
    return jax.jit(on_mesh(functools.partial(encode_batch, config), mesh), out_shardings=batch_sharding(mesh))


# ---- to tokens on disk -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Encoding:
    """What became of the pictures."""

    encoded: int
    unreadable: Mapping[str, str]  # name -> why


def encode_images(
    pictures: Pictures,
    encoder: PictureEncoder,
    out: str | os.PathLike,
    *,
    batch_size: int = 32,
    num_threads: int | None = None,
) -> Encoding:
    """Writes the tokens of all pictures that can be read to the folder `out`, which `open_tokens` and TFDS read.

    Killed and called again, it goes on behind the last complete shard; called again after the end, it does nothing.
    The names of pictures that could not be read are in `unreadable.txt`, each with the reason. If all are, that file
    is all that is left.

    Args:
        pictures, encoder: what is encoded by what; the same for every call with this `out`.
        out: on a local disk. One process writes it.
        batch_size: pictures per call of the compiled function, rounded up to a multiple of the devices.
        num_threads: that read pictures; None: one a CPU core, at most 16.

    Raises:
        InputError: `out` is a file, or holds tokens of other pictures, or by another tower or preprocessing, or
            another data set, or a damaged shard; the tower gives numbers that are not finite.
    """
    out = epath.Path(out).expanduser()
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; expected a folder for the tokens, which need not exist.")
    rows = encoder.rows(batch_size)
    shards = _claim(out, pictures, encoder, shard_size=math.ceil(_SHARD / rows) * rows)
    _encode_shards(out, shards, pictures, encoder, rows, num_threads)
    notes = [_note(out, number) for number in range(len(shards))]
    unreadable = {name: why for note in notes if note.exists() for name, why in _json(note).items()}
    write_text(out / UNREADABLE_FILE, "".join(f"{name}\t{why}\n" for name, why in unreadable.items()))
    encoded = [[name for i in shard if (name := pictures.names[i]) not in unreadable] for shard in shards]
    if not any(encoded):
        ours = [*notes, out / MANIFEST_FILE, *(shard_path(out, number, len(shards)) for number in range(len(shards)))]
        for path in ours:
            path.unlink(missing_ok=True)
    elif not (out / STIMULI_FILE).exists():
        finish(out, encoded, encoder.token_shape)
    return Encoding(len(pictures) - len(unreadable), unreadable)


def _claim(out: epath.Path, pictures: Pictures, encoder: PictureEncoder, shard_size: int) -> list[range]:
    """Makes `out` the folder of these tokens, and returns the indices of the pictures in each shard."""
    given = {"source": os.path.abspath(pictures.where), "pictures": pictures.names, "background": pictures.background}
    wanted = json.loads(json.dumps({**given, **encoder.description}))  # lists for tuples, as it will be read
    file = out / MANIFEST_FILE
    if not file.exists():
        if (out / "features.json").exists():
            raise InputError(f"{out}: holds another data set. Give another folder for the tokens.")
        write_text(file, json.dumps(wanted | {"shard_size": shard_size}, indent=1))
    there = _json(file)
    other = [name for name, value in wanted.items() if there.get(name) != value]
    if other:
        details = "; ".join(_difference(name, there.get(name), wanted[name]) for name in other)
        raise InputError(f"{out}: holds tokens of something else ({details}). Give another folder, or delete this one.")
    size, count = there["shard_size"], len(pictures)
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def _json(path: epath.Path) -> dict[str, Any]:
    try:
        return dict(json.loads(read_text(path)))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{path}: is damaged ({error}). Delete the folder {path.parent} and encode the pictures again."
        ) from error


def _difference(name: str, there: Any, here: Any) -> str:
    if name == "pictures":
        new, gone = (sorted(set(a) - set(b)) for a, b in ((here, there), (there, here)))
        if not new + gone:
            return "pictures: in another order"
        listed = "".join(f", e.g. '{names[0]}'" for names in (new, gone) if names)
        return f"pictures: {len(new)} new, {len(gone)} gone{listed}"
    if isinstance(there, dict) and isinstance(here, dict):
        keys = [key for key in {**there, **here} if there.get(key) != here.get(key)]
        return ", ".join(f"{name}.{key}: {there.get(key)!r} there, {here.get(key)!r} here" for key in keys)
    return f"{name}: {there!r} there, {here!r} here"


def _encode_shards(
    out: epath.Path,
    shards: Sequence[range],
    pictures: Pictures,
    encoder: PictureEncoder,
    rows: int,
    num_threads: int | None,
) -> None:
    files = [shard_path(out, number, len(shards)) for number in range(len(shards))]
    todo = [number for number, file in enumerate(files) if not file.exists()]
    for number in sorted(set(range(len(shards))) - set(todo)):
        check_shard(files[number])
    left = sum(len(shards[number]) for number in todo)
    batches = encoded_batches(pictures, [shards[number] for number in todo], encoder, rows, num_threads)
    # Shards are fetched, compressed and written while the devices work on the next one.
    with (
        concurrent.futures.ThreadPoolExecutor(1) as writer,
        tqdm(total=len(pictures), initial=len(pictures) - left, desc="encode", unit="picture", disable=None) as bar,
    ):
        writing = writer.submit(lambda: None)
        for number, group in itertools.groupby(batches, key=lambda batch: todo[batch.group]):
            done = []
            for batch in group:
                done.append(batch)
                jax.block_until_ready(batch.tokens)
                bar.update(len(batch.names) + len(batch.unreadable))
            writing.result()
            writing = writer.submit(_write, out, number, files[number], done)
        writing.result()


def _write(out: epath.Path, number: int, shard: epath.Path, batches: Sequence["EncodedBatch"]) -> None:
    names = [name for batch in batches for name in batch.names]
    tokens = [array for batch in batches if batch.names for array in np.asarray(batch.tokens)[: len(batch.names)]]
    for name, array in zip(names, tokens, strict=True):
        if not np.isfinite(array).all():
            raise InputError(f"picture '{name}': its tokens are not finite; are the tower's weights whole?")
    unreadable = {name: why for batch in batches for name, why in batch.unreadable.items()}
    note = _note(out, number)
    note.unlink(missing_ok=True)
    if unreadable:
        write_text(note, json.dumps(unreadable))
    write_shard(shard, names, tokens)


def _note(out: epath.Path, number: int) -> epath.Path:
    """What could not be read of a shard; written before the shard."""
    return out / f"unreadable-{number:05d}.json"


# ---- reading and encoding --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedBatch:
    """Tokens on the devices."""

    group: int
    names: list[str]
    tokens: BFloat16[Array, "b t d"] | None  # of the names and of padding, perhaps not computed yet; None: no names
    unreadable: dict[str, str]


def encoded_batches(
    pictures: Pictures, groups: Sequence[range], encoder: PictureEncoder, rows: int, num_threads: int | None
) -> Iterator[EncodedBatch]:
    """The pictures of each group of indices, in batches that hold `rows` of one group, the last perhaps fewer.

    A batch is handed out when the next one has been sent to the devices, so that they never wait for the host.
    """
    indices = [index for group in groups for index in group]
    if not indices:
        return
    kept_size = _first_size(pictures)

    def read(position: int) -> np.ndarray | str:
        try:
            return encoder.prepare(pictures[indices[position]], kept_size)
        except InputError as error:
            return " ".join(str(error).split())  # one line

    threads = min(16, os.cpu_count() or 1) if num_threads is None else num_threads
    ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * rows if threads else 0)
    elements = iter(grain.MapDataset.range(len(indices)).map(read).to_iter_dataset(ahead))
    waiting = None
    for number, group in enumerate(groups):
        for start in range(0, len(group), rows):
            names = [pictures.names[index] for index in group[start : start + rows]]
            found = dict(zip(names, itertools.islice(elements, len(names)), strict=True))
            prepared = {name: array for name, array in found.items() if not isinstance(array, str)}
            tokens = encoder.encode(list(prepared.values()), rows) if prepared else None
            if waiting is not None:
                yield waiting
            unreadable = {name: why for name, why in found.items() if isinstance(why, str)}
            waiting = EncodedBatch(number, list(prepared), tokens, unreadable)
    yield waiting


def _first_size(pictures: Pictures) -> tuple[int, int] | None:
    """Size (rows, columns) of the first picture that can be read; None if it is a large one, or there is none."""
    for index in range(len(pictures)):
        try:
            height, width = pictures[index].shape[:2]
        except InputError:
            continue
        return (height, width) if height * width <= _LARGEST_ON_DEVICE else None
    return None
