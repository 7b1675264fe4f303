"""The settings of `python -m instdisc.train auto`, and any settings as the command that gives them."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cluster.ranges import Range
from instdisc.settings.objectives import SpreadingConfig
from instdisc.settings.recipes import RECIPES, Recipe
from instdisc.settings.run import DataConfig, RunConfig, TrainingConfig

AUTO = "auto"

MODEL_RECIPE = "sample"
"""The recipe that all choices are variants of."""


@dataclass(frozen=True, kw_only=True)
class AutoConfig(RunConfig):
    """The settings of a run, of which those that are not given are chosen."""

    minutes: Annotated[float, Range(above=0, usual="30")] = 30.0
    """How long a new run may take on this machine, about; the number of epochs follows from the speed measured."""


AUTO_RECIPE = Recipe(
    "Looks at the images and this machine, and chooses network, image size, batch, epochs and start for the --minutes "
    "given; prints the choice, why, and the command that does the same. Options that are given are kept. A run that "
    "resumes keeps its choice.",
    RunConfig(data=DataConfig(path=""), objective=SpreadingConfig(), training=TrainingConfig(batch_size=2)),
)


def plain(config: AutoConfig) -> RunConfig:
    """The settings of the run alone."""
    return RunConfig(**{field.name: getattr(config, field.name) for field in dataclasses.fields(RunConfig)})


def command_line(config: RunConfig, run_dir: Path) -> str:
    """The command that trains with these settings.

    Args:
        config: Settings with the objective of the recipe `sample`.
        run_dir: Where the run is kept.
    """
    base = RECIPES[MODEL_RECIPE].config
    config = dataclasses.replace(config, run_dir=run_dir, overwrite=False)
    options = [text for name, value in _differences(config, base) for text in _option(name, value)]
    return shlex.join(["python", "-m", "instdisc.train", MODEL_RECIPE, *options])


def _differences(config: Any, base: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(config):
        ours, theirs = getattr(config, field.name), getattr(base, field.name)
        if dataclasses.is_dataclass(ours):
            # The options of launching stand without the name of their group.
            yield from _differences(ours, theirs, "" if field.name == "launch" else f"{prefix}{field.name}.")
        # The test images of a recipe are not used with others.
        elif ours != theirs and (prefix + field.name, ours) != ("data.test_path", None):
            yield prefix + field.name, ours


def _option(name: str, value: Any) -> list[str]:
    group, dot, field = name.replace("_", "-").rpartition(".")
    if isinstance(value, bool):
        return [f"--{group}{dot}{'' if value else 'no-'}{field}"]
    values = value if isinstance(value, tuple) else (value,)
    return [f"--{group}{dot}{field}", *map(str, values)]
