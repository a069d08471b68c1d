"""Check the size of the package's files and functions, and what lies flat in it.

    python scripts/check_layout.py

Exits with 1 and names each place that is over a limit.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "bonbon"
FLAT = {"__init__.py", "__main__.py"}
LONGEST_FILE = 450
LONGEST_FUNCTION = 80


def long_functions(path: Path, text: str) -> Iterator[str]:
    """Name the functions of a file that have too many lines."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            first = min([node.lineno, *(line.lineno for line in node.decorator_list)])
            lines = node.end_lineno - first + 1
            if lines > LONGEST_FUNCTION:
                yield f"{path}:{first}: {node.name} has {lines} lines, over {LONGEST_FUNCTION}"


def problems() -> Iterator[str]:
    """Name everything that is over a limit."""
    flat = {path.name for path in PACKAGE.glob("*.py")}
    for name in sorted(flat - FLAT):
        yield f"{PACKAGE / name}: lies flat in the package; move it into a folder"
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        lines = len(text.splitlines())
        if lines > LONGEST_FILE:
            yield f"{path}: has {lines} lines, over {LONGEST_FILE}"
        yield from long_functions(path, text)


if __name__ == "__main__":
    over = list(problems())
    print("\n".join(over) or "layout: every file and function is within its limits")
    sys.exit(bool(over))
