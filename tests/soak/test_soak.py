"""A short soak, and proof that it would notice."""

import shutil

import pytest

from tests.sim.history import ZEROES, Kind, Violation
from tests.soak.record import LongHistory
from tests.soak.run import Soak

#: Some periods of trouble.
SECONDS = 45


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nbdkit") is None, reason="nbdkit is not installed")
async def test_soak_of_real_processes_breaks_no_promise() -> None:
    soak = Soak(seed=20)
    await soak.run(SECONDS)
    happened = soak.history.happened
    assert happened["periods"] >= 3
    assert min(happened[f"{kind.value} answered"] for kind in Kind) > 100
    assert happened["domain server killed"] and happened["manager killed"]


def written(history: LongHistory, disk: int) -> int:
    """The number of a write of the first sector that was answered."""
    operation = history.new(Kind.WRITE, disk, 0, 3)
    history.ask(operation)
    history.answer(operation)
    return operation.number


def read(history: LongHistory, disk: int, data: bytes) -> None:
    """A read of the first sector that found ``data``."""
    operation = history.new(Kind.READ, disk, 0, 3)
    history.ask(operation)
    history.answer(operation, data)


def test_long_history_forgets_what_was_overwritten_and_knows_it_no_more() -> None:
    history = LongHistory({1: 3, 2: 3})
    old, new = written(history, 1), written(history, 1)
    contents = {number: history.operations[number].content() for number in (old, new)}
    read(history, 1, contents[new])
    read(history, 2, bytes(512))
    history.check()
    history.forget()
    assert set(history.operations) == {new}
    assert written(history, 2) > new
    read(history, 1, contents[new])
    history.check()
    with pytest.raises(Violation, match="nobody wrote"):
        read(history, 1, contents[old])


def test_long_history_zeroes_after_what_was_kept_are_a_violation() -> None:
    history = LongHistory({1: 3})
    content = history.operations[written(history, 1)].content()
    read(history, 1, content)
    history.forget()
    read(history, 1, bytes(512))
    assert history.cells[1][0].reads[-1].value == ZEROES
    with pytest.raises(Violation, match="zeroes read"):
        history.check()
