"""Waiting for a verify to end, and judging what it found."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from proxy.cli.client import Manager
from proxy.cli.objects import DomainObject, LastVerifyObject, VerifyObject
from proxy.cli.output import emit, stdout_is_terminal
from proxy.cli.render import verify_progress
from proxy.cli.waiting import PERCENT_STEP, POLL_S
from proxy.errors import RefusedError
from proxy.sizes import format_size

#: So many looks without a verify and without a result: there will be none. A manager that is being started
#: again needs some to find out.
SILENCE_MAX = 10

Watch = Callable[[VerifyObject], None]


def wait_verified(manager: Manager, before: DomainObject, *, silent: bool) -> LastVerifyObject:
    """What the verify found that was begun after ``before`` was seen; shows meanwhile how far it has come.

    Raises:
        RefusedError: it ended without a result.
        StandfastError: the manager's, of ``Manager.get``.
    """
    name = before["name"]
    silence = 0
    with _watcher(name, silent=silent) as watch:
        domain: DomainObject = manager.get("domains", name)
        while True:
            last = domain["last_verify"]
            if last is not None and last != before["last_verify"]:
                return last
            silence = 0 if domain["verify"] is not None else silence + 1
            if domain["verify"] is not None:
                watch(domain["verify"])
            elif silence > SILENCE_MAX:
                raise RefusedError(
                    f"the verify of domain {name} ended without a result, since its domain server ended; look at: "
                    "standfast events"
                )
            domain = manager.get("domains", name, version=domain.get("version"), wait_s=POLL_S)


def check_verified(name: str, last: LastVerifyObject) -> None:
    """Raise RefusedError unless the legs are known to be equal now."""
    if last["outcome"] != "complete":
        reason = {
            "interrupted": "its legs changed in the middle; verify it again",
            "stopped": "it was stopped",
        }.get(last["outcome"], "look at: standfast events")
        raise RefusedError(f"the verify of domain {name} is not complete: {reason}")
    if last["mismatched"] > last["repaired"]:
        left = format_size(last["mismatched"] - last["repaired"])
        hint = (
            "look at the devices" if last["repair"] else f"repair it with: standfast verify {name} --repair"
        )
        raise RefusedError(f"the backups of domain {name} differ from its active leg in {left}; {hint}")
    if last["unreadable"]:
        raise RefusedError(
            f"the active leg of domain {name} could not read {format_size(last['unreadable'])}, which was left out; "
            "verify it again"
        )


@contextmanager
def _watcher(name: str, *, silent: bool) -> Iterator[Watch]:
    if silent:
        yield lambda verify: None
    elif stdout_is_terminal():
        with _bar(name) as watch:
            yield watch
    else:
        yield _lines(name)


def _lines(name: str) -> Watch:
    last = -1

    def watch(verify: VerifyObject) -> None:
        nonlocal last
        done = verify["compared"] + verify["unreadable"]
        step = 100 * done // verify["total"] // PERCENT_STEP if verify["total"] else 0
        if step != last:
            emit(f"domain {name}: verifying, {verify_progress(verify)}")
        last = step

    return watch


@contextmanager
def _bar(name: str) -> Iterator[Watch]:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task(f"verifying {name}", total=None)

        def watch(verify: VerifyObject) -> None:
            progress.update(task, total=verify["total"], completed=verify["compared"] + verify["unreadable"])

        yield watch
