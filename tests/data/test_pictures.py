"""Pictures of every kind: what a user sees is what is read, and one clear error for what cannot be."""

import io
import os
import struct
import sys
import zlib

import h5py
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from synbrain_jax.data.pictures import decode_picture, open_pictures
from synbrain_jax.errors import InputError

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)
SMOOTH = np.linspace(20, 220, 16 * 24 * 3).reshape(16, 24, 3).astype(np.uint8)  # survives JPEG


def saved(image, kind="png", **options) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


def png_of_16_bits(samples) -> bytes:
    """By the PNG specification: grey, grey with alpha, RGB or RGBA, by the number of channels."""
    height, width, channels = samples.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    parts = [struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def png_header(width, height) -> bytes:
    """A grey picture of this size, all of whose pixels are missing."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [header, b"IDAT" + zlib.compress(b""), b"IEND"]
    parts = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def grey_of(image):
    return np.repeat(image[..., :1], 3, axis=2)


# ---- one picture -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["png", "bmp", "tiff", "ppm", "gif", "webp"])
def test_colours_are_read_as_they_are(kind):
    image = RGB // 64 * 64 if kind == "gif" else RGB  # few enough colours for a palette
    options = {"lossless": True} if kind == "webp" else {}
    found = decode_picture(saved(image, kind, **options), "x")
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, image)
    found[0] = 0  # the array is the reader's own


@pytest.mark.parametrize("kind", ["jpeg", "webp", "avif"])
def test_lossy_formats_are_close(kind):
    assert np.abs(decode_picture(saved(SMOOTH, kind, quality=95), "x").astype(int) - SMOOTH).max() <= 12


def test_grey_pictures_get_three_channels():
    for picture in (saved(RGB[..., 0]), saved(Image.fromarray(RGB[..., 0]), "tiff")):
        np.testing.assert_array_equal(decode_picture(picture, "x"), grey_of(RGB))
    bits = RGB[..., 0] > 99
    np.testing.assert_array_equal(decode_picture(saved(bits), "x"), grey_of(255 * bits[..., None].astype(np.uint8)))


def test_palettes_are_looked_up():
    image = RGB // 64 * 64
    picture = Image.fromarray(image).quantize(256)
    assert picture.mode == "P"
    np.testing.assert_array_equal(decode_picture(saved(picture), "x"), image)


def test_cmyk_is_converted():
    """The plain formula, 255 - min(255, ink + black), to a level."""
    inks = RNG.integers(0, 256, (4, 5, 4), dtype=np.uint8)
    found = decode_picture(saved(Image.fromarray(inks, "CMYK"), "tiff"), "x").astype(int)
    inks = inks.astype(int)
    expected = (255 - inks[..., :3]) * (255 - inks[..., 3:]) / 255
    np.testing.assert_allclose(found, expected, atol=1.01)
    white = Image.new("CMYK", (16, 16), (0, 0, 0, 0))
    assert decode_picture(saved(white, "jpeg"), "x").min() > 250


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bits_are_scaled_and_not_clipped(channels):
    samples = RNG.integers(0, 65536, (6, 9, channels))
    samples[..., -1] = 65535 if channels in (2, 4) else samples[..., -1]
    expected = samples[..., :3] >> 8 if channels > 2 else grey_of(samples >> 8)
    np.testing.assert_array_equal(decode_picture(png_of_16_bits(samples), "x"), expected)


def test_16_bits_in_tiff_and_pgm():
    samples = RNG.integers(0, 65536, (6, 9), dtype=np.uint16)
    pgm = b"P5\n9 6\n65535\n" + samples.astype(">u2").tobytes()
    for content in (saved(samples, "tiff"), pgm):
        np.testing.assert_array_equal(decode_picture(content, "x"), grey_of(samples[..., None] >> 8))


@pytest.mark.parametrize("background", [(255, 255, 255), (127, 127, 127), (10, 200, 30)])
def test_transparent_pictures_lie_on_the_background(background):
    alpha = RNG.integers(0, 256, (6, 9, 1), dtype=np.uint8)
    alpha[0, :3, 0] = 0, 255, 128
    share = alpha / 255
    expected = share * RGB + (1 - share) * background
    found = decode_picture(saved(np.concatenate([RGB, alpha], axis=2)), "x", background)
    np.testing.assert_allclose(found, expected, atol=1.01)
    grey = decode_picture(saved(Image.fromarray(np.concatenate([RGB[..., :1], alpha], axis=2))), "x", background)
    np.testing.assert_allclose(grey, share * grey_of(RGB) + (1 - share) * background, atol=1.01)
    index = (RGB[..., 0] > 99).astype(np.uint8)
    picture = Image.fromarray(index, "P")
    picture.putpalette([9, 8, 7, 60, 50, 40])
    found = decode_picture(saved(picture, transparency=1), "x", background)
    np.testing.assert_array_equal(found, np.where(index[..., None], background, [9, 8, 7]))
    assert (
        decode_picture(saved(RGB, transparency=tuple(RGB[0, 0].tolist())), "x", background)[0, 0] == background
    ).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_picture(orientation):
    """As the EXIF standard names the sides: where the stored picture's first row and first column are seen."""
    first_row, first_column = {
        1: ("top", "left"),
        2: ("top", "right"),
        3: ("bottom", "right"),
        4: ("bottom", "left"),
        5: ("left", "top"),
        6: ("right", "top"),
        7: ("right", "bottom"),
        8: ("left", "bottom"),
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    found = decode_picture(saved(RGB, exif=exif), "x")
    side = {"top": lambda a: a[0], "bottom": lambda a: a[-1], "left": lambda a: a[:, 0], "right": lambda a: a[:, -1]}
    row, column = side[first_row](found), side[first_column](found)
    if first_column in ("right", "bottom"):
        row = row[::-1]
    if first_row in ("right", "bottom"):
        column = column[::-1]
    np.testing.assert_array_equal(row, RGB[0])
    np.testing.assert_array_equal(column, RGB[:, 0])


def test_a_turned_picture_of_16_bits_is_still_scaled():
    exif = Image.Exif()
    exif[274] = 6
    samples = RNG.integers(0, 65536, (6, 9), dtype=np.uint16)
    expected = grey_of(np.rot90(samples, -1)[..., None] >> 8)
    np.testing.assert_array_equal(decode_picture(saved(samples, exif=exif), "x"), expected)


@pytest.mark.parametrize("kind", ["gif", "png", "webp", "tiff"])
def test_of_an_animation_the_first_frame_is_read(kind):
    frames = [Image.fromarray(np.full((6, 9, 3), level, np.uint8)) for level in (0, 128, 255)]
    options = {"lossless": True} if kind == "webp" else {}
    content = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert (decode_picture(content, "x") == 0).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "x: the file is empty"),
        (b"hello", "x: not a picture of a known format"),
        (saved(RGB, "eps"), "x: not a picture of a known format"),
        (saved(RGB)[:60], "x: the picture is damaged"),
        (saved(SMOOTH, "jpeg")[:-60], "x: the picture is damaged"),
        (saved(RGB, "bmp")[:-60], "x: the picture is damaged"),
        (saved(RGB, "tiff")[:-160], "x: the picture is damaged"),
        (saved(RGB).replace(saved(RGB)[60:70], bytes(10)), "x: the picture is damaged"),
        (png_header(20_000, 10_000), r"x: the picture is too large \(200000000 pixels; at most 178956970\)"),
        (png_header(10_000, 9_000), r"x: the picture is damaged \((?!.*bomb)"),  # more than Pillow warns of
        (saved(np.ones((4, 4), np.float32), "tiff"), "x: holds floats of 32 bits"),
        (saved(np.ones((4, 4), np.int32), "tiff"), "x: holds integers of 32 bits"),
    ],
)
def test_what_is_no_whole_picture_is_named(content, message):
    with pytest.raises(InputError, match=message):
        decode_picture(content, "x")


# ---- where they come from ----------------------------------------------------------------------------------


def test_a_folder_is_searched_in_the_order_of_names(tmp_path):
    names = ["b/2.JPG", "a.png", "b/10.png", "z.tif", "B.webp"]
    for index, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        kind = {"jpg": "jpeg", "tif": "tiff"}.get(name[-3:].lower(), name.rpartition(".")[2])
        (tmp_path / name).write_bytes(saved(np.full((4, 5 + index, 3), 100, np.uint8), kind))
    (tmp_path / "notes.txt").write_text("not a picture")
    (tmp_path / "._a.png").write_text("what a Mac leaves behind")
    (tmp_path / ".thumbs").mkdir()
    (tmp_path / ".thumbs" / "a.png").write_text("hidden")
    (tmp_path / "folder.png").mkdir()
    pictures = open_pictures(tmp_path)
    assert pictures.names == ("B.webp", "a.png", "b/10.png", "b/2.JPG", "z.tif")
    assert len(pictures) == 5
    assert [pictures[i].shape for i in range(5)] == [(4, 9, 3), (4, 6, 3), (4, 7, 3), (4, 5, 3), (4, 8, 3)]
    assert pictures[-1].shape == (4, 8, 3)
    with pytest.raises(IndexError):
        pictures[5]


def test_what_a_folder_holds_besides_is_told(tmp_path):
    (tmp_path / "far" / "deep").mkdir(parents=True)
    (tmp_path / "far" / "deep" / "b.png").write_bytes(saved(RGB))
    folder = tmp_path / "here"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.JFIF").write_bytes(saved(SMOOTH, "jpeg"))
    (folder / "linked.png").symlink_to(tmp_path / "far" / "deep" / "b.png")
    (folder / "links").symlink_to(tmp_path / "far")
    for name in ("sub/nosuffix", "c.heic", ".hidden"):
        (folder / name).touch()
    pictures = open_pictures(folder)
    assert pictures.names == ("a.JFIF", "linked.png")
    assert pictures.passed_over == ("c.heic", "links", "sub/nosuffix")
    assert pictures[0].shape == SMOOTH.shape
    np.testing.assert_array_equal(pictures[1], RGB)


def test_a_file_whose_name_is_not_utf8_is_named(tmp_path):
    for name in (b"caf\xe9.png", "café.png".encode()):
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(saved(RGB))
    pictures = open_pictures(tmp_path)
    assert pictures.names == ("café.png", r"caf\xe9.png")
    np.testing.assert_array_equal(pictures[0], RGB)
    with pytest.raises(InputError, match=r"caf\\xe9\.png: the file's name is not UTF-8") as raised:
        pictures[1]
    str(raised.value).encode()


def test_a_list_names_files_from_its_own_folder(tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "é 1.png").write_bytes(saved(RGB))
    (tmp_path / "far.png").write_bytes(saved(RGB[:3]))
    lines = f"\ufeff{tmp_path / 'far.png'}\r\n\r\n  é 1.png \nabsent.png\nnul\0.png\n"
    (tmp_path / "here" / "list.txt").write_text(lines)
    pictures = open_pictures(tmp_path / "here" / "list.txt")
    assert pictures.names == (f"{tmp_path / 'far.png'}", "é 1.png", "absent.png", "nul\0.png")
    assert [pictures[i].shape for i in range(2)] == [(3, 9, 3), (6, 9, 3)]
    with pytest.raises(InputError, match=r"absent\.png: cannot be read \(No such file"):
        pictures[2]
    with pytest.raises(InputError, match=r"nul\0\.png: cannot be read \(embedded null byte"):
        pictures[3]


def test_the_background_reaches_the_files(tmp_path):
    (tmp_path / "a.png").write_bytes(saved(np.zeros((2, 2, 4), np.uint8)))
    pictures = open_pictures(tmp_path, background=(1, 2, 3))
    assert pictures.background == (1, 2, 3)
    assert (pictures[0] == [1, 2, 3]).all()


def test_a_brick_is_read_slice_by_slice(tmp_path):
    brick = RNG.integers(0, 256, (4, 6, 9, 3), dtype=np.uint8)
    with h5py.File(tmp_path / "nsd.hdf5", "w") as file:
        file["imgBrick"] = brick
    pictures = open_pictures(tmp_path / "nsd.hdf5")
    assert pictures.names == ("0", "1", "2", "3")
    for index in (2, 0, 3):
        np.testing.assert_array_equal(pictures[index], brick[index])


def test_without_h5py_it_is_asked_for(tmp_path, monkeypatch):
    (tmp_path / "nsd.hdf5").touch()
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(InputError, match="needs the package h5py; pip install h5py"):
        open_pictures(tmp_path / "nsd.hdf5")


class ImageBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")
    code_path = None
    name = "snaps"

    def __init__(self, features, examples, **kwargs):
        self.features, self.examples = features, examples
        super().__init__(file_format="array_record", **kwargs)

    def _info(self):
        features = tfds.features.FeaturesDict(self.features)
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, _):
        return {split: self._generate_examples(rows) for split, rows in self.examples.items()}

    def _generate_examples(self, rows):
        yield from enumerate(rows)


def image_dataset(folder, features, examples):
    builder = ImageBuilder(features, examples, data_dir=folder)
    builder.download_and_prepare(download_dir=folder / "nothing")
    return builder.data_dir


def test_a_tfds_data_set_of_images(tmp_path):
    contents = [saved(RGB), saved(np.concatenate([RGB, 0 * RGB[..., :1]], axis=2)), saved(SMOOTH), b"broken"]
    rows = [{"label": 1, "image": io.BytesIO(content)} for content in contents]
    features = {"label": np.int64, "image": tfds.features.Image(shape=(None, None, 3))}
    pictures = open_pictures(image_dataset(tmp_path, features, {"train": rows[:3], "test": rows[3:]}), (5, 6, 7))
    assert pictures.names == ("train/0", "train/1", "train/2", "test/0")
    np.testing.assert_array_equal(pictures[0], RGB)
    assert (pictures[1] == [5, 6, 7]).all()
    np.testing.assert_array_equal(pictures[2], SMOOTH)
    with pytest.raises(InputError, match="picture 'test/0': not a picture"):
        pictures[3]


def test_a_tfds_data_set_may_name_its_images(tmp_path):
    features = {"filename": tfds.features.Text(), "photo": tfds.features.Image(shape=(6, 9, 3))}
    rows = [{"filename": name, "photo": io.BytesIO(saved(RGB))} for name in ("b.png", "a.png")]
    pictures = open_pictures(image_dataset(tmp_path, features, {"train": rows}))
    assert pictures.names == ("b.png", "a.png")
    np.testing.assert_array_equal(pictures[1], RGB)


def test_a_tfds_data_set_without_images_is_named(tmp_path):
    path = image_dataset(tmp_path, {"label": np.int64}, {"train": [{"label": 1}]})
    with pytest.raises(InputError, match="no image feature; it holds label"):
        open_pictures(path)


def test_a_tfds_data_set_of_float_images_is_named(tmp_path):
    rows = [{"depth": io.BytesIO(saved(RGB[..., 0]))}]
    path = image_dataset(tmp_path, {"depth": tfds.features.Image(shape=(6, 9, 1))}, {"train": rows})
    features = tmp_path / "snaps" / "1.0.0" / "features.json"
    features.write_text(features.read_text().replace("uint8", "float32"))
    with pytest.raises(InputError, match=r"'depth' holds .*float32.*; expected uint8 or uint16"):
        open_pictures(path)


def test_a_tfds_data_set_of_records_for_tensorflow_is_named(tmp_path):
    rows = [{"image": io.BytesIO(saved(RGB))}]
    path = image_dataset(tmp_path, {"image": tfds.features.Image(shape=(6, 9, 3))}, {"train": rows})
    info = tmp_path / "snaps" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(InputError, match="tfrecord files, which need TensorFlow; prepare"):
        open_pictures(path)


def write_brick(path, name="imgBrick", shape=(2, 4, 4, 3), dtype=np.uint8):
    with h5py.File(path, "w") as file:
        file[name] = np.zeros(shape, dtype)
    return path


def write_list(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "absent", "no such file or folder of pictures"),
        (lambda folder: folder, r"holds no picture; looked for \.avif, .*\.webp here"),
        (lambda folder: write_list(folder / "a.csv", "a"), r"expected a folder of pictures, a \.txt list"),
        (lambda folder: write_list(folder / "a.txt", "\n \n"), "holds no picture"),
        (lambda folder: write_list(folder / "a.txt", "x.png\ny.png\nx.png\n"), "2 pictures have the name 'x.png'"),
        (lambda folder: write_list(folder / "a.h5", "no"), "cannot be read as an HDF5 file"),
        (lambda folder: write_brick(folder / "a.h5", "images"), "no data set 'imgBrick'; it holds images"),
        (lambda folder: write_brick(folder / "a.h5", "imgBrick/a"), "no data set 'imgBrick'; it holds imgBrick"),
        (lambda folder: write_brick(folder / "a.h5", shape=(2, 3, 4, 4)), r"is \[2, 3, 4, 4\] of uint8; expected"),
        (lambda folder: write_brick(folder / "a.h5", shape=(2, 4, 4)), r"is \[2, 4, 4\] of uint8; expected"),
        (lambda folder: write_brick(folder / "a.h5", dtype=np.float32), "of float32; expected"),
        (lambda folder: write_brick(folder / "a.h5", shape=(0, 4, 4, 3)), "holds no picture"),
    ],
)
def test_a_source_that_cannot_be_used_is_named(make, message, tmp_path):
    path = make(tmp_path)
    with pytest.raises(InputError, match=message) as raised:
        open_pictures(path)
    assert os.fspath(path) in str(raised.value)


@pytest.mark.parametrize("background", [(255, 255, 256), (-1, 0, 0)])
def test_a_background_that_is_no_colour_is_named(background, tmp_path):
    with pytest.raises(InputError, match="background"):
        open_pictures(tmp_path, background)
