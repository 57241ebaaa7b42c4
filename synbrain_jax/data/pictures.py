"""Where pictures come from: a folder, a list of files, an HDF5 brick or a TFDS data set. Each is read when asked for.

Whatever a file holds becomes 8-bit RGB, as a viewer would show it: grey and palette pictures get three channels, CMYK
is converted, 16 bits are scaled to 8, a transparent picture lies on a background (white unless told otherwise), a
photograph is turned as its EXIF data say, and of an animation the first frame counts. Colour profiles are ignored.

Shape letters: n pictures, h w their size.
"""

import dataclasses
import io
import os
import re
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from synbrain_jax.errors import InputError
from synbrain_jax.files import read_text

SUFFIXES = (".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jfif", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
Image.init()  # loads Pillow's readers; some builds of it lack a few
_FORMATS = [
    name for name in ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP") if name in Image.OPEN
]
_BRICK = "imgBrick"  # of the Natural Scenes Dataset's nsd_stimuli.hdf5
_NAME_FEATURES = ("stimulus_id", "image/filename", "file_name", "filename")
_WHITE = (255, 255, 255)
_OPENING = threading.Lock()  # warnings' filters are the whole process's

Background = tuple[int, int, int]


@dataclasses.dataclass(frozen=True, eq=False)
class Pictures:
    """Pictures by number. `pictures[i]` is an array [h, w, 3] of uint8, read anew each time, from any thread."""

    where: str
    names: tuple[str, ...]  # distinct
    background: Background  # behind transparent pictures
    _read: Callable[[int], UInt8[np.ndarray, "h w 3"]] = dataclasses.field(repr=False)
    passed_over: tuple[str, ...] = ()  # other files of a folder, and links to folders, which are not followed

    def __post_init__(self):
        if not self.names:
            raise InputError(f"{self.where}: holds no picture.")
        name, count = Counter(self.names).most_common(1)[0]
        if count > 1:
            raise InputError(f"{self.where}: {count} pictures have the name '{name}'; give each a name of its own.")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
        """Reads a picture. Raises InputError, which names it, if that cannot be done."""
        return self._read(range(len(self))[index])


def open_pictures(source: str | os.PathLike, background: Background = _WHITE) -> Pictures:
    """Finds the pictures in `source`. None is read yet, except that names in a TFDS data set come with whole records.

    Args:
        source: one of
            a folder, searched with its subfolders for files with common suffixes (hidden ones left out, the others
              told in `passed_over`), in the order of their names, which are the paths within the folder;
            a .txt file with a path in each line, absolute or from the list's folder; the lines are the names;
            an .hdf5 or .h5 file with `imgBrick` [n, h, w, 3] uint8; the names are 0, 1, 2, ...;
            a folder that TFDS wrote as array_record, whose first image feature counts; the names are its text feature
              `stimulus_id`, `image/filename`, `file_name` or `filename` if it has one, else SPLIT/0, SPLIT/1, ...
              With such a feature every record is read once to know the names.
        background: red, green, blue (0 to 255) behind transparent pictures.

    Raises:
        InputError: there is nothing of this kind, it holds no picture, or two of the same name.
    """
    path = Path(source).expanduser()
    if len(background) != 3 or not all(0 <= part <= 255 for part in background):
        raise InputError(f"background {background}: expected red, green and blue, each 0 to 255.")
    if path.is_dir():
        return _tfds(path, background) if (path / "features.json").exists() else _folder(path, background)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder of pictures.")
    if path.suffix.lower() in (".hdf5", ".h5"):
        return _brick(path)
    if path.suffix.lower() == ".txt":
        return _list(path, background)
    raise InputError(
        f"{path}: expected a folder of pictures, a .txt list of files, an .hdf5 file with '{_BRICK}' or a TFDS folder."
    )


def decode_picture(content: bytes, where: str, background: Background = _WHITE) -> UInt8[np.ndarray, "h w 3"]:
    """The picture in a file's bytes. Raises InputError, beginning with `where`, if there is no whole one."""
    if not content:
        raise InputError(f"{where}: the file is empty; expected a picture.")
    try:
        # Other formats are not opened, because some of Pillow's readers start programs.
        with _opened(content) as picture:
            ImageOps.exif_transpose(picture, in_place=True)
            return _rgb(picture, background)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    except Image.UnidentifiedImageError as error:
        raise InputError(f"{where}: not a picture of a known format ({', '.join(_FORMATS)}).") from error
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))[0]
        raise InputError(
            f"{where}: the picture is too large ({pixels} pixels; at most {2 * Image.MAX_IMAGE_PIXELS}). Make it "
            "smaller."
        ) from error
    # A damaged file makes Pillow's readers raise almost anything.
    except Exception as error:
        raise InputError(f"{where}: the picture is damaged ({error}).") from error


def _opened(content: bytes) -> Image.Image:
    """The unread picture. Pillow warns of large ones from half the size on that it refuses."""
    with _OPENING, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(io.BytesIO(content), formats=_FORMATS)


def _rgb(picture: Image.Image, background: Background) -> UInt8[np.ndarray, "h w 3"]:
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM")):
        # Pillow's own conversion would clip. The high byte is what it takes where the 16 bits are of colours.
        grey = (np.asarray(picture).astype(np.int32) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if picture.mode in ("I", "F"):
        raise InputError(
            f"holds {'integers' if picture.mode == 'I' else 'floats'} of 32 bits, whose white is not known; save it "
            "with 8 or 16 bits."
        )
    if picture.has_transparency_data:
        behind = Image.new("RGBA", picture.size, (*background, 255))
        picture = Image.alpha_composite(behind, picture.convert("RGBA"))
    return np.array(picture.convert("RGB"))


def _files(
    where: Path, files: list[str], folder: Path, background: Background, passed_over: tuple[str, ...] = ()
) -> Pictures:
    names = tuple(_printable(file) for file in files)

    def read(index: int) -> UInt8[np.ndarray, "h w 3"]:
        file = folder / files[index]
        shown = _printable(os.fspath(file))
        if names[index] != files[index]:
            raise InputError(f"{shown}: the file's name is not UTF-8, as names of stimuli must be; rename it.")
        try:
            content = file.read_bytes()
        except (OSError, ValueError) as error:  # ValueError: no file can have such a name
            raise InputError(f"{shown}: cannot be read ({getattr(error, 'strerror', error)}).") from error
        return decode_picture(content, shown, background)

    return Pictures(os.fspath(where), names, background, read, passed_over)


def _printable(name: str) -> str:
    """A file's name with bytes that are not UTF-8 written out."""
    return os.fsencode(name).decode(errors="backslashreplace")


def _folder(path: Path, background: Background) -> Pictures:
    found = {True: [], False: []}
    for file in path.rglob("*"):
        name = file.relative_to(path)
        hidden = any(part.startswith(".") for part in name.parts)
        if not hidden and (file.is_file() or file.is_symlink()):
            found[file.is_file() and file.suffix.lower() in SUFFIXES].append(name.as_posix())
    if not found[True]:
        raise InputError(f"{path}: holds no picture; looked for {', '.join(SUFFIXES)} here and in all subfolders.")
    return _files(path, sorted(found[True]), path, background, tuple(map(_printable, sorted(found[False]))))


def _list(path: Path, background: Background) -> Pictures:
    lines = (line.strip() for line in read_text(path).removeprefix("\ufeff").splitlines())
    return _files(path, [line for line in lines if line], path.parent, background)


def _brick(path: Path) -> Pictures:
    try:
        import h5py
    except ImportError as error:
        raise InputError(f"{path}: reading HDF5 needs the package h5py; pip install h5py") from error
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise InputError(f"{path}: cannot be read as an HDF5 file ({error}).") from error
    brick = file.get(_BRICK)
    if not isinstance(brick, h5py.Dataset):
        raise InputError(f"{path}: no data set '{_BRICK}'; it holds {', '.join(file) or 'nothing'}.")
    if brick.ndim != 4 or brick.shape[3] != 3 or brick.dtype != np.uint8:
        raise InputError(
            f"{path}: '{_BRICK}' is {list(brick.shape)} of {brick.dtype}; expected [pictures, height, width, 3] of "
            "uint8."
        )

    def read(index: int) -> UInt8[np.ndarray, "h w 3"]:
        try:
            return brick[index]
        except OSError as error:
            raise InputError(f"{path}: picture {index} of '{_BRICK}' is damaged ({error}).") from error

    return Pictures(os.fspath(path), tuple(map(str, range(len(brick)))), _WHITE, read)


def _tfds(path: Path, background: Background) -> Pictures:
    # Imported here, so that pictures in files need no TFDS.
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(path)
    features = dict(builder.info.features.items())
    image = next((name for name, feature in features.items() if isinstance(feature, tfds.features.Image)), None)
    if image is None:
        raise InputError(f"{path}: the data set has no image feature; it holds {', '.join(features)}.")
    if features[image].np_dtype not in (np.uint8, np.uint16):
        raise InputError(f"{path}: '{image}' holds {features[image].np_dtype}; expected uint8 or uint16.")
    splits = {}
    for split in builder.info.splits:
        try:
            splits[split] = builder.as_data_source(split, decoders={image: tfds.decode.SkipDecoding()})
        # TFDS raises the one for formats without random access, the other where it looks for TensorFlow to read them.
        except (NotImplementedError, ModuleNotFoundError) as error:
            raise InputError(
                f"{path}: the records are {builder.info.file_format.value} files, which need TensorFlow; prepare the "
                "data set with file_format='array_record'."
            ) from error
    places = [(split, index) for split, source in splits.items() for index in range(len(source))]
    name = next((name for name in _NAME_FEATURES if isinstance(features.get(name), tfds.features.Text)), None)

    def name_of(split: str, index: int) -> str:
        return f"{split}/{index}" if name is None else splits[split][index][name].decode()

    names = tuple(name_of(*place) for place in places)

    def read(index: int) -> UInt8[np.ndarray, "h w 3"]:
        split, row = places[index]
        return decode_picture(splits[split][row][image], f"{path}: picture '{names[index]}'", background)

    return Pictures(os.fspath(path), names, background, read)
