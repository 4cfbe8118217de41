"""The store on SQLite: one file, write-ahead log, every commit synced to the disk.

Domain details (``domains``, ``disks``) and connection details (``attachments``, ``legs``) are separate
tables: a failover writes to the second pair only.
"""

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

from proxy.errors import NotFoundError, RefusedError, StoreError
from proxy.extentmap import Range, Run
from proxy.failover import LegRecord, Record
from proxy.migration import Migration
from proxy.model import (
    MANUAL,
    Delay,
    Desired,
    Device,
    DeviceId,
    Domain,
    DomainId,
    Event,
    FailoverReceipt,
    Group,
    GroupId,
    Layout,
    LayoutKind,
    LegState,
    LostRange,
    Mismatch,
    OperatorHold,
    Replication,
    Severity,
    VerifyOutcome,
    VerifyReceipt,
)
from proxy.store import Change, DiskRecord, DomainRecord, NewDevice, NewEvent

#: One script for each version of the schema, applied in order to a store that is behind.
_MIGRATIONS = (
    """
    CREATE TABLE groups (
        id INTEGER PRIMARY KEY,
        uuid TEXT NOT NULL UNIQUE,
        name TEXT NOT NULL UNIQUE,
        layout TEXT NOT NULL,
        chunk INTEGER NOT NULL,
        created_at REAL NOT NULL
    ) STRICT;
    CREATE TABLE devices (
        id INTEGER PRIMARY KEY,
        group_id INTEGER NOT NULL REFERENCES groups (id) ON DELETE CASCADE,
        position INTEGER NOT NULL,
        uuid TEXT NOT NULL UNIQUE,
        size INTEGER NOT NULL,
        data_offset INTEGER NOT NULL,
        UNIQUE (group_id, position)
    ) STRICT;
    CREATE TABLE connections (
        id INTEGER PRIMARY KEY,
        device_id INTEGER NOT NULL REFERENCES devices (id) ON DELETE CASCADE,
        url TEXT NOT NULL
    ) STRICT;
    CREATE TABLE domains (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        uuid TEXT NOT NULL UNIQUE,
        name TEXT NOT NULL UNIQUE,
        size INTEGER NOT NULL,
        replication TEXT NOT NULL,
        listen TEXT NOT NULL,
        next_disk INTEGER NOT NULL,
        created_at REAL NOT NULL
    ) STRICT;
    CREATE TABLE disks (
        domain_id INTEGER NOT NULL REFERENCES domains (id) ON DELETE CASCADE,
        number INTEGER NOT NULL,
        name TEXT NOT NULL,
        size INTEGER NOT NULL,
        ready INTEGER NOT NULL,
        PRIMARY KEY (domain_id, number),
        UNIQUE (domain_id, name)
    ) STRICT;
    CREATE TABLE disk_ranges (
        domain_id INTEGER NOT NULL,
        number INTEGER NOT NULL,
        sequence INTEGER NOT NULL,
        offset INTEGER NOT NULL,
        length INTEGER NOT NULL,
        PRIMARY KEY (domain_id, number, sequence),
        FOREIGN KEY (domain_id, number) REFERENCES disks (domain_id, number) ON DELETE CASCADE
    ) STRICT;
    CREATE TABLE attachments (
        domain_id INTEGER PRIMARY KEY REFERENCES domains (id) ON DELETE CASCADE,
        generation INTEGER NOT NULL,
        active_group_id INTEGER NOT NULL REFERENCES groups (id),
        desired TEXT NOT NULL,
        session_open INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE legs (
        domain_id INTEGER NOT NULL REFERENCES domains (id) ON DELETE CASCADE,
        group_id INTEGER NOT NULL REFERENCES groups (id),
        preference INTEGER NOT NULL,
        state TEXT NOT NULL,
        blocked INTEGER NOT NULL,
        PRIMARY KEY (domain_id, group_id)
    ) STRICT;
    CREATE TABLE runs (
        domain_id INTEGER NOT NULL,
        group_id INTEGER NOT NULL,
        sequence INTEGER NOT NULL,
        position INTEGER NOT NULL,
        device_offset INTEGER NOT NULL,
        length INTEGER NOT NULL,
        PRIMARY KEY (domain_id, group_id, sequence),
        FOREIGN KEY (domain_id, group_id) REFERENCES legs (domain_id, group_id) ON DELETE CASCADE
    ) STRICT;
    CREATE TABLE failovers (
        domain_id INTEGER NOT NULL REFERENCES domains (id) ON DELETE CASCADE,
        generation INTEGER NOT NULL,
        at REAL NOT NULL,
        reason TEXT NOT NULL,
        source TEXT NOT NULL,
        target TEXT NOT NULL,
        stall_ms REAL,
        replayed INTEGER,
        PRIMARY KEY (domain_id, generation)
    ) STRICT;
    CREATE TABLE events (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        at REAL NOT NULL,
        severity TEXT NOT NULL,
        domain TEXT NOT NULL,
        kind TEXT NOT NULL,
        message TEXT NOT NULL
    ) STRICT;
    """,
    """
    ALTER TABLE attachments ADD COLUMN session INTEGER NOT NULL DEFAULT 0;
    -- Of the labels of its devices: the newest that may be there, and the newest that certainly was.
    ALTER TABLE groups ADD COLUMN generation INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE groups ADD COLUMN labelled INTEGER NOT NULL DEFAULT 0;
    """,
    """
    CREATE TABLE verifies (
        domain_id INTEGER PRIMARY KEY REFERENCES domains (id) ON DELETE CASCADE,
        at REAL NOT NULL,
        outcome TEXT NOT NULL,
        seconds REAL NOT NULL,
        repair INTEGER NOT NULL,
        total INTEGER NOT NULL,
        compared INTEGER NOT NULL,
        mismatched INTEGER NOT NULL,
        repaired INTEGER NOT NULL,
        unreadable INTEGER NOT NULL,
        unlisted INTEGER NOT NULL,
        mismatches TEXT NOT NULL
    ) STRICT;
    """,
    """
    ALTER TABLE domains ADD COLUMN failback_after_s REAL;
    ALTER TABLE failovers ADD COLUMN planned INTEGER NOT NULL DEFAULT 0;
    CREATE TABLE holds (
        domain_id INTEGER PRIMARY KEY REFERENCES domains (id) ON DELETE CASCADE,
        at REAL NOT NULL,
        until REAL
    ) STRICT;
    CREATE TABLE migrations (
        domain_id INTEGER PRIMARY KEY REFERENCES domains (id) ON DELETE CASCADE,
        source_group_id INTEGER NOT NULL REFERENCES groups (id),
        target_group_id INTEGER REFERENCES groups (id),
        at REAL NOT NULL
    ) STRICT;
    """,
    """
    ALTER TABLE domains ADD COLUMN accept_loss_after_s REAL;
    ALTER TABLE failovers ADD COLUMN lost_bytes INTEGER NOT NULL DEFAULT 0;
    CREATE TABLE losses (
        domain_id INTEGER NOT NULL,
        generation INTEGER NOT NULL,
        sequence INTEGER NOT NULL,
        disk TEXT NOT NULL,
        offset INTEGER NOT NULL,
        length INTEGER NOT NULL,
        PRIMARY KEY (domain_id, generation, sequence),
        FOREIGN KEY (domain_id, generation) REFERENCES failovers (domain_id, generation) ON DELETE CASCADE
    ) STRICT;
    """,
    """
    ALTER TABLE domains ADD COLUMN fail_after_s REAL;
    """,
)

SCHEMA_VERSION = len(_MIGRATIONS)

#: Of events kept: enough to look back over months of operation, small enough never to matter.
EVENTS_KEPT = 100_000


class SqliteStore:
    """See ``proxy.store.Store``. One instance a process; the manager's lock keeps other processes out.

    Args:
        path: of the database; made when absent, brought up to this version's schema when older.

    Raises:
        StoreError: it is of a newer version, is no such database, or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._errors():
            self._db = sqlite3.connect(path, isolation_level=None)
            self._check_version()
            self._db.execute("PRAGMA foreign_keys = ON")
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._migrate()

    def _version(self) -> int:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        return int(version)

    def _check_version(self) -> None:
        """Refuse a store of a newer version before anything of it is touched."""
        version = self._version()
        if version > SCHEMA_VERSION:
            self._db.close()
            raise StoreError(
                f"the store {self._path} was written by a newer Standfast (schema {version}, this one knows "
                f"{SCHEMA_VERSION}); install that version again, or use another --state directory"
            )

    def _migrate(self) -> None:
        for number in range(self._version(), SCHEMA_VERSION):
            # executescript() would commit by itself, half-way: the script is one transaction of its own.
            self._db.executescript(
                f"BEGIN; {_MIGRATIONS[number]} PRAGMA user_version = {number + 1}; COMMIT;"
            )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StoreError(f"the store {self._path} cannot be used: {error}") from error

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """One transaction, rolled back whole when anything in it raises."""
        with self._errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def close(self) -> None:
        with self._errors():
            self._db.close()

    # --- Groups -----------------------------------------------------------------------------------

    def groups(self) -> list[Group]:
        devices: dict[int, list[Device]] = {}
        with self._errors():
            for row in self._db.execute(
                "SELECT group_id, d.id, uuid, position, size, data_offset, url FROM devices d"
                " JOIN connections c ON c.device_id = d.id ORDER BY group_id, position"
            ):
                group_id, device_id, uuid, position, size, data_offset, url = row
                devices.setdefault(group_id, []).append(
                    Device(DeviceId(device_id), UUID(uuid), position, size, data_offset, url)
                )
            return [
                Group(
                    GroupId(group_id),
                    UUID(uuid),
                    name,
                    Layout(LayoutKind(layout), chunk),
                    tuple(devices[group_id]),
                )
                for group_id, uuid, name, layout, chunk in self._db.execute(
                    "SELECT id, uuid, name, layout, chunk FROM groups ORDER BY name"
                )
            ]

    def group(self, name: str) -> Group:
        for group in self.groups():
            if group.name == name:
                return group
        raise NotFoundError(f"there is no group {name}")

    def add_group(
        self, name: str, uuid: UUID, layout: Layout, devices: Sequence[NewDevice], at: float
    ) -> Group:
        with self._transaction() as db:
            if db.execute("SELECT 1 FROM groups WHERE name = ?", (name,)).fetchone():
                raise RefusedError(f"there is a group {name} already")
            group_id = db.execute(
                "INSERT INTO groups (uuid, name, layout, chunk, created_at) VALUES (?, ?, ?, ?, ?)",
                (str(uuid), name, layout.kind, layout.chunk, at),
            ).lastrowid
            for position, device in enumerate(devices):
                device_id = db.execute(
                    "INSERT INTO devices (group_id, position, uuid, size, data_offset) VALUES (?, ?, ?, ?, ?)",
                    (group_id, position, str(device.uuid), device.size, device.data_offset),
                ).lastrowid
                db.execute("INSERT INTO connections (device_id, url) VALUES (?, ?)", (device_id, device.url))
            self._insert_events(
                [
                    NewEvent(
                        Severity.INFO,
                        "group-created",
                        f"group {name} was made of {len(devices)} device{'s' * (len(devices) > 1)}",
                    )
                ],
                at,
            )
        return self.group(name)

    def label_generations(self, group: GroupId) -> tuple[int, int]:
        with self._errors():
            labelled, generation = self._db.execute(
                "SELECT labelled, generation FROM groups WHERE id = ?", (group,)
            ).fetchone()
            return int(labelled), int(generation)

    def set_label_generations(self, group: GroupId, labelled: int, generation: int) -> None:
        with self._transaction() as db:
            db.execute(
                "UPDATE groups SET labelled = ?, generation = ? WHERE id = ?", (labelled, generation, group)
            )

    def remove_group(self, name: str, at: float) -> None:
        group = self.group(name)
        with self._transaction() as db:
            users = db.execute(
                "SELECT name FROM domains JOIN legs ON domain_id = id WHERE group_id = ? ORDER BY name",
                (group.id,),
            ).fetchall()
            if users:
                raise RefusedError(f"group {name} is used by domain {', '.join(user for (user,) in users)}")
            db.execute("DELETE FROM groups WHERE id = ?", (group.id,))
            self._insert_events([NewEvent(Severity.INFO, "group-removed", f"group {name} was removed")], at)

    def taken(self, group: str) -> list[Run]:
        with self._errors():
            return [
                Run(*row)
                for row in self._db.execute(
                    "SELECT position, device_offset, length FROM runs JOIN groups ON group_id = id WHERE name = ?",
                    (group,),
                )
            ]

    # --- Domains ----------------------------------------------------------------------------------

    def domains(self) -> list[DomainRecord]:
        return self._domains("", ())

    def domain(self, name: str) -> DomainRecord:
        found = self._domains("WHERE d.name = ?", (name,))
        if not found:
            raise NotFoundError(f"there is no domain {name}")
        return found[0]

    def _domains(self, where: str, values: tuple[str, ...]) -> list[DomainRecord]:
        with self._errors():
            rows = self._db.execute(
                "SELECT d.id, d.uuid, d.name, d.size, d.replication, d.listen, d.failback_after_s,"
                " d.accept_loss_after_s, d.fail_after_s,"
                " a.desired, a.session_open, a.session, a.generation, g.name"
                " FROM domains d JOIN attachments a ON a.domain_id = d.id"
                f" JOIN groups g ON g.id = a.active_group_id {where} ORDER BY d.name",
                values,
            ).fetchall()
            legs: dict[int, list[LegRecord]] = {}
            runs: dict[int, dict[str, list[Run]]] = {}
            ranges: dict[tuple[int, int], list[Range]] = {}
            disks: dict[int, list[DiskRecord]] = {}
            failovers: dict[int, FailoverReceipt] = {}
            holds: dict[int, OperatorHold] = {}
            migrations: dict[int, Migration] = {}
            only = f"WHERE l.domain_id = {rows[0][0]}" if where and rows else ""
            for domain_id, group, state, blocked in self._db.execute(
                "SELECT l.domain_id, g.name, l.state, l.blocked FROM legs l JOIN groups g ON g.id = l.group_id"
                f" {only} ORDER BY l.domain_id, l.preference"
            ):
                legs.setdefault(domain_id, []).append(LegRecord(group, LegState(state), bool(blocked)))
            for domain_id, group, position, offset, length in self._db.execute(
                "SELECT l.domain_id, g.name, l.position, l.device_offset, l.length FROM runs l"
                f" JOIN groups g ON g.id = l.group_id {only} ORDER BY l.domain_id, l.group_id, l.sequence"
            ):
                runs.setdefault(domain_id, {}).setdefault(group, []).append(Run(position, offset, length))
            for domain_id, number, offset, length in self._db.execute(
                "SELECT l.domain_id, l.number, l.offset, l.length FROM disk_ranges l"
                f" {only} ORDER BY l.domain_id, l.number, l.sequence"
            ):
                ranges.setdefault((domain_id, number), []).append(Range(offset, length))
            for domain_id, number, name, size, ready in self._db.execute(
                f"SELECT l.domain_id, l.number, l.name, l.size, l.ready FROM disks l {only} ORDER BY l.number"
            ):
                disks.setdefault(domain_id, []).append(
                    DiskRecord(number, name, size, tuple(ranges[domain_id, number]), bool(ready))
                )
            for domain_id, generation, at, reason, source, target, planned, *felt in self._db.execute(
                "SELECT l.domain_id, l.generation, l.at, l.reason, l.source, l.target, l.planned, l.stall_ms,"
                f" l.replayed, l.lost_bytes FROM failovers l {only} ORDER BY l.generation"
            ):
                failovers[domain_id] = FailoverReceipt(
                    generation, at, reason, source, target, bool(planned), *felt
                )
            verifies = {
                domain_id: _verify_receipt(*receipt)
                for domain_id, *receipt in self._db.execute(
                    "SELECT l.domain_id, l.mismatches, l.at, l.outcome, l.seconds, l.repair, l.total, l.compared,"
                    f" l.mismatched, l.repaired, l.unreadable, l.unlisted FROM verifies l {only}"
                )
            }
            for domain_id, at, until in self._db.execute(
                f"SELECT l.domain_id, l.at, l.until FROM holds l {only}"
            ):
                holds[domain_id] = OperatorHold(at, until)
            for domain_id, source, target, at in self._db.execute(
                "SELECT l.domain_id, s.name, t.name, l.at FROM migrations l"
                " JOIN groups s ON s.id = l.source_group_id LEFT JOIN groups t ON t.id = l.target_group_id"
                f" {only}"
            ):
                migrations[domain_id] = Migration(source, target, at)
            return [
                DomainRecord(
                    Domain(
                        DomainId(domain_id),
                        UUID(uuid),
                        name,
                        size,
                        Replication(replication),
                        listen,
                        Delay(failback_after_s),
                        Delay(accept_loss_after_s),
                        Delay(fail_after_s),
                    ),
                    Desired(desired),
                    bool(session_open),
                    session,
                    Record(generation, active, tuple(legs[domain_id])),
                    {group: tuple(found) for group, found in runs[domain_id].items()},
                    tuple(disks.get(domain_id, ())),
                    failovers.get(domain_id),
                    verifies.get(domain_id),
                    holds.get(domain_id),
                    migrations.get(domain_id),
                )
                for (
                    domain_id,
                    uuid,
                    name,
                    size,
                    replication,
                    listen,
                    failback_after_s,
                    accept_loss_after_s,
                    fail_after_s,
                    desired,
                    session_open,
                    session,
                    generation,
                    active,
                ) in rows
            ]

    def add_domain(
        self,
        name: str,
        uuid: UUID,
        size: int,
        replication: Replication,
        listen: str,
        record: Record,
        runs: Mapping[str, Sequence[Run]],
        at: float,
        *,
        failback: Delay = MANUAL,
        accept_loss: Delay = MANUAL,
        no_leg: Delay = MANUAL,
    ) -> DomainRecord:
        with self._transaction() as db:
            if db.execute("SELECT 1 FROM domains WHERE name = ?", (name,)).fetchone():
                raise RefusedError(f"there is a domain {name} already")
            domain_id = db.execute(
                "INSERT INTO domains (uuid, name, size, replication, listen, failback_after_s,"
                " accept_loss_after_s, fail_after_s, next_disk, created_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, 1, ?)",
                (
                    str(uuid),
                    name,
                    size,
                    replication,
                    listen,
                    failback.after_s,
                    accept_loss.after_s,
                    no_leg.after_s,
                    at,
                ),
            ).lastrowid
            db.execute(
                "INSERT INTO attachments (domain_id, generation, active_group_id, desired, session_open)"
                " VALUES (?, ?, (SELECT id FROM groups WHERE name = ?), ?, 0)",
                (domain_id, record.generation, record.active, Desired.ONLINE),
            )
            for preference, leg in enumerate(record.legs):
                self._insert_leg(DomainId(domain_id or 0), leg, preference, runs[leg.group])
            self._insert_events(
                [NewEvent(Severity.INFO, "domain-created", f"domain {name} was made", name)], at
            )
        return self.domain(name)

    def remove_domain(self, name: str, at: float) -> None:
        found = self.domain(name)
        with self._transaction() as db:
            db.execute("DELETE FROM domains WHERE id = ?", (found.domain.id,))
            self._insert_events(
                [NewEvent(Severity.INFO, "domain-removed", f"domain {name} was removed", name)], at
            )

    # --- Changes ----------------------------------------------------------------------------------

    def change(self, domain: DomainId, change: Change, at: float) -> None:
        with self._transaction() as db:
            if change.record is not None:
                self._write_record(domain, change.record, change.runs)
            if change.end_migration or change.migration is not None:
                db.execute("DELETE FROM migrations WHERE domain_id = ?", (domain,))
            if change.migration is not None:
                db.execute(
                    "INSERT INTO migrations (domain_id, source_group_id, target_group_id, at)"
                    " VALUES (?, (SELECT id FROM groups WHERE name = ?), (SELECT id FROM groups WHERE name = ?), ?)",
                    (domain, change.migration.source, change.migration.target, change.migration.at),
                )
            if change.session is not None:
                db.execute("UPDATE attachments SET session = ? WHERE domain_id = ?", (change.session, domain))
            if change.session_open is not None:
                db.execute(
                    "UPDATE attachments SET session_open = ? WHERE domain_id = ?",
                    (change.session_open, domain),
                )
            if change.desired is not None:
                db.execute("UPDATE attachments SET desired = ? WHERE domain_id = ?", (change.desired, domain))
            if change.failback is not None:
                db.execute(
                    "UPDATE domains SET failback_after_s = ? WHERE id = ?", (change.failback.after_s, domain)
                )
            if change.accept_loss is not None:
                db.execute(
                    "UPDATE domains SET accept_loss_after_s = ? WHERE id = ?",
                    (change.accept_loss.after_s, domain),
                )
            if change.no_leg is not None:
                db.execute(
                    "UPDATE domains SET fail_after_s = ? WHERE id = ?", (change.no_leg.after_s, domain)
                )
            if change.release or change.hold is not None:
                db.execute("DELETE FROM holds WHERE domain_id = ?", (domain,))
            if change.hold is not None:
                db.execute(
                    "INSERT INTO holds (domain_id, at, until) VALUES (?, ?, ?)",
                    (domain, change.hold.at, change.hold.until),
                )
            if change.failover is not None:
                receipt = change.failover
                db.execute(
                    "INSERT INTO failovers (domain_id, generation, at, reason, source, target, planned,"
                    " lost_bytes) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    (
                        domain,
                        receipt.generation,
                        receipt.at,
                        receipt.reason,
                        receipt.source,
                        receipt.target,
                        receipt.planned,
                        receipt.lost_bytes,
                    ),
                )
                db.executemany(
                    "INSERT INTO losses (domain_id, generation, sequence, disk, offset, length)"
                    " VALUES (?, ?, ?, ?, ?, ?)",
                    [
                        (domain, receipt.generation, number, lost.disk, lost.offset, lost.length)
                        for number, lost in enumerate(change.lost)
                    ],
                )
            if change.verify is not None:
                self._write_verify(domain, change.verify)
            if change.add_disk is not None:
                disk = change.add_disk
                db.execute(
                    "INSERT INTO disks (domain_id, number, name, size, ready) VALUES (?, ?, ?, ?, ?)",
                    (domain, disk.number, disk.name, disk.size, disk.ready),
                )
                db.execute("UPDATE domains SET next_disk = ? WHERE id = ?", (disk.number + 1, domain))
                self._write_ranges(domain, disk)
            if change.ready_disk is not None:
                db.execute(
                    "UPDATE disks SET ready = 1 WHERE domain_id = ? AND number = ?",
                    (domain, change.ready_disk),
                )
            if change.resize_disk is not None:
                disk = change.resize_disk
                db.execute(
                    "UPDATE disks SET size = ? WHERE domain_id = ? AND number = ?",
                    (disk.size, domain, disk.number),
                )
                db.execute(
                    "DELETE FROM disk_ranges WHERE domain_id = ? AND number = ?", (domain, disk.number)
                )
                self._write_ranges(domain, disk)
            if change.remove_disk is not None:
                db.execute(
                    "DELETE FROM disks WHERE domain_id = ? AND number = ?", (domain, change.remove_disk)
                )
            self._insert_events(change.events, at)

    def _insert_leg(self, domain: DomainId, leg: LegRecord, preference: int, runs: Sequence[Run]) -> None:
        (group_id,) = self._db.execute("SELECT id FROM groups WHERE name = ?", (leg.group,)).fetchone()
        self._db.execute(
            "INSERT INTO legs (domain_id, group_id, preference, state, blocked) VALUES (?, ?, ?, ?, ?)",
            (domain, group_id, preference, leg.state, leg.blocked),
        )
        self._db.executemany(
            "INSERT INTO runs (domain_id, group_id, sequence, position, device_offset, length)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            [(domain, group_id, sequence, *run) for sequence, run in enumerate(runs)],
        )

    def _write_record(self, domain: DomainId, record: Record, runs: Mapping[str, Sequence[Run]]) -> None:
        (generation,) = self._db.execute(
            "SELECT generation FROM attachments WHERE domain_id = ?", (domain,)
        ).fetchone()
        assert record.generation > generation, (record.generation, generation)
        self._db.execute(
            "UPDATE attachments SET generation = ?, active_group_id = (SELECT id FROM groups WHERE name = ?)"
            " WHERE domain_id = ?",
            (record.generation, record.active, domain),
        )
        known = dict(
            self._db.execute(
                "SELECT name, id FROM legs JOIN groups ON id = group_id WHERE domain_id = ?", (domain,)
            ).fetchall()
        )
        for preference, leg in enumerate(record.legs):
            group_id = known.pop(leg.group, None)
            if group_id is None:
                self._insert_leg(domain, leg, preference, runs[leg.group])
            else:
                self._db.execute(
                    "UPDATE legs SET state = ?, blocked = ?, preference = ? WHERE domain_id = ? AND group_id = ?",
                    (leg.state, leg.blocked, preference, domain, group_id),
                )
        for group_id in known.values():
            self._db.execute("DELETE FROM legs WHERE domain_id = ? AND group_id = ?", (domain, group_id))

    def _write_verify(self, domain: DomainId, receipt: VerifyReceipt) -> None:
        mismatches = [(one.group, one.disk, one.offset, one.length) for one in receipt.mismatches]
        self._db.execute(
            "INSERT OR REPLACE INTO verifies (domain_id, at, outcome, seconds, repair, total, compared, mismatched,"
            " repaired, unreadable, unlisted, mismatches) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                domain,
                receipt.at,
                receipt.outcome,
                receipt.seconds,
                receipt.repair,
                receipt.total,
                receipt.compared,
                receipt.mismatched,
                receipt.repaired,
                receipt.unreadable,
                receipt.unlisted,
                json.dumps(mismatches),
            ),
        )

    def _write_ranges(self, domain: DomainId, disk: DiskRecord) -> None:
        self._db.executemany(
            "INSERT INTO disk_ranges (domain_id, number, sequence, offset, length) VALUES (?, ?, ?, ?, ?)",
            [(domain, disk.number, sequence, *extent) for sequence, extent in enumerate(disk.ranges)],
        )

    def losses(self, domain: DomainId) -> list[LostRange]:
        with self._errors():
            return [
                LostRange(*row)
                for row in self._db.execute(
                    "SELECT disk, offset, length FROM losses WHERE domain_id = ?1 AND generation ="
                    " (SELECT MAX(generation) FROM losses WHERE domain_id = ?1) ORDER BY sequence",
                    (domain,),
                )
            ]

    def settle_failover(self, domain: DomainId, generation: int, stall_ms: float, replayed: int) -> None:
        with self._transaction() as db:
            db.execute(
                "UPDATE failovers SET stall_ms = ?, replayed = ? WHERE domain_id = ? AND generation = ?",
                (stall_ms, replayed, domain, generation),
            )

    def next_disk_number(self, domain: DomainId) -> int:
        with self._errors():
            (number,) = self._db.execute("SELECT next_disk FROM domains WHERE id = ?", (domain,)).fetchone()
            return int(number)

    # --- Events -----------------------------------------------------------------------------------

    def _insert_events(self, events: Sequence[NewEvent], at: float) -> None:
        for event in events:
            identity = self._db.execute(
                "INSERT INTO events (at, severity, domain, kind, message) VALUES (?, ?, ?, ?, ?)",
                (at, event.severity, event.domain, event.kind, event.message),
            ).lastrowid
            self._db.execute("DELETE FROM events WHERE id <= ?", ((identity or 0) - EVENTS_KEPT,))

    def add_events(self, events: Sequence[NewEvent], at: float) -> None:
        with self._transaction():
            self._insert_events(events, at)

    def events(self, after: int, limit: int) -> list[Event]:
        with self._errors():
            return [
                Event(identity, at, Severity(severity), domain, kind, message)
                for identity, at, severity, domain, kind, message in self._db.execute(
                    "SELECT id, at, severity, domain, kind, message FROM events WHERE id > ? ORDER BY id LIMIT ?",
                    (after, limit),
                )
            ]

    def last_event_id(self) -> int:
        with self._errors():
            (identity,) = self._db.execute("SELECT coalesce(max(id), 0) FROM events").fetchone()
            return int(identity)


def _verify_receipt(
    mismatches: str, at: float, outcome: str, seconds: float, repair: int, *sizes: int
) -> VerifyReceipt:
    total, compared, mismatched, repaired, unreadable, unlisted = sizes
    return VerifyReceipt(
        at=at,
        outcome=VerifyOutcome(outcome),
        seconds=seconds,
        repair=bool(repair),
        total=total,
        compared=compared,
        mismatched=mismatched,
        repaired=repaired,
        unreadable=unreadable,
        unlisted=unlisted,
        mismatches=tuple(Mismatch(*mismatch) for mismatch in json.loads(mismatches)),
    )
