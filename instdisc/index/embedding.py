"""Images through the network into the blocks of an index, in this process or in many."""

from __future__ import annotations

import copy
import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from cluster.actors import choose_actors, connect, share_out
from cluster.collection import BlockEntry, open_block
from cluster.collection_writer import write_block, written_block
from cluster.settings import ActorsConfig
from instdisc.common.errors import NonFiniteError
from instdisc.evaluation.images import compute_device
from instdisc.index.images import EMBEDDINGS, columns
from pipelines.augment import Augmentation
from pipelines.loader import open_loader
from pipelines.manifest import Manifest
from pipelines.order import Request
from pipelines.scan import progress_bar
from pipelines.settings import LoaderConfig

_BATCH = 256
_FEWEST_ROWS, _MOST_ROWS = 4096, 65_536
_BLOCKS = 256  # about so many in an index, unless that makes them smaller or larger than these
_PIECES_PER_ACTOR = 4
_POLL_S = 1.0

OnRows = Callable[[int], None]


def rows_of_a_block(num_rows: int) -> int:
    """Rows of a full block of an index: a power of two."""
    return min(_MOST_ROWS, max(_FEWEST_ROWS, 1 << max(0, (num_rows // _BLOCKS).bit_length() - 1)))


@dataclass(frozen=True, kw_only=True)
class Work:
    """Images to embed; picklable.

    Attributes:
        url: Of the index.
        manifest: The images, N.
        keys: What they are called there, N.
        labels: int32 (N,), in the numbers of the index.
        root: The number of the manifest's root there.
        names: The blocks to write; images i·block_rows … go into block i.
        block_rows: Images for a block.
        dtype: Of the vectors: float32 or float16.
        network: Applied on a GPU where the process has one.
        augmentation: Size and normalisation; the views are those of evaluation.
        loader: The loader of training.
    """

    url: str
    manifest: Manifest
    keys: Sequence[str]
    labels: npt.NDArray[np.int32]
    root: int
    names: Sequence[str]
    block_rows: int
    dtype: str
    network: nn.Module
    augmentation: Augmentation
    loader: LoaderConfig

    def rows_of(self, number: int) -> npt.NDArray[np.int64]:
        """The images of a block."""
        start = number * self.block_rows
        return np.arange(start, min(len(self.manifest), start + self.block_rows))


def block_names(
    manifest: Manifest, keys: Sequence[str], block_rows: int, facts: str, taken: set[str]
) -> list[str]:
    """Names for the blocks of these images, from which a command that is repeated knows what is there already.

    Args:
        manifest: The images.
        keys: What they are called.
        block_rows: Images for a block.
        facts: Whatever else decides about the content, the network above all.
        taken: Names that mean other blocks.
    """
    names = []
    for start in range(0, len(manifest), block_rows):
        chosen = slice(start, start + block_rows)
        digest = hashlib.sha256(facts.encode())
        digest.update("\0".join(keys[chosen]).encode())
        for name in ("sizes", "offsets", "checksums", "labels", "source_index"):
            array = getattr(manifest, name)
            digest.update(b"" if array is None else np.ascontiguousarray(array[chosen]).data)
        block = f"embedded-{digest.hexdigest()[:24]}"
        while block in taken:  # these images were in the index before, and some of them removed since
            block += "-again"
        names.append(block)
    return names


def embed_images(work: Work, actors: ActorsConfig) -> tuple[list[BlockEntry], list[tuple[str, str]]]:
    """Write all blocks that are not written yet, with a progress bar.

    Returns:
        The blocks, and the images that could not be decoded, which they lack: key and reason.

    Raises:
        DataError: The storage of the images fails, or none of a batch of images can be decoded.
        NonFiniteError: The network gives no unit vectors.
        ClusterError: The index cannot be written to, or the actors cannot be run.
    """
    written = [written_block(work.url, name) for name in work.names]
    missing = [number for number, found in enumerate(written) if found is None]
    with progress_bar(True, len(work.manifest), " images") as bar:
        bar.update(len(work.manifest) - sum(len(work.rows_of(number)) for number in missing))
        if actors.num_actors == 0:
            write_blocks(work, missing, bar.update)
        elif missing:
            _share_out(work, missing, actors, bar.update)
    entries, skipped = list[BlockEntry](), list[tuple[str, str]]()
    for name, before in zip(work.names, written, strict=True):
        found = before or written_block(work.url, name)
        assert found is not None, name
        entries.append(found[0])
        skipped += [(key, reason) for key, reason in found[1]]
    return entries, skipped


def _share_out(work: Work, missing: Sequence[int], actors: ActorsConfig, on_rows: OnRows) -> None:
    with connect(actors):
        parts = min(len(missing), _PIECES_PER_ACTOR * choose_actors(actors).num_workers)
        pieces = [piece.tolist() for piece in np.array_split(np.array(missing), parts)]
        with _watched(work, pieces, on_rows):
            for _ in share_out(write_blocks, work, pieces, actors):
                pass


@contextmanager
def _watched(work: Work, pieces: Sequence[Sequence[int]], on_rows: OnRows) -> Iterator[None]:
    """Report the blocks that other processes write, each of which writes those of a piece in their order."""
    ended = threading.Event()

    def watch() -> None:
        waiting = [list(piece) for piece in pieces]
        while True:
            is_last = ended.wait(_POLL_S)
            for piece in waiting:
                while piece and open_block(work.url, work.names[piece[0]]):
                    on_rows(len(work.rows_of(piece.pop(0))))
            if is_last:
                return

    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch)
        try:
            yield
        finally:
            ended.set()
        watching.result()


@torch.no_grad()
def write_blocks(work: Work, numbers: Sequence[int], on_rows: OnRows = lambda count: None) -> None:
    """Embed the images of some blocks and write them; a block is written while the next one is embedded.

    Args:
        work: What there is to do.
        numbers: The blocks; those that are written already are passed over.
        on_rows: Called with the number of images embedded, after each batch.

    Raises:
        Exception: See `embed_images`.
    """
    numbers = [number for number in numbers if open_block(work.url, work.names[number]) is None]
    device = compute_device()
    network = copy.deepcopy(work.network).to(device).eval()
    reasons: dict[int, str] = {}
    requests = (
        Request(0, rows[first : first + _BATCH])
        for rows in map(work.rows_of, numbers)
        for first in range(0, len(rows), _BATCH)
    )
    with (
        ThreadPoolExecutor(1, thread_name_prefix="blocks") as thread,
        open_loader(
            work.manifest,
            requests,
            augmentation=work.augmentation,
            device=device,
            config=work.loader,
            on_corrupt=lambda row, _, reason: reasons.__setitem__(row, reason),
        ) as loader,
    ):
        writing: Future[None] | None = None
        for number in numbers:
            parts, ids = list[Tensor](), list[Tensor]()
            for _ in range(0, len(work.rows_of(number)), _BATCH):
                batch = next(loader)
                parts.append(network(batch.images[0]).float())
                ids.append(batch.instance_ids)
                on_rows(len(batch.instance_ids))
            if writing is not None:
                writing.result()
            vectors, decoded = torch.cat(parts).cpu().numpy(), torch.cat(ids).numpy() >= 0
            writing = thread.submit(_write, work, number, vectors, decoded, reasons)
        if writing is not None:
            writing.result()


def _write(
    work: Work,
    number: int,
    vectors: npt.NDArray[np.float32],
    decoded: npt.NDArray[np.bool_],
    reasons: dict[int, str],
) -> None:
    rows = work.rows_of(number)
    vectors, missing, rows = vectors[decoded], rows[~decoded], rows[decoded]
    lengths = np.linalg.norm(vectors, axis=1)
    wrong = np.flatnonzero(~(np.abs(lengths - 1) < 1e-3))
    if len(wrong):
        raise NonFiniteError(
            f"{work.manifest.name(int(rows[wrong[0]]))}: the network gives a vector of length {lengths[wrong[0]]:g}, "
            "expected 1: use another snapshot"
        )
    tables: dict[str, Any] = columns(
        work.manifest.select(rows), [work.keys[row] for row in rows.tolist()], work.labels[rows], work.root
    )
    note = [(work.keys[row], reasons.get(row, "cannot be decoded")) for row in missing.tolist()]
    write_block(work.url, work.names[number], {EMBEDDINGS: vectors.astype(work.dtype), **tables}, note)
