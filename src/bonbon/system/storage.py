"""Storage of samples and groups: a local folder, an object store or HDFS.

A remote path is a `upath.UPath`, a `Path` on top of fsspec: `s3://` needs s3fs, `gs://` gcsfs,
`hdfs://` pyarrow with Hadoop's own library. Keys and endpoints are set as these libraries document
(environment variables, profiles, fsspec's configuration), never in our configuration.

A store that cannot be reached is an error within a minute (S3; within seconds if it refuses), so
that a run does not hang. Finished work is kept, and the same command resumes.
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

# Stores where only whole objects are visible; elsewhere a file is written aside and renamed.
_WHOLE_OBJECTS = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"})
_S3 = frozenset({"s3", "s3a"})
# botocore's tries of a request; s3fs then retries timeouts.
_S3_CONFIG = {
    "connect_timeout": 5,
    "read_timeout": 60,
    "retries": {"mode": "standard", "max_attempts": 3},
}
_S3FS_TRIES = 2
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def storage_path(place: str | Path) -> Path:
    """Return the folder that a setting names: a `Path`, or a `UPath` for a URL (`s3://…`).

    Raises BonbonError for an unknown scheme, or one whose library is not installed.
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
        filesystem = path.fs  # loads the library
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
    """Return the options of fsspec's file system; the user's own fsspec options take precedence."""
    from fsspec.config import conf  # type: ignore[import-untyped]

    # Other processes write shards too, so a listing must not be cached.
    options: dict[str, Any] = {"use_listings_cache": False}
    if scheme in _S3:
        options["config_kwargs"] = _S3_CONFIG
    return options | {key: conf[scheme][key] for key in options if key in conf.get(scheme, {})}


def is_remote(path: Path) -> bool:
    """Return whether a path is in a store, and not a local one."""
    return hasattr(path, "fs") and path.fs.protocol not in ("file", ("file", "local"))


def is_there(path: Path) -> bool:
    """Return whether a file exists. Raises BonbonError when its store cannot be reached."""
    with reached(path, "read"):
        return path.exists()


def files_in(folder: Path) -> list[Path]:
    """Return the files of a folder, sorted by name; none if there is no folder.

    Raises BonbonError when its store cannot be reached.
    """
    with reached(folder, "read"):
        # Object stores have no folders: one exists while it holds something.
        return sorted(folder.iterdir()) if folder.is_dir() else []


def remove_file(path: Path) -> None:
    """Remove a file if it exists. Raises BonbonError if it cannot be removed."""
    try:
        with reached(path, "remove"):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error


def remove_folder(folder: Path) -> None:
    """Remove a folder and its content if it exists. Raises BonbonError if it cannot be removed."""
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
    """Return the error of a file that could not be written."""
    reason = os.strerror(error.errno) if error.errno else str(error)  # pyarrow sets no errno
    if error.errno in _FULL:
        way_out = "free some space; finished work is kept, and the same command resumes"
    else:
        way_out = "choose a folder that can be written"
    return BonbonError(f"cannot write {path}: {reason}; {way_out}")


@contextmanager
def reached(path: Path, doing: str) -> Iterator[None]:
    """Turn any exception of a store's library into a BonbonError that names the path.

    The libraries under fsspec raise exceptions of their own, so all are caught, but only for remote
    paths.
    """
    try:
        yield
    except BonbonError:
        raise
    except Exception as error:
        if not is_remote(path):
            raise
        raise BonbonError(
            f"cannot {doing} {path}: {_store_message(error)}; finished work is kept; fix this "
            "and run the same command to resume"
        ) from error


def _store_message(error: Exception) -> str:
    """Return an error's message, reworded for users where the library's is unclear."""
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
        return f"it does not exist ({_without_query(first_line(error))})"
    return _without_query(first_line(error))


def _without_query(text: str) -> str:
    """Remove the queries of URLs, which may hold signatures, from a text."""
    return re.sub(r"\?[^\s\"]*", "", text)


def beside(path: Path) -> Path:
    """Return a unique temporary path in the folder of `path`."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")


@contextmanager
def uploaded(path: Path) -> Iterator[Path]:
    """Yield a local path; on success upload its file to the remote `path`, whole or not at all.

    Raises BonbonError when the store cannot be reached, or the local file cannot be written.
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
