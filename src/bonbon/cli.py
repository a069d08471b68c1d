"""The command line: it parses, calls, and shows. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bonbon.distributed import (
    is_main_process,
    let_the_main_process_speak,
    process_count,
    refuse_several_processes,
)
from bonbon.errors import BonbonError

if TYPE_CHECKING:
    from bonbon.config import RunConfig
    from bonbon.decoding.settings import GenerateConfig
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
def _reported() -> Iterator[None]:
    """One sentence and exit code 2 for what the user can put right; 130 for Ctrl-C."""
    try:
        yield
    except BonbonError as error:
        let_the_main_process_speak()
        print(f"bonbon: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        if is_main_process():
            print("bonbon: stopped; the same command goes on from here", file=sys.stderr)
        raise typer.Exit(130) from None


def _version(asked: bool) -> None:
    if asked:
        from bonbon import __version__

        print(__version__)
        raise typer.Exit()


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand not in (None, "train"):
        with _reported():
            refuse_several_processes(str(context.invoked_subcommand))


def _add_stage(name: str, summary: str, show: Callable[[RunFolder, Any], None]) -> None:
    """Add the command of a stage; all of them take the same options."""

    def command(
        config: ConfigPath,
        out: Out,
        set_: Set = None,
        prompt_column: PromptColumn = None,
        on_long_prompt: OnLongPrompt = None,
    ) -> None:
        on_ray(config, out, set_, prompt_column, on_long_prompt)

    def on_ray(
        config: ConfigPath,
        out: Out,
        set_: Set = None,
        prompt_column: PromptColumn = None,
        on_long_prompt: OnLongPrompt = None,
        ray_address: RayAddress = None,
    ) -> None:
        with _reported():
            changes = [*(set_ or ()), *_on_ray(ray_address)]
            settings = _settings(config, changes, prompt_column, on_long_prompt)
            show(*_stage(settings, out, name))

    has_workers = name in ("run", "sample", "score")
    app.command(name, help=summary)(on_ray if has_workers else command)


def _say_model(folder: RunFolder, _: Any) -> None:
    if is_main_process():
        print(f"model: {folder.model(folder.config.model_name)}")


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
    _say_model,
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


ModelName = Annotated[str | None, typer.Option("--model", help="The model's folder or hub id.")]
RewardName = Annotated[
    str | None,
    typer.Option("--reward", help="A reward model, or a function as package.module:function."),
]
StrategyName = Annotated[
    str | None, typer.Option("--strategy", help="How candidates are drawn and one is chosen.")
]
Candidates = Annotated[int | None, typer.Option("--n", help="Candidates a prompt.")]


@app.command()
def generate(
    config: Annotated[
        Path | None, typer.Argument(help="Model, prompts, reward, strategy (YAML); a run's too.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The folder to write into.")] = None,
    model: ModelName = None,
    prompts: Annotated[Path | None, typer.Option(help="A file of prompts.")] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            help="Answered here and now; a user's message to a chat model.",
        ),
    ] = None,
    reward: RewardName = None,
    strategy: StrategyName = None,
    n: Candidates = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest completion.")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Of the sampling; 1 unless set.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the sampling; 0 unless set.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="A string that ends a completion.")
    ] = None,
    set_: Set = None,
    prompt_column: PromptColumn = None,
    on_long_prompt: OnLongPrompt = None,
) -> None:
    """Answer prompts by a strategy: best-of-n and its relatives, at inference time.

    Strategies: best_of_n, soft_best_of_n, best_of_poisson, rbon_kl, rbon_wd, rbon_length, srbon_kl,
    srbon_wd, speculative_rejection, tree_bon, smc, self_consistency, shortest_majority_vote,
    reward_weighted_vote, adaptive_n. Their settings: --set strategy.alpha=0.5.
    """
    with _reported():
        from bonbon.decoding.settings import parse_generate_config, with_named
        from bonbon.settings import read_yaml

        found = {} if config is None else read_yaml(config)
        if prompt and (out is not None or prompts is not None):
            raise BonbonError("--prompt is answered here and now; leave out --prompts and --out")
        options = {
            "model.name": model,
            "prompts.path": None if prompts is None else str(prompts),
            "sampling.n": n,
            "sampling.max_new_tokens": max_new_tokens,
            "sampling.temperature": temperature,
            "sampling.seed": seed,
            "stop": stop or None,
        }
        values = with_named(found, options, reward=reward, strategy=strategy)
        changes = _changes(set_, prompt_column, on_long_prompt)
        settings = parse_generate_config(values, changes, str(config or "the command line"))
        _quiet_libraries()
        if prompt:
            from bonbon.decoding.console import answer_prompts

            answer_prompts(settings, prompt)
        elif out is None:
            raise BonbonError("name the folder to write into with --out")
        else:
            _generate_into(settings, out)


@app.command()
def serve(
    config: Annotated[
        Path | None, typer.Argument(help="Settings (YAML); a run's configuration serves too.")
    ] = None,
    model: ModelName = None,
    upstream: Annotated[
        str | None,
        typer.Option(help="An OpenAI-compatible server's address, e.g. http://127.0.0.1:8001/v1."),
    ] = None,
    reward: RewardName = None,
    strategy: StrategyName = None,
    n: Candidates = None,
    host: Annotated[str | None, typer.Option(help="Other than this machine: needs a key.")] = None,
    port: Annotated[int | None, typer.Option(help="8000 unless set; 0: any that is free.")] = None,
    set_: Set = None,
) -> None:
    """Serve best-of-n behind OpenAI's API, from a loaded model or in front of another server."""
    with _reported():
        from bonbon.decoding.settings import with_named
        from bonbon.serve.command import parse_serve_settings
        from bonbon.serve.command import serve as start
        from bonbon.settings import read_yaml

        found = {} if config is None else read_yaml(config)
        options = {
            "model.name": model,
            "upstream.base_url": upstream,
            "sampling.n": n,
            "host": host,
            "port": port,
        }
        values = with_named(found, options, reward=reward, strategy=strategy)
        settings = parse_serve_settings(values, set_ or [], str(config or "the command line"))
        _quiet_libraries()
        start(settings)


@app.command("fit-beta")
def fit_beta(
    groups: Annotated[
        str, typer.Argument(metavar="GROUPS", help="A folder of scored groups with a gold metric.")
    ],
    strategy: Annotated[str, typer.Option("--strategy", help="One that weighs by β (or τ).")],
    by: Annotated[str, typer.Option("--by", help="The metric that holds the gold values.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting of the strategy's."),
    ] = None,
    field: Annotated[
        str | None, typer.Option(help="The setting that is fitted; else beta, or tau.")
    ] = None,
    model: ModelName = None,
    as_json: AsJson = False,
) -> None:
    """Choose a strategy's β on a development set: where the gold value of its answers is largest.

    Distances of embeddings take --model, the one that drew the groups.
    """
    with _reported():
        from bonbon.decoding.console import show_fitted
        from bonbon.decoding.fitting import fit_on_folder
        from bonbon.storage import storage_path

        if model is not None:
            _quiet_libraries()
        fitted = fit_on_folder(storage_path(groups), strategy, set_ or [], by, field, model)
        if as_json:
            print(json.dumps(asdict(fitted), indent=2))
        else:
            show_fitted(fitted, by)


@app.command()
def plan(
    groups: Annotated[
        str | None, typer.Argument(metavar="GROUPS", help="A pilot: a folder of scored groups.")
    ] = None,
    win_rate: Annotated[
        float | None, typer.Option("--win-rate", help="The one that is wanted.")
    ] = None,
    by: Annotated[
        str | None, typer.Option("--by", help="A metric that decides a win in the reward's place.")
    ] = None,
    max_n: Annotated[int, typer.Option("--max-n", help="The largest n to consider.")] = 1024,
    tokens_per_second: Annotated[
        float | None, typer.Option(help="How fast completions are drawn; else as the pilot's were.")
    ] = None,
    cluster: Annotated[
        Path | None,
        typer.Option(metavar="YAML", help="Simulate this cluster: hours, idle GPUs and cost."),
    ] = None,
    plot: PlotPath = None,
    as_json: AsJson = False,
) -> None:
    """Which n reaches a wanted win rate, at what KL and cost; and how to share a cluster's GPUs."""
    with _reported():
        from bonbon.storage import storage_path

        pilot = None if groups is None else storage_path(groups)
        if cluster is not None:
            if plot is not None or tokens_per_second is not None:
                raise BonbonError("--plot and --tokens-per-second do not go with --cluster")
            from bonbon.cluster_plan.shown import show

            show(cluster, pilot, win_rate, by, max_n, as_json)
            return
        if pilot is None or win_rate is None:
            raise BonbonError("plan needs GROUPS, a pilot's folder, and --win-rate; or --cluster")
        from bonbon.groups import read_groups
        from bonbon.plan import plan as make_plan
        from bonbon.plan import plan_sentences, plan_table, sampling_speed_beside
        from bonbon.plots import check_plot_path

        if plot is not None:
            check_plot_path(plot)
        speed = tokens_per_second
        if speed is None:
            speed = sampling_speed_beside(pilot)
        planned = make_plan(read_groups(pilot), win_rate, by, max_n, speed)
        if as_json:
            print(json.dumps(asdict(planned), indent=2))
        else:
            from rich.console import Console

            Console(width=None if sys.stdout.isatty() else 100).print(plan_table(planned))
            print("\n".join(plan_sentences(planned)))
        if plot is not None:
            from bonbon.plots import plot_plan

            plot_plan(planned, plot)
            print(f"plot: {plot}", file=sys.stderr)


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
    plot: PlotPath = None,
    as_json: AsJson = False,
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

    return load_config(path, _changes(overrides, column, on_long_prompt))


def _on_ray(address: str | None) -> list[str]:
    """The changes that put a run on a Ray cluster."""
    if address is None:
        return []
    return ["engine.name=ray", f"engine.address={json.dumps(address)}"]


def _changes(
    overrides: list[str] | None, column: str | None, on_long_prompt: str | None
) -> list[str]:
    changes = list(overrides or [])
    if column is not None:
        changes.append(f"prompts.column={json.dumps(column)}")
    if on_long_prompt is not None:
        changes.append(f"sampling.on_long_prompt={json.dumps(on_long_prompt)}")
    return changes


def _generate_into(settings: GenerateConfig, out: Path) -> None:
    from bonbon.decoding.console import show_spent
    from bonbon.decoding.stage import generate_into
    from bonbon.run_folder import StageFolder

    folder = StageFolder(out, settings)
    with folder.locked():
        show_spent(generate_into(folder, settings), settings, out)


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
    if process_count() > 1:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # or DDP gives each its advice
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
    from bonbon.storage import is_remote
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
        "groups": folder.rounds()[-1].groups,
        "figures": folder.evaluation / "evaluation.json",
        "report": write_report(folder.path),
    }
    places = {name: path for name, path in places.items() if is_remote(path) or path.exists()}
    if more:
        print(f"{more}\n")
    width = max(map(len, places))
    for name, path in places.items():
        print(f"{name:<{width}}  {path}")
