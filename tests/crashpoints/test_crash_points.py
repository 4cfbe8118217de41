"""Every operation, killed at each persisted step of it."""

import pytest

from tests.crashpoints.operations import OPERATIONS
from tests.crashpoints.run import Outcome, try_all

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", OPERATIONS)
async def test_manager_killed_at_every_step_restart_finds_it_done_or_undone(name: str) -> None:
    outcomes: list[Outcome] = []
    count = await try_all(OPERATIONS[name], kinds="commits", tell=outcomes.append)
    assert len(outcomes) >= 2 * count > 0
    fates = {(one.number, one.side): one.is_done for one in outcomes}
    assert not fates[1, "before"]  # nothing was written yet
    assert fates[count, "after"]
