"""Images in object storage beside the same images on a disk.

    python -m benchmarks.storage [--json FILE]

The storage is `benchmarks/range_server.py` in a process of its own: 20 ms for every request. The bundled sample is
repeated to 8 tars of 2,500 images. Each case loads it in a process of its own, from local files, from the storage
without a cache and with caches of 25, 50 and 100% of its bytes, filled and warm: DALI, one view of training, batches of
256; the cases take turns and the median of each counts. Listing: seconds, requests and bytes, also for photographs of
about 100 kB. Kills: a process that fills a cache is killed at a random moment, 50 times; after each every tar that is
there is compared with its source, and images are read through the cache and compared.
"""

import argparse
import hashlib
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image

from pipelines.augment import Augmentation
from pipelines.build import build_manifest
from pipelines.cache import TarCache
from pipelines.datasets import resolve
from pipelines.loader import open_loader
from pipelines.manifest import Manifest
from pipelines.order import Order
from pipelines.places import Url
from pipelines.reader import ImageReader
from pipelines.settings import CacheConfig, LoaderConfig
from pipelines.webdataset import Sample, write_samples

TARS, PER_TAR, BATCH = 8, 2_500, 256
PHOTOS, KILLS = 600, 50
# Imports little, so that the moment of a kill falls into the filling.
FILL = """
import sys, time
from pathlib import Path
from pipelines.cache import TarCache
from pipelines.places import Url
from pipelines.settings import CacheConfig
url, folder, count = sys.argv[1:]
TarCache(CacheConfig(folder=Path(folder), most_bytes=1 << 40)).want(
    Url(f"{url}/train-{number}.tar") for number in range(int(count))
)
time.sleep(600)
"""
SHARES = (0.0, 0.25, 0.5, 1.0)


def write_sample(folder: Path, root: Path) -> None:
    """The sample's images, again and again."""
    source = build_manifest(resolve("sample", root=root), show_progress=False)
    images = ImageReader(source).read_many(range(len(source)))
    for number in range(TARS):
        samples = (
            Sample(f"{number}-{each:05}", images[(number * PER_TAR + each) % len(images)], -1)  # type: ignore[arg-type]
            for each in range(PER_TAR)
        )
        with (folder / f"train-{number}.tar").open("wb") as file:
            write_samples(file, samples)


def write_photos(folder: Path) -> None:
    """PNGs of about 100 kB."""
    generator = np.random.default_rng(0)

    def png(number: int) -> bytes:
        path = folder / "image.png"
        Image.fromarray(generator.integers(0, 256, (183, 180 + number % 7, 3), np.uint8)).save(
            path, compress_level=0
        )
        return path.read_bytes()

    for number in range(4):
        with (folder / f"photos-{number}.tar").open("wb") as file:
            write_samples(file, (Sample(f"{number}-{each}", png(each), -1) for each in range(PHOTOS // 4)))
    (folder / "image.png").unlink()


@contextmanager
def storage(folder: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "benchmarks.range_server", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        try:
            yield f"http://127.0.0.1:{int(server.stdout.readline())}"
        finally:
            server.terminate()


def sent(url: str) -> tuple[int, int]:
    with urllib.request.urlopen(f"{url}/-bytes") as answer:
        requests, count = answer.read().split()
    return int(requests), int(count)


def load(place: str, cache: CacheConfig | None, seconds: float) -> dict[str, float]:
    """Images per second and memory of a loader in this process, once what fits is kept."""
    manifest = build_manifest(place, show_progress=False)
    if cache is not None:
        ImageReader(manifest, cache)
        wanted = int(len(manifest.sources) * cache.most_bytes / sum(sizes(manifest)) + 1e-6)
        while len(list(cache.folder.glob("*.tar"))) < wanted:
            time.sleep(0.1)
        time.sleep(0.5)
    with open_loader(
        manifest,
        Order(num_instances=len(manifest), global_batch=BATCH, seed=0).requests(),
        augmentation=Augmentation(image_size=32),
        training=True,
        views=1,
        seed=0,
        device=torch.device("cpu"),
        config=LoaderConfig(),
        cache=cache,
    ) as loader:
        for _ in range(8):
            next(loader)
        started, batches = time.perf_counter(), 0
        while time.perf_counter() - started < seconds:
            next(loader)
            batches += 1
        speed = BATCH * batches / (time.perf_counter() - started)
    memory = psutil.Process().memory_full_info()
    return {"images_per_second": speed, "memory": memory.uss}


def sizes(manifest: Manifest) -> list[int]:
    """Of the tars, about: the images and their headers."""
    found = np.zeros(len(manifest.sources), np.int64)
    np.maximum.at(found, manifest.source_index, manifest.offsets + manifest.sizes)
    return [int(size) for size in found]


def in_process(*arguments: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.storage", *arguments]
    said = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(said.stdout.splitlines()[-1])
    return found


def speeds(near: Path, url: str, caches: Path, turns: int, seconds: float) -> list[dict[str, float | str]]:
    total = sum(path.stat().st_size for path in near.glob("train-*.tar"))
    cases = {"local files": ["--load", str(near / "train-*.tar")]}
    for share in SHARES:
        name = f"storage, cache of {share:.0%}" if share else "storage, no cache"
        cases[name] = ["--load", f"{url}/train-{{0..{TARS - 1}}}.tar"]
        if share:
            cases[name] += [
                "--cache",
                str(caches / f"{share}"),
                "--cache-bytes",
                str(int(1.02 * share * total)),
            ]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    for _ in range(turns):
        for name, arguments in cases.items():
            found[name].append(in_process(*arguments, "--seconds", str(seconds)))
    rows: list[dict[str, float | str]] = []
    for name, results in found.items():
        middle = {key: statistics.median(each[key] for each in results) for key in results[0]}
        local = rows[0] if rows else None
        rows.append(
            {
                "case": name,
                "images/s": round(middle["images_per_second"]),
                "of local": round(
                    middle["images_per_second"]
                    / (float(local["images/s"]) if local else middle["images_per_second"]),
                    3,
                ),
                "memory MB": round(middle["memory"] / 1e6),
            }
        )
    return rows


def listing(folder: Path, url: str) -> list[dict[str, float | str]]:
    rows: list[dict[str, float | str]] = []
    for name, count in (("train", TARS), ("photos", 4)):
        total = sum(path.stat().st_size for path in folder.glob(f"{name}-*.tar"))
        started = time.perf_counter()
        near = build_manifest(str(folder / f"{name}-*.tar"), show_progress=False)
        local_seconds, before = time.perf_counter() - started, sent(url)
        started = time.perf_counter()
        far = build_manifest(f"{url}/{name}-{{0..{count - 1}}}.tar", show_progress=False)
        seconds, after = time.perf_counter() - started, sent(url)
        assert far.fingerprint == near.fingerprint
        rows.append(
            {
                "tars": f"{count} of {len(near) // count} images of {near.sizes.mean() / 1e3:.1f} kB",
                "MB": round(total / 1e6, 1),
                "local s": round(local_seconds, 2),
                "storage s": round(seconds, 2),
                "requests": after[0] - before[0],
                "MB read": round((after[1] - before[1]) / 1e6, 1),
                "share read": round((after[1] - before[1]) / total, 3),
            }
        )
    return rows


def kills(folder: Path, url: str, cache: Path, count: int) -> dict[str, int]:
    """Kill a filling process again and again; what is there afterwards."""
    hashes = {hashlib.sha256(path.read_bytes()).digest() for path in folder.glob("train-*.tar")}
    far = build_manifest(f"{url}/train-{{0..{TARS - 1}}}.tar", show_progress=False)
    near = ImageReader(build_manifest(str(folder / "train-*.tar"), show_progress=False))
    rng = random.Random(0)
    halves = wrong = partials = whole = 0
    for _ in range(count):
        shutil.rmtree(cache, ignore_errors=True)
        child = subprocess.Popen([sys.executable, "-c", FILL, url, str(cache), str(TARS)])
        while not (cache / ".lock").exists():
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.6))
        child.kill()
        child.wait()
        partials += len(list(cache.glob("*.partial")))
        tars = list(cache.glob("*.tar"))
        whole += len(tars)
        halves += sum(hashlib.sha256(path.read_bytes()).digest() not in hashes for path in tars)
        kept = TarCache(CacheConfig(folder=cache, most_bytes=1 << 40))
        reader = ImageReader(far)
        reader._cache = kept
        kept.want(Url(f"{url}/train-{number}.tar") for number in range(TARS))
        rows = [rng.randrange(len(far)) for _ in range(64)]
        wrong += reader.read_many(rows) != near.read_many(rows)
        kept.close()
        reader.close()
    return {
        "kills": count,
        "partial files left": partials,
        "whole tars there": whole,
        "half tars": halves,
        "wrong reads": wrong,
    }


def table(rows: list[dict[str, float | str]]) -> None:
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="per turn")
    parser.add_argument("--kills", type=int, default=KILLS)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--load", help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cache-bytes", type=int, default=1 << 40, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    cache = CacheConfig(folder=arguments.cache, most_bytes=arguments.cache_bytes) if arguments.cache else None
    if arguments.load:
        print(json.dumps(load(arguments.load, cache, arguments.seconds)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder, caches = Path(name, "storage"), Path(name, "caches")
        folder.mkdir()
        write_sample(folder, Path(name))
        write_photos(folder)
        with storage(folder) as url:
            results = {"listing": listing(folder, url)}
            table(results["listing"])
            results["speed"] = speeds(folder, url, caches, arguments.turns, arguments.seconds)
            table(results["speed"])
            results["kills"] = [{**kills(folder, url, caches / "killed", arguments.kills)}]
            table(results["kills"])
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
