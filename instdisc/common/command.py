"""What all programs share: how they read options, how they say what went wrong, and with which status they exit."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import os
import re
import select
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

from cluster.errors import ClusterError, SnapshotError, SnapshotWriteError
from cluster.stopping import RunStopped, signals_as_interrupt
from instdisc.common.errors import ConfigError, NonFiniteError
from pipelines.errors import DataError

T = TypeVar("T")

logger = logging.getLogger(__name__)

_STATUS: tuple[tuple[type[BaseException], int], ...] = (
    (SnapshotWriteError, 1),
    (ConfigError, 2),
    (DataError, 2),
    (NonFiniteError, 2),
    (SnapshotError, 2),
    (ClusterError, 1),
    (OSError, 1),
)
"""Exit status by class of error, the first match counts: 2 for what the user can fix, 1 for the cluster or a disk."""


class _RefusedError(Exception):
    """What a class of settings says of its values: no ValueError, which tyro would report in words of its own."""


class _OurStructs:
    """A rule for tyro: its own, but the help of a field is one line, and errors of settings are passed on.

    By itself tyro keeps the line breaks of docstrings below fields, as their lines are indented.
    """

    def __init__(self) -> None:
        self._asking = False

    def __call__(self, info: StructTypeInfo) -> StructConstructorSpec | None:
        if self._asking:
            return None
        self._asking = True
        try:
            spec = ConstructorRegistry.get_struct_spec(info)
        finally:
            self._asking = False
        if not isinstance(spec, StructConstructorSpec):
            return None

        def instantiate(*values: Any, **named: Any) -> Any:
            try:
                return spec.instantiate(*values, **named)
            except ValueError as error:
                raise _RefusedError(str(error)) from error

        return dataclasses.replace(
            spec, fields=tuple(map(self._joined, spec.fields)), instantiate=instantiate
        )

    @staticmethod
    def _joined(field: StructFieldSpec) -> StructFieldSpec:
        def helptext() -> str | None:
            text = field.helptext() if callable(field.helptext) else field.helptext
            return None if text is None else " ".join(text.split())

        return dataclasses.replace(field, helptext=helptext)


def read_options(
    settings: Callable[..., T], arguments: Sequence[str], *, program: str, description: str, **options: Any
) -> T:
    """Read the command line of a program into its settings.

    Args:
        settings: The dataclass.
        arguments: Without the program's name.
        program: As it is typed after `python -m`.
        description: What it does.
        options: Further ones of `tyro.cli`.

    Raises:
        ConfigError: An option is unknown or missing, or a value is of the wrong kind or out of its range.
        SystemExit: Help was asked for (status 0).
    """
    registry = ConstructorRegistry()
    registry.struct_rule(_OurStructs())
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            values: T = tyro.cli(
                settings,
                args=arguments,
                prog=f"python -m {program}",
                description=description,
                registry=registry,
                **options,
            )
    except _RefusedError as error:
        raise ConfigError(_with_flag(str(error), arguments)) from error
    except SystemExit as ended:
        if ended.code:
            raise ConfigError(f"{_unboxed(said.getvalue())}; see python -m {program} --help") from ended
        raise
    return values


def _unboxed(text: str) -> str:
    """What a box of tyro's says, on one line: the message, and the option that may have been meant."""
    plain = " ".join(re.sub("[│╭╮╰╯]", " ", text).split())
    _, message, *hints = re.split(
        " ?(?:─{2,}|-{4,}) ?", plain
    )  # lines of - where the output cannot show others
    missing = re.match(r"Missing from .*?: (?:-.*?(?=--))?(\S+)", message)
    meant = re.match(r"Perhaps you meant: (--\S+)", hints[0])
    said = f"{missing[1]} is missing" if missing else message.removeprefix("Error parsing ").rstrip(".")
    return f"{said}; did you mean {meant[1]}?" if meant else said


def _with_flag(message: str, arguments: Sequence[str]) -> str:
    """A message `NAME is VALUE, …` with the option that was typed for it; of several of that name the one so set."""
    name, _, rest = message.partition(" ")
    value = rest.removeprefix("is ").partition(",")[0]
    found = []
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        flag, _, given = argument.partition("=")
        if flag.startswith("--") and flag.lstrip("-").rpartition(".")[2].replace("-", "_") == name:
            found.append((flag, given or following))
    if not found:
        return message
    return f"{next((flag for flag, typed in found if _is_same(typed, value)), found[0][0])} {rest}"


def _is_same(typed: str, value: str) -> bool:
    try:
        return float(typed) == float(value)
    except ValueError:
        return typed == value.strip("'")


def run(
    program: Callable[[Sequence[str]], int | None],
    arguments: Sequence[str] | None,
    *,
    level: int = logging.WARNING,
) -> int:
    """Run a program to its exit status.

    Args:
        program: Called with the arguments; returns its status, None for 0.
        arguments: Without the program's name; those of this process if None.
        level: From which level on log messages are shown on standard error.

    Returns:
        0; 2 after an error that the user can fix, 1 after one of the cluster or of a disk, or when the reader of
        the output closed it; 130 after Ctrl-C or SIGTERM.
    """
    _open_closed_streams()
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path need not be UTF-8; so does standard error
    try:
        with signals_as_interrupt():
            try:
                return program(sys.argv[1:] if arguments is None else arguments) or 0
            finally:
                sys.stdout.flush()
    except RunStopped as stopped:
        print(stopped, file=sys.stderr)
        return 130
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "interrupted", file=sys.stderr)
        return 130
    except tuple(kind for kind, _ in _STATUS) as error:
        logger.debug("", exc_info=True)
        if _output_is_closed():
            return 1
        print(f"error: {_deleted_directory(error) or error}", file=sys.stderr)
        return next(status for kind, status in _STATUS if isinstance(error, kind))
    except RuntimeError as error:
        if "home directory" not in str(error):  # which is how pathlib says it
            raise
        print("error: a path begins with ~ and is in nobody's home directory: write it out", file=sys.stderr)
        return 2


def _deleted_directory(error: BaseException) -> str | None:
    """What to say of an error that comes from a working directory that is gone, which names no file itself."""
    if not isinstance(error, FileNotFoundError) or error.filename is not None:
        return None
    with contextlib.suppress(FileNotFoundError):
        Path.cwd()
        return None
    return (
        "the directory in which this program runs was deleted. If it is a submitted job's: Ray's nodes on one machine "
        "delete each other's copies of it; start each with a --temp-dir of its own"
    )


def _open_closed_streams() -> None:
    """Let standard streams that were closed, as by `>&-`, drop what is written to them.

    Else Python has none, and the next file that is opened gets their number, to which libraries may write messages.
    """
    for number in range(3):
        with contextlib.suppress(OSError):
            os.fstat(number)
            continue
        os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, which is this one
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115


def _output_is_closed() -> bool:
    """Whether the reader of standard output closed it, as `| head` does; what is left of the output is dropped then."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        closed = any(events & select.POLLERR for _, events in poll.poll(0))
    except OSError:  # a standard output of no file, as under a test
        return False
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more as it exits
    return closed
