"""Changes of the index, made by the same program as on the command line, in a process of its own."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cluster.lease import holder_of
from cluster.storage import Storage
from instdisc.runs.claim import INDEX_LEASE
from instdisc.settings.serve import ServeConfig

_UNKNOWN = "unknown: "
_NOTHING_REMOVED = "error: none of the "

logger = logging.getLogger(__name__)


class ChangeRefusedError(Exception):
    """A change that was not made; says why, without a path."""

    def __init__(self, message: str, *, is_busy: bool = False) -> None:
        super().__init__(message)
        self.is_busy = is_busy


class _Ended(NamedTuple):
    status: int
    said: str
    errors: str


class Changes:
    """One change after the other.

    Args:
        config: Which index, and from where images may be added.
    """

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._one_at_a_time = asyncio.Lock()

    async def add(self) -> None:
        """Embed what the places of `--add-from` hold and the index lacks, or has otherwise.

        Raises:
            ChangeRefusedError: There are no such places, another process writes to the index, or it fails.
        """
        if not self._config.add_from:
            raise ChangeRefusedError(
                "this server adds no images: whoever runs it says with --add-from where new ones appear"
            )
        for place in self._config.add_from:
            ended = await self._run("--append", "--data.path", place)
            self._check(ended)

    async def remove(self, keys: Sequence[str]) -> dict[str, Any]:
        """Remove images by their keys; patterns too, as the program takes them.

        Returns:
            `unknown`: the keys that the index does not have.

        Raises:
            ChangeRefusedError: Another process writes to the index, or it fails.
        """
        for key in keys:
            if "\n" in key or not key:
                raise ChangeRefusedError("a key is empty or has a line break")
        with tempfile.TemporaryDirectory(prefix="instdisc-") as folder:
            file = Path(folder, "keys.txt")
            file.write_text("\n".join(keys) + "\n", encoding="utf-8", errors="surrogateescape")
            ended = await self._run("--remove", f"@{file}")
        unknown = [
            line.removeprefix(_UNKNOWN) for line in ended.said.splitlines() if line.startswith(_UNKNOWN)
        ]
        if not ended.errors.startswith(_NOTHING_REMOVED):
            self._check(ended)
        return {"unknown": unknown}

    async def _run(self, *arguments: str) -> _Ended:
        async with self._one_at_a_time:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "instdisc.embed", "--output", self._config.index),
                *("--num-actors", "0", *arguments),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
            try:
                said, errors = await process.communicate()
            except asyncio.CancelledError:
                process.terminate()  # whatever is embedded is kept for the next attempt
                raise
        assert process.returncode is not None
        lines = errors.decode(errors="replace").replace("\r", "\n").splitlines()
        told = [line for line in lines if line.startswith("error: ")]
        return _Ended(process.returncode, said.decode(errors="replace"), told[-1] if told else "")

    def _check(self, ended: _Ended) -> None:
        if ended.status == 0:
            return
        logger.warning("a change of the index failed with status %d: %s", ended.status, ended.errors)
        if "is writing to" in ended.errors:
            holder = holder_of(Storage.at(self._config.index), INDEX_LEASE)
            named = f": process {holder.pid} of {holder.host}" if holder else ""
            raise ChangeRefusedError(f"another process is writing to the index{named}", is_busy=True)
        raise ChangeRefusedError("the change was not made; the log of the server says why")
