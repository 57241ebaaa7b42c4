"""The report of a run: numbers where they belong, pictures that show the arrays, clear errors."""

import json
import math
import pathlib
import re

import numpy as np
import pytest
import scipy.stats
from matplotlib.image import imread

from synbrain_jax import figures, files, report
from synbrain_jax.data.voxels import Voxels
from synbrain_jax.document import Document, Section
from synbrain_jax.errors import InputError
from synbrain_jax.run_document import caption_of
from synbrain_jax.run_files import read_curves, read_run

STIMULI, TRIALS, VOXELS, SAMPLES = 3, 12, 60, 5
SHAPE = (9, 6, 2)
METRICS = [metric for metric, _, _ in (*report.MAIN_COLUMNS, *report.TRIAL_COLUMNS)]


def content(**changes) -> dict:
    """A report.json with a different number in each place, so that a swapped row or column shows."""
    scores = {
        name: {metric: 0.1 * row + 0.001 * column for column, metric in enumerate(METRICS, start=1)}
        for row, name in enumerate(report.NAMES, start=1)
    }
    sizes = {"n_stimuli": STIMULI, "n_trials": TRIALS, "n_voxels": 15724}
    return {"dataset": "simulated/tiny", "split": "test", **sizes, "scores": scores, **changes}


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "stimulus_id": np.array(["ant", "bee", "cow"]),
        "prediction": rng.normal(size=(STIMULI, VOXELS)).astype(np.float32),
        "target": rng.normal(size=(STIMULI, VOXELS)).astype(np.float32),
        "voxel_r": rng.uniform(-1, 1, VOXELS).astype(np.float32),
        "voxel_r_ceiling": rng.uniform(0, 1, VOXELS).astype(np.float32),
        "sampled_id": np.array(["ant", "bee", "cow"]),
        "samples": rng.normal(size=(STIMULI, SAMPLES, VOXELS)).astype(np.float32),
        "trials": rng.normal(size=(TRIALS, VOXELS)).astype(np.float32),
        "trial_stimulus": rng.permutation(np.repeat(np.arange(STIMULI, dtype=np.int32), TRIALS // STIMULI)),
    }


def voxels(*, geometry: bool = True) -> Voxels:
    ijk = np.random.default_rng(1).permutation(np.argwhere(np.ones(SHAPE, bool)))[:VOXELS].astype(np.int32)
    return Voxels(
        subject="sub1",
        normalisation="run_zscore",
        ijk=ijk if geometry else None,
        volume_shape=SHAPE if geometry else None,
        affine=None,
        ncsnr=None,
        order=np.arange(VOXELS, dtype=np.int32),
    )


def write_run(workdir: pathlib.Path, *, geometry: bool = True, without: tuple[str, ...] = ()) -> pathlib.Path:
    files.write_text(workdir / "report.json", json.dumps(content()))
    files.write_npz(workdir / "predictions.npz", {k: v for k, v in arrays().items() if k not in without})
    (workdir / "bundle").mkdir()
    voxels(geometry=geometry).save(workdir / "bundle" / "voxels.npz")
    for stage in ("stage1", "stage2"):
        lines = [{"step": step, "train/loss": 100.0 / step, "train/kl": 1.0 + step} for step in range(1, 31)]
        lines += [{"step": step, "val/loss": 110.0 / step, "val/mse": -1.0 / step} for step in (10, 20, 30)]
        files.write_text(workdir / stage / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        chosen = {"step": 20, "metric": "val/mse", "value": -0.05}
        files.write_text(workdir / stage / "selected.json", json.dumps(chosen))
    return workdir


# ---- tables ----------------------------------------------------------------------------------------


def cells(line: str) -> list[str]:
    return line.replace("|", " ").replace("`", "").split()


@pytest.mark.parametrize("table", [report.format_table, report.markdown_table])
def test_every_score_stands_in_its_row_and_column(table):
    lines = table(content()).splitlines()
    assert lines[0] == "simulated/tiny, test split: 3 stimuli, 12 trials, 15,724 voxels"
    for row, name in enumerate(report.NAMES, start=1):
        main, single = (cells(line) for line in lines if cells(line)[:1] == [name])
        expected = [f"{0.1 * row + 0.001 * column:.3f}" for column in range(1, len(METRICS) + 1)]
        assert main[1:] == expected[: len(report.MAIN_COLUMNS)]
        assert single[1:] == expected[len(report.MAIN_COLUMNS) :]


def test_text_table_is_aligned_and_fits_110_columns():
    lines = report.format_table(content()).splitlines()
    assert max(map(len, lines)) <= 110
    rows = [line for line in lines if cells(line)[:1] and cells(line)[0] in report.NAMES]
    ends = [[match.end() for match in re.finditer(r"\S+", row)][1:] for row in rows]
    assert ends == [ends[0]] * 6 + [ends[6]] * 6
    heading = lines[2]
    assert [match.end() for match in re.finditer(r"\S+( r)?", heading)] == ends[0]


def test_markdown_table_has_one_cell_per_column_in_every_row():
    table = [line for line in report.markdown_table(content()).splitlines() if line.startswith("|")]
    assert [line.count("|") for line in table] == [len(report.MAIN_COLUMNS) + 2] * 8 + [5] * 8
    assert table[0].split("|")[5].strip() == "pattern r centred"


def test_missing_null_and_nan_scores_are_dashes_and_unknown_rows_come_last():
    changed = content()
    del changed["scores"]["kernel_ridge"]
    del changed["scores"]["ridge"]["mse"]
    changed["scores"]["mean_pattern"].update(pattern_r_centred=None, cosine=math.nan)
    changed["scores"]["paper_knob"] = {"voxel_r_mean": -0.00001}
    rows = {}
    for line in report.format_table(changed).splitlines():
        if len(cells(line)) == 10:
            rows[cells(line)[0]] = cells(line)[1:]
    assert list(rows) == [*report.NAMES, "paper_knob"]
    assert rows["kernel_ridge"] == ["-"] * 9
    assert [at for at, cell in enumerate(rows["ridge"]) if cell == "-"] == [METRICS.index("mse")]
    assert rows["mean_pattern"][METRICS.index("pattern_r_centred")] == "-"
    assert rows["mean_pattern"][METRICS.index("cosine")] == "-"
    assert rows["paper_knob"] == ["0.000", *["-"] * 8]


@pytest.mark.parametrize("table", [report.format_table, report.markdown_table])
def test_shares_of_the_ceiling_and_regions_stand_in_tables_of_their_own(table):
    changed = content(
        reliable={"ceiling_r_above": 0.3, "n_voxels": 12345}, rois_left_out={"faces/OFA": 3, "areas/MT": 0}
    )
    for row, name in enumerate(report.NAMES):
        changed["scores"][name] |= {"voxel_r_normalised_median": row + 0.25, "voxel_r2_normalised_mean": row + 0.5}
    del changed["scores"]["stimulus_mean"]
    rows = {name: {"voxel_r_median": 0.5 + 0.1 * at} for at, name in enumerate(changed["scores"])}
    changed["rois"] = {
        "prf-visualrois/V1v": {"n_voxels": 1350, "rows": rows | {"model": {"voxel_r_median": -0.25}}},
        "streams/early": {
            "n_voxels": 20,
            "rows": {**rows, "model": {"voxel_r_median": 0.125, "voxel_r_normalised_median": 0.75}},
        },
    }
    text = table(changed)
    lines = text.splitlines()
    assert "over the 12,345 voxels whose ceiling of r is above 0.3:" in text
    assert "Regions with too few voxels: faces/OFA (3), areas/MT (0)." in text
    before = lines[: lines.index("Regions, median voxel r; the last column is over their reliable voxels alone:")]
    for row, name in enumerate(report.NAMES):
        share = [cells(line) for line in before if cells(line)[:1] == [name]][-1]
        assert share[1:] == (["-", "-"] if name == "stimulus_mean" else [f"{row + 0.25:.3f}", f"{row + 0.5:.3f}"])
    regions = {cells(line)[0]: cells(line)[1:] for line in lines[len(before) :] if "." in line and cells(line)}
    others = ["0.600", "0.700", "0.800", "0.900"]
    assert regions["prf-visualrois/V1v"] == ["1,350", "-0.250", *others, "-"]
    assert regions["streams/early"] == ["20", "0.125", *others, "0.750"]
    if table is report.format_table:
        assert max(map(len, lines)) <= 110
        assert cells(lines[len(before) + 2]) == ["voxels", "model", "ridge", "kernel", "mean", "noise", "model"]
        assert cells(lines[len(before) + 3]) == ["ridge", "pattern", "ceiling", "r/ceiling"]
    else:
        assert lines[len(before) + 2].startswith(
            "|  | voxels | model | ridge | kernel ridge | mean pattern | noise ceil"
        )


def test_regions_that_are_all_too_small_get_no_table():
    text = report.format_table(content(rois={}, rois_left_out={"faces/OFA": 3}))
    assert "Regions, median" not in text
    assert "Regions with too few voxels: faces/OFA (3)." in text


def test_closing_lines_give_the_ratios_controls_and_a_gain_of_nothing():
    changed = content(controls={"shifted_tokens": -0.05}, gain=0.0)
    changed["scores"]["model"]["pattern_r_centred"] = 0.3
    changed["scores"]["stimulus_mean"]["pattern_r_centred"] = 0.25
    changed["scores"]["noise_ceiling"]["pattern_r_centred"] = 0.5
    assert report.format_table(changed).splitlines()[-3:] == [
        "Ratio of the model's centred pattern r: 1.20 to stimulus_mean, 0.60 to noise_ceiling.",
        "Control shifted_tokens: -0.050",
        "The gain fitted on validation is 0: the model predicts no difference between stimuli.",
    ]
    del changed["scores"]["stimulus_mean"]
    changed["scores"]["noise_ceiling"]["pattern_r_centred"] = 0.0
    assert "r: - to stimulus_mean, - to noise_ceiling." in report.format_table(changed)


# ---- numbers behind the pictures -------------------------------------------------------------------


def test_volume_slice_puts_each_voxel_at_its_position_in_the_fullest_slice():
    ijk = np.array([[0, 0, 2], [2, 1, 5], [0, 3, 5], [1, 1, 5], [2, 2, 2]], np.int32)
    values = np.array([10, 20, 30, 40, 50], np.float32)
    nan = np.nan
    expected = [[nan, nan, nan, 30], [nan, 40, nan, nan], [nan, 20, nan, nan]]
    np.testing.assert_array_equal(figures.volume_slice(values, ijk, (3, 4, 6)), expected)


def test_densest_slice_takes_the_lowest_of_equals():
    assert figures.densest_slice(np.array([[0, 0, 7], [1, 0, 3], [2, 0, 7], [3, 0, 3]], np.int32)) == 3


def test_variance_share_is_the_square_of_the_scale_around_any_means():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(3, 6, 4))
    means = 10 * rng.normal(size=(2, 3, 1, 4))
    trials = (means[0] + noise).reshape(18, 4)
    share = figures.variance_share(trials, np.repeat(np.arange(3), 6), means[1] + 0.5 * noise)
    assert share == pytest.approx(0.25, rel=1e-12)


def test_variance_share_weighs_stimuli_by_their_trials_less_one():
    # Variances (n - 1) by hand: stimulus 0: 4.5 of 2 trials; stimulus 1: 1 of 3; stimulus 2: a single trial.
    trials = np.array([[0.0], [1.0], [3.0], [2.0], [3.0], [9.0]])
    stimulus = np.array([0, 1, 0, 1, 1, 2])
    samples = np.array([[[0.0], [2.0]], [[0.0], [4.0]], [[0.0], [100.0]]])  # variances 2, 8 and 5000
    assert figures.variance_share(trials, stimulus, samples) == pytest.approx((1 * 2 + 2 * 8) / (1 * 4.5 + 2 * 1))


def test_variance_share_is_nan_where_nothing_repeats():
    trials, stimulus = np.zeros((2, 1)), np.array([0, 1])
    assert math.isnan(figures.variance_share(trials, stimulus, np.zeros((2, 3, 1))))
    assert math.isnan(figures.variance_share(np.eye(2), np.array([0, 0]), np.zeros((1, 1, 2))))


def test_shown_stimuli_are_all_or_eight_from_best_to_worst():
    np.testing.assert_array_equal(figures.shown_stimuli(np.array([0.1, 0.9, 0.5])), [0, 1, 2])
    r = np.random.default_rng(0).permutation(15) / 15
    np.testing.assert_allclose(r[figures.shown_stimuli(r)] * 15, [14, 12, 10, 8, 6, 4, 2, 0])


# ---- pictures --------------------------------------------------------------------------------------


def images(figure) -> list:
    return [panel.images[0] for panel in figure.axes if panel.images]


def test_patterns_pair_measured_with_synthesised_on_one_symmetric_scale_per_kind():
    a, v = arrays(), voxels()
    figure = figures.patterns(a["stimulus_id"], a["target"], a["prediction"], v, "tiny")
    drawn = images(figure)
    for image, values in zip(drawn, [*a["target"], *a["prediction"]], strict=True):
        expected = figures.volume_slice(values, v.ijk, SHAPE).T
        np.testing.assert_array_equal(image.get_array().filled(np.nan), expected)
        assert image.origin == "lower"
    for kind, name in ((drawn[:STIMULI], "target"), (drawn[STIMULI:], "prediction")):
        limits = {image.get_clim() for image in kind}
        assert len(limits) == 1
        low, high = limits.pop()
        assert high == -low == pytest.approx(np.percentile(np.abs(a[name]), 99))
    labels = [image.axes.get_xlabel() for image in drawn[STIMULI:]]
    r = [scipy.stats.pearsonr(p, t).statistic for p, t in zip(a["prediction"], a["target"], strict=True)]
    assert labels == [f"r = {value:.2f}" for value in r]
    assert [image.axes.get_title() for image in drawn[:STIMULI]] == ["ant", "bee", "cow"]


def test_patterns_without_geometry_are_strips_and_say_so():
    a = arrays()
    figure = figures.patterns(a["stimulus_id"], a["target"], a["prediction"], voxels(geometry=False), "tiny")
    measured, synthesised = images(figure)
    np.testing.assert_array_equal(measured.get_array(), a["target"])
    np.testing.assert_array_equal(synthesised.get_array(), a["prediction"])
    assert "strips in voxel order" in figure.get_suptitle()


def test_voxel_r_maps_share_one_scale_and_the_scatter_has_every_voxel():
    a, v = arrays(), voxels()
    figure = figures.voxel_r(a["voxel_r"], a["voxel_r_ceiling"], STIMULI, v, "tiny")
    r, ceiling = images(figure)
    for image, name in ((r, "voxel_r"), (ceiling, "voxel_r_ceiling")):
        np.testing.assert_array_equal(image.get_array().filled(np.nan), figures.volume_slice(a[name], v.ijk, SHAPE).T)
    assert r.get_clim() == ceiling.get_clim() == (-1, 1)
    points = [panel.collections[0].get_offsets() for panel in figure.axes if panel.get_ylabel() == "r of the model"]
    np.testing.assert_allclose(points[0], np.stack([a["voxel_r_ceiling"], a["voxel_r"]], axis=1))


def test_an_undefined_voxel_r_is_left_out_of_map_and_median():
    r = arrays()["voxel_r"]
    r[7] = np.nan
    v = voxels()
    panels = figures.voxel_r(r, None, STIMULI, v, "tiny").axes
    expected = figures.volume_slice(r, v.ijk, SHAPE).T
    np.testing.assert_array_equal(panels[0].images[0].get_array().filled(np.nan), expected)
    legend = panels[1].get_legend().get_texts()[0].get_text()
    assert legend == f"r of the model over {STIMULI} stimuli: median {np.median(np.delete(r, 7)):.2f}"
    assert sum(bar.get_height() for bar in panels[1].patches) == VOXELS - 1


def test_samples_show_trials_and_samples_of_the_most_reliable_voxels():
    a, v = arrays(), voxels()
    best = np.argsort(-a["voxel_r_ceiling"])[:6]
    names = ("stimulus_id", "trials", "trial_stimulus", "samples", "voxel_r_ceiling")
    figure = figures.samples_and_trials(*(a[name] for name in names), v, "tiny")
    assert len(figure.axes) == 6
    for panel, voxel in zip(figure.axes, best, strict=True):
        i, j, k = v.ijk[voxel]
        assert panel.get_title().startswith(f"voxel (i, j, k) = ({i}, {j}, {k})\nceiling")
        lines = [line.get_ydata() for line in panel.lines if len(line.get_ydata())]
        for stimulus in range(STIMULI):
            real = a["trials"][a["trial_stimulus"] == stimulus, voxel]
            synthetic = a["samples"][stimulus, :, voxel]
            for at, values in ((2 * stimulus, real), (2 * stimulus + 1, synthetic)):
                np.testing.assert_allclose(panel.collections[at].get_offsets()[:, 1], values, rtol=1e-6)
                np.testing.assert_allclose(lines[at], [values.mean()] * 2, rtol=1e-5)
    share = figures.variance_share(a["trials"], a["trial_stimulus"], a["samples"])
    assert figure.get_suptitle().endswith(f"carry: {share:.1%}")


def test_loss_curves_draw_each_term_once_and_mark_the_chosen_step():
    curves = figures.Curves(
        {"train/kl": {2: 3.0, 1: 4.0}, "train/loss": {1: 100.0, 2: 1.0}, "val/loss": {2: 5.0}, "val/r": {2: -0.5}},
        chosen_step=2,
        chosen_by="val/r",
    )
    panels = {panel.get_title(): panel for panel in figures.loss_curves({"Stage 1": curves}).axes}
    assert [name for name in panels if name] == ["loss", "r", "kl"]
    lines = {name: [line.get_xydata().tolist() for line in panel.lines] for name, panel in panels.items()}
    assert lines["loss"][:2] == [[[1, 100], [2, 1]], [[2, 5]]]
    assert lines["kl"][0] == [[1, 4], [2, 3]]
    assert [2, -0.5] in lines["r"][1]
    assert {name: panel.get_yscale() for name, panel in panels.items() if name} == {
        "loss": "log",
        "r": "linear",
        "kl": "linear",
    }
    for name in ("loss", "r", "kl"):
        assert lines[name][-1] == [[2, 0], [2, 1]]  # the vertical line at the chosen step


# ---- the whole run ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("geometry", "without"), [(True, ()), (False, ("voxel_r_ceiling",))], ids=["full", "no geometry, no ceiling"]
)
def test_write_report_leaves_table_and_pictures(tmp_path, geometry, without):
    workdir = write_run(tmp_path, geometry=geometry, without=without)
    scores = content()
    if geometry:
        scores |= {"rois": {"areas/V1": {"n_voxels": 12, "rows": scores["scores"]}}, "rois_left_out": {}}
        files.write_text(workdir / "report.json", json.dumps(scores))
    text = report.write_report(workdir)
    assert text == report.format_table(scores) == (workdir / "report.txt").read_text()
    markdown = (workdir / "report.md").read_text()
    assert markdown.startswith(report.markdown_table(scores))
    links = re.findall(r"!\[.+\]\((.+)\)", markdown)
    names = ["loss_curves", "patterns", "voxel_r", "samples", *(["regions", "slices"] if geometry else [])]
    assert links == [f"figures/{name}.png" for name in names]
    for link in links:
        picture = imread(workdir / link)
        assert picture.shape[0] > 300
        assert picture.shape[1] > 1000
        assert picture[..., :3].std() > 0.05
        assert (workdir / link).stat().st_size < 300_000


@pytest.mark.parametrize(
    ("more", "legend", "caption"),
    [
        ({"calibration": {}}, "calibrated samples", "Calibrated samples vary as trials do"),
        ({}, "samples of BrainVAE's posterior", "not fitted to how trials vary"),
    ],
)
def test_samples_are_called_what_they_are(tmp_path, monkeypatch, more, legend, caption):
    kinds, real = [], figures.samples_and_trials
    monkeypatch.setattr(figures, "samples_and_trials", lambda *given: kinds.append(given[-1]) or real(*given))
    workdir = write_run(tmp_path)
    files.write_text(workdir / "report.json", json.dumps(content() | more))
    report.write_report(workdir)
    assert kinds == [legend]
    assert caption in caption_of("samples", read_run(workdir))


def test_a_folder_of_studies_stands_for_them(tmp_path):
    assert report.run_folders(tmp_path) == [tmp_path]
    for name in ("encode-x", "adapt-x", "data"):
        (tmp_path / name).mkdir()
        if name != "data":
            Document(name, {}, (Section("s"),)).save(tmp_path / name)
    assert report.run_folders(tmp_path) == [tmp_path / "adapt-x", tmp_path / "encode-x"]
    assert report.run_folders(tmp_path / "adapt-x") == [tmp_path / "adapt-x"]


def test_resumed_log_counts_the_last_attempt_and_skips_a_line_cut_short(tmp_path):
    write_run(tmp_path)
    with (tmp_path / "stage1" / "metrics.jsonl").open("a") as log:
        log.write('{"step": 30, "train/lo{"step": 29, "train/loss": 7.0}\n{"step": 30, "train/loss": 8.0}\n')
        log.write('{"step": 31, "train/loss": NaN, "seconds": 3.0}\n')
    values = read_curves(tmp_path, "stage1").values
    assert values["train/loss"] == {step: 100.0 / step for step in range(1, 30)} | {30: 8.0}
    assert values.keys() == {"train/loss", "train/kl", "val/loss", "val/mse"}


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("report.json", "synbrain evaluate"),
        ("predictions.npz", "synbrain evaluate"),
        ("bundle/voxels.npz", "python train.py"),
        ("stage1/metrics.jsonl", "python train.py"),
        ("stage2/selected.json", "python train.py"),
    ],
)
def test_missing_input_names_the_file_and_its_command_and_writes_nothing(tmp_path, name, command):
    write_run(tmp_path)
    (tmp_path / name).unlink()
    for write in (report.write_report, report.write_figures):
        with pytest.raises(
            InputError, match=re.escape(str(tmp_path / name)) + f".*{command}.*{re.escape(str(tmp_path))}"
        ):
            write(tmp_path)
    assert not (tmp_path / "figures").exists()
    assert not (tmp_path / "report.txt").exists()


def test_damaged_or_foreign_inputs_are_named(tmp_path):
    def check(name: str, damaged: bytes, message: str) -> None:
        good = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(InputError, match=f"{re.escape(name)}.*{message}"):
            report.write_report(tmp_path)
        (tmp_path / name).write_bytes(good)

    write_run(tmp_path)
    check("report.json", b'{"dataset": ', "not JSON")
    check("report.json", json.dumps({"dataset": "x"}).encode(), "no field n_stimuli, n_trials")
    check("predictions.npz", (tmp_path / "predictions.npz").read_bytes()[:500], "cannot be read")
    check("stage1/metrics.jsonl", b"\n", "no line has")
    check("stage2/selected.json", b"{}", "no field step or metric")
    files.write_npz(tmp_path / "predictions.npz", {k: v for k, v in arrays().items() if k != "samples"})
    with pytest.raises(InputError, match=r"predictions.npz: no array samples"):
        report.write_report(tmp_path)
    files.write_npz(tmp_path / "predictions.npz", arrays() | {"voxel_r": np.zeros(3, np.float32)})
    with pytest.raises(InputError, match=r"voxels.npz: 60 voxels, but predictions.npz has 3"):
        report.write_report(tmp_path)
