"""The commands of ``gwt-dist`` under one roof, and what a mistake of the user looks like."""

from __future__ import annotations

import difflib
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

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that `args` begins with; what is near to one that is not there is told."""
        known = self.list_commands(ctx)
        if args[0] not in known and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], known, n=1)
            told = f"Did you mean {near[0]!r}?" if near else f"Commands: {', '.join(sorted(known))}"
            ctx.fail(f"No such command {args[0]!r}. {told}")
        return super().resolve_command(ctx, args)


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


def _refuse_empty(arguments: Sequence[str]) -> None:
    """Raise `ValueError` for text that is empty, which is most often a variable of the shell that is not set."""
    for number, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if not argument or (equals and not value and option.startswith("--")):
            where = f"option {option} is" if argument else f"the argument after {' '.join(arguments[:number])!r} is"
            raise ValueError(f"{where} empty; give it a value (is a variable of the shell not set?), or leave it out")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments; None takes those of this process.

    Returns:
        0; 1 where a command found what it looks for to be bad (a damaged checkpoint); 2 for a mistake of the
        user, told in one line on stderr. A command that runs the recipe returns the recipe's codes.
    """
    try:
        _refuse_empty(list(sys.argv[1:] if argv is None else argv))
        app(args=argv, prog_name="gwt-dist")
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else DONE
    except ValueError as error:  # the project's own errors are ValueErrors
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    return DONE
