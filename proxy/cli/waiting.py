"""Waiting for a domain to become ready, and showing meanwhile how far it has come."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from proxy.cli.client import Manager
from proxy.cli.objects import DomainObject
from proxy.cli.output import emit, stdout_is_terminal
from proxy.cli.readiness import readiness
from proxy.cli.text import printable
from proxy.errors import RefusedError

#: How often progress is looked at: a copy goes on without the domain changing.
POLL_S = 1.0
#: Where nobody looks on, a line for each tenth of a sync.
PERCENT_STEP = 10

Watch = Callable[[DomainObject], None]


def wait_ready(manager: Manager, name: str, timeout_s: float | None, watch: Watch) -> DomainObject:
    """The domain, once it is online and every backup is uptodate.

    Args:
        timeout_s: when to give up; None for never, as long as waiting can help.
        watch: called with every sight of the domain.

    Raises:
        RefusedError: the time is over; or there is no limit, and no waiting will help.
        StandfastError: the manager's, of ``Manager.get``.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    domain: DomainObject = manager.get("domains", name)
    while True:
        verdict = readiness(domain)
        if verdict.remedy and deadline is None:
            raise RefusedError(
                f"domain {name} will not get ready by itself: {verdict.missing}; do first: {verdict.remedy}"
            )
        watch(domain)
        if verdict.is_ready:
            return domain
        wait_s = POLL_S if deadline is None else min(POLL_S, deadline - time.monotonic())
        if wait_s <= 0:
            raise RefusedError(f"domain {name} is not ready after {timeout_s:g} s: {verdict.missing}")
        domain = manager.get("domains", name, version=domain.get("version"), wait_s=wait_s)


def wait_moved(manager: Manager, name: str, watch: Watch) -> DomainObject:
    """The domain, once no migration of it is under way. Raises StandfastError, of ``Manager.get``."""
    domain: DomainObject = manager.get("domains", name)
    while domain["migration"] is not None:
        watch(domain)
        domain = manager.get("domains", name, version=domain.get("version"), wait_s=POLL_S)
    return domain


@contextmanager
def watcher(*, silent: bool) -> Iterator[Watch]:
    """What shows the progress: bars on a terminal, else a line for each change; or nothing."""
    if silent:
        yield lambda domain: None
    elif stdout_is_terminal():
        with _bars() as watch:
            yield watch
    else:
        yield _lines(emit)


def _lines(write: Callable[[str], None]) -> Watch:
    last = ""

    def watch(domain: DomainObject) -> None:
        nonlocal last
        missing = readiness(domain, percent_step=PERCENT_STEP).missing
        if missing and missing != last:
            write(printable(f"domain {domain['name']}: {missing}"))
        last = missing

    return watch


@contextmanager
def _bars() -> Iterator[Watch]:
    from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        tasks: dict[str, TaskID] = {}
        tell = _lines(lambda line: progress.console.print(line, markup=False, highlight=False))

        def watch(domain: DomainObject) -> None:
            if not any(leg["sync"] for leg in domain["legs"]):
                tell(domain)
            for leg in domain["legs"]:
                group, sync = leg["group"], leg["sync"]
                if sync is not None and group not in tasks:
                    tasks[group] = progress.add_task("", total=sync["total"])
                if group not in tasks:
                    continue
                task = tasks[group]
                progress.update(task, description=f"{group} is {leg['state']}")
                if sync is not None:
                    progress.update(task, completed=sync["copied"])
                elif leg["state"] == "uptodate":
                    progress.update(task, completed=progress.tasks[task].total)

        yield watch
