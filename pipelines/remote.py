"""Ranges of files in object storage, many at once, by whatever fsspec opens."""

from __future__ import annotations

import asyncio
import errno
import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple, TypeVar

import fsspec
from fsspec.asyn import AsyncFileSystem, sync
from fsspec.config import conf
from fsspec.exceptions import FSTimeoutError
from fsspec.registry import known_implementations

from pipelines.errors import DataError
from pipelines.places import Url, without_secrets

CONNECTIONS = 100
"""Requests under way at a time: at 20 ms each they are 5,000 a second."""
_ATTEMPTS = 6
_FIRST_WAIT_S = 0.5  # doubled each time
_TIMEOUT_S = 60.0
# Bytes that are read and thrown away rather than asked around: a request costs more than that.
_GAP = 16 << 10
_LARGEST = 8 << 20

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


class Span(NamedTuple):
    """Bytes `start` … `stop` - 1 of a file."""

    url: Url
    start: int
    stop: int


class Facts(NamedTuple):
    """What storage says of a file without sending it."""

    size: int
    version: str
    """Changes with the content: its tag or time; empty where the storage tells neither."""


class StorageError(DataError):
    """The storage stayed away, however often it was tried."""


def read_ranges(ranges: Sequence[Span]) -> list[bytes | OSError]:
    """Read ranges, any number of them at once; those that lie close together are one request.

    Returns:
        The bytes of each, fewer where the file ends before, or why this file alone cannot be read.

    Raises:
        StorageError: The storage stays away: what it last said, how often it was asked.
        DataError: The scheme is not known or not installed, or access is refused.
    """
    merged, parts = _merged(ranges)
    found = _read(merged)
    results: list[bytes | OSError] = []
    for number, wanted in zip(parts, ranges, strict=True):
        data = found[number]
        start = wanted.start - merged[number].start
        results.append(data[start : start + wanted.stop - wanted.start] if isinstance(data, bytes) else data)
    return results


def facts(url: Url) -> Facts:
    """Size and version of a file.

    Raises:
        FileNotFoundError: There is none.
        DataError: As `read_ranges`.
    """
    info = _patiently(url, lambda system, path: system.info(path))
    if info.get("size") is None:
        raise DataError(f"{url}: the server does not tell its size, so no part of it can be asked for")
    tags = (
        info.get(name)
        for name in ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "mtime", "created")
    )
    return Facts(int(info["size"]), next((str(tag) for tag in tags if tag), ""))


def list_tars(url: Url) -> list[Url]:
    """The tar files directly in a folder, or those that a pattern (`*`, `?`, `[…]`) stands for; sorted.

    Raises:
        DataError: As `read_ranges`, or the storage cannot list.
    """
    is_pattern = any(sign in str(url) for sign in "*?[")

    def find(system: Any, path: str) -> list[str]:
        found = system.glob(path) if is_pattern else system.ls(path, detail=False)
        return [system.unstrip_protocol(name.rstrip("/")) for name in found]

    try:
        names = _patiently(url, find)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [Url(name) for name in sorted(names) if is_pattern or name.lower().endswith(".tar")]


def _merged(ranges: Sequence[Span]) -> tuple[list[Span], list[int]]:
    """Ranges that cover the given ones, and the number of the one that covers each."""
    merged: list[Span] = []
    parts = [0] * len(ranges)
    for index in sorted(range(len(ranges)), key=ranges.__getitem__):
        wanted, last = ranges[index], merged[-1] if merged else None
        if (
            last
            and last.url == wanted.url
            and wanted.start <= last.stop + _GAP
            and wanted.stop - last.start <= _LARGEST
        ):
            merged[-1] = last._replace(stop=max(last.stop, wanted.stop))
        else:
            merged.append(wanted)
        parts[index] = len(merged) - 1
    return merged, parts


def _read(ranges: Sequence[Span]) -> list[bytes | OSError]:
    """As `read_ranges`, without merging."""
    results: dict[int, bytes | OSError] = {}
    tries = _Tries()
    while left := [number for number in range(len(ranges)) if number not in results]:
        failed: dict[int, Exception] = {}
        for number, found in zip(left, _ask([ranges[number] for number in left]), strict=True):
            judged = _judge(ranges[number], found)
            if isinstance(judged, bytes | OSError):
                results[number] = judged
            else:
                failed[number] = judged.error
        if failed:
            number, error = next(iter(failed.items()))
            tries.again(ranges[number].url, error)
    return [results[number] for number in range(len(ranges))]


class _MayPass(NamedTuple):
    error: Exception


def _judge(wanted: Span, found: Any) -> bytes | OSError | _MayPass:
    if isinstance(found, bytes | bytearray | memoryview):
        if len(found) > wanted.stop - wanted.start:
            raise DataError(
                f"{wanted.url}: asked for {wanted.stop - wanted.start} bytes, got {len(found)}: the server sends whole "
                "files only; it must answer requests for ranges"
            )
        return bytes(found)
    if not isinstance(found, Exception):
        raise found
    status = _status(found)
    if status == 416 or (isinstance(found, OSError) and found.errno == errno.EINVAL):
        return b""  # the file ends before
    if isinstance(found, FileNotFoundError) or status == 404:
        return FileNotFoundError(errno.ENOENT, "not there")
    if _is_refusal(found, status):
        raise _refusal(wanted.url, found)
    return _MayPass(found)


def _ask(ranges: Sequence[Span]) -> list[Any]:
    """Every range once: its bytes or the exception."""
    system = _system(ranges[0].url)
    paths = [system._strip_protocol(str(each.url)) for each in ranges]
    starts, stops = [each.start for each in ranges], [each.stop for each in ranges]
    try:
        if isinstance(system, AsyncFileSystem):
            found: list[Any] = sync(
                system.loop,
                system._cat_ranges,
                *(paths, starts, stops),
                batch_size=CONNECTIONS,
                on_error="return",
                timeout=_TIMEOUT_S,
            )
            return found
        return list(system.cat_ranges(paths, starts, stops, on_error="return"))
    except Exception as error:
        return [error] * len(ranges)


def _patiently(url: Url, ask: Callable[[Any, str], Result]) -> Result:
    """Ask the storage one thing until it answers.

    Raises:
        FileNotFoundError: There is nothing.
        DataError: As `read_ranges`.
    """
    tries = _Tries()
    system = _system(url)
    while True:
        try:
            return ask(system, system._strip_protocol(str(url)))
        except NotImplementedError as error:
            raise DataError(f"{url}: this storage cannot be listed; name each tar file") from error
        except Exception as error:
            cause = _cause(error)
            if isinstance(cause, FileNotFoundError | NotADirectoryError) or _status(cause) == 404:
                raise FileNotFoundError(errno.ENOENT, without_secrets(cause), str(url)) from error
            if _is_refusal(cause, _status(cause)):
                raise _refusal(url, cause) from error
            tries.again(url, cause)


def _cause(error: Exception) -> Exception:
    """What happened; over HTTP fsspec calls whatever happened "not found"."""
    cause = error.__cause__
    over_http = isinstance(cause, Exception) and type(cause).__module__.startswith("aiohttp")
    return cause if isinstance(cause, Exception) and over_http else error


class _Tries:
    """Counts attempts and waits longer after each."""

    def __init__(self) -> None:
        self._failed, self._started = 0, time.monotonic()

    def again(self, url: Url, error: Exception) -> None:
        """Wait before the next attempt.

        Raises:
            StorageError: That was the last one.
        """
        self._failed += 1
        said = without_secrets(error).strip() or type(error).__name__
        if isinstance(error, FSTimeoutError | asyncio.TimeoutError | TimeoutError):
            said = f"no answer within {_TIMEOUT_S:.0f} s"
        if self._failed >= _ATTEMPTS:
            seconds = time.monotonic() - self._started
            raise StorageError(
                f"cannot read {url}: tried {_ATTEMPTS} times in {seconds:.0f} s, the last time: {said}; check "
                "the storage and the connection to it. The same command resumes from the newest snapshot"
            ) from None
        logger.log(logging.WARNING if self._failed == 3 else logging.INFO, "%s: %s; trying again", url, said)
        time.sleep(_FIRST_WAIT_S * 2 ** (self._failed - 1))


def _status(error: BaseException) -> int | None:
    status = getattr(error, "status", None)
    return status if isinstance(status, int) else None


def _is_refusal(error: BaseException, status: int | None) -> bool:
    names = {each.__name__ for each in type(error).__mro__}
    return (
        isinstance(error, PermissionError)
        or status in (401, 403)
        or bool(
            names
            & {"NoCredentialsError", "PartialCredentialsError", "ParamValidationError", "ProfileNotFound"}
        )
    )


def _refusal(url: Url, error: BaseException) -> DataError:
    return DataError(
        f"no right to read {url}: {without_secrets(error).strip() or type(error).__name__}; give credentials where "
        "fsspec looks for them (for S3 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or ~/.aws), on every node"
    )


_opening = threading.Lock()


def _system(url: Url) -> Any:
    with _opening:
        return _opened(str(url).partition("://")[0])


@cache
def _opened(scheme: str) -> Any:
    """The file system of a scheme.

    Raises:
        DataError: It is not known, or its package is not installed, which is named.
    """
    options: dict[str, Any] = {}
    if scheme in ("s3", "s3a"):
        given = conf.get(scheme, {}).get("config_kwargs", {})
        options["config_kwargs"] = {"max_pool_connections": CONNECTIONS, **given}
    try:
        return fsspec.filesystem(scheme, use_listings_cache=False, **options)
    except ImportError as error:
        known = known_implementations.get(scheme, {}).get("err", str(error)).strip()
        package = (
            "the extra: pip install 'instdisc[s3]'" if scheme in ("s3", "s3a") else f"its package: {known}"
        )
        raise DataError(f"{scheme}:// URLs need {package}") from error
    except ValueError as error:
        raise DataError(
            f"{scheme}:// is not a kind of URL that fsspec knows: {without_secrets(error)}; it knows s3, gs, az, "
            "https, …"
        ) from error
