"""Commands of the stages of a run, and of comparisons."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bonbon.cli.options import (
    ConfigPath,
    OnLongPrompt,
    Out,
    PromptColumn,
    RayAddress,
    Set,
    overrides_of,
    quiet_libraries,
    reported_errors,
)
from bonbon.system.processes import is_main_process

if TYPE_CHECKING:
    from bonbon.config.run import RunConfig
    from bonbon.evaluation.results import Evaluation
    from bonbon.runs.run_folder import RunFolder


def run(
    config: ConfigPath,
    out: Out,
    set_: Set = None,
    prompt_column: PromptColumn = None,
    on_long_prompt: OnLongPrompt = None,
    ray_address: RayAddress = None,
) -> None:
    """Run all stages: sample, score, train, evaluate. Run it again to resume after a stop."""
    changes = [*overrides_of(set_, prompt_column, on_long_prompt), *_on_ray(ray_address)]
    with reported_errors():
        with _opened_run(config, out, changes) as folder:
            from bonbon.stages.run import run as run_all

            evaluation = run_all(folder)
        _show(folder, evaluation)


def sample(
    config: ConfigPath,
    out: Out,
    set_: Set = None,
    prompt_column: PromptColumn = None,
    on_long_prompt: OnLongPrompt = None,
    ray_address: RayAddress = None,
) -> None:
    """Draw n completions of every prompt into OUT/samples."""
    changes = [*overrides_of(set_, prompt_column, on_long_prompt), *_on_ray(ray_address)]
    with reported_errors(), _opened_run(config, out, changes) as folder:
        from bonbon.stages.sample import sample as draw

        draw(folder)
        print(f"samples: {folder.samples}")


def score(
    config: ConfigPath,
    out: Out,
    set_: Set = None,
    prompt_column: PromptColumn = None,
    on_long_prompt: OnLongPrompt = None,
    ray_address: RayAddress = None,
) -> None:
    """Score OUT/samples with the reward, into OUT/groups."""
    changes = [*overrides_of(set_, prompt_column, on_long_prompt), *_on_ray(ray_address)]
    with reported_errors(), _opened_run(config, out, changes) as folder:
        if folder.config.engine.name == "local":
            from bonbon.stages.score import score as score_samples

            score_samples(folder)
        else:  # its workers for both stages also draw what is still missing
            from bonbon.stages.run import sample_and_score

            sample_and_score(folder)
        print(f"groups: {folder.groups}")


def train(
    config: ConfigPath,
    out: Out,
    set_: Set = None,
    prompt_column: PromptColumn = None,
    on_long_prompt: OnLongPrompt = None,
) -> None:
    """Fine-tune on OUT/groups, into OUT/model."""
    changes = overrides_of(set_, prompt_column, on_long_prompt)
    with reported_errors(), _opened_run(config, out, changes) as folder:
        from bonbon.stages.train import train as fine_tune

        fine_tune(folder)
        if is_main_process():
            print(f"model: {folder.model(folder.config.model_name)}")


def evaluate(
    config: ConfigPath,
    out: Out,
    set_: Set = None,
    prompt_column: PromptColumn = None,
    on_long_prompt: OnLongPrompt = None,
) -> None:
    """Measure OUT/model against the base model and best-of-n, into OUT/evaluation."""
    changes = overrides_of(set_, prompt_column, on_long_prompt)
    with reported_errors():
        with _opened_run(config, out, changes) as folder:
            from bonbon.stages.evaluate import evaluate as measure

            evaluation = measure(folder)
        _show(folder, evaluation)


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
    with reported_errors():
        from bonbon.stages.compare import comparison_config, parse_policy

        specs = [parse_policy(text) for text in policies]
        with _opened(comparison_config(specs, config, set_ or []), out) as folder:
            from bonbon.stages.compare import compare as compare_policies

            evaluation = compare_policies(folder, specs)
        _show(folder, evaluation)


def demo(
    out: Out = Path("bonbon-demo"),
    short: Annotated[
        bool, typer.Option("--short", help="A minute's version: fewer prompts, rougher figures.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the sampling and the training.")] = 0,
) -> None:
    """Happier bedtime stories: the whole pipeline on two small models that come with BoNBoN."""
    with reported_errors():
        from bonbon.demo import demo_config, side_by_side

        with _opened(demo_config(short=short, seed=seed), out) as folder:
            from bonbon.stages.run import run as run_all

            evaluation = run_all(folder)
        _show(folder, evaluation, side_by_side(folder))


def _on_ray(address: str | None) -> list[str]:
    """Return the overrides that put a run on a Ray cluster."""
    if address is None:
        return []
    return ["engine.name=ray", f"engine.address={json.dumps(address)}"]


@contextmanager
def _opened_run(config: Path, out: Path, changes: list[str]) -> Iterator[RunFolder]:
    """Hold the folder of the run that a configuration file describes."""
    from bonbon.config.run import load_config

    with _opened(load_config(config, changes), out) as folder:
        yield folder


@contextmanager
def _opened(settings: RunConfig, out: Path) -> Iterator[RunFolder]:
    """Hold the run's folder while a stage works in it."""
    from bonbon.runs.run_folder import RunFolder
    from bonbon.stages.checks import check_config

    check_config(settings)
    folder = RunFolder(out, settings)
    with folder.locked():
        quiet_libraries()
        yield folder


def _show(folder: RunFolder, results: Evaluation, more: str = "") -> None:
    """Print the table, `more`, and where everything is, the report last."""
    from rich.console import Console

    from bonbon.report import write_report
    from bonbon.report.console_table import results_table
    from bonbon.system.storage import is_remote

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
