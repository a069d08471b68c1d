"""The `bonbon` command: parse, call, show. Nothing heavy is imported before it is needed."""

from __future__ import annotations

from typing import Annotated

import typer

from bonbon.cli import answers, config, stages, theory
from bonbon.cli.options import reported_errors
from bonbon.system.processes import refuse_several_processes

app = typer.Typer(
    help="Best-of-n alignment of language models: sample, score, train, evaluate.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from bonbon.system.version import installed_version

        print(installed_version())
        raise typer.Exit()


@app.callback()
def _main_options(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    if context.invoked_subcommand not in (None, "train"):
        with reported_errors():
            refuse_several_processes(str(context.invoked_subcommand))


# In the order in which `bonbon --help` lists them.
for command in (
    stages.run,
    stages.sample,
    stages.score,
    stages.train,
    stages.evaluate,
    stages.compare,
    answers.generate,
    answers.serve,
    answers.fit_beta,
    theory.plan,
    theory.report,
    theory.frontier,
    config.config,
    stages.demo,
):
    app.command(command.__name__.replace("_", "-"))(command)


def main() -> None:
    """Run the `bonbon` command."""
    app(prog_name="bonbon")
