"""What a failover would do: the same verdicts as the manager's, without an order."""

from typing import Any

import pytest

from proxy.cli.objects import LegObject
from proxy.cli.plan import plan_failover
from proxy.errors import RefusedError
from tests.unit.cli_objects import domain, leg

ALPHA = leg("alpha", "active")


def test_plan_without_a_target_takes_the_first_backup_that_can() -> None:
    plan = plan_failover(
        domain(ALPHA, leg("beta", "backup", "syncing"), leg("gamma", "backup"), leg("delta", "backup")), None
    )
    assert (plan["from"], plan["to"]) == ("alpha", "gamma")
    assert plan["before"]["group"] == "alpha"
    assert plan["after"]["group"] == "gamma"


def test_plan_with_a_target_takes_that() -> None:
    plan = plan_failover(domain(ALPHA, leg("beta", "backup"), leg("gamma", "backup")), "gamma")
    assert plan["to"] == "gamma"


def test_plan_of_a_held_domain_is_made_since_the_manager_takes_the_order() -> None:
    lost = leg("alpha", "active", "failed", reason="gone")
    assert plan_failover(domain(lost, leg("beta", "backup"), state="held"), None)["to"] == "beta"


@pytest.mark.parametrize(
    ("backups", "said"),
    [
        ([], "there is none"),
        ([leg("beta", "backup", "outdated", blocked=True)], "beta is outdated"),
        (
            [leg("beta", "backup", "syncing"), leg("gamma", "backup", "outdated")],
            "beta is syncing, gamma is outdated",
        ),
        ([leg("beta", "backup", "failed", reason="gone")], "beta is failed"),
        ([leg("beta", "backup", blocked=True)], "beta is uptodate"),
    ],
)
def test_plan_without_an_uptodate_backup_is_refused_and_says_how_they_are(
    backups: list[LegObject], said: str
) -> None:
    with pytest.raises(RefusedError, match=f"no uptodate backup to fail over to: {said}$"):
        plan_failover(domain(ALPHA, *backups), None)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("alpha", "group alpha is active already"),
        ("nope", "group nope is no leg of domain vol1"),
        ("beta", "group beta cannot take over: it is outdated and blocked; only an uptodate leg can"),
        ("gamma", "group gamma cannot take over: the cable is cut"),
    ],
)
def test_plan_with_a_target_that_cannot_take_over_is_refused(target: str, said: str) -> None:
    legs = (
        ALPHA,
        leg("beta", "backup", "outdated", blocked=True),
        leg("gamma", "backup", "failed", reason="the cable is cut"),
    )
    with pytest.raises(RefusedError, match=said):
        plan_failover(domain(*legs), target)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"state": "maintenance"}, "domain vol1 is in maintenance; start it first"),
        ({"state": "failed", "trouble": "it did not come up"}, "domain vol1 is failed: it did not come up"),
    ],
)
def test_plan_of_a_domain_that_is_not_served_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RefusedError, match=said):
        plan_failover(domain(**changes), None)
