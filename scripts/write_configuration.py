"""Write docs/configuration.md from the settings themselves.

    python scripts/write_configuration.py
    python scripts/write_configuration.py --check

With `--check` nothing is written; it exits with 1 when the page is not what would be written.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from bonbon.cli.config import all_settings, note_of
from bonbon.config.describe import Described

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
HEAD = """# Configuration

Every setting of a run, its default and what it does. `bonbon config` prints the same as YAML,
`bonbon config KEY` one of them. In the YAML file keys that share a section stand below it;
`--set train.n=16` changes one from the command line. Of `train.arguments` any other field of
`transformers.TrainingArguments` is a key too, except for those that the run sets itself.
(Written by `scripts/write_configuration.py`.)
"""


def page() -> str:
    """Return the whole page."""
    settings = all_settings()
    top = [it for it in settings if not it.below]
    parts = [HEAD, *_section("The run", "", top)]
    for setting in settings:
        if setting.below:
            parts += _section(f"`{setting.key}`", setting.explanation, list(_rows(setting)))
    return "\n".join(parts)


def _section(title: str, about: str, settings: list[Described]) -> Iterator[str]:
    yield f"## {title}\n"
    if about:
        yield f"{about}\n"
    yield "| key | default | |"
    yield "|---|---|---|"
    for setting in settings:
        note = note_of(setting).replace("|", "\\|")
        yield f"| `{setting.key}` | `{setting.default}` | {note} |"
    yield ""


def _rows(setting: Described) -> Iterator[Described]:
    for inner in setting.below:
        yield inner
        yield from _rows(inner)


def main() -> int:
    """Write the page, or compare it; the exit code."""
    text = page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == text:
        return 0
    print(f"{PAGE.name} is not up to date; run `python scripts/write_configuration.py`")
    return 1


if __name__ == "__main__":
    sys.exit(main())
