"""One model for several brains of different size: `train.py` on two subjects, from data to a bundle for each."""

import json
import os
import shlex
import signal

import jax
import numpy as np
import pytest
import tiny
from test_run import wait_for_step

from synbrain_jax.checkpoint import load_bundle
from synbrain_jax.config import DataConfig
from synbrain_jax.data import open_data, prepare_data
from synbrain_jax.data.arrays import prepare_arrays
from synbrain_jax.errors import InputError
from synbrain_jax.report import write_report

SMALL = shlex.split("""
    --brain-vae.pool-length 32 --brain-vae.channels 4 --brain-vae.channel-mult 2 --brain-vae.projector-width 16
    --mapper.depth 1 --log-every 2 --stage1.steps 16 --stage1.eval-every 4 --stage1.batch-size 8 --stage2.steps 12
    --stage2.eval-every 4 --stage2.batch-size 4 --variability.ranks 0 1 --variability.samples 100
""")


@pytest.fixture(scope="module")
def arguments(two_subjects) -> list[str]:
    first, second = (os.fspath(dataset.path) for dataset in two_subjects)
    return ["arrays", "--data.builder", "prepared", "--data.source", first, "--data.more-sources", second, *SMALL]


@pytest.fixture(scope="module")
def trained(arguments, train, tmp_path_factory):
    whole = tmp_path_factory.mktemp("subjects") / "whole"
    return whole, train(*arguments, "--workdir", os.fspath(whole))


@pytest.mark.slow  # a training in a process of its own
def test_two_brains_give_a_bundle_each(trained, two_subjects):
    whole, out = trained
    bundles = {}
    for dataset in two_subjects:
        subject = dataset.voxels.subject
        expected = load_bundle(whole / subject / "bundle")
        np.testing.assert_array_equal(expected.voxels.order, dataset.voxels.order)
        assert (expected.dataset, expected.offset.shape) == (dataset.name, (dataset.n_voxels,))
        report = json.loads((whole / subject / "report.json").read_text())
        assert (report["subject"], report["n_voxels"]) == (subject, dataset.n_voxels)
        assert report["scores"]["model"]["pattern_r"] != 0
        assert f"{whole}/{subject}/report.md" in out.splitlines()[-1]
        assert write_report(whole / subject) in out  # finds the curves of the stages that all share
        bundles[subject] = expected
    jax.tree.map(np.testing.assert_array_equal, *(bundle.params for bundle in bundles.values()))
    assert not np.array_equal(*(bundle.latent_std for bundle in bundles.values()))
    for stage in ("stage1", "stage2"):
        validated = [line for line in tiny.log_of(whole / stage) if "val/mse" in line]
        assert validated
        for line in validated:
            assert line["val/mse"] == pytest.approx((line["val/mse/tiny"] + line["val/mse/second"]) / 2)


@pytest.mark.slow  # two trainings in processes of their own
def test_a_killed_run_of_two_brains_ends_with_the_same_bits(
    trained, arguments, two_subjects, train, start_training, tmp_path
):
    whole, killed = trained[0], tmp_path / "killed"
    process = start_training(*arguments, "--workdir", os.fspath(killed))
    wait_for_step(process, killed / "stage1" / "metrics.jsonl", 6)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    train(*arguments, "--workdir", os.fspath(killed))
    for dataset in two_subjects:
        expected, resumed = (load_bundle(folder / dataset.voxels.subject / "bundle") for folder in (whole, killed))
        jax.tree.map(np.testing.assert_array_equal, resumed.params, expected.params)
        np.testing.assert_array_equal(resumed.offset, expected.offset)
        assert resumed.gain == expected.gain
    for stage in ("stage1", "stage2"):
        assert tiny.log_of(killed / stage) == tiny.log_of(whole / stage)


def test_subjects_that_do_not_go_together_are_named(two_subjects, tmp_path):
    first = os.fspath(two_subjects[0].path)
    with pytest.raises(InputError, match="the subjects are tiny, tiny; each must come once"):
        open_data(DataConfig(builder="prepared", source=first, more_sources=(first,)), tmp_path)
    tiny.write_experiment(tmp_path / "other.npz", token_count=3)
    other = os.fspath(prepare_arrays(tmp_path / "other.npz", tmp_path, name="other"))
    with pytest.raises(InputError, match=r"tokens are \[3, 8\], but \[4, 8\] in .*one model needs the same encoder"):
        open_data(DataConfig(builder="prepared", source=first, more_sources=(other,)), tmp_path)


def test_limits_hold_for_every_subject(two_subjects, tmp_path):
    first, second = (os.fspath(dataset.path) for dataset in two_subjects)
    limited = open_data(DataConfig(builder="prepared", source=first, more_sources=(second,), stimuli=4), tmp_path)
    assert [len(dataset.stimulus_ids("train")) for dataset in limited] == [4, 4]
    assert [len(dataset.stimulus_ids("test")) for dataset in limited] == [9, 5]


def test_what_nsd_needs_is_asked_for(tmp_path):
    for settings, message in (
        (dict(), "needs the folder that has nsddata and nsddata_betas: --data.source PATH"),
        (dict(source="nsd"), r"data.tokens is not given; .* from nsd_stimuli.hdf5: --data.tokens PATH"),
        (dict(source="nsd", tokens="tokens", subjects=()), "data.subjects is empty"),
    ):
        with pytest.raises(InputError, match=message):
            prepare_data(DataConfig(builder="nsd", **settings), tmp_path)
