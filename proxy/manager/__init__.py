"""The daemon that decides: who is active, what is fenced, when to fail over. It never carries data.

One task for each domain (``supervisor``) owns that domain's state machine (``proxy.failover``) and its
domain server: it starts it or adopts the one that runs, feeds the machine what the server tells, and
carries out, in order, what the machine says. Orders of operators go through the same queue, so
nothing about a domain ever happens twice at once.

The scheduling model
    Everything runs on one trio thread. Between two awaits nothing else runs; calls of the store do not
    await. Whatever must be atomic is written between two awaits; a new await there breaks it.

What a crash leaves
    ===============================================  ===========================================
    killed                                           the next manager finds
    ===============================================  ===========================================
    before MakeDurable has returned                  the old record; the server holds; it decides anew
    after it, before Install                         the new record, the server under an old map: it
                                                     fences what the record says is outdated, records
                                                     the next generation, installs, releases
    after Install, before Release                    as above
    in the middle of a copy                          the copy goes on in the server, or starts over
    in the middle of a verify                        the verify goes on in the server, or its result is
                                                     kept there until a manager has recorded it
    the domain server, at any point                  ``session_open`` in the store: backups are given what
                                                     the dirty bitmap says, or all, before they count
    ===============================================  ===========================================
"""
