"""Options and arguments that several commands have, and what their branches have in common."""

from pathlib import Path
from typing import Annotated

import typer

from proxy.cli.output import emit

RUN_DEFAULT = Path("/run/standfast")
RUN_VARIABLE = "STANDFAST_RUN"

Run = Annotated[
    Path,
    typer.Option("--run", metavar="DIR", envvar=RUN_VARIABLE, help="Where the manager has its sockets."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the manager's answer, as JSON.")]
Force = Annotated[bool, typer.Option("--force", help="Do it although clients use it.")]
GroupName = Annotated[str, typer.Argument(metavar="NAME", help="The group's name.")]
DomainName = Annotated[str, typer.Argument(metavar="NAME", help="The domain's name.")]
Size = Annotated[
    str, typer.Option("--size", metavar="SIZE", help="Bytes, or with K, M, G or T (powers of 1024).")
]


def show_help(context: typer.Context) -> None:
    """Print what there is, when a branch is named without a command."""
    if context.invoked_subcommand is None:
        emit(context.get_help())


def branch(text: str) -> typer.Typer:
    """A branch of the tree of commands; ``text`` is its help."""
    return typer.Typer(help=text, callback=show_help, invoke_without_command=True, rich_markup_mode=None)
