"""The simulator: the software that ships, in a world where everything goes wrong.

``python -m tests.sim --seeds N [--seed S] [--steps K] [--jobs J] [--keep-going] [-v]``; ``scripts/simulate [N]``.
One seed is one world; the same seed of the same commit is the same world to the last bit. There is no wall clock
and no thread in it, and its one source of chance is the seed (``agenda.py``). What ships runs on trio, whose clock
is the world's (``clock.py``): when no task can go on, the world does, until one can.

What runs as it ships
    * the manager: ``Service``, ``Supervisor``, ``Session``, ``Legs``, ``Labels``, ``Link``, ``Failover``, and the
      store in SQLite;
    * the domain server: ``Server`` with its commands and events, the opening of legs with labels and locks, the
      dirty bitmap; the engine but for its submission layer (``proxy.engine.SimulatedEngine``).

What is simulated
    * *One domain* with up to three disks on one to three legs, each a group of one to three devices, linear or
      striped, with blocks of 512 or 4096 bytes, of different capabilities and speeds (``world.py``, ``groups.py``).
    * *Devices* (``devices.py``, ``medium.py``; ``opened.py`` on the control path) that are files or NBD servers,
      mixed. They keep what was written and what of it is durable. An operation lands at one moment or in two pieces
      at two, and is answered later; it may be slow, short, interrupted, unsupported, or fail having done nothing,
      part or all of it; a read may meet a bad block. A device may stall as a stopped process does and go on later,
      be out of reach, break its connections, break the protocol, and lose its power with any part of what is not
      durable. What it was asked for may then die, or land when nobody waits for it any more: of a file while its
      lock is still held, of another server at any time before the quarantine is over.
    * *Clients* (``clients.py``): one to three, up to sixteen requests in flight each: READ, WRITE, WRITE_ZEROES,
      TRIM, FLUSH, with and without FUA, at odd offsets and of odd lengths, long and short, on few sectors
      so that they meet. Bytes go both ways in pieces. They disconnect, half-close, vanish, and come back.
    * *Processes* (``server.py``, ``manager.py``), each killed at any moment, the manager also around each contact
      that it has with the world: every message (``channel.py``) and every commit, during which the world goes on.
      Operations in flight of a domain server then die, or land late.
    * *The host*: it loses its power with both processes, with what its files have not made durable, and with
      the dirty bitmap as it then is (``bitmapdisk.py``), damaged now and then. Its disk may be full.
    * *Replication* of the domain, synchronous or not; then with a backlog so small that legs fall behind.
    * *Operators* who accept losses, and order failovers, failbacks, resyncs, verifies, holds, moves to other groups,
      legs added and removed, maintenance, and disks made, grown and removed whenever they like. What the dirty bitmap
      says that a leg lacks is overwritten with rubbish before the leg is synced, and so is all space before it is a
      leg's, so that nothing of it can be relied on by chance.

What is checked
    From what clients were told alone (``history.py``, which knows nothing of engines or legs):
    * no acknowledged write lost, no stale read, no read back in time, ever, across all of the above: each cell of
      each disk is a linearizable register; a request that failed or was cut off took effect at once or never;
    * no torn sector, and no byte that nobody wrote there.
    From what the devices hold, when a client is answered:
    * a write is on every leg that the store calls up to date; a flush, or a FUA write, durably so; in an asynchronous
      domain it is on the active leg then, and on all of them when one of them takes over;
    * so is what a read has shown, so that no failover can take it back;
    * a leg that the store comes to call up to date has all that was ever acknowledged or flushed, and holds the same
      bytes as the active one but where a write is under way;
    * so have all legs at a planned switch, and if nothing was wrong with any of them, they hold the same bytes.
    * so have all legs, durably, when an operator's hold is reached, and none that serves changes until its end;
    * so have they when the domain is recorded to have ended cleanly;
    * what a failover is said to have lost is overwritten with zeroes: nothing else may be missing;
    * the space of a disk that is new, or grown, durably reads as zeroes.
    From what is sent where and when:
    * no byte goes to a leg once it is fenced, or to one that takes no part by the store; reads go to the active
      leg, and to an up-to-date backup only once another leg has answered with an error or legs are compared;
    * the space of a leg that leaves is given back only when nothing can land there any more;
    * nothing goes to any leg while the domain holds and has said that nothing runs any more;
    * a device that does not answer in time is told of;
    * no leg is admitted to a map while an old write can land on it, and no map is installed before its record is
      durable;
    * between the decision of a failover and its durable record nothing is acknowledged;
    * a leg is said to be drained, with nothing unproven, only when nothing can land on it any more, and is not used
      again before that;
    * a verify, at any moment, finds no difference and writes nothing;
    * a client is told of an error only when no leg could do better.
    At the end, with all faults off and everybody back:
    * the domain comes to rest: every request is answered, every leg is up to date (liveness);
    * all legs hold the same bytes, every disk reads as it must, and no memory of the engine is still taken.

What a loss of power may take
    What was acknowledged and not flushed, if the leg that is served from afterwards had it in no durable place: of
    each cell then holds what was flushed last, or anything later (``History.power_lost``).

What is not
    Threads and io_uring itself (the integration tests run those), negotiation, mounts, more than one domain, and
    whatever the promise excludes: a domain whose up-to-date legs are all gone has to wait for one, and does; the
    last such leg does not lose its power by itself; another server has done with what came over a lost
    connection before the quarantine is over.

That all of this is looked at closely enough is shown by ``mutants.py``: deliberate breaches, each of which has to be
found.

To look into a failure, run its seed alone with ``-v``: what the shipping code logs, every record, every event of
the engine, every answer, every order and every piece of trouble, with the simulated time.
"""
