"""Settings of an index and of what is done to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from cluster.ranges import Range, Ranged
from cluster.settings import ActorsConfig
from pipelines.settings import LoaderConfig


@dataclass(frozen=True, kw_only=True)
class IndexedDataConfig:
    """Which images."""

    path: str | None = None
    """Images in any form that training takes, with labels or without; by default those that the run was trained on."""
    label_key: str | None = None
    """The key of the .json members of tar files that holds the label, as --data.label-key of training."""
    root: Path | None = None
    """Where the images lie now, if they moved: those of the run, or, without --data.path and --append, those of the
    index. With --data.path the name of a data set: where named data sets are kept, data by default."""
    download: bool = False
    """Download a torchvision data set that is not in `root`."""


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(Ranged):
    """What is embedded, and into which index; or what is done to an index."""

    run: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[RUN]")] = None
    """Whose network: a run directory, a directory of snapshots or one snapshot, local or at a URL. May be left out
    where there is an index, which holds its network."""
    output: Annotated[str, tyro.conf.arg(metavar="INDEX")]
    """The index: a directory, or a URL that fsspec opens."""
    data: IndexedDataConfig = field(default_factory=IndexedDataConfig)
    append: bool = False
    """Add images to the index; those that changed since they were added are embedded again, the others stay."""
    remove: Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY [KEY ...]")] = ()
    """Remove images: keys as the index has them, patterns such as 'cat/*', or @FILE with one of either per line. Keys
    that are unknown are printed."""
    compact: bool = False
    """Free the space of removed images, and join small blocks."""
    verify: bool = False
    """Read everything, compare it with its checksums, and name what is broken."""
    dtype: Literal["float32", "float16"] = "float32"
    """Of the vectors of a new index; float16 takes half the space and rounds similarities by about 0.0002."""
    block_rows: Annotated[int | None, Range(at_least=1, at_most=65_536)] = None
    """Images for a block, which is written at once: of what was embedded when a command is killed, the blocks under way
    are lost, one per actor. By default 4,096 to 65,536, about 256 blocks in all."""
    actors: Annotated[ActorsConfig, tyro.conf.arg(name="")] = field(default_factory=ActorsConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)

    def __post_init__(self) -> None:
        """Refuse commands that do not fit each other.

        Raises:
            ValueError: With what to change.
        """
        super().__post_init__()
        actions = {
            "--append": self.append,
            "--remove": bool(self.remove),
            "--compact": self.compact,
            "--verify": self.verify,
        }
        asked = [flag for flag, is_asked in actions.items() if is_asked]
        if len(asked) > 1:
            raise ValueError(f"got {' and '.join(asked)}, expected one of them: give two commands")
        given = [
            name for name, value in (("RUN", self.run), ("--data.path", self.data.path)) if value is not None
        ]
        if given and asked and asked != ["--append"]:
            raise ValueError(f"got {asked[0]} with {given[0]}, expected --output alone")
