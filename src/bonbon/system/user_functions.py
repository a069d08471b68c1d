"""Users' functions, named in a configuration as `package.module:function`."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bonbon.system.digests import file_digest
from bonbon.system.errors import BonbonError


def import_function(name: str, what: str) -> Callable[..., Any]:
    """Import the function `package.module:function`, also from the current folder.

    Raises BonbonError, saying `what` the function is for, when the name has another form or there
    is no such function.
    """
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise BonbonError(f"{what} {name!r}: write it as package.module:function")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that nothing there shadows a library
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # the user's module may raise anything
        raise BonbonError(f"{what} {name!r} cannot be imported: {error_text(error)}") from error
    if not callable(function):
        raise BonbonError(f"{what} {name!r} is not a function")
    imported: Callable[..., Any] = function
    return imported


def function_digest(function: Callable[..., Any]) -> str | None:
    """Return a hash of the source file of a function; None if there is none."""
    try:
        file = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:  # not written in Python
        return None
    return file_digest(Path(file)) if file else None


def error_text(error: Exception) -> str:
    """Return an exception's class and message."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
