"""The simulator: the shipping engine and the shipping state machine, in a world where everything goes wrong.

``python -m tests.sim --seeds N [--seed S] [--steps K] [-v]``. One seed is one world; the same seed of the same
commit is the same world to the last bit. There is no wall clock, no thread and no system call in it, and its
one source of chance is the seed (``agenda.py``).

What is simulated
    * *One domain* of one or two disks on one to three legs, each a group of one to three devices, linear or
      striped, with blocks of 512 or 4096 bytes, of different capabilities and speeds (``world.py``).
    * *Devices* (``devices.py``, ``medium.py``) that are files or NBD servers, mixed. They keep what was written
      and what of it is durable. An operation lands at one moment or in two pieces at two, and is answered later;
      it may be slow, short, interrupted, unsupported, or fail having done nothing, part or all of it; a read may
      meet a bad block. A device may stall as a stopped process does and go on later, be out of reach, break its
      connections, and break the protocol. What it was asked for may then die, or land long after nobody waits
      for it any more.
    * *Clients* (``clients.py``): one to three, up to sixteen requests in flight each: READ, WRITE, WRITE_ZEROES,
      TRIM, FLUSH, with and without FUA, at odd offsets and of odd lengths, long and short, on few sectors
      so that they meet. Bytes go both ways in pieces. They disconnect, half-close, vanish, and come back.
    * *The domain server* (``server.py``): the engine (``proxy.engine.SimulatedEngine``, which is the one that
      ships but for the submission layer), killed at any moment. Operations in flight then die, or land late.
      As in production a new one is started only when nothing of the old can land any more: locks on files
      tell that of files, quarantine of other servers.
    * *The manager* (``manager.py``): ``proxy.failover.Failover`` with a driver that keeps to the rules of
      ``proxy.manager.session``. It hears of events a little late and is killed between any two steps, also
      between a commit and the word of it. A new one adopts the domain server.
    * *The store*: one record, changed after a while, or refused because the disk is full.
    * *An operator* who orders failovers, resyncs, holds, verifies and moves to other groups whenever he likes. The
      content of a leg that is outdated is overwritten with rubbish before it is synced, so that nothing of it can
      be relied on by chance.

What is checked
    From what clients were told alone (``history.py``, which knows nothing of engines or legs):
    * no acknowledged write lost, no stale read, no read back in time, ever, across all of the above: each cell of
      each disk is a linearizable register; a request that failed or was cut off took effect at once or never;
    * no torn sector, and no byte that nobody wrote there.
    From what the devices hold, when a client is answered:
    * a write is on every leg that the store calls up to date; a flush, or a FUA write, durably so;
    * so is what a read has shown, so that no failover can take it back;
    * a leg that the store comes to call up to date has all that was ever acknowledged or flushed, and holds the same
      bytes as the active one but where a write is under way;
    * so have all legs at a planned switch, and if nothing was wrong with any of them, they hold the same bytes.
    * so have all legs, durably, when an operator's hold is reached, and none that serves changes until its end.
    From what is sent where and when:
    * no byte goes to a leg once it is fenced, or to one that takes no part by the store; reads go to the active
      leg, and to an up-to-date backup only once another leg has answered with an error or legs are compared;
    * the space of a leg that leaves is given back only when nothing can land there any more;
    * nothing goes to any leg while the domain holds and has said that nothing runs any more;
    * a device that does not answer in time is told of;
    * between the decision of a failover and its durable record nothing is acknowledged;
    * a leg is said to be drained, with nothing unproven, only when nothing can land on it any more, and is not used
      again before that;
    * a verify, at any moment, finds no difference and writes nothing;
    * a client is told of an error only when no leg could do better.
    At the end, with all faults off and everybody back:
    * the domain comes to rest: every request is answered, every leg is up to date (liveness);
    * all legs hold the same bytes, every disk reads as it must, and no memory of the engine is still taken.

What is not
    The loss of power of the whole host (a flush's promise is checked against the devices instead), threads and
    io_uring itself (the integration tests run those), negotiation, more than one domain, and whatever the
    promise excludes: a domain whose up-to-date legs are all gone has to wait for one, and does.

That all of this is looked at closely enough is shown by ``mutants.py``: deliberate breaches, each of which has to be
found.

To look into a failure, run its seed alone with ``-v``: every input and effect of the state machine, every event
of the engine, every answer and every piece of trouble, with the simulated time.
"""
