"""What to compare."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from cluster.ranges import Ranged


@dataclass(frozen=True, kw_only=True)
class CompareConfig(Ranged):
    """Which runs to compare, and where to keep them."""

    vary: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A setting of training and its values, as NAME=VALUE,VALUE, for example training.seed=0,1,2; may be given several
    times: all combinations are trained. Numbers of one value stand apart: 'augmentation.crop-scale=0.2 1,0.5 1'."""
    recipes: str = ""
    """Further recipes, separated by commas, with the same options."""
    run_dir: Path = Path("runs/compare")
    """Where the results are written; the runs are kept in points/NAME of it, and are not repeated."""
    report: tuple[Path, ...] = ()
    """Compare these run directories, or all in the points of earlier comparisons, and train nothing."""
