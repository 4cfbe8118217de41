"""A stand-in for the manager on a unix socket, for what a real one does not do on demand: going away, lying."""

import json
import shutil
import socketserver
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

#: Method, path with query, body (None when there is none) to status and content; ``str`` goes out as it is.
Answer = Callable[[str, str, Any], tuple[int, Any]]


class GoAway(Exception):  # noqa: N818 - it is no error of anybody's
    """Raised by an answer: the connection is closed without a reply."""


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True


class _Handler(BaseHTTPRequestHandler):
    answer: Answer

    def _reply(self) -> None:
        length = int(self.headers.get("content-length", 0))
        body = json.loads(self.rfile.read(length)) if length else None
        self.close_connection = True
        try:
            status, content = self.answer(self.command, self.path, body)
        except GoAway:
            return
        data = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_DELETE = _reply  # noqa: N815 - named by http.server

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextmanager
def manager(answer: Answer) -> Iterator[Path]:
    """The run directory of a stand-in that answers with ``answer``."""
    run = Path(tempfile.mkdtemp(prefix="sf"))
    try:
        handler = type("Handler", (_Handler,), {"answer": staticmethod(answer)})
        with _Server(str(run / "control.sock"), handler) as server:
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            try:
                yield run
            finally:
                server.shutdown()
                thread.join()
    finally:
        shutil.rmtree(run)


def answering(*answers: Any) -> tuple[Answer, list[tuple[str, str, Any]]]:
    """An answer that gives each of ``answers`` in turn, with status 200, and what it was asked."""
    asked: list[tuple[str, str, Any]] = []
    left = list(answers)

    def answer(method: str, path: str, body: Any) -> tuple[int, Any]:
        asked.append((method, path, body))
        return 200, left.pop(0)

    return answer, asked
