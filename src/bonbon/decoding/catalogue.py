"""The strategies by name; a strategy's module is imported when it is first asked for."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from pydantic import ValidationError

from bonbon.decoding.strategy import Strategy

STRATEGIES = {
    "best_of_n": "best_of_n:BestOfN",
    "soft_best_of_n": "soft:SoftBestOfN",
    "best_of_poisson": "soft:BestOfPoisson",
    "rbon_kl": "regularised:RBoNKL",
    "rbon_wd": "regularised:RBoNWD",
    "rbon_length": "regularised:RBoNLength",
    "srbon_kl": "regularised:SRBoNKL",
    "srbon_wd": "regularised:SRBoNWD",
    "speculative_rejection": "speculative_rejection:SpeculativeRejection",
    "tree_bon": "tree:TreeBoN",
    "smc": "smc:SMC",
    "self_consistency": "voting:SelfConsistency",
    "shortest_majority_vote": "voting:ShortestMajorityVote",
    "reward_weighted_vote": "voting:RewardWeightedVote",
    "adaptive_n": "adaptive:AdaptiveN",
}


def strategy_class(name: str) -> type[Strategy]:
    """Return the class of a strategy. Raises ValueError, listing the names, if it is unknown."""
    if name not in STRATEGIES:
        raise ValueError(f"unknown strategy {name!r}; there are {', '.join(STRATEGIES)}")
    module, _, kind = STRATEGIES[name].partition(":")
    strategy: type[Strategy] = getattr(import_module(f"bonbon.decoding.{module}"), kind)
    return strategy


def parse_strategy(value: Any) -> Strategy:
    """Return a strategy given as itself, its name, or `{name: NAME, setting: value, …}`.

    Raises ValueError naming the wrong setting and what was expected.
    """
    if isinstance(value, Strategy):
        return value
    if isinstance(value, type):
        raise ValueError(f"a strategy is an instance, {value.__name__}(), and not the class")
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise ValueError("a strategy is a name, or a mapping with a `name` and its settings")
    kind = strategy_class(value["name"])
    settings = {str(key): setting for key, setting in value.items() if key != "name"}
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        raise ValueError("; ".join(_explain(kind, value["name"], error))) from error


def _explain(kind: type[Strategy], name: str, error: ValidationError) -> list[str]:
    messages = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            known = ", ".join(kind.model_fields) or "it has none"
            message = f"unknown setting (of {name}: {known})"
        elif problem["type"] == "missing":
            what = kind.model_fields[where].description or "no default"
            messages.append(f"strategy {name} needs the setting {where} ({what})")
            continue
        elif where:
            message = f"{problem['input']!r:.60}: {message}"
        messages.append(f"strategy {name}, {where}: {message}" if where else f"{name}: {message}")
    return messages


def strategy_name(strategy: Strategy) -> str:
    """Return a strategy's name."""
    kind = type(strategy)
    home = f"{kind.__module__.rsplit('.', 1)[-1]}:{kind.__qualname__}"
    return next((name for name, where in STRATEGIES.items() if where == home), kind.__name__)


def describe_strategy(strategy: Strategy) -> dict[str, Any]:
    """Return a strategy as plain values that `parse_strategy` reads, without defaults."""
    settings = strategy.model_dump(mode="json", exclude_defaults=True)
    return {"name": strategy_name(strategy), **settings}
