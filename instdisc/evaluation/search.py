"""Embed images, find their nearest rows in the bank, and draw them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from cluster.settings import ActorsConfig, MetricsConfig
from instdisc.evaluation.context import Evaluation
from instdisc.evaluation.gallery import Thumbnails
from instdisc.evaluation.images import check_decoded, embed, open_images
from instdisc.settings.evaluation import EvaluationConfig, SearchConfig
from pipelines.manifest import Manifest

_SIDE, _GAP, _CAPTION = 112, 10, 34  # pixels of the drawing


class Neighbor(NamedTuple):
    """A row of the bank that is near an image."""

    row: int
    similarity: float
    label: str
    """Name of its class, `-` for none."""
    name: str


def search(config: SearchConfig) -> str:
    """Embed the images as training did, draw their nearest rows, and return them as text.

    Raises:
        ConfigError: There are fewer than k rows.
        DataError: An image cannot be read or decoded.
        SnapshotError: There is no whole snapshot.
    """
    evaluation = Evaluation(
        EvaluationConfig(
            source=config.source,
            actors=ActorsConfig(num_actors=config.num_actors),
            loader=config.loader,
            metrics=MetricsConfig(port=None),
        )
    )
    manifest = open_images(config.images, upright=evaluation.source.turns_images)
    with evaluation:
        # Here, not in the actors: their nodes may not see the images.
        embeddings = evaluation.image_rows(manifest, embed).read(0, len(manifest))
        check_decoded(embeddings, manifest)
        scores, rows = evaluation.search(embeddings, config.k)
        labels = {row: _label(evaluation, row) for row in np.unique(rows).tolist()}
        found = [
            [
                Neighbor(row, float(score), *labels[row])
                for row, score in zip(rows[query].tolist(), scores[query], strict=True)
            ]
            for query in range(len(manifest))
        ]
        train = evaluation.source.train if evaluation.source.has_run else None
    lines = []
    for query, neighbors in enumerate(found):
        lines += [manifest.name(query), *_table(neighbors), ""]
    if train is None:
        return "\n".join([*lines, "not drawn: a snapshot has no images; give its run directory to see them"])
    output = config.output.expanduser()
    draw(manifest, train, found).save(output, "PNG")
    return "\n".join([*lines, f"drawn in {output}"])


def _label(evaluation: Evaluation, row: int) -> tuple[str, str]:
    """Name of the row's class, `-` for none, and of its image."""
    if evaluation.source.has_run:
        label, name = int(evaluation.source.train.labels[row]), evaluation.source.train.name(row)
    else:
        label, name = (
            evaluation.source.snapshot.read(table, row, row + 1)[0] for table in ("labels", "keys")
        )
    return evaluation.source.class_names[label] if label >= 0 else "-", name


def _table(neighbors: Sequence[Neighbor]) -> list[str]:
    width = max(len(each.label) for each in neighbors)
    return [
        f"  {each.similarity:6.3f}  {each.label:<{width}}  {each.name} (row {each.row})" for each in neighbors
    ]


def draw(queries: Manifest, train: Manifest, found: Sequence[Sequence[Neighbor]]) -> Image.Image:
    """A line for every query: the image, and to its right its nearest rows with similarity and class."""
    columns = 1 + max(len(neighbors) for neighbors in found)
    width, height = _SIDE + _GAP, _SIDE + _CAPTION + _GAP
    sheet = Image.new("RGB", (columns * width + 2 * _GAP, len(found) * height + _GAP), "white")
    with Thumbnails(queries, _SIDE) as asked, Thumbnails(train, _SIDE) as stored:
        for number, neighbors in enumerate(found):
            top = _GAP + number * height
            _place(sheet, asked.image(number), (_GAP, top), ["query"])
            for column, each in enumerate(neighbors, 1):
                place = (2 * _GAP + column * width, top)
                _place(sheet, stored.image(each.row), place, [f"{each.similarity:.3f}", each.label])
    return sheet


def _place(
    sheet: Image.Image, image: Image.Image | None, place: tuple[int, int], caption: Sequence[str]
) -> None:
    """Draw one image in the middle of its square, enlarged if it is small, with lines of text below it."""
    left, top = place
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    if image is None:
        pen.rectangle((left, top, left + _SIDE, top + _SIDE), outline="grey")
        caption = ["cannot be decoded", *caption[1:]]
    else:
        sheet.paste(ImageOps.pad(image, (_SIDE, _SIDE), color="white"), place)
    for number, text in enumerate(caption):
        while len(text) > 1 and pen.textlength(text, font) > _SIDE:
            text = f"{text[:-2]}…"
        pen.text((left, top + _SIDE + 2 + 15 * number), text, fill="black", font=font)
