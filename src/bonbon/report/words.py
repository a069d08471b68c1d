"""The findings in sentences that a decision can be based on.

A difference is claimed only if its 95% interval excludes "no difference".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bonbon.evaluation.figures import Figure
from bonbon.report.data import ReportedPolicy, Run
from bonbon.report.numbers import Shown, in_brackets, number, of_100, shown, whole_share
from bonbon.report.ranking import ranking

_FEW = 20  # prompts; with fewer, intervals are too narrow


@dataclass(frozen=True)
class Tile:
    """A large number with its name and a note."""

    label: str
    shown: Shown
    note: str


def headline(run: Run) -> list[str]:
    """Return the findings about the main model, or the ranking of a comparison."""
    sentences = ranking(run) if run.main is None else _main_findings(run, run.main)
    return [*sentences, *_warnings(run)]


def tiles(run: Run) -> list[Tile]:
    """Return the main model's five figures; none in a comparison."""
    main = run.main
    if main is None:
        return []
    return [
        Tile("win rate", shown(main.figure("win_rate"), "share"), "against the base model"),
        Tile("KL", shown(main.figure("kl"), "nats"), "nats from the base model"),
        Tile("recovered", shown(main.figure("recovered"), "share"), f"of best-of-{run.n}’s gain"),
        Tile("KL efficiency", shown(main.figure("kl_efficiency"), "ratio"), "1 is the limit"),
        Tile(
            "length change",
            shown(main.figure("length_change"), "tokens", signed=True),
            "tokens an answer",
        ),
    ]


def _main_findings(run: Run, main: ReportedPolicy) -> Iterator[str]:
    win = main.figure("win_rate")
    if win is None:
        yield f"The win rate of {main.name} was not measured."
        return
    yield _win(win)
    yield from _ties(main)
    yield from _best_of_n(run, main, win)
    yield from _distance(main, win)
    yield from _length(main, win)
    yield from _further(run, main, win)
    yield from _judge(main)
    yield from _forgetting(main)


def _win(win: Figure) -> str:
    share, interval = of_100(win.value), in_brackets(win, "points")
    if win.low > 0.5:
        return (
            f"In {share} of 100 comparisons the aligned model’s answer is preferred to the base "
            f"model’s{interval}, by the reward that it was trained on."
        )
    if win.high < 0.5:
        return (
            f"The aligned model is worse than the base model: its answer is preferred in only "
            f"{share} of 100 comparisons{interval}, by the reward that it was trained on."
        )
    return (
        "There is no clear difference from the base model: the aligned model’s answer is "
        f"preferred in {share} of 100 comparisons{interval}, by the reward that it was trained on; "
        "50 would be even."
    )


def _ties(main: ReportedPolicy) -> Iterator[str]:
    ties = main.number("tie_rate")
    if ties is not None and ties >= 1:
        yield "The reward gives all answers to a prompt the same value: every pair ties."
    elif ties is not None and ties > 0.05:
        yield f"Ties count half: {of_100(ties)} of 100 pairs tie."


def _best_of_n(run: Run, main: ReportedPolicy, win: Figure) -> Iterator[str]:
    best = run.best_of_n.figure("win_rate") if run.best_of_n else None
    if best is None:
        return
    drawing = f"Drawing {run.n} and keeping the best would win {of_100(best.value)} of 100"
    recovered = main.number("recovered")
    if best.low <= 0.5:
        yield f"{drawing}, not clearly more than 50: the reward has little to choose by."
    elif recovered is None:
        yield f"{drawing}."
    elif win.high < 0.5:
        yield f"{drawing}; the model has none of that gain."
    elif win.low <= 0.5:
        yield f"{drawing}; it is not clear that the model has any of that gain."
    elif recovered > 1:
        yield (
            f"{drawing}: the model’s gain is {whole_share(recovered)} of that, at the cost of one "
            f"draw instead of {run.n}."
        )
    else:
        yield (
            f"{drawing}: the model recovers {whole_share(recovered)} of that gain at the cost of "
            f"one draw instead of {run.n}."
        )


def _distance(main: ReportedPolicy, win: Figure) -> Iterator[str]:
    kl, efficiency = main.number("kl"), main.number("kl_efficiency")
    if kl is None:
        yield (
            "Its KL divergence from the base model is not known: it has another vocabulary, or the "
            "KL is infinite."
        )
        return
    moved = f"It moved {number(kl, 2)} nats from the base model (KL divergence)"
    if efficiency is None or win.low <= 0.5:
        yield f"{moved}."
    elif efficiency <= 1:
        yield (
            f"{moved}; the least that any method based on the reward’s ranks needs for this win "
            f"rate is {number(efficiency * kl, 2)} (efficiency {number(efficiency, 2)})."
        )
    else:
        yield (
            f"{moved}, no more than the {number(efficiency * kl, 2)} that this win rate needs when "
            f"no rewards tie (efficiency {number(efficiency, 2)}; sampling error and tied rewards "
            "can take it above 1)."
        )


def _length(main: ReportedPolicy, win: Figure) -> Iterator[str]:
    change = main.figure("length_change")
    if change is not None:
        interval = shown(change, "tokens", signed=True).interval
        if change.low <= 0 <= change.high:
            tail = f" ({number(change.value, 1, signed=True)} tokens"
            tail += f", 95% interval {interval})" if interval else ")"
            yield f"There is no clear difference in length from the base model’s answers{tail}."
        else:
            comparison = "longer" if change.value > 0 else "shorter"
            yield (
                f"Answers are {number(abs(change.value), 1)} tokens {comparison} on average"
                f"{in_brackets(change, 'tokens', signed=True)}."
            )
    controlled = main.figure("length_controlled_win_rate")
    if controlled is not None:
        less = controlled.high < win.low
        yield (
            f"With length held equal it would win {of_100(controlled.value)} of 100"
            f"{in_brackets(controlled, 'points')}"
            + ("; part of the gain is in the length." if less else ".")
        )


def _further(run: Run, main: ReportedPolicy, win: Figure) -> Iterator[str]:
    if not main.further:
        yield (
            "No further reward was measured, so nothing here shows whether the model has only "
            "learned to please its own reward (evaluation.rewards adds one)."
        )
    for name, gold in main.further.items():
        yield (
            f"By a reward never trained on ({name}) the model wins {of_100(gold.value)} of 100"
            f"{in_brackets(gold, 'points')}"
            f"{_over_optimisation(run, name, win, gold, main.figure('win_rate_loss_by', name))}"
        )


def _over_optimisation(run: Run, name: str, win: Figure, gold: Figure, loss: Figure | None) -> str:
    if gold.high < 0.5:
        worse = ": by that reward the model is worse than the base model"
        return f"{worse}, so its reward is over-optimised." if win.low > 0.5 else f"{worse}."
    if win.low <= 0.5:
        return "."
    if gold.low <= 0.5:
        return ": no clear gain there, so the model may only have learned to please its own reward."
    if gold.value >= win.value:
        return ": no less than by the reward trained on."
    if loss is None and gold.high >= win.low:
        apart = number(100 * abs(win.value - gold.value), 1)
        return f": {apart} of 100 apart, which by the two intervals alone may be sampling error."
    if loss is not None and loss.low <= 0:
        lost = f"{number(100 * loss.value, 1, signed=True)} of 100"
        return f": no clear loss there ({lost}{in_brackets(loss, 'points', True)})."
    return f": the gain shrinks by {_shrinkage(win, gold)} there{_own_shrinkage(run, name)}."


def _shrinkage(win: Figure, gold: Figure) -> str:
    return whole_share(1 - (gold.value - 0.5) / (win.value - 0.5))


def _own_shrinkage(run: Run, name: str) -> str:
    """Return best-of-n's own loss between the rewards, which measures how they disagree."""
    best = run.best_of_n
    win, gold = (best.figure("win_rate"), best.further.get(name)) if best else (None, None)
    if win is None or gold is None or win.low <= 0.5:
        return ""
    if gold.value >= win.value:
        return f"; best-of-{run.n}’s own does not"
    return f" (best-of-{run.n}’s own shrinks by {_shrinkage(win, gold)})"


def _judge(main: ReportedPolicy) -> Iterator[str]:
    judge = main.values.get("judge")
    asked = (judge or {}).get("comparisons") or 0
    if not judge or not asked:
        return
    unread = judge.get("unreadable") or 0
    left = f" ({number(unread)} of {number(asked)} had no readable verdict)" if unread else ""
    judged = main.figure("judge", "win_rate")
    if judged is None:
        yield (f"A judge model was asked about {number(asked)} pairs and gave no readable verdict.")
        return
    doubt = ": no clear difference" if judged.low <= 0.5 <= judged.high else ""
    yield (
        f"By the verdicts of a judge model on {number(asked - unread)} pairs{left} it wins "
        f"{of_100(judged.value)} of 100{in_brackets(judged, 'points')}{doubt}."
    )


def _forgetting(main: ReportedPolicy) -> Iterator[str]:
    loss = main.figure("human_text", "forgetting")
    if loss is None:
        return
    if loss.low > 0:
        yield (
            f"Its loss on human text is {shown(loss, '').value} nats a token higher than the base "
            f"model’s{in_brackets(loss, '')}: some of what the base model knew is forgotten."
        )
    else:
        yield (
            f"No forgetting shows on human text ({shown(loss, '', signed=True).value} nats a "
            "token)."
        )


def _warnings(run: Run) -> Iterator[str]:
    seen = run.evaluation.get("prompts_trained_on")
    if seen:
        yield (
            f"Caution: {number(seen)} of the {number(run.evaluation.get('prompts'))} prompts were "
            "also trained on, which makes trained models look better."
        )
    if left_out := run.evaluation.get("prompts_left_out"):
        yield (
            f"Caution: {number(left_out)} prompts were too long for at least one of the models and "
            "were left out."
        )
    if (prompts := run.evaluation.get("prompts") or 0) and prompts < _FEW:
        yield (
            f"Caution: {number(prompts)} prompts are too few for a decision, whatever the "
            "intervals say."
        )
