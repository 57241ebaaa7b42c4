"""CLIP's vision weights from files of every kind, right and wrong; their numbers are compared in tests/parity."""

import fnmatch
import json
import re
import shutil
import tracemalloc
from pathlib import Path

import golden_set
import huggingface_hub
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file
from torch_writer import pickled, tensor, zip_file

from synbrain_jax.errors import InputError
from synbrain_jax.interop import clip_weights
from synbrain_jax.interop.clip_weights import load_clip_vision, vision_keys
from synbrain_jax.models.clip_vision import CLIPVision, CLIPVisionConfig

CONFIG = CLIPVisionConfig(image_size=15, patch_size=5, width=12, depth=2, heads=3, mlp_width=20, embed_dim=7)
HF_CONFIG = dict(
    model_type="clip_vision_model",
    image_size=15,
    patch_size=5,
    hidden_size=12,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=20,
    projection_dim=7,
    hidden_act="gelu",
    layer_norm_eps=1e-5,
)
TEXT = {
    "text_model.embeddings.position_ids": np.arange(6)[None],
    "text_model.final_layer_norm.weight": np.ones(5, np.float32),
    "vision_model.embeddings.position_ids": np.arange(10)[None],
    "text_projection.weight": np.ones((7, 5), np.float32),
    "logit_scale": np.array(4.6, np.float32),
}
TABLE = [line.split("\t") for line in (golden_set.OWN / "clip_bigG_visual_keys.tsv").read_text().splitlines()[1:]]


def random_open_clip(config=CONFIG, dtype=np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {key: rng.normal(size=shape).astype(dtype) for key, shape in vision_keys(config, "open_clip").items()}


def to_hf(state_dict) -> dict[str, np.ndarray]:
    """open_clip's tensors under Hugging Face's names, by the table that was made with both libraries."""
    renamed = {}
    for key, _, theirs, _, transform in TABLE:
        if key in state_dict:
            names, array = theirs.split(), state_dict[key]
            parts = np.split(array.T if transform == "transpose" else array, len(names))
            renamed |= {name: np.ascontiguousarray(part) for name, part in zip(names, parts, strict=True)}
    return renamed


OPEN_CLIP = random_open_clip()
HF = to_hf(OPEN_CLIP)


def write_folder(folder: Path, tensors=HF, config=HF_CONFIG) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def write_shards(folder: Path) -> Path:
    """Vision tensors in the first two of three files, some of the second tower in the last two."""
    folder = write_folder(folder)
    (folder / "model.safetensors").unlink()
    names = sorted(HF)
    shards = [{key: HF[key] for key in names[:9]}, {key: HF[key] for key in names[9:]} | TEXT, dict(TEXT)]
    shards[2] = {"text_model.encoder.weight": np.ones(3, np.float32)}
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05}-of-00003.safetensors"
        save_file(shard, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def write_torch(path: Path, state_dict, wrap=lambda content: content) -> Path:
    """A file like torch.save's."""
    instructions, storages = {}, {}
    for i, (key, array) in enumerate(state_dict.items()):
        strides = tuple(stride // array.itemsize for stride in array.strides)
        instructions[key] = tensor(array.shape, strides, key=str(i), size=array.size)
        storages[str(i)] = array.tobytes()
    path.write_bytes(zip_file(pickled(wrap(instructions)), storages))
    return path


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "open_clip_model.safetensors"
    save_file(OPEN_CLIP, path)
    return path


@pytest.fixture(scope="module")
def params(tmp_path_factory):
    """What every file with these weights must give."""
    path = tmp_path_factory.mktemp("clip") / "open_clip_model.safetensors"
    save_file(OPEN_CLIP, path)
    return load_clip_vision(path, heads=3)[1]


def assert_loads(params, source, **arguments):
    config, loaded = load_clip_vision(source, **arguments)
    assert config == CONFIG
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype(np.float32)}
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


# --- names and layouts ---


def test_every_tensor_of_bigg_has_its_name_and_shape_in_both_layouts():
    open_clip, hf = {}, {}
    for key, shape, theirs, their_shape, _ in TABLE:
        open_clip[key] = tuple(map(int, shape.split(",")))
        hf |= dict.fromkeys(theirs.split(), tuple(map(int, their_shape.split(","))))
    # The shape of three tensors that are one in open_clip is the matrix's, also where they are vectors.
    hf = {key: shape[:1] if key.endswith("_proj.bias") else shape for key, shape in hf.items()}
    assert (len(open_clip), len(hf)) == (584, 776)
    assert vision_keys(CLIPVisionConfig.bigG_14(), "open_clip") == open_clip
    assert vision_keys(CLIPVisionConfig.bigG_14(), "hf") == hf


def test_numbers_go_to_their_places(params):
    """Against the meaning of each layout, one product at a time."""
    flat = flatten_dict(params, sep="/")
    x = np.random.default_rng(1).normal(size=12).astype(np.float32)
    block = "visual.transformer.resblocks.1"
    for ours, theirs in {"attn/proj": "attn.out_proj", "mlp/fc1": "mlp.c_fc"}.items():
        expected = OPEN_CLIP[f"{block}.{theirs}.weight"] @ x + OPEN_CLIP[f"{block}.{theirs}.bias"]
        actual = x @ flat[f"blocks/{ours}/kernel"][1] + flat[f"blocks/{ours}/bias"][1]
        np.testing.assert_allclose(actual, expected, rtol=1e-5)
    in_proj = OPEN_CLIP[f"{block}.attn.in_proj_weight"]
    actual = np.einsum("d,dpe->pe", x, flat["blocks/attn/qkv/kernel"][1]) + flat["blocks/attn/qkv/bias"][1]
    np.testing.assert_allclose(actual.ravel(), in_proj @ x + OPEN_CLIP[f"{block}.attn.in_proj_bias"], rtol=1e-5)
    np.testing.assert_allclose(x @ flat["projection/kernel"], x @ OPEN_CLIP["visual.proj"], rtol=1e-5)
    np.testing.assert_array_equal(flat["patch_embed/kernel"][3, 1, 2, 7], OPEN_CLIP["visual.conv1.weight"][7, 2, 3, 1])
    np.testing.assert_array_equal(flat["blocks/ln_2/scale"][0], OPEN_CLIP["visual.transformer.resblocks.0.ln_2.weight"])


def test_what_is_loaded_is_what_the_model_takes(params):
    shapes = jax.eval_shape(CLIPVision(CONFIG).init, jax.random.key(0), np.zeros((1, 15, 15, 3), np.float32))["params"]
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, shapes)


# --- files of every kind ---


def test_torch_files(tmp_path, params):
    text = {"positional_embedding": np.ones((4, 5), np.float32), "logit_scale": np.ones((), np.float32)}
    assert_loads(params, write_torch(tmp_path / "open_clip_pytorch_model.bin", {**text, **OPEN_CLIP}), heads=3)
    parallel = {f"module.{key}": array for key, array in OPEN_CLIP.items()}
    training = write_torch(tmp_path / "epoch_3.pt", parallel, lambda weights: {"epoch": 3, "state_dict": weights})
    assert_loads(params, training, heads=3)


def test_hugging_face_folders(tmp_path, params):
    assert_loads(params, write_folder(tmp_path / "vision"))
    nested = {"model_type": "clip", "projection_dim": 7, "vision_config": {**HF_CONFIG, "projection_dim": 512}}
    assert_loads(params, write_folder(tmp_path / "both", HF | TEXT, nested))
    assert_loads(params, write_shards(tmp_path / "shards"))


def test_the_configuration_is_taken_from_the_folder(tmp_path):
    changed = HF_CONFIG | dict(hidden_act="quick_gelu", layer_norm_eps=1e-6, num_attention_heads=4)
    config, _ = load_clip_vision(write_folder(tmp_path, config=changed))
    assert (config.activation, config.layer_norm_eps, config.heads) == ("quick_gelu", 1e-6, 4)


def test_the_activation_of_an_open_clip_file_is_told(file):
    assert load_clip_vision(file, heads=3)[0].activation == "gelu"
    assert load_clip_vision(file, heads=3, activation="quick_gelu")[0].activation == "quick_gelu"


def test_heads_of_known_widths(tmp_path):
    sizes = dict(image_size=1, patch_size=1, depth=1, mlp_width=1, embed_dim=1)
    for preset in (CLIPVisionConfig.B_32(**sizes), CLIPVisionConfig.H_14(**sizes)):
        keys = vision_keys(preset, "open_clip")
        save_file({key: np.zeros(shape, np.float16) for key, shape in keys.items()}, tmp_path / "a.safetensors")
        assert load_clip_vision(tmp_path / "a.safetensors")[0] == preset
        assert load_clip_vision(tmp_path / "a.safetensors", heads=2)[0].heads == 2


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
def test_types_are_kept_or_changed(tmp_path, stored):
    weights = random_open_clip(dtype=ml_dtypes.bfloat16 if stored == "bfloat16" else stored)
    save_file(weights, tmp_path / "a.safetensors")
    for dtype in (None, "float32", "bfloat16"):
        _, loaded = load_clip_vision(tmp_path / "a.safetensors", heads=3, dtype=dtype)
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(loaded)} == {dtype or stored}
        expected = weights["visual.proj"].astype(loaded["projection"]["kernel"].dtype)
        np.testing.assert_array_equal(loaded["projection"]["kernel"], expected)


def test_tensors_that_are_stacked_get_a_type_that_holds_all(tmp_path):
    mixed = {key: array.astype(np.float16) if ".k_proj." in key else array for key, array in HF.items()}
    _, loaded = load_clip_vision(write_folder(tmp_path, mixed))
    assert loaded["blocks"]["attn"]["qkv"]["kernel"].dtype == np.float32


# --- memory ---


def test_memory_is_that_of_the_tower_and_one_tensor(tmp_path, monkeypatch):
    """Beside a text tower of twice its size. Each opening maps a file and what is read of it, so it ends at once."""
    config = CLIPVisionConfig(image_size=2, patch_size=2, width=128, depth=16, heads=2, mlp_width=256, embed_dim=8)
    weights = random_open_clip(config)
    n_bytes = sum(array.nbytes for array in weights.values())
    text = {f"text.{i}": np.zeros((n_bytes // 32,), np.float32) for i in range(16)}
    save_file(weights | text, tmp_path / "a.safetensors")
    openings = []

    class Counted:
        def __init__(self, *arguments):
            self.read, self.file = [], safetensors.safe_open(*arguments)
            openings.append(self.read)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *exception):
            self.file.__exit__(*exception)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def get_tensor(self, key):
            self.read.append(key)
            return self.file.get_tensor(key)

    monkeypatch.setattr(clip_weights, "safe_open", Counted)
    load_clip_vision(tmp_path / "a.safetensors", heads=2)  # what is compiled once is not counted
    openings.clear()
    tracemalloc.start()
    load_clip_vision(tmp_path / "a.safetensors", heads=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n_bytes < peak < 1.3 * n_bytes
    assert max(map(len, openings)) == 1
    assert {key for read in openings for key in read} == weights.keys()


# --- the hub ---


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder that stands for all repositories; calls are noted, and only what is asked for arrives."""
    remote, local, asked = tmp_path / "remote", tmp_path / "local", []

    def snapshot_download(name, *, allow_patterns):
        asked.append(name)
        local.mkdir(exist_ok=True)
        for file in remote.iterdir():
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, local)
        return str(local)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return remote, local, asked


def test_only_what_the_tower_needs_is_downloaded(hub, params):
    remote, local, asked = hub
    write_shards(remote)
    (remote / "open_clip_model.safetensors").write_bytes(b"ten gigabytes")
    (remote / "preprocessor_config.json").write_text("{}")
    assert_loads(params, "some-org/CLIP-ViT.1_x")
    assert set(asked) == {"some-org/CLIP-ViT.1_x"}
    assert {file.name for file in local.iterdir()} == {
        "config.json",
        "preprocessor_config.json",
        "model.safetensors.index.json",
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
    }


def test_a_repository_with_one_file(hub, params):
    remote, _, asked = hub
    write_folder(remote, HF | TEXT)
    assert_loads(params, "org/name")
    assert asked == ["org/name"]


def test_what_exists_here_is_not_looked_for_elsewhere(hub, tmp_path, monkeypatch, params):
    write_folder(tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    assert_loads(params, "org/name")
    assert hub[2] == []


@pytest.mark.parametrize(
    "source", ["nowhere", "a/b/c.safetensors", "/a/b", "../b", "org/", "org/a.bin", Path("org/name")]
)
def test_what_is_no_repository_is_not_asked_for(hub, tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no such file or folder"):
        load_clip_vision(source)
    assert hub[2] == []


def test_a_hub_that_cannot_be_reached_says_so(monkeypatch):
    def snapshot_download(name, *, allow_patterns):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(InputError, match=r"^org/name: neither a file or folder here nor .* hub \(no route\)"):
        load_clip_vision("org/name")


# --- wrong files ---


def changed(**arrays):
    """OPEN_CLIP with some tensors replaced, or left out where None; `__` stands for a dot."""
    weights = {**OPEN_CLIP, **{key.replace("__", "."): array for key, array in arrays.items()}}
    return {key: array for key, array in weights.items() if array is not None}


BLOCK = "visual__transformer__resblocks__0__"
WRONG = [
    ({"visual__proj": np.ones((12, 7), np.int64)}, "visual.proj holds I64. All must hold float32, float16, bfloat16"),
    ({"visual__proj": np.ones((12, 7), np.float64)}, "visual.proj holds F64"),
    ({"visual__ln_post__bias": None}, "visual.ln_post.bias missing. Expected exactly"),
    ({"visual__attn_pool__query": np.ones(3)}, "visual.attn_pool.query not expected. Expected exactly"),
    ({f"{BLOCK}ln_1__bias": np.ones(13, np.float32)}, r"0.ln_1.bias has shape \[13\], expected \[12\]"),
    ({f"{BLOCK}mlp__c_fc__bias": np.ones(9, np.float32)}, r"mlp.c_"),
    ({"visual__class_embedding": np.ones(9, np.float32)}, r"visual.class_embedding has shape \[9\], expected \[12\]"),
    ({"visual__class_embedding": None}, "visual.class_embedding missing"),
    ({"visual__conv1__weight": None}, "visual.conv1.weight is missing or has"),
    ({"visual__conv1__weight": np.ones(12, np.float32)}, "visual.conv1.weight is missing or has too few axes"),
    ({"visual__positional_embedding": np.ones((9, 12), np.float32)}, "positional_embedding has 9 rows; expected one"),
    ({"visual__positional_embedding": np.ones((0, 12), np.float32)}, "positional_embedding has 0 rows"),
    ({"visual__positional_embedding": np.ones((1, 12), np.float32)}, "clip_vision.image_size is 0"),
    (dict.fromkeys(key.replace(".", "__") for key in OPEN_CLIP if "resblocks" in key), "resblocks.0.mlp.c_fc.bias"),
    ({**dict.fromkeys(key.replace(".", "__") for key in OPEN_CLIP), "a": np.ones(1)}, r"no tensor visual\.\*, but a;"),
    (dict.fromkeys(key.replace(".", "__") for key in OPEN_CLIP if "blocks.0.attn" in key), r"0.attn.\S+ missing"),
]


@pytest.mark.parametrize(("arrays", "message"), WRONG)
def test_a_wrong_tensor_is_named(tmp_path, arrays, message):
    path = tmp_path / "open_clip_model.safetensors"
    save_file(changed(**arrays), path)
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}: .*{message}"):
        load_clip_vision(path, heads=3)


def test_long_lists_end_in_a_count(tmp_path):
    path = tmp_path / "a.safetensors"
    gone = [key.replace(".", "__") for key in OPEN_CLIP if "ln_" in key and key.endswith("weight")]
    extra = {f"visual__extra{i}": np.ones(1) for i in range(7)}
    save_file(changed(**dict.fromkeys(gone), **extra), path)
    with pytest.raises(InputError) as error:
        load_clip_vision(path, heads=3)
    listed, count = str(error.value).partition(": ")[2].split(". Expected")[0].split("; "), len(gone)
    assert count == 6
    assert [part.count(",") for part in listed] == [4, 4]
    assert listed[0].endswith(" and 1 more missing")
    assert listed[1].endswith(" and 2 more not expected")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "does not say how many attention heads its 12 channels are for; give heads"),
        (dict(heads=5), "clip_vision.width is 12 and clip_vision.heads 5"),
        (dict(heads=0), "clip_vision.heads is 0"),
        (dict(heads=3, activation="relu"), "clip_vision.activation is 'relu'"),
    ],
)
def test_what_an_open_clip_file_does_not_tell_must_be_right(file, arguments, message):
    with pytest.raises(InputError, match=message):
        load_clip_vision(file, **arguments)


def test_files_of_another_kind(tmp_path, file):
    folder = write_folder(tmp_path / "hf")
    with pytest.raises(InputError, match=r"has no tensor visual.*expected open_clip's names. Give the folder"):
        load_clip_vision(folder / "model.safetensors")
    with pytest.raises(InputError, match=r"heads and activation are in its config\.json"):
        load_clip_vision(folder, heads=3)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(InputError, match="cannot be read as a safetensors file"):
        load_clip_vision(file, heads=3)
    (tmp_path / "a.bin").write_bytes(b"GIF89a")
    with pytest.raises(InputError, match=r"a\.bin: is not a PyTorch checkpoint"):
        load_clip_vision(tmp_path / "a.bin")
    for content in ([], {"state_dict": 3}, {"visual.proj": 3}):
        (tmp_path / "a.bin").write_bytes(zip_file(pickled(content), {}))
        with pytest.raises(InputError, match=r"a.bin: has no tensor visual.\*, but none; expected open_clip's names.$"):
            load_clip_vision(tmp_path / "a.bin")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model_type="siglip_vision_model"), "model_type is 'siglip_vision_model'; expected 'clip'"),
        (dict(hidden_act="gelu_new"), "clip_vision.activation is 'gelu_new'"),
        (dict(num_channels=1), "num_channels is 1 and image_size 15; expected 3, and one number"),
        (dict(num_attention_heads=5), r"not a multiple of the number of attention heads \(5\)"),
        (dict(image_size=[15, 15]), r"num_channels is 3 and image_size \[15, 15\]; expected 3, and one number"),
        (dict(hidden_size="wide"), "wide"),
        (dict(vision_config=3), "vision_config is 3; expected a JSON object"),
    ],
)
def test_wrong_configurations(tmp_path, changes, message):
    folder = write_folder(tmp_path, config=HF_CONFIG | changes)
    with pytest.raises(InputError, match=rf"(?s)^{re.escape(str(folder / 'config.json'))}: .*{message}"):
        load_clip_vision(folder)


def test_a_configuration_of_other_sizes_than_the_weights(tmp_path):
    folder = write_folder(tmp_path, config=HF_CONFIG | dict(num_hidden_layers=3))
    with pytest.raises(InputError, match=r"layers.2.layer_norm1.bias, .* and 11 more missing"):
        load_clip_vision(folder)
    folder = write_folder(tmp_path, config=HF_CONFIG | dict(projection_dim=8))
    with pytest.raises(InputError, match=r"visual_projection.weight has shape \[7, 12\], expected \[8, 12\]"):
        load_clip_vision(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "config.json: cannot be read"),
        ("config.json", "{", "config.json: not JSON"),
        ("config.json", "[]", "config.json: holds a list; expected a JSON object"),
        ("model.safetensors.index.json", None, "has neither model.safetensors nor .*give the file itself"),
        ("model.safetensors.index.json", "{}", "has no weight_map"),
        ("model-00001-of-00003.safetensors", None, "model-00001-of-00003.safetensors: cannot be read"),
        (
            "model.safetensors.index.json",
            json.dumps({"weight_map": {"vision_model.a": "../a.safetensors", "text.b": "/b"}}),
            "names ../a.safetensors; expected names of files beside it",
        ),
    ],
)
def test_folders_that_are_damaged(tmp_path, name, content, message):
    folder = write_shards(tmp_path)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(InputError, match=message):
        load_clip_vision(folder)


def test_a_tensor_that_is_in_no_shard_is_missing(tmp_path):
    folder = write_shards(tmp_path)
    shard = folder / "model-00001-of-00003.safetensors"
    weights = load_file(shard)
    gone = sorted(weights)[3]
    del weights[gone]
    save_file(weights, shard)
    with pytest.raises(InputError, match=f"{re.escape(gone)} missing"):
        load_clip_vision(folder)
