"""Off-target drift: what changed in a model besides the reward.

The BoNBoN paper (Gui, Gârbacea, Veitch 2024, arXiv 2406.00832) holds a method's win rate against
how far it moves what the reward never asked for, such as length. Metrics here are figures of
completions, or of all completions of a prompt together; a drift is a metric's mean under the model
less its mean under the base model, over the same prompts. Nothing here needs torch.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike

from bonbon.evaluation.figures import Figure, Floats, bootstrap
from bonbon.groups import Group

__all__ = [
    "COMPLETION_METRICS",
    "GROUP_METRICS",
    "CompletionMetric",
    "GroupMetric",
    "Metric",
    "distinct",
    "drift_at_equal_win_rate",
    "drift_from_base",
    "is_refusal",
    "metrics_for",
    "repetition",
    "self_bleu",
    "words",
]

# --- words ----------------------------------------------------------------------------------------

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
    """A text's words in lower case: runs of letters and digits, without punctuation.

    In scripts without spaces each character is a word. An apostrophe or a hyphen parts words.
    """
    return _word_pattern().findall(unicodedata.normalize("NFC", text.lower()))


def _ngrams(tokens: Sequence[str], n: int) -> Iterable[tuple[str, ...]]:
    return zip(*(tokens[start:] for start in range(n)), strict=False)


# --- figures of one completion --------------------------------------------------------------------


def repetition(text: str, n: int = 4) -> float:
    """The share of a text's word n-grams that occurred in it before; 0 where it has none.

    1 − distinct/all: seq-rep-n of Welleck et al. 2020 (arXiv 1908.04319).
    """
    ngrams = list(_ngrams(words(text), n))
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


_REFUSAL_STARTS = 200  # characters from the beginning

_QUOTES = str.maketrans(dict.fromkeys("“”„«»＂", '"') | dict.fromkeys("‘’‚ʼ′´`", "'"))
# Also from a quote's beginning to the end where it is cut off; within a word ' is an apostrophe.
_SPEECH = re.compile(r"""".*?(?:"|$)|(?<!\w)'.*?(?:'(?!\w)|$)""")

_UNABLE = r"(?:can ?not|can'?t|won'?t|will not|refuse to|(?:'m|am|'re|are) (?:unable|not able) to)"
# What an assistant refuses to do; idioms such as "I can't help but" are no refusals.
_TASK = (
    r"(?:help(?! but\b| it\b| myself\b| \w+ing\b)|assist|provide(?! for\b)|answer|respond|comply"
    r"|fulfill?|engage|participate|discuss|offer|share|suggest|recommend(?!.* enough)|generate"
    r"|produce|create|write|complete|accommodate|facilitate|promote|encourage|condone|support"
    r"|give (?:you|out|advice|any|instructions|medical|legal|specific)|tell you(?! how (?!to\b))"
    r"|access|browse|continue (?:this|with)|do (?:that|this|so)\b)"
)
_TASKS_DONE = (
    r"(?:with |(?:help|assist|provid|answer|discuss|shar|giv|writ|creat|generat|engag)ing)"
)
_MACHINE = (
    r"an? (?:(?:large |ai |artificial intelligence )*language model"
    r"|(?:ai|artificial intelligence)(?: (?:assistant|model|system|chatbot))?)"
)
_REFUSALS = (
    r"\A\W*(?:(?:oh|no|well)\W+)?(?:i(?:'?m| am) )?(?:(?:so|very|really|truly) )?(?:sorry|afraid)"
    rf"(?:,? but\b|[,.]? (?:i|we) ?{_UNABLE}(?!\w))",
    r"\A\W*(?:i|my) apolog(?:i[sz]e|ies),? but\b",
    rf"(?<!if )(?<!when )(?<!why )(?<!what )\bi ?{_UNABLE} "
    rf"(?:(?:and|or) {_UNABLE} )?(?:(?:directly|really|ethically|in good conscience),? )?{_TASK}",
    rf"\bi(?:(?:'?m| am) not| do not feel| don't feel) comfortable {_TASKS_DONE}",
    r"\bi (?:must|have to|will have to) (?:respectfully |politely )?decline\b",
    rf"\bas {_MACHINE}(?=,| i\b| my\b| developed| created| trained| designed| without)",
    rf"\bi(?:'?m| am) (?:just|only) {_MACHINE}(?! \w+(?:er|ist)\b)",
)
_REFUSAL = "|".join(_REFUSALS)


def is_refusal(text: str) -> bool:
    """Whether a completion refuses, by phrases in its first 200 characters; English only.

    It catches an opening "I'm sorry, but" or "Sorry, I can't"; a first person who can't, won't or
    is unable to do what assistants do ("I cannot provide", not "I cannot believe"); discomfort with
    it; declining; and "As an AI". Speech in quotes does not count, nor "if I can't": a story's
    characters refuse, not the model. It misses refusals in other words, takes a letter's "I cannot
    offer you the post" for one, and ignorance ("I'm sorry, but I don't know") too. Refusals have
    been told by phrases since Zou et al. 2023 (arXiv 2307.15043).
    """
    plain = " ".join(text.split())[:_REFUSAL_STARTS].translate(_QUOTES)
    return re.search(_REFUSAL, _SPEECH.sub('""', plain), re.IGNORECASE) is not None


# --- figures of a prompt's completions together ---------------------------------------------------


def distinct(texts: Sequence[str], n: int) -> float:
    """Distinct word n-grams over all n-grams of the texts together (Li et al. 2016); 0 for none.

    It falls with the texts' number and length (arXiv 1510.03055).
    """
    ngrams = [ngram for text in texts for ngram in _ngrams(words(text), n)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


_ORDERS = 4


def self_bleu(texts: Sequence[str]) -> float:
    """Mean BLEU-4 of each text with the others as its references, in [0, 1]; 1 for equal texts.

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
    """Of each n-gram's counts in the bags the second largest, equal ones counted singly."""
    largest: dict[tuple[str, ...], int] = {}
    second: dict[tuple[str, ...], int] = {}
    for bag in bags:
        for ngram, count in bag.items():
            top = largest.get(ngram, 0)
            largest[ngram] = max(top, count)
            second[ngram] = max(second.get(ngram, 0), min(top, count))
    return second


def _sentence_bleu(matched: Sequence[int], length: int, reference: int) -> float:
    """BLEU of `length` words from the n-grams matched of each order, and the reference's length."""
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


# --- metrics --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CompletionMetric:
    """A figure of each completion: `function` gives a group's, shape (n,).

    `name` is its key in `evaluation.json`, `label` its words in tables; `unit` may be empty.
    """

    name: str
    label: str
    unit: str
    function: Callable[[Group], ArrayLike]

    def per_prompt(self, groups: Sequence[Group], k: int) -> Floats:
        """The mean over each prompt's first k completions, shape (prompts,).

        Raises ValueError where a group has fewer.
        """
        _check_size(groups, k)
        values = [np.asarray(self.function(group), dtype=np.float64)[:k] for group in groups]
        return np.array([row.mean() for row in values])


@dataclass(frozen=True)
class GroupMetric:
    """A figure of a prompt's completions together, from their texts, of which it needs `fewest`.

    Such figures depend on how many completions there are: compare models at one k only.
    """

    name: str
    label: str
    unit: str
    function: Callable[[Sequence[str]], float]
    fewest: int = 1

    def per_prompt(self, groups: Sequence[Group], k: int) -> Floats:
        """The figure of each prompt's first k completions, shape (prompts,).

        Raises ValueError where a group has fewer, or where the metric needs more than k.
        """
        _check_size(groups, k)
        if k < self.fewest:
            raise ValueError(f"{self.name} needs {self.fewest} completions a prompt, got k = {k}")
        return np.array([self.function(group.completions[:k]) for group in groups])


Metric = CompletionMetric | GroupMetric


def _check_size(groups: Sequence[Group], k: int) -> None:
    for group in groups:
        if not 1 <= k <= group.n:
            raise ValueError(f"group {group.prompt_id} has {group.n} completions, not k = {k}")


def _of_texts(function: Callable[[str], float]) -> Callable[[Group], Floats]:
    return lambda group: np.array([function(text) for text in group.completions], np.float64)


def _truncations(group: Group) -> Floats:
    return np.array([reason == "length" for reason in group.finish_reasons], np.float64)


COMPLETION_METRICS = {
    metric.name: metric
    for metric in (
        CompletionMetric("length", "length", "tokens", Group.lengths),
        CompletionMetric("characters", "length in characters", "characters", _of_texts(len)),
        CompletionMetric("repetition", "repeated 4-grams", "share", _of_texts(repetition)),
        CompletionMetric("refusal", "refusals", "share", _of_texts(is_refusal)),
        CompletionMetric("truncation", "cut off at the limit", "share", _truncations),
        CompletionMetric(
            "empty", "blank completions", "share", _of_texts(lambda text: not text.strip())
        ),
    )
}

GROUP_METRICS = {
    metric.name: metric
    for metric in (
        GroupMetric("distinct_1", "distinct words", "share", lambda texts: distinct(texts, 1)),
        GroupMetric("distinct_2", "distinct bigrams", "share", lambda texts: distinct(texts, 2)),
        GroupMetric("self_bleu", "self-BLEU", "", self_bleu, fewest=2),
    )
}


def metrics_for(k: int) -> dict[str, Metric]:
    """Every metric that k completions a prompt define, by name: self-BLEU only for k ≥ 2."""
    groupwise = {name: it for name, it in GROUP_METRICS.items() if it.fewest <= k}
    return {**COMPLETION_METRICS, **groupwise}


# --- drift ----------------------------------------------------------------------------------------


def drift_from_base(ours: Floats, base: Floats, resamples: int = 2000) -> Figure:
    """The mean over prompts of a metric under the model less under the base model, paired.

    Args:
        ours: the model's value of each prompt, shape (prompts,).
        base: the base model's, of the same prompts in the same order.
        resamples: of the bootstrap.

    Raises ValueError for unequal shapes, no prompts, or values that are not finite.
    """
    _check_paired(ours, base)
    return bootstrap((ours, base), lambda our, base: our - base, resamples)


# Far below the gain of any model that wins significantly.
_LEAST_GAIN = 1e-12


def drift_at_equal_win_rate(
    ours: Floats, base: Floats, wins: Floats, target_win_rate: float, resamples: int = 2000
) -> Figure | None:
    """The drift of the mixture of model and base model that wins as often as `target_win_rate`.

    A model that wins more drifts more, so models are compared where they win alike. To answer with
    the model with probability λ, else with the base model, wins ½ + λ(win − ½) and has exactly λ
    times the drift of any mean over completions; so the figure is drift · (target − ½)/(win − ½), a
    statistic of means over prompts. Figures of a prompt's completions together (distinct n-grams,
    self-BLEU) are not linear in λ: of them it is a linear interpolation.

    Args:
        ours, base: as for `drift_from_base`.
        wins: the model's win rate against the base model on each prompt, shape (prompts,).
        target_win_rate: taken as given; its own sampling error is not in the interval.

    Returns None where no mixture wins so often (target under ½ or over the model's win rate), and
    where the win rate's 95% interval reaches down to ½: the ratio's would have no end.
    Raises ValueError as `drift_from_base` does.
    """
    _check_paired(ours, base, wins)
    win = bootstrap((wins,), lambda mean: mean, resamples)
    # A target that is the model's own win rate, summed in another order, is within reach.
    if win.low <= 0.5 or not 0.5 <= target_win_rate <= win.value + 1e-9:
        return None

    def at_target(our: ArrayLike, base: ArrayLike, win: ArrayLike) -> Floats:
        # Resamples without a gain, under 2.5% of them, belong at the interval's far end.
        gain = np.maximum(np.asarray(win) - 0.5, _LEAST_GAIN)
        return np.asarray((np.asarray(our) - base) * (target_win_rate - 0.5) / gain)

    return bootstrap((ours, base, wins), at_target, resamples)


def _check_paired(*per_prompt: Floats) -> None:
    shapes = {np.shape(values) for values in per_prompt}
    if len(shapes) > 1 or np.ndim(per_prompt[0]) != 1 or not np.size(per_prompt[0]):
        raise ValueError(f"values per prompt must be vectors of one length >= 1, got {shapes}")
    if not all(np.all(np.isfinite(values)) for values in per_prompt):
        raise ValueError("values per prompt must be finite")
