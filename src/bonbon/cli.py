"""The command line: it parses, calls, and shows. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bonbon.errors import BonbonError

if TYPE_CHECKING:
    from bonbon.config import RunConfig
    from bonbon.evaluation.results import Evaluation
    from bonbon.run_folder import RunFolder

app = typer.Typer(
    help="Best-of-n alignment of language models: sample, score, train, evaluate.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigPath = Annotated[Path, typer.Argument(help="The run's configuration (YAML).")]
Out = Annotated[Path, typer.Option("--out", help="The run's folder.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, e.g. sampling.n=4."),
]
PromptColumn = Annotated[str | None, typer.Option(help="The column that holds the prompts.")]
OnLongPrompt = Annotated[
    str | None, typer.Option(help="Prompts over the context: error, skip or truncate.")
]


@contextmanager
def _reported() -> Iterator[None]:
    """One sentence and exit code 2 for what the user can put right; 130 for Ctrl-C."""
    try:
        yield
    except BonbonError as error:
        print(f"bonbon: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        print("bonbon: stopped; the same command goes on from here", file=sys.stderr)
        raise typer.Exit(130) from None


def _version(asked: bool) -> None:
    if asked:
        from bonbon import __version__

        print(__version__)
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _add_stage(name: str, summary: str, show: Callable[[RunFolder, Any], None]) -> None:
    """Add the command of a stage; all of them take the same options."""

    def command(
        config: ConfigPath,
        out: Out,
        set_: Set = None,
        prompt_column: PromptColumn = None,
        on_long_prompt: OnLongPrompt = None,
    ) -> None:
        with _reported():
            settings = _settings(config, set_, prompt_column, on_long_prompt)
            show(*_stage(settings, out, name))

    app.command(name, help=summary)(command)


_add_stage(
    "run",
    "Do all stages: sample, score, train, evaluate. Run it again to go on after a stop.",
    lambda *done: _show(*done),
)
_add_stage(
    "sample",
    "Draw n completions of every prompt into OUT/samples.",
    lambda folder, _: print(f"samples: {folder.samples}"),
)
_add_stage(
    "score",
    "Score OUT/samples with the reward, into OUT/groups.",
    lambda folder, _: print(f"groups: {folder.groups}"),
)
_add_stage(
    "train",
    "Fine-tune on OUT/groups, into OUT/model.",
    lambda folder, _: print(f"model: {folder.model(folder.config.model_name)}"),
)
_add_stage(
    "evaluate",
    "Measure OUT/model against the base model and best-of-n, into OUT/evaluation.",
    lambda *done: _show(*done),
)


@app.command()
def compare(
    policies: Annotated[
        list[str],
        typer.Argument(
            metavar="POLICY...",
            help="[NAME=]MODEL[@DECODING]: a model, an adapter, a run's folder or `base`; DECODING "
            "is best-of-N, temperature=T, top_p=P, top_k=K.",
        ),
    ],
    out: Out,
    config: Annotated[
        Path | None, typer.Option(help="Prompts, reward, base model; else a run's own.")
    ] = None,
    set_: Set = None,
) -> None:
    """Measure models, adapters and ways of decoding side by side, into OUT/evaluation."""
    with _reported():
        from bonbon.compare import comparison_config, parse_policy

        specs = [parse_policy(text) for text in policies]
        settings = comparison_config(specs, config, set_ or [])
        _show(*_in_folder(settings, out, "bonbon.compare", "compare", specs))


@app.command()
def report(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="The folder of a run or a comparison.")
    ],
) -> None:
    """Write DIR/report.html (one file, to look at and to share), report.md and plots."""
    with _reported():
        from bonbon.report import write_report

        print(write_report(folder))


@app.command()
def frontier(
    n: Annotated[str, typer.Option("--n", help="Comma-separated, each a real >= 1.")] = "2,4,8",
    plot: Annotated[
        Path | None, typer.Option(help="Draw it into this file (PNG, SVG, PDF).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What theory allows: best-of-n's win rate and KL, and the optimum beside them."""
    with _reported():
        from bonbon.frontier import frontier_rows, parse_ns

        ns = parse_ns(n)
        rows = frontier_rows(ns)
        if as_json:
            print(json.dumps(rows, indent=2))
        else:
            _print_rows(rows)
        if plot is not None:
            from bonbon.plots import plot_frontier

            plot_frontier(ns, plot)
            print(f"plot: {plot}", file=sys.stderr)


@app.command()
def demo(
    out: Out = Path("bonbon-demo"),
    short: Annotated[
        bool, typer.Option("--short", help="A minute's version: fewer prompts, rougher figures.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the sampling and the training.")] = 0,
) -> None:
    """Happier bedtime stories: the whole pipeline on two small models that come with BoNBoN."""
    with _reported():
        from bonbon.demo import demo_config, side_by_side

        folder, results = _stage(demo_config(short=short, seed=seed), out, "run")
        _show(folder, results, side_by_side(folder))


def main() -> None:
    """The `bonbon` command."""
    app(prog_name="bonbon")


# --- the pieces -----------------------------------------------------------------------------------


def _settings(
    path: Path, overrides: list[str] | None, column: str | None, on_long_prompt: str | None
) -> RunConfig:
    from bonbon.config import load_config

    changes = list(overrides or [])
    if column is not None:
        changes.append(f"prompts.column={json.dumps(column)}")
    if on_long_prompt is not None:
        changes.append(f"sampling.on_long_prompt={json.dumps(on_long_prompt)}")
    return load_config(path, changes)


def _stage(settings: RunConfig, out: Path, name: str) -> tuple[RunFolder, Evaluation | None]:
    """Do one stage (or `run`) in the run's folder."""
    return _in_folder(settings, out, "bonbon.pipeline", name)


def _in_folder(
    settings: RunConfig, out: Path, module: str, name: str, *arguments: Any
) -> tuple[RunFolder, Evaluation | None]:
    """Call `module.name(folder, …)` while the folder is held."""
    from bonbon.run_folder import RunFolder

    folder = RunFolder(out, settings)
    with folder.locked():
        _quiet_libraries()
        function: Callable[..., Any] = getattr(import_module(module), name)
        return folder, function(folder, *arguments)


def _quiet_libraries() -> None:
    """Our own bars and tables say what happens; the libraries speak up for errors only."""
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:g}" if name == "n" else f"{value:.4f}"


def _print_rows(rows: list[dict[str, float | None]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Best-of-n and the optimal tilt (KL in nats)")
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(_cell(name, value) for name, value in row.items()))
    Console().print(table)


def _show(folder: RunFolder, results: Evaluation | None, more: str = "") -> None:
    """The summary at the end of a run: the table, `more`, and where everything is, report last."""
    from rich.console import Console

    from bonbon.report import write_report
    from bonbon.summary import results_table

    assert results is not None
    console = Console(width=None if sys.stdout.isatty() else 132)
    console.print(results_table(results.models))
    config = folder.config
    models = {"model": folder.model(config.model_name)} | {
        f"baseline {name}": folder.model(name) for name in config.baselines
    }
    places = {
        **models,
        "groups": folder.groups,
        "figures": folder.evaluation / "evaluation.json",
        "report": write_report(folder.path),
    }
    places = {name: path for name, path in places.items() if path.exists()}
    if more:
        print(f"{more}\n")
    width = max(map(len, places))
    for name, path in places.items():
        print(f"{name:<{width}}  {path}")
