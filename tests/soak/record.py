"""The history of a run that is too long to be kept whole."""

from collections import Counter

from tests.sim.history import ZEROES, Cell, History, Kind, Operation


class LongHistory(History):
    """A history of which only what is still on the disks is kept from time to time.

    Attributes:
        happened: how often what was done or went wrong.
    """

    def __init__(self, cells: dict[int, int]) -> None:
        super().__init__(cells)
        self.happened: Counter[str] = Counter()
        self._last_number = 0

    def new(self, kind: Kind, disk: int, first: int, last: int, *, durable: bool = False) -> Operation:
        """See ``History.new``; numbers go on although operations are forgotten."""
        self._last_number += 1
        operation = Operation(self._last_number, kind, disk, first, last, durable)
        self.operations[operation.number] = operation
        return operation

    def forget(self) -> None:
        """Forget all but what each cell held when it was read last.

        Every cell must have been read since the last request that could change it was settled.
        """
        kept: dict[int, Operation] = {}
        for cells in self.cells.values():
            for place, cell in enumerate(cells):
                value = cell.reads[-1].value
                cells[place] = Cell(reads=cell.reads[-1:])
                if value != ZEROES:
                    kept[value] = self.operations[value]
                    cells[place].writes.append(kept[value])
        self.operations = kept
        self._unflushed.clear()
        self._flush_covers.clear()
        self.flushed.clear()
