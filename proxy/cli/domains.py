"""``standfast domain``: logical storage domains."""

import math
from typing import Annotated

import typer

from proxy.cli import render, waiting
from proxy.cli.client import Manager
from proxy.cli.objects import DomainObject
from proxy.cli.options import RUN_DEFAULT, DomainName, Force, Json, Run, Size, branch
from proxy.cli.output import done, show
from proxy.errors import RefusedError
from proxy.sizes import format_size

#: As the manager's: nobody holds clients for a month.
HOLD_MAX_S = 30 * 24 * 3600

Failback = Annotated[
    str,
    typer.Option(
        metavar="manual|immediate|SECONDS",
        help="When to return to the preferred leg after a failure: by order only, as soon as it is uptodate, or "
        "when it has been for so long.",
    ),
]

AcceptLoss = Annotated[
    str,
    typer.Option(
        metavar="manual|immediate|SECONDS",
        help="When to serve from a leg that lacks some of what was written, if none is left that does not: by order "
        "only (failover --accept-loss), at once, or when that has been so for so long.",
    ),
]

NoLeg = Annotated[
    str,
    typer.Option(
        metavar="hold|fail|hold:SECONDS",
        help="What clients get when no leg is left to serve from: they wait, they are told errors at once, or once "
        "they have waited for so long.",
    ),
]

app = branch("Logical storage domains: addresses that stay while the groups behind them change.")


@app.command()
def create(
    name: DomainName,
    size: Size,
    active: Annotated[str, typer.Option(metavar="GROUP", help="The group that serves.")],
    backup: Annotated[
        list[str] | None,
        typer.Option(metavar="GROUP", help="A group that can take over; once for each, the preferred first."),
    ] = None,
    replication: Annotated[
        str, typer.Option(metavar="sync|async", help="Whether writes wait for backups.")
    ] = "sync",
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="Serve on this TCP address too.")] = "",
    failback: Failback = "manual",
    accept_loss: AcceptLoss = "manual",
    no_leg: NoLeg = "hold",
    as_json: Json = False,
    run: Run = RUN_DEFAULT,
) -> None:
    """Make a domain and put it online; its first sync goes on in the background."""
    body = {
        "name": name,
        "size": size,
        "active": active,
        "backups": backup or [],
        "replication": replication,
        "listen": listen,
        "failback": failback,
        "accept_loss": accept_loss,
        "no_leg": no_leg,
    }
    domain: DomainObject = Manager(run).post("domains", body=body)
    text = f"domain {name} created: {format_size(domain['size'])}, {domain['state']}, active is {active}"
    done(domain, text, as_json=as_json)


@app.command("list")
def list_domains(as_json: Json = False, run: Run = RUN_DEFAULT) -> None:
    """List the domains."""
    show(Manager(run).get("domains"), render.domains_table, as_json=as_json)


@app.command("show")
def show_domain(name: DomainName, as_json: Json = False, run: Run = RUN_DEFAULT) -> None:
    """Show a domain: its disks, legs, devices and map."""
    show(Manager(run).get("domains", name), render.domain_page, as_json=as_json)


def _check_hold_timeout(seconds: float | None) -> float | None:
    if seconds is not None and not 0 < seconds <= HOLD_MAX_S:
        raise typer.BadParameter(f"it is a number of seconds above 0, at most {HOLD_MAX_S}")
    return seconds


@app.command()
def hold(
    name: DomainName,
    timeout: Annotated[
        float | None,
        typer.Option(
            metavar="S", callback=_check_hold_timeout, help="Release by itself after so many seconds."
        ),
    ] = None,
    as_json: Json = False,
    run: Run = RUN_DEFAULT,
) -> None:
    """Hold a domain's clients at one point of the order of writes, with all they wrote on the devices, flushed.

    Snapshots of the devices taken until the release are consistent over all disks.
    """
    domain = Manager(run).post("domains", name, "hold", body={"timeout_s": timeout})
    done(
        domain,
        f"domain {name} is held; let clients go on with: standfast domain release {name}",
        as_json=as_json,
    )


@app.command()
def release(name: DomainName, as_json: Json = False, run: Run = RUN_DEFAULT) -> None:
    """Let a domain's clients go on that were held."""
    domain: DomainObject = Manager(run).post("domains", name, "release")
    done(domain, f"domain {name} is released, and {domain['state']}", as_json=as_json)


NoWait = Annotated[bool, typer.Option("--no-wait", help="Return as soon as it has begun.")]
GroupArgument = Annotated[str, typer.Argument(metavar="GROUP", help="The leg's group.")]


@app.command()
def migrate(
    name: DomainName,
    to: Annotated[str, typer.Option(metavar="GROUP", help="The group to move to; of any geometry.")],
    replace: Annotated[
        str | None, typer.Option(metavar="GROUP", help="The leg that leaves in the end; else the active one.")
    ] = None,
    no_wait: NoWait = False,
    as_json: Json = False,
    run: Run = RUN_DEFAULT,
) -> None:
    """Move a domain to another group while clients use it: add a leg, copy, switch, drop the old one.

    It goes on across restarts. To give it up while it copies: domain remove-leg.
    """
    manager = Manager(run)
    domain: DomainObject = manager.post("domains", name, "migrate", body={"to": to, "replace": replace})
    if no_wait:
        done(
            domain,
            f"domain {name} moves to {to}; see how far it is with: standfast domain show {name}",
            as_json=as_json,
        )
        return
    with waiting.watcher(silent=as_json) as watch:
        domain = waiting.wait_moved(manager, name, watch)
    if to not in [leg["group"] for leg in domain["legs"]]:
        raise RefusedError(
            f"domain {name} was not moved to {to}: that was given up; active is {domain['active']}"
        )
    done(domain, f"domain {name} has moved to {to}; active is {domain['active']}", as_json=as_json)


@app.command("add-leg")
def add_leg(name: DomainName, group: GroupArgument, as_json: Json = False, run: Run = RUN_DEFAULT) -> None:
    """Add a backup to a domain, the last in preference; its first sync goes on in the background."""
    domain = Manager(run).post("domains", name, "legs", body={"group": group})
    done(domain, f"domain {name}: {group} is a backup now, and syncing", as_json=as_json)


@app.command("remove-leg")
def remove_leg(
    name: DomainName,
    group: GroupArgument,
    no_wait: NoWait = False,
    as_json: Json = False,
    run: Run = RUN_DEFAULT,
) -> None:
    """Remove a backup from a domain and free its space; a migration to it is given up."""
    manager = Manager(run)
    domain: DomainObject = manager.delete("domains", name, "legs", group)
    if not no_wait:
        with waiting.watcher(silent=as_json) as watch:
            domain = waiting.wait_moved(manager, name, watch)
        if group in [leg["group"] for leg in domain["legs"]]:
            raise RefusedError(f"group {group} is still a leg of domain {name}: it had to take over")
    done(
        domain,
        f"domain {name}: {group} leaves" if no_wait else f"domain {name} has left {group}",
        as_json=as_json,
    )


@app.command("set")
def set_domain(
    name: DomainName,
    failback: Annotated[str | None, Failback.__metadata__[0]] = None,
    accept_loss: Annotated[str | None, AcceptLoss.__metadata__[0]] = None,
    no_leg: Annotated[str | None, NoLeg.__metadata__[0]] = None,
    as_json: Json = False,
    run: Run = RUN_DEFAULT,
) -> None:
    """Change a domain's policies."""
    body = {"failback": failback, "accept_loss": accept_loss, "no_leg": no_leg}
    if not any(body.values()):
        raise RefusedError("name a policy to set: --failback, --accept-loss, --no-leg")
    domain: DomainObject = Manager(run).post("domains", name, "set", body=body)
    policies = f"failback is {domain['failback']}, accept-loss is {domain['accept_loss']}, no-leg is {domain['no_leg']}"
    done(domain, f"domain {name}: {policies} now", as_json=as_json)


@app.command()
def losses(name: DomainName, as_json: Json = False, run: Run = RUN_DEFAULT) -> None:
    """List what was lost, or may be, by the last failover of a domain that a loss was accepted for."""
    show(Manager(run).get("domains", name, "losses"), render.losses_page, as_json=as_json)


@app.command()
def start(name: DomainName, as_json: Json = False, run: Run = RUN_DEFAULT) -> None:
    """Put a domain online."""
    domain: DomainObject = Manager(run).post("domains", name, "start")
    done(domain, f"domain {name} is {domain['state']}", as_json=as_json)


@app.command()
def stop(name: DomainName, force: Force = False, as_json: Json = False, run: Run = RUN_DEFAULT) -> None:
    """Take a domain offline, for maintenance."""
    domain: DomainObject = Manager(run).post("domains", name, "stop", force=force)
    done(domain, f"domain {name} is in maintenance", as_json=as_json)


app.command("activate", help="The same as start.")(start)
app.command("maintenance", help="The same as stop.")(stop)


@app.command()
def remove(name: DomainName, force: Force = False, as_json: Json = False, run: Run = RUN_DEFAULT) -> None:
    """Remove a domain with all its disks, and what is on them."""
    answer = Manager(run).delete("domains", name, force=force)
    done(answer, f"domain {name} removed", as_json=as_json)


def _check_timeout(seconds: float | None) -> float | None:
    if seconds is not None and (math.isnan(seconds) or seconds < 0):
        raise typer.BadParameter("it is a number of seconds, 0 or more")
    return seconds


@app.command()
def wait(
    name: DomainName,
    timeout: Annotated[
        float | None,
        typer.Option(metavar="S", callback=_check_timeout, help="Seconds after which to give up."),
    ] = None,
    as_json: Json = False,
    run: Run = RUN_DEFAULT,
) -> None:
    """Wait until a domain is online and every backup is uptodate."""
    with waiting.watcher(silent=as_json) as watch:
        domain = waiting.wait_ready(Manager(run), name, timeout, watch)
    done(domain, f"domain {name} is online and every backup is uptodate", as_json=as_json)
