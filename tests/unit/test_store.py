"""The SQLite store: what goes in comes out, refusals change nothing, a failover touches only its tables."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from proxy.errors import NotFoundError, RefusedError, StoreError
from proxy.extentmap import Range, Run
from proxy.failover import LegRecord, Record
from proxy.migration import Migration
from proxy.model import (
    Desired,
    FailoverReceipt,
    Layout,
    LayoutKind,
    LegState,
    LostRange,
    Mismatch,
    Replication,
    Severity,
    VerifyOutcome,
    VerifyReceipt,
    parse_delay,
)
from proxy.store import Change, DiskRecord, DomainRecord, NewDevice, NewEvent
from proxy.store.sqlite import _MIGRATIONS, SCHEMA_VERSION, SqliteStore

RECORD = Record(1, "alpha", (LegRecord("alpha", LegState.UPTODATE), LegRecord("beta", LegState.SYNCING)))
RUNS = {"alpha": (Run(0, 65536, 1 << 20), Run(1, 65536, 1 << 20)), "beta": (Run(0, 65536, 2 << 20),)}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    opened = SqliteStore(tmp_path / "store.db")
    yield opened
    opened.close()


def devices(count: int) -> list[NewDevice]:
    return [NewDevice(uuid4(), 50 << 20, 65536, f"file:///d{number}") for number in range(count)]


def filled(store: SqliteStore) -> DomainRecord:
    store.add_group("alpha", uuid4(), Layout(LayoutKind.LINEAR), devices(2), 1.0)
    store.add_group("beta", uuid4(), Layout(LayoutKind.STRIPED, 1 << 20), devices(1), 1.0)
    return store.add_domain("vol1", uuid4(), 2 << 20, Replication.SYNC, "", RECORD, RUNS, 2.0)


def rows(path: Path, table: str) -> list[tuple[object, ...]]:
    connection = sqlite3.connect(path)
    try:
        return connection.execute(f"SELECT * FROM {table}").fetchall()
    finally:
        connection.close()


def test_group_round_trip_keeps_layout_order_and_urls(store: SqliteStore) -> None:
    made = devices(3)
    store.add_group("alpha", UUID(int=7), Layout(LayoutKind.STRIPED, 1 << 16), made, 1.0)
    group = store.group("alpha")
    assert (group.uuid, group.layout) == (UUID(int=7), Layout(LayoutKind.STRIPED, 1 << 16))
    assert [(d.position, d.uuid, d.url) for d in group.devices] == [
        (number, device.uuid, device.url) for number, device in enumerate(made)
    ]


def test_names_taken_are_refused_and_nothing_is_added(store: SqliteStore, tmp_path: Path) -> None:
    filled(store)
    before = [rows(tmp_path / "store.db", table) for table in ("groups", "devices", "domains", "runs")]
    with pytest.raises(RefusedError, match="already"):
        store.add_group("alpha", uuid4(), Layout(LayoutKind.LINEAR), devices(1), 1.0)
    with pytest.raises(RefusedError, match="already"):
        store.add_domain("vol1", uuid4(), 1, Replication.SYNC, "", RECORD, RUNS, 2.0)
    assert [
        rows(tmp_path / "store.db", table) for table in ("groups", "devices", "domains", "runs")
    ] == before


def test_group_in_use_is_not_removed(store: SqliteStore) -> None:
    filled(store)
    with pytest.raises(RefusedError, match="used by domain vol1"):
        store.remove_group("alpha", 3.0)
    store.remove_domain("vol1", 3.0)
    store.remove_group("alpha", 3.0)
    assert [group.name for group in store.groups()] == ["beta"]
    assert store.taken("beta") == []


def test_unknown_names_are_not_found(store: SqliteStore) -> None:
    for call in (store.group, store.domain):
        with pytest.raises(NotFoundError):
            call("nothing")


def test_domain_round_trip_after_reopening(store: SqliteStore, tmp_path: Path) -> None:
    filled(store)
    store.close()
    again = SqliteStore(tmp_path / "store.db")
    domain = again.domain("vol1")
    assert domain.record == RECORD
    assert domain.runs == RUNS
    assert (domain.desired, domain.session_open, domain.last_failover) == (Desired.ONLINE, False, None)
    assert again.domains() == [domain]
    again.close()


def test_failover_changes_connection_details_and_never_the_domain(store: SqliteStore, tmp_path: Path) -> None:
    domain = filled(store)
    untouched = ("domains", "disks", "disk_ranges", "runs", "groups", "devices", "connections")
    before = {table: rows(tmp_path / "store.db", table) for table in untouched}
    after = Record(
        2, "beta", (LegRecord("alpha", LegState.OUTDATED, blocked=True), LegRecord("beta", LegState.UPTODATE))
    )
    receipt = FailoverReceipt(2, 5.0, "a device is gone", "alpha", "beta", planned=True)
    store.change(domain.domain.id, Change(record=after, session_open=True, failover=receipt), 5.0)
    assert {table: rows(tmp_path / "store.db", table) for table in untouched} == before
    changed = store.domain("vol1")
    assert (changed.record, changed.session_open, changed.last_failover) == (after, True, receipt)
    store.settle_failover(domain.domain.id, 2, 8.5, 32)
    settled = store.domain("vol1").last_failover
    assert settled is not None
    assert (settled.stall_ms, settled.replayed) == (8.5, 32)


def test_verify_receipt_is_kept_until_the_next_and_gone_with_the_domain(
    store: SqliteStore, tmp_path: Path
) -> None:
    domain = filled(store)
    assert domain.last_verify is None
    mismatches = (Mismatch("beta", "disk1", 4096, 8192), Mismatch("beta", "disk2", 0, 4096))
    first = VerifyReceipt(5.0, VerifyOutcome.COMPLETE, 1.5, True, 1 << 20, 9, 8, 7, 6, 5, mismatches)
    second = VerifyReceipt(6.0, VerifyOutcome.STOPPED, 0.5, False, 1 << 20, 0, 0, 0, 0, 0, ())
    for receipt in (second, first):
        store.change(domain.domain.id, Change(verify=receipt), receipt.at)
    assert store.domain("vol1").last_verify == first
    store.remove_domain("vol1", 7.0)
    assert rows(tmp_path / "store.db", "verifies") == []


def test_losses_are_those_of_the_last_failover_that_lost_anything(store: SqliteStore) -> None:
    domain = filled(store).domain
    assert store.losses(domain.id) == []
    lost = [LostRange("disk1", 4096, 8192), LostRange("disk2", 0, 1 << 40)]
    receipts = [
        FailoverReceipt(2, 5.0, "a loss is accepted", "alpha", "beta", lost_bytes=8192 + (1 << 40)),
        FailoverReceipt(3, 6.0, "back", "beta", "alpha", planned=True),
    ]
    store.change(domain.id, Change(failover=receipts[0], lost=lost), 5.0)
    assert store.domain("vol1").last_failover == receipts[0]
    store.change(domain.id, Change(failover=receipts[1]), 6.0)
    assert store.losses(domain.id) == lost
    store.remove_domain("vol1", 7.0)
    assert store.losses(domain.id) == []


def test_policy_of_losses_is_kept_and_can_be_changed(store: SqliteStore) -> None:
    domain = filled(store).domain
    assert str(domain.accept_loss) == "manual"
    for text in ("30", "immediate", "manual"):
        store.change(domain.id, Change(accept_loss=parse_delay("accept-loss", text)), 3.0)
        assert str(store.domain("vol1").domain.accept_loss) == text


def test_failback_policy_is_kept_and_can_be_changed(store: SqliteStore) -> None:
    domain = filled(store).domain
    assert str(domain.failback) == "manual"
    for text in ("30", "immediate", "2.5", "manual"):
        store.change(domain.id, Change(failback=parse_delay("failback", text)), 3.0)
        assert str(store.domain("vol1").domain.failback) == text


def test_leg_that_joins_brings_its_space_and_one_that_leaves_frees_it(store: SqliteStore) -> None:
    domain = filled(store).domain.id
    store.add_group("gamma", uuid4(), Layout(LayoutKind.LINEAR), devices(1), 1.0)
    runs = (Run(0, 65536, 2 << 20),)
    outdated = LegRecord("gamma", LegState.OUTDATED, blocked=True)
    alpha, beta = RECORD.legs
    migration = Migration("alpha", "gamma", 3.0)
    joined = Change(
        record=Record(2, "alpha", (alpha, outdated, beta)), runs={"gamma": runs}, migration=migration
    )
    store.change(domain, joined, 3.0)
    found = store.domain("vol1")
    assert (found.record, found.migration) == (joined.record, migration)
    assert found.runs == {**RUNS, "gamma": runs}
    with pytest.raises(RefusedError, match="used by domain vol1"):
        store.remove_group("gamma", 3.0)
    gamma = LegRecord("gamma", LegState.UPTODATE)
    store.change(domain, Change(record=Record(3, "gamma", (gamma, beta)), end_migration=True), 4.0)
    found = store.domain("vol1")
    assert (found.record, found.migration) == (Record(3, "gamma", (gamma, beta)), None)
    assert store.taken("alpha") == []
    store.remove_group("alpha", 4.0)


def test_store_of_the_first_version_is_brought_up_to_date(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    connection = sqlite3.connect(path)
    connection.executescript(f"{_MIGRATIONS[0]} PRAGMA user_version = 1;")
    connection.executescript(
        "INSERT INTO groups VALUES (1, '00000000-0000-4000-8000-000000000001', 'alpha', 'linear', 0, 1.0);"
        "INSERT INTO domains VALUES (1, '00000000-0000-4000-8000-000000000002', 'vol1', 65536, 'sync', '', 1, 1.0);"
        "INSERT INTO attachments VALUES (1, 7, 1, 'online', 0);"
        "INSERT INTO legs VALUES (1, 1, 0, 'uptodate', 0);"
        "INSERT INTO runs VALUES (1, 1, 0, 0, 65536, 65536);"
        "INSERT INTO failovers VALUES (1, 6, 5.0, 'a device is gone', 'beta', 'alpha', 8.5, 32);"
    )
    connection.close()
    opened = SqliteStore(path)
    domain = opened.domain("vol1")
    opened.close()
    assert (domain.record.generation, str(domain.domain.failback)) == (7, "manual")
    assert domain.last_failover == FailoverReceipt(
        6, 5.0, "a device is gone", "beta", "alpha", stall_ms=8.5, replayed=32
    )


def test_change_that_fails_half_way_changes_nothing(store: SqliteStore) -> None:
    domain = filled(store)
    disk = DiskRecord(1, "d", 4096, (Range(0, 65536),), ready=True)
    store.change(domain.domain.id, Change(add_disk=disk), 3.0)
    bumped = Record(2, "alpha", RECORD.legs)
    with pytest.raises(StoreError):
        store.change(domain.domain.id, Change(record=bumped, add_disk=disk), 4.0)  # the number is taken
    assert store.domain("vol1").record == RECORD


def test_generation_never_goes_back(store: SqliteStore) -> None:
    domain = filled(store)
    with pytest.raises(AssertionError):
        store.change(domain.domain.id, Change(record=RECORD), 3.0)


def test_disk_life_keeps_numbers_unique(store: SqliteStore) -> None:
    domain = filled(store).domain.id
    assert store.next_disk_number(domain) == 1
    store.change(domain, Change(add_disk=DiskRecord(1, "d", 4096, (Range(0, 65536),), ready=False)), 3.0)
    store.change(domain, Change(ready_disk=1), 3.0)
    grown = DiskRecord(1, "d", 1 << 20, (Range(0, 65536), Range(131072, 1 << 20)), ready=True)
    store.change(domain, Change(resize_disk=grown), 3.0)
    assert store.domain("vol1").disks == (grown,)
    store.change(domain, Change(remove_disk=1), 3.0)
    assert store.domain("vol1").disks == ()
    assert store.next_disk_number(domain) == 2


def test_events_come_back_in_order_after_an_id(store: SqliteStore) -> None:
    for number in range(5):
        store.add_events([NewEvent(Severity.INFO, "kind", f"message {number}", "vol1")], float(number))
    assert [event.message for event in store.events(2, 2)] == ["message 2", "message 3"]
    assert store.last_event_id() == 5


def test_store_of_a_newer_version_is_refused_untouched(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    SqliteStore(path).close()
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    connection.execute("PRAGMA journal_mode = DELETE")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(StoreError, match="newer Standfast"):
        SqliteStore(path)
    assert path.read_bytes() == before


def test_store_that_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(StoreError, match="cannot be used"):
        SqliteStore(path)


def test_commits_are_synced_to_the_disk(store: SqliteStore) -> None:
    connection = store._db
    assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert connection.execute("PRAGMA foreign_keys").fetchone() == (1,)
