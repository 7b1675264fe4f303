"""How long it takes to build a manifest: a folder of 50,000 images, and a tar with 60,000 members.

    python benchmarks/manifest.py [--json FILE]

The images are random PNGs of 32 x 32 pixels, made in a temporary folder; their files are in the page cache.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.build import build_manifest
from pipelines.webdataset import Sample, write_samples

FILES = 50_000
SAMPLES = 30_000  # an image and a class number each
CLASSES = 10


def make_png(path: Path) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path.read_bytes()


def make_folder(root: Path, png: bytes) -> None:
    for label in range(CLASSES):
        folder = root / f"class{label}"
        folder.mkdir(parents=True)
        for number in range(FILES // CLASSES):
            (folder / f"{number:06d}.png").write_bytes(png)


def make_tar(path: Path, png: bytes) -> None:
    with path.open("wb") as file:
        write_samples(file, (Sample(f"{number:06d}", png, number % CLASSES) for number in range(SAMPLES)))


def measure(name: str, path: Path, entries: int) -> dict[str, object]:
    start = time.perf_counter()
    manifest = build_manifest(path, show_progress=False)
    seconds = time.perf_counter() - start
    return {"data": name, "entries": entries, "images": len(manifest), "seconds": round(seconds, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        png = make_png(root / "image.png")
        make_folder(root / "images", png)
        make_tar(root / "images.tar", png)
        rows = [
            measure("folder of files", root / "images", FILES),
            measure("tar of members", root / "images.tar", 2 * SAMPLES),
        ]
    print("| data | entries | images | seconds |\n|---|---|---|---|")
    for row in rows:
        print("| {data} | {entries:,} | {images:,} | {seconds} |".format(**row))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
