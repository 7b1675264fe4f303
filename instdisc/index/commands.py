"""What `python -m instdisc.embed` does to an index: make it, add images, remove them, compact it, check it."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.collection import BlockEntry, Collection, is_collection, open_collection
from cluster.collection_writer import (
    Change,
    commit,
    delete_blocks,
    delete_leftovers,
    merged,
    preview,
    runs_to_merge,
    taken_names,
    without,
)
from cluster.storage import Storage
from instdisc.common.errors import ConfigError
from instdisc.evaluation.source import Source
from instdisc.index.checking import verify
from instdisc.index.embedding import Work, block_names, embed_images, rows_of_a_block
from instdisc.index.images import Root, roots_of, with_root
from instdisc.index.model import ATTRIBUTE, model_of
from instdisc.index.plan import Plan, find_removed, plan_images
from instdisc.index.readout import fitted_whitening, is_outgrown
from instdisc.runs.claim import claim_index
from instdisc.runs.network import NETWORK
from instdisc.settings.embed import EmbedConfig
from pipelines.build import build_manifest
from pipelines.datasets import resolve
from pipelines.errors import DataError
from pipelines.manifest import Manifest
from pipelines.scan import progress_bar

logger = logging.getLogger(__name__)

_MOST_NAMED = 10


def embed(config: EmbedConfig) -> int:
    """Do what the settings ask for, and print what the index holds.

    Returns:
        0; 1 if something is broken.

    Raises:
        ConfigError: There is no index or another one, of another network, or another process is writing to it.
        DataError: There are no images, or their storage fails.
        ClusterError: The index cannot be read or written to.
    """
    url = Storage.at(Path(config.output).expanduser() if "://" not in config.output else config.output).url
    if config.verify:
        return verify(open_collection(url))
    _check_place(url)
    with claim_index(url):
        index = open_collection(url) if is_collection(url) else None
        if config.remove or config.compact:
            if index is None:
                index = open_collection(url)  # which says that there is none
            changed = _remove(index, config.remove) if config.remove else _compact(index)
        elif index is not None and config.run is config.data.path is None and not config.append:
            changed = _move(index, config.data.root)
        else:
            changed = _add(url, index, config)
    print(_described(changed))
    return 0


def _check_place(url: str) -> None:
    """Refuse to write between other files."""
    storage = Storage.at(url)
    names = set(storage.folders()) if "://" in url or Path(url).is_dir() else set()
    if "://" not in url and Path(url).exists():
        if not Path(url).is_dir():
            raise ConfigError(f"{url} is a file: choose another --output")
        names = {path.name for path in Path(url).iterdir()}
    if names and not names & {"STATE.json", "blocks", "LEASE"}:
        raise ConfigError(f"{url} holds other files, such as {min(names)}: choose another --output")


def _add(url: str, index: Collection | None, config: EmbedConfig) -> Collection:
    if index is None and config.run is None:
        raise ConfigError(f"there is no index at {url}: name a RUN to embed images with")
    source = Source(config.run or url)
    model = model_of(source.snapshot)
    if index is not None and (theirs := model_of(index)).weights != model.weights:
        raise ConfigError(
            f"{url} holds vectors of another network, {theirs} ({theirs.backbone}), and {config.run} is {model} "
            f"({model.backbone}): leave RUN out to use the index's own network, or choose another --output"
        )
    manifest = _images(source, config)
    roots, root = with_root(roots_of(index) if index else [], manifest.root)
    plan = plan_images(index, manifest, roots, root)
    if index is not None and not config.append and len(plan.rows):
        raise ConfigError(
            f"{url} holds an index already, which lacks {len(plan.rows)} of these {len(manifest)} images: pass "
            "--append to add them, or choose another --output"
        )
    if index is not None and not len(plan.rows):
        print(f"nothing to embed: all {plan.present:,} images are in the index")
        return index
    names, labels = _numbered(manifest, plan, index)
    work = _work(url, index, config, source, manifest, plan, labels, root)
    entries, skipped = embed_images(work, config.actors)
    _report(manifest, skipped)
    attributes = {
        ATTRIBUTE: model.to_json(),
        "step": model.step,
        "backbone": model.backbone,
        "settings": source.snapshot.attributes["settings"],
        "upright": source.turns_images,
        "class_names": names,
        "roots": [[each.name, each.path] for each in roots],
        "block_rows": config.block_rows or (index.attributes["block_rows"] if index else None),
    }
    files = {}
    if index is None:
        files[NETWORK] = source.snapshot.read_file(NETWORK)
        attributes |= {
            "dtype": config.dtype,
            "run_path": str(source.run.path) if source.has_run else None,
            "of_run": config.data.path is None,
        }
    kept = without(index, plan.replaced) if index else []
    changed = _commit(url, index, [*kept, *entries], attributes, files)
    added = sum(entry.num_rows for entry in entries) - len(plan.replaced)
    print(
        f"{added:,} images added, {len(plan.replaced):,} embedded again, {plan.present:,} were there, "
        f"{len(skipped):,} cannot be decoded"
    )
    return changed


def _images(source: Source, config: EmbedConfig) -> Manifest:
    data = config.data
    if data.path is None:
        if source.index is not None:
            raise ConfigError("which images to add? Name them with --data.path")
        manifest = source.train
        return manifest if data.root is None else replace(manifest, root=data.root.expanduser().absolute())
    try:
        found = resolve(data.path, root=data.root or "data", download=data.download)
        manifest = build_manifest(found, label_key=data.label_key, upright=source.turns_images)
    except DataError as error:
        raise DataError(f"--data.path: {error}") from error
    return replace(manifest, root=manifest.root.absolute())  # actors may work elsewhere


def _numbered(
    manifest: Manifest, plan: Plan, index: Collection | None
) -> tuple[list[str], npt.NDArray[np.int32]]:
    """The class names of the index with those of the images to embed, and the labels of these in its numbers."""
    names = list(index.attributes["class_names"]) if index else []
    names += [name for name in manifest.class_names if name not in set(names)]
    numbers = {name: number for number, name in enumerate(names)}
    ours = np.array([*(numbers[name] for name in manifest.class_names), -1], np.int32)
    return names, ours[manifest.labels[plan.rows]]


def _work(
    url: str,
    index: Collection | None,
    config: EmbedConfig,
    source: Source,
    manifest: Manifest,
    plan: Plan,
    labels: npt.NDArray[np.int32],
    root: int,
) -> Work:
    chosen = replace(manifest.select(plan.rows), rejected=())
    dtype = index.attributes["dtype"] if index else config.dtype
    block_rows = config.block_rows or rows_of_a_block(len(chosen))
    facts = json.dumps([model_of(source.snapshot).weights, dtype, root, asdict(source.augmentation)])
    return Work(
        url=url,
        manifest=chosen,
        keys=plan.keys,
        labels=labels,
        root=root,
        names=block_names(chosen, plan.keys, block_rows, facts, taken_names(index)),
        block_rows=block_rows,
        dtype=dtype,
        network=source.network,
        augmentation=source.augmentation,
        loader=config.loader,
    )


def _report(manifest: Manifest, skipped: Sequence[tuple[str, str]]) -> None:
    for key, reason in skipped[:_MOST_NAMED]:
        logger.warning("%s: %s", key, reason)
    if len(skipped) > _MOST_NAMED:
        logger.warning("… and %d more images that cannot be decoded", len(skipped) - _MOST_NAMED)


def _remove(index: Collection, named: Sequence[str]) -> Collection:
    names = list(dict.fromkeys(name for each in named for name in _listed(each)))
    rows, unknown = find_removed(index, names)
    for name in unknown:
        print(f"unknown: {name}")
    if not len(rows):
        raise ConfigError(
            f"none of the {len(names)} names given is that of an image of {index.url}: give keys as the index has "
            "them, or patterns such as 'cat/*'"
        )
    changed = _commit(index.url, index, without(index, rows))
    print(f"{len(rows):,} images removed" + (f", {len(unknown):,} names are unknown" if unknown else ""))
    return changed


def _listed(name: str) -> list[str]:
    """A name, or those in the file that `@FILE` is."""
    if not name.startswith("@"):
        return [name]
    try:
        text = Path(name[1:]).expanduser().read_text(encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise ConfigError(
            f"--remove {name} cannot be read ({error}): give a file with a key per line"
        ) from error
    return [line for line in text.splitlines() if line]


def _compact(index: Collection) -> Collection:
    changed = _commit(index.url, index, index.blocks, everything=True)
    delete_leftovers(changed)
    print("compacted; what readers of the state before need is freed by the next change")
    return changed


def _move(index: Collection, root: Path | None) -> Collection:
    roots = roots_of(index)
    if root is None:
        raise ConfigError(
            f"{index.url} holds an index already: say what to do: --append, --remove, --compact or --verify, "
            "or where its images moved to with --data.root"
        )
    old, given, new = str(root).rpartition("=")
    if not given and len(roots) > 1:
        raise ConfigError(
            f"the images of {index.url} lie in {len(roots)} folders, {', '.join(each.path for each in roots)}: say "
            "which one moved with --data.root OLD=NEW"
        )
    moved = str(Path(new).expanduser().absolute())
    if given and old not in {each.path for each in roots}:
        raise ConfigError(f"{old} is none of the folders {', '.join(each.path for each in roots)}")
    changed = [Root(each.name, moved if each.path == (old or each.path) else each.path) for each in roots]
    pairs = [[each.name, each.path] for each in changed]
    return commit(index.url, index, Change(blocks=index.blocks, attributes={"roots": pairs}))


def _commit(
    url: str,
    index: Collection | None,
    blocks: Sequence[BlockEntry],
    attributes: dict[str, Any] | None = None,
    files: dict[str, bytes] | None = None,
    *,
    everything: bool = False,
) -> Collection:
    """Commit blocks: small and sparse ones joined, and with a whitening that is of them.

    All in one change, since what the state before needs is kept for one.
    """
    change = Change(blocks=blocks, attributes=attributes or {}, files=files or {})
    after = preview(url, index, change)
    if not after.num_rows and index is None:
        raise DataError("none of the images can be decoded: there is nothing to keep")
    if after.num_rows and (everything or is_outgrown(after)):
        whitening, noted = fitted_whitening(after)
        change = replace(
            change, attributes={**change.attributes, **noted}, files={**change.files, **whitening}
        )
    change = replace(change, blocks=_merged(after, everything=everything))
    committed = commit(url, index, change)
    delete_blocks(committed, (entry.name for entry in blocks))
    return committed


def _merged(index: Collection, *, everything: bool) -> Sequence[BlockEntry]:
    block_rows = index.attributes["block_rows"] or rows_of_a_block(index.num_rows)
    runs = runs_to_merge(index.blocks, block_rows, everything=everything)
    if not runs:
        return index.blocks
    bounds = [index.bounds_of(number) for number in range(len(index.blocks))]
    total = sum(bounds[last - 1][1] - bounds[first][0] for first, last in runs)
    with progress_bar(True, total, " rows copied") as bar:
        return merged(index, runs, block_rows, bar.update)


def _described(index: Collection) -> str:
    shape, dtype = index.tables["embeddings"]
    model = model_of(index)
    removed = sum(entry.num_removed for entry in index.blocks)
    return f"{index.url}: {index.num_rows:,} images, {shape[1]} x {dtype}, by {model.backbone} {model}" + (
        f"; {removed:,} removed ones take space until --compact" if removed else ""
    )
