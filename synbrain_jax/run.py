"""What one run does with its data, in the steps that `train.py` tells and the studies share.

Two stages of training, how far predictions of unseen trials are off, and the bundle with everything that synthesis
needs. Each step finds what it left on the disk before, so that a run goes on where it was.

Shape letters: n trials, v voxels, t tokens, d token width.
"""

import dataclasses
import os
from collections.abc import Sequence

import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int, PyTree
from sklearn.model_selection import GroupKFold

from synbrain_jax import stages
from synbrain_jax.checkpoint import Bundle, load_bundle, save_bundle
from synbrain_jax.config import Config
from synbrain_jax.data.pairs import Dataset, Trials, load_trials
from synbrain_jax.distributed import agreed, barrier, is_first, whole
from synbrain_jax.errors import InputError
from synbrain_jax.synthesis import SynBrain
from synbrain_jax.training import fit
from synbrain_jax.variability import fit_spread

HELD_OUT = "held_out"


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """Both models, and of each subject the spread of BrainVAE's posterior over its training trials."""

    params: dict  # {"brain_vae": ..., "mapper": ...}
    latent_stds: tuple[Float[np.ndarray, "t d"], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Residuals:
    """Trials less what was predicted for them by a system whose mapper had not learnt from them."""

    values: Float[np.ndarray, "n v"]  # float32, perhaps a memory map
    group: Int[np.ndarray, "n"]  # the run or stimulus that a trial belongs to


def train(
    config: Config,
    datasets: Sequence[Dataset],
    validation: Sequence[Trials],
    mesh: Mesh,
    workdir: str | os.PathLike,
) -> Trained:
    """Trains BrainVAE and the mapper, and the mappers that have not seen a part of the trials, as configured."""
    workdir, folds = epath.Path(workdir), config.variability.folds
    if folds > 1:  # after the training it would be late to say that there is too little to hold out
        for dataset in datasets:
            _fold(_group(dataset, load_trials(dataset, "train")), folds, 0)
    brain_vae = fit(stages.stage1(config, datasets, validation), config, mesh, workdir / "stage1")
    mapper, latent_stds = _train_mapper(config, datasets, validation, brain_vae, mesh, workdir)
    if folds > 1:
        _cross_fit(config, datasets, validation, brain_vae, mesh, workdir)
    return Trained(whole({"brain_vae": brain_vae, "mapper": mapper}), latent_stds)


def _train_mapper(
    config: Config,
    datasets: Sequence[Dataset],
    validation: Sequence[Trials],
    brain_vae: PyTree,
    mesh: Mesh,
    workdir: epath.Path,
) -> tuple[PyTree, tuple]:
    homes = stages.folders(workdir, datasets)
    encoded = [
        stages.encode_stimuli(config, dataset, brain_vae, home / "stage2")
        for dataset, home in zip(datasets, homes, strict=True)
    ]
    targets, latent_stds = zip(*encoded, strict=True)
    stage = stages.stage2(config, datasets, validation, brain_vae, targets)
    return fit(stage, config, mesh, workdir / "stage2"), latent_stds


# ---- how far predictions are off --------------------------------------------------------------------


def _cross_fit(
    config: Config,
    datasets: Sequence[Dataset],
    validation: Sequence[Trials],
    brain_vae: PyTree,
    mesh: Mesh,
    workdir: epath.Path,
) -> None:
    """Writes the `Residuals` of every training trial, each predicted by a mapper that has not learnt from it.

    BrainVAE is the run's own: it has seen all trials, but gives a stimulus's response back only from a latent, which
    for a held-out trial comes from its tokens.
    """
    homes = stages.folders(workdir, datasets)
    if agreed(all(_residuals_file(home).exists() for home in homes)):
        return
    groups = [_group(dataset, load_trials(dataset, "train")) for dataset in datasets]
    residuals = [np.empty((len(group), d.n_voxels), np.float32) for group, d in zip(groups, datasets, strict=True)]
    for number in range(config.variability.folds):
        masks = [_fold(group, config.variability.folds, number) for group in groups]
        parts = [dataset.moved(mask, HELD_OUT) for dataset, mask in zip(datasets, masks, strict=True)]
        at = workdir / "crossfit" / str(number)
        mapper, latent_stds = _train_mapper(config, parts, validation, brain_vae, mesh, at)
        trained = Trained(whole({"brain_vae": brain_vae, "mapper": mapper}), latent_stds)
        if is_first():
            for i, part in enumerate(parts):
                bundle = _corrected(config, trained, i, part, validation[i], mesh.local_mesh)
                system = SynBrain(bundle, mesh.local_mesh)
                residuals[i][masks[i]] = _off(system, load_trials(part, HELD_OUT))
        barrier()
    if is_first():
        for home, values, group in zip(homes, residuals, groups, strict=True):
            _save(home, Residuals(values, group))
        for number in range(config.variability.folds):
            (workdir / "crossfit" / str(number)).rmtree()
    barrier()


def _group(dataset: Dataset, trials: Trials) -> Int[np.ndarray, "n"]:
    """What is held out together: runs where the test's stimuli occur in training, stimuli where they do not.

    As training was split from test, so that the held-out predictions are as hard as those of the test.
    """
    known = set(dataset.stimulus_ids("train"))
    by_run = known.issuperset(dataset.stimulus_ids("test")) and len(np.unique(trials.run)) > 1
    return trials.run if by_run else trials.stimulus


def _fold(group: Int[np.ndarray, "n"], folds: int, number: int) -> Bool[np.ndarray, "n"]:
    count = len(np.unique(group))
    if count < folds:
        raise InputError(f"variability.folds is {folds}; expected at most {count}, the runs or stimuli to hold out")
    splits = GroupKFold(folds, shuffle=True, random_state=0).split(group, groups=group)
    mask = np.zeros(len(group), bool)
    mask[[held_out for _, held_out in splits][number]] = True
    return mask


def _off(system: SynBrain, trials: Trials) -> Float[np.ndarray, "n v"]:
    return trials.fmri - system.predict(trials.tokens)[trials.stimulus]


def _residuals_file(home: epath.Path) -> epath.Path:
    return home / "crossfit" / "residuals.npy"


def _save(home: epath.Path, residuals: Residuals) -> None:
    file = _residuals_file(home)
    file.parent.mkdir(parents=True, exist_ok=True)
    np.save(file.with_name("group.npy"), residuals.group)
    unfinished = file.with_name("unfinished.npy")
    np.save(unfinished, residuals.values)
    unfinished.replace(file)


def residuals_of(home: epath.Path) -> Float[np.ndarray, "n v"] | None:
    """Those of one subject's trials that a finished run keeps, a memory map; None if it has none."""
    residuals = _load(home)
    return None if residuals is None else residuals.values


def _load(home: epath.Path) -> Residuals | None:
    file = _residuals_file(home)
    if not file.exists():
        return None
    return Residuals(np.load(file, mmap_mode="r"), np.load(file.with_name("group.npy")))


# ---- everything that synthesis needs ----------------------------------------------------------------


def export(
    config: Config,
    trained: Trained,
    number: int,
    dataset: Dataset,
    validation: Trials,
    mesh: Mesh,
    home: epath.Path,
) -> SynBrain:
    """The system of subject `number`, saved as `home`/bundle: corrected, and with calibrated variability."""
    bundle = _corrected(config, trained, number, dataset, validation, mesh)
    if config.variability.folds == 1 and not _residuals_file(home).exists():
        _save(home, Residuals(_off(SynBrain(bundle, mesh), validation), _group(dataset, validation)))
    residuals = _load(home)
    if residuals is not None:
        bundle = _with_spread(bundle, residuals)
    save_bundle(home / "bundle", bundle)
    return SynBrain(load_bundle(home / "bundle"), mesh)


def calibrated(bundle: Bundle, dataset: Dataset, mesh: Mesh) -> Bundle:
    """`bundle`, however it came about, with the correction and the spread that a data set's held-out trials show.

    Offset from the training trials, gain and spread from the validation trials. Raises InputError for the data set of
    another brain, or where those trials are all of one stimulus.
    """
    if dataset.n_voxels != len(bundle.voxels.order):
        raise InputError(
            f"{dataset.path}: {dataset.n_voxels} voxels of {dataset.voxels.subject}, but the model synthesises "
            f"{len(bundle.voxels.order)} of {bundle.voxels.subject}; give the data set that it was trained on"
        )
    config = bundle.config
    plain = Bundle.uncorrected(config, bundle.params, dataset.voxels, dataset.name, bundle.latent_std)
    validation = load_trials(dataset, "validation")
    corrected = stages.corrected(plain, SynBrain(plain, mesh), load_trials(dataset, "train"), validation)
    residuals = Residuals(_off(SynBrain(corrected, mesh), validation), _group(dataset, validation))
    found = _with_spread(corrected, residuals)
    if found.spread is None:
        raise InputError(
            f"{dataset.path}: all {len(residuals.group)} validation trials are of one stimulus; how trials vary is "
            "learnt from at least 2: prepare the data set with more for validation"
        )
    return found


def _with_spread(bundle: Bundle, residuals: Residuals) -> Bundle:
    if len(np.unique(residuals.group)) < 2:  # nothing to choose the rank on
        return bundle
    config = bundle.config
    spread = fit_spread(residuals.values, residuals.group, config.variability.ranks, config.seed)
    return dataclasses.replace(bundle, spread=spread)


def _corrected(
    config: Config, trained: Trained, number: int, dataset: Dataset, validation: Trials, mesh: Mesh
) -> Bundle:
    bundle = Bundle.uncorrected(config, trained.params, dataset.voxels, dataset.name, trained.latent_stds[number])
    if not config.calibrate:
        return bundle
    return stages.corrected(bundle, SynBrain(bundle, mesh), load_trials(dataset, "train"), validation)
