"""Who may ask, and how much: tokens, rates and sizes."""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
import time
from collections import OrderedDict
from collections.abc import AsyncIterator

from instdisc.common.errors import ConfigError
from instdisc.settings.serve import TOKEN_VARIABLE, ServeConfig

COOKIE = "instdisc"
_SHORTEST = 16
_MOST_CLIENTS = 10_000


def read_token(config: ServeConfig) -> bytes | None:
    """The SHA-256 of the token, None if there is none.

    Raises:
        ConfigError: The file cannot be read or others may read it, the token is too short, or one is needed.
    """
    if config.token_file is None:
        token, place = os.environ.get(TOKEN_VARIABLE, ""), f"the environment variable {TOKEN_VARIABLE}"
        if not token and config.is_local:
            return None
        if not token:
            raise ConfigError(
                f"--host {config.host} lets other machines in, which need a token: write one into a file "
                "(`openssl rand -hex 32`) and name it with --token-file"
            )
    else:
        path, place = config.token_file.expanduser(), f"--token-file {config.token_file}"
        try:
            if path.stat().st_mode & (stat.S_IROTH | stat.S_IWOTH):
                raise ConfigError(f"{place} can be read by everybody: chmod 600 it")
            token = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{place} cannot be read ({error}): give a file with a token") from error
    if len(token) < _SHORTEST:
        raise ConfigError(
            f"the token of {place} has {len(token)} characters, expected {_SHORTEST} or more: take one of "
            "`openssl rand -hex 32`"
        )
    return hashlib.sha256(token.encode()).digest()


class Gate:
    """Compares tokens, in a time that does not depend on where they differ.

    Args:
        digest: The SHA-256 of the token, None where there is none.
        is_open: Whether reading needs no token.
    """

    def __init__(self, digest: bytes | None, *, is_open: bool) -> None:
        self.has_token, self.is_open = digest is not None, is_open
        self._digest = digest or b""

    @property
    def cookie(self) -> str:
        """What a browser carries instead of the token, which it cannot be computed back to."""
        return hmac.new(self._digest, b"instdisc page", hashlib.sha256).hexdigest()

    def knows_header(self, authorization: str | None) -> bool:
        """Whether a header `Authorization: Bearer TOKEN` holds the token."""
        scheme, _, token = (authorization or "").partition(" ")
        given = hashlib.sha256(token.strip().encode(errors="replace")).digest()
        return self.has_token and scheme.lower() == "bearer" and hmac.compare_digest(given, self._digest)

    def knows_cookie(self, value: str | None) -> bool:
        """Whether a cookie is `cookie`."""
        return self.has_token and hmac.compare_digest(
            (value or "").encode(errors="replace"), self.cookie.encode()
        )


class Rates:
    """Requests per second by address: a bucket for each of the addresses that asked last.

    Args:
        rate: Per second, and as many at once; 0 for any number.
    """

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait_s(self, address: str, now: float | None = None) -> float:
        """0 if the address may ask now, which then counts; otherwise in how many seconds it may."""
        if not self._rate:
            return 0.0
        now = time.monotonic() if now is None else now
        most = max(1.0, self._rate)
        left, since = self._buckets.pop(address, (most, now))
        left = min(most, left + (now - since) * self._rate)
        may = left >= 1
        self._buckets[address] = (left - 1 if may else left, now)
        if len(self._buckets) > _MOST_CLIENTS:
            self._buckets.popitem(last=False)
        return 0.0 if may else (1 - left) / self._rate


class TooLargeError(Exception):
    """A body is larger than it may be."""


async def read_body(stream: AsyncIterator[bytes], most: int, declared: str | None) -> bytes:
    """The body of a request, of which no more than is allowed is ever held.

    Args:
        stream: Its pieces.
        most: Bytes.
        declared: Its header Content-Length.

    Raises:
        TooLargeError: It has more, or says so.
    """
    if declared is not None and declared.isdecimal() and int(declared) > most:
        raise TooLargeError
    pieces, size = [], 0
    async for piece in stream:
        size += len(piece)
        if size > most:
            raise TooLargeError
        pieces.append(piece)
    return b"".join(pieces)
