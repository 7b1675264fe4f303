"""Planted duplicates and strangers: what `instdisc.explore` finds, beside perceptual hashes in the same run.

    pip install imagehash
    python benchmarks/explore.py RUN [--per-kind 100] [--strangers 17] [--json FILE]

Puts into one folder the images of the bundled sample, copies of some of them (each kind of other images: re-encoded as
JPEG of quality 50, resized to half and to twice the side, cropped to 80% of either side, brightened by 30%, mirrored),
and strangers of three kinds: noise, digits drawn by Pillow, and strokes as in MNIST. They are embedded by the network
of RUN, which was trained on the sample, and explored, all in this process without Ray.

Duplicates: of each kind alone, the recall at the lowest threshold at which at least 99% of the pairs above it are
planted ones. Pairs are compared with their nearest others: ours by cosine, hashes by Hamming distance, of which all
images at the same distance count. Images of the sample that are the same already count as wrong pairs, for all alike.
Then the recall and precision at the threshold that the index suggests. Strangers: AUROC of the strangeness of those
planted against all images of the sample, by kind; for hashes the mean distance to the ten nearest.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageEnhance, ImageFont, ImageOps
from sklearn.metrics import roc_auc_score

from cluster.settings import ActorsConfig
from instdisc.embed import main as embed
from instdisc.evaluation.context import Evaluation
from instdisc.evaluation.duplicates import similarities_of_copies, suggest_threshold
from instdisc.evaluation.strangers import strangeness
from instdisc.model.label_free import sampled
from instdisc.settings.evaluation import EvaluationConfig
from pipelines.build import build_manifest
from pipelines.datasets import resolve
from pipelines.reader import ImageReader

PRECISION = 0.99
NEIGHBORS = 10
HASHES = {"phash": imagehash.phash, "dhash": imagehash.dhash, "whash": imagehash.whash}


def reencoded(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=50)
    return Image.open(buffer).convert("RGB")


def cropped(image: Image.Image) -> Image.Image:
    width, height = (round(0.8 * side) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


KINDS = {
    "re-encoded": reencoded,
    "half the side": lambda image: image.resize((image.width // 2, image.height // 2)),
    "twice the side": lambda image: image.resize((2 * image.width, 2 * image.height)),
    "cropped to 80%": cropped,
    "brightened by 30%": lambda image: ImageEnhance.Brightness(image).enhance(1.3),
    "mirrored": ImageOps.mirror,
}


def noise(generator: np.random.Generator) -> Image.Image:
    return Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8))


def digit(generator: np.random.Generator) -> Image.Image:
    image = Image.new("RGB", (32, 32), "white")
    place = tuple(generator.integers(2, 10, 2).tolist())
    ImageDraw.Draw(image).text(
        place, str(generator.integers(0, 10)), fill="black", font=ImageFont.load_default(20)
    )
    return image


def strokes(generator: np.random.Generator) -> Image.Image:
    image = Image.new("L", (32, 32))
    points = [tuple(point) for point in generator.integers(5, 27, (4, 2)).tolist()]
    ImageDraw.Draw(image).line(points, fill=255, width=3, joint="curve")
    return image.convert("RGB")


STRANGERS = {"noise": noise, "digits": digit, "strokes": strokes}


def plant(folder: Path, per_kind: int, strangers: int) -> dict[str, list[tuple[str, str]]]:
    """Write all images; returns the planted pairs by kind, as names of files."""
    generator = np.random.default_rng(0)
    manifest = build_manifest(resolve("sample", root="data"), show_progress=False)
    reader = ImageReader(manifest)
    for row in range(len(manifest)):
        reader.decode(row).save(folder / f"sample-{row:05}.png")
    pairs: dict[str, list[tuple[str, str]]] = {}
    originals = iter(generator.permutation(len(manifest)).tolist())
    for number, (kind, change) in enumerate(KINDS.items()):
        pairs[kind] = []
        for original in (next(originals) for _ in range(per_kind)):
            name = f"copy-{number}-{original:05}.png"
            change(reader.decode(original)).save(folder / name)
            pairs[kind].append((f"sample-{original:05}.png", name))
    for kind, draw in STRANGERS.items():
        for count in range(strangers):
            draw(generator).save(folder / f"stranger-{kind}-{count:03}.png")
    return pairs


def hash_neighbors(folder: Path, names: list[str], function: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    """Similarity, minus the Hamming distance, to the nearest others, and which they are; k of each image."""
    bits = np.array([function(Image.open(folder / name)).hash.ravel() for name in names], np.float32) * 2 - 1
    scores, rows = [], []
    for first in range(0, len(bits), 1024):
        distances = (bits.shape[1] - bits[first : first + 1024] @ bits.T) / 2
        distances[np.arange(len(distances)), first + np.arange(len(distances))] = np.inf
        nearest = np.argsort(distances, axis=1, kind="stable")[:, :NEIGHBORS]
        scores.append(-np.take_along_axis(distances, nearest, 1))
        rows.append(nearest)
    return np.concatenate(scores), np.concatenate(rows)


def pairs_found(scores: NDArray[Any], rows: NDArray[Any]) -> dict[tuple[int, int], float]:
    """Every pair of neighbors once, with its similarity."""
    return {
        (min(row, other), max(row, other)): float(score)
        for row, (others, of) in enumerate(zip(rows.tolist(), scores, strict=True))
        for other, score in zip(others, of, strict=True)
    }


def recall(
    found: dict[tuple[int, int], float], planted: set[tuple[int, int]], ignored: set[int]
) -> tuple[float, float | None]:
    """The recall at the lowest threshold of the precision asked for, and that threshold.

    Args:
        found: All pairs.
        planted: Those that are right.
        ignored: Copies of other kinds and strangers, whose pairs do not count.
    """
    pairs = [pair for pair in found if not ignored.intersection(pair)]
    scores = np.array([found[pair] for pair in pairs])
    right = np.array([pair in planted for pair in pairs])
    order = np.argsort(-scores, kind="stable")
    scores, hits = scores[order], np.cumsum(right[order])
    ends = np.flatnonzero(np.r_[scores[1:] != scores[:-1], True])  # all of equal similarity, or none
    good = ends[hits[ends] >= PRECISION * (ends + 1)]
    return (hits[good[-1]] / len(planted), float(scores[good[-1]])) if len(good) else (0.0, None)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run")
    parser.add_argument("--per-kind", type=int, default=100)
    parser.add_argument(
        "--strangers", type=int, default=17, help="of each kind: three times 17 are 1%% of 5,000"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, index = Path(temporary, "images"), Path(temporary, "index")
        folder.mkdir()
        by_kind = plant(folder, options.per_kind, options.strangers)
        with contextlib.redirect_stdout(io.StringIO()):
            arguments = [options.run, "--data.path", str(folder), "--output", str(index), "--num-actors", "0"]
            assert embed(arguments) == 0
        config = EvaluationConfig(
            source=str(index), actors=ActorsConfig(num_actors=0), output=Path(temporary, "out")
        )
        with Evaluation(config) as evaluation:
            names = [Path(name).name for name in evaluation.source.snapshot.read("keys").tolist()]
            neighbors = {"embedding": evaluation.nearest_others(NEIGHBORS)}
            copies = similarities_of_copies(evaluation, 0)
        for name, function in HASHES.items():
            neighbors[name] = hash_neighbors(folder, names, function)
    row_of = {name: row for row, name in enumerate(names)}
    planted = {
        kind: {tuple(sorted((row_of[first], row_of[copy]))) for first, copy in pairs}
        for kind, pairs in by_kind.items()
    }
    copies_of = {kind: {row_of[copy] for _, copy in pairs} for kind, pairs in by_kind.items()}
    found = {name: pairs_found(*each) for name, each in neighbors.items()}
    rows: list[dict[str, Any]] = []
    strange = {row for name, row in row_of.items() if name.startswith("stranger-")}
    for kind in KINDS:
        ignored = strange.union(*(rows for other, rows in copies_of.items() if other != kind))
        recalls = {name: recall(pairs, planted[kind], ignored)[0] for name, pairs in found.items()}
        rows.append({"what": "recall at 99% precision", "kind": kind, **recalls})
    everything = set().union(*planted.values())
    recalls = {name: recall(pairs, everything, strange)[0] for name, pairs in found.items()}
    rows.append({"what": "recall at 99% precision", "kind": "all", **recalls})
    of_sample = sampled(len(names))
    threshold = suggest_threshold(copies, neighbors["embedding"][0][of_sample, 0])
    above = {
        pair
        for pair, score in found["embedding"].items()
        if score >= threshold and not strange.intersection(pair)
    }
    rows.append(
        {
            "what": "suggested threshold",
            "threshold": threshold,
            "precision": len(above & everything) / max(1, len(above)),
            "recall": len(above & everything) / len(everything),
            **{f"recall, {kind}": len(above & planted[kind]) / len(planted[kind]) for kind in KINDS},
        }
    )
    is_sample = np.array([name.startswith("sample-") for name in names])
    for kind in STRANGERS:
        is_stranger = np.array([name.startswith(f"stranger-{kind}-") for name in names])
        counted = is_sample | is_stranger
        scores = {
            name: float(roc_auc_score(is_stranger[counted], strangeness(each[0])[counted]))
            for name, each in neighbors.items()
        }
        rows.append({"what": "AUROC of strangers", "kind": kind, **scores})
    for row in rows:
        print(
            "  ".join(
                f"{name} {value:.3f}" if isinstance(value, float) else str(value)
                for name, value in row.items()
            )
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
