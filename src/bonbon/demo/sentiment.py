"""The demo's gold reward: how happy a continuation sounds, by VADER's rules and lexicon."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from bonbon.groups.group import Prompt
from bonbon.system.errors import BonbonError


@cache
def _analyser() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise BonbonError(
            "the sentiment reward needs vaderSentiment: pip install 'bonbon-align[demo]'"
        ) from error
    return SentimentIntensityAnalyzer()


def compound(prompts: Sequence[Prompt], completions: Sequence[str]) -> np.ndarray:
    """Return VADER's compound score of each completion, in [−1, 1] (Hutto and Gilbert 2014)."""
    return np.array([_analyser().polarity_scores(text)["compound"] for text in completions])
