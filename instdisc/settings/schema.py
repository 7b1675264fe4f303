"""Settings as they are stored, in `config.json` and in snapshots, and how those of earlier versions are read.

Stored settings carry a schema number. It rises when a field is added, renamed or removed; the tables below say how to
read what an earlier version wrote. Recipes may change at any time: a run resumes with its own settings.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from instdisc.common.errors import ConfigError
from instdisc.settings.objectives import ObjectiveConfig
from instdisc.settings.run import RunConfig

T = TypeVar("T")

SCHEMA = 2
"""Of what this version writes. Version 0.1.0 wrote 1, without saying so."""

NOT_SETTINGS = ("schema", "recipe", "run_id", "objective_type")
"""What `config.json` holds besides the settings."""

_RENAMED: dict[int, dict[str, str]] = {1: {"probe.neighbours": "knn.k", "probe": "knn"}}
"""By schema, for what was written under it: each field that has another name now, the innermost first."""

_ADDED: dict[int, dict[str, Any]] = {
    1: {
        "data.label_key": None,
        "data.fraction": 1.0,
        "data.cache": None,
        "data.cache_bytes": 100_000_000_000,
        "data.rescan": False,
        "knn.max_rows": 0,
        "snapshots.keep_best": None,
        "backbone.stem": "auto",
        "augmentation.squash": False,
        "init": {},
        "optimizer.backbone_rate_scale": 1.0,
        "optimizer.frozen_epochs": 0.0,
    }
}
"""By schema: each field that its writers did not know, and the value that does what they did."""

_OBJECTIVES_OF_SCHEMA_1 = {
    "sample": "SpreadingConfig",
    "cifar10-npid": "NCEConfig",
    "cifar10-softmax": "SoftmaxConfig",
    "cifar10-parametric": "ParametricSoftmaxConfig",
    "cifar10-spreading": "SpreadingConfig",
    "imagenet-resnet50-npid": "NCEConfig",
    "imagenet-resnet50-infonce": "InfoNCEConfig",
    "imagenet-resnet50-softmax": "SoftmaxConfig",
}
"""Its settings did not name the objective, which followed from the recipe."""


def to_json(config: RunConfig, recipe: str, run_id: str) -> dict[str, Any]:
    """What `config.json` holds; see `from_json`."""
    return {
        "schema": SCHEMA,
        "recipe": recipe,
        "run_id": run_id,
        "objective_type": type(config.objective).__name__,
        **config.settings(),
    }


def from_json(stored: Mapping[str, Any], where: str) -> RunConfig:
    """The settings of a run as this version understands them.

    Args:
        stored: What `to_json` of this or an earlier version returned.
        where: For messages: the file.

    Raises:
        ConfigError: A later version wrote them, or they hold a setting that neither version knows.
    """
    schema = _schema(stored, where)
    objective_type = stored.get("objective_type") or _OBJECTIVES_OF_SCHEMA_1.get(str(stored.get("recipe")))
    objective = {each.__name__: each for each in _subclasses(ObjectiveConfig)}.get(str(objective_type))
    if objective is None:
        raise ConfigError(f"{where} uses the objective {objective_type}, which this version does not have")
    values = {name: value for name, value in stored.items() if name not in NOT_SETTINGS}
    values = _translated(values, schema)
    return _built(RunConfig, values, where, {"objective": objective})


def section(kind: type[T], name: str, stored: Mapping[str, Any], where: str) -> T:
    """One group of settings, for example the `backbone` of a snapshot.

    Args:
        kind: Its class.
        name: Its name in `RunConfig`.
        stored: A mapping with the group under that name, and perhaps `schema`.
        where: For messages.

    Raises:
        ConfigError: As `from_json`.
    """
    values = _translated({name: stored[name]}, _schema(stored, where))
    return _built(kind, values[name], f"{where}: {name}", {})


def _subclasses(kind: type[ObjectiveConfig]) -> Iterator[type[ObjectiveConfig]]:
    """Those of this package, and those that an objective outside of it defines."""
    for each in kind.__subclasses__():
        yield each
        yield from _subclasses(each)


def _schema(stored: Mapping[str, Any], where: str) -> int:
    schema = stored.get("schema", 1)
    if not isinstance(schema, int) or not 1 <= schema <= SCHEMA:
        raise ConfigError(
            f"{where} has schema {schema}, and this version reads 1 to {SCHEMA}: use the version that wrote it"
        )
    return schema


def _translated(values: dict[str, Any], schema: int) -> dict[str, Any]:
    """Stored values under their current names, with those that their writer did not know."""
    values = {name: dict(each) if isinstance(each, Mapping) else each for name, each in values.items()}
    for version in range(schema, SCHEMA):
        for old, new in _RENAMED[version].items():
            _move(values, old, new)
        for name, value in _ADDED[version].items():
            group, _, field = name.rpartition(".")
            if not group or group in values:
                (values[group] if group else values).setdefault(field, value)
    return values


def _move(values: dict[str, Any], old: str, new: str) -> None:
    group, _, field = old.rpartition(".")
    place = values.get(group, {}) if group else values
    if field in place:
        # A group that is renamed too moves afterwards, with what it holds.
        place[new.rpartition(".")[2]] = place.pop(field)


def _built(kind: type[T], values: Mapping[str, Any], where: str, chosen: Mapping[str, type]) -> T:
    """A dataclass from JSON values.

    Args:
        kind: The dataclass.
        values: By name of the field; one that is missing gets its default.
        where: For messages.
        chosen: The class of a field whose annotation leaves several.
    """
    hints = typing.get_type_hints(kind)
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    unknown = [name for name in values if name not in known]
    if unknown:
        raise ConfigError(
            f"{where} holds the setting {unknown[0]}, which this version does not know: use the version that wrote it"
        )
    fields: dict[str, Any] = {}
    for name, value in values.items():
        hint = chosen.get(name, hints[name])
        if dataclasses.is_dataclass(hint) != isinstance(value, Mapping):
            raise ConfigError(
                f"{where} has {value!r} for {name}: restore the file, or use the version that wrote it"
            )
        if isinstance(value, Mapping):
            fields[name] = _built(hint, value, f"{where}: {name}", {})
        elif isinstance(value, list):
            fields[name] = tuple(value)
        else:
            fields[name] = Path(value) if isinstance(value, str) and _is_path(hint) else value
    try:
        return kind(**fields)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where} cannot be read ({error}): use the version that wrote it") from error


def _is_path(hint: Any) -> bool:
    return hint is Path or (isinstance(hint, types.UnionType) and Path in typing.get_args(hint))
