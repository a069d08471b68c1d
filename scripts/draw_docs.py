"""Draw the pictures of the docs, docs/demo.png and docs/report.png, from a finished demo.

    make demo
    python scripts/draw_docs.py --demo bonbon-demo

Needs Chromium (Debian: chromium chromium-driver) for the picture of the report's page.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from bonbon.report import write_report

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = (1100, 1000)  # pixels of the report's top


def draw_chart(demo: Path) -> None:
    """Copy the report's chart of win rate against KL."""
    shutil.copyfile(demo / "plots" / "win_rate_kl.png", DOCS / "demo.png")


def draw_page(report: Path) -> None:
    """Take a picture of the top of the report's page. Raises SystemExit without Chromium."""
    chromium = shutil.which("chromium")
    if chromium is None:
        raise SystemExit("Chromium is not installed; on Debian: apt-get install chromium")
    width, height = PAGE
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [
                chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                "--disable-background-networking", f"--user-data-dir={profile}",
                f"--window-size={width},{height}", f"--screenshot={DOCS / 'report.png'}",
                report.resolve().as_uri(),
            ],
            check=True,
            capture_output=True,
        )  # fmt: skip


def main() -> None:
    """Write the report again, then both pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--demo", type=Path, required=True, help="The folder of a finished demo.")
    demo: Path = parser.parse_args().demo
    report = write_report(demo)
    draw_chart(demo)
    draw_page(report)


if __name__ == "__main__":
    main()
