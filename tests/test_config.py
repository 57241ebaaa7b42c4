"""Configurations: JSON in and out, and what every wrong value is answered with."""

import dataclasses
import importlib.util
import json
import re
import types
import typing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from synbrain_jax.config import (
    Config,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    Stage1Config,
    Stage2Config,
    VariabilityConfig,
    nearest,
)
from synbrain_jax.errors import InputError
from synbrain_jax.models.brain_vae import BrainVAEConfig
from synbrain_jax.models.semantic_to_neural import MapperConfig

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "configs").glob("*.py"))


def exported(file: Path) -> Config:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.config


def changed(path: str, value) -> str:
    """JSON of a valid configuration with one value changed, added or (with `...`) removed."""
    tree = json.loads(Config(name="x").to_json())
    *parents, leaf = path.split(".")
    inner = tree
    for key in parents:
        inner = inner[key]
    if value is ...:
        del inner[leaf]
    else:
        inner[leaf] = value
    return json.dumps(tree)


def replaced(path: str, value) -> Config:
    """A valid configuration with one field replaced in Python, as a file in configs/ would."""

    def replace(node, keys):
        key, *rest = keys
        return dataclasses.replace(node, **{key: replace(getattr(node, key), rest) if rest else value})

    return replace(Config(name="x"), path.split("."))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_experiment_survives_json(file):
    config = exported(file)
    assert config.name == file.stem
    text = config.to_json()
    assert Config.from_json(text) == config
    assert Config.from_json(text).to_json() == text
    assert config.differences(Config.from_json(text)) == []


def fields_of(kind, **given_fields):
    """Values for every field of a dataclass, nested dataclasses as dictionaries."""
    hints = typing.get_type_hints(kind)
    return st.fixed_dictionaries({name: given_fields.get(name, values_of(hint)) for name, hint in hints.items()})


def values_of(kind):
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return fields_of(kind)
    if origin is typing.Literal:
        return st.sampled_from(options)
    if origin in (types.UnionType, typing.Union):
        return st.one_of(*(st.none() if option is types.NoneType else values_of(option) for option in options))
    if origin is tuple:
        return st.lists(values_of(options[0]), min_size=1, max_size=3).map(tuple)
    return {
        bool: st.booleans(),
        int: st.integers(1, 10_000),
        float: st.floats(1e-9, 0.99),
        str: st.text(max_size=5),
    }[kind]


@st.composite
def config_fields(draw):
    tokens, heads, width, levels = (draw(st.integers(1, 4)) for _ in range(4))
    types_ = st.sampled_from(["float32", "bfloat16"])
    brain_vae = fields_of(
        BrainVAEConfig,
        pool_length=st.integers(1, 9).map(lambda n: 16 * n),
        channels=st.sampled_from([1, 4, 32, 64]),
        channel_mult=st.lists(st.sampled_from([1, 2, 4, 8]), min_size=levels, max_size=levels).map(tuple),
        num_down_blocks=st.integers(0, levels),
        num_up_blocks=st.integers(0, levels),
        latent_tokens=st.just(tokens),
        latent_dim=st.just(2 * heads * width),
        attention_chunk=st.none() | st.just(1),
        dtype=types_,
    )
    mapper = fields_of(
        MapperConfig,
        tokens=st.just(tokens),
        width=st.just(2 * heads * width),
        heads=st.just(heads),
        prediction=st.sampled_from("xv"),
        positions=st.sampled_from(["computed", "stored"]),
        dtype=types_,
    )
    batch, parts, contrast = draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.none() | st.integers(1, 9))
    sizes = dict(batch_size=st.just(batch * parts * (contrast or 1)), accumulate=st.just(parts))
    start = st.none() if draw(st.booleans()) else st.just("last.pth")
    stage1 = fields_of(Stage1Config, **sizes, contrast_size=st.just(contrast), start_from=start)
    stage2 = fields_of(Stage2Config, **sizes, start_from=start)
    spread = fields_of(VariabilityConfig, samples=st.integers(2, 9))
    return draw(fields_of(Config, brain_vae=brain_vae, mapper=mapper, stage1=stage1, stage2=stage2, variability=spread))


def build(kind, fields: dict):
    hints = typing.get_type_hints(kind)
    return kind(**{k: build(hints[k], value) if isinstance(value, dict) else value for k, value in fields.items()})


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(config_fields())
def test_any_configuration_survives_json(fields):
    config = build(Config, fields)
    again = Config.from_json(config.to_json())
    assert again == config
    # Equality does not tell 1 from 1.0, nor a list from a tuple.
    assert repr(again) == repr(config)


@pytest.mark.parametrize(
    ("path", "known"),
    [
        ("stage_1", "stage1"),
        ("data.sorce", "source"),
        ("brain_vae.chanels", "channels"),
        ("mapper.head", "heads"),
        ("stage1.batchsize", "batch_size"),
        ("stage1.optimizer.learning_rat", "learning_rate"),
        ("stage2.optimizer.ema", "ema_decay"),
        ("mesh.tensors", "tensor"),
    ],
)
def test_an_unknown_setting_is_named_with_the_nearest_known_one(path, known):
    with pytest.raises(InputError, match=rf"^config\.{path} is not a known setting; did you mean '{known}'\?$"):
        Config.from_json(changed(path, 1))


def test_without_a_near_name_all_are_listed():
    assert nearest("zzz", ["b", "a"]) == "; known: a, b"
    assert nearest("fmir", {"fmri": 0, "tokens": 1}) == "; did you mean 'fmri'?"
    with pytest.raises(InputError, match="not a known setting; known: data, fsdp, tensor"):
        Config.from_json(changed("mesh.zzzz", 1))


WRONG_TYPES = {
    "name": (3, "expected str"),
    "seed": (1.5, "expected int"),
    "log_every": ("20", "expected int"),
    "calibrate": (1, "expected bool"),
    "data": ([], "expected an object"),
    "data.builder": ("bids", "expected one of 'haxby2001', 'arrays', 'nsd', 'prepared'"),
    "data.source": (3, "expected str"),
    "data.test_runs": (3, "expected a list"),
    "stage1.steps": (True, "expected int"),
    "stage1.kl_weight": ("0.1", "expected float"),
    "stage1.average_share": (None, "expected float"),
    "stage1.select": ("loss", "expected one of 'val/loss'"),
    "stage2.target": ("mean", "expected one of 'stimulus_mean', 'trial'"),
    "stage1.optimizer.schedule": ("linear", "expected one of 'constant', 'cosine'"),
    "stage2.optimizer.clip_norm": (True, "expected float"),
    "brain_vae.attention_chunk": (2.0, "expected int"),
    "mesh": (None, "expected an object"),
}


@pytest.mark.parametrize("path", WRONG_TYPES)
def test_a_value_of_the_wrong_type_is_named(path):
    value, expected = WRONG_TYPES[path]
    with pytest.raises(InputError) as error:
        Config.from_json(changed(path, value))
    assert str(error.value).startswith(f"config.{path} is {value!r}; {expected}")


def test_an_element_of_a_list_is_named():
    with pytest.raises(InputError, match=r"^config\.data\.test_runs\[1\] is 'b'; expected int$"):
        Config.from_json(changed("data.test_runs", [1, "b"]))


def test_null_stands_for_none_and_an_integer_for_a_float():
    assert Config.from_json(changed("stage2.optimizer.clip_norm", None)).stage2.optimizer.clip_norm is None
    weight = Config.from_json(changed("stage1.kl_weight", 2)).stage1.kl_weight
    assert (weight, type(weight)) == (2.0, float)
    assert Config.from_json(changed("data.test_runs", [4, 5])).data.test_runs == (4, 5)


def test_missing_fields_take_their_defaults_but_the_name_has_none():
    assert Config.from_json('{"name": "x"}') == Config(name="x")
    assert Config.from_json('{"name": "x", "stage1": {"steps": 7}}').stage1 == Stage1Config(steps=7)
    with pytest.raises(InputError, match="name"):
        Config.from_json("{}")
    for text in ('{"name": "x"', "", "[]"):
        with pytest.raises(InputError):
            Config.from_json(text)


INVALID = [
    ("mapper.tokens", 13, "brain_vae"),
    ("mapper.heads", 3, "mapper.heads"),
    ("mapper.heads", 0, "mapper.heads"),
    ("mapper.prediction", "eps", "mapper.prediction"),
    ("mapper.dtype", "float16", "mapper.dtype"),
    ("brain_vae.dtype", "f32", "brain_vae.dtype"),
    ("brain_vae.num_down_blocks", 4, "brain_vae.num_down_blocks"),
    ("brain_vae.num_up_blocks", -1, "brain_vae.num_up_blocks"),
    ("brain_vae.pool_length", 129, "brain_vae.pool_length"),
    ("brain_vae.pool_length", 0, "brain_vae.pool_length"),
    ("brain_vae.channels", 20, "brain_vae.channels"),  # group normalisation takes up to 32, or multiples of 32
    ("brain_vae.attention_chunk", 7, "brain_vae.attention_chunk"),
    ("stage1.steps", 0, "stage1.steps"),
    ("stage2.batch_size", -8, "stage2.batch_size"),
    ("stage2.eval_every", 0, "stage2.eval_every"),
    ("stage1.accumulate", 0, "stage1.accumulate"),
    ("stage2.accumulate", 5, "stage2.accumulate"),  # of a batch of 24
    ("stage2.patience", 0, "stage2.patience"),
    ("stage1.average_share", 1.5, "stage1.average_share"),
    ("stage1.average_share", float("nan"), "stage1.average_share"),
    ("stage1.kl_weight", float("nan"), "stage1.kl_weight"),
    ("stage1.optimizer.learning_rate", 0.0, "stage1.optimizer.learning_rate"),
    ("stage1.optimizer.warmup_steps", -1, "stage1.optimizer.warmup_steps"),
    ("stage2.optimizer.ema_decay", 1.0, "stage2.optimizer.ema_decay"),  # would return the initial parameters
    ("stage2.optimizer.clip_norm", 0.0, "stage2.optimizer.clip_norm"),  # would stop all movement
    ("seed", -1, "seed"),
    ("log_every", 0, "log_every"),
    ("variability.folds", -1, "variability.folds"),
    ("variability.ranks", (), "variability.ranks"),
    ("variability.ranks", (2, -1), "variability.ranks"),
    ("variability.samples", 1, "variability.samples"),
]


@pytest.mark.parametrize(("path", "value", "named"), INVALID, ids=[f"{path}={value}" for path, value, _ in INVALID])
def test_a_value_out_of_range_is_named_with_what_was_given(path, value, named):
    with pytest.raises(InputError) as error:
        replaced(path, value)
    assert named in str(error.value)
    assert str(value) in str(error.value)


def test_parts_of_a_batch_hold_whole_groups_of_the_contrast():
    Config(name="x", stage1=Stage1Config(batch_size=24, contrast_size=6, accumulate=4))
    with pytest.raises(InputError, match=r"stage1\.accumulate is 8: .* contrast_size = 6 samples; .* divisor of 4$"):
        Config(name="x", stage1=Stage1Config(batch_size=24, contrast_size=6, accumulate=8))


@pytest.mark.parametrize(
    ("precision", "platform", "dtypes"),
    [
        ("auto", "cpu", ("float32", "float32")),
        ("auto", "gpu", ("bfloat16", "bfloat16")),
        ("auto", "tpu", ("bfloat16", "bfloat16")),
        ("float32", "tpu", ("float32", "float32")),
        ("bfloat16", "cpu", ("bfloat16", "bfloat16")),
        (None, "gpu", ("float32", "bfloat16")),  # the models' own
    ],
)
def test_precision_is_what_both_models_compute_in(precision, platform, dtypes):
    given = Config(name="x", precision=precision, mapper=MapperConfig.small(dtype="bfloat16"))
    found = given.for_platform(platform)
    assert (found.brain_vae.dtype, found.mapper.dtype) == dtypes
    changed_fields = {line.split(":")[0] for line in found.differences(given)}
    assert changed_fields <= {"brain_vae.dtype", "mapper.dtype"}
    assert found.for_platform(platform) == found


def test_differences_list_every_changed_field_and_both_values():
    here = Config(name="x")
    there = dataclasses.replace(
        here,
        seed=4,
        data=DataConfig(test_runs=(1,)),
        stage1=Stage1Config(optimizer=OptimizerConfig(clip_norm=2.0, weight_decay=0.05)),
        mesh=MeshConfig(tensor=2),
    )
    assert here.differences(there) == [
        "seed: 0 here, 4 there",
        "data.test_runs: () here, (1,) there",
        "stage1.optimizer.clip_norm: None here, 2.0 there",
        "mesh.tensor: 1 here, 2 there",
    ]
    assert here.differences(here) == []


def test_sizes_that_are_zero_take_the_data_sets_and_others_must_equal_them():
    open_ = Config(
        name="x",
        brain_vae=BrainVAEConfig.small(latent_tokens=0, latent_dim=0),
        mapper=MapperConfig.small(tokens=0, width=0, heads=2),
    )
    sized = open_.for_tokens((5, 6))
    assert (sized.mapper.tokens, sized.mapper.width) == (5, 6)
    assert (sized.brain_vae.latent_tokens, sized.brain_vae.latent_dim) == (5, 6)
    assert {line.split(":")[0] for line in sized.differences(open_)} == {
        "brain_vae.latent_tokens",
        "brain_vae.latent_dim",
        "mapper.tokens",
        "mapper.width",
    }
    assert sized.for_tokens((5, 6)) is sized
    with pytest.raises(InputError, match=r"tokens are \[5, 7\] but the models are built for \[5, 6\]"):
        sized.for_tokens((5, 7))
    for odd in ((5, 7), (5, 9)):
        with pytest.raises(InputError, match="width"):
            open_.for_tokens(odd)


# ---- the paper preset and ours -------------------------------------------------------------------


def test_every_difference_between_paper_and_default_is_in_the_docs():
    paper, default = (exported(ROOT / "configs" / f"{name}.py") for name in ("paper", "default"))
    table = [line for line in (ROOT / "docs" / "released_system.md").read_text().splitlines() if line.startswith("| `")]
    documented = {name for line in table for name in re.findall(r"`([\w.]+)`", line.split("|")[1])}
    assert documented == {line.partition(":")[0] for line in paper.differences(default)} - {"name"}
