"""Options that several commands take, and how errors reach the user."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from bonbon.system.errors import BonbonError
from bonbon.system.processes import (
    is_main_process,
    let_the_main_process_speak,
    process_count,
)

ConfigPath = Annotated[Path, typer.Argument(help="The run's configuration (YAML).")]
Out = Annotated[Path, typer.Option("--out", help="The run's folder.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, e.g. sampling.n=4."),
]
PromptColumn = Annotated[str | None, typer.Option(help="The column that holds the prompts.")]
RayAddress = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Sample and score on this Ray cluster (`auto`: the one of this machine's node).",
    ),
]
PlotPath = Annotated[Path | None, typer.Option(help="Draw it into this file (PNG, SVG, PDF).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
OnLongPrompt = Annotated[
    str | None, typer.Option(help="Prompts over the context: error, skip or truncate.")
]


@contextmanager
def reported_errors() -> Iterator[None]:
    """Turn a user's errors into one sentence and exit code 2, and Ctrl-C into 130."""
    try:
        yield
    except BonbonError as error:
        let_the_main_process_speak()
        print(f"bonbon: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        if is_main_process():
            print("bonbon: stopped; the same command resumes from here", file=sys.stderr)
        raise typer.Exit(130) from None


ModelName = Annotated[str | None, typer.Option("--model", help="The model's folder or hub id.")]
RewardName = Annotated[
    str | None,
    typer.Option("--reward", help="A reward model, or a function as package.module:function."),
]
StrategyName = Annotated[
    str | None, typer.Option("--strategy", help="How candidates are drawn and one is chosen.")
]
Candidates = Annotated[int | None, typer.Option("--n", help="Candidates a prompt.")]


def overrides_of(
    overrides: list[str] | None, column: str | None, on_long_prompt: str | None
) -> list[str]:
    """Return all options that change the configuration as `key=value` overrides."""
    changes = list(overrides or [])
    if column is not None:
        changes.append(f"prompts.column={json.dumps(column)}")
    if on_long_prompt is not None:
        changes.append(f"sampling.on_long_prompt={json.dumps(on_long_prompt)}")
    return changes


def quiet_libraries() -> None:
    """Silence libraries except for errors: our own bars and tables show what happens."""
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if process_count() > 1:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # or DDP gives each its advice
    warnings.filterwarnings("ignore", category=FutureWarning)
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
