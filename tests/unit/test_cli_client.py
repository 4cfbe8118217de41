"""Requests to a manager that answers, refuses, lies, or goes away."""

import gc
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from proxy.cli.client import Manager, UnreachableError
from proxy.errors import NotFoundError, RefusedError
from tests.unit.cli_manager import GoAway, answering, manager

#: The library leaves the socket of a connection that was refused to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")


@pytest.fixture(autouse=True, scope="module")
def _sockets_collected() -> Iterator[None]:
    """Have the garbage collector find them while the filter is in force, not in somebody else's test."""
    yield
    gc.collect()


@pytest.fixture
def asked() -> list[tuple[str, str, Any]]:
    return []


@pytest.fixture
def willing(asked: list[tuple[str, str, Any]]) -> Iterator[Manager]:
    def answer(method: str, path: str, body: Any) -> tuple[int, Any]:
        asked.append((method, path, body))
        return 200, {"done": True}

    with manager(answer) as run:
        yield Manager(run)


def test_get_with_names_escapes_each_into_one_segment(
    willing: Manager, asked: list[tuple[str, str, Any]]
) -> None:
    assert willing.get("domains", "a b?c#d%e", version=None) == {"done": True}
    assert asked == [("GET", "/domains/a%20b%3Fc%23d%25e", None)]


def test_get_with_a_long_poll_says_since_when_and_how_long(
    willing: Manager, asked: list[tuple[str, str, Any]]
) -> None:
    willing.get("domains", "vol1", version=7, wait_s=1.5)
    assert asked == [("GET", "/domains/vol1?version=7&wait_s=1.5", None)]


def test_orders_carry_their_body_and_force(willing: Manager, asked: list[tuple[str, str, Any]]) -> None:
    willing.post("domains", body={"name": "vol1"})
    willing.post("domains", "vol1", "stop", force=True)
    willing.delete("domains", "vol1", force=False)
    assert asked == [
        ("POST", "/domains", {"name": "vol1"}),
        ("POST", "/domains/vol1/stop?force=true", None),
        ("DELETE", "/domains/vol1", None),
    ]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../groups"])
def test_get_of_a_name_that_would_be_another_path_is_refused_unasked(
    willing: Manager, asked: list[tuple[str, str, Any]], name: str
) -> None:
    with pytest.raises(NotFoundError, match="there is no domain"):
        willing.get("domains", name)
    assert asked == []


def test_refusal_of_the_manager_is_given_in_its_words() -> None:
    refusing = manager(lambda *request: (409, {"error": "there is a group alpha already"}))
    with refusing as run, pytest.raises(RefusedError, match=r"^there is a group alpha already$"):
        Manager(run).post("groups", body={})


@pytest.mark.parametrize(
    ("status", "content"),
    [(404, {"detail": "Not Found"}), (200, "<html>"), (500, "oops"), (307, ""), (409, ["error"])],
)
def test_answer_of_something_else_than_a_manager_is_told(status: int, content: Any) -> None:
    lying = manager(lambda *request: (status, content))
    with lying as run, pytest.raises(UnreachableError, match="no manager of this version"):
        Manager(run).get("status")


def test_manager_that_goes_away_in_the_middle_leaves_no_doubt_about_the_doubt() -> None:
    def answer(*request: object) -> tuple[int, Any]:
        raise GoAway

    with manager(answer) as run, pytest.raises(UnreachableError, match="went away in the middle"):
        Manager(run).post("domains", "vol1", "failover", body={"to": None})


def test_no_socket_names_it_and_how_to_start_a_manager(tmp_path: Path) -> None:
    with pytest.raises(UnreachableError) as caught:
        Manager(tmp_path).get("status")
    assert f"{tmp_path}/control.sock (No such file or directory)" in str(caught.value)
    assert f"standfast serve --run {tmp_path}" in str(caught.value)


def test_socket_that_nobody_listens_on_is_unreachable() -> None:
    answer, _ = answering()
    with manager(answer) as run:
        (run / "control.sock").unlink()
        with socket.socket(socket.AF_UNIX) as left_behind:
            left_behind.bind(str(run / "control.sock"))
        with pytest.raises(UnreachableError, match="Connection refused"):
            Manager(run).get("status")


def test_run_directory_too_deep_for_a_socket_is_unreachable_with_the_cause() -> None:
    with pytest.raises(UnreachableError, match="path too long"):
        Manager(Path("/tmp") / ("x" * 120)).get("status")
