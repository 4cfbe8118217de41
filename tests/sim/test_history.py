"""The checker itself: it must see what is wrong, and nothing else."""

import random

import pytest

from tests.sim.history import CELLS_PER_SECTOR, ZEROES, History, Kind, Operation, Violation, cell_content

SECTORS = 4
CELLS = SECTORS * CELLS_PER_SECTOR


class Story:
    """A history of one disk, told in few words; every request covers the whole disk unless it is told."""

    def __init__(self) -> None:
        self.history = History({0: CELLS})

    def ask(self, kind: Kind, first: int = 0, last: int = CELLS) -> Operation:
        operation = self.history.new(kind, 0, first, last)
        self.history.ask(operation)
        return operation

    def write(self, first: int = 0, last: int = CELLS) -> Operation:
        """A write from its beginning to its good end."""
        operation = self.ask(Kind.WRITE, first, last)
        self.history.answer(operation)
        return operation

    def answer_read(self, read: Operation, *writers: Operation | None) -> None:
        """Answer a read: one writer for each sector, or one for all; None for zeroes."""
        per_sector = writers * SECTORS if len(writers) == 1 else writers
        content = b""
        for cell in range(read.first, read.last):
            writer = per_sector[cell // CELLS_PER_SECTOR]
            content += cell_content(writer.number if writer else ZEROES, cell)
        self.history.answer(read, content)

    def read(self, *writers: Operation | None) -> None:
        """A read from its beginning to its end."""
        self.answer_read(self.ask(Kind.READ), *writers)


def test_history_of_one_request_after_the_other_is_explained() -> None:
    story = Story()
    story.read(None)
    first = story.write()
    story.read(first)
    second = story.write(CELLS_PER_SECTOR, 2 * CELLS_PER_SECTOR)
    story.read(first, second, first, first)
    zero = story.ask(Kind.ZERO)
    story.history.answer(zero)
    story.read(None)
    story.history.check()


def test_history_with_a_lost_write_is_not_explained() -> None:
    story = Story()
    first = story.write()
    story.write()
    story.read(first)
    with pytest.raises(Violation, match="overwritten, yet read"):
        story.history.check()


def test_history_with_zeroes_after_a_write_is_not_explained() -> None:
    story = Story()
    story.write()
    story.read(None)
    with pytest.raises(Violation, match="zeroes read"):
        story.history.check()


def test_history_with_a_write_after_zeroes_were_acknowledged_is_not_explained() -> None:
    story = Story()
    first = story.write()
    story.history.answer(story.ask(Kind.ZERO))
    story.read(first)
    with pytest.raises(Violation, match="overwritten, yet read"):
        story.history.check()


def test_history_in_which_a_read_goes_back_in_time_is_not_explained() -> None:
    story = Story()
    first = story.write()
    pending = story.ask(Kind.WRITE)
    story.read(pending)
    story.read(first)
    with pytest.raises(Violation, match="overwritten, yet read"):
        story.history.check()


def test_history_in_which_reads_flip_between_two_writes_under_way_is_not_explained() -> None:
    story = Story()
    one, other = story.ask(Kind.WRITE), story.ask(Kind.WRITE)
    story.read(one)
    story.read(other)
    story.read(one)
    with pytest.raises(Violation):
        story.history.check()


def test_history_of_reads_beside_a_write_may_see_either() -> None:
    story = Story()
    first = story.write()
    early, late = story.ask(Kind.READ), story.ask(Kind.READ)
    second = story.ask(Kind.WRITE)
    story.answer_read(late, second)
    story.answer_read(early, first)
    story.history.answer(second)
    story.history.check()


def test_history_of_a_write_never_answered_may_have_it_or_not() -> None:
    for found in (True, False):
        story = Story()
        first = story.write()
        lost = story.ask(Kind.WRITE)
        story.history.settle(lost)
        story.read(lost if found else first)
        story.read(lost if found else first)
        story.history.check()


def test_history_in_which_a_settled_write_appears_later_is_not_explained() -> None:
    story = Story()
    first = story.write()
    lost = story.ask(Kind.WRITE)
    story.history.settle(lost)
    story.read(first)
    story.read(lost)
    with pytest.raises(Violation):
        story.history.check()


def test_history_of_a_trim_may_zero_or_not_but_not_come_back() -> None:
    for zeroed in (True, False):
        story = Story()
        first = story.write()
        story.history.answer(story.ask(Kind.TRIM))
        story.read(None if zeroed else first)
        story.history.check()
    story.read(first)
    story.read(None)
    story.read(first)
    with pytest.raises(Violation):
        story.history.check()


def test_history_with_half_a_sector_of_each_of_two_writes_is_torn() -> None:
    story = Story()
    one, other = story.ask(Kind.WRITE), story.ask(Kind.WRITE)
    content = b"".join(cell_content((one, other)[cell % 2].number, cell) for cell in range(CELLS))
    with pytest.raises(Violation, match="torn sector"):
        story.history.answer(story.ask(Kind.READ), content)


def test_history_with_part_of_a_sector_overwritten_is_not_torn() -> None:
    story = Story()
    first = story.write()
    second = story.write(1, 2)
    content = b"".join(cell_content((second if cell == 1 else first).number, cell) for cell in range(CELLS))
    story.history.answer(story.ask(Kind.READ), content)
    story.history.check()


@pytest.mark.parametrize("what", ["garbage", "another place", "another write's number", "a write never sent"])
def test_history_with_bytes_that_nobody_wrote_there_is_refused(what: str) -> None:
    story = Story()
    first = story.write(0, CELLS_PER_SECTOR)
    unsent = story.history.new(Kind.WRITE, 0, 0, CELLS)
    cells = [cell_content(ZEROES, cell) for cell in range(CELLS)]
    if what == "garbage":
        cells[0] = b"\xee" * len(cells[0])
    elif what == "another place":
        cells[CELLS_PER_SECTOR] = cell_content(first.number, CELLS_PER_SECTOR)
    elif what == "another write's number":
        cells[0] = cell_content(99, 0)
    else:
        cells[0] = cell_content(unsent.number, 0)
    with pytest.raises(Violation, match="nobody wrote"):
        story.history.answer(story.ask(Kind.READ), b"".join(cells))


def test_history_of_an_honest_disk_is_always_explained() -> None:
    """A disk that does one thing at a time, at a random moment between question and answer."""
    for seed in range(40):
        chance = random.Random(seed)
        story = Story()
        disk: list[int] = [ZEROES] * CELLS
        open_requests: list[tuple[Operation, list[int] | None]] = []
        for _ in range(120):
            choice = chance.random()
            if choice < 0.4:
                first = chance.randrange(CELLS)
                last = chance.randrange(first, CELLS) + 1
                kind = chance.choice((Kind.READ, Kind.READ, Kind.WRITE, Kind.WRITE, Kind.ZERO, Kind.TRIM))
                open_requests.append((story.ask(kind, first, last), None))
            elif open_requests:
                place = chance.randrange(len(open_requests))
                operation, seen = open_requests[place]
                if seen is None:
                    seen = disk[operation.first : operation.last]
                    takes_effect = operation.kind is not Kind.TRIM or chance.random() < 0.5
                    if operation.kind is not Kind.READ and takes_effect:
                        disk[operation.first : operation.last] = [operation.value] * len(seen)
                    open_requests[place] = (operation, seen)
                else:
                    del open_requests[place]
                    if chance.random() < 0.2:
                        story.history.settle(operation)
                        continue
                    cells = enumerate(seen, operation.first)
                    content = b"".join(cell_content(value, cell) for cell, value in cells)
                    story.history.answer(operation, content if operation.kind is Kind.READ else b"")
        story.history.check()
