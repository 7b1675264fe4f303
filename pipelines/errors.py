"""Errors that a user of the data side can do something about."""


class DataError(ValueError):
    """The data cannot be used as given; the message says what was found, what was expected and what to do."""
