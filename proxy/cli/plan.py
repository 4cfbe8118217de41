"""What a failover would do, told from a domain as the manager shows it. Pure; changes nothing."""

from proxy.cli.objects import DomainObject, LegObject, PlanObject
from proxy.errors import RefusedError

#: States in which the manager takes an order to change the active leg.
_OBEYING = ("online", "degraded", "held")


def plan_failover(domain: DomainObject, target: str | None) -> PlanObject:
    """From which leg to which a failover would go, ``target`` or the first backup that can take over.

    Raises:
        RefusedError: the failover would be refused, and why.
    """
    name = domain["name"]
    if domain["state"] == "maintenance":
        raise RefusedError(f"domain {name} is in maintenance; start it first")
    if domain["state"] not in _OBEYING or domain["hold"] is not None:
        raise RefusedError(f"domain {name} is {domain['state']}: {domain['trouble']}")
    legs = {leg["group"]: leg for leg in domain["legs"]}
    chosen = _successor(domain) if target is None else _named(domain, legs, target)
    active = domain["active"]
    return {
        "domain": name,
        "from": active,
        "to": chosen["group"],
        "before": legs[active],
        "after": chosen,
    }


def _can_take_over(leg: LegObject) -> bool:
    return leg["state"] == "uptodate" and not leg["blocked"] and not leg["reason"]


def _successor(domain: DomainObject) -> LegObject:
    backups = [leg for leg in domain["legs"] if leg["group"] != domain["active"]]
    for leg in backups:
        if _can_take_over(leg):
            return leg
    states = ", ".join(f"{leg['group']} is {leg['state']}" for leg in backups) or "there is none"
    raise RefusedError(f"domain {domain['name']} has no uptodate backup to fail over to: {states}")


def _named(domain: DomainObject, legs: dict[str, LegObject], target: str) -> LegObject:
    if target not in legs:
        raise RefusedError(f"group {target} is no leg of domain {domain['name']}")
    if target == domain["active"]:
        raise RefusedError(f"group {target} is active already")
    leg = legs[target]
    if not _can_take_over(leg):
        state = f"{leg['state']} and blocked" if leg["blocked"] else leg["state"]
        why = leg["reason"] or f"it is {state}; only an uptodate leg can"
        raise RefusedError(f"group {target} cannot take over: {why}")
    return leg
