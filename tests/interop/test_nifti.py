"""Volumes against nibabel's own reading and writing, and against positions in millimetres worked out by hand."""

import dataclasses
import gzip
import sys

import nibabel
import numpy as np
import pytest

from synbrain_jax.data.voxels import Voxels
from synbrain_jax.errors import InputError
from synbrain_jax.interop.nifti import check_nifti, from_volume, save_nifti, to_volume

SHAPE = (5, 7, 4)
# 1.8 mm voxels, turned by 30 degrees about the second axis: not the diagonal matrix that hides exchanged axes
AFFINE = np.array(
    [[1.5588457, 0, 0.9, -70.1], [0, 1.8, 0, -92.7], [-0.9, 0, 1.5588457, -73.8], [0, 0, 0, 1]], np.float64
)


def voxels(**changes) -> Voxels:
    ijk = np.random.default_rng(0).permutation(np.argwhere(np.ones(SHAPE, bool)))[:50].astype(np.int32)
    fields = dict(subject="subj01", normalisation="none", ijk=ijk, volume_shape=SHAPE, affine=AFFINE, ncsnr=None)
    return Voxels(**{**fields, "order": np.arange(50, dtype=np.int32), **changes})


def patterns(n: int = 3) -> np.ndarray:
    values = np.random.default_rng(1).normal(size=(n, 50)).astype(np.float32)
    values[0, :4] = [0, -0.0, 1e-42, 3e38]  # a zero, a negative zero, a subnormal, nearly the largest
    return values


def test_each_value_is_where_its_voxel_is():
    values, v = patterns(), voxels()
    one, many = to_volume(values[1], v), to_volume(values, v, fill=np.nan)
    assert one.shape == SHAPE
    assert many.shape == (*SHAPE, 3)
    data = many.get_fdata(dtype=np.float32)
    inside = np.zeros(SHAPE, bool)
    for row, (i, j, k) in enumerate(v.ijk):
        assert one.get_fdata()[i, j, k] == values[1, row]
        np.testing.assert_array_equal(data[i, j, k], values[:, row])
        inside[i, j, k] = True
    assert (one.get_fdata()[~inside] == 0).all()
    assert np.isnan(data[~inside]).all()


def test_the_image_says_where_the_voxels_are_in_millimetres():
    for image in (to_volume(patterns()[0], voxels()), to_volume(patterns(), voxels())):
        np.testing.assert_allclose(image.affine, AFFINE, atol=1e-5)
        np.testing.assert_allclose(image.affine @ [1, 2, 3, 1], [-70.1 + 1.5588457 + 2.7, -92.7 + 3.6, -70.0234629, 1])
        np.testing.assert_allclose(image.header.get_zooms()[:3], 1.8, rtol=1e-6)
        assert image.header.get_xyzt_units()[0] == "mm"
        assert int(image.header["sform_code"]) == 1  # the scanner's space, and no template's
        assert image.get_data_dtype() == np.float32


@pytest.mark.parametrize("name", ["out.nii", "out.nii.gz"])
@pytest.mark.parametrize("n", [0, 1, 3], ids=["one pattern", "one in a list", "three"])
def test_a_saved_file_is_what_nibabel_reads_and_gives_back_every_bit(tmp_path, name, n):
    values = patterns(n) if n else patterns()[0]
    save_nifti(tmp_path / "sub" / name, values, voxels(), fill=2.5, description="from a test")
    assert [file.name for file in (tmp_path / "sub").iterdir()] == [name]
    image = nibabel.load(tmp_path / "sub" / name)
    expected = to_volume(values, voxels(), fill=2.5)
    np.testing.assert_array_equal(np.asarray(image.dataobj), np.asarray(expected.dataobj))
    np.testing.assert_array_equal(image.affine, expected.affine.astype(np.float32))
    for field in ("dim", "pixdim", "datatype", "bitpix", "sform_code", "qform_code", "xyzt_units"):
        np.testing.assert_array_equal(image.header[field], expected.header[field], err_msg=field)
    assert image.header["descrip"].item() == b"from a test"
    back = from_volume(image, voxels())
    assert back.dtype == np.float32
    assert back.tobytes() == values.tobytes()
    assert from_volume(expected, voxels()).tobytes() == values.tobytes()


def test_the_same_numbers_give_the_same_file_and_a_long_description_is_cut(tmp_path):
    for name in ("a.nii.gz", "b.nii.gz"):
        save_nifti(tmp_path / name, patterns(), voxels(), description="é" * 100)
    content = (tmp_path / "a.nii.gz").read_bytes()
    assert content == (tmp_path / "b.nii.gz").read_bytes()
    assert len(gzip.decompress(content)) == 352 + 4 * 3 * np.prod(SHAPE)
    assert nibabel.load(tmp_path / "a.nii.gz").header["descrip"].item() == b"?" * 79


def test_files_of_other_programs_are_read(tmp_path):
    """Scaled integers, as NSD has them, and an affine that lost digits."""
    whole = np.random.default_rng(2).integers(-999, 999, size=(*SHAPE, 2)).astype(np.int16)
    image = nibabel.Nifti1Image(whole, AFFINE.round(3))
    image.header.set_slope_inter(1 / 256, 0)
    nibabel.save(image, tmp_path / "other.nii.gz")
    stored = nibabel.load(tmp_path / "other.nii.gz")
    i, j, k = voxels().ijk.T
    np.testing.assert_allclose(from_volume(stored, voxels()), stored.get_fdata()[i, j, k].T, rtol=1e-6)


def test_a_volume_of_another_space_is_refused_and_named(tmp_path):
    v = voxels()
    save_nifti(tmp_path / "mine.nii", patterns(), v)
    image = nibabel.load(tmp_path / "mine.nii")
    with pytest.raises(InputError, match=r"mine\.nii: has shape \(5, 7, 4, 3\); expected \(5, 7, 5\)"):
        from_volume(image, voxels(volume_shape=(5, 7, 5)))
    shifted = AFFINE.copy()
    shifted[0, 3] += 0.1
    with pytest.raises(InputError, match=r"mine\.nii: has the affine .*-70\.1.* expected .* subj01, .*-70\.0"):
        from_volume(image, voxels(affine=shifted))
    with pytest.raises(InputError, match="the image: has shape"):
        from_volume(nibabel.Nifti1Image(np.zeros((5, 7), np.float32), AFFINE), v)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ijk": None, "volume_shape": None, "affine": None}, "ijk, volume_shape, affine unknown"),
        ({"affine": None}, r"\(affine unknown\)"),
        ({"ijk": np.repeat(voxels().ijk[:25], 2, axis=0)}, "the same voxel_ijk"),
    ],
)
def test_voxels_without_a_place_are_refused(tmp_path, changes, message):
    v = voxels(**changes)
    image = to_volume(patterns()[0], voxels())
    for act in (
        lambda: to_volume(patterns(), v),
        lambda: from_volume(image, v),
        lambda: check_nifti("x.nii.gz", v),
        lambda: save_nifti(tmp_path / "x.nii.gz", patterns(), v),
    ):
        with pytest.raises(InputError, match=message):
            act()
    assert list(tmp_path.iterdir()) == []


def test_other_endings_and_a_missing_nibabel_are_named(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"x\.img: expected a name that ends in \.nii\.gz or \.nii"):
        check_nifti(tmp_path / "x.img", voxels())
    check_nifti(tmp_path / "x.nii", voxels())
    monkeypatch.setitem(sys.modules, "nibabel", None)
    with pytest.raises(InputError, match=r"pip install 'synbrain-jax\[nsd\]'"):
        check_nifti(tmp_path / "x.nii", voxels())


def test_more_volumes_than_the_format_holds_are_refused(tmp_path):
    one = voxels().select(np.arange(1))
    one = dataclasses.replace(one, ijk=np.zeros((1, 3), np.int32), volume_shape=(1, 1, 1))
    many = np.arange(2**15, dtype=np.float32)[:, None]
    assert to_volume(many[1:], one).shape == (1, 1, 1, 2**15 - 1)
    for act in (lambda: to_volume(many, one), lambda: save_nifti(tmp_path / "x.nii", many, one)):
        with pytest.raises(InputError, match=r"32,768 volumes: a NIfTI file holds at most 32,767"):
            act()
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match=r"shape mismatch"):
        save_nifti(tmp_path / "x.nii.gz", patterns()[:, :49], dataclasses.replace(voxels()))
    assert list(tmp_path.iterdir()) == []
