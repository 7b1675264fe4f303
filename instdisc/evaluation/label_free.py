"""Numbers without labels of any run, as training measures them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from instdisc.common.errors import ConfigError
from instdisc.evaluation.images import embed
from instdisc.evaluation.statistics import two_views
from instdisc.model.label_free import LabelFree, describe, raw_pixels, sampled, usual_views
from instdisc.settings.evaluation import LabelFreeConfig

if TYPE_CHECKING:
    from instdisc.evaluation.context import Evaluation


def run(evaluation: Evaluation, config: LabelFreeConfig) -> dict[str, Any]:
    """Describe pixels and network by two views of up to 2,048 training images; what training noted of its start too.

    Raises:
        ConfigError: Fewer than two images can be decoded.
    """
    source = evaluation.source
    rows, views = sampled(len(source.train)), usual_views(source.augmentation)
    seed = config.seed
    if seed is None:
        seed = source.run.stored_config()[1].training.seed if source.has_run else 0
    found: dict[str, LabelFree] = {}
    for name, function in (("raw_pixels", _pixels), ("trained", embed)):
        first, second = two_views(evaluation, rows, views, seed=seed, function=function)
        if len(first) < 2:
            raise ConfigError(
                f"only {len(first)} of {len(rows)} training images can be decoded: restore them"
            )
        found[name] = describe(first, second)
    numbers = {name: each._asdict() for name, each in found.items()}
    if source.has_run:
        numbers |= {line["of"]: line for line in source.run.label_free() if line["of"] == "start"}
    names = [name for name in LabelFree._fields if name != "images"]
    return {
        "summary": {
            "images": found["trained"].images,
            # As text, since numbers below 1 are printed as shares.
            **{
                f"{name.replace('_', ' ')}, {of.replace('_', ' ')}": _text(name, each[name])
                for name in names
                for of, each in sorted(numbers.items())
            },
        },
        "images": found["trained"].images,
        "label_free": {
            name: {of: numbers.get(of, {}).get(name) for of in ("raw_pixels", "start", "trained")}
            for name in names
        },
    }


def _pixels(network: nn.Module, images: Tensor) -> Tensor:
    return raw_pixels(images)


def _text(name: str, value: float) -> str:
    return f"{100 * value:.1f}%" if name.startswith("instance_recall") else f"{value:.3f}"
