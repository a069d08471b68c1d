"""Choice of n: which n reaches a wanted win rate at what cost, from a small pilot of scored draws.

For n < m, the pilot's draws a prompt, the win rate of best-of-n against one draw of the base model
has an unbiased estimate. For larger n the curve is extrapolated along a line in n/(n+1)
(`bonbon.evaluation.best_of_k_curve`). The line is exact if one reward both chooses and decides the
win and no rewards tie; otherwise it is a guess. Extrapolated values are marked. Loads no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bonbon.config.training import LARGEST_N
from bonbon.evaluation.best_of_k import best_of_k_curve
from bonbon.evaluation.figures import Figure, Floats
from bonbon.groups.group import Group, Groups
from bonbon.groups.provenance import check_independent
from bonbon.groups.shards import iter_provenance
from bonbon.system.errors import BonbonError

if TYPE_CHECKING:
    from rich.table import Table

FEWEST_DRAWS = 3  # best-of-2 against a further draw
FEWEST_TO_EXTRAPOLATE = 5  # best-of-1 to best-of-4; the line fits the upper half
# Without ties a win rate is n/(n+1) up to rounding.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class PlanRow:
    """The figures of best-of-n for one n.

    `win_rate` is against one draw of the base model, a tie counting half. `kl` is ln n − (n−1)/n
    nats, an upper bound that best-of-n reaches where no rewards tie. `tokens` and `seconds` are
    the cost of a prompt: n draws of the pilot's mean length, at the pilot's speed.
    """

    n: int
    win_rate: Figure
    kl: float
    tokens: float
    seconds: float | None
    extrapolated: bool


@dataclass(frozen=True)
class Plan:
    """The n that reaches the win rate `wanted`, estimated from `prompts` × `draws`.

    `rows`: n = 1, 2, 4, …, the largest n that is measured, and the answers. `by_estimate` is the
    smallest n whose estimate reaches it, `surely` the smallest whose interval's lower end does;
    None if none up to `largest_n` does. `best` is the smallest n with the largest estimate. `by` is
    the further reward that decides a win, None for the one that chooses.
    """

    wanted: float
    by: str | None
    prompts: int
    draws: int
    largest_n: int
    ties: bool
    rows: tuple[PlanRow, ...]
    surely: PlanRow | None
    by_estimate: PlanRow | None
    best: PlanRow


def plan(
    groups: Groups,
    win_rate: float,
    by: str | None = None,
    max_n: int = 1024,
    tokens_per_second: float | None = None,
) -> Plan:
    """Find the n ≤ max_n that reaches a win rate, from a pilot of scored draws.

    The curve needs equally many draws of each prompt, so it uses the first ones of prompts with
    more. With fewer than five draws a prompt nothing is extrapolated.

    Args:
        groups: independent draws of the base model, three a prompt or more, for two prompts or
            more.
        win_rate: the wanted one, in (0, 1).
        by: the metric that decides a win; None: the rewards, by which best-of-n chooses.
        tokens_per_second: the speed of sampling, above 0; None: the provenance's, if known.

    Raises BonbonError, naming the prompt, for a pilot that is too small, not scored, or has
    non-finite rewards or rejected draws; for an unknown metric; and for an impossible win rate or
    max_n.
    """
    _check_wanted(win_rate, max_n)
    if tokens_per_second is not None and not 0 < tokens_per_second < math.inf:
        raise BonbonError(f"tokens a second must be a number above 0, not {tokens_per_second}")
    check_independent(groups.provenance, "plan from")
    draws = _draws(groups)
    chooser = [_values(group, None)[:draws] for group in groups]
    judge = {} if by is None else {by: [_values(group, by)[:draws] for group in groups]}
    measured = min(draws - 1, max_n)
    beyond = range(measured + 1, max_n + 1) if draws >= FEWEST_TO_EXTRAPOLATE else range(0)
    tokens = float(np.mean([np.mean(group.lengths()[:draws]) for group in groups]))
    speed = tokens_per_second
    if speed is None:
        speed = sampling_speed(groups.provenance)
    rows = [
        PlanRow(
            n=point.k,
            win_rate=_clipped(point.win_rate if by is None else point.win_rate_by[by]),
            kl=point.kl,
            tokens=point.k * tokens,
            seconds=None if speed is None else point.k * tokens / speed,
            extrapolated=point.extrapolated,
        )
        for point in best_of_k_curve(chooser, measured, further=judge, beyond=beyond)
    ]
    most = max(row.win_rate.value for row in rows) - _ROUNDING
    return _chosen(
        Plan(
            wanted=win_rate,
            by=by,
            prompts=len(groups),
            draws=draws,
            largest_n=rows[-1].n,
            ties=any(len(np.unique(rewards)) < draws for rewards in chooser),
            rows=tuple(rows),
            surely=None,
            by_estimate=None,
            best=next(row for row in rows if row.win_rate.value >= most),
        )
    )


def _clipped(rate: Figure) -> Figure:
    """Clip the interval of a win rate to [0, 1]; Student's t may exceed it for few prompts."""
    return Figure(rate.value, max(rate.low, 0.0), min(rate.high, 1.0))


def sampling_speed(provenance: Mapping[str, Any]) -> float | None:
    """Return tokens a second of the pilot's draws; None if the provenance does not have it.

    The seconds of groups that were scored into another folder are those of the scoring.
    """
    tokens, seconds = provenance.get("tokens"), provenance.get("seconds")
    if "reward" in provenance or not tokens or not seconds:
        return None
    return float(tokens / seconds)


def sampling_speed_beside(groups: Path) -> float | None:
    """Return tokens a second of the draws in `samples/` beside scored groups; None if unknown."""
    spent = list(iter_provenance(groups.parent / "samples"))
    if not all(noted.get("tokens") and noted.get("seconds") for noted in spent) or not spent:
        return None
    return float(sum(s["tokens"] for s in spent) / sum(s["seconds"] for s in spent))


def _chosen(every: Plan) -> Plan:
    """Add the answers to a plan with a row for every n, and keep only the rows to show."""
    enough = every.wanted - _ROUNDING
    surely = next((row for row in every.rows if row.win_rate.low >= enough), None)
    by_estimate = next((row for row in every.rows if row.win_rate.value >= enough), None)
    measured = max(row.n for row in every.rows if not row.extrapolated)
    shown = {2**i for i in range(every.largest_n.bit_length())} | {measured}
    shown |= {row.n for row in (surely, by_estimate) if row is not None}
    rows = tuple(row for row in every.rows if row.n in shown)
    return replace(every, rows=rows, surely=surely, by_estimate=by_estimate)


# --- what a pilot must be -------------------------------------------------------------------------


def _check_wanted(win_rate: float, max_n: int) -> None:
    if not 0 < win_rate < 1:
        raise BonbonError(f"a wanted win rate lies between 0 and 1, not at {win_rate}; try 0.9")
    if not 1 <= max_n <= LARGEST_N:
        raise BonbonError(f"the largest n must be 1 to {LARGEST_N:,}, not {max_n}")


def _draws(groups: Sequence[Group]) -> int:
    """Return the number of draws that every prompt has."""
    if len(groups) < 2:
        raise BonbonError(
            f"a plan needs a pilot of two prompts or more for its intervals, not {len(groups)}; "
            "sample more prompts"
        )
    fewest = min(groups, key=lambda group: group.n)
    if fewest.n < FEWEST_DRAWS:
        raise BonbonError(
            f"a plan needs {FEWEST_DRAWS} draws a prompt or more, and prompt {fewest.prompt_id} "
            f"has {fewest.n}; sample the pilot with a larger n"
        )
    for group in groups:
        if "rejected" in group.finish_reasons:
            raise BonbonError(
                f"prompt {group.prompt_id} has rejected completions; a plan needs whole draws, "
                "such as those of best_of_n or `bonbon sample`"
            )
    return fewest.n


def _values(group: Group, metric: str | None) -> Floats:
    """Return a group's rewards, or one of its metrics, (n,), all finite."""
    if metric is not None and metric not in group.metrics:
        known = ", ".join(group.metrics) or "it has none"
        raise BonbonError(f"prompt {group.prompt_id} has no metric {metric!r} (metrics: {known})")
    raw = group.rewards if metric is None else group.metrics[metric]
    if raw is None:
        raise BonbonError(f"prompt {group.prompt_id} is not scored; run `bonbon score` first")
    values = np.asarray(raw, dtype=np.float64)
    for k in np.flatnonzero(~np.isfinite(values)):
        what = "reward" if metric is None else metric
        raise BonbonError(
            f"the {what} of prompt {group.prompt_id}, completion {k + 1} of {group.n}, is "
            f"{values[k]}; a plan needs finite ones"
        )
    return values


# --- output ---------------------------------------------------------------------------------------


def plan_sentences(planned: Plan) -> list[str]:
    """Return the plan as a list of sentences."""
    judged = "" if planned.by is None else f" by {planned.by}"
    wanted = f"a win rate{judged} of {planned.wanted:g}"
    sentences = [_answer(planned, wanted)]
    if planned.surely is None and planned.by_estimate is not None:
        sentences.append(
            f"The interval's lower end reaches it for no n up to {planned.largest_n:,}; more "
            "prompts make intervals narrower."
        )
    elif planned.surely is not None and planned.surely != planned.by_estimate:
        sentences.append(
            f"For the interval's lower end it takes {_described(planned.surely, planned)}."
        )
    return [*sentences, *_reservations(planned)]


def _answer(planned: Plan, wanted: str) -> str:
    if planned.by_estimate is not None:
        return f"By the estimate, {wanted} takes {_described(planned.by_estimate, planned)}."
    return (
        f"No n up to {planned.largest_n:,} reaches {wanted}; the best is "
        f"{_described(planned.best, planned)}."
    )


def _described(row: PlanRow, planned: Plan) -> str:
    rate = row.win_rate
    guessed = " (extrapolated)" if row.extrapolated else ""
    bound = "at most " if planned.ties else ""
    seconds = "" if row.seconds is None else f" and {row.seconds:.3g} s"
    return (
        f"n = {row.n:,}{guessed}: {_rate(rate.value)} (95% interval {_rate(rate.low)} to "
        f"{_rate(rate.high)}) with a KL of {bound}{row.kl:.2f} nats, for {row.tokens:,.0f} tokens"
        f"{seconds} a prompt"
    )


def _reservations(planned: Plan) -> list[str]:
    sentences = []
    measured = max(row.n for row in planned.rows if not row.extrapolated)
    beyond = f"{planned.draws} draws a prompt measure n up to {measured}"
    if planned.largest_n > measured and not planned.ties and planned.by is None:
        sentences.append(f"{beyond}; beyond, n/(n+1) holds as long as no rewards tie.")
    elif planned.largest_n > measured:
        why = "where rewards tie" if planned.by is None else "where another reward decides"
        sentences.append(
            f"{beyond}; beyond, it is extrapolated along a line in n/(n+1), which is a guess {why} "
            "and adds an error that the intervals leave out; more draws a prompt measure it."
        )
    elif planned.draws < FEWEST_TO_EXTRAPOLATE:
        sentences.append(
            f"{beyond}; nothing is extrapolated from fewer than {FEWEST_TO_EXTRAPOLATE}."
        )
    if planned.ties:
        sentences.append("Some rewards tie, so that best-of-n's KL lies below ln n − (n−1)/n.")
    return sentences


def plan_table(planned: Plan) -> Table:
    """Return a table with a row for each n; `*` marks extrapolated ones."""
    from rich.table import Table

    timed = planned.rows[0].seconds is not None
    table = Table(
        title=f"Best-of-n from {planned.prompts:,} prompts × {planned.draws} draws",
        caption="KL in nats" + (", an upper bound (rewards tie)" if planned.ties else "")
        + ("; * extrapolated" if planned.rows[-1].extrapolated else ""),
    )  # fmt: skip
    judged = "win rate" if planned.by is None else f"win rate by {planned.by}"
    for name in ["n", judged, "95% interval", "KL", "tokens a prompt", *["seconds"] * timed]:
        table.add_column(name, justify="right")
    for row in planned.rows:
        rate = row.win_rate
        table.add_row(
            f"{row.n:,}{'*' if row.extrapolated else ''}",
            _rate(rate.value),
            f"{_rate(rate.low)} to {_rate(rate.high)}",
            f"{row.kl:.2f}",
            f"{row.tokens:,.0f}",
            *([] if row.seconds is None else [f"{row.seconds:.3g}"]),
        )
    return table


def _rate(value: float) -> str:
    return f"{value:.{5 if 0.999 < value < 1 else 3}f}"
