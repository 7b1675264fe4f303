"""Where images lie: a path, or a URL of object storage that is handled like one."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from pipelines.errors import DataError

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(?:::[A-Za-z][A-Za-z0-9+.-]*)*://")
# What storage and its libraries write into messages: who signed in, and with what.
_SECRETS = re.compile(
    r"(?i)(?<=://)[^/@\s]+(?=@)|(?<=[?&])[^\s\"'>)]+"
    r"|(?<=\b)(?:authorization|password|secret\w*|token|signature)\b[\"']?\s*[:=]\s*[^\s,;]+(?: [^\s,;]+)?"
)


class Url(PurePosixPath):
    """A URL that `/`, `name`, `parent` and `relative_to` work on; written back as it was."""

    __slots__ = ()

    def __str__(self) -> str:
        head, _, rest = super().__str__().partition("/")
        return f"{head}//{rest}" if head.endswith(":") else super().__str__()

    def absolute(self) -> Url:
        """Itself: nothing is relative about it."""
        return self


Place = Path | Url
"""Of a folder or a file."""


def is_url(text: str | Path | Url) -> bool:
    """Whether this names a place by a scheme (`s3://…`) rather than by a path."""
    return isinstance(text, Url) or (isinstance(text, str) and _SCHEME.match(text) is not None)


def place(text: str | Path | Url) -> Place:
    """The place that a user named; `file://` is a path.

    Raises:
        DataError: It is a URL that holds credentials, or one without a host or bucket.
    """
    if isinstance(text, Path | Url) or not is_url(text):
        return text if isinstance(text, Path | Url) else Path(text)
    if text.startswith(("file://", "local://")):
        return Path(text.partition("://")[2])
    parts = urlsplit(text)
    web = parts.scheme in ("http", "https")
    if "@" in parts.netloc or (web and parts.query):
        raise DataError(
            f"{without_secrets(text)} holds credentials; leave them out: they would be stored with the settings. "
            "Give them where fsspec looks: the environment (AWS_ACCESS_KEY_ID, FSSPEC_HTTPS_CLIENT_KWARGS, …), the "
            "files of the provider's tools, or ~/.config/fsspec"
        )
    if not parts.netloc:
        raise DataError(f"{text} names no host or bucket, expected {parts.scheme}://HOST/PATH")
    return Url(text)


def below(root: Place, name: str) -> Place:
    """The place `name`, relative to `root` or a path or URL of its own."""
    if is_url(name):
        return Url(name)
    return Path(name) if name.startswith("/") else root / name


def without_secrets(text: object) -> str:
    """A message with what may be a credential in it crossed out."""
    return _SECRETS.sub("***", str(text))
