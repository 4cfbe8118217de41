"""The process that serves one domain to its clients.

One process for each domain that is online, so that the crash of one touches no other. It has an engine
(the data thread) and a control thread on trio, which does what is not the data path: it negotiates
with NBD clients and hands their sockets over (``doors``), opens devices (``legs``), and obeys the
manager on a control channel (``control``). It decides nothing: what it is told to hold, fence and
install it does, and what it sees it tells.

It outlives its manager. While there is none it goes on serving, keeps what speaks against a leg, and
tells the next manager that connects. It starts held, and with nothing to serve; only a manager that
has a durable record gives it a map.

Concurrency: commands of the manager are carried out one at a time, in order, and every event the engine
had put out before a command's reply is sent before that reply. So when the manager reads a reply it
has seen everything that was true when the command took effect.
"""
