"""The simulated experiment, read with nothing but nibabel, SciPy and h5py, against the truth that it states."""

import json
import sys
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
import scipy.io
import scipy.optimize
import scipy.spatial

from synbrain_jax import cli
from synbrain_jax.data import simulate, simulated_brain
from synbrain_jax.data.pictures import open_pictures
from synbrain_jax.data.simulate import simulate_nsd
from synbrain_jax.data.simulated_brain import Simulation
from synbrain_jax.data.tokens import open_tokens
from synbrain_jax.errors import InputError

SETTINGS = dict(subjects=2, sessions=2, stimuli=400, voxels=120, picture_size=16)
TINY = dict(subjects=2, sessions=2, stimuli=30, voxels=30, picture_size=8, token_shape=(2, 3))
BETAS = "betas_fithrf_GLMdenoise_RR"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return Path(simulate_nsd(tmp_path_factory.mktemp("simulated") / "nsd", **SETTINGS))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return Path(simulate_nsd(tmp_path_factory.mktemp("simulated") / "nsd", **TINY, missing_sessions=1))


def truth_of(root, subject):
    return np.load(root / "truth" / f"subj{subject:02d}.npz")


def volume(root, subject, name):
    return nibabel.load(root / f"nsddata/ppdata/subj{subject:02d}/func1pt8mm/roi/{name}.nii.gz")


def design_of(root):
    return scipy.io.loadmat(root / "nsddata/experiments/nsd/nsd_expdesign.mat")


def betas_of(root, subject, session):
    """The voxels of interest [trials, voxels] in percent signal change."""
    folder = root / f"nsddata_betas/ppdata/subj{subject:02d}/func1pt8mm" / BETAS
    inside = volume(root, subject, "nsdgeneral").get_fdata() > 0
    stored = np.asarray(nibabel.load(folder / f"betas_session{session:02d}.nii.gz").dataobj)
    assert stored.dtype == np.int16
    return stored[inside].T / 300


def trials_of(root, session):
    """Which trials of the experiment a session has."""
    ends = design_of(root)["stimpattern"].sum(axis=(1, 2)).cumsum().astype(int)
    return slice(ends[session - 2] if session > 1 else 0, ends[session - 1])


def standardised(values):
    return (values - values.mean(axis=0)) / values.std(axis=0, ddof=1)


def three_presentations(root, subject):
    """Session-z-scored responses [pictures, 3, voxels]."""
    order = design_of(root)["masterordering"][0].astype(int) - 1
    responses = np.concatenate([standardised(betas_of(root, subject, session)) for session in (1, 2)])
    return np.stack([responses[order == picture] for picture in range(order.max() + 1)])


# ---- the truth -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subject", [1, 2])
def test_the_planted_noise_ceiling_is_found_in_the_betas(root, subject):
    noise = np.sqrt(three_presentations(root, subject).var(axis=1, ddof=1).mean(axis=0))
    found = np.sqrt(np.maximum(0, 1 - noise**2)) / noise
    file = root / f"nsddata_betas/ppdata/subj{subject:02d}/func1pt8mm" / BETAS / "ncsnr.nii.gz"
    ratios = nibabel.load(file).get_fdata()
    inside = volume(root, subject, "nsdgeneral").get_fdata() > 0
    planted = ratios[inside]
    np.testing.assert_allclose(planted, truth_of(root, subject)["ncsnr"], rtol=1e-6)
    assert not ratios[~inside].any()
    assert np.median(planted) == pytest.approx(0.6, abs=1e-6)
    assert planted.min() < 0.15 < 1.1 < planted.max()
    ceiling, expected = found**2 / (found**2 + 1 / 3), planted**2 / (planted**2 + 1 / 3)
    assert abs(np.mean(ceiling - expected)) < 0.02
    assert abs(np.median(ceiling) - np.median(expected)) < 0.02
    assert np.sqrt(np.mean((ceiling - expected) ** 2)) < 0.06


@pytest.mark.parametrize("subject", [1, 2])
def test_the_true_response_correlates_with_the_measured_means_as_stated(root, subject):
    known, shared = truth_of(root, subject), design_of(root)["sharedix"].size
    measured = three_presentations(root, subject)[:shared].mean(axis=1)
    responds = known["ncsnr"] > 0
    true = standardised(known["response"][:shared, responds])
    r = (true * standardised(measured[:, responds])).sum(axis=0) / (shared - 1)
    assert np.mean(r) == pytest.approx(np.mean(known["ceiling_r"][responds]), abs=0.02)
    assert known["ceiling_r"][~responds].max(initial=0) < 1e-9
    stated = json.loads((root / "truth/truth.json").read_text())["subjects"][f"subj{subject:02d}"]
    assert stated["ceiling_r_median"] == pytest.approx(np.median(known["ceiling_r"]))
    assert stated["ceiling_r_median"] == pytest.approx(np.median(r), abs=0.03)
    assert stated["voxels"] == len(known["ijk"])
    assert stated["shared_pictures_seen"] == shared == 40


@pytest.mark.parametrize("subject", [1, 2])
def test_the_noise_has_the_covariance_that_is_stated(root, subject):
    known = truth_of(root, subject)
    order = design_of(root)["masterordering"][0].astype(int) - 1
    noise = []
    for session in (1, 2):
        undrifted = (betas_of(root, subject, session) - known["offset"][session - 1]) / known["gain"][session - 1]
        noise.append(undrifted - known["response"][order[trials_of(root, session)]])
    noise = np.concatenate(noise)
    factor, diag = known["noise_factor"], known["noise_diag"]
    shared = (factor**2).sum(axis=1)
    np.testing.assert_allclose(shared / (shared + diag), 0.4)
    assert np.linalg.matrix_rank(factor) == 8
    # Whitened by what is stated, it is white: its eigenvalues lie within the Marchenko-Pastur law.
    whitening = np.linalg.inv(np.linalg.cholesky(factor @ factor.T + np.diag(diag)))
    eigenvalues = np.linalg.eigvalsh(np.cov(whitening @ noise.T))
    ratio = np.sqrt(len(diag) / len(noise))
    assert (1 - ratio) ** 2 - 0.05 < eigenvalues[0]
    assert eigenvalues[-1] < (1 + ratio) ** 2 + 0.1
    assert np.diff(np.linalg.eigvalsh(np.corrcoef(noise.T))[-9:-7]) > 0.5  # the eighth stands out


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_the_linear_share_of_the_response(share):
    settings = Simulation(nonlinear=share, voxels=100)
    latent = np.random.default_rng(0).normal(size=(4000, 4))
    known = simulated_brain.true_responses(settings, 1, simulated_brain.anatomy(settings, 1).template, latent)
    response = known.response[:, known.ncsnr > 0]
    basis = np.concatenate([np.ones((len(latent), 1)), latent], axis=1)
    residual = response - basis @ np.linalg.lstsq(basis, response, rcond=None)[0]
    unexplained = residual.var(axis=0) / response.var(axis=0)
    assert np.abs(unexplained - share).max() < (0.05 if share else 1e-9)


def test_the_variance_over_the_pictures_is_what_ncsnr_says(root):
    known = truth_of(root, 1)
    noise = (known["noise_factor"] ** 2).sum(axis=1) + known["noise_diag"]
    np.testing.assert_allclose(known["response"].std(axis=0) / np.sqrt(noise), known["ncsnr"], rtol=1e-4, atol=1e-5)


def test_subjects_share_their_maps_but_not_their_voxels(root):
    first, second = truth_of(root, 1), truth_of(root, 2)
    one, two = (standardised(known["response"][:40] + 1e-9) for known in (first, second))
    reliable = first["ncsnr"] > 0.2
    nearest = scipy.spatial.KDTree(second["template"]).query(first["template"])[1]
    at_place = (one * two[:, nearest])[:, reliable].mean()
    fewer = min(one.shape[1], two.shape[1])
    at_index = (one[:, :fewer] * two[:, :fewer])[:, reliable[:fewer]].mean()
    assert one.shape[1] != two.shape[1]
    assert 0.5 < at_place < 0.9  # the same but for a share of their own
    assert at_index < 0.6 * at_place


def test_weights_are_smooth_over_the_volume(root):
    known = truth_of(root, 1)
    reliable = known["ncsnr"] > 0.2
    similar = np.corrcoef(known["response"][:, reliable].T)
    distance = scipy.spatial.distance.cdist(known["ijk"][reliable], known["ijk"][reliable])
    assert similar[distance == 1].mean() > 0.8
    assert similar[distance == 1].mean() > similar[distance > 5].mean() + 0.4


# ---- the layout ------------------------------------------------------------------------------------------------------


def test_every_picture_comes_three_times_and_never_twice_in_a_run(root):
    found = design_of(root)
    order = found["masterordering"][0]
    assert found["masterordering"].shape == (1, 1200)
    np.testing.assert_array_equal(np.unique(order, return_counts=True), [np.arange(1, 401), np.full(400, 3)])
    pattern = found["stimpattern"]
    assert pattern.shape == (2, 12, 75)
    assert set(np.unique(pattern)) == {0, 1}
    np.testing.assert_array_equal(pattern.sum(axis=2), 50)
    for pictures in np.split(order, 24):
        assert len(set(pictures)) == 50


def test_a_tenth_of_the_pictures_is_shown_to_all_and_the_rest_to_one(root):
    found = design_of(root)
    shared, shown = found["sharedix"][0], found["subjectim"]
    assert shown.shape == (2, 400)
    np.testing.assert_array_equal(shown[:, :40], [shared, shared])
    np.testing.assert_array_equal(shared, np.sort(shared))
    assert len(np.unique(shown)) == 40 + 2 * 360
    pictures = open_pictures(root / "nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5")
    assert 1 <= shown.min() < shown.max() <= len(pictures)
    assert len(pictures) > 760  # some nobody sees
    for subject in (1, 2):
        np.testing.assert_array_equal(truth_of(root, subject)["picture"], shown[subject - 1] - 1)


def test_sessions_of_unequal_size_are_filled_as_evenly_as_possible():
    trials = simulate.design(Simulation(stimuli=25, sessions=4)).trials
    assert trials.shape == (4, 12)
    np.testing.assert_array_equal(trials.sum(axis=1), [19, 19, 19, 18])
    assert set(trials[0]) == {1, 2}
    assert list(simulate.design(Simulation(stimuli=1250)).trials[0]) == [63, 62] * 6  # as in NSD


@pytest.mark.parametrize("subject", [1, 2])
def test_volumes_agree_and_hold_the_codes_of_nsd(root, subject):
    general = volume(root, subject, "nsdgeneral")
    codes = general.get_fdata()
    assert set(np.unique(codes)) == {-1, 0, 1}
    np.testing.assert_array_equal(np.argwhere(codes > 0), truth_of(root, subject)["ijk"])
    np.testing.assert_array_equal(general.header.get_zooms(), np.float32([1.8, 1.8, 1.8]))
    folder = root / f"nsddata/freesurfer/subj{subject:02d}/label"
    for atlas, named in (("streams", "ventral"), ("prf-visualrois", "V1v"), ("floc-faces", "OFA")):
        labels, left, right = (volume(root, subject, side + atlas) for side in ("", "lh.", "rh."))
        np.testing.assert_array_equal(labels.affine, general.affine)
        values = labels.get_fdata()
        table = dict(line.split() for line in (folder / f"{atlas}.mgz.ctab").read_text().splitlines())
        assert table["0"] == "Unknown"
        assert named in table.values()
        assert {str(int(value)) for value in np.unique(values)} <= table.keys() | {"-1"}
        assert (values[codes > 0] > 0).any()
        np.testing.assert_array_equal(values == -1, codes == -1)
        np.testing.assert_array_equal(np.maximum(left.get_fdata(), right.get_fdata()), values)
    assert (volume(root, subject, "streams").get_fdata()[codes > 0] > 0).all()


def test_volumes_of_subjects_differ(root):
    assert volume(root, 1, "nsdgeneral").shape != volume(root, 2, "nsdgeneral").shape


def test_regions_lie_where_their_names_say(root):
    label = volume(root, 1, "streams").get_fdata()
    inside = tuple(truth_of(root, 1)["ijk"].T)
    template, value = truth_of(root, 1)["template"], label[inside]
    mean = {name: template[value == number].mean(axis=0) for number, name in ((1, "early"), (5, "ventral"), (7, "up"))}
    assert mean["early"][1] < mean["ventral"][1]
    assert mean["ventral"][2] < mean["early"][2] < mean["up"][2]
    faces = template[volume(root, 1, "floc-faces").get_fdata()[inside] > 0]
    assert (faces[:, 2] < 0).all()


def test_betas_have_the_size_of_percent_signal_changes(root):
    measured = betas_of(root, 1, 1)
    assert 1 < measured.std(axis=0).mean() < 4
    assert 0 < measured.mean() < 3
    known = truth_of(root, 1)
    assert 0.02 < np.log(known["gain"]).std() < 0.2
    assert np.abs(known["offset"][0] - known["offset"][1]).mean() > 0.2


def test_hdf5_betas_are_the_nifti_ones_with_the_axes_reversed(tiny, tmp_path):
    other = simulate_nsd(tmp_path / "nsd", **TINY, missing_sessions=1, betas_format="hdf5")
    name = f"nsddata_betas/ppdata/subj01/func1pt8mm/{BETAS}/betas_session02"
    with h5py.File(other / f"{name}.hdf5") as file:
        assert file["betas"].dtype == np.int16
        reversed_axes = np.asarray(nibabel.load(tiny / f"{name}.nii.gz").dataobj).T
        np.testing.assert_array_equal(file["betas"], reversed_axes)


def test_a_subject_may_miss_the_last_sessions(tiny):
    folder = tiny / "nsddata_betas/ppdata"
    files = {subject: len(list(folder.glob(f"subj{subject:02d}/*/*/betas_session*"))) for subject in (1, 2)}
    assert files == {1: 2, 2: 1}
    assert [truth_of(tiny, subject)["gain"].shape[0] for subject in (1, 2)] == [2, 1]
    order = design_of(tiny)["masterordering"][0][trials_of(tiny, 1)]
    shared, trials = np.unique(order[order <= 3], return_counts=True)
    known = truth_of(tiny, 2)
    signal = known["response"][shared.astype(int) - 1].var(axis=0)
    noise = (known["noise_factor"] ** 2).sum(axis=1) + known["noise_diag"]
    np.testing.assert_allclose(known["ceiling_r"], np.sqrt(signal / (signal + noise * np.mean(1 / trials))), atol=1e-4)
    stated = json.loads((tiny / "truth/truth.json").read_text())["subjects"]["subj02"]
    assert (stated["sessions"], stated["shared_pictures_seen"]) == (1, len(trials))


# ---- pictures and tokens ---------------------------------------------------------------------------------------------


def test_tokens_carry_the_latent(root):
    stored, known = open_tokens(root / "tokens"), truth_of(root, 1)
    pictures = open_pictures(root / "nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5")
    assert stored.stimulus_id == pictures.names
    assert stored.tokens.shape == (len(pictures), 12, 32)
    tokens, latent = stored.tokens[known["picture"]], known["latent"]
    for place in ((0, 0), (11, 31)):
        fit = scipy.optimize.least_squares(
            lambda weights, values: np.tanh(latent @ weights) - values, np.zeros(4), args=(tokens[:, *place],)
        )
        assert fit.fun.std() == pytest.approx(0.1, abs=0.01)
        assert np.linalg.norm(fit.x) > 0.2


def test_pictures_show_the_latent():
    rng = np.random.default_rng(0)
    hue = rng.normal(size=300)
    pictures = [simulate.draw_picture(np.array([value, *rng.normal(size=3)]), 16, rng) for value in hue]
    colours = np.stack([picture.mean(axis=(0, 1)) for picture in pictures])
    basis = np.concatenate([np.ones((300, 1)), colours], axis=1)
    angle = 0.8 * np.pi * np.tanh(hue / 1.5)
    shown = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    residual = shown - basis @ np.linalg.lstsq(basis, shown, rcond=None)[0]
    assert (1 - residual.var(axis=0) / shown.var(axis=0)).min() > 0.6
    for other in range(4):
        latent = np.zeros(4)
        latent[other] = 1.5
        drawn = simulate.draw_picture(latent, 32, np.random.default_rng(1)).astype(int)
        plain = simulate.draw_picture(np.zeros(4), 32, np.random.default_rng(1)).astype(int)
        assert np.abs(drawn - plain).mean() > 5, other
    assert simulate.draw_picture(np.zeros(1), 8, rng).shape == (8, 8, 3)


# ---- same settings, same data; errors --------------------------------------------------------------------------------


def test_the_same_settings_give_the_same_data(tiny, tmp_path):
    again = Path(simulate_nsd(tmp_path / "again", **TINY, missing_sessions=1))
    files = sorted(path.relative_to(tiny) for path in tiny.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert len(files) > 30
    for file in files:
        if file.suffix == ".mat":  # its header tells the time
            one, two = (scipy.io.loadmat(folder / file) for folder in (tiny, again))
            assert all(np.array_equal(one[name], two[name]) for name in one if not name.startswith("__"))
        else:
            assert (tiny / file).read_bytes() == (again / file).read_bytes(), file
    other = simulate_nsd(tmp_path / "other", **TINY, missing_sessions=1, seed=1)
    for name in ("response", "ncsnr", "noise_factor", "gain"):
        assert truth_of(tiny, 1)[name].shape == truth_of(other, 1)[name].shape
        assert not np.allclose(truth_of(tiny, 1)[name], truth_of(other, 1)[name]), name


def test_an_existing_folder_is_left_alone(tiny):
    before = sorted(tiny.rglob("*"))
    with pytest.raises(InputError, match="already exists"):
        simulate_nsd(tiny, **TINY)
    assert sorted(tiny.rglob("*")) == before


def test_what_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(simulate, "_write_betas", full)
    with pytest.raises(OSError, match="no space"):
        simulate_nsd(tmp_path / "nsd", **TINY)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["nibabel", "h5py"])
def test_a_missing_package_is_named(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"{package}.*pip install 'synbrain-jax\[nsd\]'"):
        simulate_nsd(tmp_path / "nsd", **TINY)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sessions": 1, "stimuli": 301}, "sessions is 1; expected 2 to 903 for 301 stimuli"),
        ({"sessions": 91}, "sessions is 91; expected 1 to 90 for 30 stimuli"),
        ({"stimuli": 19}, "stimuli is 19; expected at least 20"),
        ({"stimuli": 20, "sessions": 30, "missing_sessions": 29}, "stimuli is 20: subj02 sees 0 of the pictures"),
        ({"subjects": 0}, "subjects is 0; expected at least 1"),
        ({"subjects": 100}, "subjects is 100; expected at most 99"),
        ({"nonlinear": 1.5}, "nonlinear is 1.5; expected 0 to 1"),
        ({"own_tuning": -0.1}, "own_tuning is -0.1; expected 0 to 1"),
        ({"ncsnr": 0.0}, "ncsnr is 0.0; expected above 0"),
        ({"noise_shared": 1.0}, "noise_shared is 1.0; expected 0 to below 1"),
        ({"missing_sessions": 2}, "missing_sessions is 2; expected less than sessions"),
        ({"token_shape": (0, 3)}, r"token_shape is \(0, 3\); expected two positive numbers"),
        ({"noise_rank": 16}, "noise_rank is 16; expected at most half of voxels"),
        ({"voxels": 5}, "voxels is 5; expected at least 20"),
    ],
)
def test_settings_out_of_range_are_named(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        simulate_nsd(tmp_path / "nsd", **{**TINY, **changes})
    assert list(tmp_path.iterdir()) == []


def test_noise_without_shared_patterns():
    settings = Simulation(noise_rank=0)
    place = simulated_brain.anatomy(settings, 1).template
    truth = simulated_brain.true_responses(settings, 1, place, np.random.default_rng(0).normal(size=(50, 4)))
    assert truth.noise_factor.shape == (600, 0)
    np.testing.assert_array_equal(truth.noise_variance, truth.noise_diag)
    noise = simulated_brain.trial_noise(truth, np.random.default_rng(0), 500)
    np.testing.assert_allclose(noise.var(axis=0).mean(), truth.noise_diag.mean(), rtol=0.02)


def test_the_command_states_the_ceiling(tmp_path, capsys):
    size = ["--subjects", "1", "--sessions", "1", "--stimuli", "20", "--voxels", "30", "--picture-size", "8"]
    cli.main(["simulate", "nsd", "--out", str(tmp_path / "nsd"), *size, "--nonlinear", "0.2"])
    stated = json.loads((tmp_path / "nsd/truth/truth.json").read_text())
    assert stated["settings"]["nonlinear"] == 0.2
    printed = capsys.readouterr().out
    assert "subj01: 1 sessions, 30 voxels, median ncsnr 0.600" in printed
    assert f"{stated['subjects']['subj01']['ceiling_r_median']:.3f}" in printed
