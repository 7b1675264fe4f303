"""Cut a tar file of samples into pieces of at most so many megabytes, which together are the same data set.

    python benchmarks/cut.py SOURCE.tar FOLDER [--megabytes 55]

The members of a sample, those with the same name up to its first dot, stay together. CIFAR-10 as `instdisc.train` keeps
it (`data/cifar10/train.tar`) becomes three pieces, for machines that take no larger files.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import tarfile
from collections.abc import Iterator
from pathlib import Path


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--megabytes", type=float, default=55)
    given = parser.parse_args(arguments)
    given.folder.mkdir(parents=True, exist_ok=True)
    most = 1e6 * given.megabytes - 10_240  # a tar file ends in zeros
    number, size = -1, math.inf
    with tarfile.open(given.source) as source, contextlib.ExitStack() as stack:
        for members in samples(source):
            # As tar stores them: a header and full blocks of 512 bytes.
            needed = sum(512 + -(-member.size // 512) * 512 for member in members)
            if size + needed > most:
                stack.close()
                number, size = number + 1, 0
                path = given.folder / f"{given.source.stem}-{number:03d}.tar"
                piece = stack.enter_context(tarfile.open(path, "w"))
            for member in members:
                piece.addfile(member, source.extractfile(member))
            size += needed
    print(f"{number + 1} pieces in {given.folder}")


def samples(source: tarfile.TarFile) -> Iterator[list[tarfile.TarInfo]]:
    """The files of one sample after the other, in their order."""
    files = (member for member in source if member.isfile())
    for _, members in itertools.groupby(files, lambda member: member.name.partition(".")[0]):
        yield list(members)


if __name__ == "__main__":
    main()
