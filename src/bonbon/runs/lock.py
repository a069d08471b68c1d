"""Hold a folder that stages write into, and refuse one that is somebody else's."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bonbon.system.atomic_files import remove_torn
from bonbon.system.errors import BonbonError
from bonbon.system.processes import is_main_process, wait_for_everyone

OUT = "--out"  # the option by which a folder is chosen, where it is no other


@contextmanager
def locked(path: Path, option: str = OUT) -> Iterator[None]:
    """Hold the folder; BonbonError when another process does, or it cannot be written.

    Of processes that train together the main one holds it for all. `option` is the one by which
    the folder is chosen.
    """
    if not is_main_process():
        wait_for_everyone()
        yield
        return
    handle = _opened(path, option)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BonbonError(
                f"another bonbon process is working in {path}; wait for it or choose another "
                f"{option}"
            ) from error
        remove_torn(path)
        wait_for_everyone()  # none goes ahead of the lock
        yield
    finally:
        os.close(handle)


def _opened(path: Path, option: str) -> int:
    """The descriptor of the folder's lock file."""
    try:
        refuse_strangers(path, option)
        notes = path / ".bonbon"
        notes.mkdir(parents=True, exist_ok=True)
        return os.open(notes / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise BonbonError(
            f"cannot write the output folder {path}: {error.strerror}; choose another {option}"
        ) from error


def refuse_strangers(path: Path, option: str = OUT) -> None:
    """Raise BonbonError where the folder holds something, and no run."""
    if not path.is_dir():
        return
    strangers = [p.name for p in path.iterdir() if p.name != ".bonbon"]
    if strangers and not any((path / ".bonbon").glob("*.json")):
        raise BonbonError(
            f"{path} is not empty and holds no run ({strangers[0]} is in it); choose another "
            f"{option}"
        )
