"""Command lines of other people's files, parsed by the programs themselves and not carried out."""

from collections.abc import Sequence
from typing import Any


def parse(words: Sequence[str]) -> None:
    """Raise what the program itself would refuse ``words`` with; AssertionError for no program."""
    program, *arguments = words
    if program == "prefect":
        _parse_prefect(arguments)
    elif program == "ckptfuse":
        import typer

        from flows.cli import app

        _parse_click(typer.main.get_command(app), program, arguments)
    elif program == "mlflow":
        from mlflow.cli import cli

        _parse_click(cli, program, arguments)
    else:
        raise AssertionError(f"{program} is no program that this knows: {' '.join(words)}")


def _parse_click(command: Any, name: str, arguments: list[str]) -> None:
    """Down to the last subcommand, without calling any; Typer has a click of its own."""
    context = command.make_context(name, list(arguments))
    if hasattr(command, "resolve_command"):
        found, chosen, rest = command.resolve_command(context, arguments)
        _parse_click(chosen, found, rest)


def _parse_prefect(arguments: list[str]) -> None:
    from prefect.cli._app import _app

    own = [word for word in arguments if word not in ("--no-prompt", "--prompt")]
    _app.parse_args(own, exit_on_error=False, print_error=False)
