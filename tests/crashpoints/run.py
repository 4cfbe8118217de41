"""One operation, killed at each of its steps; see the package."""

import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import trio

from proxy.allocator import round_up
from proxy.label import LABEL_SIZE
from proxy.store.sqlite import SqliteStore
from tests.crashpoints.operations import DOMAIN, Operation, make_base, wait_rest
from tests.integration.site import Site, Witness, domain_servers

#: As in production, only the patience is shorter.
SETTINGS = "deadline_ms = 2000\nquarantine_s = 0.2\nreopen_interval_s = 0.05\n"
#: For what a restart has to tidy up.
PATIENCE_S = 20
SIDES = ("before", "after")
#: They wait for processes most of the time.
SITES_AT_ONCE = 3
#: Enough to be at work all the time, few enough to be checked in no time.
WITNESS_BLOCKS = 256


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one crash. ``is_done``: the operation had happened when the next manager was at rest."""

    operation: str
    number: int
    side: str
    step: str
    is_done: bool

    def __str__(self) -> str:
        fate = "happened" if self.is_done else "never happened"
        return f"{self.operation:15} {self.side:6} {self.number:3} {self.step:32} {fate}"


async def try_all(operation: Operation, *, kinds: str, tell: Callable[[Outcome], None]) -> int:
    """Kill the manager at every step of an operation; how many steps there are.

    Args:
        kinds: ``commits`` for persisted steps, ``all`` for commands to domain servers too.
        tell: is told of each crash.

    Raises:
        AssertionError: a restart left something it must not leave.
    """
    before, after, count = await _rehearse(operation, kinds)
    limiter = trio.CapacityLimiter(SITES_AT_ONCE)

    async def crash(number: int, side: str) -> bool:
        async with limiter:
            outcome = await _crash(operation, number, side, kinds, before, after)
        if outcome is not None:
            tell(outcome)
        return outcome is not None

    async def crash_at_each(side: str) -> None:
        async with trio.open_nursery() as nursery:
            for number in range(1, count + 1):
                nursery.start_soon(crash, number, side)
        # What goes on in the background varies a little; on the last time around nothing is left to die of.
        number = count + 1
        while await crash(number, side):
            number += 1

    async with trio.open_nursery() as nursery:
        for side in SIDES:
            nursery.start_soon(crash_at_each, side)
    return count


async def _rehearse(operation: Operation, kinds: str) -> tuple[Any, Any, int]:
    """Carry out an operation unharmed: what is there before, what after, and how many steps it has."""
    async with _site() as (made, trap):
        await operation.prepare(made)
        before = await inventory(made)
        trap.write_text(f"0 none {kinds}")
        async with _witnessed(made):
            await operation.give(made)
            trap.unlink()
        after = await inventory(made)
        assert before != after, f"{operation.name} changes nothing"
        return before, after, len(_steps(trap))


async def _crash(
    operation: Operation, number: int, side: str, kinds: str, before: Any, after: Any
) -> Outcome | None:
    """Kill the manager at one step and look at what the next one makes of it; None: there is no such step."""
    async with _site() as (made, trap):
        await operation.prepare(made)
        trap.write_text(f"{number} {side} {kinds}")
        async with _witnessed(made) as witness:
            died = await _give(operation, made)
            trap.unlink(missing_ok=True)
            if not died:
                return None
            await made.start_manager()
            found = await _wait_one_of(made, before, after)
            await _check_space(made)
            if found != after:
                await operation.again(made)
                assert await inventory(made) == after
        await _check_legs(made, witness)
        await _check_servers(made)
        await _check_bitmaps(made)
        await operation.tidy(made)
        await _remove_all(made, keeps_label=operation.name == "group-remove")
        return Outcome(operation.name, number, side, _steps(trap)[number - 1], found == after)


@asynccontextmanager
async def _site() -> AsyncIterator[tuple[Site, Path]]:
    """A site whose manager can be trapped, and the trap."""
    made = Site(settings=SETTINGS)
    trap = made.directory / "trap"
    made.command = [made.command[0], str(Path(__file__).with_name("manager.py")), str(trap)]
    try:
        await made.start_manager()
        await make_base(made)
        yield made, trap
    finally:
        with trio.CancelScope(shield=True):
            await made.close()


def _steps(trap: Path) -> list[str]:
    return trap.with_name(f"{trap.name}.log").read_text().splitlines()


async def _give(operation: Operation, made: Site) -> bool:
    """Give an operation; whether the manager died of it."""
    assert made.manager is not None
    try:
        await operation.give(made)
    except httpx.TransportError:
        made.manager.wait(PATIENCE_S)
        return True
    return made.manager.poll() is not None


@asynccontextmanager
async def _witnessed(made: Site) -> AsyncIterator[Witness]:
    """A client on the first disk, which nothing of this may end or fail."""
    witness = Witness(made.socket(DOMAIN), blocks=WITNESS_BLOCKS, depth=4)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(witness.run)
        await _answers(witness, 20)
        yield witness
        await _answers(witness, 20)
        nursery.cancel_scope.cancel()
    await witness.check_all()


async def _answers(witness: Witness, count: int) -> None:
    target = witness.answered + count
    with trio.fail_after(PATIENCE_S):
        while witness.answered < target:
            await trio.sleep(0.005)


async def inventory(made: Site) -> Any:
    """All that an operator can see and a restart must not change, comparable."""
    groups = {
        group["name"]: (group["layout"], group["free"], [device["size"] for device in group["devices"]])
        for group in await made.order("GET", "/groups")
    }
    domains = {}
    for summary in await made.order("GET", "/domains"):
        shown = await made.show(summary["name"])
        domains[shown["name"]] = (
            shown["state"],
            shown["size"],
            shown["active"],
            shown["hold"] is not None,
            {leg["group"]: leg["state"] for leg in shown["legs"]},
            {disk["name"]: disk["size"] for disk in shown["disks"]},
        )
    return groups, domains


async def _wait_one_of(made: Site, before: Any, after: Any) -> Any:
    """What is there as soon as it is what should be before or after the operation."""
    found: Any = None
    with trio.move_on_after(PATIENCE_S):
        while True:
            found = await inventory(made)
            if found in (before, after):
                return found
            await trio.sleep(0.05)
    raise AssertionError(f"neither as before nor as after: {found}\nbefore: {before}\nafter: {after}")


async def _check_space(made: Site) -> None:
    """Of each domain exactly what its disks need is taken, and no disk is there that nobody sees."""
    problems: list[str] = []
    with trio.move_on_after(PATIENCE_S):
        while problems := _space_problems(made):
            await trio.sleep(0.05)
    assert not problems, "; ".join(problems)


def _space_problems(made: Site) -> list[str]:
    copy = made.directory / "copy.db"
    with (
        closing(sqlite3.connect(made.state / "standfast.db")) as source,
        closing(sqlite3.connect(copy)) as target,
    ):
        source.backup(target)
    with closing(SqliteStore(copy)) as store:
        problems = []
        for domain in store.domains():
            for disk in domain.disks:
                name = f"{domain.domain.name}/{disk.name}"
                taken = sum(part.length for part in disk.ranges)
                if not disk.ready:
                    problems.append(f"disk {name} is half-made")
                elif taken != round_up(disk.size):
                    problems.append(f"disk {name} of {disk.size} bytes takes {taken}")
        return problems


async def _check_legs(made: Site, witness: Witness) -> None:
    """What was acknowledged is on every leg: each that may become active does, and is read."""
    shown = await wait_rest(made, DOMAIN)
    if shown["state"] == "degraded":
        await made.order("POST", f"/domains/{DOMAIN}/resync")
        await made.wait(DOMAIN, lambda shown: shown["state"] == "online")
    await made.order("POST", f"/domains/{DOMAIN}/failover")
    await witness.check_all()


async def _check_servers(made: Site) -> None:
    """There is one process for each domain that serves, and no other."""
    domains = await made.order("GET", "/domains")
    serving = {made.server_pid(one["name"]) for one in domains if one["state"] != "maintenance"}
    assert domain_servers(made) == serving


async def _check_bitmaps(made: Site) -> None:
    """There is no dirty bitmap of a domain that is no more."""
    domains = await made.order("GET", "/domains")
    known = {(await made.show(one["name"]))["uuid"] for one in domains}
    assert {path.name for path in (made.state / "bitmaps").iterdir()} <= known


async def _remove_all(made: Site, *, keeps_label: bool) -> None:
    """Remove every object; each can be, and nothing is left of any.

    ``keeps_label``: a device may carry the label of a group that the store has forgotten; its operator is
    told so, and can have it all the same.
    """
    for domain in await made.order("GET", "/domains"):
        name = domain["name"]
        if domain["state"] != "maintenance":
            for disk in (await made.show(name))["disks"]:
                await made.order("DELETE", f"/domains/{name}/disks/{disk['name']}")
        await made.order("DELETE", f"/domains/{name}")
        assert not (made.run / name).exists()
    assert not domain_servers(made)
    await _check_bitmaps(made)
    for group in await made.order("GET", "/groups"):
        assert group["free"] == group["size"]
        assert await made.order("DELETE", f"/groups/{group['name']}") == {"unreached": []}
    for image in made.images.iterdir():
        with image.open("rb") as file:
            if any(file.read(LABEL_SIZE)):
                leftover = await made.refused("POST", "/groups", name="other", devices=[f"file://{image}"])
                assert keeps_label and "which this manager does not know; say --force" in leftover
                await made.order("POST", "/groups", name="other", devices=[f"file://{image}"], force=True)
                await made.order("DELETE", "/groups/other")
