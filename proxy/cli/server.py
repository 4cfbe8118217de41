"""``standfast serve``: be the manager."""

import logging
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from proxy.cli.options import RUN_DEFAULT, Run

STATE_DEFAULT = Path("/var/lib/standfast")


class LogLevel(StrEnum):
    """How much is written to stderr."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def serve(
    state: Annotated[
        Path, typer.Option(metavar="DIR", help="Where the manager keeps its store.")
    ] = STATE_DEFAULT,
    run: Run = RUN_DEFAULT,
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="Settings, in TOML.")] = None,
    keep_domains: Annotated[
        bool, typer.Option("--keep-domains", help="When it is ended, leave the domains serving.")
    ] = False,
    log_level: Annotated[
        LogLevel,
        typer.Option(case_sensitive=False, envvar="STANDFAST_LOG", help="How much is written to stderr."),
    ] = LogLevel.INFO,
) -> None:
    """Be the manager, until SIGTERM or ^C."""
    # Only here: no other command needs the manager's libraries, and they take their time to load.
    from proxy.manager.daemon import Places, serve
    from proxy.manager.settings import load_settings

    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # Addresses are made of the run directory, and clients stand elsewhere: they must be absolute.
    serve(Places(state.absolute(), run.absolute()), load_settings(config), keep_domains=keep_domains)
