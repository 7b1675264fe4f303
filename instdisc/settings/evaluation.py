"""Settings of an evaluation and of its protocols."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from cluster.ranges import Amount, Count, Positive, Range, Ranged
from cluster.settings import ActorsConfig, MetricsConfig
from instdisc.settings.optimizer import OptimizerConfig
from pipelines.settings import LoaderConfig

StoredReadout = Literal["plain", "whitened"]
"""How embeddings are compared: as they are, or whitened by the mean and covariance of the training images."""

Readout = Literal["plain", "whitened", "features"]
"""Embeddings, plain or whitened, or the features of the last stage, whitened."""

EXPLORED = ("duplicates", "strangers", "clusters", "map")
"""The protocols that tell what is in a collection; `instdisc.explore` runs them, the map where its extra is installed,
and the page."""

PROTOCOL_NAMES = ("knn", "linear", "finetune", "unseen", "statistics", "label-free", *EXPLORED, "page")
"""Run in this order, whatever the order they are asked for in: the page shows what the others found."""


@dataclass(frozen=True, kw_only=True)
class LabeledConfig:
    """Labeled images, and how they are found."""

    path: str | None = None
    """Labeled images in any form that training takes."""
    label_key: str | None = None
    """The key of the .json members of tar files that holds the label, as --data.label-key of training."""
    root: Path = Path("data")
    """Where named data sets are kept."""
    download: bool = False
    """Download a torchvision data set that is not in `root`."""


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig(LabeledConfig):
    """What the queries are compared with, and classifiers trained on, in place of the training images."""

    path: str | None = None
    """Labeled images in any form that training takes; by default the labeled images of the run or index. The network
    embeds them, and stored rows take no part: for a run on images without labels, or with other classes."""


@dataclass(frozen=True, kw_only=True)
class QueryConfig(LabeledConfig):
    """What is classified or retrieved."""

    path: str | None = None
    """Labeled images in any form that training takes, or embeddings as a .npy file or a Zarr array (Q, D). By default
    the run's test images; without those, up to 10,000 labeled rows of the bank, each among all the others."""
    labels: str | None = None
    """Classes of an array of embeddings: a .npy file or a Zarr array of integers (Q,)."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Ranged):
    """What is evaluated, on what, and where."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN_OR_INDEX")]
    """A run directory, a folder of snapshots, one snapshot or an index, local or at a URL."""
    queries: QueryConfig = field(default_factory=QueryConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    recompute: bool = False
    """Compare with recomputed embeddings of the training images instead of those stored while training. An index holds
    what this would compute."""
    max_rows: Annotated[int, Range(at_least=0)] = 200_000
    """Of more labeled training images than this, a sample of so many, always the same, is recomputed and compared
    with, as while training; the stored rows are used whole. 0: all."""
    actors: Annotated[ActorsConfig, tyro.conf.arg(name="")] = field(default_factory=ActorsConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    output: Path | None = None
    """Where the results go; RUN/evaluation/step-… by default, evaluation/NAME/step-… for a snapshot by itself or an
    index."""


@dataclass(frozen=True, kw_only=True)
class KnnConfig(Ranged):
    """Weighted kNN."""

    k: Annotated[int | None, Range(at_least=1, usual="200")] = None
    """Neighbors that vote; the nearest one alone is reported too. By default as while training: what the run was told,
    or else 200 as in the papers, fewer where classes have fewer than 134 rows: 1.5 times those of the smallest."""
    temperature: Annotated[float, Range(above=0, usual="0.07")] = 0.07
    """τ of the votes exp(similarity/τ)."""


@dataclass(frozen=True, kw_only=True)
class LinearConfig(Ranged):
    """How linear classifiers are trained."""

    regularizations: Annotated[tuple[float, ...], Range(above=0)] = (10.0, 1.0, 0.1, 1e-2, 1e-3, 1e-4)
    """Weights λ of the penalty `λ/2·‖W‖²` beside the mean loss; from the largest on, until the accuracy on
    held-out images falls; the best is taken."""
    held_out: Annotated[float, Range(above=0, below=1, usual="0.2")] = 0.2
    """Share of each class of the training images that λ is chosen on."""
    max_dims: Count = 4096
    """The features of a stage are average-pooled to at most this many entries; the papers keep about 9,000."""
    max_images: Count = 50_000
    """Training images used, the same share of every class: their features are held in memory."""
    iterations: Count = 100
    """The most iterations of L-BFGS per λ."""
    seed: int = 0
    """Seed of the held-out choice."""


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(Ranged):
    """Fine-tuning with few labels; SGD with momentum 0.9 and a half cosine, the same for every fraction."""

    fractions: Annotated[tuple[float, ...], Range(above=0, at_most=1)] = (0.01, 0.02, 0.04, 0.1, 0.2)
    """Shares of each class's labels, at least one image; smaller subsets are contained in larger ones."""
    epochs: Count = 30
    """Passes over the labeled images."""
    batch_size: Annotated[int, Range(at_least=2)] = 64
    """Images per step; fewer if there are fewer images."""
    min_steps: Count = 300
    """Minimum number of steps: with few images the number of epochs is raised to reach it."""
    rate: Positive = 0.05
    """The highest learning rate."""
    weight_decay: Amount = 5e-4
    """Weight decay, 0 or above."""
    seed: int = 0
    """Seed of the choice of labels, the new weights, the order and the views."""

    @property
    def optimizer(self) -> OptimizerConfig:
        """Settings of the optimizer."""
        return OptimizerConfig(learning_rate=self.rate, schedule="cosine", weight_decay=self.weight_decay)


@dataclass(frozen=True, kw_only=True)
class UnseenConfig(Ranged):
    """Retrieval among unseen classes."""

    path: str | None = None
    """Labeled images in any form that training takes; the run's test images by default."""
    classes: str | None = None
    """Which classes to retrieve among: all, first-half, second-half, or a file that names one class per line; those
    seen in training are reported. By default all classes unseen in training (its `--data.classes`)."""
    ranks: Annotated[tuple[int, ...], Range(at_least=1)] = (1, 2, 4, 8, 10, 100)
    """K of Recall@K."""
    clusterings: Count = 10
    """Runs of k-means from different starts; the best one counts."""
    seed: int = 0
    """Seed of k-means."""


@dataclass(frozen=True, kw_only=True)
class StatisticsConfig(Ranged):
    """What the embedding looks like."""

    max_images: Annotated[int, Range(at_least=2)] = 5_000
    """Training images, spread evenly, whose embeddings are described; the time grows with the square."""
    bins: Annotated[int, Range(at_least=2)] = 100
    """Intervals of the histograms."""
    attributes: Path | None = None
    """A CSV file of key,attribute,value: for each attribute the similarities of images of one value and of two values
    are described too, as those of classes are. Keys are those of the images."""
    seed: int = 0
    """Seed of the random views."""


@dataclass(frozen=True, kw_only=True)
class LabelFreeConfig:
    """Numbers without labels."""

    seed: int | None = None
    """Seed of the random views. By default the run's own, with which the numbers are those of training."""


@dataclass(frozen=True, kw_only=True)
class DuplicatesConfig(Ranged):
    """Images that are the same but for format, size, crop or color."""

    threshold: Annotated[float | None, Range(above=-1, at_most=1, usual="0.9 to 0.99")] = None
    """Take two images for one by their embeddings alone, from this cosine on. By default near ones are compared as
    small gray pictures, for which the images are read."""
    correlation: Annotated[float, Range(above=0, at_most=1)] = 0.97
    """The correlation from which on two small pictures are taken for one."""
    neighbors: Count = 10
    """Nearest other images of each that are compared with it."""


@dataclass(frozen=True, kw_only=True)
class StrangersConfig(Ranged):
    """Images that the network sees unlike all others."""

    neighbors: Count = 10
    """Nearest other images that are named beside each."""
    count: Count = 1_000
    """Images listed, the strangest first."""


@dataclass(frozen=True, kw_only=True)
class ClustersConfig(Ranged):
    """Clusters by spherical k-means."""

    counts: Annotated[tuple[int, ...], Range(at_least=2)] = (10, 30, 100)
    """Numbers of clusters, each by itself; those with fewer than four images per cluster are skipped."""
    seed: int = 0
    """Seed of the first centers."""


@dataclass(frozen=True, kw_only=True)
class MapConfig(Ranged):
    """A map in two dimensions by t-SNE (extra `map`)."""

    most: Annotated[int, Range(at_least=8)] = 10_000
    """Of more images than this, so many, spread evenly, are mapped; each other one is put where its nearest are."""
    seed: int = 0
    """Seed of the map."""


@dataclass(frozen=True, kw_only=True)
class PageConfig(Ranged):
    """The page, made of the results of all protocols that lie in the output directory."""

    examples: Count = 8
    """Queries shown in the gallery of the best, and in that of the worst."""
    neighbors: Count = 10
    """Nearest rows shown for each."""
    thumbnail: Count = 128
    """The longest side of a picture in pixels."""
    temperature: Positive = 0.07
    """τ of the votes by which queries are ranked."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What to evaluate, and how."""

    evaluation: Annotated[EvaluationConfig, tyro.conf.arg(name="")]
    protocols: str = "knn"
    """Which protocols to run, separated by commas."""
    knn: Annotated[KnnConfig, tyro.conf.arg(name="")] = field(default_factory=KnnConfig)
    linear: LinearConfig = field(default_factory=LinearConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    unseen: UnseenConfig = field(default_factory=UnseenConfig)
    statistics: StatisticsConfig = field(default_factory=StatisticsConfig)
    label_free: LabelFreeConfig = field(default_factory=LabelFreeConfig)
    duplicates: DuplicatesConfig = field(default_factory=DuplicatesConfig)
    strangers: StrangersConfig = field(default_factory=StrangersConfig)
    clusters: ClustersConfig = field(default_factory=ClustersConfig)
    map: MapConfig = field(default_factory=MapConfig)
    page: PageConfig = field(default_factory=PageConfig)

    def __post_init__(self) -> None:
        self.chosen_protocols()

    def chosen_protocols(self) -> list[str]:
        """Names of the protocols to run, in the order of `PROTOCOL_NAMES`.

        Raises:
            ValueError: One is unknown, or there is none.
        """
        asked = [name.strip() for name in self.protocols.split(",") if name.strip()]
        if not asked or not set(asked) <= set(PROTOCOL_NAMES):
            raise ValueError(
                f"protocols is {self.protocols!r}, expected one or more of {', '.join(PROTOCOL_NAMES)}, separated by "
                "commas"
            )
        return [name for name in PROTOCOL_NAMES if name in asked]


@dataclass(frozen=True, kw_only=True)
class SearchConfig(Ranged):
    """What is searched for, and where."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN_OR_INDEX")]
    """A run directory, a snapshot or an index, local or at a URL."""
    images: Annotated[
        tyro.conf.Positional[tuple[Path, ...]],
        tyro.conf.arg(metavar="IMAGE [IMAGE ...]", help_behavior_hint="(required)"),
    ]
    """Images to search for; labels are not needed."""
    k: Count = 10
    """Nearest rows for each image."""
    readout: Readout = "plain"
    """`whitened` compares in a space whose directions all count alike; for that all training images are embedded again,
    unless there is an index. `features` compares what the last stage sees, computed for all images. `readout` in the
    run's summary.json names the best one."""
    output: Path = Path("search.png")
    """The drawing: a line for each image, with its nearest rows to the right."""
    num_actors: Annotated[int, Range(at_least=0)] = 0
    """Ray actors that share the bank; 0 searches it in this process."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.images:
            raise ValueError("got no images, expected one or more: name an image to search for")
        folder = self.output.expanduser().absolute().parent
        if not folder.is_dir():
            raise ValueError(
                f"output is {self.output}, but there is no folder {folder}: make it, or name another"
            )
