"""The queries of an evaluation: labeled images, labeled vectors, or rows of the bank itself."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from cluster.arrays import is_array, open_array
from cluster.errors import ClusterError
from instdisc.common.classes import match_classes
from instdisc.common.errors import ConfigError
from instdisc.evaluation.reference import Reference
from instdisc.evaluation.source import Source
from instdisc.model.voters import choose_voters
from instdisc.settings.evaluation import LabeledConfig, QueryConfig
from pipelines.build import build_manifest
from pipelines.datasets import resolve
from pipelines.errors import DataError
from pipelines.manifest import Manifest

_MOST_NAMED = 5

Compute = Callable[..., npt.NDArray[np.float32]]
"""`Evaluation.compute`: a manifest and the numbers of some of its rows to their embeddings, float32 (R, D)."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class LabeledQueries:
    """Labeled queries, Q of them.

    Attributes:
        kind: `test-set`, `array` or `leave-one-out`.
        embeddings: float32 (Q, D).
        labels: int64 (Q,) in the numbers of the reference's classes. Classes that it lacks have numbers of their own
            above those, which no vote can name.
        rows: int64 (Q,), the row of each query in `manifest`, in the array or, for leave-one-out, in the reference.
        manifest: The images, None where there are none.
        unknown: Classes among `labels` that the reference lacks: name and number of queries.
    """

    kind: Literal["test-set", "array", "leave-one-out"]
    embeddings: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    manifest: Manifest | None
    unknown: dict[str, int]

    def __len__(self) -> int:
        return len(self.labels)

    def test_images(self, protocol: str) -> Manifest:
        """The queries as images of a test set, for a protocol that trains on labels.

        Args:
            protocol: For the message.

        Raises:
            ConfigError: They are none.
        """
        if self.kind != "test-set" or self.manifest is None:
            raise ConfigError(
                f"{protocol} is tested on labeled images that were not trained on, but the queries are of kind "
                f"{self.kind}: name test images with --queries.path"
            )
        return self.manifest.select(self.rows)


def leave_one_out(source: Source, reference: Reference, compute: Compute, max_rows: int) -> LabeledQueries:
    """Up to 10,000 labeled rows, spread evenly; recomputed where that can be done and tells anything new.

    Args:
        source: The bank.
        reference: Of which the queries are.
        compute: Embeds the images of rows.
        max_rows: See `choose_voters`.
    """
    voters = choose_voters(reference.labels, leave_one_out=True, max_rows=max_rows)
    rows = voters.rows[voters.spread()]
    if not reference.stored or (source.has_run and source.index is None):
        embeddings = compute(reference.images, rows=rows)
        rows = _decoded(embeddings, rows, reference.images)
        embeddings = embeddings[np.isfinite(embeddings[:, 0])]
    else:
        embeddings = source.rows(rows).read(0, len(rows)).astype(np.float32)
    return LabeledQueries(
        kind="leave-one-out",
        embeddings=embeddings,
        labels=reference.labels[rows],
        rows=rows,
        manifest=reference.images if source.has_images or not reference.stored else None,
        unknown={},
    )


def open_queries(
    source: Source, reference: Reference, compute: Compute, config: QueryConfig
) -> LabeledQueries:
    """The queries named by the user, or the run's test images.

    Raises:
        ConfigError: They have no labels, or none of the reference's classes, or do not fit the bank.
        DataError: There are no such images, or one of those named by the user cannot be decoded.
    """
    if config.path is not None and is_array(config.path):
        return _from_arrays(source, reference, config.path, config.labels)
    if config.labels is not None:
        raise ConfigError("--queries.labels is for --queries.path with embeddings; images bring their labels")
    own = config.path is None
    if config.path is not None:
        manifest = open_labeled(config.path, config, "--queries.path", upright=source.turns_images)
    else:
        assert source.test_images is not None  # its caller looked
        manifest = Manifest.load(source.test_images)
        if source.run.settings()["data"].get("classes") is not None:
            manifest = manifest.of_classes(source.class_names)
    rows = np.flatnonzero(np.asarray(manifest.labels) >= 0)
    if not len(rows):
        raise ConfigError(f"no query image of {manifest.root} has a label: give labeled images")
    numbers, unknown_names = match_classes(manifest.class_names, reference.class_names)
    embeddings = compute(manifest, rows=rows)
    decoded = _decoded(embeddings, rows, manifest)
    if not own and len(decoded) < len(rows):
        broken = np.setdiff1d(rows, decoded)
        raise DataError(
            f"--queries.path: {len(broken)} images cannot be decoded, e.g. {manifest.root / manifest.name(broken[0])}: "
            "replace or remove them"
        )
    labels = numbers[np.asarray(manifest.labels)[decoded]]
    return LabeledQueries(
        kind="test-set",
        embeddings=embeddings[np.isfinite(embeddings[:, 0])],
        labels=labels,
        rows=decoded,
        manifest=manifest,
        unknown=_count_unknown(labels, reference.labels, [*reference.class_names, *unknown_names]),
    )


def open_labeled(path: str, config: LabeledConfig, option: str, *, upright: bool) -> Manifest:
    """The images that the user named with an option, all of which must be readable.

    Those that are to be compared with images that were not turned upright are not turned either.

    Raises:
        DataError: There are none, or some cannot be read.
    """
    try:
        found = resolve(path, root=config.root, download=config.download)
        manifest = build_manifest(found, label_key=config.label_key, split="held-out", upright=upright)
    except DataError as error:
        raise DataError(f"{option}: {error}") from error
    if manifest.rejected:
        name, reason = manifest.rejected[0]
        raise DataError(
            f"{option}: {len(manifest.rejected)} images cannot be read, e.g. {manifest.root / name}: {reason}; "
            "replace or remove them"
        )
    return dataclasses.replace(manifest, root=manifest.root.absolute())  # actors may work elsewhere


def _decoded(
    embeddings: npt.NDArray[np.float32], rows: npt.NDArray[np.int64], manifest: Manifest
) -> npt.NDArray[np.int64]:
    decoded = rows[np.isfinite(embeddings[:, 0])]
    if not len(decoded):
        raise DataError(f"none of the {len(rows)} query images of {manifest.root} can be decoded")
    if len(decoded) < len(rows):
        logger.warning("%d of %d query images cannot be decoded", len(rows) - len(decoded), len(rows))
    return decoded


def _from_arrays(source: Source, reference: Reference, path: str, labels_path: str | None) -> LabeledQueries:
    if labels_path is None:
        raise ConfigError(f"{path} holds embeddings without labels: name their classes with --queries.labels")
    try:
        vectors, classes = open_array(path), open_array(labels_path)
    except ClusterError as error:
        raise ConfigError(f"--queries: {error}") from error
    backbone = vectors.attributes.get("backbone")
    ours = source.snapshot.attributes.get("backbone")
    if backbone is not None and ours is not None and backbone != ours:
        raise ConfigError(
            f"{path} was made with backbone {backbone}, the bank with {ours}: recompute the embeddings"
        )
    if len(vectors.shape) != 2 or classes.shape != vectors.shape[:1]:
        raise ConfigError(
            f"{path} has shape {vectors.shape} and {labels_path} {classes.shape}: expected (Q, D) and (Q,)"
        )
    if vectors.dtype.kind not in "fiu":
        raise ConfigError(
            f"{path} holds {vectors.dtype}, expected numbers: recompute the queries' embeddings"
        )
    if vectors.shape[1] != source.embedding_dim:
        raise ConfigError(
            f"{path} has {vectors.shape[1]} dimensions and the bank {source.embedding_dim}: they are "
            "from different networks"
        )
    try:
        labels, embeddings = classes.read(0, len(classes)), vectors.read(0, len(vectors))
    except ClusterError as error:
        raise ConfigError(f"--queries: {error}") from error
    if labels.dtype.kind not in "iu":
        raise ConfigError(f"{labels_path} holds {labels.dtype}, expected integers: the bank's class numbers")
    labels = labels.astype(np.int64)
    rows = np.flatnonzero(labels >= 0)
    if not len(rows):
        raise ConfigError(f"no entry of {labels_path} is a class (0 or above)")
    embeddings = embeddings[rows].astype(np.float32)
    if not np.isfinite(embeddings).all():
        raise ConfigError(f"{path} holds numbers that are not finite: recompute the queries' embeddings")
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    if not lengths.all():
        raise ConfigError(
            f"{path} holds rows of zeros, which have no direction: recompute the queries' embeddings"
        )
    if not np.isin(labels[rows], reference.labels).any():
        raise ConfigError(
            f"{labels_path} names no class of the bank's rows, which are numbered as in the snapshot"
        )
    return LabeledQueries(
        kind="array",
        embeddings=np.ascontiguousarray(embeddings / lengths),
        labels=labels[rows],
        rows=rows,
        manifest=None,
        unknown=_count_unknown(labels[rows], reference.labels, reference.class_names),
    )


def _count_unknown(
    labels: npt.NDArray[np.int64], bank_labels: npt.NDArray[np.int64], names: Sequence[str]
) -> dict[str, int]:
    """Name and count the queries whose class no row of the bank has, and say what becomes of them."""
    numbers, counts = np.unique(labels[~np.isin(labels, bank_labels)], return_counts=True)
    unknown = {
        names[number] if number < len(names) else f"class {number}": int(count)
        for number, count in zip(numbers, counts, strict=True)
    }
    if unknown:
        named = ", ".join(list(unknown)[:_MOST_NAMED]) + (", …" if len(unknown) > _MOST_NAMED else "")
        logger.warning(
            "%d classes of the queries have no row in the bank (%s): their %d queries count as wrong",
            len(unknown),
            named,
            sum(unknown.values()),
        )
    return unknown
