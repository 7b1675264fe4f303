"""A map: a place in two dimensions for every image, near ones together, by t-SNE."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from cluster.actors import available_threads
from cluster.topk import RowSource
from instdisc.common.errors import ConfigError
from instdisc.evaluation.image_tables import image_columns, write_table
from instdisc.evaluation.plots import COLORS
from instdisc.settings.evaluation import MapConfig

if TYPE_CHECKING:
    from instdisc.evaluation.context import Evaluation

_ROWS = 65_536  # read at a time
_FEWEST = 8  # rows of which there is a map
_PERPLEXITY = 30  # as usual; fewer where there are fewer than 91 images
_SHOWN = 10_000  # places that the results name for the page


def run(evaluation: Evaluation, config: MapConfig) -> dict[str, Any]:
    """Write `map.csv` and `map.parquet`: the place of every image; without one for an image that has no embedding.

    Raises:
        ConfigError: The extra is missing, or there are fewer than eight different images.
    """
    places, fitted = places_of(evaluation.compared_rows, config)
    write_table(
        evaluation.output / "map",
        {**image_columns(evaluation.source.train), "x": places[:, 0], "y": places[:, 1]},
    )
    there = np.flatnonzero(np.isfinite(places[:, 0]))
    shown = there[np.linspace(0, len(there) - 1, min(_SHOWN, len(there))).astype(np.int64)]
    return {
        "summary": {"images": len(there), "of them placed among their neighbors": len(there) - fitted},
        "images": len(there),
        "fitted": fitted,
        "shown": {"rows": shown.tolist(), "places": places[shown].round(3).tolist()},
    }


def places_of(rows: RowSource, config: MapConfig) -> tuple[npt.NDArray[np.float32], int]:
    """The map of unit vectors (van der Maaten and Hinton 2008), by openTSNE.

    Of many rows those spread evenly are mapped, and each other one is then put where its nearest ones of these are.

    Args:
        rows: N unit vectors; one of NaN has no place.
        config: Settings.

    Returns:
        float32 (N, 2), and how many rows were mapped.

    Raises:
        ConfigError: The extra is missing, or there are fewer than eight different rows.
    """
    try:
        from openTSNE import TSNE
    except ImportError as error:
        raise ConfigError(
            f"a map needs a package that is not installed ({error}): pip install 'instdisc[map]'"
        ) from error
    logging.getLogger("openTSNE").setLevel(logging.WARNING)  # it tells each of its steps
    chosen = np.linspace(0, rows.num_rows - 1, min(rows.num_rows, config.most)).astype(np.int64)
    sample = []
    for start in range(0, rows.num_rows, _ROWS):
        block = rows.read(start, min(start + _ROWS, rows.num_rows)).astype(np.float32, copy=False)
        own = chosen[(chosen >= start) & (chosen < start + len(block))]
        sample.append(block[own - start])
    mapped = np.concatenate(sample)
    finite = np.isfinite(mapped[:, 0])
    mapped, chosen = mapped[finite], chosen[finite]
    if len(np.unique(mapped, axis=0)) < _FEWEST:
        raise ConfigError(f"there are fewer than {_FEWEST} different images, of which there is no map")
    method = TSNE(
        perplexity=min(_PERPLEXITY, (len(mapped) - 1) / 3),
        metric="cosine",
        n_jobs=available_threads(),
        random_state=config.seed,
    )
    embedding = method.fit(mapped)
    places = np.full((rows.num_rows, 2), np.nan, np.float32)
    places[chosen] = np.asarray(embedding)
    if len(chosen) < rows.num_rows:
        for start in range(0, rows.num_rows, _ROWS):
            block = rows.read(start, min(start + _ROWS, rows.num_rows)).astype(np.float32, copy=False)
            missing = np.isfinite(block[:, 0]) & np.isnan(places[start : start + len(block), 0])
            if missing.any():
                others = embedding.prepare_partial(block[missing], initialization="median", k=10)
                places[start + np.flatnonzero(missing)] = np.asarray(others)
    return places, len(mapped)


def colored(
    evaluation: Evaluation, found: Mapping[str, Any], clusters: Mapping[str, Any]
) -> list[tuple[str, list[tuple[float, float]]]]:
    """The places that a page shows, by class, or by cluster where there are no or too many classes.

    Args:
        evaluation: With the images.
        found: What `run` returned.
        clusters: Those of the protocol of that name, by their number; may be empty.

    Returns:
        Name and places (x, y) of each group, as many of them as there are colors at most.
    """
    rows = np.array(found["shown"]["rows"], np.int64)
    images = evaluation.source.images(rows)
    groups, names = np.asarray(images.labels).astype(np.int64), list(images.class_names)
    few = [number for number in clusters if len(clusters[number]["sizes"]) <= COLORS]
    too_many = not 1 < len(names) <= COLORS - int((groups < 0).any())
    if too_many and few:
        table = pq.read_table(evaluation.output / "clusters.parquet", columns=[f"cluster_{few[-1]}"])
        groups = table.column(0).to_numpy()[rows]
        names = [f"cluster {number}" for number in range(len(clusters[few[-1]]["sizes"]))]
    elif too_many:
        groups, names = np.zeros(len(rows), np.int64), ["images"]
    if (groups < 0).any():
        groups, names = np.where(groups < 0, len(names), groups), [*names, "without a class"]
    places = [(float(x), float(y)) for x, y in found["shown"]["places"]]
    return [
        (name, [places[place] for place in np.flatnonzero(groups == number)])
        for number, name in enumerate(names)
    ]
