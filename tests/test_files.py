"""Small files: whole or not at all, and one clear error for each that is damaged."""

import io
import pathlib

import numpy as np
import pytest
from etils import epath

from synbrain_jax import files
from synbrain_jax.errors import InputError

ARRAYS = {
    "numbers": np.arange(12, dtype=np.float32).reshape(3, 4),
    "text": np.array(["face", "häuser"]),
    "scalar": np.array(2.5),
}


def names(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written_is_read_back(tmp_path):
    files.write_npz(tmp_path / "new" / "folder" / "a.npz", ARRAYS)
    read = files.read_npz(tmp_path / "new" / "folder" / "a.npz")
    assert read.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)
    files.write_npy(tmp_path / "a.npy", ARRAYS["numbers"])
    np.testing.assert_array_equal(files.read_array(tmp_path / "a.npy"), ARRAYS["numbers"])
    files.write_text(tmp_path / "a.txt", "Großhirn\n")
    assert (tmp_path / "a.txt").read_bytes() == "Großhirn\n".encode()
    assert files.read_text(tmp_path / "a.txt") == "Großhirn\n"
    assert names(tmp_path) == ["a.npy", "a.txt", "new"]


@pytest.mark.parametrize("failing", ["write_bytes", "replace"])
@pytest.mark.parametrize("existing", [True, False])
def test_a_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch, failing, existing):
    path = tmp_path / "a.bin"
    if existing:
        files.write_bytes(path, b"old")
    kind = type(epath.Path(path))
    real = kind.write_bytes

    def fail(self, content):
        if failing == "write_bytes":
            real(self, b"ha")  # the disk is full after two bytes
        raise OSError("no space left")

    monkeypatch.setattr(kind, failing, fail)
    with pytest.raises(OSError, match="no space left"):
        files.write_bytes(path, b"new content")
    assert names(tmp_path) == (["a.bin"] if existing else [])
    if existing:
        assert path.read_bytes() == b"old"


def test_a_reader_never_sees_part_of_a_file(tmp_path, monkeypatch):
    """At the moment of the rename, the old file is still whole and the new one already is."""
    path = tmp_path / "a.bin"
    files.write_bytes(path, b"old")
    kind, seen = type(epath.Path(path)), []
    real = kind.replace

    def watched(self, target):
        seen.append((pathlib.Path(self).read_bytes(), path.read_bytes()))
        return real(self, target)

    monkeypatch.setattr(kind, "replace", watched)
    files.write_bytes(path, b"new content")
    assert seen == [(b"new content", b"old")]
    assert path.read_bytes() == b"new content"


def saved(save, *args, **kwargs) -> bytes:
    buffer = io.BytesIO()
    save(buffer, *args, **kwargs)
    return buffer.getvalue()


CONTENTS = {
    "npy": (files.read_array, saved(np.save, ARRAYS["numbers"])),
    "npz": (files.read_npz, saved(np.savez, **ARRAYS)),
    "npz_compressed": (files.read_npz, saved(np.savez_compressed, **ARRAYS)),
}


def refused(read, path) -> bool:
    """False if the file could be read, True if it was refused with an InputError that names it."""
    try:
        read(path)
    except InputError as error:
        return str(path) in str(error)
    return False


@pytest.mark.parametrize("kind", CONTENTS)
def test_a_file_cut_off_anywhere_is_refused(tmp_path, kind):
    read, content = CONTENTS[kind]
    path = tmp_path / "cut"
    for size in range(len(content)):
        path.write_bytes(content[:size])
        assert refused(read, path), size
    path.write_bytes(content)
    read(path)


@pytest.mark.parametrize("kind", CONTENTS)
def test_one_damaged_byte_never_gets_another_exception(tmp_path, kind):
    read, content = CONTENTS[kind]
    path = tmp_path / "damaged"
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        refused(read, path)


@pytest.mark.parametrize("read", [files.read_array, files.read_npz])
def test_what_is_no_array_file_is_refused(tmp_path, read):
    objects = np.array([{"a": 1}], dtype=object)
    for content in (b"", b"not an array", saved(np.save, objects), saved(np.savez, x=objects)):
        (tmp_path / "a").write_bytes(content)
        assert refused(read, tmp_path / "a"), content[:20]
    assert refused(read, tmp_path / "absent")
    assert refused(read, tmp_path)


def test_npy_and_npz_are_not_confused(tmp_path):
    (tmp_path / "a").write_bytes(saved(np.savez, **ARRAYS))
    with pytest.raises(InputError, match=r"ends in \.npz"):
        files.read_array(tmp_path / "a")
    (tmp_path / "a").write_bytes(saved(np.save, ARRAYS["numbers"]))
    assert refused(files.read_npz, tmp_path / "a")


def test_text_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xff\xfe{")
    for path in (tmp_path / "a.json", tmp_path / "absent.json"):
        with pytest.raises(InputError, match=path.name):
            files.read_text(path)
