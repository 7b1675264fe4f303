"""Settings of an evaluation and of its protocols."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from cluster.settings import ActorsConfig, MetricsConfig
from instdisc.settings.optimizer import OptimizerConfig
from pipelines.settings import LoaderConfig

PROTOCOL_NAMES = ("knn", "linear", "finetune", "unseen", "statistics", "page")
"""Run in this order, whatever the order they are asked for in: the page shows what the others found."""


@dataclass(frozen=True, kw_only=True)
class QueryConfig:
    """What is classified or retrieved."""

    path: str | None = None
    """Labelled images in any form that training takes, or embeddings as a .npy file or a Zarr array (Q, D). By default
    the run's test images; without those, up to 10,000 labelled rows of the bank, each among all the others."""
    labels: str | None = None
    """Classes of an array of embeddings: a .npy file or a Zarr array of integers (Q,)."""
    root: Path = Path("data")
    """Where data sets with a name are kept."""
    download: bool = False
    """Download a torchvision data set that is not in `root`."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is evaluated, on what, and where."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN_OR_SNAPSHOT")]
    """A run directory, a folder of snapshots or one snapshot, here or at a URL."""
    queries: QueryConfig = field(default_factory=QueryConfig)
    recompute: bool = False
    """Compare with recomputed embeddings of the training images instead of those stored while training."""
    max_rows: int = 200_000
    """Of more labelled training images than this, a sample of so many, always the same, is recomputed and compared
    with, as while training; the stored rows are used whole. 0: all."""
    actors: Annotated[ActorsConfig, tyro.conf.arg(name="")] = field(default_factory=ActorsConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    output: Path | None = None
    """Where the results go; RUN/evaluation/step-… by default, evaluation/NAME/step-… for a snapshot by itself."""

    def __post_init__(self) -> None:
        if self.max_rows < 0:
            raise ValueError(f"max_rows is {self.max_rows}, it must be 0 (all) or more")


@dataclass(frozen=True, kw_only=True)
class KnnConfig:
    """Weighted kNN."""

    k: int | None = None
    """Neighbors that vote; the nearest one alone is reported too. By default as while training: what the run was told,
    or else 200 as in the papers, fewer where classes have fewer than 134 rows: 1.5 times those of the smallest."""
    temperature: float = 0.07
    """τ of the votes exp(similarity/τ)."""

    def __post_init__(self) -> None:
        if (self.k is not None and self.k < 1) or not self.temperature > 0:
            raise ValueError(
                f"k is {self.k} and temperature {self.temperature}: they must be at least 1 and above 0"
            )


@dataclass(frozen=True, kw_only=True)
class LinearConfig:
    """How linear classifiers are trained."""

    regularizations: tuple[float, ...] = (10.0, 1.0, 0.1, 1e-2, 1e-3, 1e-4)
    """Weights λ of the penalty `λ/2·‖W‖²` beside the mean loss; from the largest on, until the accuracy on
    held-out images falls; the best is taken."""
    held_out: float = 0.2
    """Share of each class of the training images that λ is chosen on."""
    max_dims: int = 4096
    """The features of a stage are average-pooled to at most this many entries; the papers keep about 9,000."""
    max_images: int = 50_000
    """Training images used, the same share of every class: their features are held in memory."""
    iterations: int = 100
    """The most iterations of L-BFGS per λ."""
    seed: int = 0
    """Of the held-out choice."""

    def __post_init__(self) -> None:
        if not self.regularizations or min(self.regularizations) <= 0:
            raise ValueError(f"regularizations are {self.regularizations}: expected one or more above 0")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}, it must be in (0, 1): 0.2 is usual")
        for name in ("max_dims", "max_images", "iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Fine-tuning with few labels; SGD with momentum 0.9 and a half cosine, the same for every fraction."""

    fractions: tuple[float, ...] = (0.01, 0.02, 0.04, 0.1, 0.2)
    """Shares of each class's labels, at least one image; a smaller one's images are among a larger one's."""
    epochs: int = 30
    """Passes over the labelled images."""
    batch_size: int = 64
    """Images per step; fewer if there are fewer images."""
    min_steps: int = 300
    """Minimum number of steps: with few images the number of epochs is raised to reach it."""
    rate: float = 0.05
    """The highest learning rate."""
    weight_decay: float = 5e-4
    """0 or above."""
    seed: int = 0
    """Of the choice of labels, the new weights, the order and the views."""

    def __post_init__(self) -> None:
        if not self.fractions or not all(0 < fraction <= 1 for fraction in self.fractions):
            raise ValueError(f"fractions are {self.fractions}: expected shares above 0, at most 1")
        if min(self.epochs, self.min_steps) < 1 or self.batch_size < 2:
            raise ValueError(
                f"epochs is {self.epochs}, min_steps {self.min_steps} and batch_size {self.batch_size}: they must be "
                "at least 1, the batch at least 2"
            )
        _ = self.optimizer

    @property
    def optimizer(self) -> OptimizerConfig:
        """Settings of the optimizer; raises ValueError for those that are out of range."""
        return OptimizerConfig(learning_rate=self.rate, schedule="cosine", weight_decay=self.weight_decay)


@dataclass(frozen=True, kw_only=True)
class UnseenConfig:
    """Retrieval among unseen classes."""

    path: str | None = None
    """Labelled images in any form that training takes; the run's test images by default."""
    classes: str | None = None
    """Which classes to retrieve among: all, first-half, second-half, or a file that names one class per line; those
    seen in training are reported. By default all classes unseen in training (its `--data.classes`)."""
    ranks: tuple[int, ...] = (1, 2, 4, 8, 10, 100)
    """K of Recall@K."""
    clusterings: int = 10
    """Starts of k-means, the best of which counts."""
    seed: int = 0
    """Of k-means."""

    def __post_init__(self) -> None:
        if not self.ranks or min(self.ranks) < 1 or self.clusterings < 1:
            raise ValueError(
                f"ranks are {self.ranks} and clusterings {self.clusterings}: all must be at least 1"
            )


@dataclass(frozen=True, kw_only=True)
class StatisticsConfig:
    """What the embedding looks like."""

    max_images: int = 5_000
    """Training images, spread evenly, whose embeddings are described; the time grows with the square."""
    bins: int = 100
    """Intervals of the histograms."""
    seed: int = 0
    """Of the random views."""

    def __post_init__(self) -> None:
        if self.max_images < 2 or self.bins < 2:
            raise ValueError(f"max_images is {self.max_images} and bins {self.bins}, both must be at least 2")


@dataclass(frozen=True, kw_only=True)
class PageConfig:
    """The page, made of the results of all protocols that lie in the output directory."""

    examples: int = 8
    """Queries in the gallery of the best, and in that of the worst."""
    neighbors: int = 10
    """Nearest rows shown for each."""
    thumbnail: int = 128
    """The longest side of a picture in pixels."""
    temperature: float = 0.07
    """τ of the votes by which queries are ranked."""

    def __post_init__(self) -> None:
        if min(self.examples, self.neighbors, self.thumbnail) < 1 or not self.temperature > 0:
            raise ValueError(
                f"examples is {self.examples}, neighbors {self.neighbors}, thumbnail {self.thumbnail} and "
                f"temperature {self.temperature}: they must be at least 1, the last above 0"
            )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What to measure, of what."""

    evaluation: Annotated[EvaluationConfig, tyro.conf.arg(name="")]
    protocols: str = "knn"
    """Which protocols to run, separated by commas."""
    knn: Annotated[KnnConfig, tyro.conf.arg(name="")] = field(default_factory=KnnConfig)
    linear: LinearConfig = field(default_factory=LinearConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    unseen: UnseenConfig = field(default_factory=UnseenConfig)
    statistics: StatisticsConfig = field(default_factory=StatisticsConfig)
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
                f"--protocols is {self.protocols!r}: expected one or more of {', '.join(PROTOCOL_NAMES)}, separated by "
                "commas"
            )
        return [name for name in PROTOCOL_NAMES if name in asked]


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """What is searched for, and where."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN_OR_SNAPSHOT")]
    """A run directory, or a snapshot, here or at a URL."""
    images: Annotated[
        tyro.conf.Positional[tuple[Path, ...]],
        tyro.conf.arg(metavar="IMAGE [IMAGE ...]", help_behavior_hint="(required)"),
    ]
    """Images to search for; labels are not needed."""
    k: int = 10
    """Nearest rows for each image."""
    output: Path = Path("search.png")
    """Where the drawing goes: a line for each image, its nearest rows to the right of it."""
    num_actors: int = 0
    """Ray actors that share the bank; 0 searches it in this process."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)

    def __post_init__(self) -> None:
        if self.k < 1 or not self.images:
            raise ValueError(
                f"got k = {self.k} and {len(self.images)} images: name an image, k is at least 1"
            )
        if self.num_actors < 0:
            raise ValueError(f"num_actors is {self.num_actors}, it must be 0 or more")
