"""One request to the manager, over its control socket."""

import errno
import sys
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from proxy.errors import NotFoundError, RefusedError, StandfastError

CONTROL_SOCKET = "control.sock"
#: A manager that is alive accepts at once.
CONNECT_TIMEOUT_S = 5.0
#: How long a question may take beyond what it was told to wait. An order has no limit: giving up
#: in the middle would leave the operator not knowing whether it was carried out.
ANSWER_TIMEOUT_S = 30.0

#: What httpcore loads whenever it is installed, for clients that are asynchronous or speak HTTP/2. To
#: load them takes longer than all else that a command does.
_UNUSED_LIBRARIES = ("anyio", "h2", "trio")


class UnreachableError(StandfastError):
    """There is no manager at the socket, or it does not answer."""


@dataclass(frozen=True, slots=True)
class Manager:
    """The manager whose sockets are in ``run``. Every request is a connection of its own.

    All methods raise:
        UnreachableError: there is none, or it went away, or does not answer.
        RefusedError: it does not do what it was asked; the text is its own.
    """

    run: Path

    @property
    def socket(self) -> Path:
        """The control socket."""
        return self.run.absolute() / CONTROL_SOCKET

    def get(self, *path: str, wait_s: float | None = None, **query: int | None) -> Any:
        """The object at ``path``.

        Args:
            path: its segments; the names in it are escaped here.
            wait_s: how long the manager is to wait for a change, in a long poll.
            query: parameters; those that are None are left out.
        """
        parameters: dict[str, Any] = {name: value for name, value in query.items() if value is not None}
        if wait_s is not None:
            parameters["wait_s"] = wait_s
        return self._request("GET", path, parameters, None, ANSWER_TIMEOUT_S + (wait_s or 0.0))

    def post(self, *path: str, body: dict[str, Any] | None = None, force: bool | None = None) -> Any:
        """Give an order; what came of it, when it is carried out."""
        return self._request("POST", path, _force(force), body, None)

    def delete(self, *path: str, force: bool | None = None) -> Any:
        """Remove what is at ``path``."""
        return self._request("DELETE", path, _force(force), None, None)

    def _request(
        self,
        method: str,
        path: tuple[str, ...],
        query: dict[str, Any],
        body: dict[str, Any] | None,
        timeout_s: float | None,
    ) -> Any:
        url = "http://standfast/" + "/".join(_segments(path))
        _load_httpcore()
        # Without verify=False the certificates of the whole world are loaded, for a socket of this machine.
        transport = httpx.HTTPTransport(uds=str(self.socket), verify=False)
        timeout = httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S)
        try:
            with httpx.Client(transport=transport, timeout=timeout, trust_env=False) as client:
                answer = client.request(method, url, params=query, json=body)
        except httpx.ConnectError as error:
            raise self._unreachable(error) from error
        except httpx.TimeoutException as error:
            raise UnreachableError(
                f"the manager at {self.socket} does not answer; look at its log, or start it again"
            ) from error
        except httpx.TransportError as error:
            raise UnreachableError(
                f"the manager at {self.socket} went away in the middle of the request, which may have been "
                "carried out or not: look at what is there before you try again"
            ) from error
        return self._result(answer, f"{method} /{'/'.join(path)}")

    def _unreachable(self, error: httpx.ConnectError) -> UnreachableError:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if cause is not None and cause.errno in (errno.EACCES, errno.EPERM):
            return UnreachableError(
                f"the manager's socket {self.socket} is not yours to use (permission denied); be root, or in "
                "its group"
            )
        why = (cause.strerror or str(cause)) if cause is not None else str(error)
        return UnreachableError(
            f"no manager can be reached at {self.socket} ({why}); start one with: standfast serve "
            f"--run {self.socket.parent}"
        )

    def _result(self, answer: httpx.Response, request: str) -> Any:
        try:
            content = answer.json()
        except (JSONDecodeError, UnicodeDecodeError):
            content = None
        if answer.is_success and content is not None:
            return content
        if isinstance(content, dict) and isinstance(content.get("error"), str):
            raise RefusedError(content["error"])
        raise UnreachableError(
            f"what answers at {self.socket} is no manager of this version ({answer.status_code} to {request})"
        )


def _load_httpcore() -> None:
    """Load what httpx sends with as if the libraries it has no use for here were not installed.

    Source: The Python Language Reference, "The module cache": an entry of None makes an import fail.
    """
    hidden = [name for name in _UNUSED_LIBRARIES if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        import httpcore  # noqa: F401
    finally:
        for name in hidden:
            del sys.modules[name]


def _force(force: bool | None) -> dict[str, Any]:
    return {"force": True} if force else {}


def _segments(path: tuple[str, ...]) -> list[str]:
    """``path`` escaped, as long as each name in it is one segment to the manager too."""
    for kind, name in zip(("", *path), path, strict=False):
        if name in ("", ".", "..") or "/" in name:
            raise NotFoundError(f"there is no {kind.removesuffix('s')} {name!r}")
    return [quote(segment, safe="") for segment in path]
