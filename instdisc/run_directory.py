"""Where a run keeps what it knows: names of the files, and who may write there."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from instdisc.backbone import BackboneConfig, Embedder, build_embedder
from instdisc.config import RunConfig
from instdisc.errors import ConfigError
from pipelines.manifest import Manifest


class RunDirectory:
    """The files of a run.

    ```
    config.json           the configuration
    manifest/             the training images; row = instance id
    test_manifest/        the images that kNN accuracy is measured on
    metrics.jsonl         a line every few steps and for every measurement
    corrupt_images.jsonl  images left out or skipped, with the reason; an image may stand there more than once
    weights.pt            state dict of the network, head included
    bank.zarr             the memory bank, row = instance id
    summary.json          the results, written last
    .ray/, .lock          Ray Train's own state; held while a run is under way
    ```

    A new run is prepared in `.next/` and takes the place of an earlier one only when its workers stand ready, so that
    no mistake in its settings costs what was there.

    Args:
        path: The directory, which need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.manifest = self.path / "manifest"
        self.test_manifest = self.path / "test_manifest"
        self.metrics = self.path / "metrics.jsonl"
        self.corrupt_images = self.path / "corrupt_images.jsonl"
        self.weights = self.path / "weights.pt"
        self.bank = self.path / "bank.zarr"
        self.summary = self.path / "summary.json"
        self.config = self.path / "config.json"

    @property
    def next(self) -> RunDirectory:
        """Where the next run is prepared."""
        return RunDirectory(self.path / ".next")

    @contextmanager
    def claim(self, config: RunConfig) -> Iterator[None]:
        """Hold the directory, which is made if need be, against other runs.

        Raises:
            ConfigError: Another run holds it, it contains a run or files of a run's names and may not be overwritten,
                or it cannot be written to. Names the settings in which the run there differs.
        """
        with self._locked():
            present = [owned for owned in self._owned() if owned.exists()]
            if present and not config.overwrite:
                self._refuse(present[0], config)
            yield

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / ".lock").open("w")
        except OSError as error:
            raise ConfigError(
                f"cannot write to run directory {self.path} ({error}): choose another --run-dir"
            ) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ConfigError(
                    f"another run is writing to {self.path}: wait for its end or choose another --run-dir"
                ) from error
            yield

    def _refuse(self, present: Path, config: RunConfig) -> None:
        remedy = "choose another --run-dir, or replace what is there with --overwrite"
        if not self.config.exists():
            raise ConfigError(f"{present} is in the way and no run's: {remedy}")
        try:
            theirs = json.loads(self.config.read_text())
        except ValueError:
            theirs = {}
        ours = config.identity()
        differing = _differences({name: theirs.get(name) for name in ours}, ours)
        if differing:
            raise ConfigError(
                f"run directory {self.path} holds a run with another configuration ({'; '.join(differing)}): {remedy}"
            )
        raise ConfigError(f"run directory {self.path} already holds a run with this configuration: {remedy}")

    def _owned(self) -> list[Path]:
        """The files of a run, the configuration last."""
        return [owned for name, owned in vars(self).items() if name != "path"]

    def prepare(self, recipe: str, config: RunConfig, train: Manifest, test: Manifest | None) -> None:
        """Write what is known before training into `next`, empty metrics file included.

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
            following.metrics.touch()
            for manifest in (train,) if test is None else (train, test):
                for image in manifest.rejected:
                    following.add_corrupt_image(manifest, image.name, image.reason)
            write_json(following.config, {"recipe": recipe, **config.settings()})
        except OSError as error:
            raise ConfigError(
                f"cannot write to run directory {self.path} ({error}): choose another --run-dir"
            ) from error

    def begin(self) -> None:
        """Replace an earlier run by the prepared one. Files that are not a run's stay."""
        for owned, prepared in zip(self._owned(), self.next._owned(), strict=True):
            if owned.is_dir():
                shutil.rmtree(owned)
            else:
                owned.unlink(missing_ok=True)
            if prepared.exists():
                prepared.rename(owned)
        self.next.path.rmdir()

    def add_corrupt_image(self, manifest: Manifest, name: str, reason: str) -> None:
        """Note an image that is left out or skipped, under its full path."""
        append_line(self.corrupt_images, {"name": str(manifest.root / name), "reason": reason})

    def load_network(self) -> Embedder:
        """The trained network, in evaluation mode on the CPU: normalised images to unit embeddings.

        Raises:
            ConfigError: There is no trained network.
        """
        try:
            settings = json.loads(self.config.read_text())
            embedder = build_embedder(
                BackboneConfig(**settings["backbone"]), settings["augmentation"]["image_size"]
            )
            embedder.backbone.load_state_dict(torch.load(self.weights, map_location="cpu", weights_only=True))
        except OSError as error:
            raise ConfigError(f"{self.path} holds no trained network: {error}") from error
        return embedder.eval()

    def count_corrupt_images(self) -> int:
        """Different images named in `corrupt_images.jsonl`; every rank notes those that it meets."""
        if not self.corrupt_images.exists():
            return 0
        return len({json.loads(line)["name"] for line in self.corrupt_images.read_text().splitlines()})


def append_line(path: Path, values: dict[str, Any]) -> None:
    """Append one JSON line and hand it to the operating system at once."""
    with path.open("a") as file:
        file.write(json.dumps(values) + "\n")


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file that is either whole or not there."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(values, indent=2) + "\n")
    temporary.replace(path)


def _differences(theirs: Any, ours: Any, name: str = "") -> list[str]:
    """`name: theirs there, ours here` for every leaf that differs."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        found = []
        for key in sorted(theirs.keys() | ours.keys()):
            found += _differences(theirs.get(key), ours.get(key), f"{name}.{key}" if name else key)
        return found
    return [] if theirs == ours else [f"{name} is {theirs!r} there and {ours!r} here"]
