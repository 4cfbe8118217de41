"""Objects of the manager as tables for people. Pure: what is shown; ``output`` knows how and where."""

from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from proxy.cli.objects import (
    DiskObject,
    DomainObject,
    DomainSummary,
    EventObject,
    ExtentObject,
    FailoverObject,
    GroupObject,
    LagObject,
    LastVerifyObject,
    LegObject,
    LegSummary,
    LossObject,
    MigrationObject,
    PlanObject,
    StatusObject,
    VerifyObject,
)
from proxy.cli.readiness import percent
from proxy.cli.text import count, printable
from proxy.sizes import format_size

#: Of one leg: enough to see its shape. ``--json`` has as many as the manager gives.
EXTENTS_SHOWN = 8

_STYLES = {
    "online": "green",
    "uptodate": "green",
    "syncing": "yellow",
    "degraded": "yellow",
    "held": "yellow",
    "maintenance": "yellow",
    "outdated": "red",
    "failed": "red",
    "warning": "yellow",
    "error": "red",
}

Cell = str | int | Text


# --- Building blocks ------------------------------------------------------------------------------


def _state(state: str) -> Text:
    return Text(state, style=_STYLES.get(state, ""))


def _text(cell: Cell) -> Text:
    return cell if isinstance(cell, Text) else Text(printable(str(cell)))


def _table(columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> Table:
    """Rows under headings. A heading that begins with ``>`` is of numbers, set to the right."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        # An address that is cut short is of no use to anybody: fold it.
        table.add_column(
            column.removeprefix(">"), justify="right" if column[0] == ">" else "left", overflow="fold"
        )
    for row in rows:
        table.add_row(*map(_text, row))
    return table


def _facts(facts: Iterable[tuple[str, Cell]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(f"  {name}", _text(value))
    return table


def _title(*parts: str | Text) -> Text:
    return Text.assemble(*((part, "bold") if isinstance(part, str) else part for part in parts))


def _sections(*sections: RenderableType) -> Group:
    """Sections with an empty line between each two."""
    spaced: list[RenderableType] = []
    for section in sections:
        spaced += [section] if not spaced else [Text(), section]
    return Group(*spaced)


# --- Groups ---------------------------------------------------------------------------------------


def groups_table(groups: Sequence[GroupObject]) -> RenderableType:
    """A line for each group."""
    return _table(
        ["GROUP", "LAYOUT", ">SIZE", ">FREE", ">DEVICES", "DOMAINS"],
        [
            (
                group["name"],
                group["layout"],
                format_size(group["size"]),
                format_size(group["free"]),
                len(group["devices"]),
                ", ".join(group["domains"]) or "-",
            )
            for group in groups
        ],
    )


def group_page(group: GroupObject) -> RenderableType:
    """All there is to say of a group."""
    return _sections(
        Group(
            _title(f"group {group['name']}"),
            _facts(
                [
                    ("uuid", group["uuid"]),
                    ("layout", group["layout"]),
                    ("size", format_size(group["size"])),
                    ("free", format_size(group["free"])),
                    ("domains", ", ".join(group["domains"]) or "none"),
                ]
            ),
        ),
        _table(
            [">DEVICE", ">SIZE", "URL"],
            [(one["position"], format_size(one["size"]), one["url"]) for one in group["devices"]],
        ),
    )


# --- Domains --------------------------------------------------------------------------------------


def domains_table(domains: Sequence[DomainSummary]) -> RenderableType:
    """A line for each domain."""
    return _table(
        ["DOMAIN", "STATE", ">SIZE", "ACTIVE", "BACKUPS", ">DISKS", ">GENERATION"],
        [
            (
                domain["name"],
                _state(domain["state"]),
                format_size(domain["size"]),
                domain["active"],
                _backups(domain["legs"]),
                domain["disks"],
                domain["map_generation"],
            )
            for domain in domains
        ],
    )


def _backups(legs: Iterable[LegSummary]) -> Text:
    backups = [
        Text.assemble(f"{leg['group']}:", _state(leg["state"])) for leg in legs if leg["role"] == "backup"
    ]
    return Text(", ").join(backups) if backups else Text("-")


def domain_page(domain: DomainObject) -> RenderableType:
    """All there is to say of a domain."""
    sections: list[RenderableType] = [
        Group(_title(f"domain {domain['name']}: ", _state(domain["state"])), _facts(_domain_facts(domain)))
    ]
    if domain["disks"]:
        sections.append(disks_table(domain["disks"]))
    sections += [
        _legs_table(domain["legs"]),
        _devices_table(domain["legs"]),
        _table(
            ["EXTENTS", ">OFFSET", ">LENGTH", ">DEVICE", ">DEVICE OFFSET"],
            [row for leg in domain["legs"] for row in _extent_rows(leg)],
        ),
    ]
    return _sections(*sections)


def _domain_facts(domain: DomainObject) -> list[tuple[str, Cell]]:
    facts: list[tuple[str, Cell]] = [
        ("size", format_size(domain["size"])),
        ("active", domain["active"]),
        ("replication", domain["replication"]),
        ("rpo", _rpo(domain["rpo"])),
        ("failback", _failback(domain["failback"])),
        ("accept-loss", _accept_loss(domain["accept_loss"])),
        ("no-leg", domain["no_leg"]),
        ("generation", domain["map_generation"]),
        ("address", domain["address"]),
        ("clients", domain["clients"]),
        ("failover", _failover(domain["last_failover"])),
        ("verify", _verify(domain)),
    ]
    if domain["listen"]:
        facts.insert(8, ("listen", domain["listen"]))
    if (migration := domain["migration"]) is not None:
        facts.insert(0, ("migration", migration_text(migration)))
    if (hold := domain["hold"]) is not None:
        until = f", until {hold['until']} at the latest" if hold["until"] else ""
        facts.insert(0, ("hold", f"by the operator since {hold['at']}{until}"))
    if domain["trouble"]:
        facts.insert(0, ("trouble", domain["trouble"]))
    return facts


def migration_text(migration: MigrationObject) -> str:
    """From where to where a domain moves, and how far it has come."""
    target, sync = migration["to"], migration["sync"]
    what = f"{migration['from']} leaves" if target is None else f"from {migration['from']} to {target}"
    return (
        f"{what}: {migration['step']}"
        + (f", {percent(sync)}%" if sync is not None else "")
        + (f" ({migration['trouble']})" if migration["trouble"] else "")
    )


def _rpo(rpo: LagObject | None) -> str:
    if rpo is None:
        return "no backup"
    if not rpo["bytes"]:
        return "nothing would be lost"
    return f"{_lag(rpo)} would be lost"


def _lag(lag: LagObject | None) -> str:
    if lag is None:
        return "-"
    since = "" if lag["seconds"] is None else f", {lag['seconds']:.1f} s"
    return f"{format_size(lag['bytes'])}{since if lag['bytes'] else ''}"


def _failback(policy: str) -> str:
    return policy if policy in ("manual", "immediate") else f"{policy} s after the preferred leg is uptodate"


def _accept_loss(policy: str) -> str:
    return policy if policy in ("manual", "immediate") else f"{policy} s after no other leg is left"


def _failover(failover: FailoverObject | None) -> str:
    if failover is None:
        return "none yet"
    felt = ""
    if failover["stall_ms"] is not None:
        felt = (
            f", stalled {failover['stall_ms']:.1f} ms, {count(failover['replayed'] or 0, 'request')} replayed"
        )
    if failover["lost_bytes"]:
        felt += f", {format_size(failover['lost_bytes'])} may be lost"
    return f"{failover['at']} from {failover['from']} to {failover['to']}{felt}: {failover['reason']}"


def _verify(domain: DomainObject) -> str:
    verify, last = domain["verify"], domain["last_verify"]
    if verify is not None:
        return f"{verify_progress(verify)}; {_found(verify)}"
    if last is None:
        return "none yet"
    return f"{last['at']} {last['outcome']}, {format_size(last['compared'])} compared, {_found(last)}"


def verify_progress(verify: VerifyObject) -> str:
    """How far a verify has come, on a line."""
    done = verify["compared"] + verify["unreadable"]
    share = 100 * done // verify["total"] if verify["total"] else 100
    pace = f", {format_size(verify['rate'])}/s" if verify["rate"] else ""
    left = f", {verify['seconds_left']:.0f} s left" if verify["seconds_left"] is not None else ""
    return f"{share}% ({format_size(done)} of {format_size(verify['total'])}{pace}{left})"


def _found(verify: VerifyObject | LastVerifyObject) -> str:
    parts = [f"{format_size(verify['mismatched'])} differ" if verify["mismatched"] else "no difference"]
    if verify["mismatched"] and verify["repair"]:
        parts.append(f"{format_size(verify['repaired'])} repaired")
    if verify["unreadable"]:
        parts.append(f"{format_size(verify['unreadable'])} not readable")
    return ", ".join(parts)


def verify_page(last: LastVerifyObject) -> RenderableType:
    """What a verify found."""
    summary = f"{format_size(last['compared'])} of {format_size(last['total'])} compared: {_found(last)}"
    if not last["mismatches"]:
        return Text(summary)
    rows: list[tuple[Cell, ...]] = [
        (one["disk"], one["offset"], one["length"], one["group"]) for one in last["mismatches"]
    ]
    if last["unlisted"]:
        rows.append((f"{format_size(last['unlisted'])} more", "", "", ""))
    return _sections(_table(["DISK", ">OFFSET", ">LENGTH", "DIFFERS ON"], rows), Text(summary))


def losses_page(losses: Sequence[LossObject]) -> RenderableType:
    """The ranges that a failover has lost."""
    rows = [(one["disk"], one["offset"], one["length"]) for one in losses]
    total = format_size(sum(one["length"] for one in losses))
    return _sections(_table(["DISK", ">OFFSET", ">LENGTH"], rows), Text(f"{total} may be lost"))


def _legs_table(legs: Sequence[LegObject]) -> RenderableType:
    return _table(
        ["LEG", "ROLE", "STATE", ">DIRTY", ">LAG", "SYNC", "REASON"],
        [
            (
                leg["group"],
                leg["role"],
                Text.assemble(_state(leg["state"]), ", blocked" if leg["blocked"] else ""),
                format_size(leg["dirty_bytes"]),
                _lag(leg["lag"]),
                _sync(leg),
                leg["reason"] or "-",
            )
            for leg in legs
        ],
    )


def _sync(leg: LegObject) -> str:
    sync = leg["sync"]
    if sync is None:
        return "-"
    pace = f", {format_size(sync['rate'])}/s" if sync["rate"] else ""
    left = f", {sync['seconds_left']:.0f} s left" if sync["seconds_left"] is not None else ""
    return f"{percent(sync)}% ({format_size(sync['copied'])} of {format_size(sync['total'])}{pace}{left})"


def _devices_table(legs: Sequence[LegObject]) -> RenderableType:
    return _table(
        ["DEVICES", ">DEVICE", ">SIZE", ">ERRORS", ">REPAIRED", "URL"],
        [
            (
                leg["group"],
                device["position"],
                format_size(device["size"]),
                "lost" if device.get("lost") else device.get("errors", "-"),
                device.get("read_repairs", "-"),
                device["url"],
            )
            for leg in legs
            for device in leg["devices"]
        ],
    )


def _extent_rows(leg: LegObject) -> list[tuple[Cell, ...]]:
    shown = leg["extents"][:EXTENTS_SHOWN]
    rows: list[tuple[Cell, ...]] = [(leg["group"], *_extent_cells(extent)) for extent in shown]
    hidden = leg["extent_count"] - len(shown)
    return [*rows, (f"{leg['group']}: {hidden} more", "", "", "", "")] if hidden else rows


def _extent_cells(extent: ExtentObject) -> tuple[Cell, ...]:
    return (extent["offset"], extent["length"], extent["device"], extent["device_offset"])


def plan_page(plan: PlanObject) -> RenderableType:
    """What a failover would do to the map."""
    before, after = plan["before"], plan["after"]
    return _sections(
        Text(
            f"domain {plan['domain']} would fail over from {plan['from']} to {plan['to']}: "
            f"{count(before['extent_count'], 'extent')} before, {after['extent_count']} after; nothing was changed"
        ),
        *(
            _table(
                [heading, ">OFFSET", ">LENGTH", ">DEVICE", ">DEVICE OFFSET"],
                _extent_rows(leg),
            )
            for heading, leg in (("BEFORE", before), ("AFTER", after))
        ),
    )


# --- Disks ----------------------------------------------------------------------------------------


def disks_table(disks: Sequence[DiskObject]) -> RenderableType:
    """A line for each disk."""
    return _table(
        ["DISK", ">SIZE", "ADDRESS"],
        [(f"{disk['domain']}/{disk['name']}", format_size(disk["size"]), disk["nbd_uri"]) for disk in disks],
    )


def disk_page(disk: DiskObject) -> RenderableType:
    """All there is to say of a disk."""
    facts: list[tuple[str, Cell]] = [
        ("size", format_size(disk["size"])),
        ("address", disk["nbd_uri"]),
        ("clients", disk["clients"]),
    ]
    if disk["nbd_tcp_uri"]:
        facts.insert(2, ("over TCP", disk["nbd_tcp_uri"]))
    if path := disk.get("path"):
        facts.insert(2, ("path", path))
    return Group(_title(f"disk {disk['domain']}/{disk['name']}"), _facts(facts))


# --- The manager ----------------------------------------------------------------------------------


def status_page(status: StatusObject) -> RenderableType:
    """The manager, and a line for each domain."""
    first = Text(f"manager ready, pid {status['pid']}, run directory {printable(status['run'])}")
    if not status["domains"]:
        return Group(first, Text("no domains yet"))
    return _sections(first, domains_table(status["domains"]))


def event_line(event: EventObject) -> RenderableType:
    """One event, as a line of a log."""
    return Text.assemble(
        f"{event['id']:>6}  {event['at']}  ",
        Text(f"{event['severity']:<7}", style=_STYLES.get(event["severity"], "")),
        f"  {event['domain'] or '-':<12}  {printable(event['message'])}",
    )
