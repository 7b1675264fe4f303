"""Lists of the splits that retrieval is measured on, from the archives of three data sets.

    python examples/retrieval_lists.py FOLDER

FOLDER is what the archive unpacks to; it is told by its files. CUB-200-2011 has images.txt, image_class_labels.txt and
classes.txt; Cars-196 cars_annos.mat beside car_ims; Stanford Online Products Ebay_train.txt and Ebay_test.txt. Writes
FOLDER/train.csv and FOLDER/test.csv, which name every image and its class. No class is in both.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path

Image = tuple[str, str, bool]
"""Path within the folder, class, and whether it is trained on."""


def cub(folder: Path) -> Iterator[Image]:
    """Classes 1 to 100 are trained on. The archive's own split, of images within classes, is another one."""
    labels = dict(_fields(folder / "image_class_labels.txt", 2))
    names = dict(_fields(folder / "classes.txt", 2))
    for number, path in _fields(folder / "images.txt", 2):
        label = labels[number]
        yield f"images/{path}", names[label], int(label) <= 100


def cars(folder: Path) -> Iterator[Image]:
    """Classes 1 to 98 are trained on."""
    from scipy.io import loadmat

    found = loadmat(folder / "cars_annos.mat", simplify_cells=True)
    for image in found["annotations"]:
        label = int(image["class"])
        yield image["relative_im_path"], str(found["class_names"][label - 1]), label <= 98


def products(folder: Path) -> Iterator[Image]:
    """Two files name the images of each part; a class is a product."""
    for name in ("Ebay_train.txt", "Ebay_test.txt"):
        _, *rows = _fields(folder / name, 4)  # the first line names the columns
        for _, label, _, path in rows:
            yield path, label, name == "Ebay_train.txt"


READERS = {"images.txt": cub, "cars_annos.mat": cars, "Ebay_train.txt": products, "Ebay_test.txt": products}


def _fields(file: Path, count: int) -> list[list[str]]:
    """The words of every line, the last of which may hold spaces."""
    return [line.split(maxsplit=count - 1) for line in file.read_text().splitlines() if line.strip()]


def main(folder: Path) -> None:
    """Write both lists.

    Raises:
        SystemExit: A file of the archive is missing or is not what it should be; names it.
    """
    reader = next((reader for name, reader in READERS.items() if (folder / name).exists()), None)
    if reader is None:
        sys.exit(f"{folder} holds none of {', '.join(READERS)}: give the folder that the archive unpacks to")
    try:
        images = list(reader(folder))
    except FileNotFoundError as error:
        sys.exit(f"{error.filename} is missing: unpack the whole archive again")
    except (ValueError, KeyError, IndexError, TypeError, UnicodeDecodeError) as error:
        sys.exit(f"{folder} is not laid out as {reader.__name__} expects ({error}): unpack the archive again")
    for name, part in (("train", True), ("test", False)):
        rows = [(path, label) for path, label, trains in images if trains == part]
        missing = next((path for path, _ in rows if not (folder / path).exists()), None)
        if missing is not None:
            sys.exit(
                f"{folder / missing}, an image of the {name} split, is missing: unpack the whole archive again"
            )
        with (folder / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("path", "label"), *rows])
        print(f"{folder / name}.csv: {len(rows):,} images of {len({label for _, label in rows}):,} classes")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
