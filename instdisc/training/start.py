"""From settings to a finished run: find the images, prepare the run directory, launch the workers, report."""

from __future__ import annotations

import contextlib
import glob
import logging
import shlex
import sys
from pathlib import Path
from typing import Any, Literal

from cluster.launch import connected, launch
from cluster.metrics import remove_targets
from cluster.partition import Partition
from cluster.snapshots import newest_step, owner_of
from instdisc.common.classes import choose_classes, labels_among
from instdisc.common.errors import ConfigError
from instdisc.model.backbone import check_backbone
from instdisc.runs.run_directory import RunDirectory
from instdisc.settings.run import RunConfig
from instdisc.training.progress import ProgressBar
from instdisc.training.worker import train_on_worker
from pipelines.build import build_manifest, held_out_beside
from pipelines.datasets import SPLITS, resolve
from pipelines.errors import DataError
from pipelines.manifest import Manifest
from pipelines.verify import verify

logger = logging.getLogger(__name__)

_MOST_NAMED = 10


def train(recipe: str, config: RunConfig, run: RunDirectory) -> dict[str, Any]:
    """Find the images, run the workers, return the summary.

    Raises:
        ConfigError: Settings that do not fit each other, the data or the run directory.
        DataError: Images that are missing or cannot be used.
        NonFiniteError: Training diverged; what was there before is kept.
        ClusterError: The workers could not be run, or a snapshot not be read or written.
        RunStopped: Ctrl-C or SIGTERM came; what was done is saved.
    """
    with run.claim():
        return _train(recipe, config, run)


def _train(recipe: str, config: RunConfig, run: RunDirectory) -> dict[str, Any]:
    """Check settings, then the cluster, then the images, the cheapest first; then start the workers."""
    check_backbone(config.backbone, config.augmentation.image_size)
    _find_missing_paths(config)
    resumes = not config.overwrite and run.holds_run()
    summary = run.read_summary() if resumes else None
    with contextlib.nullcontext() if summary is not None else connected(config.launch):
        train_images, test_images = _open_all_images(config)
        _prepare(recipe, config, run, train_images, test_images, resumes=resumes)
        if summary is not None:
            logger.warning("the run in %s is complete; --overwrite replaces it", run.path)
            return summary
        return _launch(recipe, config, run, train_images, resumes=resumes)


def _prepare(
    recipe: str,
    config: RunConfig,
    run: RunDirectory,
    train_images: Manifest,
    test_images: Manifest | None,
    *,
    resumes: bool,
) -> None:
    """Make sure that the run to resume is this one, or prepare a new one beside whatever is there."""
    if resumes:
        run.continue_with(config, train_images, test_images)
    else:
        url = config.snapshots.url
        taken = url is not None and (owner_of(url) is not None or newest_step(url) is not None)
        if taken and not config.overwrite:
            raise ConfigError(
                f"--snapshots.url {url} is another run's, but {run.path} is a new run: give the --run-dir that its "
                "snapshots belong to, another URL, or --overwrite, which removes them"
            )
        run.prepare(recipe, config, train_images, test_images)
    labels = f"{len(train_images.class_names)} classes" if train_images.has_labels else "no labels"
    logger.info("%s: %d images, %s; run directory %s", config.data.path, len(train_images), labels, run.path)


def _launch(
    recipe: str, config: RunConfig, run: RunDirectory, train_images: Manifest, *, resumes: bool
) -> dict[str, Any]:
    """Run the workers and show their progress; the summary."""
    for warning in config.objective.warnings(len(train_images)):
        logger.warning("%s", warning)

    def is_allowed(num_workers: int) -> bool:
        pieces = num_workers * config.training.accumulation
        return (
            config.training.batch_size % pieces == 0
            and num_workers <= Partition(len(train_images), 1).num_blocks
        )

    followed = run.journal if resumes else run.next.journal
    try:
        with ProgressBar(followed, run.journal):
            return launch(
                train_on_worker,
                (recipe, config, run),
                config.launch,
                name=recipe,
                storage=run.path,
                is_allowed=is_allowed,
            )
    finally:
        remove_targets(run.targets)


def _find_missing_paths(config: RunConfig) -> None:
    """Refuse paths with nothing there before anything that takes seconds.

    Raises:
        DataError: What listing the images would say.
    """
    options: tuple[Literal["path", "test_path"], ...] = ("path", "test_path")
    for option in options:
        path = getattr(config.data, option)
        if path is None or path.partition(":")[0] in SPLITS or glob.has_magic(path):
            continue
        if not Path(path).expanduser().exists():
            _open_images(config, option)


def _open_all_images(config: RunConfig) -> tuple[Manifest, Manifest | None]:
    """The training and the test images, checked against the settings and each other."""
    train_images = _open_images(config, "path")
    num_images, batch_size = len(train_images), config.training.batch_size
    if num_images < batch_size:
        raise ConfigError(
            f"{config.data.path} holds {num_images} images, fewer than one batch of {batch_size}: set "
            f"--training.batch-size to at most {num_images}, and a multiple of the number of workers"
        )
    try:
        Partition(num_images, config.launch.min_workers or config.launch.num_workers or 1)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if config.data.test_path is None and not _has_held_out_images(config):
        return train_images, None
    test_images = _open_images(config, "test_path")
    if train_images.has_labels:
        chosen = test_images
        if config.data.classes is not None:
            chosen = test_images.of_classes(train_images.class_names)
        labels_among(chosen, train_images)
        missing = [name for name in chosen.class_names if name not in train_images.class_names]
        if missing:
            logger.warning(
                "%d classes of the test images are not among the training classes, e.g. %s",
                *(len(missing), missing[0]),
            )
    return train_images, test_images


def _has_held_out_images(config: RunConfig) -> bool:
    """Whether the folder with the training images has a split to measure on."""
    try:
        return held_out_beside(resolve(config.data.path, root=config.data.root)) is not None
    except DataError as error:
        raise DataError(f"--data.path: {error}") from error


def _open_images(config: RunConfig, option: Literal["path", "test_path"]) -> Manifest:
    """The manifest of the training or test images; names the images that are left out.

    Where no test images are named, they are a split of the training folder.
    """
    named = getattr(config.data, option) or config.data.path
    try:
        found = resolve(named, root=config.data.root, download=config.data.download)
        manifest = build_manifest(found, split="train" if option == "path" else "held-out")
        if config.data.verify:
            manifest = verify(manifest)
        if config.data.classes is not None and option == "path":
            if not manifest.has_labels:
                raise ConfigError(
                    f"--data.classes chooses images by their class, but those of {config.data.path} have no labels"
                )
            names = choose_classes(manifest.class_names, config.data.classes)
            manifest = manifest.of_classes(names)
    except DataError as error:
        raise DataError(f"--data.{option.replace('_', '-')}: {error}") from error
    for image in manifest.rejected[:_MOST_NAMED]:
        logger.warning("leaving out %s: %s", manifest.root / image.name, image.reason)
    if len(manifest.rejected) > _MOST_NAMED:
        logger.warning(
            "… and %d more; all are named in corrupt_images.jsonl", len(manifest.rejected) - _MOST_NAMED
        )
    return manifest


def report(summary: dict[str, Any], run: RunDirectory) -> str:
    """What to print at the end: accuracies, where things are, what to do next."""
    accuracies = {
        "raw pixels": summary["knn_top1_raw_pixels"],
        "untrained network": summary["knn_top1_untrained"],
        f"trained, {summary['epochs']} epochs": summary["knn_top1"],
        "trained, classified by the bank": summary["knn_top1_bank"],
    }
    lines = [""]
    if summary["knn_top1"] is not None:
        lines.append(f"weighted kNN top-1 ({summary['knn_protocol']})")
        lines += [
            f"  {name:<33}{100 * value:5.1f}%" for name, value in accuracies.items() if value is not None
        ]
    place, python = _from_here(run.path), _from_here(Path(sys.executable))
    lines += [
        f"{summary['num_instances']:,} images, {summary['world_size']} worker(s) on {summary['device']}, "
        f"{summary['train_seconds']:.0f} s of training, {summary['images_per_second']:,.0f} images/s, "
        f"{100 * summary['loader_wait_fraction']:.1f}% of the time waiting for images",
        f"run directory: {place}",
        "",
        "next:",
        f"  head {place}/summary.json {place}/metrics.jsonl",
        f"  {python} -m instdisc.evaluate {place} --protocols statistics,page --num-actors 0     # a page to look at",
        f"  {python} -m instdisc.search {place} IMAGE     # the nearest images",
        f"  {python} -m instdisc.train sample --help     # every setting",
        f"  {python} -m instdisc.train cifar10-npid --data.download     # CIFAR-10, for a GPU",
        f"  {python} -m instdisc.train imagenet-resnet50-npid --data.path FOLDER",
    ]
    return "\n".join(lines)


def _from_here(path: Path) -> str:
    """A path as one would type it."""
    return shlex.quote(str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path))
