"""Console output of `bonbon generate`."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from bonbon.decoding.catalogue import strategy_name
from bonbon.decoding.config import GenerateConfig
from bonbon.decoding.strategy import Generation

if TYPE_CHECKING:
    from bonbon.decoding.fitting import FittedBeta
    from bonbon.stages.generate import Spent


def answer_prompts(config: GenerateConfig, texts: Sequence[str]) -> None:
    """Answer prompts; print each answer on standard output and its cost on standard error."""
    from bonbon.decoding.source import LocalSource
    from bonbon.groups.prompts import PromptRow, checked_prompt
    from bonbon.rewards.from_config import build_reward
    from bonbon.sampling.from_config import load_model

    model, tokenizer = load_model(config.model)
    reward = None if config.reward is None else build_reward(config.reward)
    source = LocalSource(model, tokenizer, config.sampling, config.stop)
    for text in texts:
        checked_prompt(text, "--prompt")
    rows = [PromptRow(f"row-{number}", _prompt(text, tokenizer.chat_template is not None))
            for number, text in enumerate(texts, start=1)]  # fmt: skip
    for generation in config.strategy.generate(source.encode(rows), source, reward):
        print(printable(generation.completion))
        print(f"({_cost(generation)})", file=sys.stderr)


def _prompt(text: str, chat: bool) -> str | list[dict[str, str]]:
    """Return a prompt: a plain text, or a user's message for a chat model."""
    return [{"role": "user", "content": text}] if chat else text


def printable(text: str) -> str:
    """Remove control characters and direction marks, which could steer a terminal."""
    return "".join(c for c in text if c in "\n\t" or not _steers(c))


def _steers(character: str) -> bool:
    bidirectional = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    return (
        unicodedata.category(character) == "Cc"
        or unicodedata.bidirectional(character) in bidirectional
    )


def _cost(generation: Generation) -> str:
    cost = generation.cost
    reward = "" if generation.reward is None else f"reward {generation.reward:.3g}, "
    cut = generation.group.finish_reasons[generation.chosen] == "length"
    return (
        f"{'cut off at its longest, ' if cut else ''}{reward}{generation.group.n} candidates, "
        f"{cost.generated:,} tokens generated, {cost.prefilled:,} prefilled, "
        f"{cost.reward_calls} scored, {cost.seconds:.2f} s"
    )


def show_spent(spent: Spent, config: GenerateConfig, out: Path) -> None:
    """Print a table of the mean cost of an answer, and the paths of the results."""
    each = spent.per_answer()
    table = Table(title=f"{strategy_name(config.strategy)}, n = {config.sampling.n}")
    row = {"prompts": f"{spent.prompts:,}"}
    if spent.reward is not None:
        half = (spent.reward.high - spent.reward.low) / 2
        row["mean reward"] = f"{spent.reward.value:.4g} ± {half:.2g}"
    row |= {
        "tokens an answer": f"{each.generated:,}",
        "prefilled": f"{each.prefilled:,}",
        "scored": f"{each.reward_calls:,}",
        "seconds": f"{each.seconds:.3f}",
    }
    for name in row:
        table.add_column(name, justify="right")
    table.add_row(*row.values())
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    print(f"candidates   {out / 'generations'}")
    print(f"cost         {out / 'cost.json'}")
    print(f"completions  {out / 'completions.jsonl'}")


def show_fitted(fitted: FittedBeta, by: str) -> None:
    """Print the curve as a table, and the best value."""
    field = fitted.field
    table = Table(title=f"{by} of the answers by {field}")
    for name in (field, by, "95% interval"):
        table.add_column(name, justify="right")
    for point in fitted.curve:
        best = " *" if point.beta == fitted.beta else ""
        interval = f"{point.gold.low:.4g} to {point.gold.high:.4g}"
        table.add_row(f"{point.beta:.4g}{best}", f"{point.gold.value:.4g}", interval)
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    edge = ", at the edge of what was tried: a wider grid may hold a better one"
    print(f"best: {field} = {fitted.beta:.4g}{edge if fitted.at_edge else ''}")
