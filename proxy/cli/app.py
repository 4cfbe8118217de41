"""The tree of commands."""

import os
from pathlib import Path
from typing import Annotated

import typer

from proxy.cli import disks, domains, events, groups, operations, render, server
from proxy.cli.client import Manager
from proxy.cli.options import RUN_DEFAULT, RUN_VARIABLE, Json, Run, show_help
from proxy.cli.output import emit, show

app = typer.Typer(name="standfast", rich_markup_mode=None, add_completion=False)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        emit(f"standfast {version('standfast')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    run: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Of every command: where the manager has its sockets.")
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Storage addresses that stand fast while the storage behind them changes."""
    if run is not None:
        # Commands have the option themselves, and read the variable; this is its other spelling.
        os.environ[RUN_VARIABLE] = str(run)
    show_help(context)


def status(as_json: Json = False, run: Run = RUN_DEFAULT) -> None:
    """Say whether the manager is ready, and how its domains are."""
    show(Manager(run).get("status"), render.status_page, as_json=as_json)


app.command()(server.serve)
app.command()(status)
app.add_typer(groups.app, name="group")
app.add_typer(domains.app, name="domain")
app.add_typer(disks.app, name="disk")
app.command()(operations.failover)
app.command()(operations.failback)
app.command()(operations.resync)
app.command()(operations.verify)
app.command()(events.events)
