"""The soak: real processes, real faults, clients that remember, for minutes.

``python -m tests.soak [--minutes N] [--seed S]``. It is the simulator's idea with nothing simulated, so a seed
is the same choices, not the same run: the machine decides what they meet.

What runs
    A manager and its domain server; a domain of two disks on two or three legs, each a group of nbdkit
    servers of images in memory (``devices.py``), linear or striped; four clients on its Unix socket with up to
    sixteen requests each in flight, of all kinds, at odd offsets and lengths, on few sectors so that they meet
    (``clients.py``).

What goes wrong (``chaos.py``)
    * Devices: killed and started again on what they held, also slow; stopped and continued; answering EIO.
    * The manager: killed, stopped for a while. The domain server: killed.
    * The operator: failovers, resyncs, and a third disk made, grown and removed, whenever he likes.
    * Clients: leaving politely, half-closed, or without a word, and coming back.

What is checked
    * By ``tests.sim.history``, the checker of the simulator: each cell of each disk is a linearizable register.
      No acknowledged write lost, no stale read, no torn sector, no read back in time. A write whose connection
      ended may have happened or not, until something of the next server's has been answered: no later.
    * No connection ends but with its server, and no server that has answered anything unless it was killed.
    * A client is told of an error only while devices had errors and there was no other leg that could do better.
    * A new disk reads as zeroes.
    * Every few seconds all is healed, and then: every request is answered, every leg becomes up to date, all of
      both disks is read, and the legs hold the same bytes, on their devices, as were read.
"""
