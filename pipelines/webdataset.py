"""Tar files in WebDataset layout: `<key>.png` and, where labeled, `<key>.cls` with the class number."""

import io
import tarfile
from collections.abc import Iterable
from typing import IO, NamedTuple


class Sample(NamedTuple):
    """One image to write."""

    key: str
    """Without a dot in its last part: WebDataset takes what follows the first one for the extension."""
    png: bytes
    label: int
    """-1 for none."""


def write_samples(file: IO[bytes], samples: Iterable[Sample]) -> None:
    """Write an uncompressed tar to `file`; equal samples give equal bytes."""
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for sample in samples:
            _add(tar, f"{sample.key}.png", sample.png)
            if sample.label >= 0:
                _add(tar, f"{sample.key}.cls", b"%d" % sample.label)


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # owner, group and time stay zero
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
