"""Fine-tuning the whole network with few labels, from the run's weights and from scratch (after Wu et al. 2018)."""

from __future__ import annotations

import copy
import dataclasses
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional as F

from instdisc.common.classes import class_balanced_rows
from instdisc.common.seeding import derive_seed
from instdisc.evaluation.images import ImageRows, compute_device, embed
from instdisc.evaluation.linear import top_k_accuracy
from instdisc.model.backbone import Embedder, build_embedder, head_of
from instdisc.settings.evaluation import FinetuneConfig
from instdisc.settings.model import BackboneConfig
from instdisc.training.optim import build_optimizer, freeze_backbone, learning_rate, set_rate
from pipelines.augment import Augmentation
from pipelines.loader import open_loader
from pipelines.manifest import Manifest
from pipelines.order import Order
from pipelines.settings import LoaderConfig

if TYPE_CHECKING:
    from instdisc.evaluation.context import Evaluation

logger = logging.getLogger(__name__)


def run(evaluation: Evaluation, config: FinetuneConfig) -> dict[str, Any]:
    """Fine-tune with every fraction from both starts and classify the test images.

    Raises:
        ConfigError: The images have no labels, or the queries are not images of a test set.
    """
    reference, queries = evaluation.reference, evaluation.queries
    test = queries.test_images("fine-tuning")
    job = _FinetuneJob(
        network=evaluation.source.network,
        backbone=evaluation.source.backbone,
        augmentation=evaluation.source.augmentation,
        loader=evaluation.config.loader,
        train=reference.images,
        train_labels=reference.labels,
        test=test,
        num_classes=len(reference.class_names),
        config=config,
    )
    test_labels = torch.from_numpy(queries.labels)
    cases = [(fraction, start) for fraction in config.fractions for start in ("trained", "scratch")]
    found: list[dict[str, Any]] = []
    for (fraction, start), (images, scores) in zip(
        cases, evaluation.share_out(_finetune, job, cases), strict=True
    ):
        if start == "trained":
            found.append({"fraction": fraction, "images": images})
        found[-1][start] = {
            f"top{k}": top_k_accuracy(torch.from_numpy(scores), test_labels, k) for k in (1, 5)
        }
        logger.info(
            "fine-tuning, %g%% of the labels (%d images), %s: top-1 %.1f%%",
            100 * fraction,
            images,
            start,
            100 * found[-1][start]["top1"],
        )
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


@dataclass(frozen=True, kw_only=True, eq=False)
class _FinetuneJob:
    """What all fine-tunings need.

    Attributes:
        network: The run's.
        backbone: What it was built with.
        augmentation: That of the run's training.
        loader: Its loader.
        train: The labeled images.
        train_labels: int64 (N,), their classes, -1 for none.
        test: The images to classify.
        num_classes: C.
        config: Settings.
    """

    network: Embedder
    backbone: BackboneConfig
    augmentation: Augmentation
    loader: LoaderConfig
    train: Manifest
    train_labels: npt.NDArray[np.int64]
    test: Manifest
    num_classes: int
    config: FinetuneConfig


def _finetune(job: _FinetuneJob, case: tuple[float, str]) -> tuple[int, npt.NDArray[np.float32]]:
    """Fine-tune with one share of the labels from one start.

    Returns:
        Number of labeled images, and scores float32 (Q, C) of the test images.
    """
    fraction, start = case
    rows = class_balanced_rows(job.train_labels, fraction, seed=job.config.seed)
    side = job.augmentation.image_size
    network = new_classifier(
        job.network, job.backbone, side, job.num_classes, trained=start == "trained", seed=job.config.seed
    )
    network.to(compute_device())
    _train(job, network, job.train.select(rows), job.train_labels[rows])
    test = ImageRows(
        manifest=job.test, network=network, function=embed, augmentation=job.augmentation, loader=job.loader
    )
    return len(rows), test.read(0, test.num_rows)


def new_classifier(
    trained_network: Embedder,
    backbone: BackboneConfig,
    image_size: int,
    num_classes: int,
    *,
    trained: bool,
    seed: int,
) -> nn.Module:
    """A trained network with a new head for classes, or the same network with random weights throughout.

    Args:
        trained_network: The network; not changed.
        backbone: What it was built with.
        image_size: Side of the images in pixels.
        num_classes: Outputs of the new head.
        trained: Whether all but the head starts from its weights.
        seed: Of the random weights.
    """
    torch.manual_seed(derive_seed(seed, "fine-tuning"))
    if not trained:
        return build_embedder(dataclasses.replace(backbone, embedding_dim=num_classes), image_size).backbone
    network = copy.deepcopy(trained_network.backbone)
    name, head = head_of(network)
    assert isinstance(head, nn.Linear)
    network.set_submodule(name, nn.Linear(head.in_features, num_classes))
    return network


def _train(job: _FinetuneJob, network: nn.Module, manifest: Manifest, labels: npt.NDArray[np.int64]) -> None:
    """Train the network in place with cross-entropy on random views, as the run's own training varies them."""
    config, device = job.config, compute_device()
    optimizer = build_optimizer(config.optimizer, network)
    targets = torch.from_numpy(labels).to(device)
    order = Order(
        num_instances=len(manifest), global_batch=min(config.batch_size, len(manifest)), seed=config.seed
    )
    epochs = max(config.epochs, -(-config.min_steps // order.steps_per_epoch))
    network.train()
    with open_loader(
        manifest,
        order.requests(num_epochs=epochs),
        augmentation=job.augmentation,
        training=True,
        seed=config.seed,
        device=device,
        config=job.loader,
    ) as loader:
        for step, batch in enumerate(loader):
            decoded = batch.instance_ids >= 0
            if decoded.sum() < 2:  # batch norm needs two
                continue
            epoch = step / order.steps_per_epoch
            set_rate(optimizer, learning_rate(config.optimizer, epoch, epochs))
            scores = network(batch.images[0][decoded])
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(scores, targets[batch.instance_ids[decoded]]))
            if epoch < config.optimizer.frozen_epochs:
                freeze_backbone(optimizer)
            optimizer.step()
    network.eval()
