"""The data plane: from a client's socket to the devices of every leg and back, without Python.

Scheduling model
    One engine, one ring, one *data thread* (``Engine.start``), which never takes the GIL, never
    allocates and never blocks but in the ring. It works in batches: take in everything that has
    completed, do what follows from it, submit and send all of that at once (``loop.pxi``). What
    a function of the data thread does is atomic as seen by every client, since the next batch
    begins only when it has returned.
    The *control thread* (Python, trio) gives commands through a mailbox, carried out between two
    batches, and takes events from a queue whose ``event_fd`` it waits on. Nothing else is shared.

One write, from the socket to the devices of two legs and back
    1. ``door.pxi`` ``connection_parse``: header, check, buffer of the arena, payload into it.
    2. ``requests.pxi`` ``admit``: kept if the domain holds; ``claims.pxi``: waits if an earlier
       request overlaps it; ``dirty.pxi``: waits until its regions are marked; ``start``: bound to
       the installed map.
    3. ``issue_span``: for each leg, extent by extent (``extents.pxi``), one sub-operation each;
       ``file.pxi`` hands it to the ring, ``remote.pxi`` to the stream of an NBD server.
    4. ``subop_end``, ``advance``: the last one to complete ends the request, or parks it.
    5. ``connection_answer``, ``connection_send``: all answers of the batch in one send.

What holds, always (the numbers are the invariants of the project)
    * A request runs under exactly one map. If a leg fails it, it is *parked* with its claim and done
      again, whole, under the next map (3).
    * While the domain *holds* nothing is issued for a client and nothing but reads is answered (2).
    * Once ``fence`` returns, no byte goes to that leg. What is in flight there is waited for by
      nobody, but counted: LEG_DRAINED tells when the last has come back, and whether the fate of
      any is unknown. Buffers live until then (4).
    * An answer to a write means that every leg of its map had it; if one had not, that leg is gone
      from the map under which the write was then done again (5). A flush goes to all legs (6). An asynchronous
      map's other legs get both later, in the order of the answers, and nobody takes over before it has all of
      them (``backlog.pxi``).
    * Nothing is written to a region before that is marked, durably, in the dirty bitmap (8).
    * A read of the active leg that meets a medium error is done again on an uptodate backup under the same map
      and claim; what was bad is then copied back by a request that claims it as a writer (7, 9). It is evidence
      against the leg only where there is no such backup, or the copy fails.
    * Overlapping requests run in order of arrival, on all legs alike, and reads wait for writes, so
      legs never diverge and no read shows what a failover could take back (7). Copies and verifies
      claim too (9).
    * Requests and bytes per connection, the arena, and every pool are bounded (10).

Who owns what
    A descriptor given to ``add_leg`` or ``add_connection`` is the engine's; it is closed when
    ``events()`` returns LEG_CLOSED or CONNECTION_CLOSED. Extent maps given to ``install`` must not
    change; they are let go at MAP_RETIRED.

Files
    ``ring.pxi`` is the submission layer, ``uring.pxi`` and ``simulator.pxi`` its two implementations;
    ``core.pxi`` all state; ``arena.pxi`` memory; ``claims.pxi``, ``extents.pxi``; ``requests.pxi``
    the life of a request; ``bitmap.pxi`` and ``dirty.pxi`` the dirty bitmap; ``backlog.pxi`` legs that
    lag; ``stream.pxi`` sockets, used by ``door.pxi`` and ``remote.pxi``; ``copier.pxi``,
    ``repairer.pxi``, ``verifier.pxi`` and ``prober.pxi`` what the engine does of its own accord; ``loop.pxi``;
    ``_engine.pyx`` the Python face. They are one C unit on purpose.
    ``mutants.pxi`` is nothing in the build that ships; in a test build it breaks rules on request.
"""

from proxy.engine._engine import Engine, SimulatedEngine
from proxy.engine.types import (
    DeviceKind,
    DeviceSpec,
    DeviceStatistics,
    Event,
    EventKind,
    LegRole,
    Mismatch,
    OpKind,
    PendingOp,
    RequestKind,
    Statistics,
    Tracking,
    VerifyReport,
)

__all__ = [
    "DeviceKind",
    "DeviceSpec",
    "DeviceStatistics",
    "Engine",
    "Event",
    "EventKind",
    "LegRole",
    "Mismatch",
    "OpKind",
    "PendingOp",
    "RequestKind",
    "SimulatedEngine",
    "Statistics",
    "Tracking",
    "VerifyReport",
]
