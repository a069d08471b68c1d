"""Where samples and groups lie: a local folder, or one of an object store or HDFS.

A remote place is a `upath.UPath`, which does what a `Path` does through fsspec: `s3://` needs s3fs,
`gs://` gcsfs, `hdfs://` pyarrow with Hadoop's own library. Their keys and endpoints are set as
those libraries document (environment variables, profiles, fsspec's own configuration), never in a
configuration of ours.

A store that cannot be reached is an error within a minute (S3; seconds where it refuses), so that a
run does not hang: what is finished stays, and the same command goes on.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bonbon.system.errors import BonbonError, first_line

# Stores that show an object once it is whole; elsewhere it is written aside and renamed.
_WHOLE_OBJECTS = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"})
_S3 = frozenset({"s3", "s3a"})
# botocore's tries of a request; s3fs then tries anew what timed out.
_S3_CONFIG = {
    "connect_timeout": 5,
    "read_timeout": 60,
    "retries": {"mode": "standard", "max_attempts": 3},
}
_S3FS_TRIES = 2
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def storage_path(place: str | Path) -> Path:
    """The folder that a setting names: a `Path`, or a `UPath` for what has a scheme (`s3://…`).

    Raises BonbonError for a scheme that is not known or whose library is not installed.
    """
    if not isinstance(place, str) and is_remote(place):
        return place
    match = re.match(r"([a-z][a-z0-9+.-]*)://([^/]*@)?", str(place), re.IGNORECASE)
    if not isinstance(place, str) or match is None:
        return Path(place).expanduser()
    if match[2]:  # not shown: it may hold a password
        raise BonbonError(
            "storage has a user name or a key in its address; leave it out, and set the keys as "
            "the store's library documents"
        )
    scheme = match[1].lower()
    place = scheme + place[len(scheme) :]
    try:
        from upath import UPath

        path: Any = UPath(place, **_options(scheme))
        filesystem = path.fs  # the library is loaded here
    except (ImportError, ValueError, OSError) as error:
        needs = (
            "hdfs:// needs Java and Hadoop's libhdfs, found by JAVA_HOME, HADOOP_HOME and CLASSPATH"
            if scheme == "hdfs"
            else "pip install 'bonbon-align[storage]' brings what s3:// and gs:// need"
        )
        raise BonbonError(
            f"storage {place} cannot be used: {_without_query(first_line(error)):.200}; {needs}"
        ) from error
    if scheme in _S3:
        filesystem.retries = _S3FS_TRIES
    remote: Path = path
    return remote


def _options(scheme: str) -> dict[str, Any]:
    """What fsspec's file system is made with; the user's fsspec configuration comes first."""
    from fsspec.config import conf  # type: ignore[import-untyped]

    # Other processes write shards too, so a listing must never be an old one.
    options: dict[str, Any] = {"use_listings_cache": False}
    if scheme in _S3:
        options["config_kwargs"] = _S3_CONFIG
    return options | {key: conf[scheme][key] for key in options if key in conf.get(scheme, {})}


def is_remote(path: Path) -> bool:
    """Whether a path is a store's, which only its library reaches."""
    return hasattr(path, "fs") and path.fs.protocol not in ("file", ("file", "local"))


def is_there(path: Path) -> bool:
    """Whether a file is there. Raises BonbonError when its store cannot be reached."""
    with reached(path, "read"):
        return path.exists()


def files_in(folder: Path) -> list[Path]:
    """The files of a folder in the order of their names; none where there is no folder.

    Raises BonbonError when its store cannot be reached.
    """
    with reached(folder, "read"):
        # Object stores have no folders: one is there while it holds something.
        return sorted(folder.iterdir()) if folder.is_dir() else []


def remove_file(path: Path) -> None:
    """Remove a file, where there is one. Raises BonbonError if it cannot."""
    try:
        with reached(path, "remove"):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error


def remove_folder(folder: Path) -> None:
    """Remove a folder with what is in it, where there is one. Raises BonbonError if it cannot."""
    try:
        with reached(folder, "remove"):
            if is_remote(folder):
                remote: Any = folder
                if remote.fs.exists(remote.path):
                    remote.fs.rm(remote.path, recursive=True)
            elif folder.is_dir():
                shutil.rmtree(folder)
    except OSError as error:
        raise cannot_write(folder, error) from error


def cannot_write(path: Path, error: OSError) -> BonbonError:
    """The sentence for a local file that could not be written."""
    reason = os.strerror(error.errno) if error.errno else str(error)  # pyarrow has its own words
    if error.errno in _FULL:
        way_out = "make room; what is finished stays, and the same command goes on"
    else:
        way_out = "choose a folder that can be written"
    return BonbonError(f"cannot write {path}: {reason}; {way_out}")


@contextmanager
def reached(path: Path, doing: str) -> Iterator[None]:
    """Turn whatever a store's library raises into a BonbonError that names the place.

    The libraries under fsspec raise errors of their own kinds, so anything is caught, for remote
    paths alone.
    """
    try:
        yield
    except BonbonError:
        raise
    except Exception as error:
        if not is_remote(path):
            raise
        raise BonbonError(
            f"cannot {doing} {path}: {_store_message(error)}; what is finished stays, and the same "
            "command goes on once that is put right"
        ) from error


def _store_message(error: Exception) -> str:
    """What a store's library says, in the user's terms where its own are not."""
    name = type(error).__name__
    if "Credential" in name or "TokenRetrieval" in name:
        return (
            "no credentials were found; set them as the store's library documents (for S3: "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE)"
        )
    if isinstance(error, PermissionError):
        return f"the store refuses it ({str(error) or 'permission denied'}); check the credentials"
    if isinstance(error, TimeoutError) or "Timeout" in name or "Connect" in name:
        return f"the store cannot be reached ({_without_query(first_line(error))})"
    if isinstance(error, FileNotFoundError):
        return f"it is not there ({_without_query(first_line(error))})"
    return _without_query(first_line(error))


def _without_query(text: str) -> str:
    """A text with its addresses' queries, which may hold signatures, left out."""
    return re.sub(r"\?[^\s\"]*", "", text)


def beside(path: Path) -> Path:
    """A name beside `path` that no other writer of it uses, for what is not yet whole."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")


@contextmanager
def uploaded(path: Path) -> Iterator[Path]:
    """Yield a local path; on success its file is put at the remote `path`, whole or not at all.

    Raises BonbonError when the store cannot be reached, or the temporary folder not be written.
    """
    remote: Any = path
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / path.name
        try:
            yield local
        except OSError as error:
            raise cannot_write(local, error) from error
        with reached(path, "write"):
            if remote.protocol in _WHOLE_OBJECTS:
                remote.fs.put_file(str(local), remote.path)
                return
            aside = beside(path)
            remote.parent.mkdir(parents=True, exist_ok=True)
            remote.fs.put_file(str(local), aside.path)  # type: ignore[attr-defined]
            remote.fs.mv(aside.path, remote.path)  # type: ignore[attr-defined]
