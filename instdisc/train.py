"""Train embeddings: `python -m instdisc.train RECIPE [--data.path IMAGES] [--num-workers N] …`."""

from __future__ import annotations

import dataclasses
import logging
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import tyro

from instdisc.common import command
from instdisc.common.errors import ConfigError
from instdisc.settings.model import TIMM
from instdisc.settings.recipes import RECIPES
from instdisc.settings.run import RunConfig

_USUAL_OPTIONS = {
    "--data.path IMAGES": "a folder, tar files, a list of paths, or the name of a data set",
    "--data.test-path IMAGES": "labelled images to measure the accuracy on",
    "--run-dir PATH": "where the run is kept; the same command resumes it",
    "--num-workers N": "processes; 0 trains in this one, without Ray",
    "--training.epochs N": "passes over the images",
    "--training.batch-size N": "images per step, over all workers",
    "--training.seed N": "of weights, order, augmentation and negatives",
    "--optimizer.learning-rate RATE": "the highest one",
    "--backbone.name NAME": "resnet18, resnet50, … of torchvision, resnet8, resnet20, resnet32, or timm:NAME",
    "--init.weights WEIGHTS": "begin with torchvision, timm:NAME, a file, or the network of a run",
    "--augmentation.image-size PIXELS": "the side of the square that the network sees",
    "--objective.temperature T": "divides similarities; 0.07 to 0.2 are usual",
    "--knn.every EPOCHS": "between two measurements of the accuracy",
    "--overwrite": "replace an earlier run in the run directory",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Train a recipe and print its results.

    Returns:
        See `instdisc.common.command.run`.
    """
    return command.run(_train, arguments, level=logging.INFO)


def _train(arguments: Sequence[str]) -> None:
    recipe, config = parse(arguments)
    # Imported here, like whatever else takes seconds to import: help and errors of settings need none of it.
    from instdisc.runs.run_directory import RunDirectory
    from instdisc.training.start import report, train

    run = RunDirectory(run_directory(recipe, config))
    print(report(train(recipe, config, run), run))


def parse(arguments: Sequence[str]) -> tuple[str, RunConfig]:
    """Read the command line.

    Args:
        arguments: Without the program's name.

    Returns:
        Name of the recipe and its configuration with the overrides.

    Raises:
        ConfigError: An unknown recipe, or a value out of its range.
        SystemExit: Help was asked for (status 0); an unknown option or a value out of its range (status 2).
    """
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(_usage(), file=sys.stdout if arguments else sys.stderr)
        raise SystemExit(0 if arguments else 2)
    if name not in RECIPES:
        raise ConfigError(f"unknown recipe {name!r}: the first argument must be one of {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    config = _parsed(name, recipe.config, arguments[1:])
    base, place = recipe.config, run_directory(name, config)
    if (place / "config.json").exists() and not config.overwrite:
        from instdisc.runs.run_directory import RunDirectory

        # What was not typed stays as the run has it, whatever the recipe says by now. How it is carried out may change.
        stored_recipe, stored = RunDirectory(place).stored_config()
        if stored_recipe != name:
            raise ConfigError(
                f"{place} holds a run of recipe {stored_recipe}, not {name}: choose another --run-dir, or replace "
                "the run there with --overwrite"
            )
        base = dataclasses.replace(
            stored,
            launch=base.launch,
            loader=base.loader,
            metrics=base.metrics,
            run_dir=None,
            overwrite=False,
        )
        config = _parsed(name, base, arguments[1:])
    url = config.snapshots.url
    if url is not None and "://" not in url:
        # Workers, and whoever evaluates the run, may have another working directory.
        snapshots = dataclasses.replace(config.snapshots, url=str(Path(url).expanduser().absolute()))
        config = dataclasses.replace(config, snapshots=snapshots)
    config = _with_settled_start(config, base)
    if config.data.path != base.data.path and config.data.test_path == base.data.test_path:
        # A recipe's test images are for its own training images.
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, test_path=None))
    return name, config


def _with_settled_start(config: RunConfig, base: RunConfig) -> RunConfig:
    """Weights by their full path, and weights of timm with their network."""
    place, weights = config.init.place, config.init.weights
    if place is not None and "://" not in place:
        # So that the same weights are known from any working directory.
        absolute = str(Path(place).expanduser().absolute())
        config = dataclasses.replace(config, init=dataclasses.replace(config.init, weights=absolute))
    elif weights is not None and weights.startswith(TIMM) and config.backbone.name == base.backbone.name:
        backbone = dataclasses.replace(config.backbone, name=weights)
        config = dataclasses.replace(config, backbone=backbone)
    return config


def _parsed(name: str, default: RunConfig, arguments: Sequence[str]) -> RunConfig:
    return command.read_options(
        RunConfig,
        arguments,
        program=f"instdisc.train {name}",
        description=f"{RECIPES[name].description}\n\n{_usual_options()}",
        default=default,
        config=(tyro.conf.AvoidSubcommands,),
    )


def _usual_options() -> str:
    width = max(map(len, _USUAL_OPTIONS)) + 2
    lines = [f"  {option:<{width}}{text}" for option, text in _USUAL_OPTIONS.items()]
    return "\n".join(["Usual options; all are below, with the values of this recipe:", *lines])


def run_directory(recipe: str, config: RunConfig) -> Path:
    """Where the run is kept."""
    return (config.run_dir or Path("runs") / recipe).expanduser()


def _usage() -> str:
    lines = ["usage: python -m instdisc.train RECIPE [--option VALUE ...]", ""]
    for name, recipe in RECIPES.items():
        text = textwrap.fill(recipe.description, 100, initial_indent="    ", subsequent_indent="    ")
        lines += [f"  {name}", text]
    return "\n".join([*lines, "", "python -m instdisc.train RECIPE --help lists its options."])


if __name__ == "__main__":
    sys.exit(main())
