"""The command line against a real manager: what operators type, what they are told, what is left behind.

One manager serves all tests that do not need their own. Those of bad input look before and after: a
command that is refused leaves the lists, the images and the run directory as they were.
"""

import gc
import json
import os
import select
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from backends.nbdnegotiation import ClientNegotiation
from proxy.cli.main import main

STANDFAST = (sys.executable, "-m", "proxy.cli.main")
PATIENCE_S = 30.0
#: A manager without clients ends at once; it gives requests under way 2 s.
END_PATIENCE_S = 8.0

#: The library leaves the socket of a connection that was refused to the garbage collector.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
]


@pytest.fixture(autouse=True, scope="module")
def _sockets_collected() -> Iterator[None]:
    """Have the garbage collector find them while the filter is in force, not in somebody else's test."""
    yield
    gc.collect()


def one_line(done: tuple[int, str, str]) -> str:
    """What a command says that has failed: one line, and nothing else."""
    status, printed, said = done
    assert (status, printed) == (1, ""), said
    assert said.startswith("standfast: ")
    assert said.endswith("\n")
    assert said.count("\n") == 1
    return said


@dataclass
class Place:
    """Directories of one manager, and what runs there."""

    root: Path
    run: Path
    manager: "subprocess.Popen[bytes] | None" = None
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def state(self) -> Path:
        return self.root / "state"

    @property
    def log(self) -> str:
        return (self.root / "serve.log").read_text()

    def url(self, name: str, size: str | None = "10M") -> str:
        """A file device of this place."""
        return f"file://{self.root}/{name}" + (f"?size={size}" if size else "")

    def command(self, *arguments: str) -> tuple[int, str, str]:
        """The status of one command line, what it prints and what it says on stderr; in this process."""
        with redirect_stdout(StringIO()) as printed, redirect_stderr(StringIO()) as said:
            status = main([*arguments, "--run", str(self.run)])
        return status, printed.getvalue(), said.getvalue()

    def process(self, *arguments: str) -> tuple[int, str, str]:
        """The same in a process of its own, which finds the manager by the variable."""
        done = subprocess.run(
            [*STANDFAST, *arguments], capture_output=True, text=True, env=self._variables(), timeout=60
        )
        return done.returncode, done.stdout, done.stderr

    def ok(self, *arguments: str) -> str:
        """What a command that succeeds prints; it must not say a word on stderr."""
        status, printed, said = self.command(*arguments)
        assert (status, said) == (0, ""), f"{arguments}: {said}{self.log}"
        return printed

    def refused(self, *arguments: str) -> str:
        """The one line of a command that fails."""
        return one_line(self.command(*arguments))

    def json(self, *arguments: str) -> Any:
        """The object a command prints."""
        return json.loads(self.ok(*arguments, "--json"))

    def start(self, *options: str) -> None:
        """Start the manager, and wait until it is ready."""
        self.manager = self._serve("--state", str(self.state), *options)
        deadline = time.monotonic() + PATIENCE_S
        with socket.socket(socket.AF_UNIX) as probe:
            while probe.connect_ex(str(self.run / "control.sock")):
                assert self.manager.poll() is None, self.log
                assert time.monotonic() < deadline, self.log
                time.sleep(0.02)  # nothing tells when a socket comes to be

    @contextmanager
    def serving(self, *options: str) -> Iterator["subprocess.Popen[bytes]"]:
        """Another manager in the same run directory, for as long as the context lasts."""
        other = self._serve(*options)
        try:
            yield other
        finally:
            other.kill()
            other.wait()

    def _serve(self, *options: str) -> "subprocess.Popen[bytes]":
        with (self.root / "serve.log").open("ab") as log:
            return subprocess.Popen(
                [*STANDFAST, "serve", *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._variables(),
            )

    def terminate(self) -> int:
        """Tell the manager to end; its exit status."""
        assert self.manager is not None
        self.manager.terminate()
        return self.manager.wait(END_PATIENCE_S)

    def servers(self) -> list[int]:
        """Processes that have this place's run directory in their command line, but the manager."""
        found = []
        for status in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                words = status.read_bytes().split(b"\0")
                pid = int(status.parent.name)
                if any(word.startswith(bytes(self.run) + b"/") for word in words) and pid != os.getpid():
                    found.append(pid)
        return found

    def files(self) -> dict[str, object]:
        """All that a refused command might leave: images with their content, and sockets' directories."""
        images = {
            path.name: path.read_bytes() if path.is_file() else None
            for path in self.root.iterdir()
            if path.name not in ("state", "serve.log")
        }
        return {**images, "run": sorted(path.name for path in self.run.glob("*"))}

    def close(self) -> None:
        """End every process of this place, and remove it."""
        if self.manager is not None:
            self.manager.kill()
            self.manager.wait()
        for pid in self.servers():
            with suppress(ProcessLookupError):
                server = os.pidfd_open(pid)
                signal.pidfd_send_signal(server, signal.SIGKILL)
                select.select([server], [], [], PATIENCE_S)
                os.close(server)
        left = self.servers()
        shutil.rmtree(self.root)
        assert left == []

    def _variables(self) -> Mapping[str, str]:
        return {**os.environ, "STANDFAST_RUN": str(self.run), **self.environment}


@contextmanager
def opened_place(run: str = "run") -> Iterator[Place]:
    """A place, without a manager yet. Its paths are short, because a socket's has to be."""
    root = Path(tempfile.mkdtemp(prefix="sf", dir="/dev/shm"))
    place = Place(root, root / run)
    try:
        yield place
    finally:
        place.close()


@pytest.fixture
def own() -> Iterator[Place]:
    """A place of one test's own, without a manager."""
    with opened_place() as place:
        yield place


@pytest.fixture(scope="module")
def shared() -> Iterator[Place]:
    """A manager with groups alpha, beta, gamma of 10 MB; vol1 on alpha and beta; solo on gamma; idle, stopped."""
    with opened_place() as place:
        place.start()
        for name in ("alpha", "beta", "gamma"):
            place.ok("group", "create", name, "--device", place.url(name))
        place.ok("domain", "create", "vol1", "--size", "4M", "--active", "alpha", "--backup", "beta")
        place.ok("disk", "create", "vol1/disk1", "--size", "1M")
        place.ok("domain", "wait", "vol1", "--timeout", "30")
        place.ok("domain", "create", "solo", "--size", "1M", "--active", "gamma")
        place.ok("domain", "create", "idle", "--size", "1M", "--active", "gamma")
        place.ok("domain", "stop", "idle")
        yield place


def lists(place: Place) -> list[str]:
    """What there is."""
    return [place.ok(what, "list", "--json") for what in ("group", "domain", "disk")]


# --- The life of a domain -------------------------------------------------------------------------


def test_commands_in_order_take_a_domain_through_its_life(own: Place) -> None:
    own.start()
    assert json.loads(own.process("status", "--json")[1])["ready"] is True
    for group, count in (("alpha", 3), ("beta", 2)):
        devices = [part for n in range(count) for part in ("--device", own.url(f"{group}{n}"))]
        assert "created" in own.ok("group", "create", group, *devices)
    assert own.json("group", "show", "alpha")["devices"][2]["position"] == 2

    created = own.ok("domain", "create", "vol1", "--size", "16M", "--active", "alpha", "--backup", "beta")
    assert created == "domain vol1 created: 16M, online, active is alpha\n" or "degraded" in created
    printed = own.ok("disk", "create", "vol1/disk1", "--size", "8M")
    uri = f"nbd+unix:///disk1?socket={own.run}/vol1/nbd.sock"
    assert printed == f"disk vol1/disk1 created: 8M at {uri}\n"
    assert own.ok("domain", "wait", "vol1", "--timeout", "30").endswith(
        "domain vol1 is online and every backup is uptodate\n"
    )
    assert own.json("disk", "show", "vol1/disk1")["nbd_uri"] == uri
    assert uri in own.ok("domain", "show", "vol1")
    assert subprocess.run(["nbdinfo", "--size", uri], capture_output=True).stdout == b"8388608\n"

    before = own.json("domain", "show", "vol1")
    plan = own.json("failover", "vol1", "--dry-run")
    assert (plan["from"], plan["to"]) == ("alpha", "beta")
    assert [plan[leg]["extent_count"] for leg in ("before", "after")] == [2, 2]
    assert own.json("domain", "show", "vol1")["map_generation"] == before["map_generation"]

    assert own.ok("failover", "vol1").startswith("domain vol1: active is beta now")
    after = own.json("domain", "show", "vol1")
    assert (after["active"], after["last_failover"]["from"]) == ("beta", "alpha")
    assert after["address"] == before["address"]
    assert subprocess.run(["nbdinfo", "--size", uri], capture_output=True).stdout == b"8388608\n"

    assert [leg["state"] for leg in after["legs"]] == ["uptodate", "uptodate"]
    assert own.ok("failback", "vol1").startswith("domain vol1: active is alpha now")
    assert own.ok("failover", "vol1", "--to", "beta").startswith("domain vol1: active is beta now")
    assert own.ok("domain", "set", "vol1", "--failback", "90") == (
        "domain vol1: failback is 90, accept-loss is manual, no-leg is hold now\n"
    )
    assert "90 s after the preferred leg is uptodate" in own.ok("domain", "show", "vol1")

    own.ok("group", "create", "gamma", "--device", own.url("gamma", "20M"))
    assert own.ok("domain", "hold", "vol1").startswith("domain vol1 is held")
    assert "held by the operator" in own.ok("domain", "show", "vol1")
    assert own.ok("domain", "release", "vol1") == "domain vol1 is released, and online\n"
    assert own.ok("domain", "migrate", "vol1", "--to", "gamma").endswith(
        "domain vol1 has moved to gamma; active is gamma\n"
    )
    assert own.ok("domain", "add-leg", "vol1", "beta") == "domain vol1: beta is a backup now, and syncing\n"
    assert own.ok("domain", "remove-leg", "vol1", "beta").endswith("domain vol1 has left beta\n")
    assert [leg["group"] for leg in own.json("domain", "show", "vol1")["legs"]] == ["alpha", "gamma"]

    assert own.ok("domain", "maintenance", "vol1") == "domain vol1 is in maintenance\n"
    assert own.json("domain", "list")[0]["state"] == "maintenance"
    assert own.ok("domain", "activate", "vol1").startswith("domain vol1 is ")
    assert own.json("disk", "resize", "vol1/disk1", "--size", "12M")["size"] == 12 << 20
    assert subprocess.run(["nbdinfo", "--size", uri], capture_output=True).stdout == b"12582912\n"

    assert "ordered by the operator" in own.ok("events")
    messages = [json.loads(line)["message"] for line in own.ok("events", "--json").splitlines()]
    assert "domain vol1 failed over from alpha to beta: ordered by the operator" in messages

    assert own.ok("disk", "remove", "vol1/disk1") == "disk vol1/disk1 removed\n"
    assert own.ok("domain", "remove", "vol1") == "domain vol1 removed\n"
    assert own.json("group", "remove", "alpha") == {"unreached": []}
    for group in ("beta", "gamma"):
        own.ok("group", "remove", group)
    for what in ("group", "domain", "disk"):
        assert own.json(what, "list") == []
    assert own.files()["run"] == ["control.sock", "lock"]
    assert own.servers() == []


def test_installed_command_is_this_one() -> None:
    installed = Path(sys.executable).with_name("standfast")
    done = subprocess.run([installed, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()[0], done.stderr) == (0, "standfast", "")


@pytest.mark.parametrize(
    "arguments",
    [
        "status",
        "group list",
        "group show alpha",
        "domain list",
        "domain show vol1",
        "disk list",
        "disk list vol1",
        "disk show vol1/disk1",
        "failover vol1 --dry-run",
        "domain wait vol1",
    ],
)
def test_read_command_prints_a_table_or_one_json_value(shared: Place, arguments: str) -> None:
    assert shared.ok(*arguments.split()).strip()
    assert shared.json(*arguments.split())


# --- Bad input: groups ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "devices", "options", "said"),
    [
        ("g", ["foo:///x"], [], "unknown scheme 'foo'"),
        ("g", ["/dev/sda"], [], "has no scheme"),
        ("g", ["file://ROOT/missing"], [], "there is no such file"),
        ("g", ["file://ROOT/new?size=10M", "file://ROOT/missing"], [], "there is no such file"),
        ("g", ["file://ROOT/new?size=10M", "file://ROOT/new?size=10M"], [], "is the same device"),
        ("g", ["file://ROOT/none/new?size=10M"], [], "there is no directory"),
        ("g", ["file://ROOT?size=10M"], [], "is not a regular file"),
        ("g", ["file://ROOT/new?size=10Q"], [], "size '10Q' is not a number"),
        ("g", ["file://ROOT/new?sise=10M"], [], "unknown parameter 'sise'"),
        ("g", ["file://ROOT/new?size=1K"], [], "is too small"),
        ("g", ["nbd+unix:///?socket=ROOT/nobody.sock"], [], "cannot connect"),
        ("g", ["file://ROOT/new?size=10M"], ["--layout", "mirrored"], "neither linear nor striped"),
        ("g", ["file://ROOT/new?size=10M"], ["--layout", "striped:3K"], "a power of two"),
        ("alpha", ["file://ROOT/new?size=10M"], [], "there is a group alpha already"),
        ("a b", ["file://ROOT/new?size=10M"], [], "group name 'a b' must be"),
        ("../g", ["file://ROOT/new?size=10M"], [], "group name '../g' must be"),
        ("", ["file://ROOT/new?size=10M"], [], "group name '' must be"),
        ("g" * 64, ["file://ROOT/new?size=10M"], [], "must be 1 to 63"),
        ("g\n", ["file://ROOT/new?size=10M"], [], "must be 1 to 63"),
        ("g", ["file://ROOT/alpha"], [], "is a device of group alpha"),
        ("g", ["file://ROOT/alpha"], ["--force"], "is a device of group alpha"),
    ],
)
def test_group_create_from_bad_input_is_refused_and_leaves_nothing(
    shared: Place,
    name: str,
    devices: list[str],
    options: list[str],
    said: str,
) -> None:
    before = lists(shared), shared.files()
    urls = [device.replace("ROOT", str(shared.root)) for device in devices]
    given = [part for url in urls for part in ("--device", url)]
    assert said in shared.refused("group", "create", name, *given, *options)
    assert (lists(shared), shared.files()) == before


def test_group_create_on_a_file_system_needs_force(shared: Place) -> None:
    image = shared.root / "ext4"
    image.write_bytes(b"")
    os.truncate(image, 10 << 20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    before = image.read_bytes()
    url = shared.url("ext4", None)
    line = shared.refused("group", "create", "taken", "--device", url)
    assert "ext4" in line
    assert "--force" in line
    assert image.read_bytes() == before
    shared.ok("group", "create", "taken", "--device", url, "--force")
    shared.ok("group", "remove", "taken")
    image.unlink()


def test_group_remove_while_a_domain_uses_it_is_refused(shared: Place) -> None:
    before = shared.files()
    assert "is used by domain vol1" in shared.refused("group", "remove", "alpha")
    assert shared.files() == before


# --- Bad input: domains and disks -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size", "options", "said"),
    [
        ("new", "5X", "--active beta", "size '5X' is not a number"),
        ("new", "", "--active beta", "size '' is not a number"),
        ("new", "0", "--active beta", "must be larger than zero"),
        ("new", "-5", "--active beta", "size '-5' is not a number"),
        ("new", "1.0000001K", "--active beta", "whole number of bytes"),
        ("new", "99999999T", "--active beta", "is larger than"),
        ("new", "50M", "--active beta", "group beta (linear) has"),
        ("new", "1M", "--active nope", "there is no group nope"),
        ("new", "1M", "--active beta --backup nope", "there is no group nope"),
        ("new", "1M", "--active beta --backup beta", "named twice"),
        ("new", "1M", "--active a --backup b --backup c --backup d --backup e", "at most 4"),
        ("new", "1M", "--active beta --replication maybe", "neither sync nor async"),
        ("new", "1M", "--active beta --listen 10809", "is not HOST:PORT"),
        ("new", "1M", "--active beta --listen 127.0.0.1:99999", "is not HOST:PORT"),
        ("new", "1M", "--active beta --listen 192.0.2.1:10809", "cannot be put online"),
        ("vol1", "1M", "--active beta", "there is a domain vol1 already"),
        ("a/b", "1M", "--active beta", "domain name 'a/b' must be"),
        ("..", "1M", "--active beta", "domain name '..' must be"),
        ("v" * 64, "1M", "--active beta", "must be 1 to 63"),
    ],
)
def test_domain_create_from_bad_input_is_refused_and_leaves_nothing(
    shared: Place, name: str, size: str, options: str, said: str
) -> None:
    before = lists(shared), shared.files()
    assert said in shared.refused("domain", "create", name, "--size", size, *options.split())
    assert (lists(shared), shared.files()) == before


def test_domain_create_on_a_port_in_use_is_refused_and_leaves_nothing(shared: Place) -> None:
    before = lists(shared), shared.files()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        line = shared.refused(
            *("domain", "create", "new", "--size", "1M", "--active", "beta", "--listen", address),
        )
    assert "in use" in line
    assert (lists(shared), shared.files()) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("disk create nope/disk1 --size 1M", "there is no domain nope"),
        ("disk create vol1/disk1 --size 1M", "there is a disk vol1/disk1 already"),
        ("disk create vol1/a/b --size 1M", "disk name 'a/b' must be"),
        ("disk create vol1/-x --size 1M", "disk name '-x' must be"),
        ("disk create vol1/new --size 1Z", "size '1Z' is not a number"),
        ("disk create vol1/new --size 1G", "short"),
        ("disk create idle/new --size 64K", "domain idle is in maintenance; start it first"),
        ("disk resize vol1/disk1 --size 512K", "it cannot shrink"),
        ("disk resize vol1/disk1 --size 1G", "short"),
        ("disk resize vol1/disk1 --size many", "size 'many' is not a number"),
        ("disk resize vol1/nope --size 1M", "there is no disk vol1/nope"),
        ("disk remove vol1/nope", "there is no disk vol1/nope"),
        ("disk show vol1/nope", "there is no disk vol1/nope"),
        ("disk show nope/disk1", "there is no domain nope"),
        ("disk list nope", "there is no domain nope"),
        ("group show nope", "there is no group nope"),
        ("group remove nope", "there is no group nope"),
        ("domain show nope", "there is no domain nope"),
        ("domain show a/b", "there is no domain 'a/b'"),
        ("domain start nope", "there is no domain nope"),
        ("domain stop nope", "there is no domain nope"),
        ("domain remove nope", "there is no domain nope"),
        ("domain wait nope", "there is no domain nope"),
        ("domain wait idle", "standfast domain start idle"),
        ("failover nope", "there is no domain nope"),
        ("failover nope --dry-run", "there is no domain nope"),
        ("resync nope", "there is no domain nope"),
        ("resync vol1", "no outdated leg"),
        ("resync vol1 --group beta", "beta is uptodate"),
        ("resync vol1 --group nope", "no leg on a group nope"),
        ("failback nope", "there is no domain nope"),
        ("failback vol1", "domain vol1 is on its preferred leg alpha already"),
        ("failback idle", "domain idle is in maintenance; start it first"),
        ("domain hold nope", "there is no domain nope"),
        ("domain hold idle", "domain idle is in maintenance; start it first"),
        ("domain release vol1", "domain vol1 is not held by the operator"),
        ("domain release idle", "domain idle is not held by the operator"),
        ("domain set vol1 --failback soon", "'soon' is neither manual, immediate, nor a number"),
        ("domain set vol1 --failback -1", "'-1' is neither manual, immediate, nor a number"),
        ("domain set vol1 --failback nan", "'nan' is neither manual, immediate, nor a number"),
        ("domain set vol1 --accept-loss never", "'never' is neither manual, immediate, nor a number"),
        ("domain set vol1", "name a policy to set"),
        ("failover vol1 --accept-loss", "nothing has to be lost: alpha is active"),
        ("failover vol1 --accept-loss --dry-run", "goes with no --accept-loss"),
        ("verify nope", "there is no domain nope"),
        ("verify solo", "domain solo has no disk; there is nothing to compare"),
        ("verify vol1 --rate fast", "fast"),
        ("verify vol1 --stop", "is not being verified"),
    ],
)
def test_command_with_bad_input_is_refused_and_changes_nothing(
    shared: Place, arguments: str, said: str
) -> None:
    before = lists(shared), shared.files()
    assert said in shared.refused(*arguments.split())
    assert (lists(shared), shared.files()) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("failover solo", "has no uptodate backup to fail over to: there is none"),
        ("failover solo --to gamma", "group gamma is active already"),
        ("failover vol1 --to gamma", "group gamma is no leg"),
        ("failover idle", "domain idle is in maintenance; start it first"),
    ],
)
def test_failover_that_cannot_be_is_refused_and_on_trial_too(
    shared: Place, arguments: str, said: str
) -> None:
    before = lists(shared)
    assert said in shared.refused(*arguments.split())
    assert said in shared.refused(*arguments.split(), "--dry-run")
    assert lists(shared) == before


def test_failover_to_an_outdated_backup_is_refused_and_wait_says_what_is_missing(own: Place) -> None:
    own.start()
    own.ok("group", "create", "alpha", "--device", own.url("alpha"))
    own.ok("group", "create", "beta", "--device", own.url("beta"))
    own.ok("domain", "create", "vol1", "--size", "4M", "--active", "alpha", "--backup", "beta")
    own.ok("domain", "wait", "vol1", "--timeout", "30")
    own.ok("domain", "stop", "vol1")
    (own.root / "alpha").rename(own.root / "aside")
    own.ok("domain", "start", "vol1")
    (own.root / "aside").rename(own.root / "alpha")
    said = "domain vol1 has no uptodate backup to fail over to: alpha is outdated"
    for options in ([], ["--dry-run"]):
        assert said in own.refused("failover", "vol1", *options)
        assert "group alpha cannot take over" in own.refused("failover", "vol1", "--to", "alpha", *options)
    assert (
        "domain vol1 cannot fail back to alpha, which is outdated; do first: standfast resync vol1 --group alpha"
        in own.refused("failback", "vol1")
    )
    assert "standfast resync vol1" in own.refused("domain", "wait", "vol1")
    status, _, said = own.command("domain", "wait", "vol1", "--timeout", "0.2")
    assert status == 1
    assert said == "standfast: domain vol1 is not ready after 0.2 s: it is degraded; alpha is outdated\n"


@contextmanager
def connected(place: Place, disk: str) -> Iterator[None]:
    """A client of vol1 that stays."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(place.run / "vol1" / "nbd.sock"))
        negotiation = ClientNegotiation(disk, device="client")
        while negotiation.remote is None:
            client.sendall(negotiation.receive(client.recv(65536)))
        yield


@pytest.mark.parametrize("arguments", ["domain stop vol1", "domain remove vol1", "disk remove vol1/disk1"])
def test_taking_away_what_a_client_uses_is_refused_without_force(shared: Place, arguments: str) -> None:
    before = lists(shared)
    with connected(shared, "disk1"):
        line = shared.refused(*arguments.split())
    assert "clients" in line
    assert "--force" in line
    assert lists(shared) == before


# --- Bad input: serve -----------------------------------------------------------------------------


def newer_store(place: Place) -> Path:
    """A store as a later version would leave it."""
    place.state.mkdir()
    store = place.state / "standfast.db"
    database = sqlite3.connect(store)
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA user_version = 999")
    database.close()
    return store


def test_serve_a_second_time_on_one_state_directory_is_refused(shared: Place) -> None:
    done = shared.process("serve", "--state", str(shared.state), "--run", str(shared.run))
    assert "another manager uses the --state directory" in one_line(done)
    assert shared.json("status")["ready"] is True


def test_serve_a_second_time_on_one_run_directory_is_refused(own: Place) -> None:
    own.start()
    own.ok("group", "create", "alpha", "--device", own.url("alpha"))
    try:
        with own.serving("--state", str(own.root / "state2")) as second:
            assert second.wait(5) == 1
    finally:
        assert len(own.json("group", "list")) == 1


def test_serve_on_a_store_of_a_newer_version_is_refused_and_leaves_it(own: Place) -> None:
    store = newer_store(own)
    before = store.read_bytes()
    line = one_line(own.process("serve", "--state", str(own.state)))
    assert "newer" in line
    assert "999" in line
    assert store.read_bytes() == before


def test_serve_on_a_store_that_is_none_is_refused_and_leaves_it(own: Place) -> None:
    own.state.mkdir()
    store = own.state / "standfast.db"
    store.write_bytes(b"this is no database, whatever its name says" * 100)
    before = store.read_bytes()
    assert str(store) in one_line(own.process("serve", "--state", str(own.state)))
    assert store.read_bytes() == before


def test_serve_with_a_run_directory_too_deep_for_a_socket_is_refused(own: Place) -> None:
    deep = own.root / ("x" * 100)
    line = one_line(own.process("serve", "--state", str(own.state), "--run", str(deep)))
    assert "--run" in line
    assert "107" in line


@pytest.mark.parametrize("cause", ["newer store", "second manager", "run directory too deep"])
def test_serve_that_is_refused_makes_no_directory(own: Place, shared: Place, cause: str) -> None:
    state, run = own.root / "state", own.root / ("x" * 100 if cause == "run directory too deep" else "run")
    if cause == "newer store":
        newer_store(own)
    elif cause == "second manager":
        state = shared.state
    before = set(own.root.iterdir())
    one_line(own.process("serve", "--state", str(state), "--run", str(run)))
    assert set(own.root.iterdir()) == before


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        ("deadline_ms = ", "is not TOML"),
        ("deadline = 5", "unknown setting deadline"),
        ("deadline_ms = 1", "must be a number from 10"),
    ],
)
def test_serve_with_a_bad_config_is_refused_and_makes_nothing(
    own: Place, content: str | None, said: str
) -> None:
    config = own.root / "config.toml"
    if content is not None:
        config.write_text(content)
    options = ["--state", str(own.state), "--run", str(own.run), "--config", str(config)]
    assert said in one_line(own.process("serve", *options))
    assert not own.run.exists()
    assert not own.state.exists()


def test_domain_create_with_sockets_too_deep_is_refused_and_leaves_nothing() -> None:
    with opened_place("r" * 60) as deep:
        deep.start()
        deep.ok("group", "create", "alpha", "--device", deep.url("alpha"))
        before = lists(deep), deep.files()
        line = deep.refused("domain", "create", "v" * 30, "--size", "1M", "--active", "alpha")
        assert "--run" in line
        assert "107" in line
        assert (lists(deep), deep.files()) == before


def test_domain_create_where_its_directory_cannot_be_is_refused_and_the_manager_lives(own: Place) -> None:
    own.start()
    own.ok("group", "create", "alpha", "--device", own.url("alpha"))
    (own.run / "vol1").write_text("in the way")
    own.refused("domain", "create", "vol1", "--size", "1M", "--active", "alpha")
    assert own.json("domain", "list") == []


# --- The manager's end, and output ----------------------------------------------------------------


@pytest.mark.slow
def test_serve_told_to_end_ends_with_status_0_and_its_domain_servers_with_it(own: Place) -> None:
    own.start()
    own.ok("group", "create", "alpha", "--device", own.url("alpha"))
    own.ok("domain", "create", "vol1", "--size", "1M", "--active", "alpha")
    assert len(own.servers()) == 1
    assert own.terminate() == 0
    assert own.servers() == []
    own.refused("status")
    own.start()
    own.ok("domain", "wait", "vol1", "--timeout", "30")


def test_serve_told_to_end_and_keep_domains_leaves_them_for_the_next(own: Place) -> None:
    own.start("--keep-domains")
    own.ok("group", "create", "alpha", "--device", own.url("alpha"))
    own.ok("domain", "create", "vol1", "--size", "1M", "--active", "alpha")
    servers = own.servers()
    assert own.terminate() == 0
    assert own.servers() == servers
    own.start("--keep-domains")
    own.ok("domain", "wait", "vol1", "--timeout", "30")
    assert own.servers() == servers


def test_serve_in_a_relative_run_directory_gives_absolute_addresses(
    own: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(own.root)
    own.environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    own.environment["STANDFAST_RUN"] = "run"
    own.start()
    assert json.loads(own.process("status", "--json")[1])["run"] == str(own.run)


def test_manager_that_is_killed_is_told_in_one_line(own: Place) -> None:
    own.start()
    assert own.manager is not None
    own.manager.kill()
    own.manager.wait()
    assert "control.sock (Connection refused)" in one_line(own.process("status"))


def test_events_followed_shows_what_happens_and_ends_quietly_when_interrupted(shared: Place) -> None:
    last = shared.json("status")["last_event"]
    follower = subprocess.Popen(
        [*STANDFAST, "events", "--follow", "--json", "--after", str(last), "--run", str(shared.run)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Whoever runs the tests in the background may have it ignored.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    with follower:
        try:
            assert follower.stdout is not None
            assert follower.stderr is not None
            shared.ok("disk", "create", "vol1/seen", "--size", "64K")
            event = json.loads(follower.stdout.readline())
            shared.ok("disk", "remove", "vol1/seen")
            follower.send_signal(signal.SIGINT)
            assert follower.wait(PATIENCE_S) == 130
            assert follower.stderr.read() == ""
        finally:
            follower.kill()
    assert event["kind"] == "disk-created"
    assert event["id"] == last + 1


def test_domain_show_for_a_program_has_whole_addresses_and_no_colours(
    shared: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    printed = shared.ok("domain", "show", "vol1")
    assert f"nbd+unix:///disk1?socket={shared.run}/vol1/nbd.sock" in printed
    assert shared.url("beta") in printed
    assert "\x1b" not in printed
