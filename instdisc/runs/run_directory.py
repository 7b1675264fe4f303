"""Where a run keeps what it knows."""

from __future__ import annotations

import json
import logging
import math
import secrets
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from cluster.errors import SnapshotError
from cluster.snapshots import Snapshot, newest_step, open_snapshot
from instdisc.common.errors import ConfigError
from instdisc.common.files import append_line, parse_object, read_lines, read_regular, write_json, write_text
from instdisc.common.values import differences
from instdisc.settings.run import RunConfig
from instdisc.settings.schema import from_json, to_json
from pipelines.manifest import Manifest

logger = logging.getLogger(__name__)

_ALWAYS_THERE = (
    ("backbone", "name", "embedding_dim"),
    ("data",),
    ("snapshots", "url"),
    ("training", "epochs"),
)
"""Groups of settings that every version wrote, each with the settings that are read without the rest."""

_CLEARED = "cleared"
"""In the prepared run: the run before it has been removed."""


class RunDirectory:
    """The files of a run.

    ```
    config.json           the configuration
    manifest/             the training images; row = instance id
    test_manifest/        the images that kNN accuracy is measured on
    images.json           by what a resumed run tells that neither has changed
    init.safetensors      the weights that the network began with, if any were given
    metrics.jsonl         a line every few steps and for every measurement
    corrupt_images.jsonl  images left out or skipped, with the reason; an image may be listed more than once
    snapshots/            embeddings, labels and keys of all rows, the network, and all that training resumes from;
                          elsewhere if --snapshots.url says so
    summary.json          the results, written last
    .metrics/             where Prometheus finds the workers of a run under way
    .ray/                 Ray Train's own state
    .lock, .lease         held while a run is under way
    ```

    A new run is prepared in `.next/` and replaces an earlier one only when its workers are ready, so that
    no mistake in its settings costs what was there.

    Args:
        path: The directory, which need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.manifest = self.path / "manifest"
        self.test_manifest = self.path / "test_manifest"
        self.images = self.path / "images.json"
        self.init_weights = self.path / "init.safetensors"
        self.journal = self.path / "metrics.jsonl"
        self.corrupt_images = self.path / "corrupt_images.jsonl"
        self.snapshots = self.path / "snapshots"
        self.summary = self.path / "summary.json"
        self.config = self.path / "config.json"

    @property
    def targets(self) -> Path:
        """Where workers list themselves for Prometheus."""
        return self.path / ".metrics"

    @property
    def next(self) -> RunDirectory:
        """Where the next run is prepared."""
        return RunDirectory(self.path / ".next")

    def holds_run(self) -> bool:
        """Whether there is a run to resume.

        Raises:
            ConfigError: Files with the names of a run's exist already.
        """
        present = [owned for owned in self._owned() if owned.exists()]
        if present and not self.config.exists():
            if self.next.path.exists():
                return False  # `begin` was interrupted
            raise ConfigError(
                f"{present[0]} exists but is not part of a run: choose another --run-dir, or replace what is there "
                "with --overwrite"
            )
        return bool(present)

    def continue_with(self, config: RunConfig, train: Manifest, test: Manifest | None) -> None:
        """Make sure that the run here is this one, and remove what an abandoned start left behind.

        Images may have moved as long as they are the same.

        Args:
            config: Settings now.
            train: The training images now.
            test: The test images now; None leaves those of the run.

        Raises:
            ConfigError: The run here has other settings or images; names both.
        """
        remedy = "choose another --run-dir, or replace the run there with --overwrite"
        recipe, stored = self.stored_config()
        there, here = ({**each.identity(), "snapshots": each.snapshots.url} for each in (stored, config))
        differing = differences(there, here)
        moved: list[tuple[Path, Manifest]] = []
        for name, place, given in (("", self.manifest, train), ("test ", self.test_manifest, test)):
            if given is None:
                continue
            try:
                images = Manifest.load(place)
            except ValueError as error:
                raise ConfigError(f"the run in {self.path} is damaged ({error}): {remedy}") from error
            if not images.upright:
                logger.warning(
                    "the run in %s was started by a version that did not apply the EXIF orientation of images; "
                    "it resumes without turning the %simages",
                    *(self.path, name),
                )
            given = given.by_the_rules_of(images)
            if images.fingerprint != given.fingerprint:
                differing.append(
                    f"the {name}images are {len(images)} with fingerprint {images.fingerprint[:12]} there and "
                    f"{len(given)} with {given.fingerprint[:12]} here"
                )
            elif images.root != given.root:
                moved.append((place, given))
        if differing:
            raise ConfigError(
                f"{self.path} holds another run, of recipe {recipe} ({'; '.join(differing)}): {remedy}"
            )
        if self.next.path.exists():
            shutil.rmtree(self.next.path)
        for place, given in moved:
            given.save_root(place)

    def _owned(self) -> list[Path]:
        """The files of a run, which `begin` replaces; the configuration last, by which a run counts as begun."""
        return [
            self.manifest,
            self.test_manifest,
            self.images,
            self.init_weights,
            self.journal,
            self.corrupt_images,
            self.snapshots,
            self.summary,
            self.config,
        ]

    def prepare(
        self,
        recipe: str,
        config: RunConfig,
        train: Manifest,
        test: Manifest | None,
        weights: dict[str, Tensor] | None = None,
    ) -> None:
        """Write what is known before training into `next`, empty metrics file included.

        Args:
            recipe: Its name.
            config: Settings.
            train: The training images.
            test: The test images, if any.
            weights: What the network begins with, by the names of its backbone, if given.

        Raises:
            ConfigError: The directory cannot be written to.
        """
        following = self.next
        try:
            if following.path.exists():
                shutil.rmtree(following.path)
            following.path.mkdir(parents=True)
            train.save(following.manifest)
            if test is not None:
                test.save(following.test_manifest)
            if weights is not None:
                following.init_weights.write_bytes(save(weights))
            following.journal.touch()
            for manifest in (train,) if test is None else (train, test):
                for image in manifest.rejected:
                    following.add_corrupt_image(manifest, image.name, image.reason)
            run_id = secrets.token_hex(8)
            write_json(following.config, to_json(config, recipe, run_id))
        except OSError as error:
            raise ConfigError(
                f"cannot write to run directory {self.path} ({error}): choose another --run-dir"
            ) from error

    def begin(self) -> None:
        """Replace an earlier run by the prepared one. Files that are not a run's stay.

        Interrupted and called again, it continues where it was interrupted.
        """
        if not (cleared := self.next.path / _CLEARED).exists():
            for owned in self._owned():
                if owned.is_dir():
                    shutil.rmtree(owned)
                else:
                    owned.unlink(missing_ok=True)
            cleared.touch()
        for owned, prepared in zip(self._owned(), self.next._owned(), strict=True):
            if prepared.exists():
                prepared.rename(owned)
        shutil.rmtree(self.next.path)

    def manifests(self) -> tuple[Path, Path | None]:
        """Where the training images are listed, and the test images if there are any; before `begin` and after it."""
        places = self._places()
        test = next((each.test_manifest for each in places if each.test_manifest.exists()), None)
        return next(each.manifest for each in places if each.manifest.exists()), test

    def given_weights(self) -> Path | None:
        """The file of the weights to begin with, if there is one; before `begin` and after it."""
        return next((each.init_weights for each in self._places() if each.init_weights.exists()), None)

    def _places(self) -> list[RunDirectory]:
        """Where the files of the run are: prepared, moving, or moved."""
        if not self.next.config.exists():
            return [self]
        return [self.next, self] if (self.next.path / _CLEARED).exists() else [self.next]

    def rewind_journal(self, step: int, steps_per_epoch: int) -> None:
        """Drop the lines of steps after `step`, which will be written again."""
        kept = [
            line
            for line in read_regular(self.journal).decode(errors="replace").splitlines(keepends=True)
            if _step_of(line, steps_per_epoch) <= step
        ]
        write_text(self.journal, "".join(kept))

    def baselines(self) -> dict[str, float | None]:
        """KNN accuracy of raw pixels and the untrained network, by name; empty if they were not measured."""
        for row in read_lines(self.journal):
            if row.get("kind") == "baselines":
                return {name: value for name, value in row.items() if name != "kind"}
        return {}

    def label_free(self) -> list[dict[str, Any]]:
        """Lines of the metrics file with numbers without labels, in their order."""
        return [row for row in read_lines(self.journal) if row.get("kind") == "label_free"]

    def measurements(self) -> list[dict[str, Any]]:
        """Lines of the metrics file with what was measured of the network in training, with and without labels."""
        rows = read_lines(self.journal)
        return [row for row in rows if row.get("kind") == "knn" or row.get("of") == "trained"]

    def has_accuracy(self, epoch: int) -> bool:
        """Whether the accuracy after this epoch is in the metrics file."""
        return any(row.get("kind") == "knn" and row["epoch"] == epoch for row in read_lines(self.journal))

    def unchanged_images(self, witness: str) -> tuple[Manifest, Manifest | None] | None:
        """The training and the test images, if they have not changed since the witness of them was stored."""
        try:
            if json.loads(read_regular(self.images)) != {"witness": witness}:
                return None
            test = Manifest.load(self.test_manifest) if self.test_manifest.exists() else None
            return Manifest.load(self.manifest), test
        except (OSError, ValueError):  # of a version that stored none, or damaged: they are listed again
            return None

    def store_witness(self, witness: str) -> None:
        """Note what changes when the images or the settings that choose them do."""
        write_json(self.images, {"witness": witness})

    def add_corrupt_image(self, manifest: Manifest, name: str, reason: str) -> None:
        """Note an image that is left out or skipped, under its full path."""
        append_line(self.corrupt_images, {"name": str(manifest.root / name), "reason": reason})

    def what_is_kept(self) -> str:
        """What of a run that was killed the next one resumes from, and what it has to do again, in words."""
        if self.next.config.exists() or not self.config.exists():
            return "no step was done"
        try:
            saved = newest_step(self.settings()["snapshots"]["url"] or self.snapshots) or 0
        except (ConfigError, SnapshotError) as error:
            return f"it is unknown what was saved ({error})"
        done = max((row["step"] for row in read_lines(self.journal) if row.get("kind") == "train"), default=0)
        lost = f"; at least {done - saved} steps after it are lost" if done > saved else ""
        return f"the next run resumes from step {saved}{lost}"

    def settings(self) -> dict[str, Any]:
        """The run's configuration as JSON values.

        Raises:
            ConfigError: There is no run.
        """
        try:
            settings: dict[str, Any] = json.loads(read_regular(self.config))
        except FileNotFoundError as error:
            raise ConfigError(
                f"{self.path} holds no run, for it has no config.json: give the directory of a run"
            ) from error
        except OSError as error:
            raise ConfigError(f"the settings of {self.path} cannot be read: {error}") from error
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                f"{self.config} is damaged ({error}): put the file back, or choose another directory"
            ) from error
        try:
            missing = [
                name for group, *names in _ALWAYS_THERE for name in names if name not in settings[group]
            ]
        except (KeyError, TypeError):
            missing = ["settings"]
        if missing or not isinstance(settings.get("recipe"), str):
            raise ConfigError(f"{self.config} was not written by instdisc: choose another --run-dir")
        return settings

    def stored_config(self) -> tuple[str, RunConfig]:
        """Recipe and settings of the run, in the words of this version.

        Raises:
            ConfigError: There is no run, or its settings are not known to this version.
        """
        settings = self.settings()
        return settings["recipe"], from_json(settings, str(self.config))

    def open_snapshot(self) -> Snapshot:
        """The newest snapshot.

        Raises:
            ConfigError: There is no run.
            SnapshotError: It has no snapshot, or that is damaged.
        """
        return open_snapshot(self.settings()["snapshots"]["url"] or self.snapshots)

    def read_summary(self, epochs: int | None = None) -> dict[str, Any] | None:
        """The results of a complete run; None if it is not complete, or its summary damaged.

        Args:
            epochs: That the run is to have; by default what its settings say, which rise when it is made longer.
        """
        try:
            summary = parse_object(read_regular(self.summary)) or {}
            length = self.settings()["training"]["epochs"] if epochs is None else epochs
        except (OSError, ConfigError):
            return None
        return summary if summary.get("epochs") == length else None

    def store_epochs(self, epochs: int) -> None:
        """Note the length of the run in its configuration."""
        settings = self.settings()
        if settings["training"]["epochs"] != epochs:
            write_json(self.config, {**settings, "training": {**settings["training"], "epochs": epochs}})

    def count_corrupt_images(self) -> int:
        """Different images named in `corrupt_images.jsonl`; every rank notes those that it meets."""
        return len({row["name"] for row in read_lines(self.corrupt_images) if "name" in row})


def _step_of(line: str, steps_per_epoch: int) -> float:
    """The step of a line of the metrics file; a line without one belongs to the start."""
    row = parse_object(line)
    if row is None or "kind" not in row:  # cut short by the end of the process that wrote it, or damaged
        return math.inf
    if row["kind"] == "train":
        return float(row["step"])
    return float(row["epoch"] * steps_per_epoch) if row["kind"] in ("knn", "label_free") else 0.0
