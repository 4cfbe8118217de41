"""Crash points: the manager is killed between every two persisted steps of every operation.

``python -m tests.crashpoints [OPERATION ...] [--commands]`` shows what each restart did;
``test_crash_points.py`` runs the same with pytest.

The manager that is killed is the real one, with a trap laid around every commit of its store and every
write to a device (``manager.py``): it counts them from the moment the trap is set and ends itself, as
``kill -9`` would, just before the n-th or just after it. ``--commands`` counts what it tells a domain
server too: what the two of them know of each other then differs in every way it can.

One operation is carried out once unharmed, which tells what the site looks like before and after, and how
many steps there are; then once for each step and side of it, on a site of its own, while a client works on a
disk that is not the operation's. After each the manager is started again, and then (``run.py``)

* the client has not noticed, and every acknowledged write is on every leg that can become active;
* the site is as before the operation or as after it: groups, domains, disks, sizes, who is active, how much
  of each group is free, and of each domain's space exactly what its disks need is taken;
* each domain that should serve does, no other domain server runs, and no other dirty bitmap is kept;
* the operation can be given again, as an operator would, and then has happened;
* all can be removed in the end, and of the devices nothing is kept.
"""
