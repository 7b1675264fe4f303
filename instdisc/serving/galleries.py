"""What `instdisc.explore` found in an index, by the keys of its images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster.collection import Collection
from instdisc.common.files import parse_object, read_regular
from instdisc.serving.state import State

_MOST_SHOWN = 60
_NONE = {
    "missing": "nothing of this index: run python -m instdisc.explore INDEX, and reload the page",
    "changed": "what was found is of an earlier state of the index: run python -m instdisc.explore INDEX again",
}


def explored_place(index: Collection, given: Path | None) -> Path:
    """Where what was found lies; by default where `instdisc.explore` writes it."""
    if given is not None:
        return given.expanduser().absolute()
    name = index.url.rstrip("/").rpartition("/")[2]
    return Path("evaluation", name, f"step-{index.step:09d}").absolute()


def galleries(state: State, place: Path) -> dict[str, Any]:
    """Near duplicates, strangers and clusters; for each that is not there the reason, under `missing`."""
    found: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for name, shown in (("duplicates", _groups), ("strangers", _groups), ("clusters", _clusters)):
        values, why = _read(state, place / f"{name}.json")
        if values is None:
            missing[name] = why
        else:
            found[name] = shown(state, values)
    return {**found, "missing": missing}


def map_of(state: State, place: Path) -> dict[str, Any]:
    """Places (x, y) of up to 10,000 images spread over the index; the reason, under `missing`, if there is no map."""
    values, why = _read(state, place / "map.json")
    if values is None:
        return {"missing": why}
    rows = values["shown"]["rows"]
    return {
        "images": values["images"],
        "keys": [state.key(row) for row in rows],
        "labels": [state.label(row) for row in rows],
        "places": values["shown"]["places"],
    }


def _read(state: State, path: Path) -> tuple[dict[str, Any] | None, str]:
    try:
        values = parse_object(read_regular(path))
    except OSError:
        values = None
    if values is None:
        return None, _NONE["missing"]
    identity = dict(state.index.identity)
    if identity != {name: values.get(name) for name in identity}:
        return None, _NONE["changed"]
    return values, ""


def _groups(state: State, values: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            **_named(state, each["row"]),
            "others": [
                {**_named(state, row), "similarity": similarity}
                for row, similarity in zip(each["others"], each["similarities"], strict=False)
                if row >= 0
            ],
        }
        for each in values["shown"][:_MOST_SHOWN]
    ]


def _named(state: State, row: int) -> dict[str, Any]:
    return {"key": state.key(row), "label": state.label(row)}


def _clusters(state: State, values: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "count": int(count),
            "clusters": [
                {
                    "images": size,
                    "central": [
                        {**_named(state, each["row"]), "similarity": each["similarity"]}
                        for each in central[:_MOST_SHOWN]
                    ],
                }
                for size, central in zip(found["sizes"], found["central"], strict=True)
            ],
        }
        for count, found in values["clusters"].items()
    ]
