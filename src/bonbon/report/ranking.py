"""A comparison in sentences: which policy wins most often, and how certain that is."""

from __future__ import annotations

from collections.abc import Iterator

from bonbon.evaluation.figures import Figure
from bonbon.report.data import ReportedPolicy, Run, as_figure
from bonbon.report.numbers import in_brackets, number, of_100


def ranked(run: Run) -> list[ReportedPolicy]:
    """Return all policies with a win rate but the base model, best first."""
    measured = [policy for policy in run.contenders if policy.figure("win_rate")]
    return sorted(measured, key=lambda policy: -(policy.number("win_rate") or 0.0))


def ranking(run: Run) -> Iterator[str]:
    """Yield the findings of a comparison."""
    order = ranked(run)
    if not order:
        yield "No policy was measured against the base model."
        return
    first = order[0]
    win = _win(first)
    beginning = f"Of {len(order)} policies {first.name} wins most often: its"
    yield f"{beginning if len(order) > 1 else f'{first.name}: its'} {_preferred(win)}."
    wins = {policy.name: _win(policy) for policy in order}
    better = [name for name, figure in wins.items() if figure.low > 0.5]
    if all(figure.high < 0.5 for figure in wins.values()):
        yield "So every policy is worse than the base model."
    elif not better:
        yield "So no policy is clearly better than the base model."
    elif first.name not in better:
        yield f"Clearly better than the base model: {', '.join(better)}."
    if len(order) > 1:
        yield _lead(run, first, order[1])
    yield from _best_single(order)
    for name in run.further_rewards:
        yield from _order_by(name, order)


def _win(policy: ReportedPolicy) -> Figure:
    win = policy.figure("win_rate")
    assert win is not None
    return win


def _preferred(win: Figure) -> str:
    return (
        f"answer is preferred to the base model’s in {of_100(win.value)} of 100 comparisons"
        f"{in_brackets(win, 'points')}, ties counting half"
    )


def _best_single(order: list[ReportedPolicy]) -> Iterator[str]:
    """Yield the best of the policies that draw once, if the winner draws more often."""
    single = [policy for policy in order if policy.best_of is None]
    if order[0].best_of is not None and single:
        yield (
            f"{order[0].name} draws {order[0].best_of} answers to give one; of those that draw "
            f"once, {single[0].name} wins most often: its {_preferred(_win(single[0]))}."
        )


def _lead(run: Run, first: ReportedPolicy, second: ReportedPolicy) -> str:
    difference = _difference(run, first.name, second.name)
    if difference is None:
        apart = "do not overlap" if _win(first).low > _win(second).high else "overlap"
        return f"Its interval and that of the next, {second.name}, {apart}."
    lead = f"{number(100 * difference.value, 1)} of 100{in_brackets(difference, 'points', True)}"
    if difference.low <= 0:
        return f"It is not clearly better than the next, {second.name}: its lead is {lead}."
    return f"Its lead over the next, {second.name}, is {lead}."


def _difference(run: Run, ours: str, theirs: str) -> Figure | None:
    for pair in run.evaluation.get("pairs") or []:
        figure = as_figure(pair.get("difference"))
        if figure and (pair.get("ours"), pair.get("theirs")) == (ours, theirs):
            return figure
        if figure and (pair.get("ours"), pair.get("theirs")) == (theirs, ours):
            return Figure(-figure.value, -figure.high, -figure.low)
    return None


def _order_by(name: str, order: list[ReportedPolicy]) -> Iterator[str]:
    judged = [(policy, policy.further[name]) for policy in order if name in policy.further]
    if not judged:
        return
    best, win = max(judged, key=lambda pair: pair[1].value)
    also = " too" if best is order[0] else ""
    yield (
        f"By a reward never trained on ({name}) {best.name} is preferred most often{also}: in "
        f"{of_100(win.value)} of 100{in_brackets(win, 'points')}."
    )
