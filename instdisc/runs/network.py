"""The network of a snapshot, with the settings that it was built with."""

from __future__ import annotations

from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load

from cluster.errors import SnapshotError
from cluster.tables import Tables
from instdisc.model.backbone import Embedder, build_embedder
from instdisc.settings.model import BackboneConfig
from instdisc.settings.schema import section
from pipelines.augment import Augmentation

NETWORK = "network.safetensors"
"""The file of a snapshot that holds the network."""
NETWORK_SETTINGS = ("backbone", "augmentation")
"""The settings noted with a snapshot under `settings`: with them it can be used away from its run."""


def network_settings(snapshot: Tables) -> tuple[BackboneConfig, Augmentation]:
    """The settings that a network was built and its images prepared with.

    Raises:
        SnapshotError: It holds no network of this program.
        ConfigError: A later version wrote it.
    """
    settings: dict[str, Any] = snapshot.attributes.get("settings", {})
    if NETWORK not in snapshot.files or not all(name in settings for name in NETWORK_SETTINGS):
        raise SnapshotError(
            f"{snapshot.url} holds no network with its settings: give a snapshot of instdisc.train"
        )
    return (
        section(BackboneConfig, "backbone", settings, snapshot.url),
        section(Augmentation, "augmentation", settings, snapshot.url),
    )


def load_network(snapshot: Tables) -> Embedder:
    """The trained network, in evaluation mode on the CPU: normalized images to unit embeddings.

    Raises:
        SnapshotError: There is none in the snapshot, or it is damaged.
    """
    backbone, augmentation = network_settings(snapshot)
    embedder = build_embedder(backbone, augmentation.image_size)
    try:
        embedder.backbone.load_state_dict(load(snapshot.read_file(NETWORK)))
    except (SafetensorError, RuntimeError) as error:
        raise SnapshotError(
            f"{snapshot.url}: {NETWORK} does not hold the weights of a {backbone.name} ({error}): use another snapshot"
        ) from error
    return embedder.eval()
