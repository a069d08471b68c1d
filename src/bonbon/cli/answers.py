"""Commands that answer prompts: generate, serve, fit-beta."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bonbon.cli.options import (
    AsJson,
    Candidates,
    ModelName,
    OnLongPrompt,
    PromptColumn,
    RewardName,
    Set,
    StrategyName,
    overrides_of,
    quiet_libraries,
    reported_errors,
)
from bonbon.system.errors import BonbonError

if TYPE_CHECKING:
    from bonbon.decoding.config import GenerateConfig


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
    with reported_errors():
        from bonbon.config.run import read_values
        from bonbon.decoding.config import parse_generate_config, with_named

        from_file = {} if config is None else read_values(config)
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
        values = with_named(from_file, options, reward=reward, strategy=strategy)
        changes = overrides_of(set_, prompt_column, on_long_prompt)
        settings = parse_generate_config(values, changes, str(config or "the command line"))
        quiet_libraries()
        if prompt:
            from bonbon.cli.console import answer_prompts

            answer_prompts(settings, prompt)
        elif out is None:
            raise BonbonError("name the folder to write into with --out")
        else:
            _generate_into(settings, out)


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
    with reported_errors():
        from bonbon.config.run import read_values
        from bonbon.decoding.config import with_named
        from bonbon.serve.command import parse_serve_settings
        from bonbon.serve.command import serve as start

        from_file = {} if config is None else read_values(config)
        options = {
            "model.name": model,
            "upstream.base_url": upstream,
            "sampling.n": n,
            "host": host,
            "port": port,
        }
        values = with_named(from_file, options, reward=reward, strategy=strategy)
        settings = parse_serve_settings(values, set_ or [], str(config or "the command line"))
        quiet_libraries()
        start(settings)


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
    with reported_errors():
        from bonbon.cli.console import show_fitted
        from bonbon.decoding.fitting import fit_on_folder
        from bonbon.system.storage import storage_path

        if model is not None:
            quiet_libraries()
        fitted = fit_on_folder(storage_path(groups), strategy, set_ or [], by, field, model)
        if as_json:
            print(json.dumps(asdict(fitted), indent=2))
        else:
            show_fitted(fitted, by)


def _generate_into(settings: GenerateConfig, out: Path) -> None:
    from bonbon.cli.console import show_spent
    from bonbon.runs.lock import locked
    from bonbon.stages.generate import generate_into

    with locked(out):
        show_spent(generate_into(out, settings), settings, out)
