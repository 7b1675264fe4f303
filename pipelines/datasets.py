"""Data sets by name, kept as WebDataset tar files in a data root."""

import gzip
import io
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from pipelines.errors import DataError, naming_the_cause
from pipelines.places import Place, is_url, place
from pipelines.scan import progress_bar
from pipelines.tars import CLASS_NAMES
from pipelines.webdataset import Sample, write_samples
from pipelines.whole import written_whole

SPLITS = {
    "sample": ("train", "test"),
    "cifar10": ("train", "test"),
    "cifar100": ("train", "test"),
    "stl10": ("train", "test", "unlabeled"),
}
_BUNDLED = Path(__file__).parents[1] / "data"


def resolve(
    path_or_name: str | Path, *, root: str | Path, download: bool = False, show_progress: bool = True
) -> Place | list[Path]:
    """Turn what a user calls a data set into a path that `build_manifest` takes.

    Args:
        path_or_name: A path, pattern or URL, returned as it is, or `name[:split[+split]]`, e.g. `cifar10`,
            `cifar10:test`, `stl10:train+unlabeled`; the split is `train` if none is given. The names are the
            keys of `SPLITS`. A folder of such a name is written `./cifar10`.
        root: Where data sets are kept. The one named is written there once, as `root/name/split.tar` with
            lossless PNGs, from the files that torchvision keeps in `root`; `sample` comes with this code.
        download: Whether torchvision may fetch what is missing.
        show_progress: Whether to draw a progress bar on standard error while writing.

    Raises:
        DataError: No such data set or split, or its files are missing, damaged or cannot be fetched, or
            `root` cannot be written to.
    """
    text = str(path_or_name)
    if not text:
        raise DataError(f"got an empty path, expected one or the name of a data set: {', '.join(SPLITS)}")
    if is_url(path_or_name):
        return place(path_or_name)
    name, _, split = text.partition(":")
    if isinstance(path_or_name, Path) or name not in SPLITS:
        with naming_the_cause(f"find {text}"):
            missing = re.fullmatch(r"\w+(:[\w+]*)?", text) and not Path(text).exists()
        if missing:
            raise DataError(f"{text!r} is neither a path nor one of the data sets {', '.join(SPLITS)}")
        return Path(path_or_name)
    splits = split.split("+") if split else ["train"]
    for part in splits:
        if part not in SPLITS[name]:
            raise DataError(f"{name} has no split {part!r}, expected one or more of {'+'.join(SPLITS[name])}")
    folder = Path(root).expanduser() / name
    with naming_the_cause(f"keep the data set {name} in {root}"):
        for part in splits:
            if not (folder / f"{part}.tar").exists():
                folder.mkdir(parents=True, exist_ok=True)
                if name == "sample":
                    _unpack_sample(folder, part)
                else:
                    _convert(name, part, folder, download, show_progress)
    tars = [folder / f"{part}.tar" for part in splits]
    return tars if len(tars) > 1 else tars[0]


def _unpack_sample(folder: Path, split: str) -> None:
    packed = _BUNDLED / f"sample-{split}.tar.gz"
    if not packed.exists():
        raise DataError(f"no {packed}: the sample comes with the repository, not with an installed package")
    with written_whole(folder / CLASS_NAMES) as partial:
        shutil.copyfile(_BUNDLED / CLASS_NAMES, partial)
    with (
        gzip.open(packed) as stream,
        written_whole(folder / f"{split}.tar") as partial,
        partial.open("wb") as file,
    ):
        shutil.copyfileobj(stream, file)


def _convert(name: str, split: str, folder: Path, download: bool, show_progress: bool) -> None:
    dataset = _open(name, split, folder.parent, download)
    with written_whole(folder / CLASS_NAMES) as partial:
        partial.write_text("".join(f"{class_name}\n" for class_name in dataset.classes))
    with (
        progress_bar(show_progress, len(dataset), " images") as bar,
        written_whole(folder / f"{split}.tar") as partial,
        partial.open("wb") as file,
    ):
        write_samples(file, _samples(dataset, bar))


def _open(name: str, split: str, root: Path, download: bool) -> Any:
    """The torchvision data set; it checks the sums of its files before it reads (and unpickles) them."""
    from torchvision import datasets  # slow to import, and needed once per data set

    try:
        if name == "stl10":
            return datasets.STL10(root, split, download=download)
        dataset = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
        return dataset(root, train=split == "train", download=download)
    except (RuntimeError, OSError) as error:
        remedy = "check the connection" if download else "allow the download (--data.download)"
        raise DataError(
            f"cannot read {name} in {root.absolute()}: {error}; {remedy}, or put its files there as "
            "torchvision keeps them"
        ) from error


def _samples(dataset: Any, bar: Any) -> Iterator[Sample]:
    for index in range(len(dataset)):
        image, label = dataset[index]
        yield Sample(f"{index:06d}", _png(image), label)
        bar.update()


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
