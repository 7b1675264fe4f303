"""A trained run, or an index, as a Python object: its embeddings, its network, and the search among its images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cluster.settings import ActorsConfig
from cluster.tables import TableRows, Tables
from cluster.topk import TopK
from instdisc.evaluation.images import ImageRows, check_decoded, embed, open_images
from instdisc.evaluation.source import Source
from instdisc.model.backbone import Embedder
from instdisc.runs.network import load_network
from pipelines.settings import LoaderConfig


class Run:
    """One snapshot of a run, or one state of an index, read-only: N images with a unit embedding of D numbers each.

    The snapshot is the newest one when the run is opened; snapshots written later, and later changes of the index, are
    not seen. All arrays are in the order of the rows, and row i is the same image in every array. What is read is
    compared with its checksum. No collectives, and no Ray.

    Args:
        source: See `instdisc.open_run`.

    Raises:
        SnapshotError: There is no snapshot, or it cannot be read.

    Example:
        ```python
        run = instdisc.open_run("runs/sample")
        scores, rows = run.nearest(run.embeddings()[:1], k=5)
        print(run.keys()[rows[0]])  # image 0 itself comes first
        ```
    """

    def __init__(self, source: str | Path) -> None:
        self._source = Source(str(source))
        self.snapshot: Tables = self._source.snapshot
        """The snapshot or index itself, with its step, labels and other tables."""

    def __len__(self) -> int:
        return self.snapshot.num_rows

    def __repr__(self) -> str:
        return f"<Run {self.snapshot.url}: {len(self)} embeddings of {self._source.embedding_dim}>"

    def embeddings(self) -> npt.NDArray[np.float32]:
        """Read the memory bank.

        Returns:
            float32 (N, D), unit rows: of a run each a running mean of its image's embeddings while training, of an
            index the embedding that the network gives.

        Raises:
            SnapshotError: A piece is missing or damaged.
        """
        return self.snapshot.read("embeddings").astype(np.float32, copy=False)

    def keys(self) -> npt.NDArray[np.object_]:
        """Read the names of the images.

        Returns:
            (N,), objects of type str: the path below the image folder, or the member of a tar file.

        Raises:
            SnapshotError: A piece is missing or damaged.
        """
        return self.snapshot.read("keys")

    def network(self) -> Embedder:
        """Load the trained network, on the CPU and in evaluation mode; each call returns a new copy.

        Returns:
            A module from float32 (B, 3, H, W), normalized as `config.json` says, to unit embeddings float32 (B, D).
            `embed` does the normalization.

        Raises:
            SnapshotError: The snapshot holds no network, or it is damaged.
        """
        return load_network(self.snapshot)

    def embed(self, images: Sequence[str | Path]) -> npt.NDArray[np.float32]:
        """Embed image files with the trained network, cropped and normalized as in evaluation.

        Runs on the GPU if there is one.

        Args:
            images: Q paths, at least one.

        Returns:
            float32 (Q, D), unit rows in the order of `images`.

        Raises:
            DataError: An image is missing or cannot be decoded; names it.
            SnapshotError: The snapshot holds no network, or it is damaged.
            ValueError: `images` is empty.

        Example:
            ```python
            vectors = run.embed(["cat.jpg", "dog.jpg"])
            similarity = vectors[0] @ vectors[1]
            ```
        """
        if not images:
            raise ValueError("got no images, expected the path of at least one")
        manifest = open_images([Path(image) for image in images], upright=self._source.turns_images)
        rows = ImageRows(
            manifest=manifest,
            network=self._source.network,
            function=embed,
            augmentation=self._source.augmentation,
            loader=LoaderConfig(),
        )
        embeddings = rows.read(0, len(manifest))
        check_decoded(embeddings, manifest)
        return embeddings

    def nearest(
        self, vectors: npt.ArrayLike, k: int = 10
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Find the k rows of the bank with the largest inner products, exactly.

        The first call reads the bank into memory, 4·N·D bytes, and keeps it; the search runs on the GPU if there is
        one. For a bank that does not fit, and for labels beside the rows, see `python -m instdisc.search`.

        Args:
            vectors: Finite real numbers (Q, D); with unit rows the scores are cosine similarities.
            k: Rows per vector, 1 to N.

        Returns:
            Scores, float32 (Q, k), largest first, and row numbers, int64 (Q, k), ascending where scores are equal.

        Raises:
            SnapshotError: A piece is missing or damaged.
            ValueError: `vectors` has another shape or numbers that are not finite, or k is out of range.
        """
        queries = np.asarray(vectors, np.float32)
        dim = self._source.embedding_dim
        if queries.ndim != 2 or queries.shape[1] != dim:
            raise ValueError(f"got vectors of shape {queries.shape}, expected (Q, {dim}): one row per query")
        if not np.isfinite(queries).all():
            raise ValueError("got vectors with NaN or infinity, expected finite numbers")
        if not 1 <= k <= len(self):
            raise ValueError(f"k is {k}, expected 1 to {len(self)}, the rows of the bank")
        return self._top_k.search(queries, k)

    @cached_property
    def _top_k(self) -> TopK:
        return TopK(TableRows(self.snapshot, "embeddings"), ActorsConfig(num_actors=0))
