"""One self-contained HTML page about a run: curves, figures of all protocols, and a gallery of nearest rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from instdisc.common.files import read_lines, write_text
from instdisc.evaluation.gallery import Example, best_and_worst, explored
from instdisc.evaluation.plots import Series, axis_over, histogram_chart, line_chart, scatter_chart
from instdisc.evaluation.tsne import colored
from instdisc.settings.evaluation import PROTOCOL_NAMES, PageConfig

if TYPE_CHECKING:
    from instdisc.evaluation.context import Evaluation
    from instdisc.evaluation.source import Source

_RESULTS = tuple(name for name in PROTOCOL_NAMES if name != "page")
_KNN_CURVES = {"knn_top1_recomputed": "recomputed embeddings", "knn_top1_bank": "memory bank"}
_BASELINES = {"knn_top1_raw_pixels": "raw pixels", "knn_top1_untrained": "untrained network"}


class Chart(NamedTuple):
    """A chart with the names of its series, in the order of their colors."""

    title: str
    names: Sequence[str]
    svg: Markup
    note: str


class Table(NamedTuple):
    """Cells as they are to be read."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Page:
    """The contents of the page, from top to bottom."""

    title: str
    subtitle: str
    tiles: Sequence[tuple[str, str]]
    map: Chart | None = None
    charts: Sequence[Chart]
    tables: Sequence[Table]
    galleries: Sequence[tuple[str, str, Sequence[Example]]]
    """Each with a title and a note."""
    footer: str


def run(evaluation: Evaluation, config: PageConfig) -> dict[str, Any]:
    """Write `index.html` into the output directory.

    Without labels no query is best or worst, and there is no gallery of those.

    Raises:
        ConfigError: Only a snapshot is at hand, which has neither images nor curves; an index has images.
    """
    results, source = _read_results(evaluation), evaluation.source
    run = source.run if source.index is None else None
    metrics, summary = (read_lines(run.journal), run.read_summary() or {}) if run else ([], {})
    galleries = explored(source, results, config)
    if evaluation.has_labels and evaluation.queries.manifest is not None:
        best, typical, worst = best_and_worst(
            evaluation,
            count=config.examples,
            neighbors=config.neighbors,
            side=config.thumbnail,
            temperature=config.temperature,
        )
        galleries = [
            ("Nearest rows of the best queries", "Of every class in turn.", best),
            (
                "Nearest rows of typical queries",
                "As many votes for the class as half of its queries.",
                typical,
            ),
            ("Nearest rows of the worst queries", "Of every class in turn.", worst),
            *galleries,
        ]
    html = render(
        Page(
            title=run.path.name if run else source.snapshot.url.rpartition("/")[2],
            subtitle=_subtitle(source),
            tiles=tiles(results, source.embedding_dim, _baselines(source)),
            map=_map_chart(evaluation, results),
            charts=[*training_charts(metrics, summary), *similarity_charts(results.get("statistics"))],
            tables=[*training_table(summary), *tables(results)],
            galleries=galleries,
            footer=f"{'Snapshot' if run else 'Index'} of step {source.snapshot.step:,}; the figures are also in the "
            ".json files beside this page.",
        )
    )
    path = evaluation.output / "index.html"
    write_text(path, html)
    pictures = sum(1 + len(example.neighbors) for *_, examples in galleries for example in examples)
    return {"summary": {"pictures": pictures}, "page": str(path), "results": sorted(results)}


def _baselines(source: Source) -> dict[str, float]:
    """What was measured beside the run itself; nothing for an index of other images."""
    if not source.has_run or (source.index is not None and not source.index.attributes["of_run"]):
        return {}
    summary = source.run.read_summary() or {}
    names = _BASELINES | (
        {"knn_top1_untrained": "network at its start"} if summary.get("init_weights") else {}
    )
    return {name: summary[key] for key, name in names.items() if summary.get(key) is not None}


def _subtitle(source: Source) -> str:
    """What was trained or embedded, and how."""
    classes, step = len(source.class_names) or "no", f"step {source.snapshot.step:,}"
    images = f"{source.snapshot.num_rows:,}"
    if source.index is not None:
        return f"index of {images} images of {classes} classes, embedded by {source.backbone.name}, {step}"
    settings = source.run.settings()
    return (
        f"recipe {settings['recipe']}: {settings['backbone']['name']}, {images} training images of {classes} classes, "
        f"{settings['training']['epochs']} epochs, {step}"
    )


def render(page: Page) -> str:
    """The page as HTML that needs no other file; all text is escaped."""
    environment = Environment(
        loader=PackageLoader("instdisc.evaluation", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(vars(page))


def tiles(
    results: Mapping[str, Any], embedding_dim: int, baselines: Mapping[str, float]
) -> list[tuple[str, str]]:
    """The few numbers to see first.

    Args:
        results: Of all protocols.
        embedding_dim: D.
        baselines: kNN top-1 of what needs no training, by name.
    """
    found = []
    if knn := results.get("knn"):
        found.append((f"kNN top-1, k = {knn['k']}", _percent(knn["accuracies"][f"k{knn['k']}"]["top1"])))
        found += [(f"kNN top-1 of {name}", _percent(value)) for name, value in baselines.items()]
    if linear := results.get("linear"):
        best = max(linear["stages"], key=lambda stage: linear["stages"][stage]["probe"]["top1"])
        found.append((f"linear probe on {best}, top-1", _percent(linear["stages"][best]["probe"]["top1"])))
    if "1" in (unseen := results.get("unseen", {"recall": {}}))["recall"]:
        found.append(("Recall@1, held-out classes", _percent(unseen["recall"]["1"])))
    if duplicates := results.get("duplicates"):
        found.append(("near duplicates that could go", f"{duplicates['images'] - duplicates['groups']:,}"))
    if statistics := results.get("statistics"):
        found.append((f"effective rank of {embedding_dim}", f"{statistics['effective_rank']:.1f}"))
        found.append(("alignment (lower is better)", f"{statistics['alignment']:.3f}"))
        found.append(("uniformity (lower is better)", f"{statistics['uniformity']:.3f}"))
    return found


def training_charts(metrics: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> list[Chart]:
    """Loss and kNN accuracy over the epochs of the run.

    Args:
        metrics: The lines of `metrics.jsonl`.
        summary: `summary.json`, for the baselines; may be empty.
    """
    charts = []
    losses = [
        (line["epoch"], line["loss"]) for line in metrics if line.get("kind") == "train" and "loss" in line
    ]
    if losses:
        epochs, values = zip(*losses, strict=True)
        svg = line_chart("Loss", [Series("loss", epochs, values)], *_axes(epochs, values, "loss"))
        charts.append(Chart("Training loss", ["loss"], svg, "Mean over the batch, every few steps."))
    measured = [line for line in metrics if line.get("kind") == "knn"]
    curves = [
        Series(name, [line["epoch"] for line in lines], [line[key] for line in lines], marks=True)
        for key, name in _KNN_CURVES.items()
        if (lines := [line for line in measured if line.get(key) is not None])
    ]
    if curves:
        covered = [0, *(epoch for curve in curves for epoch in curve.x)]
        given = {"knn_top1_untrained": "network at its start"} if summary.get("init_weights") else {}
        baselines = [
            Series(name, [0, max(covered)], [summary[key]] * 2, dashed=True)
            for key, name in (_BASELINES | given).items()
            if summary.get(key) is not None
        ]
        series = [*curves, *baselines]
        axes = _axes(covered, [value for each in series for value in each.y], "top-1", percent=True)
        names = [each.name for each in series]
        svg = line_chart("kNN accuracy", series, *axes)
        charts.append(Chart("kNN accuracy while training", names, svg, "Dashed: what needs no training."))
    recalls = [line for line in metrics if line.get("kind") == "label_free" and line["of"] != "raw_pixels"]
    if len(recalls) > 1:
        epochs, values = zip(*((line["epoch"], line["instance_recall_1"]) for line in recalls), strict=True)
        svg = line_chart(
            "Instance recall",
            [Series("recall at 1", epochs, values, marks=True)],
            *_axes(epochs, values, "recall", percent=True),
        )
        note = f"Of {recalls[-1]['images']:,} images, how many another view finds among all; needs no labels."
        charts.append(Chart("Instance recall while training", ["recall at 1"], svg, note))
    return charts


def _map_chart(evaluation: Evaluation, results: Mapping[str, Any]) -> Chart | None:
    if "map" not in results:
        return None
    found = results["map"]
    groups = colored(evaluation, found, results.get("clusters", {}).get("clusters", {}))
    shown = len(found["shown"]["rows"])
    note = (
        f"{shown:,} of {found['images']:,} images, each a dot (t-SNE): what is near is alike, how far apart groups are "
        "says little. All places are in map.csv."
    )
    return Chart("Map", [name for name, _ in groups], scatter_chart("Map", groups), note)


def _axes(
    epochs: Sequence[float], values: Sequence[float], name: str, *, percent: bool = False
) -> tuple[Any, Any]:
    return axis_over("epoch", epochs, tight=True), axis_over(name, values, percent=percent)


def similarity_charts(statistics: Mapping[str, Any] | None) -> list[Chart]:
    """Histograms of the cosine similarity of positive and negative pairs."""
    if statistics is None:
        return []
    described = {"Cosine similarity of pairs": statistics["pairs"]}
    for name, pairs in statistics.get("attributes", {}).items():
        described[f"Cosine similarity of pairs, by {name}"] = pairs
    return [_similarity_chart(title, statistics["edges"], pairs) for title, pairs in described.items()]


def _similarity_chart(title: str, edges: Sequence[float], described: Mapping[str, Any]) -> Chart:
    pairs = {name: each for name, each in described.items() if sum(each["counts"])}
    shares = [
        (name, [count / sum(each["counts"]) for count in each["counts"]]) for name, each in pairs.items()
    ]
    note = "Means: " + ", ".join(f"{name} {each['mean']:.2f}" for name, each in pairs.items()) + "."
    return Chart(title, list(pairs), histogram_chart(title, edges, shares, "cosine similarity"), note)


def tables(results: Mapping[str, Any]) -> list[Table]:
    """A table for every protocol that has run."""
    makers = {
        "knn": _knn_table,
        "linear": _linear_table,
        "finetune": _finetune_table,
        "unseen": _unseen_table,
        "label-free": _label_free_table,
        "clusters": _clusters_table,
    }
    return [maker(results[name]) for name, maker in makers.items() if name in results]


def _knn_table(knn: Mapping[str, Any]) -> Table:
    rows = [
        (f"k = {name.removeprefix('k')}", *(_percent(each[of]) for of in ("top1", "balanced", "top5")))
        for name, each in knn["accuracies"].items()
    ]
    if whitened := knn.get("whitened"):
        cells = (_percent(whitened[of]) for of in ("top1", "balanced", "top5"))
        rows.append((f"k = {knn['k']}, whitened", *cells))
    note = (
        f"{knn['queries']:,} queries ({knn['query_kind']}), {knn['rows']:,} labeled rows, {knn['bank']} bank."
    )
    return Table("Weighted kNN", ("", "top-1", "mean over classes", "top-5"), rows, note)


def _label_free_table(found: Mapping[str, Any]) -> Table:
    starts = ("raw_pixels", "start", "trained")
    rows = []
    for name, of in found["label_free"].items():
        texts = ("–" if of[start] is None else _label_free_number(name, of[start]) for start in starts)
        rows.append((name.replace("_", " "), *texts))
    note = (
        f"{found['images']:,} training images. Recall: how many of them another view finds among the first views of "
        "all."
    )
    return Table("Without labels", ("", "pixels", "start", "trained"), rows, note)


def _label_free_number(name: str, value: float) -> str:
    return _percent(value) if name.startswith("instance_recall") else f"{value:.2f}"


def training_table(summary: Mapping[str, Any]) -> list[Table]:
    """What training measured at its end, beside the baselines; none without labels or of an earlier release."""
    if summary.get("knn_top1_whitened") is None:
        return []
    names = {"_raw_pixels": "raw pixels", "_untrained": "untrained network", "": "trained"}
    rows = [
        (name, *(_percent(summary.get(f"knn_top1{end}{read}")) for read in ("", "_whitened", "_features")))
        for end, name in names.items()
        if summary.get(f"knn_top1{end}_whitened") is not None
    ]
    note = f"k = {summary['knn_k']}; the training images alone choose to read out: {summary['readout']}."
    return [Table("kNN top-1 at the end of training", ("", "plain", "whitened", "features"), rows, note)]


def _linear_table(linear: Mapping[str, Any]) -> Table:
    rows = [
        (
            stage,
            f"{each['dims']:,}",
            *(_percent(each[kind][top]) for kind in ("probe", "svm") for top in ("top1", "top5")),
        )
        for stage, each in linear["stages"].items()
    ]
    columns = ("features of", "entries", "probe top-1", "top-5", "SVM top-1", "top-5")
    note = f"Trained on {linear['train_images']:,} images, tested on {linear['test_images']:,}."
    return Table("Linear classifiers", columns, rows, note)


def _finetune_table(finetune: Mapping[str, Any]) -> Table:
    rows = [
        (
            f"{100 * each['fraction']:g}%",
            f"{each['images']:,}",
            *(_percent(each[start][top]) for start in ("trained", "scratch") for top in ("top1", "top5")),
        )
        for each in finetune["fractions"]
    ]
    columns = ("labels", "images", "trained top-1", "top-5", "from scratch top-1", "top-5")
    note = f"{finetune['epochs']} epochs or more, tested on {finetune['test_images']:,} images."
    return Table("Fine-tuning with few labels", columns, rows, note)


def _unseen_table(unseen: Mapping[str, Any]) -> Table:
    columns = (*(f"Recall@{k}" for k in unseen["recall"]), "NMI")
    row = tuple(_percent(value) for value in (*unseen["recall"].values(), unseen["nmi"]))
    seen = len(unseen["classes_seen_in_training"])
    note = (
        f"{unseen['images']:,} images of {len(unseen['classes'])} classes, {seen} of them seen in training."
    )
    return Table("Retrieval among held-out classes", columns, [row], note)


def _clusters_table(found: Mapping[str, Any]) -> Table:
    rows = [
        (
            f"{len(each['sizes'])}",
            f"{each['sizes'][0]:,}",
            f"{each['sizes'][-1]:,}",
            f"{each['mean_similarity']:.2f}",
            "–" if each["nmi"] is None else _percent(each["nmi"]),
        )
        for each in found["clusters"].values()
    ]
    columns = ("clusters", "largest", "smallest", "mean similarity", "NMI with the classes")
    return Table("Clusters", columns, rows, "Spherical k-means; the similarity is that to the center.")


def _percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f}%"


def _read_results(evaluation: Evaluation) -> dict[str, Any]:
    found = {name: evaluation.read(name) for name in _RESULTS}
    return {name: values for name, values in found.items() if values}
