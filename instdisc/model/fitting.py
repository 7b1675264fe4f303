"""Weights from elsewhere under the names of a network, and what does not fit it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from instdisc.model.timm_networks import BODY

_MOST_NAMED = 5


def fit(
    found: Mapping[str, Tensor],
    network: Mapping[str, Tensor],
    *,
    head: str,
    left_out: tuple[str, ...] = (),
    partial: bool = False,
) -> tuple[dict[str, Tensor], str]:
    """Weights under the names of the network.

    Of all prefixes that stand before the network's names, such as `module.` or `state_dict.encoder_q.`, the one of the
    most names is taken off; weights without it are another network's. A head may be missing.

    Args:
        found: As they are named where they come from.
        network: The state dict of the backbone.
        head: Name of the network's head.
        left_out: Begin the names of those that are not wanted.
        partial: Accept what does not fit, unless nothing does.

    Returns:
        Those that fit, by the names of the network, contiguous copies of its dtypes; and what was done, in words.

    Raises:
        ValueError: They do not fit, or not at all; names the layers.
    """
    aliases = {name.removeprefix(BODY): name for name in network} | {name: name for name in network}
    prefix = _prefix(found, aliases)
    if prefix is None:
        raise ValueError(
            f"they are of another network, with {named(list(found)) or 'no weights'} instead of "
            f"{named(list(network))}: change --backbone.name"
        )
    own: dict[str, Tensor] = {}
    unknown = []
    for full_name, value in found.items():
        name = full_name.removeprefix(prefix)
        if full_name.startswith(prefix) and not name.startswith(left_out):
            if name in aliases:
                own[aliases[name]] = value
            else:
                unknown.append(full_name)
    shaped = {name: value for name, value in own.items() if value.shape == network[name].shape}
    faults = [
        f"{name} is {_shape(value)} there and {_shape(network[name])} here"
        for name, value in own.items()
        if name not in shaped
    ][:_MOST_NAMED]
    optional = (f"{head}.weight", f"{head}.bias")
    missing = [
        name
        for name in network
        if name not in own and name not in optional and not name.endswith("num_batches_tracked")
    ]
    faults += [f"{named(missing)} missing"] if missing else []
    faults += [f"{named(unknown)} unknown"] if unknown else []
    if faults and not (partial and shaped):
        raise ValueError(f"{'; '.join(faults)}: {_remedy(own, network, head)}")
    how = f"{len(shaped)} of {len(network)} tensors" + (f", named {prefix}…" if prefix else "")
    how += f"; random or skipped: {'; '.join(faults)}" if faults else ""
    # Copies, as a file may hold several of them in one piece of memory.
    copies = {
        name: value.to(network[name].dtype).clone(memory_format=torch.contiguous_format)
        for name, value in shaped.items()
    }
    return copies, how


def _prefix(found: Mapping[str, Tensor], names: Mapping[str, str]) -> str | None:
    """What stands before the most names; of equals the first. None if there is no name of the network."""
    counts: Counter[str] = Counter()
    for name in found:
        parts = name.split(".")
        for first in range(len(parts)):
            own = ".".join(parts[first:])
            if own in names:
                counts[name.removesuffix(own)] += 1
    return counts.most_common(1)[0][0] if counts else None


def _remedy(own: Mapping[str, Tensor], network: Mapping[str, Tensor], head: str) -> str:
    """What to change where head or stem have another shape."""
    weight = f"{head}.weight"
    stem = next((name for name, value in network.items() if value.ndim == 4), "")
    remedy = "--init.partial begins the layers that do not fit at random"
    if stem in own and own[stem].shape[2:] != network[stem].shape[2:]:
        return (
            "they are of another stem, which images of 64 pixels or less choose unless --backbone.stem does: set "
            f"that, or --augmentation.image-size; {remedy}"
        )
    if weight in own and own[weight].shape[1:] == network[weight].shape[1:] != own[weight].shape:
        return f"set --backbone.embedding-dim {len(own[weight])}; {remedy}"
    return remedy


def _shape(value: Tensor) -> str:
    return " x ".join(map(str, value.shape)) or "a number"


def named(names: list[str]) -> str:
    """The first few of the names, and how many more there are."""
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more
