"""From settings to a finished run: find the images, prepare the run directory, launch the workers, report."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
from pathlib import Path
from typing import Any, Literal

from cluster.launch import connected, launch
from cluster.metrics import remove_targets
from cluster.partition import Partition
from cluster.snapshots import newest_step, owner_of
from instdisc.common.classes import choose_classes, labels_among, part_of_images
from instdisc.common.errors import ConfigError
from instdisc.model.backbone import check_backbone
from instdisc.runs.claim import claim, claim_snapshots
from instdisc.runs.run_directory import RunDirectory
from instdisc.settings.run import RunConfig
from instdisc.training.optim import learning_rate
from instdisc.training.progress import ProgressBar
from instdisc.training.weights import starting_weights
from instdisc.training.worker import train_on_worker
from pipelines.build import build_manifest, held_out_beside
from pipelines.cache import check_cache
from pipelines.datasets import SPLITS, resolve
from pipelines.errors import DataError
from pipelines.manifest import Manifest
from pipelines.patterns import is_pattern
from pipelines.places import is_url
from pipelines.verify import verify
from pipelines.witness import witness

logger = logging.getLogger(__name__)

_MOST_NAMED = 10

Images = tuple[Manifest, Manifest | None]
"""The training images, and the test images if there are any."""


def train(recipe: str, config: RunConfig, run: RunDirectory, images: Images | None = None) -> dict[str, Any]:
    """Find the images, run the workers, return the summary.

    Args:
        recipe: Its name.
        config: Settings.
        run: Where the run is kept.
        images: What `open_all_images` returned, where it has been called.

    Raises:
        ConfigError: Settings that do not fit each other, the data or the run directory.
        DataError: Images that are missing or cannot be used.
        NonFiniteError: Training diverged; what was there before is kept.
        ClusterError: The workers could not be run, or a snapshot not be read or written.
        RunStopped: Ctrl-C or SIGTERM came; what was done is saved.
        KeyboardInterrupt: The same, before everything was saved; says what is lost.
    """
    with claim(run):
        return _train(recipe, config, run, images)


def _train(recipe: str, config: RunConfig, run: RunDirectory, images: Images | None) -> dict[str, Any]:
    """Check settings and given weights, then the cluster, then the images; then start the workers."""
    check_backbone(config.backbone, config.augmentation.image_size)
    _find_missing_paths(config)
    config = _with_cache(config)
    resumes = not config.overwrite and run.holds_run()
    summary = run.read_summary(config.training.epochs) if resumes else None
    weights = None if resumes else starting_weights(config)
    with contextlib.nullcontext() if summary is not None else connected(config.launch):
        # Before the images are listed, so that what changes during the listing is noticed by the next run.
        seen = None if images else _witness(config)
        found = images
        if resumes and seen is not None and not config.data.rescan:
            found = run.unchanged_images(seen)
        train_images, test_images = found or open_all_images(config)
        if resumes:
            run.continue_with(config, train_images, test_images)
            _check_length(config, run, len(train_images))
        else:
            _refuse_snapshots_of_others(config, run)
            run.prepare(recipe, config, train_images, test_images, weights)
        if seen is not None and train_images.checksums is not None:
            (run if resumes else run.next).store_witness(seen)
        labels = f"{len(train_images.class_names)} classes" if train_images.has_labels else "no labels"
        logger.info(
            "%s: %d images, %s; run directory %s", config.data.path, len(train_images), labels, run.path
        )
        if summary is not None:
            logger.warning("the run in %s is complete; --overwrite replaces it", run.path)
            return summary
        with claim_snapshots(config.snapshots.url):
            return _launch(recipe, config, run, train_images, resumes=resumes)


def _check_length(config: RunConfig, run: RunDirectory, num_images: int) -> None:
    """Refuse fewer epochs than are done; say what another length does to the learning rate.

    Raises:
        ConfigError: With the number of epochs done.
    """
    before, epochs = run.stored_config()[1].training.epochs, config.training.epochs
    if epochs == before:
        return
    step = newest_step(config.snapshots.url or run.snapshots) or 0
    done = step / (num_images // config.training.batch_size)
    if epochs < done:
        raise ConfigError(
            f"--training.epochs is {epochs}, but the run in {run.path} has done {done:.4g} epochs: give at least "
            f"{math.ceil(done)}, or start over with --overwrite"
        )
    rates = [learning_rate(config.optimizer, done, length) for length in (before, epochs)]
    logger.info(
        "%d epochs instead of %d: from epoch %.4g on the learning rate is %.3g instead of %.3g",
        *(epochs, before, done, rates[1], rates[0]),
    )


def _refuse_snapshots_of_others(config: RunConfig, run: RunDirectory) -> None:
    """Refuse a place for the snapshots of a new run that is another run's, unless that is to be replaced."""
    url = config.snapshots.url
    taken = url is not None and (owner_of(url) is not None or newest_step(url) is not None)
    if taken and not config.overwrite:
        raise ConfigError(
            f"--snapshots.url {url} holds another run's snapshots, and {run.path} is a new run: give the --run-dir "
            "that its snapshots belong to, another URL, or --overwrite, which removes them"
        )


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
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted: {run.what_is_kept()}") from None
    finally:
        remove_targets(run.targets)


def _with_cache(config: RunConfig) -> RunConfig:
    """The same with an absolute path of the cache, as workers may run elsewhere.

    Raises:
        DataError: It cannot be written to.
    """
    cache = config.data.tar_cache()
    if cache is None:
        return config
    try:
        check_cache(cache)
    except DataError as error:
        raise DataError(f"--data.cache: {error}") from error
    return dataclasses.replace(config, data=dataclasses.replace(config.data, cache=cache.folder))


def _find_missing_paths(config: RunConfig) -> None:
    """Refuse paths with nothing there before anything that takes seconds.

    Raises:
        DataError: What listing the images would say.
    """
    options: tuple[Literal["path", "test_path"], ...] = ("path", "test_path")
    for option in options:
        path = getattr(config.data, option)
        if path is None or path.partition(":")[0] in SPLITS or is_pattern(path) or is_url(path):
            continue
        try:
            is_there = Path(path).expanduser().exists()
        except (OSError, RuntimeError):  # a name that is too long, a home of nobody
            is_there = False
        if not is_there:
            _open_images(config, option)


def open_all_images(config: RunConfig) -> Images:
    """The training and the test images, checked against the settings and each other.

    Raises:
        ConfigError: They do not fit the settings or each other.
        DataError: They are missing or cannot be used.
    """
    train_images = _open_images(config, "path")
    num_images, batch_size = len(train_images), config.training.batch_size
    if num_images < batch_size:
        part = f" with --data.fraction {config.data.fraction:g}" * (config.data.fraction < 1)
        raise ConfigError(
            f"{config.data.path} holds {num_images} images{part}, fewer than one batch of {batch_size}: set "
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


def _witness(config: RunConfig) -> str | None:
    """What changes when the files of the images or the settings that choose them do; None where that cannot be told."""
    parts = [json.dumps(config.data.chosen_by())]
    classes = config.data.classes
    if classes is not None and Path(classes).expanduser().is_file():
        parts.append(str(Path(classes).expanduser().stat().st_mtime_ns))
    for named in filter(None, (config.data.path, config.data.test_path)):
        try:
            part = witness(resolve(named, root=config.data.root, download=config.data.download))
        except DataError:  # which listing them explains
            return None
        if part is None:
            return None
        parts.append(part)
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


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
        split: Literal["train", "held-out"] = "train" if option == "path" else "held-out"
        manifest = build_manifest(found, label_key=config.data.label_key, split=split)
        if config.data.verify:
            manifest = verify(manifest)
        if config.data.classes is not None and option == "path":
            if not manifest.has_labels:
                raise ConfigError(
                    f"--data.classes chooses images by their class, but those of {config.data.path} have no labels"
                )
            names = choose_classes(manifest.class_names, config.data.classes)
            manifest = manifest.of_classes(names)
        if config.data.fraction < 1 and option == "path":
            manifest = part_of_images(manifest, config.data.fraction, config.training.seed)
    except DataError as error:
        raise DataError(f"--data.{option.replace('_', '-')}: {error}") from error
    for image in manifest.rejected[:_MOST_NAMED]:
        logger.warning("skipping %s: %s", manifest.root / image.name, image.reason)
    if len(manifest.rejected) > _MOST_NAMED:
        logger.warning(
            "… and %d more; all are listed in corrupt_images.jsonl", len(manifest.rejected) - _MOST_NAMED
        )
    return manifest
