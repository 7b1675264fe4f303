"""Nested values, compared leaf by leaf."""

from __future__ import annotations

from typing import Any


def differences(theirs: Any, ours: Any, name: str = "") -> list[str]:
    """`NAME is THEIRS there and OURS here` for every leaf of nested dictionaries that differs."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        found = []
        for key in sorted(theirs.keys() | ours.keys()):
            found += differences(theirs.get(key), ours.get(key), f"{name}.{key}" if name else key)
        return found
    return [] if theirs == ours else [f"{name} is {theirs!r} there and {ours!r} here"]
