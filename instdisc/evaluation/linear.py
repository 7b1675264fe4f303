"""Linear classifiers on frozen features: softmax regression (the linear probe) and a linear SVM.

The features of each stage are compared as in Zhang et al. 2016 and Wu et al. 2018: a classifier is trained on labeled
images, its regularization chosen on a part of them held out, its accuracy measured on test images.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from instdisc.common.classes import class_balanced_rows
from instdisc.common.errors import ConfigError
from instdisc.evaluation.images import ImageRows, compute_device, embed
from instdisc.model.features import stage_features, stage_names
from instdisc.settings.evaluation import LinearConfig

if TYPE_CHECKING:
    from instdisc.evaluation.context import Evaluation

logger = logging.getLogger(__name__)

Loss = Callable[[Tensor, Tensor], Tensor]


def run(evaluation: Evaluation, config: LinearConfig) -> dict[str, Any]:
    """Both classifiers on every stage: trained on the training images, tested on the queries.

    Raises:
        ConfigError: The images have no labels, or the queries are not images of a test set.
    """
    reference, queries = evaluation.reference, evaluation.queries
    test = queries.test_images("a linear classifier")
    labels = reference.labels
    fraction = min(1.0, config.max_images / int((labels >= 0).sum()))
    rows = class_balanced_rows(labels, fraction, seed=config.seed)
    job = _LinearJob(
        train=evaluation.image_rows(reference.images.select(rows), embed),
        train_labels=labels[rows],
        test=evaluation.image_rows(test, embed),
        test_labels=queries.labels,
        num_classes=len(reference.class_names),
        config=config,
    )
    names = stage_names(evaluation.source.network.backbone)
    stages: dict[str, Any] = {}
    for stage, result in zip(names, evaluation.share_out(_classify_stage, job, names), strict=True):
        stages[stage] = result
        figures = ", ".join(f"{name} {100 * result[name]['top1']:.1f}%" for name in CLASSIFIERS)
        logger.info("linear classifiers on %s: %s", stage, figures)
    return {
        "summary": {
            f"{name} of {stage}, top-1": values[name]["top1"]
            for stage, values in stages.items()
            for name in CLASSIFIERS
        },
        "train_images": len(rows),
        "test_images": len(queries),
        "stages": stages,
    }


@dataclass(frozen=True, kw_only=True, eq=False)
class _LinearJob:
    """What all stages need."""

    train: ImageRows
    train_labels: npt.NDArray[np.int64]
    test: ImageRows
    test_labels: npt.NDArray[np.int64]
    num_classes: int
    config: LinearConfig


def _classify_stage(job: _LinearJob, stage: str) -> dict[str, Any]:
    """Both classifiers on one stage's features."""
    function = functools.partial(stage_features, stage=stage, max_dims=job.config.max_dims)
    train, test = (
        _split(dataclasses.replace(images, function=function).read(0, images.num_rows), labels)
        for images, labels in ((job.train, job.train_labels), (job.test, job.test_labels))
    )
    found: dict[str, Any] = {"dims": train.features.shape[1]}
    for name, loss in CLASSIFIERS.items():
        result = linear_accuracy(train, test, job.num_classes, loss=loss, config=job.config)
        found[name] = result._asdict()
    return found


def _split(features: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> Split:
    """On the GPU if there is one; images that could not be decoded lose their label."""
    device = compute_device()
    decoded = np.isfinite(features[:, 0])
    return Split(
        torch.from_numpy(features).to(device), torch.from_numpy(np.where(decoded, labels, -1)).to(device)
    )


class Split(NamedTuple):
    """Features of one stage and what they belong to."""

    features: Tensor
    """float32 (N, D)."""
    labels: Tensor
    """int64 (N,); negative for none, in a test set also above all classes of the training images."""


class LinearResult(NamedTuple):
    """What a classifier reached."""

    top1: float
    top5: float
    regularization: float
    held_out_top1: float


def cross_entropy(scores_BC: Tensor, labels_B: Tensor) -> Tensor:
    """Mean softmax loss."""
    return F.cross_entropy(scores_BC, labels_B)


def squared_hinge(scores_BC: Tensor, labels_B: Tensor) -> Tensor:
    """Mean over the rows of the squared hinge losses of one-against-rest SVMs, summed over the classes."""
    signs_BC = 2 * F.one_hot(labels_B, scores_BC.shape[1]).to(scores_BC) - 1
    return F.relu(1 - signs_BC * scores_BC).square().sum(dim=1).mean()


CLASSIFIERS: dict[str, Loss] = {"probe": cross_entropy, "svm": squared_hinge}


def fit_linear(
    features_ND: Tensor,
    labels_N: Tensor,
    num_classes: int,
    *,
    loss: Loss,
    regularization: float,
    iterations: int,
    start: Tensor | None = None,
) -> Tensor:
    """Minimise `loss(X·Wᵀ + b) + λ/2·‖W‖²` by L-BFGS; the whole table is used in every iteration.

    It is scikit-learn's `LogisticRegression` or `LinearSVC` with `C = 1/(λ·N)`, but on the features' device, in
    float32, and from a given start: minutes instead of hours on the wide features of early stages.

    Args:
        features_ND: float32 (N, D).
        labels_N: int64 (N,), 0 to num_classes - 1.
        num_classes: C.
        loss: Mean loss of scores (N, C) and labels.
        regularization: λ, above 0.
        iterations: The most to do.
        start: float32 (C, D + 1), what an earlier call returned, or None for zeros.

    Returns:
        W and, in the last column, b, float32 (C, D + 1).
    """
    from scipy.optimize import minimize  # not at the top: it takes half a second

    shape = (num_classes, features_ND.shape[1] + 1)

    def objective(flat: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        weights = torch.from_numpy(flat).to(features_ND).view(shape).requires_grad_()
        penalty = regularization / 2 * weights[:, :-1].square().sum()
        value = loss(linear_scores(features_ND, weights), labels_N) + penalty
        (gradient,) = torch.autograd.grad(value, weights)
        return value.item(), gradient.double().cpu().numpy().ravel()

    first = np.zeros(shape) if start is None else start.double().cpu().numpy()
    found = minimize(
        objective, first.ravel(), jac=True, method="L-BFGS-B", options={"maxiter": iterations, "gtol": 1e-5}
    )
    return torch.from_numpy(found.x).to(features_ND).view(shape)


def linear_scores(features_ND: Tensor, weights: Tensor) -> Tensor:
    """Scores (N, C) of features (N, D) under what `fit_linear` returned."""
    return torch.addmm(weights[:, -1], features_ND, weights[:, :-1].T)


def top_k_accuracy(scores_NC: Tensor, labels_N: Tensor, k: int) -> float:
    """Share of the rows whose class is among the k of highest score; a class without a score never is."""
    best = scores_NC.topk(min(k, scores_NC.shape[1]), dim=1).indices
    return float((best == labels_N[:, None]).any(dim=1).double().mean())


def linear_accuracy(
    train: Split, test: Split, num_classes: int, *, loss: Loss, config: LinearConfig
) -> LinearResult:
    """Train on labeled features with the λ that is best on held-out ones, and classify the test features.

    Features are standardised with the mean and deviation of the training features.

    Raises:
        ConfigError: Fewer than two classes, or no test label, or too few images to hold any out.
    """
    train, test = (
        Split(part.features[part.labels >= 0], part.labels[part.labels >= 0]) for part in (train, test)
    )
    labels = train.labels.cpu().numpy()
    held_out = np.zeros(len(labels), dtype=bool)
    held_out[class_balanced_rows(labels, config.held_out, seed=config.seed, at_least=0)] = True
    if not held_out.any() or len(np.unique(labels[~held_out])) < 2 or not len(test.labels):
        raise ConfigError(
            f"a linear classifier needs labeled images of two classes, some to hold out, and labeled test images; "
            f"got {len(labels)} of {len(np.unique(labels))} classes, and {len(test.labels)} to test: label more"
        )
    mean, deviation = train.features.mean(dim=0), train.features.std(dim=0)
    deviation[deviation == 0] = 1  # a feature that never changes says nothing, whatever it is divided by
    features, test_features = ((part.features - mean) / deviation for part in (train, test))
    best, held_out_top1, start = _select(features, train.labels, held_out, num_classes, loss, config)
    weights = fit_linear(
        features,
        train.labels,
        num_classes,
        loss=loss,
        regularization=best,
        iterations=config.iterations,
        start=start,
    )
    scores = linear_scores(test_features, weights)
    return LinearResult(
        top1=top_k_accuracy(scores, test.labels, 1),
        top5=top_k_accuracy(scores, test.labels, 5),
        regularization=best,
        held_out_top1=held_out_top1,
    )


def _select(
    features_ND: Tensor,
    labels_N: Tensor,
    held_out: npt.NDArray[np.bool_],
    num_classes: int,
    loss: Loss,
    config: LinearConfig,
) -> tuple[float, float, Tensor]:
    """The best λ, its accuracy on the held-out rows and its weights.

    From the strongest on, each fit starts from the result of the one before, until the accuracy falls: the weakest take
    longest and would win only where there is nothing to overfit.
    """
    train, left = (
        torch.from_numpy(np.flatnonzero(rows)).to(labels_N.device) for rows in (~held_out, held_out)
    )
    features, labels = features_ND[train], labels_N[train]
    best, best_accuracy, best_weights = 0.0, -1.0, None
    for regularization in sorted(config.regularizations, reverse=True):
        weights = fit_linear(
            features,
            labels,
            num_classes,
            loss=loss,
            regularization=regularization,
            iterations=config.iterations,
            start=best_weights,
        )
        accuracy = top_k_accuracy(linear_scores(features_ND[left], weights), labels_N[left], 1)
        if accuracy < best_accuracy:
            break
        if accuracy > best_accuracy:
            best, best_accuracy, best_weights = regularization, accuracy, weights
    assert best_weights is not None
    return best, best_accuracy, best_weights
