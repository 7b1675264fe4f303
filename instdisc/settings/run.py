"""The configuration of a run: one frozen dataclass per owner, put together here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from cluster.ranges import Count, Range, Ranged
from cluster.settings import LaunchConfig, MetricsConfig
from instdisc.settings.model import BackboneConfig, BankConfig
from instdisc.settings.objectives import NCEConfig, ObjectiveConfig
from instdisc.settings.optimizer import OptimizerConfig
from pipelines.augment import Augmentation
from pipelines.settings import LoaderConfig


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images."""

    path: str
    """Training images: a folder of class folders, a folder of images, tar files in WebDataset layout (a file, a folder
    of them or a pattern such as 'shards/train-*.tar'), a .txt or .csv list of paths with optional labels, or a name:
    sample, or cifar10, cifar100, stl10 of torchvision, each with a split if it is not train (stl10:unlabeled)."""
    test_path: str | None = None
    """Labelled images that kNN accuracy is measured on, in any of the forms above. Without it, labelled training images
    are classified by the others (leave one out). A recipe's test images are only used with its training images."""
    classes: str | None = None
    """Train on images of these classes only: first-half, second-half, or a file that names one class per line; for
    retrieval among classes that were not trained on. kNN accuracy is of these classes too."""
    root: Path = Path("data")
    """Where data sets with a name are kept, in torchvision's own files or as the tar files made of them once."""
    download: bool = False
    """Download a torchvision data set that is not in `root`."""
    verify: bool = False
    """Decode every image before training and leave out the broken ones. Without it a broken image is found when its
    turn comes, named, and given no weight."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Ranged):
    """The training loop."""

    epochs: Count = 200
    """Passes over the images."""
    batch_size: Count = 256
    """Images per step over all workers; must be divisible by their number. Images that fill no whole batch at the end
    of an epoch are left out of it; they are others in every epoch."""
    accumulation: Count = 1
    """Parts that a worker's share of a batch is cut into, to save memory."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """Type of the network's arithmetic; auto is bfloat16 on GPUs and on CPUs with instructions for it."""
    compile: bool = False
    """Compile the network with torch.compile."""
    sync_batch_norm: bool = False
    """Batch statistics over all workers; needs GPUs."""
    seed: int = 0
    """Seed of weights, bank, order, augmentation and negatives."""
    log_every: Count = 10
    """Steps between lines of the metrics file."""


@dataclass(frozen=True, kw_only=True)
class KnnMonitorConfig(Ranged):
    """Weighted kNN accuracy while training."""

    every: Annotated[int, Range(at_least=0)] = 10
    """Epochs between two measurements; the last epoch is always measured. 0: at the end only."""
    k: Annotated[int, Range(at_least=1, usual="200")] = 200
    """k."""
    temperature: Annotated[float, Range(above=0, usual="0.07")] = 0.07
    """τ of the vote."""
    baselines: bool = True
    """Measure raw pixels and the untrained network too: one more pass over the images."""


@dataclass(frozen=True, kw_only=True)
class SnapshotConfig(Ranged):
    """Snapshots, from which a run resumes after an interruption, and which are its result."""

    url: str | None = None
    """Where they are kept: a folder that all nodes see, or an fsspec URL such as s3://bucket/run. RUN_DIR/snapshots by
    default."""
    every_steps: Count = 1000
    """Steps between two snapshots; one more is taken at the end and when the run is asked to stop."""
    keep: Count = 2
    """How many of the newest are kept."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that a run depends on."""

    data: DataConfig
    augmentation: Augmentation = field(default_factory=Augmentation)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    bank: BankConfig = field(default_factory=BankConfig)
    objective: ObjectiveConfig = field(default_factory=NCEConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    knn: KnnMonitorConfig = field(default_factory=KnnMonitorConfig)
    snapshots: SnapshotConfig = field(default_factory=SnapshotConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    launch: Annotated[LaunchConfig, tyro.conf.arg(name="")] = field(default_factory=LaunchConfig)
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
        training, workers = self.training, self.launch.num_workers
        # Otherwise the number of workers is known only when they have been found.
        fixed = workers is not None and self.launch.min_workers is None
        pieces = max(workers or 0, 1) * training.accumulation
        if fixed and training.batch_size % pieces:
            raise ValueError(
                f"a batch of {training.batch_size} images cannot be shared by {max(workers or 0, 1)} workers in "
                f"{training.accumulation} part(s) each: make --training.batch-size a multiple of {pieces} or change "
                "--num-workers or --training.accumulation"
            )
        if self.objective.within_batch and training.accumulation > 1:
            raise ValueError(
                f"{self.objective.name} tells the images of a batch apart, which {training.accumulation} parts would "
                "make smaller: leave --training.accumulation at 1"
            )
        if self.objective.within_batch and training.batch_size < 2:
            raise ValueError(
                f"{self.objective.name} tells the images of a batch apart, of which there is 1: set "
                "--training.batch-size to 2 or more, 128 is usual"
            )

    def settings(self) -> dict[str, Any]:
        """All settings as JSON values."""
        settings: dict[str, Any] = _jsonable(dataclasses.asdict(self))
        return settings

    def identity(self) -> dict[str, Any]:
        """The settings that decide the result: not how and where the run is carried out or where its images are."""
        practical = ("data", "knn", "snapshots", "loader", "launch", "metrics", "run_dir", "overwrite")
        settings = self.settings()
        for name in ("log_every", "compile"):
            del settings["training"][name]
        return {name: value for name, value in settings.items() if name not in practical}


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _jsonable(item) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_jsonable(item) for item in value]
    return str(value) if isinstance(value, Path) else value
