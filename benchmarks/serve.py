"""Queries per second and their latency over HTTP: instdisc.serve beside a plain faiss behind FastAPI, and faiss itself.

    python -m benchmarks.serve [--rows 50000] [--clients 1 8 64] [--seconds 5] [--rounds 2] [--json FILE]

All on this machine, clients too, on loopback with connections that stay open. Queries are vectors of 128 numbers as
JSON, k = 10; rows are random unit vectors, all in the one process that answers. The servers take turns, for each number
of clients and round; medians of the rounds. The plain server is FastAPI under uvicorn, whose threads search each query
alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.index import command, fill, write_run, write_tar
from cluster.collection import open_collection

K, IN_PROCESS_S = 10, 3.0
FIRST_PORT = 18_500


def plain(vectors: Path, port: int) -> None:
    """What one would write in an hour."""
    import faiss
    import uvicorn
    from fastapi import FastAPI
    from pydantic import BaseModel

    rows = np.load(vectors)
    index = faiss.IndexFlatIP(rows.shape[1])
    index.add(rows)
    keys = [f"synthetic/{number:010d}.jpg" for number in range(len(rows))]

    class Asked(BaseModel):
        vector: list[float]

    app = FastAPI()

    @app.get("/health")
    def health() -> dict[str, str]:
        return {}

    def search(asked: Asked, k: int = K) -> dict[str, Any]:
        scores, found = index.search(np.array([asked.vector], np.float32), k)
        pairs = zip(found[0].tolist(), scores[0].tolist(), strict=True)
        return {"neighbors": [{"key": keys[row], "similarity": score} for row, score in pairs]}

    search.__annotations__["asked"] = Asked  # the class is local, so its name alone would not be found
    app.post("/search")(search)
    uvicorn.run(app, port=port, log_level="warning")


@contextmanager
def server(arguments: list[str], port: int) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """A server in a process of its own, once it answers."""
    with subprocess.Popen([sys.executable, "-m", *arguments], stdout=subprocess.DEVNULL) as process:
        try:
            while not asyncio.run(answers(port)):
                if process.poll() is not None:
                    raise RuntimeError(f"{arguments} ended")
                time.sleep(0.5)
            yield port, process
        finally:
            process.terminate()


async def answers(port: int) -> bool:
    try:
        return b" 200 " in (await Client.get(port, b"/health"))
    except OSError:
        return False


class Client:
    """A connection that stays open; as little work as possible, since servers share the cores."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, port: int) -> Client:
        """To a port."""
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    @classmethod
    async def get(cls, port: int, path: bytes) -> bytes:
        """The answer to one request by itself."""
        client = await cls.open(port)
        try:
            return await client.ask(b"GET " + path + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        finally:
            client.close()

    async def ask(self, request: bytes) -> bytes:
        """The answer to a request: head and body."""
        self._writer.write(request)
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head.lower())
        if length is None:
            raise OSError("an answer without its length")
        return head + await self._reader.readexactly(int(length[1]))

    def close(self) -> None:
        """Close it."""
        self._writer.close()


def requests_of(queries: np.ndarray[Any, Any]) -> list[bytes]:
    made = []
    for query in queries:
        body = json.dumps({"vector": [round(float(value), 6) for value in query]}).encode()
        head = f"POST /search?k={K} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        made.append(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return made


async def load(port: int, clients: int, seconds: float, requests: list[bytes]) -> dict[str, float]:
    """So many clients, each with one query under way at a time."""
    times: list[float] = []
    failed = 0
    end = time.perf_counter() + seconds

    async def one(number: int) -> None:
        nonlocal failed
        client = await Client.open(port)
        while (start := time.perf_counter()) < end:
            answer = await client.ask(requests[number % len(requests)])
            times.append(time.perf_counter() - start)
            failed += b" 200 " not in answer[:20]
            number += clients
        client.close()

    start = time.perf_counter()
    await asyncio.gather(*map(one, range(clients)))
    took = time.perf_counter() - start
    times.sort()
    return {
        "queries_per_second": len(times) / took,
        "p50_ms": 1000 * times[len(times) // 2],
        "p99_ms": 1000 * times[min(len(times) - 1, int(0.99 * len(times)))],
        "failed": failed,
    }


def in_process(rows: np.ndarray[Any, Any], queries: np.ndarray[Any, Any], together: int) -> float:
    """Queries per second of faiss by itself, with so many at a time."""
    import faiss

    index = faiss.IndexFlatIP(rows.shape[1])
    index.add(rows)
    done, start = 0, time.perf_counter()
    while (took := time.perf_counter() - start) < IN_PROCESS_S:
        first = done % (len(queries) - together + 1)
        index.search(queries[first : first + together], K)
        done += together
    return done / took


def memory_mb(process: subprocess.Popen[bytes], name: str) -> float:
    """Resident memory of the largest process of that name in the session of ours, or of the process itself."""
    largest = 0.0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if name in title or (not name and int(folder.name) == process.pid):
                pages = int((folder / "statm").read_text().split()[1])
                largest = max(largest, pages * os.sysconf("SC_PAGE_SIZE") / 1e6)
        except OSError:
            continue
    return largest


def measure(folder: Path, num_rows: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    index, vectors = folder / f"rows{num_rows}", folder / f"rows{num_rows}.npy"
    command(write_run(folder / f"run{num_rows}"), index, write_tar(folder / "few.tar", 0, 64))
    fill(index, num_rows)
    rows = open_collection(index).read("embeddings")
    np.save(vectors, rows)
    queries = np.random.default_rng(1).normal(size=(512, rows.shape[1])).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    measured = []
    for together in (1, 64):
        rate = in_process(rows, queries, together)
        measured.append(
            {"rows": num_rows, "what": f"faiss in process, {together} together", "queries_per_second": rate}
        )
    del rows
    requests = requests_of(queries)
    ours = ["instdisc.serve", str(index), "--limits.rate", "0", "--metrics.port", "0", "--no-whitened"]
    with ExitStack() as stack:
        servers = {
            "faiss behind FastAPI": stack.enter_context(
                server(["benchmarks.serve", "--plain", str(vectors), str(FIRST_PORT)], FIRST_PORT)
            ),
            "instdisc.serve": stack.enter_context(
                server([*ours, "--port", str(FIRST_PORT + 1)], FIRST_PORT + 1)
            ),
        }
        for port, _ in servers.values():
            asyncio.run(load(port, 4, 1.0, requests))  # first calls are slower
        for clients in options.clients:
            found: dict[str, list[dict[str, float]]] = {name: [] for name in servers}
            for _ in range(options.rounds):
                for name, (port, _) in servers.items():
                    found[name].append(asyncio.run(load(port, clients, options.seconds, requests)))
            for name, rounds in found.items():
                medians = {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
                measured.append({"rows": num_rows, "what": name, "clients": clients, **medians})
                print(json.dumps(measured[-1]), file=sys.stderr, flush=True)
        sizes = (("faiss behind FastAPI", ""), ("instdisc.serve", "ray::ServeReplica:instdisc:replica"))
        for name, title in sizes:
            resident = memory_mb(servers[name][1], title)
            measured.append({"rows": num_rows, "what": f"{name}, memory", "resident_mb": resident})
    return measured


def table(measured: list[dict[str, Any]]) -> str:
    lines = ["| rows | | clients | queries/s | p50, ms | p99, ms |", "|---|---|---|---|---|---|"]
    for row in measured:
        if "resident_mb" in row:
            lines.append(f"| {row['rows']:,} | {row['what']} | | {row['resident_mb']:,.0f} MB | | |")
            continue
        latency = f"{row['p50_ms']:.1f} | {row['p99_ms']:.1f}" if "p50_ms" in row else " | "
        lines.append(
            f"| {row['rows']:,} | {row['what']} | {row.get('clients', '')} | {row['queries_per_second']:,.1f} "
            f"| {latency} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="*", default=[50_000])
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 8, 64])
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plain", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plain:
        plain(Path(options.plain[0]), int(options.plain[1]))
        return
    measured: list[dict[str, Any]] = []
    for num_rows in options.rows:
        with tempfile.TemporaryDirectory() as folder:
            measured += measure(Path(folder), num_rows, options)
    print(table(measured))
    failed = sum(row.get("failed", 0) for row in measured)
    print(f"failed requests: {failed:.0f}")
    if options.json:
        options.json.write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
