"""What the manager says: orders to a domain server, and events to people. Pure."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from errno import ECANCELED, ESTALE
from typing import Any

from proxy.extentmap import Run
from proxy.failover import Transition
from proxy.label import label_of
from proxy.manager.maps import device_ranges
from proxy.model import Group, LegState, LostRange, Mismatch, Severity, VerifyOutcome, VerifyReceipt
from proxy.sizes import format_size
from proxy.store import DiskRecord, NewEvent


def device_orders(group: Group, runs: Sequence[Run], generation: int) -> list[dict[str, Any]]:
    """The devices of an ``open-leg`` or ``label`` command, in order, with the labels to be written."""
    return [
        {
            "url": device.url,
            "label": b64encode(label_of(group, device, map_generation=generation).encode()).decode(),
            "ranges": ranges,
        }
        for device, ranges in zip(group.devices, device_ranges(group, runs), strict=True)
    ]


def read_repaired(domain: str, device: str, cause: str, offset: int, length: int) -> NewEvent:
    """A read that a device could not do was answered from a backup; offset and length in bytes of the device."""
    message = (
        f"domain {domain}: {device} could not read at offset {offset} ({cause}); a backup answered, and "
        f"{format_size(length)} were written back"
    )
    return NewEvent(Severity.WARNING, "read-repaired", message, domain)


def verify_receipt(found: Mapping[str, Any], disks: Sequence[DiskRecord], at: float) -> VerifyReceipt:
    """What a VERIFIED event tells, with the names of disks."""
    outcomes = {
        0: VerifyOutcome.COMPLETE,
        ESTALE: VerifyOutcome.INTERRUPTED,
        ECANCELED: VerifyOutcome.STOPPED,
    }
    names = {disk.number: disk.name for disk in disks}
    return VerifyReceipt(
        at=at,
        outcome=outcomes.get(found["error_number"], VerifyOutcome.FAILED),
        seconds=found["seconds"],
        repair=found["repair"],
        total=found["total"],
        compared=found["compared"],
        mismatched=found["mismatched"],
        repaired=found["repaired"],
        unreadable=found["unreadable"],
        unlisted=found["unlisted"],
        mismatches=tuple(
            Mismatch(group, names.get(number, f"number {number}, removed since"), offset, length)
            for group, number, offset, length in found["mismatches"]
        ),
    )


def verified(domain: str, receipt: VerifyReceipt) -> NewEvent:
    """What is told of a verify that has ended."""
    ends = {
        VerifyOutcome.COMPLETE: "is complete",
        VerifyOutcome.INTERRUPTED: "was interrupted, since the legs changed",
        VerifyOutcome.STOPPED: "was stopped",
        VerifyOutcome.FAILED: "failed",
    }
    compared = f"{format_size(receipt.compared)} of {format_size(receipt.total)} compared"
    parts = [f"the verify of domain {domain} {ends[receipt.outcome]}: {compared}"]
    if receipt.mismatched:
        groups = ", ".join(sorted({one.group for one in receipt.mismatches}))
        parts.append(f"{format_size(receipt.mismatched)} differ on {groups}")
        if receipt.repair:
            parts.append(f"{format_size(receipt.repaired)} repaired")
    elif receipt.compared:
        parts.append("no difference")
    if receipt.unreadable:
        parts.append(f"{format_size(receipt.unreadable)} left out, which the active leg could not read")
    severity = Severity.INFO
    if receipt.mismatched > receipt.repaired:
        severity = Severity.ERROR
    elif receipt.mismatched or receipt.unreadable or receipt.outcome is not VerifyOutcome.COMPLETE:
        severity = Severity.WARNING
    return NewEvent(severity, "verified", ", ".join(parts), domain)


def lost(domain: str, transition: Transition, ranges: Sequence[LostRange]) -> list[NewEvent]:
    """What is told of a failover that a loss was accepted for."""
    if not ranges:
        return []
    amount = format_size(sum(one.length for one in ranges))
    disks = ", ".join(sorted({one.disk for one in ranges}))
    message = (
        f"domain {domain}: {transition.after.active} lacked {amount} in {len(ranges)} ranges of {disks}, which are "
        f"older now than what clients were told is written; they are listed by: standfast domain losses {domain}"
    )
    return [NewEvent(Severity.ERROR, "data-lost", message, domain)]


def transition_events(domain: str, transition: Transition) -> list[NewEvent]:
    """What is worth telling of a new record."""
    before, after = transition.before, transition.after
    events = []
    if transition.is_failover:
        events.append(
            NewEvent(
                Severity.INFO if transition.is_planned else Severity.WARNING,
                "failover",
                f"domain {domain} failed over from {before.active} to {after.active}: {transition.reason}",
                domain,
            )
        )
    states = {leg.group: leg.state for leg in before.legs}
    for new in after.legs:
        if states.get(new.group, LegState.OUTDATED) is new.state:
            continue
        if new.state is LegState.OUTDATED and new.group != before.active:
            events.append(
                NewEvent(
                    Severity.WARNING,
                    "leg-dropped",
                    f"domain {domain} goes on without {new.group}: {transition.reason}",
                    domain,
                )
            )
        elif new.state is LegState.SYNCING:
            events.append(
                NewEvent(
                    Severity.INFO, "sync-started", f"domain {domain}: {new.group} is being synced", domain
                )
            )
        elif new.state is LegState.UPTODATE:
            events.append(
                NewEvent(Severity.INFO, "synced", f"domain {domain}: {new.group} is up to date", domain)
            )
    return events
