"""How many examples property tests try: the same ones at every run, without a deadline."""

from __future__ import annotations

from hypothesis import settings

quick = settings(deadline=None, max_examples=60, derandomize=True)
brief = settings(quick, max_examples=25)  # for examples that take a while
