"""Whether a domain is online with every backup up to date, and what is missing when it is not. Pure."""

from dataclasses import dataclass

from proxy.cli.objects import DomainObject, LegObject, SyncObject


@dataclass(frozen=True, slots=True)
class Readiness:
    """A verdict.

    Attributes:
        missing: what is not as it should be, in words; empty when the domain is ready.
        remedy: the command to give when waiting alone will never help; empty otherwise.
    """

    missing: str
    remedy: str

    @property
    def is_ready(self) -> bool:
        """Whether nothing is missing."""
        return not self.missing


def percent(sync: SyncObject) -> int:
    """How much of a sync is done; 100 when there is nothing to copy."""
    return 100 * sync["copied"] // sync["total"] if sync["total"] else 100


def readiness(domain: DomainObject, *, percent_step: int = 1) -> Readiness:
    """Judge a domain; percentages in ``missing`` are rounded down to ``percent_step``."""
    behind = [leg for leg in domain["legs"] if leg["role"] == "backup" and not _is_good(leg)]
    parts = []
    if domain["state"] != "online":
        state = "in maintenance" if domain["state"] == "maintenance" else domain["state"]
        parts.append(f"it is {state}" + (f" ({domain['trouble']})" if domain["trouble"] else ""))
    parts += [_describe(leg, percent_step) for leg in behind]
    return Readiness("; ".join(parts), _remedy(domain, behind))


def _is_good(leg: LegObject) -> bool:
    return leg["state"] == "uptodate" and not leg["blocked"]


def _describe(leg: LegObject, percent_step: int) -> str:
    text = f"{leg['group']} is {leg['state']}"
    if leg["sync"] is not None:
        text += f" ({percent(leg['sync']) // percent_step * percent_step}%)"
    elif leg["reason"]:
        text += f" ({leg['reason']})"
    return text


def _remedy(domain: DomainObject, behind: list[LegObject]) -> str:
    if domain["state"] == "maintenance":
        return f"standfast domain start {domain['name']}"
    if domain["hold"] is not None:
        return f"standfast domain release {domain['name']}"
    if any(leg["state"] == "outdated" for leg in behind):
        return f"standfast resync {domain['name']}"
    return ""
