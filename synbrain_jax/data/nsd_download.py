"""The files of the Natural Scenes Dataset that one subject needs, and fetching them from its bucket in Amazon's S3.

The bucket answers without a signature, but NSD's terms must have been agreed to. A file keeps its key as its path below
the root. It is fetched to a name of its own beside that path, on which a later call goes on, and gets its name when its
length is right.
"""

import contextlib
import dataclasses
import fcntl
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

from tqdm import tqdm

from synbrain_jax.data.nsd_files import BETAS, SESSIONS, subject_name
from synbrain_jax.errors import InputError

BUCKET = "natural-scenes-dataset"
TERMS = (
    "The Natural Scenes Dataset may be used by those who have agreed to its terms. Please fill in the form first: "
    "http://naturalscenesdataset.org, 'Data access'."
)
_ATLASES = (
    "prf-visualrois",
    "prf-eccrois",
    "floc-faces",
    "floc-bodies",
    "floc-places",
    "floc-words",
    "streams",
    "HCP_MMP1",
    "Kastner2015",
    "corticalsulc",
)
_ATTEMPTS = 5  # without a new byte
_PAUSE = 2.0  # seconds before the second of them, then twice, three times ... as many
_CHUNK = 2**20


@dataclasses.dataclass(frozen=True)
class RemoteFile:
    """A file in the bucket."""

    key: str
    size: int | None = None  # bytes; None: not asked yet
    optional: bool = False  # preparation can do without
    version: str = ""  # what S3 calls this content


def needed_files(
    subject: int, *, betas: str = BETAS, betas_format: Literal["nii.gz", "hdf5"] = "nii.gz"
) -> list[RemoteFile]:
    """What preparing a subject, 1 to 8, reads: design, pictures, responses, noise ceiling, regions and their names.

    Sizes are not known until `with_sizes` has asked for them.

    Raises:
        InputError: there is no such subject.
    """
    if not 1 <= subject <= len(SESSIONS):
        raise InputError(f"subject is {subject}; NSD has subjects 1 to {len(SESSIONS)}.")
    name = subject_name(subject)
    responses = f"nsddata_betas/ppdata/{name}/func1pt8mm/{betas}"
    regions = f"nsddata/ppdata/{name}/func1pt8mm/roi"
    required = [
        "nsddata/experiments/nsd/nsd_expdesign.mat",
        f"{regions}/nsdgeneral.nii.gz",
        f"{responses}/ncsnr.nii.gz",
        *(f"{responses}/betas_session{session:02d}.{betas_format}" for session in range(1, SESSIONS[subject - 1] + 1)),
        "nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5",
    ]
    optional = [f"{regions}/{atlas}.nii.gz" for atlas in _ATLASES]
    for owner in (name, "fsaverage"):  # the tables of some atlases are there, of others here
        optional += [f"nsddata/freesurfer/{owner}/label/{atlas}.mgz.ctab" for atlas in _ATLASES]
    return [RemoteFile(key) for key in required] + [RemoteFile(key, optional=True) for key in optional]


def show(root: str | os.PathLike, subject: int, *, betas: str = BETAS) -> str:
    """The list of `needed_files` for people: a line for each with its address, its bytes as far as it is in `root`, and
    "optional" where NSD need not have it.

    Asks nobody, so the size of a file that is not there is unknown ("?").
    """
    files = needed_files(subject, betas=betas)
    places = [Path(root).expanduser() / file.key for file in files]
    sizes = [place.stat().st_size if place.exists() else None for place in places]
    told = [(_url(file.key), "?" if size is None else size) for file, size in zip(files, sizes, strict=True)]
    lines = [f"{key}\t{size}" + "\toptional" * file.optional for file, (key, size) in zip(files, told, strict=True)]
    there = [size for size in sizes if size is not None]
    return "\n".join([*lines, f"{len(files)} files, {len(there)} of them ({sum(there) / 1e9:.1f} GB) there. {TERMS}"])


def download(root: str | os.PathLike, subject: int, *, betas: str = BETAS, client: Any | None = None) -> str:
    """`fetch` of `needed_files`; returns where they are, for people. `client` is that of NSD's bucket unless given."""
    print(TERMS, file=sys.stderr)
    paths = fetch(root, needed_files(subject, betas=betas), open_bucket() if client is None else client)
    return f"{os.fspath(root)}: all {len(paths)} files of {subject_name(subject)} are there"


def open_bucket(endpoint_url: str | None = None) -> Any:
    """A boto3 client that signs nothing. `endpoint_url` names another server than Amazon's."""
    try:
        import boto3
        from botocore import UNSIGNED
        from botocore.config import Config
    except ImportError as error:
        raise InputError("downloading NSD needs the package boto3; pip install 'synbrain-jax[nsd]'") from error
    # boto3 would ask the machine for a region. Names of buckets as hosts are Amazon's way only.
    addressing = {} if endpoint_url is None else {"s3": {"addressing_style": "path"}}
    config = Config(signature_version=UNSIGNED, retries={"total_max_attempts": 3}, **addressing)
    return boto3.client("s3", region_name="us-east-2", endpoint_url=endpoint_url, config=config)


def with_sizes(files: Sequence[RemoteFile], client: Any) -> list[RemoteFile]:
    """Asks the bucket for sizes. Optional files that it does not have are left out.

    Raises:
        InputError: a required file is not there, or the bucket cannot be reached.
    """
    from botocore.exceptions import ClientError

    found = []
    for file in files:
        with _plain_errors(file.key):
            try:
                head = client.head_object(Bucket=BUCKET, Key=file.key)
            except ClientError as error:
                # 403: what S3 says of a missing file where the bucket may not be listed.
                if not file.optional or error.response["ResponseMetadata"]["HTTPStatusCode"] not in (403, 404):
                    raise
                continue
            found.append(dataclasses.replace(file, size=head["ContentLength"], version=head["ETag"].strip('"')))
    return found


class _Disconnected(InputError):
    """What another attempt may mend."""


@contextlib.contextmanager
def _plain_errors(key: str) -> Iterator[None]:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        answer = error.response["Error"]
        hint = "; was the version of the betas misspelt?" if answer["Code"] in ("404", "NoSuchKey") else ""
        raise InputError(f"{_url(key)}: the bucket answers {answer['Code']} ({answer['Message']}){hint}") from error
    except BotoCoreError as error:
        raise _Disconnected(
            f"{_url(key)}: no connection ({error}). Give the command again later; it goes on where it was."
        ) from error


def fetch(root: str | os.PathLike, files: Sequence[RemoteFile], client: Any) -> list[Path]:
    """Fetches files to their places below `root`, and returns their paths.

    Files that are there are not fetched again. What a stopped call left is gone on with, unless the file in the bucket
    has become another. A broken connection is taken up again five times.

    Args:
        root: folder; made if need be.
        files: from `needed_files`; optional ones that the bucket does not have are passed over.
        client: from `open_bucket`.

    Raises:
        InputError: a file is missing in the bucket, or there with another length, the disk is too small, the connection
            stays broken, or another process is fetching the same file.
    """
    root, files = Path(root).expanduser(), with_sizes(files, client)
    paths = [root / file.key for file in files]
    parts = [path.with_name(f"{path.name}.{file.version}.part") for path, file in zip(paths, files, strict=True)]
    for file, path in zip(files, paths, strict=True):
        if path.exists() and path.stat().st_size != file.size:
            raise InputError(
                f"{path}: has {path.stat().st_size} bytes but {file.size} in the bucket; delete it, and give the "
                "command again."
            )
    there = [
        file.size if path.exists() else _length(part) for file, path, part in zip(files, paths, parts, strict=True)
    ]
    root.mkdir(parents=True, exist_ok=True)
    missing, free = sum(file.size for file in files) - sum(there), shutil.disk_usage(root).free
    if missing > free:
        raise InputError(f"{root}: {missing / 1e9:.1f} GB are to be fetched, but only {free / 1e9:.1f} GB are free.")
    with tqdm(
        total=missing + sum(there), initial=sum(there), desc="download", unit="B", unit_scale=True, disable=None
    ) as bar:
        for file, path, part in zip(files, paths, parts, strict=True):
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                _fetch(client, file, part, bar.update)
                part.rename(path)
    return paths


def _length(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _fetch(client: Any, file: RemoteFile, part: Path, advance: Callable[[int], Any]) -> None:
    """Appends to `part` until it is whole."""
    with part.open("ab") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"{part}: another process is fetching this file; wait for it.") from error
        tried = 0
        while (begin := stream.tell()) < file.size:
            try:
                _append(client, file, stream, advance)
                broken = _Disconnected(f"{_url(file.key)}: the bucket sends {begin} of {file.size} bytes, and no more.")
            except _Disconnected as error:
                broken = error
            tried = 0 if stream.tell() > begin else tried + 1
            if tried == _ATTEMPTS:
                raise broken
            time.sleep(_PAUSE * tried)
    if _length(part) > file.size:
        part.unlink()
        raise InputError(f"{_url(file.key)}: sent more than the {file.size} bytes it has; try again.")


def _append(client: Any, file: RemoteFile, stream: BinaryIO, advance: Callable[[int], Any]) -> None:
    """One request for all that is missing; the stream keeps what came before an error."""
    begin = stream.tell()
    with _plain_errors(file.key):
        answer = client.get_object(Bucket=BUCKET, Key=file.key, Range=f"bytes={begin}-", IfMatch=f'"{file.version}"')
        if begin and answer["ResponseMetadata"]["HTTPStatusCode"] != 206:  # the whole file, from its start
            stream.truncate(0)
            stream.seek(0)
            advance(-begin)
        for chunk in answer["Body"].iter_chunks(_CHUNK):
            advance(stream.write(chunk))


def _url(key: str) -> str:
    return f"s3://{BUCKET}/{key}"
