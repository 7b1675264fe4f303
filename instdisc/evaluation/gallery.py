"""Queries with their nearest rows as small pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from instdisc.settings.evaluation import PageConfig
from pipelines.decode import CorruptImage
from pipelines.errors import DataError
from pipelines.manifest import Manifest
from pipelines.reader import ImageReader

if TYPE_CHECKING:
    from instdisc.evaluation.context import Evaluation
    from instdisc.evaluation.source import Source

GONE = "not where it was"
"""Why there is no picture of an image that moved or was deleted."""
_LOSSLESS_SIDE = 64  # smaller pictures are PNGs, in which JPEG's blocks do not show


class Picture(NamedTuple):
    """An image with its caption."""

    name: str
    label: str
    uri: str
    """`data:` URI; empty where the image cannot be decoded."""
    similarity: float | None = None
    agrees: bool | None = None
    """Whether it is of the query's class; None where that is not asked."""
    link: str = ""
    """`file:` URI of the whole image; empty where it is not a file of its own."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A query and its nearest rows, nearest first."""

    query: Picture
    neighbors: tuple[Picture, ...]
    role: str = "query"
    """What the query is, in a word."""


class Thumbnails:
    """Small pictures of the images of a manifest; a context manager that closes its files.

    Args:
        manifest: Where the images are.
        side: The longer side of a picture in pixels; smaller images are not enlarged.
    """

    def __init__(self, manifest: Manifest, side: int) -> None:
        self._side, self._manifest = side, manifest
        self._reader = ImageReader(manifest)

    def __enter__(self) -> Thumbnails:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()

    def image(self, row: int) -> Image.Image | str:
        """The picture of a row, or in a few words why there is none."""
        try:
            image = self._reader.decode(row)
        except CorruptImage as error:
            return GONE if str(error).startswith("cannot be read") else "cannot be decoded"
        except DataError:  # the folder has gone, or its disk fails
            return GONE
        image.thumbnail((self._side, self._side))
        return image

    def uri(self, row: int) -> str:
        """The picture of a row as a `data:` URI, empty if there is none."""
        image = self.image(row)
        if isinstance(image, str):
            return ""
        kind = "PNG" if max(image.size) <= _LOSSLESS_SIDE else "JPEG"
        buffer = io.BytesIO()
        image.save(buffer, kind, optimize=True, quality=85)
        return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"

    def link(self, row: int) -> str:
        """The whole image of a row as a `file:` URI, empty if it is not a file of its own."""
        path = self._manifest.file(row)
        return path.absolute().as_uri() if path is not None else ""


def agreement(
    scores_QK: npt.NDArray[np.float32],
    labels_QK: npt.NDArray[np.int64],
    labels_Q: npt.NDArray[np.int64],
    *,
    temperature: float,
) -> npt.NDArray[np.float64]:
    """Share of the neighbors' votes `exp(similarity/τ)` that go to the query's class.

    Args:
        scores_QK: float32 (Q, K), similarities, largest first, minus infinity for no neighbor.
        labels_QK: int64 (Q, K), classes of the neighbors, negative for none.
        labels_Q: int64 (Q,), classes of the queries.
        temperature: τ.

    Returns:
        float64 (Q,), 0 to 1; 0 where there is no neighbor.
    """
    nearest_Q1 = np.maximum(scores_QK[:, :1], -1).astype(np.float64)
    weights_QK = np.exp((scores_QK - nearest_Q1) / temperature)
    agrees_QK = labels_QK == labels_Q[:, None]
    total_Q = np.maximum(weights_QK.sum(axis=1), np.finfo(np.float64).tiny)
    return np.asarray((weights_QK * agrees_QK).sum(axis=1) / total_Q)


def best_and_worst(
    evaluation: Evaluation, *, count: int, neighbors: int, side: int, temperature: float
) -> tuple[list[Example], list[Example], list[Example]]:
    """The queries whose neighbors agree most, as usual and least with their class, the first of each class in turn.

    Args:
        evaluation: With queries that are images.
        count: Queries of each kind.
        neighbors: Nearest rows shown.
        side: Of the pictures, in pixels.
        temperature: τ of the votes.
    """
    queries, reference = evaluation.queries, evaluation.reference
    assert queries.manifest is not None
    scores, voters = evaluation.neighbors(neighbors)
    rows = np.where(voters >= 0, evaluation.voters.rows[voters], -1)
    labels = np.where(rows >= 0, reference.labels[rows], -1)
    agreements = agreement(scores, labels, queries.labels, temperature=temperature)
    count = min(count, len(agreements) // 2 or 1)
    with Thumbnails(queries.manifest, side) as asked, Thumbnails(reference.images, side) as stored:

        def example(query: int) -> Example:
            row = int(queries.rows[query])
            names, label = queries.manifest.class_names, int(queries.manifest.labels[row])  # type: ignore[union-attr]
            return Example(
                query=Picture(
                    queries.manifest.name(row),  # type: ignore[union-attr]
                    names[label],
                    asked.uri(row),
                    link=asked.link(row),
                ),
                neighbors=tuple(
                    Picture(
                        reference.images.name(row),
                        reference.class_names[reference.labels[row]],
                        stored.uri(row),
                        float(score),
                        bool(reference.labels[row] == queries.labels[query]),
                        stored.link(row),
                    )
                    for row, score in zip(rows[query].tolist(), scores[query], strict=True)
                    if row >= 0  # where fewer rows count, the last ones are none
                ),
            )

        medians = np.empty_like(agreements)
        for label in np.unique(queries.labels):
            own = queries.labels == label
            medians[own] = np.median(agreements[own])
        best, typical, worst = (
            [example(query) for query in in_turn(values, queries.labels)[:count].tolist()]
            for values in (-agreements, np.abs(agreements - medians), agreements)
        )
    return best, typical, worst


def in_turn(values: npt.NDArray[np.float64], labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Positions of the smallest value of every class, then of the second smallest of every class, and so on.

    Args:
        values: float64 (Q,).
        labels: int64 (Q,).

    Returns:
        int64 (Q,).
    """
    order = np.lexsort((values, labels))
    starts = np.flatnonzero(np.diff(labels[order], prepend=-2))
    place = np.arange(len(order)) - np.repeat(starts, np.diff([*starts, len(order)]))
    return order[np.lexsort((values[order], place))]


def found_examples(
    source: Source, found: Sequence[Mapping[str, Any]], *, role: str, neighbors: int, side: int
) -> list[Example]:
    """What a protocol found, as pictures.

    Args:
        source: Where the images are.
        found: Each with a `row` of the bank, its `others` and their `similarities`; negative others are none.
        role: What the rows are, in a word.
        neighbors: Others shown of each.
        side: Of the pictures, in pixels.
    """
    shown = [
        (each["row"], [other for other in each["others"] if other >= 0][:neighbors], each["similarities"])
        for each in found
    ]
    rows = np.unique([row for row, others, _ in shown for row in (row, *others)]).astype(np.int64)
    images = source.images(rows)
    labels = [images.class_names[label] if label >= 0 else "" for label in images.labels.tolist()]
    with Thumbnails(images, side) as stored:
        pictures = {
            row: Picture(images.name(place), labels[place], stored.uri(place), link=stored.link(place))
            for place, row in enumerate(rows.tolist())
        }
    return [
        Example(
            query=pictures[row],
            neighbors=tuple(
                pictures[other]._replace(similarity=similarity)
                for other, similarity in zip(others, similarities, strict=False)
            ),
            role=role,
        )
        for row, others, similarities in shown
    ]


def explored(
    source: Source, results: Mapping[str, Any], config: PageConfig
) -> list[tuple[str, str, Sequence[Example]]]:
    """Galleries of what was found without queries, each with a title and a note."""
    galleries: list[tuple[str, str, Sequence[Example]]] = []

    def add(title: str, note: str, role: str, found: Sequence[Mapping[str, Any]]) -> None:
        if found:
            examples = found_examples(
                source, found, role=role, neighbors=config.neighbors, side=config.thumbnail
            )
            galleries.append((title, note, examples))

    if "duplicates" in results:
        found = results["duplicates"]
        note = (
            f"{found['groups']:,} groups of {found['rule']}; "
            f"{found['images'] - found['groups']:,} images could go. All are listed in duplicates.csv, the image to "
            "keep first."
        )
        add("Near duplicates", note, "to keep", found["shown"][: config.examples])
    if "strangers" in results:
        found = results["strangers"]
        note = (
            "Those whose features are farthest from the mean: at distances up to "
            f"{found['largest_distance']:.1f}, half of the images are below {found['median_distance']:.1f}. More of "
            "them in strangers.csv."
        )
        add("Strangers, with what is nearest", note, "stranger", found["shown"][: config.examples])
    for found in list(results.get("clusters", {"clusters": {}})["clusters"].values())[:1]:
        central = [
            {
                "row": rows[0]["row"],
                "others": [each["row"] for each in rows[1:]],
                "similarities": [each["similarity"] for each in rows[1:]],
            }
            for rows in found["central"]
        ]
        note = "The images nearest to the center of each, the largest cluster first; all are in clusters.csv."
        add(f"{len(central)} clusters", note, "center", central)
    return galleries
