"""Planted duplicates and strangers: what `instdisc.explore` finds, beside perceptual hashes in the same run.

    pip install imagehash
    python benchmarks/explore.py RUN [--data IMAGES] [--per-kind 100] [--json FILE]

Puts into one folder the images (by default the bundled sample), copies of some of them (each kind of other images:
re-encoded as JPEG of quality 50, resized to half and to twice the side, cropped to 80% of either side, brightened by
30%, mirrored), and strangers of three kinds: noise, digits drawn by Pillow, and strokes as in MNIST. They are embedded
by the network of RUN and explored, all in this process without Ray.

Duplicates: of each kind alone, the recall at the lowest threshold at which at least 99% of the pairs above it are
planted ones. Pairs are compared with their 10 nearest others: by the correlation of small pictures among those that are
near by cosine (ours), by cosine alone, and hashes by Hamming distance, of which all images at the same distance count.
Pairs of images of the sample that show one picture already count neither way: those among the nearest by any of these
measures were looked at. Then recall and precision of `explore` as it is.

Strangers, 1% of the images: of one kind, and a third of each ("mixed"): AUROC against all images, by the rule of
`explore` and by others on the embeddings.
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
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageEnhance, ImageFont, ImageOps
from sklearn.metrics import roc_auc_score

from cluster.settings import ActorsConfig
from instdisc.embed import main as embed
from instdisc.evaluation.context import Evaluation
from instdisc.evaluation.correlation import SMALL, correlations, gray
from instdisc.evaluation.duplicates import pairs_of
from instdisc.evaluation.strangers import fit, joined_means, stage_widths
from instdisc.model import whitening
from instdisc.model.label_free import sampled
from instdisc.settings.evaluation import DuplicatesConfig, EvaluationConfig
from pipelines.build import build_manifest
from pipelines.datasets import resolve
from pipelines.reader import ImageReader

PRECISION = 0.99
NEIGHBORS = 10
ALREADY = [
    *[
        (9, 265),
        (11, 245),
        (67, 72),
        (280, 281),
        (455, 468),
        (610, 611),
        (642, 665),
        (908, 909, 912),
        (934, 944),
    ],
    *[(1179, 1387), (1310, 1312, 1337), (1554, 1641), (1822, 1869), (2075, 2444), (2088, 2392), (2356, 2369)],
    *[(2619, 2971), (2629, 2985), (3115, 3121), (3280, 3291), (3338, 3349), (3411, 3412), (3461, 3464)],
    *[(3714, 3716), (4588, 4592)],
]
"""Images of the sample that show one picture: 28 pairs in 25 groups."""
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


def plant(folder: Path, data: str, per_kind: int) -> dict[str, list[tuple[str, str]]]:
    """Write all images; returns the planted pairs by kind, as names of files."""
    generator = np.random.default_rng(0)
    manifest = build_manifest(resolve(data, root="data"), show_progress=False)
    reader = ImageReader(manifest)
    for row in range(len(manifest)):
        reader.decode(row).save(folder / f"image-{row:06}.png", compress_level=1)
    pairs: dict[str, list[tuple[str, str]]] = {}
    originals = iter(generator.permutation(len(manifest)).tolist())
    for number, (kind, change) in enumerate(KINDS.items()):
        pairs[kind] = []
        for original in (next(originals) for _ in range(per_kind)):
            name = f"copy-{number}-{original:06}.png"
            change(reader.decode(original)).save(folder / name)
            pairs[kind].append((f"image-{original:06}.png", name))
    for kind, draw in STRANGERS.items():
        for count in range(len(manifest) // 100):
            draw(generator).save(folder / f"stranger-{kind}-{count:04}.png")
    return pairs


def hash_neighbors(folder: Path, names: list[str], function: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    """Similarity, minus the Hamming distance, to the nearest others, and which they are; k of each image."""
    bits = np.array([function(Image.open(folder / name)).hash.ravel() for name in names], np.float32) * 2 - 1
    scores, rows = [], []
    for first in range(0, len(bits), 1024):
        distances = (bits.shape[1] - bits[first : first + 1024] @ bits.T) / 2
        distances[np.arange(len(distances)), first + np.arange(len(distances))] = np.inf
        # Of equal distances the first row; a sort of all columns would take most of the time.
        exact = distances.astype(np.float64) + np.arange(len(bits)) / (2 * len(bits))
        nearest = np.argpartition(exact, NEIGHBORS, axis=1)[:, :NEIGHBORS]
        scores.append(-np.take_along_axis(distances, nearest, 1))
        rows.append(nearest)
    return np.concatenate(scores), np.concatenate(rows)


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


def as_pairs(scores: NDArray[Any], rows: NDArray[Any]) -> dict[tuple[int, int], float]:
    """Every pair of neighbors once, with its similarity."""
    return {
        (min(row, other), max(row, other)): float(score)
        for row, (others, of) in enumerate(zip(rows.tolist(), scores, strict=True))
        for other, score in zip(others, of, strict=True)
    }


def duplicates(
    evaluation: Evaluation,
    folder: Path,
    names: list[str],
    by_kind: dict[str, list[tuple[str, str]]],
    already: list[tuple[int, ...]],
) -> list[dict[str, Any]]:
    group_of = {original: number for number, group in enumerate(already) for original in group}
    picture = {  # a number of its own for each that is not in a group
        row: -1 - row if name.startswith("stranger-") else group_of.get(int(Path(name).stem[-6:]), -1 - row)
        for row, name in enumerate(names)
    }
    row_of = {name: row for row, name in enumerate(names)}
    planted = {
        kind: {tuple(sorted((row_of[first], row_of[copy]))) for first, copy in pairs}
        for kind, pairs in by_kind.items()
    }
    copies_of = {kind: {row_of[copy] for _, copy in pairs} for kind, pairs in by_kind.items()}
    strange = {row for name, row in row_of.items() if name.startswith("stranger-")}
    scores, rows = evaluation.nearest_others(NEIGHBORS)
    first, second = pairs_of(scores, rows, -1)
    pictures = evaluation.compute(evaluation.source.train, gray, augmentation=SMALL).round().astype(np.uint8)
    alike = correlations(pictures, first, second)
    found: dict[str, dict[tuple[int, int], float]] = {
        "ours": dict(zip(zip(first.tolist(), second.tolist(), strict=True), alike.tolist(), strict=True)),
        "cosine alone": as_pairs(scores, rows),
    }
    for name, function in HASHES.items():
        found[name] = as_pairs(*hash_neighbors(folder, names, function))
    everything = set().union(*planted.values())
    found = {
        name: {
            pair: value
            for pair, value in pairs.items()
            if pair in everything or picture[pair[0]] != picture[pair[1]]
        }
        for name, pairs in found.items()
    }
    results: list[dict[str, Any]] = []
    for kind in KINDS:
        ignored = strange.union(*(rows for other, rows in copies_of.items() if other != kind))
        recalls = {name: recall(pairs, planted[kind], ignored)[0] for name, pairs in found.items()}
        results.append({"what": "recall at 99% precision", "kind": kind, **recalls})
    recalls = {name: recall(pairs, everything, strange)[0] for name, pairs in found.items()}
    results.append({"what": "recall at 99% precision", "kind": "all", **recalls})
    least = DuplicatesConfig().correlation
    above = {
        pair for pair, value in found["ours"].items() if value >= least and not strange.intersection(pair)
    }
    right = above & everything
    results.append(
        {
            "what": f"explore as it is, correlation {least}",
            "precision": len(right) / max(1, len(above)),
            "recall": len(right) / len(everything),
            **{f"recall, {kind}": len(above & planted[kind]) / len(planted[kind]) for kind in KINDS},
            "wrong pairs": [[names[one], names[other]] for one, other in sorted(above - everything)],
        }
    )
    return results


def nearest(rows: NDArray[Any], k: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Cosines of the k nearest other rows, and which; largest first."""
    table = torch.from_numpy(rows)
    values, places = [], []
    for start in range(0, len(table), 1024):
        cosines = table[start : start + 1024] @ table.T
        cosines.diagonal(start).fill_(-2)
        value, place = cosines.topk(k)
        values.append(value.numpy())
        places.append(place.numpy())
    return np.concatenate(values), np.concatenate(places)


def strangeness(embeddings: NDArray[Any], means: NDArray[Any], widths: list[int]) -> dict[str, NDArray[Any]]:
    """By rule."""
    many = len(embeddings) // 20
    values, places = nearest(embeddings, many)
    far = 1 - values.mean(axis=1)
    whiten = whitening.fit(torch.from_numpy(embeddings))
    centered = (torch.from_numpy(embeddings) - whiten.mean_D) @ whiten.matrix_DK
    white = whiten(torch.from_numpy(embeddings)).numpy()
    return {
        "ours": fit(means[sampled(len(means))], widths).of(torch.from_numpy(means)).numpy(),
        "last stage alone": fit(means[:, -widths[-1] :], widths[-1:])
        .of(torch.from_numpy(means[:, -widths[-1] :]))
        .numpy(),
        "10 nearest": 1 - values[:, :10].mean(axis=1),
        "5% nearest": far,
        "5% nearest, whitened": 1 - nearest(white, many)[0].mean(axis=1),
        "length, whitened": centered.norm(dim=1).numpy(),
        "density beside that of neighbors": far / far[places].mean(axis=1),
    }


def strangers(evaluation: Evaluation, names: list[str]) -> list[dict[str, Any]]:
    source = evaluation.source
    means = evaluation.compute(source.train, joined_means)
    widths = stage_widths(source.network, source.augmentation.image_size)
    rows = evaluation.compared_rows
    embeddings = rows.read(0, rows.num_rows).astype(np.float32)
    base = [row for row, name in enumerate(names) if name.startswith("image-")]
    of_kind = {
        kind: [row for row, name in enumerate(names) if name.startswith(f"stranger-{kind}-")]
        for kind in STRANGERS
    }
    of_kind["mixed"] = [row for rows in of_kind.values() for row in rows[: len(base) // 300]]
    results = []
    for kind, planted in of_kind.items():
        chosen = np.sort(np.array([*base, *planted]))
        scores = strangeness(embeddings[chosen], means[chosen], widths)
        truth = np.isin(chosen, planted)
        results.append(
            {
                "what": "AUROC of strangers",
                "kind": kind,
                **{rule: float(roc_auc_score(truth, values)) for rule, values in scores.items()},
            }
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run")
    parser.add_argument("--data", default="sample", help="images, as training takes them")
    parser.add_argument("--per-kind", type=int, default=100)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, index = Path(temporary, "images"), Path(temporary, "index")
        folder.mkdir()
        by_kind = plant(folder, options.data, options.per_kind)
        with contextlib.redirect_stdout(io.StringIO()):
            arguments = [options.run, "--data.path", str(folder), "--output", str(index), "--num-actors", "0"]
            assert embed(arguments) == 0
        config = EvaluationConfig(
            source=str(index), actors=ActorsConfig(num_actors=0), output=Path(temporary, "out")
        )
        with Evaluation(config) as evaluation:
            names = [Path(name).name for name in evaluation.source.snapshot.read("keys").tolist()]
            results = [
                *duplicates(evaluation, folder, names, by_kind, ALREADY if options.data == "sample" else []),
                *strangers(evaluation, names),
            ]
    for result in results:
        print(
            "  ".join(
                f"{name} {value:.3f}" if isinstance(value, float) else str(value)
                for name, value in result.items()
            )
        )
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
