"""Errors that a user of the data side can do something about."""

from collections.abc import Iterator
from contextlib import contextmanager


class DataError(ValueError):
    """The data cannot be used as given; the message says what was found, what was expected and what to do."""


@contextmanager
def naming_the_cause(what: str) -> Iterator[None]:
    """Turn an error of the operating system into a `DataError`: "cannot <what>: <its reason>, <its file>"."""
    try:
        yield
    except OSError as error:
        where = "" if error.filename is None else f", {error.filename}"
        raise DataError(f"cannot {what}: {error.strerror or error}{where}") from error
