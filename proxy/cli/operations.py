"""``standfast failover``, ``failback``, ``resync``, ``verify``: what is done with a domain's legs."""

from typing import Annotated

import typer

from proxy.cli import render
from proxy.cli.client import Manager
from proxy.cli.objects import DomainObject
from proxy.cli.options import RUN_DEFAULT, Json, Run
from proxy.cli.output import done, show
from proxy.cli.plan import plan_failover
from proxy.cli.verifying import check_verified, wait_verified
from proxy.errors import RefusedError
from proxy.sizes import format_size

Domain = Annotated[str, typer.Argument(metavar="DOMAIN", help="The domain's name.")]


def failover(
    name: Domain,
    to: Annotated[
        str | None, typer.Option(metavar="GROUP", help="The leg to go to; else the preferred one that can.")
    ] = None,
    accept_loss: Annotated[
        bool,
        typer.Option(
            "--accept-loss",
            help="Serve from a leg that lacks some of what was written, since none is left that does not.",
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")
    ] = False,
    as_json: Json = False,
    run: Run = RUN_DEFAULT,
) -> None:
    """Make another leg of a domain the active one; clients notice nothing but a short wait."""
    manager = Manager(run)
    if dry_run and accept_loss:
        raise RefusedError(
            "what would be lost is known only when it is: --dry-run goes with no --accept-loss"
        )
    if dry_run:
        show(plan_failover(manager.get("domains", name), to), render.plan_page, as_json=as_json)
        return
    _say_active(
        manager.post("domains", name, "failover", body={"to": to, "accept_loss": accept_loss}),
        as_json=as_json,
    )


def failback(name: Domain, as_json: Json = False, run: Run = RUN_DEFAULT) -> None:
    """Return a domain to its preferred leg, which is uptodate; clients notice nothing but a short wait."""
    _say_active(Manager(run).post("domains", name, "failback"), as_json=as_json)


def _say_active(domain: DomainObject, *, as_json: bool) -> None:
    last = domain["last_failover"]
    stall = f"; clients waited {last['stall_ms']:.1f} ms" if last and last["stall_ms"] is not None else ""
    lost = f"; {format_size(last['lost_bytes'])} may be lost" if last and last["lost_bytes"] else ""
    done(domain, f"domain {domain['name']}: active is {domain['active']} now{stall}{lost}", as_json=as_json)


def resync(
    name: Domain,
    group: Annotated[
        str | None, typer.Option(metavar="GROUP", help="Only this leg; else all outdated ones.")
    ] = None,
    rate: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="The most that copies of this domain may take a second, from now on; 0: all the devices give.",
        ),
    ] = None,
    as_json: Json = False,
    run: Run = RUN_DEFAULT,
) -> None:
    """Bring outdated legs of a domain back, by what they lack; returns when the copy has begun."""
    answer = Manager(run).post("domains", name, "resync", body={"group": group, "rate": rate})
    text = f"domain {name}: syncing {', '.join(answer['groups'])}"
    done(answer, text, as_json=as_json)


def verify(
    name: Domain,
    rate: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE/s", help="How much of the active leg to compare a second; else what clients leave."
        ),
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Write what differs from the active leg to the backup.")
    ] = False,
    stop: Annotated[bool, typer.Option("--stop", help="End the verify that is under way.")] = False,
    as_json: Json = False,
    run: Run = RUN_DEFAULT,
) -> None:
    """Compare the backups of a domain with its active leg, byte by byte, while clients go on."""
    manager = Manager(run)
    if stop:
        answer: DomainObject = manager.post("domains", name, "verify", "stop")
        done(answer, f"domain {name}: the verify is being stopped", as_json=as_json)
        return
    before: DomainObject = manager.get("domains", name)
    manager.post("domains", name, "verify", body={"rate": rate, "repair": repair})
    last = wait_verified(manager, before, silent=as_json)
    show(last, render.verify_page, as_json=as_json)
    check_verified(name, last)
