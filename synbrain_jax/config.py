"""What one run is: frozen, validated dataclasses, to and from JSON. `configs/*.py` hold one instance each."""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal

from synbrain_jax.errors import InputError
from synbrain_jax.models.brain_vae import BrainVAEConfig
from synbrain_jax.models.semantic_to_neural import MapperConfig


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which data set, and how its trials become training examples."""

    builder: Literal["haxby2001", "arrays", "nsd", "prepared"] = "haxby2001"
    """The packaged experiment, your own arrays, the Natural Scenes Dataset's files, or a data set that is already
    prepared."""
    source: str | None = None
    """arrays: an .npz file, or a folder of .npy files, with fmri, tokens, stimulus_id, run. nsd: the folder that has
    nsddata and nsddata_betas. prepared: its folder."""
    more_sources: tuple[str, ...] = ()
    """prepared: folders of further subjects, to train one model on all."""
    subjects: tuple[int, ...] = (1,)
    """nsd: whose brain, 1 to 8; one model is trained on all that are given."""
    tokens: str | None = None
    """arrays, nsd: a folder that `synbrain encode-images` wrote; arrays: where `source` has no tokens."""
    normalisation: Literal["none", "run_zscore", "session_zscore", "scale2000"] = "none"
    """arrays, nsd: leave the values as they are, z-score each voxel within each run (arrays) or session (nsd), or
    divide by 2000 (as the release does with the Natural Scenes Dataset's int16 betas)."""
    betas: str = "betas_fithrf_GLMdenoise_RR"
    """nsd: folder of the responses."""
    test: Literal["shared", "test515"] = "shared"
    """nsd: test on the pictures that all subjects were to see, or only on the 515 that all eight saw three times."""
    validation_share: float = 0.1
    """nsd: of the other pictures, held out for validation."""
    sessions: int | None = None
    """Learn from the first so many scan sessions alone; none: from all."""
    stimuli: int | None = None
    """Learn from the training stimuli that were presented first, so many of them; none: from all. The paper's hour is
    250."""
    test_runs: tuple[int, ...] = ()
    """arrays: runs held out for the test. Without runs and without a `split` array, a share of the stimuli is."""
    validation_runs: tuple[int, ...] = ()
    """arrays: runs held out for validation."""
    voxel_order: Literal["hilbert", "given"] = "hilbert"
    """Order of voxels at the model's door: along a space-filling curve, or as the data set has them."""
    permute: Literal["none", "trial"] = "none"
    """Control: with "trial", stimulus labels are permuted among the training trials, so that nothing can be learnt."""
    shift_test_tokens: int = 0
    """Control: at test, stimulus i gets the tokens of stimulus i + this."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter 2019), learning-rate schedule, gradient clipping and weight averaging."""

    learning_rate: float = 1e-4
    schedule: Literal["constant", "cosine"] = "constant"
    """Constant, or a half cosine to zero at the last step."""
    warmup_steps: int = 0
    """Steps of linear increase from zero."""
    weight_decay: float = 0.0
    clip_norm: float | None = None
    """Largest global gradient norm; None: no clipping."""
    ema_decay: float | None = None
    """Decay per step of the exponential moving average of the parameters, which is then the result; None: none."""


@dataclasses.dataclass(frozen=True)
class Stage1Config:
    """Training of BrainVAE: squared error + kl_weight x KL + clip_weight x soft-CLIP."""

    steps: int = 1000
    batch_size: int = 24
    accumulate: int = 1
    """Parts of a batch that are computed one after the other, for memory. soft-CLIP then contrasts within a part (or,
    with contrast_size, within the same groups as without), and each part draws its own latent noise."""
    optimizer: OptimizerConfig = OptimizerConfig(weight_decay=0.05)
    kl_weight: float = 0.001
    """Multiplies the KL (nats), against the sum of squared errors over voxels."""
    clip_weight: float = 1000 / 15724
    """Multiplies soft-CLIP: against the squared error per voxel, or with "sum" against its sum over voxels."""
    contrast_size: int | None = None
    """Samples among which soft-CLIP contrasts, in the batch's order; None: the whole batch, over all devices."""
    loss_scale: Literal["voxel", "sum"] = "voxel"
    """All terms divided by the number of voxels, so that one setting serves every subject; or their plain sum."""
    average_share: float = 0.0
    """Share of each batch that is the mean of several trials of one stimulus, so that means decode well."""
    eval_every: int = 100
    """Steps between validations; each writes a checkpoint."""
    stop_below: float | None = None
    """Ends the stage, without a checkpoint of that moment, when the mean training squared error since the last
    validation is below this: per voxel, or with loss_scale "sum" its sum over voxels. None: run all steps."""
    select: Literal["val/loss", "val/mse", "val/kl", "val/soft_clip", "last"] = "val/loss"
    """What picks the checkpoint: the smallest of this validation number, or "last"."""
    patience: int | None = None
    """Ends the stage after so many validations in a row that are worse than the best; None: run all steps."""
    start_from: str | None = None
    """A `last.pth` of the PyTorch release to go on from, with its weights, optimizer state and step; None: random."""


@dataclasses.dataclass(frozen=True)
class Stage2Config:
    """Training of the mapper against latents of the frozen BrainVAE."""

    steps: int = 1000
    batch_size: int = 24
    accumulate: int = 1
    """Parts of a batch that are computed one after the other, for memory; the gradient is that of the whole."""
    optimizer: OptimizerConfig = OptimizerConfig(clip_norm=1.0, ema_decay=0.99)
    target: Literal["stimulus_mean", "trial"] = "stimulus_mean"
    """Latents averaged over the trials of a stimulus and computed once (the same minimiser with less variance), or the
    latent of one trial per example, encoded in the step (as released)."""
    voxel_weight: float = 0.0
    """Adds this times the voxel MSE of the decoded prediction; for stimulus_mean targets."""
    eval_every: int = 100
    """Steps between validations; each writes a checkpoint."""
    select: Literal["val/mse", "val/pattern_r_centred", "val/voxel_r", "last"] = "val/pattern_r_centred"
    """What picks the checkpoint: the smallest mse or the largest correlation after decoding (mse favours predictions
    that are too small), or "last"."""
    patience: int | None = None
    """Ends the stage after so many validations in a row that are worse than the best; None: run all steps."""
    start_from: str | None = None
    """A `last.pt` of the PyTorch release, to go on from with its weights, their average, optimizer state and step."""


@dataclasses.dataclass(frozen=True)
class VariabilityConfig:
    """The distribution of real trials around the prediction, fitted after stage 2; see `variability.py`."""

    folds: int = 1
    """Which trials say how far predictions are off: 1, those of the validation split; more, all training trials, each
    predicted by a mapper that has not learnt from it (the mapper is trained so many times more, each time without one
    of so many parts); 0, none, and samples cannot be calibrated."""
    ranks: tuple[int, ...] = (0, 1, 2, 5, 10, 20, 40, 80)
    """Numbers of noise patterns to choose from, by held-out likelihood."""
    samples: int = 4000
    """Drawn of each distribution that is scored against held-out trials; with fewer, chance moves energy scores by more
    than distributions differ."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 in `data` takes all that are left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment: data, both models, both stages."""

    name: str
    seed: int = 0
    data: DataConfig = DataConfig()
    brain_vae: BrainVAEConfig = dataclasses.field(default_factory=BrainVAEConfig.small)
    mapper: MapperConfig = dataclasses.field(default_factory=MapperConfig.small)
    stage1: Stage1Config = Stage1Config()
    stage2: Stage2Config = Stage2Config()
    variability: VariabilityConfig = VariabilityConfig()
    mesh: MeshConfig = MeshConfig()
    precision: Literal["auto", "float32", "bfloat16"] | None = None
    """What both models compute in: "auto" is bfloat16 on GPUs and TPUs and float32 on CPUs; None: as brain_vae.dtype
    and mapper.dtype say. Parameters, optimizer, normalisation, softmax, losses and averages are float32 in any case."""
    calibrate: bool = True
    """Correct the decoded pattern by an offset per voxel (from training) and one gain (from validation)."""
    log_every: int = 20
    """Steps between logged training numbers, and between checks that the loss is finite."""

    def __post_init__(self):
        vae, mapper = self.brain_vae, self.mapper
        _require(
            (vae.latent_tokens, vae.latent_dim) == (mapper.tokens, mapper.width),
            f"brain_vae gives latents [{vae.latent_tokens}, {vae.latent_dim}] but mapper works on "
            f"[{mapper.tokens}, {mapper.width}]; they must be equal (0 everywhere: as the data set's tokens)",
        )
        for name, stage in (("stage1", self.stage1), ("stage2", self.stage2)):
            for field in ("steps", "batch_size", "accumulate", "eval_every"):
                _check(getattr(stage, field) >= 1, f"{name}.{field}", getattr(stage, field), "at least 1")
            _check(stage.patience is None or stage.patience >= 1, f"{name}.patience", stage.patience, "at least 1")
            divides = stage.batch_size % stage.accumulate == 0
            _check(
                divides, f"{name}.accumulate", stage.accumulate, f"a divisor of {name}.batch_size, {stage.batch_size}"
            )
            optimizer, at = stage.optimizer, f"{name}.optimizer"
            _check(optimizer.learning_rate > 0, f"{at}.learning_rate", optimizer.learning_rate, "above 0")
            _check(optimizer.warmup_steps >= 0, f"{at}.warmup_steps", optimizer.warmup_steps, "at least 0")
            _check(optimizer.weight_decay >= 0, f"{at}.weight_decay", optimizer.weight_decay, "at least 0")
            clip, decay = optimizer.clip_norm, optimizer.ema_decay
            _check(clip is None or clip > 0, f"{at}.clip_norm", clip, "above 0, or none")
            _check(decay is None or 0 <= decay < 1, f"{at}.ema_decay", decay, "0 to below 1, or none")
        for field in ("kl_weight", "clip_weight"):
            _check(getattr(self.stage1, field) >= 0, f"stage1.{field}", getattr(self.stage1, field), "at least 0")
        size, contrast, stop = self.stage1.batch_size, self.stage1.contrast_size, self.stage1.stop_below
        divides = contrast is None or (contrast >= 1 and size % contrast == 0)
        _check(divides, "stage1.contrast_size", contrast, f"a divisor of stage1.batch_size, {size}, or none")
        accumulate = self.stage1.accumulate
        _require(
            size % (accumulate * (contrast or 1)) == 0,
            f"stage1.accumulate is {accumulate}: its parts of the batch of {size} would cut groups of contrast_size = "
            f"{contrast} samples; expected a divisor of {size // (contrast or 1)}",
        )
        _check(stop is None or stop > 0, "stage1.stop_below", stop, "above 0, or none")
        _require(
            self.stage2.start_from is None or self.stage1.start_from is not None,
            "stage2.start_from is given but stage1.start_from is not; a mapper is of use only with the BrainVAE whose "
            "latents it was trained on: give both (and stage1.steps 1 to take that BrainVAE as it is)",
        )
        _check(0 <= self.stage1.average_share <= 1, "stage1.average_share", self.stage1.average_share, "0 to 1")
        _check(self.stage2.voxel_weight >= 0, "stage2.voxel_weight", self.stage2.voxel_weight, "at least 0")
        ranks = self.variability.ranks
        _check(self.variability.folds >= 0, "variability.folds", self.variability.folds, "at least 0")
        _check(self.variability.samples >= 2, "variability.samples", self.variability.samples, "at least 2")
        _check(len(ranks) > 0 and min(ranks, default=0) >= 0, "variability.ranks", ranks, "one or more, at least 0")
        _check(0 <= self.seed < 2**31, "seed", self.seed, "0 to 2**31 - 1")
        _check(self.log_every >= 1, "log_every", self.log_every, "at least 1")

    def for_tokens(self, shape: tuple[int, int]) -> "Config":
        """This config for a data set with tokens [t, d]: sizes that are 0 take the data set's.

        Raises InputError where a size is given and differs.
        """
        given = (self.mapper.tokens, self.mapper.width)
        if given == (0, 0):
            brain_vae = dataclasses.replace(self.brain_vae, latent_tokens=shape[0], latent_dim=shape[1])
            mapper = dataclasses.replace(self.mapper, tokens=shape[0], width=shape[1])
            return dataclasses.replace(self, brain_vae=brain_vae, mapper=mapper)
        if given != tuple(shape):
            raise InputError(
                f"the data set's tokens are [{shape[0]}, {shape[1]}] but the models are built for [{given[0]}, "
                f"{given[1]}]; set mapper.tokens and brain_vae.latent_tokens to {shape[0]}, mapper.width and "
                f"brain_vae.latent_dim to {shape[1]}, or all four to 0"
            )
        return self

    def for_platform(self, platform: str) -> "Config":
        """This config for "cpu", "gpu" or "tpu": both models' types are what `precision` means there."""
        if self.precision is None:
            return self
        dtype = self.precision if self.precision != "auto" else "float32" if platform == "cpu" else "bfloat16"
        brain_vae, mapper = (dataclasses.replace(model, dtype=dtype) for model in (self.brain_vae, self.mapper))
        return dataclasses.replace(self, brain_vae=brain_vae, mapper=mapper)

    def to_json(self) -> str:
        """JSON text with every field."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "Config":
        """The config of a JSON text. Missing fields take their defaults; an unknown one is an InputError."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"the configuration is not valid JSON: {error}") from error
        return _parse(cls, values, "config")

    def differences(self, other: "Config") -> list[str]:
        """One line per field in which two configs differ: "stage1.steps: 400 here, 300 there"."""
        here, there = _flatten(dataclasses.asdict(self)), _flatten(dataclasses.asdict(other))
        return [f"{k}: {here.get(k)!r} here, {there.get(k)!r} there" for k in here if here.get(k) != there.get(k)]


@dataclasses.dataclass(frozen=True)
class AdaptationConfig:
    """How a trained system is fine-tuned to another brain; what is not said here is as in its training."""

    part: Literal["mlp", "attn", "all", "lora"] = "mlp"
    """Of the mapper: the MLPs of its blocks, their attention, all parameters, or low-rank changes of the kernels of
    MLPs and attention."""
    lora_rank: int = 4
    """Of these changes."""
    sessions: int | None = None
    """Learn from the new person's first so many scan sessions; none: from all."""
    stimuli: int | None = None
    """Learn from the training stimuli presented first, so many of them; none: from all."""
    validation_share: float = 0.1
    """Of these stimuli, held out for validation; the data set's own validation split is not used."""
    brain_vae_steps: int | None = None
    """At most; none: as many as the source was trained."""
    mapper_steps: int | None = None
    """At most; none: as many as the source was trained."""
    brain_vae_rate: float = 0.5
    """Learning rate, times the source's."""
    readout_weight: float = 4.0
    """In BrainVAE's loss, of the squared error per voxel of what it decodes from the source mapper's latents; its own
    reconstructions have 1. At 0, as in SynBrain, its latents may move away from those that the mapper has learnt."""
    mapper_rate: float = 1.0
    """Learning rate, times the source's."""
    eval_every: int | None = None
    """Steps between validations; none: as the source's."""
    patience: int | None = 3
    """Ends a stage after so many validations in a row that are worse than the best; none: run all steps."""
    seed: int = 0

    def __post_init__(self):
        for field in ("lora_rank", "brain_vae_steps", "mapper_steps", "eval_every", "patience"):
            value = getattr(self, field)
            _check(value is None or value >= 1, field, value, "at least 1")
        for field in ("brain_vae_rate", "mapper_rate"):
            _check(getattr(self, field) > 0, field, getattr(self, field), "above 0")
        _check(self.readout_weight >= 0, "readout_weight", self.readout_weight, "at least 0")


def nearest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean 'x'?" if something known resembles `name`, else the list of what is known."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def _check(condition: bool, field: str, given: Any, expected: str) -> None:
    _require(condition, f"{field} is {given}; expected {expected}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def _flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _parse(kind: Any, value: Any, field: str) -> Any:
    """`value`, as it came from JSON, as the annotated type `kind`; errors name the field by its dotted path."""
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        _require(isinstance(value, dict), f"{field} is {value!r}; expected an object with fields")
        hints = typing.get_type_hints(kind)
        for key in value.keys() - hints.keys():
            raise InputError(f"{field}.{key} is not a known setting{nearest(key, hints)}")
        try:
            return kind(**{key: _parse(hints[key], item, f"{field}.{key}") for key, item in value.items()})
        except TypeError as error:
            raise InputError(f"{field}: {error}") from error
    if origin is Literal:
        _require(value in options, f"{field} is {value!r}; expected one of {', '.join(map(repr, options))}")
        return value
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _parse(next(o for o in options if o is not types.NoneType), value, field)
    if origin is tuple:
        _require(isinstance(value, list | tuple), f"{field} is {value!r}; expected a list")
        return tuple(_parse(options[0], item, f"{field}[{i}]") for i, item in enumerate(value))
    accepted = (int, float) if kind is float else kind
    valid = isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))
    _require(valid, f"{field} is {value!r}; expected {kind.__name__}")
    return float(value) if kind is float else value
