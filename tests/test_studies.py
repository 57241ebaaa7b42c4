"""Every study from simulated files to its page, by the commands, in two minutes: `--quick`, two seeds, tiny models."""

import dataclasses
import json
import shlex
from pathlib import Path

import pytest
import tiny
from etils import epath

from synbrain_jax import cli, run
from synbrain_jax.checkpoint import Bundle, save_bundle
from synbrain_jax.document import load
from synbrain_jax.errors import InputError
from synbrain_jax.studies.common import Settings, homes, trained

SIMULATED = shlex.split("""
    --subjects 2 --sessions 2 --stimuli 120 --voxels 60 --picture-size 8 --token-shape 4 8 --ncsnr 1.5 --nonlinear 0
""")
TINY = """
    brain_vae.pool_length=32 brain_vae.channels=4 brain_vae.channel_mult=[2] brain_vae.projector_width=16
    brain_vae.latent_tokens=0 brain_vae.latent_dim=0 mapper.tokens=0 mapper.width=0 mapper.depth=1
    stage1.steps=30 stage1.eval_every=15 stage2.steps=30 stage2.eval_every=15 variability.folds=2
    variability.ranks=[0,2] variability.samples=200 data.subjects=[1,2]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("studies")
    cli.main(["simulate", "nsd", "--out", str(folder / "sim"), *SIMULATED])
    return folder


def experiment(folder: Path, study: str, *options: str) -> None:
    changes = [*shlex.split(TINY), f"data.source={folder / 'sim'}", f"data.tokens={folder / 'sim' / 'tokens'}"]
    where = ["--workdir", str(folder / "studies"), "--seeds", "0", "1", "--quick"]
    cli.main(["experiment", study, "nsd_sim", "--change", *changes, *where, *options])


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


@pytest.mark.slow
def test_every_study_ends_with_a_page_and_needs_nothing_twice(folder, capsys, monkeypatch):
    for study in ("encode", "adapt", "augment", "consistency"):
        experiment(folder, study)
        document = load(folder / "studies" / f"{study}-nsd_sim")
        assert document.claims
        assert any(section.tables for section in document.sections)
        assert document.facts["seeds"] == "0, 1"
        assert f"synbrain experiment {study} nsd_sim" in document.facts["command"]
        page = (folder / "studies" / f"{study}-nsd_sim" / "report.html").read_text()
        assert all(claim.text.split()[0] in page for claim in document.claims)
        for figure in document.figures:
            assert (folder / "studies" / f"{study}-nsd_sim" / f"{figure.name}.png").stat().st_size > 5000
    capsys.readouterr()

    def trains(*arguments):
        raise AssertionError("trained again")

    monkeypatch.setattr(run, "fit", trains)
    experiment(folder, "encode")
    experiment(folder, "consistency")

    cli.main(["report", *map(str, sorted((folder / "studies").glob("*-nsd_sim"))), "--out", str(folder / "page")])
    page = (folder / "page" / "report.html").read_text()
    markdown = (folder / "page" / "report.md").read_text()
    for study in ("Encoding", "Adaptation", "Augmentation", "Consistency"):
        assert study in page
        assert study in markdown


@pytest.mark.slow
def test_what_the_encoding_study_found_is_what_evaluation_reported(folder):
    """The page's means over seeds, against the reports of the systems that it trained."""
    reports = [
        json.loads(path.read_text()) for path in (folder / "studies" / "systems").rglob("nsd-subj01/report.json")
    ]
    reports = [report for report in reports if "calibration" in report]
    assert len(reports) == 2
    document = load(folder / "studies" / "encode-nsd_sim")
    (prediction,) = [section for section in document.sections if section.title == "Scores, nsd-subj01"]
    table = prediction.tables[0]
    column = table.columns.index("pattern r centred")
    for name, row in (("model", "model, mean of 2 seeds"), ("kernel_ridge", "kernel ridge")):
        own = [report["scores"][name]["pattern_r_centred"] for report in reports]
        (found,) = [cells[column] for cells in table.rows if cells[0] == row]
        assert found.value == pytest.approx(sum(own) / 2, abs=1e-6)
        assert found.low < found.value < found.high
    (spread,) = [section for section in document.sections if section.title == "Variability, nsd-subj01"]
    calibrated = next(row for row in spread.tables[0].rows if row[0] == "calibrated")
    own = [report["calibration"]["rows"]["calibrated"]["variance_ratio"][1] for report in reports]
    assert calibrated[1] == pytest.approx(sum(own) / 2, abs=1e-9)
