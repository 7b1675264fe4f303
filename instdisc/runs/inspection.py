"""What a run, a snapshot or an index holds, and whether it is whole."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from cluster.collection import is_collection, open_collection
from cluster.errors import ClusterError
from cluster.snapshots import Snapshot, open_snapshot, snapshot_steps, step_folder
from instdisc.index.checking import verify
from instdisc.runs.run_directory import RunDirectory
from pipelines.errors import DataError
from pipelines.manifest import Manifest


def inspect(path: str) -> int:
    """Print what is there, then what is broken.

    Args:
        path: A run directory, a directory of snapshots, one snapshot or an index, here or at a URL.

    Returns:
        0 if everything is whole, 1 if something is broken.

    Raises:
        ConfigError: The run directory cannot be read.
        SnapshotError: There is nothing to inspect.
    """
    place = path if "://" in path else Path(path).expanduser()
    if is_collection(place):
        return verify(open_collection(place))
    broken: list[str] = []
    run = None if isinstance(place, str) else RunDirectory(place)
    if run is not None and run.config.exists():
        broken += _inspect_run(run)
        url, manifest = run.settings()["snapshots"]["url"] or str(run.snapshots), run.manifest
        if snapshot_steps(url):
            broken += _inspect_snapshots(url, _fingerprint(manifest))
        elif run.read_summary() is not None:
            broken.append(f"{url}: no snapshot, though the run is complete; restore its step-… folders")
        else:
            print("no snapshot yet")
    else:
        broken += _inspect_snapshots(str(place), None)
    for fault in broken:
        print(f"broken: {fault}", file=sys.stderr)
    remedy = "restore the files named, or resume from an earlier snapshot by moving the broken one away"
    print(f"{len(broken)} broken: {remedy}" if broken else "all checksums agree")
    return 1 if broken else 0


def _inspect_run(run: RunDirectory) -> Iterator[str]:
    """Print what a run directory says of the run; yields what is broken."""
    settings = run.settings()
    print(f"run        {run.path}, recipe {settings['recipe']}")
    print(f"network    {settings['backbone']['name']}, {settings['backbone']['embedding_dim']} dimensions")
    state = (
        "complete"
        if run.read_summary() is not None
        else "not complete: the same command resumes from the newest snapshot"
    )
    print(f"state      {state}")
    try:
        manifest = Manifest.load(run.manifest)
        if run.test_manifest.exists():
            Manifest.load(run.test_manifest)
    except DataError as error:
        yield str(error)
        return
    labels = f"{len(manifest.class_names)} classes" if manifest.has_labels else "no labels"
    print(f"images     {len(manifest):,}, {labels}, under {manifest.root}")
    print(f"           fingerprint {manifest.fingerprint}")


def _fingerprint(manifest: Path) -> str | None:
    try:
        return Manifest.load(manifest).fingerprint
    except DataError:  # named already
        return None


def _inspect_snapshots(url: str, fingerprint: str | None) -> Iterator[str]:
    """Print what every committed snapshot holds and read all of it; yields what is broken."""
    steps = snapshot_steps(url)
    urls = [f"{url.rstrip('/')}/{step_folder(step)}" for step in steps] or [url]
    for each in urls:
        try:
            snapshot = open_snapshot(each, check_sizes=False)
        except ClusterError as error:
            if not steps:
                raise
            yield str(error)
            continue
        _describe(snapshot)
        yield from (f"{snapshot.url}: {fault}" for fault in snapshot.verify())
        noted = snapshot.attributes.get("manifest_fingerprint")
        if None not in (noted, fingerprint) and noted != fingerprint:
            yield f"{snapshot.url}: made of images with fingerprint {noted}, the run's manifest has {fingerprint}"


def _describe(snapshot: Snapshot) -> None:
    noted = snapshot.attributes
    known = ("epoch", "backbone", "temperature", "objective_name", "world_size", "seed")
    values = ", ".join(
        f"{name.replace('_', ' ')} "
        + (f"{noted[name]:.4g}" if isinstance(noted[name], float) else f"{noted[name]}")
        for name in known
        if name in noted
    )
    print(f"snapshot   step {snapshot.step}: {snapshot.num_rows:,} rows; {values}")
    for name, (shape, dtype) in snapshot.tables.items():
        print(f"           {name:<18}{dtype:<10}{' x '.join(f'{size:,}' for size in shape)}")
    print(f"           files: {', '.join(snapshot.files)}")
