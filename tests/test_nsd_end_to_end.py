"""From the files of (simulated) NSD to a synthetic brain volume, all by the public commands.

What needs a trained model is slow; without it, test_studies trains on such files and scores what it trained.
"""

import json
import os
import shlex

import nibabel
import numpy as np
import pytest

from synbrain_jax import cli
from synbrain_jax.data.pairs import open_dataset

SIMULATED = shlex.split("""
    --subjects 2 --sessions 2 --stimuli 160 --voxels 60 --picture-size 8 --token-shape 4 8 --ncsnr 1.5 --nonlinear 0
""")
TRAINED = shlex.split("""
    --brain-vae.pool-length 32 --brain-vae.channels 4 --brain-vae.channel-mult 1 2 --brain-vae.projector-width 16
    --brain-vae.latent-tokens 0 --brain-vae.latent-dim 0 --mapper.tokens 0 --mapper.width 0 --mapper.depth 1
    --stage1.steps 300 --stage1.eval-every 150 --stage2.steps 100 --stage2.eval-every 50 --log-every 50
    --variability.folds 1 --variability.ranks 0 2 --variability.samples 200
""")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("end_to_end")


def command(capsys, *arguments: str | os.PathLike) -> str:
    cli.main([os.fspath(argument) for argument in arguments])
    return capsys.readouterr().out.strip()


@pytest.fixture(scope="module")
def prepared(folder):
    cli.main(["simulate", "nsd", "--out", os.fspath(folder / "sim"), *SIMULATED])
    where = [
        "--root",
        folder / "sim",
        "--subject",
        "2",
        "--data-dir",
        folder / "data",
        "--tokens",
        folder / "sim/tokens",
    ]
    cli.main(["prepare", "nsd", *map(os.fspath, where)])
    (prepared,) = (folder / "data/nsd").glob("subj02*/*")
    return prepared


@pytest.fixture(scope="module")
def trained(folder, prepared, train) -> str:
    """What the training printed."""
    source = ["--data.builder", "prepared", "--data.source", os.fspath(prepared)]
    return train("nsd_sim", *source, "--workdir", os.fspath(folder / "run"), *TRAINED)


def truth(folder):
    return np.load(folder / "sim/truth/subj02.npz")


def order_of(dataset, ijk):
    """For each voxel of the data set, its row in `ijk`."""
    place = {tuple(position): row for row, position in enumerate(ijk)}
    return [place[tuple(position)] for position in dataset.voxels.ijk]


def test_each_picture_gets_the_responses_to_itself(folder, prepared):
    dataset, known = open_dataset(prepared), truth(folder)
    response = known["response"][:, order_of(dataset, known["ijk"])]
    row_of = {str(picture): row for row, picture in enumerate(known["picture"])}
    seen = {}
    for split in ("train", "validation", "test"):
        records = dataset.records(split)
        for index in range(len(records)):
            assert records[index].fmri.shape == (3, len(known["ijk"]))
            seen[records[index].stimulus_id] = records[index].fmri.mean(axis=0)
    assert seen.keys() == row_of.keys()
    measured = np.stack([seen[name] for name in row_of])
    responds = known["ncsnr"][order_of(dataset, known["ijk"])] > 0.5
    r = [np.corrcoef(a, b)[0, 1] for a, b in zip(measured[:, responds].T, response[:, responds].T, strict=True)]
    assert min(r) > 0.5
    assert np.median(r) > 0.9
    assert set(dataset.stimulus_ids("test")) == {str(picture) for picture in known["picture"][:16]}
    np.testing.assert_allclose(dataset.voxels.ncsnr, known["ncsnr"][order_of(dataset, known["ijk"])], rtol=1e-5)


@pytest.mark.slow
def test_the_model_learns_what_can_be_known(folder, trained):
    scores = json.loads((folder / "run/report.json").read_text())["scores"]
    assert scores["mean_pattern"]["voxel_r_median"] < 0.1
    assert scores["model"]["voxel_r_median"] > 0.3
    assert scores["ridge"]["voxel_r_median"] > 0.8 * scores["noise_ceiling"]["voxel_r_median"]
    assert "noise_ceiling" in trained


@pytest.mark.slow
@pytest.mark.usefixtures("trained")
def test_pictures_become_volumes_of_the_subject(folder, prepared, capsys):
    model, volumes = folder / "run/bundle", folder / "synthetic.nii.gz"
    given = ["--tokens", folder / "sim/tokens", "--out", folder / "synthetic.npz", "--nifti", volumes]
    assert "synthetic.nii.gz" in command(capsys, "synthesize", "--model", model, *given)
    synthetic = np.load(folder / "synthetic.npz")
    assert list(synthetic["stimulus_id"]) == [str(picture) for picture in range(len(synthetic["fmri"]))]
    mask = nibabel.load(folder / "sim/nsddata/ppdata/subj02/func1pt8mm/roi/nsdgeneral.nii.gz")
    image = nibabel.load(volumes)
    assert image.shape == (*mask.shape, len(synthetic["fmri"]))
    np.testing.assert_array_equal(image.affine, mask.affine)
    inside = np.asarray(mask.dataobj) > 0
    assert not np.nan_to_num(image.get_fdata()[~inside]).any()
    dataset, known = open_dataset(prepared), truth(folder)
    np.testing.assert_array_equal(np.argwhere(inside), known["ijk"])
    in_volume = np.float32(image.get_fdata())[inside].T  # in the order of argwhere
    np.testing.assert_array_equal(in_volume[:, order_of(dataset, known["ijk"])], synthetic["fmri"][:, 0])
    # The volume shows what the subject's voxels would truly answer.
    shown = in_volume[known["picture"]]
    responds = known["ncsnr"] > 0.5
    r = [np.corrcoef(a, b)[0, 1] for a, b in zip(shown.T[responds], known["response"].T[responds], strict=True)]
    assert np.median(r) > 0.4


@pytest.mark.slow
@pytest.mark.usefixtures("trained")
def test_evaluating_again_gives_the_report_of_the_training(folder, prepared, capsys):
    table = command(capsys, "evaluate", "--model", folder / "run/bundle", "--data", prepared, "--out", folder / "again")
    assert "noise_ceiling" in table
    first, again = (json.loads((folder / name / "report.json").read_text())["scores"] for name in ("run", "again"))
    for row, expected in first.items():
        assert again[row] == pytest.approx(expected, rel=1e-3, abs=1e-4), row
