"""Indexes: what embedding costs beside loader and network alone, appending to n rows, and kills at random moments.

    python -m benchmarks.index [--images 50000] [--repeats 3] [--rows 10000 100000 1281167] [--kills 50] [--json FILE]

Images are JPEGs of 32 pixels in tars, the network is a ResNet-8 as it is before training, in this process. Embedding
and the loop without an index take turns; medians. Rows that an index has before images are appended are random vectors.
A killed command is a forked process; after every kill the index is read whole, compared with what it held, and the
command is given again.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import io
import json
import multiprocessing as mp
import random
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save

from cluster import lease
from cluster.collection import is_collection, open_collection
from cluster.collection_writer import Change, chunks, commit, write_block
from cluster.partition import Partition
from cluster.settings import ActorsConfig
from cluster.snapshot_writer import SnapshotWriter
from instdisc.evaluation.source import Source
from instdisc.index.commands import embed
from instdisc.index.embedding import Work, block_names, embed_images, rows_of_a_block
from instdisc.index.readout import FITTED_ROWS
from instdisc.model.backbone import build_embedder
from instdisc.runs.network import NETWORK
from instdisc.settings.embed import EmbedConfig, IndexedDataConfig
from instdisc.settings.recipes import RECIPES
from pipelines.build import build_manifest
from pipelines.loader import open_loader
from pipelines.manifest import Manifest
from pipelines.order import Request
from pipelines.settings import LoaderConfig

HERE = ActorsConfig(num_actors=0)
APPENDED, KILLED_IMAGES, KILLED_BLOCK = 1_000, 128, 16
ACTIONS = ("embed", "append", "remove", "compact")


def write_tar(path: Path, first: int, count: int) -> Path:
    """A tar of JPEGs of 32 pixels, each different."""
    rng = np.random.default_rng(first)
    with tarfile.open(path, "w") as tar:
        for number in range(first, first + count):
            small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
            buffer = io.BytesIO()
            small.resize((32, 32)).save(buffer, "JPEG", quality=90)
            member = tarfile.TarInfo(f"{number:08d}.jpg")
            member.size = buffer.tell()
            buffer.seek(0)
            tar.addfile(member, buffer)
    return path


def write_run(folder: Path) -> Path:
    """A snapshot of a ResNet-8 as it is before training."""
    torch.manual_seed(0)
    settings = RECIPES["sample"].config
    network = build_embedder(settings.backbone, settings.augmentation.image_size)
    noted = {name: dataclasses.asdict(getattr(settings, name)) for name in ("backbone", "augmentation")}
    writer = SnapshotWriter(folder, Partition(1, 1), 0, "benchmark")
    files = {NETWORK: save(network.backbone.state_dict())}
    attributes = {"settings": {"schema": 2, **noted}, "upright": True}
    writer.save(1, {"embeddings": np.ones((1, 2), np.float32)}, files, attributes)
    writer.close()
    assert not any(report.error for report in writer.poll())
    return folder


def command(run: Path | None, index: Path, images: Path | None = None, **more: Any) -> None:
    """Give a command, in this process."""
    data = IndexedDataConfig(path=None if images is None else str(images))
    source = None if run is None else str(run)
    assert embed(EmbedConfig(run=source, output=str(index), data=data, actors=HERE, **more)) == 0


def alone(source: Source, manifest: Manifest) -> None:
    """Loader and network, without an index."""
    requests = (Request(0, np.arange(first, last)) for first, last in chunks(len(manifest), 256))
    network = source.network.eval()
    options: dict[str, Any] = {"augmentation": source.augmentation, "training": False, "views": 1, "seed": 0}
    device, config = torch.device("cpu"), LoaderConfig()
    with torch.no_grad(), open_loader(manifest, requests, device=device, config=config, **options) as loader:
        for batch in loader:
            network(batch.images[0]).float()


def into_blocks(source: Source, manifest: Manifest, folder: Path) -> None:
    """The same into the blocks of an index."""
    keys, rows = list(manifest.keys), rows_of_a_block(len(manifest))
    work = Work(
        url=str(folder),
        manifest=manifest,
        keys=keys,
        labels=np.full(len(manifest), -1, np.int32),
        root=0,
        names=block_names(manifest, keys, rows, "", set()),
        block_rows=rows,
        dtype="float32",
        network=source.network,
        augmentation=source.augmentation,
        loader=LoaderConfig(),
    )
    embed_images(work, HERE)


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[float, float]:
    """Seconds on the clock, and of processor time."""
    clock, processor = time.perf_counter(), time.process_time()
    function(*arguments)
    return time.perf_counter() - clock, time.process_time() - processor


def measure_embedding(folder: Path, run: Path, images: int, repeats: int) -> list[dict[str, Any]]:
    """Images per second of both."""
    tars = folder / "tars"
    tars.mkdir()
    for first, last in chunks(images, 5_000):
        write_tar(tars / f"{first:08d}.tar", first, last - first)
    source, manifest = Source(str(run)), build_manifest(tars)
    alone(source, manifest.select(np.arange(min(len(manifest), 2_000))))
    taken: dict[str, list[tuple[float, float]]] = {"loader and network alone": [], "into blocks": []}
    for repeat in range(repeats):
        taken["loader and network alone"].append(timed(alone, source, manifest))
        taken["into blocks"].append(timed(into_blocks, source, manifest, folder / f"blocks{repeat}"))
    taken["whole command"] = [timed(command, run, folder / "whole", tars)]
    rows = []
    for name, seconds in taken.items():
        clock, processor = (statistics.median(each) for each in zip(*seconds, strict=True))
        rows.append(
            {"what": name, "images_per_second": images / clock, "per_processor_second": images / processor}
        )
    rates = [
        (bare / full, bare_core / full_core)
        for (bare, bare_core), (full, full_core) in zip(*list(taken.values())[:2], strict=True)
    ]
    by_clock, by_processor = (statistics.median(each) for each in zip(*rates, strict=True))
    return [*rows, {"what": "ratio", "images_per_second": by_clock, "per_processor_second": by_processor}]


def fill(index: Path, num_rows: int) -> None:
    """Add rows of random vectors to an index until it has so many."""
    opened = open_collection(index)
    rng, url = np.random.default_rng(0), opened.url
    blocks = list(opened.blocks)
    first = {table: opened.read(table, 0, 1) for table in opened.tables}
    for start, stop in chunks(num_rows - opened.num_rows, rows_of_a_block(num_rows)):
        tables: dict[str, Any] = {
            name: [str(rows[0])] * (stop - start)
            if rows.dtype == object
            else np.repeat(rows, stop - start, 0)
            for name, rows in first.items()
        }
        vectors = rng.normal(size=(stop - start, first["embeddings"].shape[1])).astype(np.float32)
        tables["embeddings"] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        tables["keys"] = [f"synthetic/{number:010d}.jpg" for number in range(start, stop)]
        write_block(url, f"synthetic-{start}", tables)
        blocks.append(blocks[0]._replace(name=f"synthetic-{start}", num_rows=stop - start))
    commit(url, opened, Change(blocks=blocks, attributes={FITTED_ROWS: num_rows}))


def measure_appending(folder: Path, run: Path, sizes: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """Seconds of a command that adds 1,000 images to n."""
    tars = [
        write_tar(folder / f"more{number}.tar", 10**7 + number * APPENDED, APPENDED)
        for number in range(repeats + 1)
    ]
    rows = []
    for size in sizes:
        index = folder / f"rows{size}"
        command(run, index, tars[0])
        fill(index, size)
        given = functools.partial(command, None, index, append=True)
        seconds = [timed(given, tar) for tar in tars[1:]]
        assert open_collection(index).num_rows == size + repeats * APPENDED
        clock, processor = (statistics.median(each) for each in zip(*seconds, strict=True))
        rows.append({"rows": size, "seconds": clock, "processor_seconds": processor})
    return rows


def contents(index: Path) -> dict[str, bytes]:
    """The vector of every key."""
    if not is_collection(index):
        return {}
    opened = open_collection(index)
    vectors = opened.read("embeddings")
    return {key: row.tobytes() for key, row in zip(opened.read("keys"), vectors, strict=True)}


def forked(function: Callable[[], Any], kill_after: float | None = None) -> float:
    """Run a function in a process of its own, killed after so many seconds; returns how long it took."""

    def quietly() -> None:
        torch.set_num_threads(1)
        lease._SETTLE_S = 0.0  # nobody else writes here, and a kill while it waits would show nothing
        function()

    process = mp.get_context("fork").Process(target=quietly)
    start = time.perf_counter()
    process.start()
    process.join(kill_after)
    process.kill()
    process.join()
    if kill_after is None and process.exitcode:
        raise RuntimeError(f"the command ended with {process.exitcode}")
    return time.perf_counter() - start


def measure_kills(folder: Path, run: Path, kills: int) -> list[dict[str, Any]]:
    """What is there after a kill, and after the command was given again, for every action in turn."""
    moments, durations = random.Random(0), dict[str, float]()
    counts = {name: dict.fromkeys(("kills", "whole", "lost", "before", "again"), 0) for name in ACTIONS}
    base = folder / "killed"
    options = {"block_rows": KILLED_BLOCK, "loader": LoaderConfig(backend="host", threads=1)}
    for number in range(kills + len(ACTIONS)):  # the first of each action is timed, not killed
        action = ACTIONS[number % len(ACTIONS)]
        index = folder / f"embedded{number}" if action == "embed" else base
        tar = write_tar(folder / f"kill{number}.tar", 10**8 + number * KILLED_IMAGES, KILLED_IMAGES)
        if action != "embed" and not base.exists():
            forked(lambda tar=tar: command(run, base, tar, **options))
            tar = write_tar(folder / f"kill{number}b.tar", 10**9, KILLED_IMAGES)
        before = contents(index)
        removed = tuple(moments.sample(sorted(before), min(len(before), 100))) if action == "remove" else ()
        given = {
            "embed": lambda index=index, tar=tar: command(run, index, tar, **options),
            "append": lambda index=index, tar=tar: command(None, index, tar, append=True, **options),
            "remove": lambda index=index, removed=removed: command(None, index, remove=removed),
            "compact": lambda index=index: command(None, index, compact=True),
        }[action]
        if action not in durations:
            durations[action] = forked(given)
            continue
        forked(given, moments.uniform(0, durations[action]))
        there, found = contents(index), counts[action]
        kept = {path.parent.name: path.read_bytes() for path in index.glob("blocks/*/COMMIT.json")}
        faults = list(open_collection(index).verify()) if is_collection(index) else []
        grown = len(there) - len(before)
        expected = {"embed": KILLED_IMAGES, "append": KILLED_IMAGES, "remove": -len(removed), "compact": 0}[
            action
        ]
        found["kills"] += 1
        found["whole"] += not faults and grown in (0, expected)
        found["lost"] += sum(there.get(key) != row for key, row in before.items() if key not in removed)
        found["before"] += grown == 0
        finish(index, given, action, removed, there)
        after = {path.parent.name: path.read_bytes() for path in index.glob("blocks/embedded-*/COMMIT.json")}
        found["again"] += sum(after.get(name, commit) != commit for name, commit in kept.items())
        assert len(contents(index)) - len(before) == expected, action
        assert not list(open_collection(index).verify())
        print(f"kill {number}: {counts}", file=sys.stderr)
    return [{"action": name, **found} for name, found in counts.items()]


def finish(
    index: Path, given: Callable[[], None], action: str, removed: Sequence[str], there: dict[str, bytes]
) -> None:
    """Give the command again, unless it is known to have counted: keys that are gone cannot be removed."""
    if action != "remove" or any(key in there for key in removed):
        forked(given)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, nargs="*", default=[10_000, 100_000, 1_281_167])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        run = write_run(folder / "run")
        if arguments.kills:  # first: a process is forked from one whose threads have not been started yet
            results["kills"] = measure_kills(folder, run, arguments.kills)
        if arguments.images:
            results["embedding"] = measure_embedding(folder, run, arguments.images, arguments.repeats)
        results["appending"] = measure_appending(folder, run, arguments.rows, arguments.repeats)
    for name, rows in results.items():
        print(f"\n{name}")
        for row in rows:
            cells = (
                f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
                for key, value in row.items()
            )
            print("  " + "  ".join(cells))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
