"""Ranges of settings, declared with the type of a field and checked when the settings are made."""

from __future__ import annotations

import math
import typing
from dataclasses import dataclass
from typing import Annotated

_MOST_BITS = 63  # of what torch, Arrow and Zarr store, beside the sign


@dataclass(frozen=True)
class Range:
    """The finite numbers that a field may hold: `momentum: Annotated[float, Range(at_least=0, below=1)]`.

    A field that is a tuple must hold one number or more, all of them in the range. None is always allowed.
    """

    at_least: float = -math.inf
    above: float = -math.inf
    at_most: float = math.inf
    below: float = math.inf
    usual: str = ""
    """Said in the message, where it helps."""

    def holds(self, number: float) -> bool:
        """Whether the number is in the range; NaN never is, and neither is a whole number of more than 64 bits."""
        if isinstance(number, int) and number.bit_length() > _MOST_BITS:
            return False
        return self.at_least <= number <= self.at_most and self.above < number < self.below

    def __str__(self) -> str:
        bounds = {
            "at least": self.at_least,
            "above": self.above,
            "at most": self.at_most,
            "below": self.below,
        }
        return " and ".join(f"{name} {bound:g}" for name, bound in bounds.items() if math.isfinite(bound))


Count = Annotated[int, Range(at_least=1)]
Amount = Annotated[float, Range(at_least=0)]
Positive = Annotated[float, Range(above=0)]


class Ranged:
    """Base of settings whose fields declare ranges; a subclass that repeats a field keeps the range of its base."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ValueError: With the field, its value, the range and what is usual.
        """
        for kind in type(self).__mro__:
            for name, hint in typing.get_type_hints(kind, include_extras=True).items():
                for allowed in getattr(hint, "__metadata__", ()):
                    if isinstance(allowed, Range):
                        _check(name, getattr(self, name), allowed)


def _check(name: str, value: float | tuple[float, ...] | None, allowed: Range) -> None:
    numbers = value if isinstance(value, tuple) else () if value is None else (value,)
    if all(map(allowed.holds, numbers)) and value != ():
        return
    several = "one or more, each " if isinstance(value, tuple) else ""
    fits = all(number.bit_length() <= _MOST_BITS for number in numbers if isinstance(number, int))
    finite = "" if not fits or all(map(math.isfinite, numbers)) else "finite and "
    finite += "" if fits else f"below 2^{_MOST_BITS} and "
    usual = f"; usual: {allowed.usual}" if allowed.usual else ""
    raise ValueError(f"{name} is {value}, expected {several}{finite}{allowed}{usual}")
