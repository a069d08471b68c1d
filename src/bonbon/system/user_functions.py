"""Users' functions, named in a configuration as `package.module:function`."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
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
    _look_in_current_folder()
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # the user's module may raise anything
        raise BonbonError(f"{what} {name!r} cannot be imported: {error_text(error)}") from error
    if not callable(function):
        raise BonbonError(f"{what} {name!r} is not a function")
    imported: Callable[..., Any] = function
    return imported


def function_digest(name: str) -> str | None:
    """A hash of the file that the function `package.module:function` is written in.

    The module is not imported, as that may load models; one that takes the function from another
    module is followed there. None where there is no such file.
    """
    _look_in_current_folder()
    module, _, function = name.partition(":")
    file = _file_of(module, function, frozenset())
    return None if file is None else file_digest(file)


def _file_of(module: str, function: str, seen: frozenset[str]) -> Path | None:
    spec = _spec_of(module)
    if spec is None or not spec.has_location or spec.origin is None:
        return None
    file = Path(spec.origin)
    if not file.is_file():  # the module was loaded before it went
        return None
    source = _source_of(file, function)
    if source is None or module in seen:
        return file
    where, there = source
    package = module if spec.submodule_search_locations is not None else spec.parent
    try:
        where = importlib.util.resolve_name(where, package)
    except ImportError:
        return file
    return _file_of(where, there, seen | {module}) or file


def _spec_of(module: str) -> ModuleSpec | None:
    """Find a module; unlike `importlib.util.find_spec`, import no package around it."""
    spec: ModuleSpec | None = None
    path: Sequence[str] | None = None
    name = ""
    for part in module.split("."):
        name = f"{name}.{part}" if name else part
        specs = (finder.find_spec(name, path) for finder in sys.meta_path)
        spec = next(filter(None, specs), None)
        if spec is None:
            return None
        path = spec.submodule_search_locations or []
    return spec


def _source_of(file: Path, name: str) -> tuple[str, str] | None:
    """The module that a file imports a name from, and its name there; None where it does not."""
    try:
        body = ast.parse(file.read_bytes()).body
    except (OSError, SyntaxError, ValueError):  # a library, or one that will not be imported
        return None
    for node in body:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if name == (alias.asname or alias.name):
                    return "." * node.level + (node.module or ""), alias.name
    return None


def _look_in_current_folder() -> None:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last: nothing there may stand in for a library


def error_text(error: Exception) -> str:
    """Return an exception's class and message."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
