"""The command line: a thin client of the manager's HTTP API, over its control socket.

========================  ==========================================================================
``main``                  the entry point, and the boundary: whatever goes wrong is one line on stderr
``app``                   the tree of commands; ``groups``, ``domains``, ``disks``, ``operations``,
                          ``events`` and ``server`` are its branches
``client``                one request to the manager; what it refuses, and that it is not there
``objects``               the shapes of the manager's answers
``readiness``, ``plan``   pure: whether a domain is ready, what a failover would do
``waiting``               until a domain is ready, with bars or lines that show how far it is
``render``                pure: objects as tables for people
``output``                the only place that writes to stdout
========================  ==========================================================================

Exit status: 0 done; 1 refused or failed, with one line on stderr; 2 usage; 130 interrupted; 141 the
reader of stdout has gone.
"""
