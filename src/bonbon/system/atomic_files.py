"""Atomic writes: files and folders are either whole or absent, whenever the process dies."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bonbon.system.errors import BonbonError
from bonbon.system.storage import beside, cannot_write, is_remote, reached, uploaded


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success fsync it and rename it into place.

    For a remote `path` (`system.storage`) it is local, and uploaded on success. Raises
    BonbonError when the folder cannot be written.
    """
    if is_remote(path):
        with uploaded(path) as temporary:
            yield temporary
        return
    temporary = beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _fsync(temporary)
        os.replace(temporary, path)
        _fsync(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with suppress(OSError):  # an error here would hide the original one
            temporary.unlink()


def remove_torn(folder: Path) -> None:
    """Remove the temporary files and folders that killed processes left in a folder."""
    for path in list(folder.rglob(".*.tmp")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` for a folder; on success fsync it and rename it into place."""
    temporary = beside(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    yield temporary
    for parent, _, names in os.walk(temporary):
        for name in names:
            _fsync(Path(parent) / name)
        _fsync(Path(parent))
    os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. Raises ValueError for NaN and infinities."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises BonbonError, naming the file, if it cannot be read or parsed."""
    try:
        with reached(path, "read"):
            return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BonbonError(f"cannot read {path}: {error}") from error
