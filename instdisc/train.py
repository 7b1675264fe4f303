"""Train embeddings: `python -m instdisc.train RECIPE|auto [--data.path IMAGES] [--num-workers N] …`."""

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
from instdisc.settings.auto import AUTO, AUTO_RECIPE, AutoConfig, command_line, plain
from instdisc.settings.model import TIMM
from instdisc.settings.recipes import RECIPES, Recipe
from instdisc.settings.run import RunConfig

_USUAL_OPTIONS = {
    "--data.path IMAGES": "a folder, tar files, a list of paths, or the name of a data set",
    "--data.test-path IMAGES": "labeled images to measure the accuracy on",
    "--run-dir PATH": "where the run is kept; the same command resumes it",
    "--num-workers N": "processes; 0 trains in this process, without Ray",
    "--training.epochs N": "passes over the images",
    "--training.batch-size N": "images per step, over all workers",
    "--training.seed N": "of weights, order, augmentation and negatives",
    "--optimizer.learning-rate RATE": "the highest one",
    "--backbone.name NAME": "resnet18, resnet50, … of torchvision, resnet8, resnet20, resnet32, or timm:NAME",
    "--init.weights WEIGHTS": "begin with torchvision, timm:NAME, a file, or the network of a run",
    "--augmentation.image-size PIXELS": "the side of the square that the network sees",
    "--objective.temperature T": "divides similarities; 0.07 to 0.2 are usual",
    "--knn.every EPOCHS": "epochs between measurements of the accuracy",
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
    from instdisc.training.report import report
    from instdisc.training.start import open_all_images, train

    run, images = RunDirectory(run_directory(recipe, config)), None
    if isinstance(config, AutoConfig):
        from instdisc.training.auto import choose

        images = open_all_images(config)
        choice = choose(config, images[0], lambda chosen: parse(arguments, chosen)[1])
        config = choice.config
        command_text = command_line(config, run.path)
        print(f"chosen, unless given:\n{choice}\nthe same by hand:\n  {command_text}", file=sys.stderr)
    print(report(train(recipe, config, run, images), run))


def parse(arguments: Sequence[str], chosen: RunConfig | None = None) -> tuple[str, RunConfig]:
    """Read the command line.

    Args:
        arguments: Without the program's name.
        chosen: What was chosen for a new run of `auto`.

    Returns:
        Name of the recipe and its configuration with the overrides; an `AutoConfig` if more is to be chosen.

    Raises:
        ConfigError: An unknown recipe or option, or a value that cannot be.
        SystemExit: Help was asked for (status 0), or no recipe given (status 2).
    """
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(_usage(), file=sys.stdout if arguments else sys.stderr)
        raise SystemExit(0 if arguments else 2)
    if name not in _all_recipes():
        raise ConfigError(
            f"unknown recipe {name!r}: the first argument must be one of {', '.join(_all_recipes())}"
        )
    base = chosen or _all_recipes()[name].config
    config = _parsed(name, base, arguments[1:])
    place = run_directory(name, config)
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
    elif name == AUTO and chosen is None:
        if not config.data.path:
            raise ConfigError("auto needs the images: give --data.path FOLDER")
        return name, config
    if isinstance(config, AutoConfig):
        config = plain(config)
    url = config.snapshots.url
    if url is not None and "://" not in url:
        # Workers and later evaluations may have another working directory.
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
    if name == AUTO:
        default = AutoConfig(
            **{field.name: getattr(default, field.name) for field in dataclasses.fields(default)}
        )
    return command.read_options(
        type(default),
        arguments,
        program=f"instdisc.train {name}",
        description=f"{_all_recipes()[name].description}\n\n{_usual_options(name)}",
        default=default,
        config=(tyro.conf.AvoidSubcommands,),
    )


def _all_recipes() -> dict[str, Recipe]:
    return {AUTO: AUTO_RECIPE, **RECIPES}


def _usual_options(recipe: str) -> str:
    """The first options of the help, and what the values behind all options are."""
    width = max(map(len, _USUAL_OPTIONS)) + 2
    lines = [f"  {option:<{width}}{text}" for option, text in _USUAL_OPTIONS.items()]
    values = (
        "; defaults of what is chosen are not used" if recipe == AUTO else ", with the values of this recipe"
    )
    return "\n".join([f"Usual options; all are below{values}:", *lines])


def run_directory(recipe: str, config: RunConfig) -> Path:
    """Where the run is kept."""
    return (config.run_dir or Path("runs") / recipe).expanduser()


def _usage() -> str:
    lines = ["usage: python -m instdisc.train RECIPE [--option VALUE ...]", ""]
    for name, recipe in _all_recipes().items():
        text = textwrap.fill(recipe.description, 100, initial_indent="    ", subsequent_indent="    ")
        lines += [f"  {name}", text]
    return "\n".join([*lines, "", "python -m instdisc.train RECIPE --help lists its options."])


if __name__ == "__main__":
    sys.exit(main())
