"""Named configurations. Every field can be overridden on the command line."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from instdisc.settings.model import BackboneConfig, InitConfig
from instdisc.settings.objectives import (
    InfoNCEConfig,
    NCEConfig,
    ParametricSoftmaxConfig,
    SoftmaxConfig,
    SpreadingConfig,
)
from instdisc.settings.optimizer import OptimizerConfig
from instdisc.settings.run import DataConfig, KnnMonitorConfig, RunConfig, TrainingConfig
from pipelines.augment import Augmentation

_CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
_CIFAR_STD = (0.2470, 0.2435, 0.2616)

_SAMPLE = RunConfig(
    data=DataConfig(path="sample", test_path="sample:test"),
    augmentation=Augmentation(image_size=32, training_size=24, hue=0.1, mean=_CIFAR_MEAN, std=_CIFAR_STD),
    backbone=BackboneConfig(name="resnet8"),
    objective=SpreadingConfig(key_gradient=True),
    optimizer=OptimizerConfig(learning_rate=0.06, schedule="cosine", warmup_epochs=3, weight_decay=5e-4),
    training=TrainingConfig(epochs=46, batch_size=128),
    knn=KnnMonitorConfig(every=10),
)
_CIFAR10_NPID = RunConfig(
    data=DataConfig(path="cifar10", test_path="cifar10:test"),
    augmentation=Augmentation(image_size=32, flip_probability=0.0, mean=_CIFAR_MEAN, std=_CIFAR_STD),
    backbone=BackboneConfig(name="resnet18"),
    objective=NCEConfig(temperature=0.1),
    optimizer=OptimizerConfig(weight_decay=5e-4),
    training=TrainingConfig(batch_size=128),
)
_STL10_NPID = replace(
    _CIFAR10_NPID,
    data=DataConfig(path="stl10:train+unlabeled", test_path="stl10:test"),
    augmentation=replace(_CIFAR10_NPID.augmentation, image_size=96),
    backbone=BackboneConfig(name="resnet18", stem="small"),
)
_STL10 = (
    "STL-10, all 105,000 training images at 96 pixels with a small stem, of which the 5,000 labeled ones vote; "
    "--data.path stl10:train --data.test-path stl10:test trains on those alone. "
)
_IMAGENET_NPID = RunConfig(
    data=DataConfig(path="imagenet/train", test_path="imagenet/val"),
    knn=KnnMonitorConfig(every=20, baselines=False),
)


class Recipe(NamedTuple):
    """A configuration and what to know of it."""

    description: str
    config: RunConfig


def _unseen(images: str, folder: str, reported: str) -> Recipe:
    """A recipe of Ye et al. 2019 for retrieval among classes that were not trained on."""
    return Recipe(
        f"{images}: the classes of {folder}/train.csv, which examples/retrieval_lists.py makes; retrieval among the "
        f"others by `evaluate --protocols unseen --unseen.path {folder}/test.csv`. GoogLeNet with torchvision's "
        "weights, crops of 227 of images squashed to 256, flips, batch 64, 60 epochs and rates as in the public code "
        f"of Ye et al. 2019, whose GoogLeNet is one of Caffe without batch normalization; {reported}.",
        RunConfig(
            data=DataConfig(path=f"{folder}/train.csv"),
            augmentation=Augmentation(
                image_size=227,
                crop_scale=((227 / 256) ** 2, (227 / 256) ** 2),
                crop_ratio=(1.0, 1.0),
                squash=True,
                jitter_probability=0.0,
                grayscale_probability=0.0,
                mean=(0.5, 0.5, 0.5),  # torchvision's weights of GoogLeNet expect these
                std=(0.5, 0.5, 0.5),
            ),
            backbone=BackboneConfig(name="googlenet"),
            init=InitConfig(weights="torchvision"),
            objective=SpreadingConfig(),
            optimizer=OptimizerConfig(learning_rate=0.001, weight_decay=5e-4, milestones=(20, 40)),
            training=TrainingConfig(epochs=60, batch_size=64),
        ),
    )


RECIPES: dict[str, Recipe] = {
    "sample": Recipe(
        "5,000 bundled CIFAR-10 images, ResNet-8, two views of every image told apart within the batch, at 24 pixels "
        "in training and 32 in evaluation: a few minutes on two cores. Settings of this project; the README has the "
        "accuracy, measured.",
        _SAMPLE,
    ),
    "cifar10-npid": Recipe(
        "CIFAR-10, ResNet-18, NCE with 4,096 negatives, 200 epochs. Temperature, bank momentum and the missing "
        "flip are those of the public code of Wu et al. 2018; the paper reports 80.4% kNN top-1 (cited, not "
        "measured here).",
        _CIFAR10_NPID,
    ),
    "cifar10-softmax": Recipe(
        "CIFAR-10, ResNet-18, the softmax over all 50,000 images, 200 epochs; otherwise the settings of cifar10-npid. "
        "Wu et al. 2018 report 80.8% kNN top-1 (cited, not measured here).",
        replace(_CIFAR10_NPID, objective=SoftmaxConfig(temperature=0.1)),
    ),
    "cifar10-parametric": Recipe(
        "CIFAR-10, ResNet-18, the softmax over trained weights, one vector for every image, 200 epochs; otherwise the "
        "settings of cifar10-npid. Wu et al. 2018 report 63.0% kNN top-1 (cited, not measured here).",
        replace(_CIFAR10_NPID, objective=ParametricSoftmaxConfig(weight_decay=5e-4)),
    ),
    "cifar10-spreading": Recipe(
        "CIFAR-10, ResNet-18, two views of every image told apart within the batch of 128, 200 epochs. Augmentation "
        "(but for the deviations that colors are divided by), temperature, rate and its first drop are those of the "
        "public code of Ye et al. 2019, who report 83.6% kNN top-1 (cited, not measured here); the second drop is to a "
        "hundredth here, to a twentieth there.",
        replace(
            _CIFAR10_NPID,
            augmentation=Augmentation(image_size=32, mean=_CIFAR_MEAN, std=_CIFAR_STD),
            objective=SpreadingConfig(),
        ),
    ),
    "cifar10-infonce": Recipe(
        "CIFAR-10, ResNet-18, the softmax over the image and 4,096 others, redrawn in every step, 200 epochs; "
        "otherwise the settings of cifar10-npid. No accuracy is known.",
        replace(_CIFAR10_NPID, objective=InfoNCEConfig(temperature=0.1, num_negatives=4096)),
    ),
    "stl10-npid": Recipe(
        f"{_STL10}ResNet-18, otherwise the settings of cifar10-npid. No accuracy is known.", _STL10_NPID
    ),
    "stl10-spreading": Recipe(
        f"{_STL10}ResNet-18, otherwise the settings of cifar10-spreading. Ye et al. 2019 report 81.6% kNN top-1, and "
        "74.1% with 5,000 images (cited, not measured here); they evaluate whole images, and here the middle 0.875.",
        replace(
            _STL10_NPID,
            augmentation=replace(_STL10_NPID.augmentation, flip_probability=0.5),
            objective=SpreadingConfig(),
        ),
    ),
    "cub-spreading": _unseen(
        "CUB-200-2011", "CUB_200_2011", "for birds it takes nearest neighbors for positives too"
    ),
    "cars-spreading": _unseen("Cars-196", "cars196", "they report Recall@1 41.3% (cited, not measured here)"),
    "products-spreading": _unseen(
        "Stanford Online Products",
        "Stanford_Online_Products",
        "they report Recall@1 48.9% (cited, not measured here)",
    ),
    "imagenet-resnet50-npid": Recipe(
        "ImageNet (set --data.path and --data.test-path), ResNet-50, the settings of Wu et al. 2018: 200 epochs, "
        "batch 256, 4,096 negatives, temperature 0.07, rate 0.03 times 0.1 at epochs 120 and 160; but Z is tracked "
        "throughout, there is no proximal term, and the bank's momentum of 0.5 is that of their code. Its README "
        "reports 46.8% nearest-neighbor top-1 (cited, not measured here).",
        _IMAGENET_NPID,
    ),
    "imagenet-resnet50-infonce": Recipe(
        "ImageNet (set --data.path and --data.test-path), ResNet-50, the softmax over the image and 65,536 others, "
        "redrawn in every step; otherwise the settings of imagenet-resnet50-npid. The README of the public NPID "
        "code reports 58.5% for a linear classifier, with 65,536 negatives and a longer recipe (cited, not measured).",
        replace(_IMAGENET_NPID, objective=InfoNCEConfig()),
    ),
    "imagenet-resnet50-softmax": Recipe(
        "ImageNet (set --data.path and --data.test-path), ResNet-50, the softmax over all 1,281,167 images, which the "
        "2018 paper considered prohibitive; otherwise the settings of imagenet-resnet50-npid. No accuracy is known.",
        replace(_IMAGENET_NPID, objective=SoftmaxConfig()),
    ),
}
RECIPES |= {
    name.replace("cifar10", "cifar100"): Recipe(
        f"CIFAR-100 with the settings of {name}, those of the colors included. No accuracy is known.",
        replace(recipe.config, data=DataConfig(path="cifar100", test_path="cifar100:test")),
    )
    for name, recipe in RECIPES.items()
    if name.startswith("cifar10-")
}
