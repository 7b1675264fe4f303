"""A web server of files that answers requests for ranges, and fails when told to."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class RangeServer:
    """What a server holds and does."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    failures: int = 0
    """Requests that are yet to be answered 503."""
    status: int = 0
    """What every request is answered, if not 0."""
    ignores_ranges: bool = False
    requests: list[tuple[str, int]] = field(default_factory=list)
    """Method or path and bytes sent."""
    versions: dict[str, int] = field(default_factory=dict)

    @property
    def bytes_sent(self) -> int:
        return sum(count for _, count in self.requests)

    def answer(self, path: str, wanted: str | None) -> tuple[int, bytes, dict[str, str]]:
        if self.failures > 0:
            self.failures -= 1
            return 503, b"", {}
        if self.status:
            return self.status, b"", {}
        content = self.files.get(path)
        if content is None:
            return 404, b"", {}
        headers = {"ETag": f'"{self.versions.get(path, 0)}-{len(content)}"'}
        if wanted is None or self.ignores_ranges:
            return 200, content, headers
        first, last = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
        if first >= len(content):
            return 416, b"", headers
        return 206, content[first : last + 1], headers


class _Server(ThreadingHTTPServer):
    request_queue_size = 256


@contextmanager
def range_server() -> Iterator[RangeServer]:
    """A server on a free port of the loopback."""
    state = RangeServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(self.headers.get("Range"), with_body=True)

        def do_HEAD(self) -> None:
            self._answer(None, with_body=False)

        def _answer(self, wanted: str | None, *, with_body: bool) -> None:
            status, content, headers = state.answer(self.path, wanted)
            state.requests.append((f"{self.command} {self.path}", len(content) if with_body else 0))
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = _Server(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
