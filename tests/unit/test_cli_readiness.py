"""Whether a domain is ready, what is missing, and whether waiting can help."""

import pytest

from proxy.cli.objects import DomainObject, SyncObject
from proxy.cli.readiness import percent, readiness
from tests.unit.cli_objects import domain, leg, sync_of


@pytest.mark.parametrize(
    "ready",
    [
        pytest.param(domain(), id="uptodate backup"),
        pytest.param(domain(leg("alpha", "active")), id="no backup at all"),
        pytest.param(
            domain(leg("alpha", "active"), leg("beta", "backup"), leg("gamma", "backup")), id="two backups"
        ),
    ],
)
def test_readiness_of_an_online_domain_with_every_backup_uptodate_misses_nothing(ready: DomainObject) -> None:
    assert readiness(ready).is_ready


def test_readiness_with_one_backup_of_two_syncing_says_how_far_it_is() -> None:
    verdict = readiness(
        domain(
            leg("alpha", "active"),
            leg("beta", "backup"),
            leg("gamma", "backup", "syncing", sync=sync_of(37, 100)),
        )
    )
    assert verdict.missing == "gamma is syncing (37%)"
    assert verdict.remedy == ""


def test_readiness_with_a_percent_step_rounds_down() -> None:
    syncing = domain(leg("alpha", "active"), leg("beta", "backup", "syncing", sync=sync_of(39, 100)))
    assert "(30%)" in readiness(syncing, percent_step=10).missing


def test_readiness_with_an_outdated_backup_names_the_command_that_helps() -> None:
    verdict = readiness(
        domain(leg("alpha", "active"), leg("beta", "backup", "outdated", blocked=True), state="degraded")
    )
    assert verdict.missing == "it is degraded; beta is outdated"
    assert verdict.remedy == "standfast resync vol1"


def test_readiness_in_maintenance_names_the_command_that_helps() -> None:
    verdict = readiness(domain(state="maintenance"))
    assert verdict.missing == "it is in maintenance"
    assert verdict.remedy == "standfast domain start vol1"


def test_readiness_of_a_held_domain_says_why_and_that_waiting_may_help() -> None:
    verdict = readiness(
        domain(
            leg("alpha", "active", "failed", reason="file:///a lost its connection"),
            state="held",
            trouble="no up-to-date leg is left to serve from",
        )
    )
    assert verdict.missing == "it is held (no up-to-date leg is left to serve from)"
    assert verdict.remedy == ""


def test_readiness_with_a_lost_backup_gives_its_reason() -> None:
    lost = leg("beta", "backup", "failed", reason="file:///b answered with an error (EIO)")
    assert "beta is failed (file:///b answered with an error (EIO))" in (
        readiness(domain(leg("alpha", "active"), lost)).missing
    )


def test_readiness_with_a_blocked_uptodate_backup_is_not_ready() -> None:
    assert not readiness(domain(leg("alpha", "active"), leg("beta", "backup", blocked=True))).is_ready


@pytest.mark.parametrize(
    ("sync", "expected"),
    [
        (sync_of(0, 0), 100),
        (sync_of(0, 3), 0),
        (sync_of(2, 3), 66),
        (sync_of(3, 3), 100),
    ],
)
def test_percent_is_rounded_down_and_whole_when_there_is_nothing_to_copy(
    sync: SyncObject, expected: int
) -> None:
    assert percent(sync) == expected
