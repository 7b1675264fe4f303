"""The objectives, one file each, and the table that finds them by the type of their settings."""

from __future__ import annotations

from collections.abc import Callable

from instdisc.objectives.base import Objective, Result
from instdisc.objectives.nce import NCE, NCEConfig

ObjectiveConfig = NCEConfig

OBJECTIVES: dict[type[ObjectiveConfig], Callable[[ObjectiveConfig, int, int], Objective]] = {NCEConfig: NCE}

__all__ = ["NCE", "OBJECTIVES", "NCEConfig", "Objective", "ObjectiveConfig", "Result"]
