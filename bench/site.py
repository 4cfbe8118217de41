"""A Standfast of our own: a manager, started as an operator would, and its control socket."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from bench.errors import BenchError
from bench.server import Server

#: Longer than any answer of the manager takes; a long poll is asked for no more than half of it.
CALL_TIMEOUT_S = 60.0
POLL_S = 10.0
#: A first sync or a resync of a few hundred megabytes in memory.
SYNC_TIMEOUT_S = 120.0


class Site:
    """What a benchmark asks of a manager. All calls raise BenchError with the manager's own line."""

    def __init__(self, server: Server, client: httpx.Client) -> None:
        self.server = server
        self._client = client

    def call(self, method: str, path: str, body: dict[str, Any] | None = None, **query: float) -> Any:
        """One request to the control socket, and its answer."""
        try:
            response = self._client.request(method, path, json=body, params=query)
            answer = response.json()
        except (httpx.HTTPError, ValueError) as error:
            raise BenchError(f"the manager did not answer {method} {path}: {error}") from error
        if response.is_error:
            raise BenchError(f"{method} {path}: {answer.get('error', answer)}")
        return answer

    def create_group(self, name: str, urls: Sequence[str], layout: str = "linear") -> None:
        """Label devices and make a group of them."""
        self.call("POST", "/groups", {"name": name, "devices": list(urls), "layout": layout})

    def create_domain(self, name: str, size: int, active: str, backups: Sequence[str] = ()) -> None:
        """Put a domain online and wait until every backup is uptodate."""
        body = {"name": name, "size": str(size), "active": active, "backups": list(backups)}
        self.call("POST", "/domains", body)
        self.wait_domain(name, is_whole, SYNC_TIMEOUT_S)

    def create_disk(self, domain: str, name: str, size: int) -> str:
        """Make a disk; its address."""
        uri: str = self.call("POST", f"/domains/{domain}/disks", {"name": name, "size": str(size)})["nbd_uri"]
        return uri

    def domain(self, name: str) -> dict[str, Any]:
        """A domain as it is now."""
        view: dict[str, Any] = self.call("GET", f"/domains/{name}")
        return view

    def wait_domain(
        self, name: str, condition: Callable[[dict[str, Any]], bool], timeout_s: float
    ) -> dict[str, Any]:
        """The domain once ``condition`` holds for it."""
        deadline = time.monotonic() + timeout_s
        view = self.domain(name)
        while not condition(view):
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                legs = ", ".join(f"{leg['group']} is {leg['state']}" for leg in view["legs"])
                raise BenchError(
                    f"domain {name} is {view['state']} after {timeout_s:.0f} s ({legs}; {view['trouble']})"
                )
            view = self.call("GET", f"/domains/{name}", version=view["version"], wait_s=min(left_s, POLL_S))
        return view


def is_whole(view: dict[str, Any]) -> bool:
    """Whether a domain is online with every leg uptodate."""
    return view["state"] == "online" and all(leg["state"] == "uptodate" for leg in view["legs"])


@contextmanager
def running_site(directory: Path, settings: str = "") -> Iterator[Site]:
    """A manager, and its domain servers, for as long as the context lasts.

    Args:
        directory: an empty one with a short path; its state and its sockets go there.
        settings: lines of its config file; what they do not name has its default.
    """
    run = directory / "run"
    run.mkdir(parents=True)
    control = run / "control.sock"
    config = directory / "config.toml"
    config.write_text(settings)
    serve = ["serve", "--state", str(directory / "state"), "--run", str(run), "--config", str(config)]
    with (
        Server([sys.executable, "-m", "proxy.cli.main", *serve], control, directory) as server,
        httpx.Client(
            transport=httpx.HTTPTransport(uds=str(control)),
            base_url="http://standfast",
            timeout=CALL_TIMEOUT_S,
        ) as client,
    ):
        yield Site(server, client)
