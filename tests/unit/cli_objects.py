"""Answers of a manager, for the command line's tests: small, whole, and changed by keyword."""

from typing import Any

from proxy.cli.objects import (
    DiskObject,
    DomainObject,
    EventObject,
    ExtentObject,
    GroupObject,
    LegObject,
    SyncObject,
)


def leg(group: str, role: str, state: str = "uptodate", **changes: Any) -> LegObject:
    """A leg of one device and one extent."""
    extents: list[ExtentObject] = [{"offset": 0, "length": 1 << 20, "device": 0, "device_offset": 65536}]
    made: dict[str, Any] = {
        "group": group,
        "role": role,
        "state": state,
        "blocked": False,
        "reason": None,
        "dirty_bytes": 0,
        "lag": None if role == "active" else {"bytes": 0, "seconds": 0.0},
        "sync": None,
        "devices": [{"position": 0, "url": f"file:///images/{group}1?size=2M", "size": 2 << 20, "errors": 0}],
        "extent_count": 1,
        "extents": extents,
        **changes,
    }
    return made  # type: ignore[return-value]


def disk(name: str = "disk1", **changes: Any) -> DiskObject:
    """A disk of vol1."""
    made: dict[str, Any] = {
        "domain": "vol1",
        "name": name,
        "size": 1 << 20,
        "clients": 0,
        "nbd_uri": f"nbd+unix:///{name}?socket=/run/standfast/vol1/nbd.sock",
        "nbd_tcp_uri": None,
        **changes,
    }
    return made  # type: ignore[return-value]


def domain(*legs: LegObject, **changes: Any) -> DomainObject:
    """Domain vol1, active on alpha; with an uptodate backup on beta unless told otherwise."""
    made: dict[str, Any] = {
        "name": "vol1",
        "uuid": "8e1f31bc-0000-4000-8000-000000000001",
        "state": "online",
        "size": 1 << 20,
        "map_generation": 5,
        "active": "alpha",
        "replication": "sync",
        "failback": "manual",
        "accept_loss": "manual",
        "no_leg": "hold",
        "hold": None,
        "migration": None,
        "address": "/run/standfast/vol1/nbd.sock",
        "listen": None,
        "trouble": "",
        "legs": list(legs) or [leg("alpha", "active"), leg("beta", "backup")],
        "rpo": {"bytes": 0, "seconds": 0.0},
        "clients": 0,
        "disks": [],
        "statistics": None,
        "marked_bytes": None,
        "last_failover": None,
        "verify": None,
        "last_verify": None,
        "version": 7,
        **changes,
    }
    return made  # type: ignore[return-value]


def group(name: str = "alpha", **changes: Any) -> GroupObject:
    """A group of one device."""
    made: dict[str, Any] = {
        "name": name,
        "uuid": "8e1f31bc-0000-4000-8000-000000000002",
        "layout": "linear",
        "size": 2 << 20,
        "free": 1 << 20,
        "domains": ["vol1"],
        "devices": [{"position": 0, "url": f"file:///images/{name}1?size=2M", "size": 2 << 20}],
        **changes,
    }
    return made  # type: ignore[return-value]


def event(number: int, message: str = "something happened", **changes: Any) -> EventObject:
    """An event of vol1."""
    made: dict[str, Any] = {
        "id": number,
        "at": "2026-01-02T03:04:05.678+00:00",
        "severity": "info",
        "domain": "vol1",
        "kind": "test",
        "message": message,
        **changes,
    }
    return made  # type: ignore[return-value]


def sync_of(
    copied: int, total: int, rate: int | None = None, seconds_left: float | None = None
) -> SyncObject:
    """How far a copy has come."""
    return {"copied": copied, "total": total, "rate": rate, "seconds_left": seconds_left}
