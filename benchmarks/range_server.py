"""A server of files that waits before it answers: object storage as seen from a node, on one machine.

    python -m benchmarks.range_server FOLDER [--delay SECONDS]

Prints its port. HTTP over asyncio, without a library, so that it takes little from the cores that are measured. `GET
/-bytes` tells requests and bytes sent so far.
"""

import argparse
import asyncio
import sys
from pathlib import Path


class Server:
    """Answers HEAD and GET, whole files and single ranges."""

    def __init__(self, folder: Path, delay: float) -> None:
        self._files = {f"/{path.name}": path.open("rb") for path in folder.iterdir() if path.is_file()}
        self._sizes = {f"/{path.name}": path.stat().st_size for path in folder.iterdir() if path.is_file()}
        self._delay = delay
        self._requests = self._bytes = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection."""
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                method, path, wanted = _parsed(head)
                if path == "/-bytes":
                    writer.write(_answer(200, b"%d %d" % (self._requests, self._bytes)))
                    continue
                self._requests += 1
                await asyncio.sleep(self._delay)
                writer.write(self._content(method, path, wanted))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def _content(self, method: str, path: str, wanted: tuple[int, int] | None) -> bytes:
        if path not in self._files:
            return _answer(404, b"")
        size = self._sizes[path]
        if method == "HEAD":
            return _answer(200, b"", size)
        start, stop = wanted or (0, size)
        file = self._files[path]
        file.seek(start)
        data = file.read(min(stop, size) - start)
        self._bytes += len(data)
        return _answer(206 if wanted else 200, data)


def _parsed(head: bytes) -> tuple[str, str, tuple[int, int] | None]:
    method, path, _ = head.split(b" ", 2)
    found = head.lower().find(b"range: bytes=")
    if found < 0:
        return method.decode(), path.decode(), None
    first, last = head[found + 13 : head.index(b"\r\n", found)].split(b"-")
    return method.decode(), path.decode(), (int(first), int(last) + 1)


def _answer(status: int, content: bytes, size: int | None = None) -> bytes:
    length = len(content) if size is None else size
    return b'HTTP/1.1 %d X\r\nETag: "1"\r\nContent-Length: %d\r\n\r\n%b' % (status, length, content)


async def _main(folder: Path, delay: float) -> None:
    server = await asyncio.start_server(Server(folder, delay).serve, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--delay", type=float, default=0.02)
    arguments = parser.parse_args()
    sys.exit(asyncio.run(_main(arguments.folder, arguments.delay)))
