"""What operators are shown: records and running state as JSON objects. The contract of ``--json``."""

from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from proxy.allocator import free_size
from proxy.failover import LegRecord
from proxy.manager.maps import copy_ranges, domain_map
from proxy.manager.service import Service
from proxy.migration import next_step
from proxy.model import (
    DomainState,
    Event,
    FailoverReceipt,
    Group,
    LegState,
    OperatorHold,
    Replication,
    Role,
    VerifyReceipt,
    format_patience,
)
from proxy.store import DiskRecord, DomainRecord

#: Of one map in one answer: enough to see its shape; a striped map has a million.
EXTENTS_SHOWN = 64


def instant(at: float) -> str:
    """A time for people and programs, UTC, to the millisecond."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")


def group_view(service: Service, group: Group) -> dict[str, Any]:
    """A group with its devices and its users."""
    taken = service.store.taken(group.name)
    users = [one.domain.name for one in service.store.domains() if group.name in one.runs]
    return {
        "name": group.name,
        "uuid": str(group.uuid),
        "layout": str(group.layout),
        "size": sum(device.size - device.data_offset for device in group.devices),
        "free": free_size(group, taken),
        "domains": users,
        "devices": [
            {
                "position": device.position,
                "uuid": str(device.uuid),
                "url": device.url,
                "size": device.size,
                "data_offset": device.data_offset,
            }
            for device in group.devices
        ],
    }


def domain_state(service: Service, domain: DomainRecord) -> DomainState:
    """The state of a domain as a whole."""
    supervisor = service.supervisors.get(domain.domain.name)
    return DomainState.MAINTENANCE if supervisor is None else supervisor.state()


def domain_summary(service: Service, domain: DomainRecord) -> dict[str, Any]:
    """A line of the list of domains; asks nobody."""
    return {
        "name": domain.domain.name,
        "state": domain_state(service, domain),
        "size": domain.domain.size,
        "map_generation": domain.record.generation,
        "active": domain.record.active,
        "legs": [
            {"group": leg.group, "role": _role(domain, leg), "state": leg.state, "blocked": leg.blocked}
            for leg in domain.record.legs
        ],
        "disks": sum(disk.ready for disk in domain.disks),
    }


async def domain_view(service: Service, domain: DomainRecord) -> dict[str, Any]:
    """Everything about a domain."""
    name = domain.domain.name
    supervisor = service.supervisors.get(name)
    status = await supervisor.status() if supervisor is not None else None
    groups = {group.name: group for group in service.store.groups()}
    legs = [_leg_view(service, domain, leg, groups[leg.group], status) for leg in domain.record.legs]
    return {
        **domain_summary(service, domain),
        "uuid": str(domain.domain.uuid),
        "replication": domain.domain.replication,
        "failback": str(domain.domain.failback),
        "accept_loss": str(domain.domain.accept_loss),
        "no_leg": format_patience(domain.domain.no_leg),
        "hold": _hold_view(domain.hold),
        "address": str(service.run_directory / name / "nbd.sock"),
        "listen": domain.domain.listen or None,
        "trouble": supervisor.trouble() if supervisor is not None else "",
        "legs": legs,
        "rpo": _rpo_view(legs),
        "migration": _migration_view(
            domain, legs, supervisor.migration_trouble() if supervisor is not None else ""
        ),
        "clients": len(status["clients"]) if status else 0,
        "disks": [
            disk_view(service.run_directory, domain, disk, status) for disk in domain.disks if disk.ready
        ],
        "statistics": status["statistics"] if status else None,
        # What a crash of ours would have each backup be copied.
        "marked_bytes": status["marked_bytes"] if status else None,
        "last_failover": _receipt_view(domain.last_failover),
        "verify": _verify_view(status["verify"]) if status and status["verify"] else None,
        "last_verify": _verify_receipt_view(domain.last_verify),
    }


def _role(domain: DomainRecord, leg: LegRecord) -> Role:
    return Role.ACTIVE if leg.group == domain.record.active else Role.BACKUP


def _leg_view(
    service: Service, domain: DomainRecord, leg: LegRecord, group: Group, status: dict[str, Any] | None
) -> dict[str, Any]:
    supervisor = service.supervisors.get(domain.domain.name)
    numbers = supervisor.leg_numbers() if supervisor is not None else {}
    lost = supervisor.lost() if supervisor is not None else {}
    served = status["legs"].get(str(numbers.get(leg.group))) if status else None
    extents = domain_map(domain, group)
    dirty_bytes = _dirty_bytes(domain, leg, group, status)
    copy = served["copy"] if served else None
    state = LegState.FAILED if leg.group in lost and leg.state is not LegState.OUTDATED else leg.state
    return {
        "group": leg.group,
        "role": _role(domain, leg),
        "state": state,
        "blocked": leg.blocked,
        "reason": lost.get(leg.group),
        "dirty_bytes": dirty_bytes,
        "lag": None
        if leg.group == domain.record.active
        else _lag_view(service, domain, leg, group, status, dirty_bytes),
        "sync": _sync_view(copy, dirty_bytes) if leg.state is LegState.SYNCING else None,
        "devices": [
            {
                "position": device.position,
                "url": device.url,
                "size": device.size,
                **(served["devices"][device.position] if served else {}),
            }
            for device in group.devices
        ],
        "extent_count": len(extents),
        "extents": [
            {
                "offset": extent.offset,
                "length": extent.length,
                "device": extent.device,
                "device_offset": extent.device_offset,
            }
            for extent, _ in zip(extents, range(EXTENTS_SHOWN), strict=False)
        ],
    }


def _dirty_bytes(domain: DomainRecord, leg: LegRecord, group: Group, status: dict[str, Any] | None) -> int:
    """What a leg lacks. Only the domain server knows; without one it is all that is allotted, at most."""
    if leg.state is LegState.UPTODATE:
        return 0
    allotted = sum(length for _, _, length in copy_ranges(domain.disks))
    known: int = status["dirty_bytes"].get(str(group.uuid), allotted) if status else allotted
    return known


def _lag_view(
    service: Service,
    domain: DomainRecord,
    leg: LegRecord,
    group: Group,
    status: dict[str, Any] | None,
    dirty_bytes: int,
) -> dict[str, Any]:
    """What would be lost if a backup had to take over as it is: bytes at most, and seconds; None: nobody knows."""
    if leg.state is not LegState.UPTODATE:
        since = status["outdated_s"].get(str(group.uuid)) if status else None
        return {"bytes": dirty_bytes, "seconds": since}
    if domain.domain.replication is Replication.SYNC or not domain.session_open:
        return {"bytes": 0, "seconds": 0.0}
    supervisor = service.supervisors.get(domain.domain.name)
    if status is not None and supervisor is not None and leg.group not in supervisor.lacking():
        served = status["legs"].get(str(supervisor.leg_numbers().get(leg.group)))
        if served is not None:
            backlog: dict[str, Any] = served["backlog"]
            return backlog
    allotted = sum(length for _, _, length in copy_ranges(domain.disks))
    doubtful = status["doubtful_bytes"] if status else {}
    return {"bytes": doubtful.get(str(group.uuid), allotted), "seconds": None}


def _rpo_view(legs: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The lag of the backup that lags least; None: there is no backup."""
    lags: list[dict[str, Any]] = [leg["lag"] for leg in legs if leg["lag"] is not None]
    return min(lags, key=lambda lag: lag["bytes"], default=None)


def _sync_view(copy: dict[str, Any] | None, dirty_bytes: int) -> dict[str, Any]:
    """A copy that goes on, with its rate in bytes a second and the time it will take; or one that is to begin."""
    if copy is None:
        return {"copied": 0, "total": dirty_bytes, "rate": None, "seconds_left": None}
    rate = copy["copied"] / copy["seconds"] if copy["seconds"] else 0
    return {
        "copied": copy["copied"],
        "total": copy["total"],
        "rate": int(rate),
        "seconds_left": round((copy["total"] - copy["copied"]) / rate, 1) if rate else None,
    }


def _migration_view(domain: DomainRecord, legs: list[dict[str, Any]], trouble: str) -> dict[str, Any] | None:
    migration = domain.migration
    if migration is None:
        return None
    return {
        "at": instant(migration.at),
        "from": migration.source,
        "to": migration.target,
        "step": next_step(domain.record, migration),
        "sync": next((leg["sync"] for leg in legs if leg["group"] == migration.target), None),
        "trouble": trouble,
    }


def _hold_view(hold: OperatorHold | None) -> dict[str, Any] | None:
    if hold is None:
        return None
    return {"at": instant(hold.at), "until": None if hold.until is None else instant(hold.until)}


def _receipt_view(receipt: FailoverReceipt | None) -> dict[str, Any] | None:
    if receipt is None:
        return None
    return {
        "at": instant(receipt.at),
        "reason": receipt.reason,
        "planned": receipt.planned,
        "stall_ms": receipt.stall_ms,
        "from": receipt.source,
        "to": receipt.target,
        "replayed": receipt.replayed,
        "generation": receipt.generation,
        "lost_bytes": receipt.lost_bytes,
    }


def _verify_view(status: dict[str, Any]) -> dict[str, Any]:
    done = status["compared"] + status["unreadable"]
    rate = done / status["seconds"] if done and status["seconds"] else None
    if rate and status["limit"]:
        rate = min(rate, status["limit"])  # the first pieces are over before their time is
    return {
        **{
            key: status[key]
            for key in ("repair", "total", "compared", "mismatched", "repaired", "unreadable", "seconds")
        },
        "rate": None if rate is None else int(rate),
        "seconds_left": None if rate is None else (status["total"] - done) / rate,
    }


def _verify_receipt_view(receipt: VerifyReceipt | None) -> dict[str, Any] | None:
    return None if receipt is None else {**asdict(receipt), "at": instant(receipt.at)}


def disk_view(
    run: Path, domain: DomainRecord, disk: DiskRecord, status: dict[str, Any] | None
) -> dict[str, Any]:
    """A disk and the addresses it is reached at."""
    socket = run / domain.domain.name / "nbd.sock"
    listen = domain.domain.listen
    return {
        "domain": domain.domain.name,
        "name": disk.name,
        "size": disk.size,
        "clients": status["clients"].count(disk.name) if status else 0,
        "nbd_uri": f"nbd+unix:///{quote(disk.name)}?socket={quote(str(socket))}",
        "nbd_tcp_uri": f"nbd://{listen}/{quote(disk.name)}" if listen else None,
    }


def event_view(event: Event) -> dict[str, Any]:
    """An event."""
    return {
        "id": event.id,
        "at": instant(event.at),
        "severity": event.severity,
        "domain": event.domain or None,
        "kind": event.kind,
        "message": event.message,
    }
