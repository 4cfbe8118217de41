"""Side-by-side benchmarks: what is measured, how, and what the figures mean.

``python -m bench compare``
    The same fio jobs against Standfast and the peers found on this machine (``systems``, ``workloads``).
    Everything runs on one host over unix sockets and RAM-backed files of one size, filled before, so that
    what is compared is the servers and nothing below them. Inside each workload and round every system has
    its turn before any has the next, and the order is rotated, so what else the machine does hits all alike.
    A figure is the median over the rounds; a ratio is the median of the ratios within each round.

``python -m bench failover``
    How long clients are stalled when a device's server dies under load, told by Standfast and, on its own, by
    the client.

``python -m bench extents``
    What look-up costs in a map of a million extents, against one of three.

Each prints its tables and writes them, with the commands that made them, as JSON into ``--out``.

One reason to exist for each file: ``fio`` runs the client and reads its report, ``cpu`` asks what a server
used, ``server`` starts and ends processes, ``site`` is a manager with its control socket, ``results`` is the
arithmetic, ``targets`` the figures to reach, ``report`` the tables, ``meta`` the circumstances.
"""
