"""Train embeddings: `python -m instdisc.train RECIPE [--data.path IMAGES] [--num-workers N] …`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from cluster.errors import ClusterError
from cluster.launch import launch
from instdisc.config import RunConfig
from instdisc.errors import ConfigError, NonFiniteError
from instdisc.progress import ProgressBar
from instdisc.recipes import RECIPES
from instdisc.run_directory import RunDirectory, append_line
from instdisc.worker import train_on_worker
from pipelines.build import build_manifest
from pipelines.datasets import resolve
from pipelines.errors import DataError
from pipelines.manifest import Manifest
from pipelines.verify import verify

logger = logging.getLogger(__name__)

_MOST_NAMED = 10


def main(arguments: Sequence[str] | None = None) -> int:
    """Train a recipe and print its results.

    Returns:
        0, or 2 after an error that the user can put right, 1 after one of the cluster.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        recipe, config = parse(arguments)
        run = RunDirectory(config.run_dir or Path("runs") / recipe)
        summary = train(recipe, config, run)
    except (ConfigError, DataError, NonFiniteError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report(summary, run))
    return 0


def parse(arguments: Sequence[str] | None = None) -> tuple[str, RunConfig]:
    """Read the command line.

    Args:
        arguments: Without the program's name; None for those of this process.

    Returns:
        Name of the recipe and its configuration with the overrides.

    Raises:
        ConfigError: A value outside its range.
        SystemExit: An unknown recipe or option (status 2), or --help.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    recipes = {name: (recipe.description, recipe.config) for name, recipe in RECIPES.items()}
    try:
        config = tyro.extras.overridable_config_cli(
            recipes,
            args=arguments,
            prog="python -m instdisc.train",
            config=(tyro.conf.OmitSubcommandPrefixes,),
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return next(argument for argument in arguments if argument in RECIPES), config


def train(recipe: str, config: RunConfig, run: RunDirectory) -> dict[str, Any]:
    """Find the images, run the workers, return the summary.

    Raises:
        ConfigError: Settings that do not fit each other, the data or the run directory.
        DataError: Images that are missing or cannot be used.
        NonFiniteError: Training diverged; what was there before is kept.
        ClusterError: The workers could not be run.
    """
    run.check_free(config)
    train_images = open_images(config, config.data.path)
    test_images = None if config.data.test_path is None else open_images(config, config.data.test_path)
    run.clear()
    train_images.save(run.manifest)
    if test_images is not None:
        test_images.save(run.test_manifest)
    for image in (*train_images.rejected, *(test_images.rejected if test_images else ())):
        append_line(run.corrupt_images, {"name": image.name, "reason": image.reason})
    labels = f"{len(train_images.class_names)} classes" if train_images.has_labels else "no labels"
    logger.info("%s: %d images, %s; run directory %s", config.data.path, len(train_images), labels, run.path)
    with ProgressBar(run.metrics):
        return launch(train_on_worker, (recipe, config, run), config.launch, name=recipe, storage=run.path)


def open_images(config: RunConfig, path: str) -> Manifest:
    """The manifest of a data set in any of the accepted forms; names the images that are left out."""
    found = resolve(path, root=config.data.root, download=config.data.download)
    manifest = build_manifest(found)
    if config.data.verify:
        manifest = verify(manifest)
    for image in manifest.rejected[:_MOST_NAMED]:
        logger.warning("leaving out %s: %s", image.name, image.reason)
    if len(manifest.rejected) > _MOST_NAMED:
        logger.warning(
            "… and %d more; all are named in corrupt_images.jsonl", len(manifest.rejected) - _MOST_NAMED
        )
    return manifest


def report(summary: dict[str, Any], run: RunDirectory) -> str:
    """What to print at the end: accuracies, where things are, what to do next."""
    return str(summary)


if __name__ == "__main__":
    sys.exit(main())
