"""What waits is done together: one call for all requests that came in while the call before ran."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class TooManyWaitError(Exception):
    """More wait than may."""


class Together(Generic[Item, Result]):
    """Calls a function, in a thread of its own, with all items that wait; an item that is alone waits for nothing.

    Args:
        function: Returns a result for every item.
        most: Items per call.
        waiting: Items that may wait.
    """

    def __init__(
        self, function: Callable[[list[Item]], Sequence[Result]], *, most: int, waiting: int
    ) -> None:
        self._function, self._most, self._most_waiting = function, most, waiting
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="together")
        self._waiting: list[tuple[Item, asyncio.Future[Result]]] = []
        self._running: asyncio.Task[None] | None = None

    async def __call__(self, item: Item) -> Result:
        """The result for an item.

        Raises:
            TooManyWaitError: Now.
            Exception: What the function raised.
        """
        if len(self._waiting) >= self._most_waiting:
            raise TooManyWaitError
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        self._waiting.append((item, future))
        if self._running is None:
            self._running = loop.create_task(self._run())
        return await future

    def close(self) -> None:
        """Begin no further call."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            taken, self._waiting = self._waiting[: self._most], self._waiting[self._most :]
            taken = [
                (item, future) for item, future in taken if not future.done()
            ]  # its client may have left
            if not taken:
                continue
            try:
                results = await loop.run_in_executor(
                    self._thread, self._function, [item for item, _ in taken]
                )
            except Exception as error:
                for _, future in taken:
                    if not future.done():
                        future.set_exception(error)
            else:
                for (_, future), result in zip(taken, results, strict=True):
                    if not future.done():
                        future.set_result(result)
        self._running = None
