"""The boundary: every failure is one line and the right status; and what the arguments become."""

import gc
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from proxy.cli import output, waiting
from proxy.cli.client import Manager
from proxy.cli.main import main
from tests.unit.cli_manager import GoAway, answering, manager
from tests.unit.cli_objects import domain, event, group, leg, sync_of

#: The library leaves the socket of a connection that was refused to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")


@pytest.fixture(autouse=True, scope="module")
def _sockets_collected() -> Iterator[None]:
    """Have the garbage collector find them while the filter is in force, not in somebody else's test."""
    yield
    gc.collect()


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    # setenv first, so that what the root option sets is taken back too.
    monkeypatch.setenv("STANDFAST_RUN", "/nowhere")
    monkeypatch.delenv("STANDFAST_DEBUG", raising=False)
    monkeypatch.delenv("STANDFAST_LOG", raising=False)


def failed(capsys: pytest.CaptureFixture[str], status: int, *arguments: str) -> str:
    """The one line a command line ends with, which fails with ``status`` and writes nothing else."""
    assert main(arguments) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("standfast: ")
    assert captured.err.count("\n") == 1
    return captured.err


def succeeded(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command line that succeeds writes."""
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


# --- Usage ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["frobnicate"], "no such command 'frobnicate'; see: standfast --help"),
        (["domain", "frobnicate"], "no such command 'frobnicate'; see: standfast domain --help"),
        (["--frob"], "no such option: --frob"),
        (["domain", "list", "--frob"], "no such option: --frob; see: standfast domain list --help"),
        (["domain", "show"], "missing argument 'NAME'; see: standfast domain show --help"),
        (["domain", "show", "a", "b"], "unexpected extra argument"),
        (["domain", "create", "v", "--active", "a"], "missing option '--size'"),
        (["domain", "create", "v", "--size", "1M"], "missing option '--active'"),
        (["domain", "create", "v", "--size"], "'--size' requires an argument"),
        (["group", "create", "g"], "missing option '--device'"),
        (["disk", "create", "vol1", "--size", "1M"], "'vol1' is not DOMAIN/DISK"),
        (["disk", "show", "/d"], "'/d' is not DOMAIN/DISK"),
        (["disk", "show", "v/"], "'v/' is not DOMAIN/DISK"),
        (["domain", "wait", "v", "--timeout", "soon"], "--timeout"),
        (["domain", "wait", "v", "--timeout", "-1"], "a number of seconds, 0 or more"),
        (["domain", "wait", "v", "--timeout", "nan"], "a number of seconds, 0 or more"),
        (["events", "--after", "-1"], "--after"),
        (["serve", "--log-level", "loud"], "--log-level"),
        (["status", "--run"], "'--run' requires an argument"),
        (["failover"], "missing argument 'DOMAIN'"),
        (["domain", "show", "a\udcffb"], r"argument 'a\udcffb' is not UTF-8"),
    ],
)
def test_usage_error_is_one_line_with_status_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert said in failed(capsys, 2, *arguments)


@pytest.mark.parametrize(
    "arguments", [[], ["--help"], ["group"], ["domain", "--help"], ["disk", "create", "--help"]]
)
def test_help_is_printed_with_status_0(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert succeeded(capsys, *arguments).startswith("Usage: standfast")


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert succeeded(capsys, "--version").startswith("standfast ")


# --- The boundary ---------------------------------------------------------------------------------


def test_status_without_a_manager_is_one_line_with_the_socket(capsys: pytest.CaptureFixture[str]) -> None:
    assert "/nowhere/control.sock" in failed(capsys, 1, "status")


@pytest.mark.parametrize("arguments", [["--run", "/elsewhere", "status"], ["status", "--run", "/elsewhere"]])
def test_run_option_in_either_place_beats_the_variable(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert "/elsewhere/control.sock" in failed(capsys, 1, *arguments)


def test_run_directory_by_default_is_the_systems(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("STANDFAST_RUN")
    assert "/run/standfast/control.sock" in failed(capsys, 1, "status")


def _break(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def broken(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(Manager, "get", broken)


def test_unknown_error_is_one_line_that_tells_how_to_see_more(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _break(monkeypatch, ZeroDivisionError("of\nsome kind"))
    line = failed(capsys, 1, "status")
    assert "ZeroDivisionError: of some kind" in line
    assert "STANDFAST_DEBUG=1" in line


def test_unknown_error_alone_in_a_group_is_named_itself(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _break(monkeypatch, ExceptionGroup("outer", [ExceptionGroup("inner", [ZeroDivisionError("it")])]))
    assert "ZeroDivisionError: it" in failed(capsys, 1, "status")


def test_unknown_error_in_debug_shows_its_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STANDFAST_DEBUG", "1")
    _break(monkeypatch, ZeroDivisionError("it"))
    assert main(["status"]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_interrupt_is_quiet_with_the_shells_status(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _break(monkeypatch, KeyboardInterrupt())
    assert main(["status"]) == 130
    assert capsys.readouterr() == ("", "")


def test_manager_gone_in_the_middle_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def answer(*request: object) -> tuple[int, Any]:
        raise GoAway

    with manager(answer) as run:
        assert "went away" in failed(capsys, 1, "failover", "vol1", "--run", str(run))


def test_refusal_with_several_lines_becomes_one(capsys: pytest.CaptureFixture[str]) -> None:
    with manager(lambda *request: (409, {"error": "first\nsecond \x1b[31m"})) as run:
        assert failed(capsys, 1, "group", "list", "--run", str(run)) == (
            "standfast: first second \\x1b[31m\n"
        )


def test_command_loads_nothing_that_only_the_manager_needs() -> None:
    program = (
        "import sys; from proxy.cli.main import main; main(['status']);"
        "print([name for name in ('anyio', 'fastapi', 'h2', 'hypercorn', 'trio') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[]\n"


# --- What arguments become ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "request_made"),
    [
        (
            "group create g --device file:///a --device file:///b --layout striped:1M",
            (
                "POST",
                "/groups",
                {
                    "name": "g",
                    "devices": ["file:///a", "file:///b"],
                    "layout": "striped:1M",
                    "force": False,
                },
            ),
        ),
        ("group remove g", ("DELETE", "/groups/g", None)),
        (
            "domain create v --size 1G --active a --backup b --backup c --listen 127.0.0.1:10809",
            (
                "POST",
                "/domains",
                {
                    "name": "v",
                    "size": "1G",
                    "active": "a",
                    "backups": ["b", "c"],
                    "replication": "sync",
                    "listen": "127.0.0.1:10809",
                    "failback": "manual",
                    "accept_loss": "manual",
                    "no_leg": "hold",
                },
            ),
        ),
        ("domain start v", ("POST", "/domains/v/start", None)),
        ("domain activate v", ("POST", "/domains/v/start", None)),
        ("domain stop v", ("POST", "/domains/v/stop", None)),
        ("domain maintenance v --force", ("POST", "/domains/v/stop?force=true", None)),
        ("domain remove v --force", ("DELETE", "/domains/v?force=true", None)),
        ("disk create v/d --size 5M", ("POST", "/domains/v/disks", {"name": "d", "size": "5M"})),
        ("disk resize v/d --size 5M", ("POST", "/domains/v/disks/d/resize", {"size": "5M"})),
        ("disk remove v/d --force", ("DELETE", "/domains/v/disks/d?force=true", None)),
        ("failover v --to b", ("POST", "/domains/v/failover", {"to": "b", "accept_loss": False})),
        ("failback v", ("POST", "/domains/v/failback", None)),
        ("domain hold v", ("POST", "/domains/v/hold", {"timeout_s": None})),
        ("domain hold v --timeout 5", ("POST", "/domains/v/hold", {"timeout_s": 5.0})),
        (
            "domain migrate v --to g --no-wait",
            ("POST", "/domains/v/migrate", {"to": "g", "replace": None}),
        ),
        ("domain add-leg v g", ("POST", "/domains/v/legs", {"group": "g"})),
        ("domain remove-leg v g --no-wait", ("DELETE", "/domains/v/legs/g", None)),
        ("domain release v", ("POST", "/domains/v/release", None)),
        (
            "domain set v --failback 30",
            ("POST", "/domains/v/set", {"failback": "30", "accept_loss": None, "no_leg": None}),
        ),
        ("domain losses v", ("GET", "/domains/v/losses", None)),
        ("resync v --group b", ("POST", "/domains/v/resync", {"group": "b", "rate": None})),
        ("resync v", ("POST", "/domains/v/resync", {"group": None, "rate": None})),
    ],
)
def test_order_becomes_one_request_and_json_prints_its_answer_untouched(
    capsys: pytest.CaptureFixture[str], line: str, request_made: tuple[str, str, Any]
) -> None:
    answer, asked = answering(
        {
            **domain(),
            **group(),
            "groups": ["b"],
            "unreached": [],
            "nbd_uri": "nbd+unix:///d",
            "strange": [1.5, None, "\u00e9"],
        }
    )
    with manager(answer) as run:
        printed = succeeded(capsys, *line.split(), "--json", "--run", str(run))
    assert asked == [request_made]
    assert '"strange": [\n    1.5,\n    null,\n    "\\u00e9"\n  ]' in printed


def test_group_removed_with_a_device_out_of_reach_says_which(capsys: pytest.CaptureFixture[str]) -> None:
    answer, _ = answering({"unreached": ["file:///b: there is no such file"]})
    with manager(answer) as run:
        assert succeeded(capsys, "group", "remove", "g", "--run", str(run)).splitlines() == [
            "group g removed",
            "its label is still there: file:///b: there is no such file",
        ]


def test_failover_on_trial_asks_and_orders_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    answer, asked = answering(domain())
    with manager(answer) as run:
        printed = succeeded(capsys, "failover", "vol1", "--dry-run", "--run", str(run))
    assert [method for method, _, _ in asked] == ["GET"]
    assert "would fail over from alpha to beta: 1 extent before, 1 after" in printed


def test_failover_tells_how_long_clients_waited(capsys: pytest.CaptureFixture[str]) -> None:
    receipt = {
        "stall_ms": 3.21,
        "from": "alpha",
        "to": "beta",
        "at": "",
        "reason": "",
        "replayed": 0,
        "lost_bytes": 0,
    }
    answer, _ = answering(domain(active="beta", last_failover=receipt))
    with manager(answer) as run:
        assert succeeded(capsys, "failover", "vol1", "--run", str(run)) == (
            "domain vol1: active is beta now; clients waited 3.2 ms\n"
        )


def test_events_reads_page_after_page_until_there_are_no_more(capsys: pytest.CaptureFixture[str]) -> None:
    answer, asked = answering([event(3), event(4)], [event(9)], [])
    with manager(answer) as run:
        printed = succeeded(capsys, "events", "--after", "2", "--json", "--run", str(run))
    assert [path for _, path, _ in asked] == ["/events?after=2", "/events?after=4", "/events?after=9"]
    assert [line.startswith('{"id": ') for line in printed.splitlines()] == [True] * 3


def test_events_followed_waits_only_when_there_are_none_left(capsys: pytest.CaptureFixture[str]) -> None:
    answers: list[Any] = [[event(1)], [], [event(2)], []]
    asked: list[str] = []

    def answer(method: str, path: str, body: Any) -> tuple[int, Any]:
        asked.append(path)
        if not answers:
            raise GoAway
        return 200, answers.pop(0)

    with manager(answer) as run:
        assert main(["events", "--follow", "--run", str(run)]) == 1
    assert asked == [
        "/events?after=0",
        "/events?after=1",
        "/events?after=1&wait_s=25.0",
        "/events?after=2",
        "/events?after=2&wait_s=25.0",
    ]
    assert len(capsys.readouterr().out.splitlines()) == 2


# --- Waiting --------------------------------------------------------------------------------------

SYNCING = domain(
    leg("alpha", "active"),
    leg("beta", "backup", "syncing", sync=sync_of(1 << 20, 4 << 20)),
    state="degraded",
)
OUTDATED = domain(leg("alpha", "active"), leg("beta", "backup", "outdated", blocked=True), state="degraded")


def test_wait_polls_for_the_next_change_and_tells_each_step_once(capsys: pytest.CaptureFixture[str]) -> None:
    answer, asked = answering(SYNCING, SYNCING, domain())
    with manager(answer) as run:
        printed = succeeded(capsys, "domain", "wait", "vol1", "--run", str(run))
    assert [path for _, path, _ in asked] == [
        "/domains/vol1",
        "/domains/vol1?version=7&wait_s=1.0",
        "/domains/vol1?version=7&wait_s=1.0",
    ]
    assert printed.splitlines() == [
        "domain vol1: it is degraded; beta is syncing (20%)",
        "domain vol1 is online and every backup is uptodate",
    ]


def test_wait_with_json_prints_only_the_domain(capsys: pytest.CaptureFixture[str]) -> None:
    answer, _ = answering(SYNCING, domain())
    with manager(answer) as run:
        assert succeeded(capsys, "domain", "wait", "vol1", "--json", "--run", str(run)).startswith("{")


def test_wait_that_can_never_end_is_refused_at_once_with_what_to_do(
    capsys: pytest.CaptureFixture[str],
) -> None:
    answer, asked = answering(OUTDATED)
    with manager(answer) as run:
        line = failed(capsys, 1, "domain", "wait", "vol1", "--run", str(run))
    assert len(asked) == 1
    assert "beta is outdated" in line
    assert "standfast resync vol1" in line


def test_wait_whose_time_is_over_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    answer, asked = answering(OUTDATED)
    with manager(answer) as run:
        assert main(["domain", "wait", "vol1", "--timeout", "0", "--run", str(run)]) == 1
    assert capsys.readouterr().err == (
        "standfast: domain vol1 is not ready after 0 s: it is degraded; beta is outdated\n"
    )
    assert len(asked) == 1


def test_wait_with_time_left_goes_on_although_a_leg_is_outdated(capsys: pytest.CaptureFixture[str]) -> None:
    answer, _ = answering(OUTDATED, SYNCING, domain())
    with manager(answer) as run:
        succeeded(capsys, "domain", "wait", "vol1", "--timeout", "60", "--run", str(run))


def test_watcher_on_a_terminal_shows_bars(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "stdout_is_terminal", lambda: True)
    with waiting.watcher(silent=False) as watch:
        watch(OUTDATED)
        watch(SYNCING)
        watch(domain())
    printed = capsys.readouterr().out
    assert "domain vol1: it is degraded; beta is outdated" in printed
    assert "4.0/4.0 MiB" in printed


# --- stdout ---------------------------------------------------------------------------------------


def test_reader_that_has_gone_ends_the_command_quietly() -> None:
    answer, _ = answering([group(f"g{number}") for number in range(3)])
    with manager(answer) as run:
        read_end, write_end = os.pipe()
        os.close(read_end)
        done = subprocess.run(
            [sys.executable, "-m", "proxy.cli.main", "group", "list", "--run", str(run)],
            stdout=write_end,
            stderr=subprocess.PIPE,
        )
        os.close(write_end)
    assert (done.returncode, done.stderr) == (output.EXIT_READER_GONE, b"")


def test_output_that_cannot_be_written_is_one_line() -> None:
    answer, _ = answering([])
    with manager(answer) as run, Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "proxy.cli.main", "group", "list", "--run", str(run)],
            stdout=full,
            stderr=subprocess.PIPE,
        )
    assert done.returncode == 1
    assert done.stderr == b"standfast: the output cannot be written: No space left on device\n"


@pytest.mark.parametrize(
    ("environment", "colored"),
    [({"TERM": "xterm"}, True), ({"TERM": "xterm", "NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)],
)
def test_surface_of_a_terminal_is_coloured_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], colored: bool
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    leader, follower = pty.openpty()
    with open(leader, "rb", buffering=0), open(follower, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        assert output.stdout_surface().color is colored
        assert output.stdout_surface().width < output.WIDTH_UNBOUNDED


def test_surface_of_a_file_is_plain_even_when_colour_is_forced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "20")
    answer, _ = answering(domain())
    with manager(answer) as run:
        printed = succeeded(capsys, "domain", "show", "vol1", "--run", str(run))
    assert "\x1b" not in printed
    assert "file:///images/alpha1?size=2M" in printed
