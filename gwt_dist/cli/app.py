"""The commands of ``gwt-dist`` under one roof, and what a mistake of the user looks like."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

DONE, FAILED, USER_ERROR = 0, 1, 2

# Functions in modules of their names. A module is imported when its command is asked for: a plan is there before the
# torch that other commands need would be.
COMMANDS = ("plan", "inspect", "export", "report", "compare", "doctor")


class Commands(TyperGroup):
    """The commands of `COMMANDS`, beside those that are written here."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names, as the help shows them."""
        return [*super().list_commands(ctx), *COMMANDS]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name; None if there is none."""
        if cmd_name not in COMMANDS:
            return super().get_command(ctx, cmd_name)
        alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        alone.command(cmd_name)(getattr(import_module(f"gwt_dist.cli.{cmd_name}"), cmd_name))
        return typer.main.get_command(alone)


app = typer.Typer(
    cls=Commands,
    help="Adam moments in wavelet space, sharded: what goes with the optimizer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    if version:
        from importlib.metadata import version as installed

        print(installed("gwt_dist"))
        raise typer.Exit


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def train(context: typer.Context) -> None:
    """Pre-train a LLaMA: the arguments of launch/pretrain.py, of which `gwt-dist train --help` tells."""
    from gwt_dist.train.command import main as pretrain

    raise typer.Exit(pretrain(context.args))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments; None takes those of this process.

    Returns:
        0; 1 where a command found what it looks for to be bad (a damaged checkpoint); 2 for a mistake of the
        user, told in one line on stderr. A command that runs the recipe returns the recipe's codes.
    """
    try:
        app(args=argv, prog_name="gwt-dist")
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else DONE
    except ValueError as error:  # the project's own errors are ValueErrors
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    return DONE
