"""Every operation, killed at each persisted step of it."""

import pytest

from tests.crashpoints.operations import OPERATIONS
from tests.crashpoints.run import Outcome, try_all

pytestmark = pytest.mark.slow

#: Those that decide about data; all of them together take four minutes more (``python -m tests.crashpoints``).
ALWAYS = ("domain-create", "disk-create", "failover", "failback", "resync")


@pytest.mark.parametrize(
    "name", [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.long) for name in OPERATIONS]
)
async def test_manager_killed_at_every_step_restart_finds_it_done_or_undone(name: str) -> None:
    outcomes: list[Outcome] = []
    count = await try_all(OPERATIONS[name], kinds="commits", tell=outcomes.append)
    assert len(outcomes) >= 2 * count > 0
    fates = {(one.number, one.side): one.is_done for one in outcomes}
    assert not fates[1, "before"]  # nothing was written yet
    assert fates[count, "after"]
