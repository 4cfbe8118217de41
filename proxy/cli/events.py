"""``standfast events``: what has happened, and what happens now."""

from typing import Annotated

import typer

from proxy.cli import render
from proxy.cli.client import Manager
from proxy.cli.objects import EventObject
from proxy.cli.options import RUN_DEFAULT, Run
from proxy.cli.output import Surface, emit, emit_json_line, lay_out, stdout_surface

#: How long one question waits for something to happen.
POLL_S = 25.0


def events(
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with what happens, until ^C.")
    ] = False,
    after: Annotated[int, typer.Option(metavar="ID", min=0, help="Only events after this one.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print each event as one line of JSON.")] = False,
    run: Run = RUN_DEFAULT,
) -> None:
    """Show what has happened, oldest first."""
    manager = Manager(run)
    waiting = False
    while True:
        found: list[EventObject] = manager.get("events", after=after, wait_s=POLL_S if waiting else None)
        for event in found:
            _write(event, as_json=as_json)
            after = event["id"]
        # Answers are of a limited length: only an empty one says that this was all.
        if not found and not follow:
            return
        waiting = not found


def _write(event: EventObject, *, as_json: bool) -> None:
    if as_json:
        emit_json_line(event)
    else:
        # A line of a log stays one line: where it is too long, the terminal folds it.
        emit(lay_out(render.event_line(event), Surface(color=stdout_surface().color)))
