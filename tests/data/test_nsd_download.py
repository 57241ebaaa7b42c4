"""Fetching NSD's files, against a double of its bucket on this machine."""

import fcntl
import http.server
import shutil
import sys
import threading
from urllib.parse import unquote

import numpy as np
import pytest

from synbrain_jax import cli
from synbrain_jax.data import nsd_download
from synbrain_jax.data.nsd_download import BUCKET, RemoteFile, download, fetch, needed_files, show, with_sizes
from synbrain_jax.errors import InputError

DESIGN = "nsddata/experiments/nsd/nsd_expdesign.mat"
CONTENT = np.random.default_rng(0).bytes(3_000_000)
MISSING = "<?xml version='1.0'?><Error><Code>NoSuchKey</Code><Message>The key does not exist.</Message></Error>"


class Double(http.server.ThreadingHTTPServer):
    """Answers like S3. What goes wrong is set per test."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.files: dict[str, bytes] = {}
        self.breaks: list[int] = []  # how many bytes the next answers hold before the connection breaks
        self.ranges = True
        self.declared = 0  # added to the length that HEAD says
        self.absent = 404  # what is answered for a missing file
        self.signed: list[bool] = []
        self.asked: list[tuple[str, str, str | None]] = []


class Answers(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        double, span = self.server, self.headers.get("Range")
        key = unquote(self.path).removeprefix(f"/{BUCKET}/")
        double.asked.append((self.command, key, span))
        double.signed.append("Authorization" in self.headers)
        content = double.files.get(key)
        if content is None:
            self.reply(double.absent, MISSING.encode(), {})
            return
        tag = f'"{hash(content) % 2**32:08x}"'
        if self.headers.get("If-Match", tag) != tag:
            self.reply(412, MISSING.replace("NoSuchKey", "PreconditionFailed").encode(), {})
            return
        begin = int(span.removeprefix("bytes=").removesuffix("-")) if span and double.ranges else 0
        self.reply(206 if begin else 200, content[begin:], {"ETag": tag})

    def reply(self, status, content, headers):
        self.send_response(status)
        declared = len(content) + (self.server.declared if self.command == "HEAD" else 0)
        for name, value in {"Content-Length": declared, **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.server.breaks:
            content = content[: self.server.breaks.pop(0)]
            self.close_connection = True
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def bucket(monkeypatch):
    monkeypatch.setattr(nsd_download, "_PAUSE", 0.0)
    with Double() as double:
        thread = threading.Thread(target=double.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield double
        double.shutdown()
        thread.join()


@pytest.fixture
def client(bucket):
    return nsd_download.open_bucket(f"http://127.0.0.1:{bucket.server_port}")


def gets(bucket):
    return [span for command, _, span in bucket.asked if command == "GET"]


# ---- which files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("subject", "sessions"), [(1, 40), (3, 32), (4, 30), (5, 40), (6, 32), (8, 30)])
def test_a_subject_needs_all_its_sessions(subject, sessions):
    keys = [file.key for file in needed_files(subject)]
    folder = f"nsddata_betas/ppdata/subj{subject:02d}/func1pt8mm/betas_fithrf_GLMdenoise_RR"
    expected = {f"{folder}/betas_session{session:02d}.nii.gz" for session in range(1, sessions + 1)}
    assert {key for key in keys if "betas_session" in key} == expected
    assert len(set(keys)) == len(keys)
    for key in (
        DESIGN,
        "nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5",
        f"{folder}/ncsnr.nii.gz",
        f"nsddata/ppdata/subj{subject:02d}/func1pt8mm/roi/nsdgeneral.nii.gz",
        f"nsddata/ppdata/subj{subject:02d}/func1pt8mm/roi/prf-visualrois.nii.gz",
        f"nsddata/freesurfer/subj{subject:02d}/label/floc-faces.mgz.ctab",
        "nsddata/freesurfer/fsaverage/label/HCP_MMP1.mgz.ctab",
    ):
        assert key in keys


def test_other_betas():
    files = needed_files(2, betas="betas_fithrf", betas_format="hdf5")
    keys = {file.key for file in files if not file.optional}
    assert "nsddata_betas/ppdata/subj02/func1pt8mm/betas_fithrf/betas_session40.hdf5" in keys
    assert "nsddata_betas/ppdata/subj02/func1pt8mm/betas_fithrf/ncsnr.nii.gz" in keys
    assert {file.key.split("/")[-2] for file in files if file.optional} == {"roi", "label"}


@pytest.mark.parametrize("subject", [0, 9])
def test_there_are_eight_subjects(subject):
    with pytest.raises(InputError, match=f"subject is {subject}; NSD has subjects 1 to 8"):
        needed_files(subject)


def test_the_list_says_what_is_there(tmp_path, capsys):
    (tmp_path / DESIGN).parent.mkdir(parents=True)
    (tmp_path / DESIGN).write_bytes(b"12345")
    lines = show(tmp_path, 4).splitlines()
    files = needed_files(4)
    assert lines[0] == f"s3://{BUCKET}/{DESIGN}\t5"
    assert lines[1:-1] == [f"s3://{BUCKET}/{file.key}\t?" + "\toptional" * file.optional for file in files[1:]]
    assert [line.split("/")[-1] for line in lines if line.endswith("?")][-1] == "nsd_stimuli.hdf5\t?"
    assert lines[-1].startswith(f"{len(files)} files, 1 of them (0.0 GB) there. ")
    assert "agreed to its terms" in lines[-1]
    cli.main(["prepare", "nsd", "--root", str(tmp_path), "--subject", "4", "--list"])
    assert capsys.readouterr().out.splitlines() == lines


def test_sizes_are_asked_for(bucket, client):
    bucket.files = {DESIGN: CONTENT}
    (file,) = with_sizes([RemoteFile(DESIGN), RemoteFile("roi/none.nii.gz", optional=True)], client)
    assert (file.key, file.size) == (DESIGN, len(CONTENT))
    assert {command for command, _, _ in bucket.asked} == {"HEAD"}


# ---- fetching --------------------------------------------------------------------------------------------------------


def test_files_lie_where_their_keys_say(bucket, client, tmp_path):
    bucket.files = {DESIGN: CONTENT, "a/b.nii.gz": b"x"}
    paths = fetch(tmp_path / "nsd", [RemoteFile(DESIGN), RemoteFile("a/b.nii.gz")], client)
    assert paths == [tmp_path / "nsd" / DESIGN, tmp_path / "nsd/a/b.nii.gz"]
    assert [path.read_bytes() for path in paths] == [CONTENT, b"x"]
    assert [path.name for path in (tmp_path / "nsd/a").iterdir()] == ["b.nii.gz"]
    bucket.asked.clear()
    fetch(tmp_path / "nsd", [RemoteFile(DESIGN), RemoteFile("a/b.nii.gz")], client)
    assert gets(bucket) == []


def test_a_subject_is_fetched_whole(bucket, client, tmp_path, capsys):
    bucket.files = {file.key: file.key.encode() for file in needed_files(8) if not file.optional}
    assert download(tmp_path, 8, client=client) == f"{tmp_path}: all 34 files of subj08 are there"
    assert "agreed to its terms" in capsys.readouterr().err
    for key, content in bucket.files.items():
        assert (tmp_path / key).read_bytes() == content


def test_requests_are_not_signed(bucket, monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    bucket.files = {DESIGN: b"x"}
    client = nsd_download.open_bucket(f"http://127.0.0.1:{bucket.server_port}")
    fetch(tmp_path, [RemoteFile(DESIGN)], client)
    assert bucket.signed == [False, False]


def test_a_broken_connection_is_taken_up_where_it_broke(bucket, client, tmp_path):
    bucket.files, bucket.breaks = {DESIGN: CONTENT}, [1_000_000, 500_000]
    (path,) = fetch(tmp_path, [RemoteFile(DESIGN)], client)
    assert path.read_bytes() == CONTENT
    assert gets(bucket) == ["bytes=0-", "bytes=1000000-", "bytes=1500000-"]


def test_a_stopped_download_goes_on(bucket, client, tmp_path):
    bucket.files, bucket.breaks = {DESIGN: CONTENT}, [1_000_000] + 5 * [0]
    with pytest.raises(InputError, match=rf"s3://{BUCKET}/{DESIGN}: no connection .* it goes on where it was"):
        fetch(tmp_path, [RemoteFile(DESIGN)], client)
    assert not (tmp_path / DESIGN).exists()
    (part,) = (tmp_path / DESIGN).parent.iterdir()
    assert part.read_bytes() == CONTENT[:1_000_000]
    assert len(gets(bucket)) == 6
    bucket.asked.clear()
    fetch(tmp_path, [RemoteFile(DESIGN)], client)
    assert (tmp_path / DESIGN).read_bytes() == CONTENT
    assert gets(bucket) == ["bytes=1000000-"]
    assert list((tmp_path / DESIGN).parent.iterdir()) == [tmp_path / DESIGN]


def test_a_part_of_what_has_changed_is_not_gone_on_with(bucket, client, tmp_path):
    bucket.files, bucket.breaks = {DESIGN: CONTENT}, [1_000_000] + 5 * [0]
    with pytest.raises(InputError):
        fetch(tmp_path, [RemoteFile(DESIGN)], client)
    bucket.files = {DESIGN: CONTENT[::-1]}
    bucket.asked.clear()
    fetch(tmp_path, [RemoteFile(DESIGN)], client)
    assert (tmp_path / DESIGN).read_bytes() == CONTENT[::-1]
    assert gets(bucket) == ["bytes=0-"]


def test_what_changes_between_asking_and_fetching_is_noticed(bucket, client, tmp_path, monkeypatch):
    bucket.files = {DESIGN: CONTENT}
    monkeypatch.setattr(nsd_download, "with_sizes", lambda files, client: [RemoteFile(DESIGN, 3, version="older")])
    with pytest.raises(InputError, match="the bucket answers PreconditionFailed"):
        fetch(tmp_path, [RemoteFile(DESIGN)], client)
    assert not (tmp_path / DESIGN).exists()


def test_a_server_without_ranges_starts_again(bucket, client, tmp_path):
    bucket.files, bucket.breaks, bucket.ranges = {DESIGN: CONTENT}, [1_000_000], False
    (path,) = fetch(tmp_path, [RemoteFile(DESIGN)], client)
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize(("extra", "message"), [(7, "sends 3000000 of 3000007 bytes"), (-7, "more than the 2999993")])
def test_another_length_than_stated_is_not_taken_for_the_file(bucket, client, tmp_path, extra, message):
    bucket.files, bucket.declared = {DESIGN: CONTENT}, extra
    with pytest.raises(InputError, match=message):
        fetch(tmp_path, [RemoteFile(DESIGN)], client)
    assert not (tmp_path / DESIGN).exists()


def test_a_file_of_another_length_is_left_to_the_user(bucket, client, tmp_path):
    bucket.files = {DESIGN: CONTENT}
    (tmp_path / DESIGN).parent.mkdir(parents=True)
    (tmp_path / DESIGN).write_bytes(b"half")
    with pytest.raises(InputError, match=r"nsd_expdesign\.mat: has 4 bytes but 3000000 in the bucket; delete it"):
        fetch(tmp_path, [RemoteFile(DESIGN)], client)
    assert (tmp_path / DESIGN).read_bytes() == b"half"


def test_a_missing_file_is_named_before_anything_is_fetched(bucket, client, tmp_path):
    bucket.files = {DESIGN: CONTENT}
    with pytest.raises(InputError, match=rf"s3://{BUCKET}/betas/x.nii.gz: the bucket answers 404 .*misspelt"):
        fetch(tmp_path, [RemoteFile(DESIGN), RemoteFile("betas/x.nii.gz")], client)
    assert gets(bucket) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("absent", [404, 403])
def test_an_optional_file_may_be_missing(absent, bucket, client, tmp_path):
    bucket.files, bucket.absent = {DESIGN: CONTENT}, absent
    files = [RemoteFile(DESIGN), RemoteFile("roi/streams.nii.gz", optional=True)]
    assert fetch(tmp_path, files, client) == [tmp_path / DESIGN]


def test_a_full_disk_is_said_before_anything_is_fetched(bucket, client, tmp_path, monkeypatch):
    bucket.files = {DESIGN: CONTENT}
    free = shutil.disk_usage(tmp_path)._replace(free=2_999_999)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    with pytest.raises(InputError, match=r"0\.0 GB are to be fetched, but only 0\.0 GB are free"):
        fetch(tmp_path, [RemoteFile(DESIGN)], client)
    assert gets(bucket) == []


def test_two_processes_do_not_write_one_file(bucket, client, tmp_path):
    bucket.files, bucket.breaks = {DESIGN: CONTENT}, [1_000_000] + 5 * [0]
    with pytest.raises(InputError):
        fetch(tmp_path, [RemoteFile(DESIGN)], client)
    (part,) = (tmp_path / DESIGN).parent.iterdir()
    with part.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process is fetching this file"):
            fetch(tmp_path, [RemoteFile(DESIGN)], client)
    assert part.read_bytes() == CONTENT[:1_000_000]


def test_an_unreachable_bucket_is_said(bucket, tmp_path):
    nobody = nsd_download.open_bucket("http://127.0.0.1:9")
    with pytest.raises(InputError, match="no connection"):
        fetch(tmp_path, [RemoteFile(DESIGN)], nobody)


def test_the_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(InputError, match=r"boto3; pip install 'synbrain-jax\[nsd\]'"):
        nsd_download.open_bucket()
