"""Where a run keeps what it knows: names of the files, and who may write there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from instdisc.config import RunConfig
from instdisc.errors import ConfigError
from pipelines.manifest import Manifest, Rejected


class RunDirectory:
    """The files of a run.

    ```
    config.json           the configuration
    manifest/             the training images; row = instance id
    test_manifest/        the images that kNN accuracy is measured on
    metrics.jsonl         a line every few steps and for every measurement
    corrupt_images.jsonl  images left out or skipped, with the reason
    weights.pt            state dict of the network, head included
    bank.zarr             the memory bank, row = instance id
    summary.json          the results, written last
    .ray/                 Ray Train's own state
    ```

    A new run is prepared in `.next/` and takes the place of an earlier one only when its workers stand ready, so that
    no mistake in its settings costs what was there.

    Args:
        path: The directory, which need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.config = self.path / "config.json"
        self.manifest = self.path / "manifest"
        self.test_manifest = self.path / "test_manifest"
        self.metrics = self.path / "metrics.jsonl"
        self.corrupt_images = self.path / "corrupt_images.jsonl"
        self.weights = self.path / "weights.pt"
        self.bank = self.path / "bank.zarr"
        self.summary = self.path / "summary.json"

    @property
    def next(self) -> RunDirectory:
        """Where the next run is prepared."""
        return RunDirectory(self.path / ".next")

    def check_free(self, config: RunConfig) -> None:
        """Refuse a directory that holds another run, unless it may be overwritten.

        Raises:
            ConfigError: There is a run, with the settings in which it differs, or no directory can be there.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"run directory {self.path} is a file: choose another --run-dir")
        if config.overwrite or not self.config.exists():
            return
        try:
            theirs = json.loads(self.config.read_text())
        except ValueError:
            theirs = {}
        differing = _differences(theirs, config.identity())
        remedy = "choose another --run-dir, or replace the run with --overwrite"
        if differing:
            raise ConfigError(
                f"run directory {self.path} holds a run with another configuration ({'; '.join(differing)}): {remedy}"
            )
        raise ConfigError(f"run directory {self.path} already holds a run with this configuration: {remedy}")

    def prepare(
        self, config: RunConfig, train: Manifest, test: Manifest | None, rejected: Iterable[Rejected]
    ) -> None:
        """Write what is known before training into `next`, empty metrics file included.

        Raises:
            ConfigError: The directory cannot be written to.
        """
        following = self.next
        try:
            if following.path.exists():
                shutil.rmtree(following.path)
            following.path.mkdir(parents=True)
            write_json(following.config, config.identity())
            train.save(following.manifest)
            if test is not None:
                test.save(following.test_manifest)
            following.metrics.touch()
            for image in rejected:
                append_line(following.corrupt_images, {"name": image.name, "reason": image.reason})
        except OSError as error:
            raise ConfigError(
                f"cannot write to run directory {self.path} ({error}): choose another --run-dir"
            ) from error

    def begin(self) -> None:
        """Replace an earlier run by the prepared one. Files that are not a run's stay."""
        following = self.next
        for name, owned in vars(self).items():
            if name == "path":
                continue
            if owned.is_dir():
                shutil.rmtree(owned)
            else:
                owned.unlink(missing_ok=True)
            prepared = getattr(following, name)
            if prepared.exists():
                prepared.rename(owned)
        following.path.rmdir()

    def count_corrupt_images(self) -> int:
        """Images named in `corrupt_images.jsonl`, where several ranks may name the same one."""
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
