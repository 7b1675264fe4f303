"""Which runs a comparison has; without what takes seconds to import."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Sequence

from instdisc.common.errors import ConfigError
from instdisc.settings.compare import CompareConfig
from instdisc.settings.run import RunConfig

Parse = Callable[[Sequence[str]], tuple[str, RunConfig]]
"""How training reads its command line."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One run to be compared.

    Attributes:
        name: Of its directory.
        recipe: Its recipe.
        varied: The settings in which the runs differ, by name, as typed.
        config: All of its settings.
    """

    name: str
    recipe: str
    varied: dict[str, str]
    config: RunConfig


def plan_points(recipe: str, config: CompareConfig, options: Sequence[str], parse: Parse) -> list[Point]:
    """All combinations, every one of them parsed.

    Args:
        recipe: The first recipe.
        config: What is varied.
        options: Of training, the same for all.
        parse: Reads recipe and options.

    Raises:
        ConfigError: A setting that is no NAME=VALUES, is varied twice, is unknown, or a value that cannot be.
    """
    varied = dict(_values(text) for text in config.vary)
    if len(varied) < len(config.vary):
        raise ConfigError("a setting is varied twice: give all of its values in one --vary")
    short = {name: name.rpartition(".")[2] for name in varied}
    names = {name: short[name] if list(short.values()).count(short[name]) == 1 else name for name in varied}
    recipes = list(
        dict.fromkeys([recipe, *(each.strip() for each in config.recipes.split(",") if each.strip())])
    )
    points = []
    for each, values in itertools.product(recipes, itertools.product(*varied.values())):
        chosen = dict(zip(varied, values, strict=True))
        parts = [each] if len(recipes) > 1 or not chosen else []
        parts += [f"{names[name]}={value}" for name, value in chosen.items()]
        name = re.sub(r"[^\w=.,+-]+", "_", ",".join(parts))
        typed = [word for setting, value in chosen.items() for word in (f"--{setting}", *value.split())]
        place = ["--run-dir", str(config.run_dir / "points" / name)]
        _, parsed = parse([each, *options, *typed, *place])
        points.append(Point(name=name, recipe=each, varied=chosen, config=parsed))
    return points


def _values(text: str) -> tuple[str, list[str]]:
    name, given, values = text.partition("=")
    found = [value.strip() for value in values.split(",")]
    if not given or not name.strip() or not all(found):
        raise ConfigError(f"--vary {text!r}: expected NAME=VALUE,VALUE, such as training.seed=0,1,2")
    return name.strip().removeprefix("--"), list(dict.fromkeys(found))
