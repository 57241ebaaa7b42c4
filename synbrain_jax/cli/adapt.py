"""`synbrain adapt`: a trained system, for another brain."""

import shlex
import sys
import time
from pathlib import Path
from typing import Annotated

from etils import epath
from tyro.conf import arg

from synbrain_jax.config import AdaptationConfig, MeshConfig

_DEFAULT, _ALL_DEVICES = AdaptationConfig(), MeshConfig()


def adapt(
    source: Annotated[Path, arg(name="from")],
    data: Path,
    workdir: Path,
    settings: Annotated[AdaptationConfig, arg(name="")] = _DEFAULT,
    mesh: MeshConfig = _ALL_DEVICES,
) -> None:
    """Fine-tune a trained system to another brain, from little data; given again after a stop, it goes on.

    Writes into the workdir what train.py writes: a bundle, checkpoints and logs of both stages, scores, figures.

    Args:
        source: Bundle folder of the trained system.
        data: Folder of the new brain's prepared data set, with tokens of the same encoder.
        workdir: Folder for the results.
        settings: What is tuned, on how much data, and how.
        mesh: Devices along each mesh axis.
    """
    from synbrain_jax import adaptation
    from synbrain_jax.checkpoint import load_bundle
    from synbrain_jax.data.pairs import open_dataset
    from synbrain_jax.evaluation import write_evaluation
    from synbrain_jax.report import write_report
    from synbrain_jax.run import residuals_of
    from synbrain_jax.run_files import write_facts
    from synbrain_jax.sharding import make_mesh

    started = time.monotonic()
    devices = make_mesh(mesh.data, mesh.fsdp, mesh.tensor)
    system = adaptation.adapt(load_bundle(source), data, workdir, settings, devices)
    if system is not None:
        # The baselines learn from all of the little data, and do not need the held-out share.
        little = open_dataset(data).limited(settings.sessions, settings.stimuli)
        write_evaluation(system, little, workdir, residuals=residuals_of(epath.Path(workdir)))
        command = shlex.join(["synbrain", *sys.argv[1:]])
        write_facts(workdir, command, time.monotonic() - started, settings.seed)
        print(write_report(workdir))
