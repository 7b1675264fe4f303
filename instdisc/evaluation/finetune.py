"""Fine-tuning the whole network with few labels, from the run's weights and from scratch (after Wu et al. 2018)."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from instdisc.backbone import BackboneConfig, build_embedder
from instdisc.errors import ConfigError
from instdisc.evaluation.linear import top_k_accuracy
from instdisc.evaluation.splits import class_balanced_rows
from instdisc.optim import OptimizerConfig, build_optimizer, learning_rate
from instdisc.seeding import derive_seed
from pipelines.loader import open_loader
from pipelines.manifest import Manifest
from pipelines.order import Order, Request

if TYPE_CHECKING:
    from instdisc.evaluation.context import Evaluation

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Fine-tuning with few labels; SGD with momentum 0.9 and a half cosine, the same for every fraction."""

    fractions: tuple[float, ...] = (0.01, 0.02, 0.04, 0.1, 0.2)
    """Shares of each class's labels, at least one image; a smaller one's images are among a larger one's."""
    epochs: int = 30
    """Passes over the labelled images."""
    batch_size: int = 64
    """Images per step, fewer where there are not as many."""
    min_steps: int = 300
    """Steps at least: the epochs are as many more as a few images need to come to this."""
    rate: float = 0.05
    """The highest learning rate."""
    weight_decay: float = 5e-4
    """0 or above."""
    seed: int = 0
    """Of the choice of labels, the new weights, the order and the views."""

    def __post_init__(self) -> None:
        if not self.fractions or not all(0 < fraction <= 1 for fraction in self.fractions):
            raise ValueError(f"fractions are {self.fractions}: expected shares above 0, at most 1")
        if min(self.epochs, self.batch_size, self.min_steps) < 1 or not self.rate > 0:
            raise ValueError(
                f"epochs is {self.epochs}, batch_size {self.batch_size}, min_steps {self.min_steps} and rate "
                f"{self.rate}: they must be at least 1, the rate above 0"
            )


def run(evaluation: Evaluation, config: FinetuneConfig) -> dict[str, Any]:
    """Fine-tune with every fraction from both starts and classify the test images.

    Raises:
        ConfigError: The images have no labels, or the queries are not images of a test set.
    """
    labels, queries = evaluation.bank_labels, evaluation.queries
    if queries.kind != "test-set" or queries.manifest is None:
        raise ConfigError(
            f"fine-tuning is tested on labelled images that were not trained on, the queries are of kind "
            f"{queries.kind}: name test images with --queries.path"
        )
    num_classes = len(evaluation.class_names)
    test_labels = torch.from_numpy(queries.labels)
    found = []
    for fraction in config.fractions:
        rows = class_balanced_rows(labels, fraction, seed=config.seed)
        chosen = evaluation.train.select(rows)
        values: dict[str, Any] = {"fraction": fraction, "images": len(rows)}
        for start in ("trained", "scratch"):
            network = classifier(evaluation, num_classes, trained=start == "trained", seed=config.seed)
            train_classifier(evaluation, network, chosen, labels[rows], config)
            scores = classify(evaluation, network, queries.manifest, queries.rows)
            values[start] = {f"top{k}": top_k_accuracy(scores, test_labels, k) for k in (1, 5)}
            logger.info(
                "fine-tuning, %g%% of the labels (%d images), %s: top-1 %.1f%%",
                100 * fraction,
                len(rows),
                start,
                100 * values[start]["top1"],
            )
        found.append(values)
    return {
        "summary": {
            f"{100 * each['fraction']:g}% of the labels, {name}, top-1": each[start]["top1"]
            for each in found
            for start, name in (("trained", "from the run"), ("scratch", "from scratch"))
        },
        "epochs": config.epochs,
        "test_images": len(queries),
        "fractions": found,
    }


def classifier(evaluation: Evaluation, num_classes: int, *, trained: bool, seed: int) -> nn.Module:
    """The run's network with a new head for classes, or the same network with random weights throughout.

    Args:
        evaluation: Gives network and settings.
        num_classes: Outputs of the new head.
        trained: Whether all but the head starts from the run's weights.
        seed: Of the random weights.
    """
    torch.manual_seed(derive_seed(seed, "fine-tuning"))
    if trained:
        backbone = copy.deepcopy(evaluation.network.backbone)
        name, head = list(backbone.named_modules())[-1]
        assert isinstance(head, nn.Linear)
        backbone.set_submodule(name, nn.Linear(head.in_features, num_classes))
    else:
        settings = evaluation.settings["backbone"] | {"embedding_dim": num_classes}
        backbone = build_embedder(BackboneConfig(**settings), evaluation.augmentation.image_size).backbone
    return backbone.to(_device())


def train_classifier(
    evaluation: Evaluation,
    network: nn.Module,
    manifest: Manifest,
    labels: npt.NDArray[np.int64],
    config: FinetuneConfig,
) -> None:
    """Train with cross-entropy on random views, as the run's own training varies them.

    Args:
        evaluation: Gives augmentation and loader.
        network: Trained in place.
        manifest: The labelled images.
        labels: int64 (N,), 0 or above.
        config: Settings.
    """
    optimizer_config = OptimizerConfig(
        learning_rate=config.rate, schedule="cosine", weight_decay=config.weight_decay
    )
    optimizer = build_optimizer(optimizer_config, network.parameters())
    device, targets = _device(), torch.from_numpy(labels).to(_device())
    order = Order(
        num_instances=len(manifest), global_batch=min(config.batch_size, len(manifest)), seed=config.seed
    )
    epochs = max(config.epochs, -(-config.min_steps // order.steps_per_epoch))
    network.train()
    with open_loader(
        manifest,
        order.requests(num_epochs=epochs),
        augmentation=evaluation.augmentation,
        training=True,
        views=1,
        seed=config.seed,
        device=device,
        config=evaluation.config.loader,
    ) as loader:
        for step, batch in enumerate(loader):
            decoded = batch.instance_ids >= 0
            if decoded.sum() < 2:  # batch norm needs two
                continue
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(optimizer_config, step / order.steps_per_epoch, epochs)
            scores = network(batch.images[0][decoded])
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(scores, targets[batch.instance_ids[decoded]]))
            optimizer.step()
    network.eval()


@torch.no_grad()
def classify(
    evaluation: Evaluation, network: nn.Module, manifest: Manifest, rows: npt.NDArray[np.int64]
) -> Tensor:
    """Scores float32 (R, C) of images, on the CPU."""
    batch = 256
    with open_loader(
        manifest,
        (Request(0, rows[first : first + batch]) for first in range(0, len(rows), batch)),
        augmentation=evaluation.augmentation,
        training=False,
        views=1,
        seed=0,
        device=_device(),
        config=evaluation.config.loader,
    ) as loader:
        return torch.cat([network(batch.images[0]).float().cpu() for batch in loader])


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
