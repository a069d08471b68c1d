"""Measure repetition and diversity of completions: repetition, distinct-n, self-BLEU."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache

# Han, kana, Thai, Lao, Burmese and Khmer are written without spaces between words.
_SPACELESS = (
    r"\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    r"\U00020000-\U000323af\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
)


@lru_cache(maxsize=1)
def _word_pattern() -> re.Pattern[str]:
    # To `\w` a combining mark is no letter, and would break every Hindi or Thai word in pieces.
    marks = "".join(c for c in map(chr, range(0x300, 0x20000)) if unicodedata.category(c)[0] == "M")
    character = rf"(?=[^\W_])[{_SPACELESS}][{marks}]*"
    run = rf"[^\W_{_SPACELESS}](?:[^\W_{_SPACELESS}]|[{marks}])*"
    return re.compile(f"{character}|{run}")


def words(text: str) -> list[str]:
    """Split a text into words in lower case: runs of letters and digits, without punctuation.

    In scripts without spaces each character is a word. An apostrophe or a hyphen parts words.
    """
    return _word_pattern().findall(unicodedata.normalize("NFC", text.lower()))


def _ngrams(tokens: Sequence[str], n: int) -> Iterable[tuple[str, ...]]:
    return zip(*(tokens[start:] for start in range(n)), strict=False)


def repetition(text: str, n: int = 4) -> float:
    """Compute the share of a text's word n-grams that repeat an earlier one; 0 without n-grams.

    1 − distinct/all: seq-rep-n of Welleck et al. 2020 (arXiv 1908.04319).
    """
    ngrams = list(_ngrams(words(text), n))
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def distinct(texts: Sequence[str], n: int) -> float:
    """Compute distinct / all word n-grams of the texts together (Li et al. 2016); 0 for none.

    It falls with the texts' number and length (arXiv 1510.03055).
    """
    ngrams = [ngram for text in texts for ngram in _ngrams(words(text), n)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


_ORDERS = 4


# sacrebleu gives the same figures, which a test checks, but counts all references again for each
# text: on 1000 texts it takes 4 times as long in groups of 8, and 58 times in groups of 125.
def self_bleu(texts: Sequence[str]) -> float:
    """Compute the mean BLEU-4 of each text against the others, in [0, 1]; 1 for equal texts.

    Self-BLEU of Zhu et al. 2018 (arXiv 1802.01886), BLEU as sacrebleu's for sentences: effective
    order and exponential smoothing (Post 2018, arXiv 1804.08771). A text without words scores 1
    beside another such text and else 0. NaN for fewer than two texts.
    """
    if len(texts) < 2:
        return math.nan
    tokens = [words(text) for text in texts]
    bags = [[Counter(_ngrams(row, n)) for n in range(1, _ORDERS + 1)] for row in tokens]
    second = [_second_largest([bag[order] for bag in bags]) for order in range(_ORDERS)]
    lengths = [len(row) for row in tokens]
    scores = []
    for i, bag in enumerate(bags):
        # The others' largest count, clipped at a text's own, is the second largest so clipped.
        matched = [
            sum(min(count, counts[ngram]) for ngram, count in own.items())
            for own, counts in zip(bag, second, strict=True)
        ]
        others = lengths[:i] + lengths[i + 1 :]
        reference = min(others, key=lambda other: (abs(other - lengths[i]), other))
        scores.append(_sentence_bleu(matched, lengths[i], reference))
    return sum(scores) / len(scores)


def _second_largest(bags: Sequence[Counter[tuple[str, ...]]]) -> dict[tuple[str, ...], int]:
    """Return each n-gram's second largest count over the bags; equal counts are kept apart."""
    largest: dict[tuple[str, ...], int] = {}
    second: dict[tuple[str, ...], int] = {}
    for bag in bags:
        for ngram, count in bag.items():
            top = largest.get(ngram, 0)
            largest[ngram] = max(top, count)
            second[ngram] = max(second.get(ngram, 0), min(top, count))
    return second


def _sentence_bleu(matched: Sequence[int], length: int, reference: int) -> float:
    """Compute BLEU of `length` words from matched n-grams by order and the reference's length."""
    if length == 0:
        return float(reference == 0)
    if not any(matched):
        return 0.0
    logs, smoothing = [], 1.0
    for order, hits in enumerate(matched[:length]):
        if hits == 0:  # the k-th order without a match counts 1/2^k matches
            smoothing /= 2
        logs.append(math.log((hits or smoothing) / (length - order)))
    return math.exp(min(0.0, 1 - reference / length) + sum(logs) / len(logs))
