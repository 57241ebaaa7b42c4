"""Every study from simulated files to its page, by the commands, in two minutes: `--quick`, tiny models."""

import dataclasses
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny
import xla_flags
from etils import epath

from synbrain_jax.checkpoint import Bundle, save_bundle
from synbrain_jax.document import load
from synbrain_jax.errors import InputError
from synbrain_jax.studies.common import Settings, homes, trained

ROOT = Path(__file__).parents[1]
SIMULATED = shlex.split("""
    --subjects 2 --sessions 2 --stimuli 120 --voxels 60 --picture-size 8 --token-shape 4 8 --ncsnr 1.5 --nonlinear 0
""")
TINY = """
    brain_vae.pool_length=32 brain_vae.channels=4 brain_vae.channel_mult=[2] brain_vae.projector_width=16
    brain_vae.latent_tokens=0 brain_vae.latent_dim=0 mapper.tokens=0 mapper.width=0 mapper.depth=1
    stage1.steps=12 stage1.eval_every=6 stage2.steps=12 stage2.eval_every=6 variability.folds=1
    variability.ranks=[0,2] variability.samples=200
"""
# The subjects of each study; one subject's system serves several.
ASKED = {"encode": "[1]", "adapt": "[1,2]", "augment": "[1,2]", "consistency": "[1,2]"}


# Without the checks of every call and with one device, as users run it: a third of the time.
PROGRAM = """
import json, sys
from synbrain_jax import cli
for command in json.loads(sys.argv[1]):
    cli.main(command)
"""


def run_commands(commands: Sequence[Sequence[str]]) -> None:
    command = [sys.executable, "-c", PROGRAM, json.dumps(commands)]
    done = subprocess.run(
        command,
        env={**os.environ, "XLA_FLAGS": xla_flags.quick()},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def experiment(folder: Path, study: str) -> list[str]:
    sim = folder / "sim"
    data = [f"data.source={sim}", f"data.tokens={sim / 'tokens'}", f"data.subjects={ASKED[study]}"]
    where = ["--workdir", str(folder / "studies"), "--seeds", "0", "--quick"]
    return ["experiment", study, "nsd_sim", "--change", *shlex.split(TINY), *data, *where]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All studies, done."""
    folder = tmp_path_factory.mktemp("studies")
    commands = [experiment(folder, study) for study in ASKED]
    run_commands([["simulate", "nsd", "--out", str(folder / "sim"), *SIMULATED], *commands])
    return folder


def test_a_system_of_other_measurements_of_the_same_stimuli_is_not_taken(tiny_dataset, tmp_path):
    config, voxels = tiny.config(), tiny_dataset.voxels
    settings = Settings(config, epath.Path(tmp_path))
    (home,) = homes(settings, 0, [tiny_dataset])
    save_bundle(
        home / "bundle", Bundle.uncorrected(config, tiny.random_params(config), voxels, tiny_dataset.name, None)
    )
    (system,) = trained(settings, 0, [tiny_dataset])
    assert system.bundle.dataset == tiny_dataset.name
    for other in (dataclasses.replace(voxels, ncsnr=voxels.ncsnr + 1), dataclasses.replace(voxels, ncsnr=None)):
        with pytest.raises(InputError, match="trained on other measurements of the same stimuli"):
            trained(settings, 0, [dataclasses.replace(tiny_dataset, voxels=other)])


def test_every_study_ends_with_a_page(folder):
    for study in ASKED:
        document = load(folder / "studies" / f"{study}-nsd_sim")
        assert document.claims
        assert any(section.tables for section in document.sections)
        assert document.facts["seeds"] == "0"
        assert f"synbrain experiment {study} nsd_sim" in document.facts["command"]
        page = (folder / "studies" / f"{study}-nsd_sim" / "report.html").read_text()
        assert all(claim.text.split()[0] in page for claim in document.claims)
        for figure in document.figures:
            assert (folder / "studies" / f"{study}-nsd_sim" / f"{figure.name}.png").stat().st_size > 5000


def test_studies_need_nothing_twice_and_make_one_page(folder):
    def written() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (folder / "studies" / "systems").rglob("*.*")}

    before = written()
    done = sorted(map(str, (folder / "studies").glob("*-nsd_sim")))
    again = [experiment(folder, study) for study in ("encode", "consistency")]
    run_commands([*again, ["report", *done, "--out", str(folder / "page")]])
    assert written() == before
    page = (folder / "page" / "report.html").read_text()
    markdown = (folder / "page" / "report.md").read_text()
    for study in ("Encoding", "Adaptation", "Augmentation", "Consistency"):
        assert study in page
        assert study in markdown


def test_what_the_encoding_study_found_is_what_evaluation_reported(folder):
    """The page, against the report of the system that it trained."""
    (path,) = (folder / "studies" / "systems").glob("*subj01*/seed0/report.json")
    report = json.loads(path.read_text())
    document = load(folder / "studies" / "encode-nsd_sim")
    (prediction,) = [section for section in document.sections if section.title == "Scores, nsd-subj01"]
    table = prediction.tables[0]
    column = table.columns.index("pattern r centred")
    for name in ("model", "kernel_ridge"):
        (found,) = [cells[column] for cells in table.rows if cells[0] == name.replace("_", " ")]
        assert found.value == pytest.approx(report["scores"][name]["pattern_r_centred"], abs=1e-6)
        assert found.low < found.value < found.high
    (spread,) = [section for section in document.sections if section.title == "Variability, nsd-subj01"]
    calibrated = next(row for row in spread.tables[0].rows if row[0] == "calibrated")
    assert calibrated[1] == pytest.approx(report["calibration"]["rows"]["calibrated"]["variance_ratio"][1], abs=1e-9)
    (truth,) = [section for section in document.sections if section.title == "Against the truth, nsd-subj01"]
    assert "simulated (latent dim 4, nonlinear 0, gain 1, ncsnr 1.5," in truth.text
