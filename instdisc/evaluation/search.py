"""Embed images, find their nearest rows in the bank or index, and draw them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from cluster.settings import ActorsConfig, MetricsConfig
from instdisc.evaluation.context import Evaluation
from instdisc.evaluation.gallery import GONE, Thumbnails
from instdisc.evaluation.images import check_decoded, embed, open_images
from instdisc.evaluation.source import Source
from instdisc.model.features import mirrored_features
from instdisc.model.voters import choose_voters
from instdisc.model.votes import weighted_votes
from instdisc.settings.evaluation import EvaluationConfig, KnnConfig, Readout, SearchConfig
from pipelines.manifest import Manifest
from pipelines.whole import written_whole

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
        function = mirrored_features if config.readout == "features" else embed
        embeddings = evaluation.image_rows(manifest, function).read(0, len(manifest))
        check_decoded(embeddings, manifest)
        scores, rows = evaluation.search(embeddings, config.k, config.readout)
        once = np.unique(rows)
        labels = _labels(evaluation, once)
        found = [
            [
                Neighbor(row, float(score), *labels[row])
                for row, score in zip(rows[query].tolist(), scores[query], strict=True)
            ]
            for query in range(len(manifest))
        ]
        classes = _classes(evaluation, embeddings, config.readout)
        pictures = _pictures(evaluation.source, once) if evaluation.source.has_images else None
    lines = []
    for query, neighbors in enumerate(found):
        lines += [manifest.name(query), *_table(neighbors), *classes[query : query + 1], ""]
    if pictures is None:
        return "\n".join([*lines, "not drawn: a snapshot has no images; give its run directory to see them"])
    gone = [labels[row][1] for row, picture in pictures.items() if picture == GONE]
    if gone:
        remedy = (
            f"python -m instdisc.embed --output {config.source} --data.root PLACE says where they are now"
        )
        lines += [
            f"{len(gone)} of these images are not where they were, e.g. {gone[0]}"
            + (f": {remedy}" if evaluation.source.index is not None else ""),
            "",
        ]
    output = config.output.expanduser()
    try:
        with written_whole(output) as partial:
            draw(manifest, pictures, found).save(partial, "PNG")
    except OSError as error:  # what was found is worth more than its picture
        return "\n".join([*lines, f"not drawn: {error}"])
    return "\n".join([*lines, f"drawn in {output}"])


def _pictures(source: Source, rows: npt.NDArray[np.int64]) -> dict[int, Image.Image | str]:
    """The image of each row, or why there is none."""
    with Thumbnails(source.images(rows), _SIDE) as stored:
        return {row: stored.image(place) for place, row in enumerate(rows.tolist())}


def _labels(evaluation: Evaluation, rows: npt.NDArray[np.int64]) -> dict[int, tuple[str, str]]:
    """Name of each row's class, `-` for none, and of its image."""
    source = evaluation.source
    if source.has_run and source.index is None:
        labels = source.train.labels[rows].tolist()
        names = [source.train.name(row) for row in rows.tolist()]
    else:
        labels, names = (source.read_rows(table, rows).tolist() for table in ("labels", "keys"))
    classes = [source.class_names[label] if label >= 0 else "-" for label in labels]
    return dict(zip(rows.tolist(), zip(classes, names, strict=True), strict=True))


def _classes(evaluation: Evaluation, embeddings: npt.NDArray[np.float32], readout: Readout) -> list[str]:
    """The class of each image by the vote of training and evaluation; nothing where no row has a label."""
    source = evaluation.source
    if not source.has_labels:
        return []
    voters = choose_voters(source.bank_labels, leave_one_out=False)
    k = voters.neighbors(source.own_k)
    scores, found = (
        torch.from_numpy(each) for each in evaluation.search(embeddings, k, readout, voters.rows)
    )
    temperature = KnnConfig().temperature
    votes = weighted_votes(scores, voters.labels_of(found), len(voters.sizes), temperature=temperature)
    shares, named = (votes / votes.sum(dim=1, keepdim=True)).max(dim=1)
    return [
        f"  class by the vote of the {k} nearest labeled rows: {source.class_names[label]}, {share:.0%} of the votes"
        for label, share in zip(named.tolist(), shares.tolist(), strict=True)
    ]


def _table(neighbors: Sequence[Neighbor]) -> list[str]:
    width = max(len(each.label) for each in neighbors)
    return [
        f"  {each.similarity:6.3f}  {each.label:<{width}}  {each.name} (row {each.row})" for each in neighbors
    ]


def draw(
    queries: Manifest, pictures: Mapping[int, Image.Image | str], found: Sequence[Sequence[Neighbor]]
) -> Image.Image:
    """A line for every query: the image, and to its right its nearest rows with similarity and class.

    Args:
        queries: The images that were searched for.
        pictures: Of the rows found, or why there is none.
        found: The nearest rows of each query.
    """
    columns = 1 + max(len(neighbors) for neighbors in found)
    width, height = _SIDE + _GAP, _SIDE + _CAPTION + _GAP
    sheet = Image.new("RGB", (columns * width + 2 * _GAP, len(found) * height + _GAP), "white")
    with Thumbnails(queries, _SIDE) as asked:
        for number, neighbors in enumerate(found):
            top = _GAP + number * height
            _place(sheet, asked.image(number), (_GAP, top), ["query"])
            for column, each in enumerate(neighbors, 1):
                place = (2 * _GAP + column * width, top)
                _place(sheet, pictures[each.row], place, [f"{each.similarity:.3f}", each.label])
    return sheet


def _place(
    sheet: Image.Image, image: Image.Image | str, place: tuple[int, int], caption: Sequence[str]
) -> None:
    """Draw one image in the middle of its square, enlarged if it is small, or why there is none, with text below."""
    left, top = place
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    if isinstance(image, str):
        pen.rectangle((left, top, left + _SIDE, top + _SIDE), outline="gray")
        pen.text((left + 4, top + _SIDE // 2), image, fill="gray", font=font)
    else:
        sheet.paste(ImageOps.pad(image, (_SIDE, _SIDE), color="white"), place)
    for number, text in enumerate(caption):
        while len(text) > 1 and pen.textlength(text, font) > _SIDE:
            text = f"{text[:-2]}…"
        pen.text((left, top + _SIDE + 2 + 15 * number), text, fill="black", font=font)
