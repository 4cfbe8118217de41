"""A simulated socket between the manager and a domain server: bytes arrive later, in order, in pieces."""

from collections.abc import Callable

import trio

from tests.sim.agenda import MICROSECOND_NS, MILLISECOND_NS, Agenda

#: How long bytes are under way at most; now and then a process is not given its turn for longer.
_DELAYS_NS = (50 * MICROSECOND_NS, 200 * MICROSECOND_NS, 3 * MILLISECOND_NS)


class End(trio.abc.Stream):
    """One end of a connection.

    Args:
        contact: called before and after everything this end sends; raises when its process is dead.
    """

    def __init__(self, agenda: Agenda, contact: Callable[[], None]) -> None:
        self.peer: End
        self._agenda = agenda
        self._contact = contact
        self._arrived = trio.Event()
        self._inbox = bytearray()
        self._ended = False  # nothing follows the inbox
        self._closed = False
        self._last_ns = 0  # when the last thing on its way here arrives

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send; the other end has it a little later."""
        await trio.lowlevel.checkpoint()
        self._contact()
        if self._closed:
            raise trio.ClosedResourceError
        if self.peer._closed:
            raise trio.BrokenResourceError
        sent = bytes(data)
        self.peer._later(lambda: self.peer._take(sent))
        self._contact()

    async def wait_send_all_might_not_block(self) -> None:
        """Return at once: there is always room."""
        await trio.lowlevel.checkpoint()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """What has arrived; empty when the other end is gone."""
        await trio.lowlevel.checkpoint()
        while not self._inbox and not self._ended:
            if self._closed:
                raise trio.ClosedResourceError
            self._arrived = trio.Event()
            await self._arrived.wait()
        length = len(self._inbox) if self._agenda.chance(0.8) else (len(self._inbox) + 1) // 2
        data = bytes(self._inbox[:length])
        del self._inbox[:length]
        return data

    async def aclose(self) -> None:
        """Close it."""
        self.close()
        await trio.lowlevel.checkpoint()

    def close(self) -> None:
        """Close it, as a kernel does for a process that ended: what was sent still arrives."""
        if not self._closed:
            self._closed = True
            self._arrived.set()
            self.peer._later(self.peer._take_end)

    def _later(self, action: Callable[[], None]) -> None:
        """Have something arrive here, behind all that is on its way already."""
        delay_ns = self._agenda.random.randrange(self._agenda.random.choice(_DELAYS_NS))
        self._last_ns = max(self._last_ns, self._agenda.now_ns + delay_ns)
        self._agenda.after(self._last_ns - self._agenda.now_ns, action)

    def _take(self, data: bytes) -> None:
        self._inbox += data
        self._arrived.set()

    def _take_end(self) -> None:
        self._ended = True
        self._arrived.set()


def connection(
    agenda: Agenda, contact: Callable[[], None], other_contact: Callable[[], None]
) -> tuple[End, End]:
    """Both ends of a new connection."""
    one, other = End(agenda, contact), End(agenda, other_contact)
    one.peer, other.peer = other, one
    return one, other
