"""The configuration of a run: one frozen dataclass per owner, put together here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from cluster.ranges import Count, Range, Ranged
from cluster.settings import LaunchConfig, MetricsConfig
from instdisc.common.errors import ConfigError
from instdisc.settings.model import BackboneConfig, BankConfig, InitConfig
from instdisc.settings.objectives import NCEConfig, ObjectiveConfig
from instdisc.settings.optimizer import OptimizerConfig
from pipelines.augment import Augmentation
from pipelines.settings import CacheConfig, LoaderConfig

try:
    from tyro.conf import arg

    _WITHOUT_A_NAME = arg(name="")
except ImportError:  # without a command line nothing needs it
    _WITHOUT_A_NAME = None


@dataclass(frozen=True, kw_only=True)
class DataConfig(Ranged):
    """Which images."""

    path: str
    """Training images: a folder of class folders, a folder of images, a folder of train and val (or valid, validation,
    test) with the same class folders, tar files (a file, a folder of them or a pattern such as 'shards/train-*.tar' or
    'train-{0000..0127}.tar'; in object storage by URL, 's3://bucket/train-{0000..0127}.tar'), a .txt, .csv or .tsv
    list of paths with optional labels, or a name: sample, or cifar10, cifar100, stl10 of torchvision, each with a split
    if it is not train (stl10:unlabeled)."""
    test_path: str | None = None
    """Labeled images that kNN accuracy is measured on, in any of the forms above. Without it they are those beside
    train, or else labeled training images are classified by the others (leave one out). A recipe's test images are
    only used with its training images."""
    label_key: str | None = None
    """The key of the .json members of tar files that holds the label, instead of .cls members; a.b is key b of a."""
    classes: str | None = None
    """Train on images of these classes only: first-half, second-half, or a file that names one class per line; for
    retrieval among classes that were not trained on. kNN accuracy is measured on these classes only."""
    fraction: Annotated[float, Range(above=0, at_most=1, usual="1")] = 1.0
    """Train on this part of the images only: of every class where there are labels, so many rounded; drawn by
    `--training.seed`. A smaller part lies within a larger one. Test images stay whole."""
    root: Path = Path("data")
    """Where named data sets are kept: torchvision's own files, and the tar files made from them."""
    download: bool = False
    """Download a torchvision data set that is not in `root`."""
    cache: Path | None = None
    """A folder of each node's own disk in which tars of object storage are kept. They are fetched in the background and
    shared by the workers of the node; until one is whole, its images are read from the storage."""
    cache_bytes: Count = 100_000_000_000
    """The most that the files in `cache` take. Where the tars are more than that, the first ones are kept."""
    verify: bool = False
    """Decode every image before training and skip the broken ones. Without it a broken image is reported when it is
    first loaded, and has no weight in the loss."""
    rescan: bool = False
    """List the images again when a run resumes. By default they are only where the names, sizes or times of their files
    have changed, or where they are given by a list."""

    def chosen_by(self) -> dict[str, Any]:
        """The settings that decide which images there are, as JSON values."""
        practical = ("download", "cache", "cache_bytes", "rescan")
        settings: dict[str, Any] = _jsonable(dataclasses.asdict(self))
        return {name: value for name, value in settings.items() if name not in practical}

    def tar_cache(self) -> CacheConfig | None:
        """Where tars of object storage are kept, None where they are not."""
        if self.cache is None:
            return None
        return CacheConfig(folder=self.cache.expanduser().absolute(), most_bytes=self.cache_bytes)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Ranged):
    """The training loop."""

    epochs: Count = 200
    """Passes over the images. With more of them the same command continues a run, finished or not: the learning rate
    follows the new length from the epoch reached."""
    batch_size: Count = 256
    """Images per step over all workers; must be divisible by their number. The incomplete last
    batch of an epoch is dropped; which images it holds changes every epoch."""
    accumulation: Count = 1
    """Gradient accumulation steps: parts that a worker's share of a batch is cut into, to save memory."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """Type of the network's arithmetic; auto is bfloat16 on GPUs and on CPUs with instructions for it."""
    compile: bool = False
    """Compile the network with torch.compile."""
    sync_batch_norm: bool = False
    """Compute batch statistics over all workers; needs GPUs."""
    seed: int = 0
    """Seed of weights, bank, order, augmentation and negatives."""
    log_every: Count = 10
    """Steps between lines of the metrics file."""

    def local_batch(self, world_size: int) -> int:
        """Images per rank and step.

        Raises:
            ConfigError: They are not a whole number, or cannot be cut into equal parts.
        """
        pieces = world_size * self.accumulation
        if self.batch_size % pieces:
            raise ConfigError(
                f"a batch of {self.batch_size} images cannot be shared by {world_size} workers in {self.accumulation} "
                f"part(s) each: make --training.batch-size a multiple of {pieces} or change --num-workers or "
                "--training.accumulation"
            )
        return self.batch_size // world_size


@dataclass(frozen=True, kw_only=True)
class KnnMonitorConfig(Ranged):
    """Weighted kNN accuracy while training."""

    every: Annotated[int, Range(at_least=0)] = 10
    """Measure every so many epochs, and always after the last one. 0: only then."""
    k: Annotated[int | None, Range(at_least=1, usual="200")] = None
    """Neighbors that vote. By default 200 as in the papers, fewer where classes have fewer than 134 images: 1.5 times
    the rows of the smallest class."""
    temperature: Annotated[float, Range(above=0, usual="0.07")] = 0.07
    """τ of the vote."""
    max_rows: Annotated[int, Range(at_least=0)] = 200_000
    """Of more labeled training images than this, a sample of so many, always the same, is embedded and compared with;
    the bank is used whole. 0: all."""
    baselines: bool = True
    """Measure raw pixels and the untrained network too: one more pass over the images."""


BestBy = Literal["knn", "instance_recall_1", "instance_recall_10", "effective_rank"]
"""Numbers of a measurement of which more is better."""


@dataclass(frozen=True, kw_only=True)
class SnapshotConfig(Ranged):
    """Snapshots, from which a run resumes after an interruption, and which are its result."""

    url: str | None = None
    """Where they are kept: a folder that all nodes see, or an fsspec URL such as s3://bucket/run. RUN_DIR/snapshots by
    default."""
    every_steps: Count = 1000
    """Steps between two snapshots; one more is taken at the end and when the run is asked to stop."""
    keep: Count = 2
    """How many of the newest snapshots to keep."""
    keep_best: BestBy | None = None
    """Keep the best measured snapshot too, by this number of the measurements every `--knn.every` epochs: kNN accuracy,
    which needs labels, or one that needs none. The summary names it (`best_snapshot`); runs resume from the newest."""


@dataclass(frozen=True, kw_only=True)
class RunConfig(Ranged):
    """Everything that a run depends on."""

    data: DataConfig
    augmentation: Augmentation = field(default_factory=Augmentation)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    init: InitConfig = field(default_factory=InitConfig)
    bank: BankConfig = field(default_factory=BankConfig)
    objective: ObjectiveConfig = field(default_factory=NCEConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    knn: KnnMonitorConfig = field(default_factory=KnnMonitorConfig)
    snapshots: SnapshotConfig = field(default_factory=SnapshotConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    launch: Annotated[LaunchConfig, _WITHOUT_A_NAME] = field(default_factory=LaunchConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    run_dir: Path | None = None
    """Where everything about the run is kept; runs/RECIPE by default."""
    overwrite: bool = False
    """Replace an earlier run in the run directory."""

    def __post_init__(self) -> None:
        """Refuse settings that do not fit each other.

        Raises:
            ValueError: With what to change.
        """
        super().__post_init__()
        training, workers = self.training, self.launch.num_workers
        # Otherwise the number of workers is known only when they have been found.
        if workers is not None and self.launch.min_workers is None:
            training.local_batch(max(workers, 1))
        if self.objective.within_batch and training.accumulation > 1:
            raise ValueError(
                f"{self.objective.name} compares the images of a batch with each other, and "
                f"{training.accumulation} parts would make it smaller: leave --training.accumulation at 1"
            )
        if self.objective.within_batch and training.batch_size < 2:
            raise ValueError(
                f"{self.objective.name} compares the images of a batch with each other, and there is only 1: set "
                "--training.batch-size to 2 or more, 128 is usual"
            )

    def settings(self) -> dict[str, Any]:
        """All settings as JSON values."""
        settings: dict[str, Any] = _jsonable(dataclasses.asdict(self))
        return settings

    def identity(self) -> dict[str, Any]:
        """The settings that decide the result: not how and where the run is carried out or where its images are.

        The number of epochs is not among them, as a run may be made longer.
        """
        practical = ("data", "knn", "snapshots", "loader", "launch", "metrics", "run_dir", "overwrite")
        settings = self.settings()
        for name in ("epochs", "log_every", "compile"):
            del settings["training"][name]
        return {name: value for name, value in settings.items() if name not in practical}


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _jsonable(item) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_jsonable(item) for item in value]
    return str(value) if isinstance(value, Path) else value
