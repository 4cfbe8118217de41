"""Standfast: storage addresses that stand fast while the storage behind them changes.

The package is laid out as pure cores with thin drivers:

* ``model``, ``extentmap``, ``allocator``, ``label``, ``failover``, ``sizes``, ``errors`` — pure:
  they import no trio, socket, os or time, decide everything and do nothing.
* ``engine`` — the data plane: one thread, one ring, no Python from first byte to last.
* ``domainserver`` — the process that serves one domain: negotiation and control around an engine.
* ``manager`` — the daemon that owns the store, decides, and never carries data.
* ``store`` — what survives: SQLite.
* ``cli`` — a thin client of the manager's HTTP API.

What a device can be lives beside this package, in ``backends``, which never imports ``proxy``.
"""
