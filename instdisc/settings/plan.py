"""What to plan for: the run, the machines and their rates."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.constructors import PrimitiveConstructorSpec

from cluster.ranges import Amount, Count, Positive, Range, Ranged
from instdisc.settings.objectives import OBJECTIVES, NCEConfig, ObjectiveConfig
from instdisc.settings.run import RunConfig

_BY_NAME: PrimitiveConstructorSpec[ObjectiveConfig] = PrimitiveConstructorSpec(
    nargs=1,
    metavar="{" + ",".join(OBJECTIVES) + "}",
    instance_from_str=lambda names: OBJECTIVES[names[0]](),
    is_instance=lambda value: isinstance(value, ObjectiveConfig),
    str_from_instance=lambda objective: [objective.name],
    choices=tuple(OBJECTIVES),
)


@dataclass(frozen=True, kw_only=True)
class PlanConfig(Ranged):
    """What to plan for."""

    instances: Annotated[tuple[int, ...], Range(at_least=1)] = (
        1_281_167,
        10_000_000,
        100_000_000,
        1_000_000_000,
    )
    """n, images of the data set; one or several."""
    world_size: Annotated[tuple[int, ...], Range(at_least=1)] = (8, 32, 128, 512)
    """W, workers; one or several."""
    embedding_dim: Count = 128
    """D, entries of an embedding."""
    batch_size: Count = 4096
    """Images per step over all workers."""
    objective: Annotated[ObjectiveConfig, _BY_NAME] = dataclasses.field(default_factory=NCEConfig)
    """nce and infonce compare with a sample of the rows, softmax with all of them, parametric with as many weights,
    spreading with the batch."""
    num_negatives: int | None = None
    """m of an objective that draws negatives; its own default if not given."""
    dtype: Literal["float32", "float16", "bfloat16"] = "bfloat16"
    """Type of the bank's rows."""
    network: str | None = None
    """A network, as --backbone.name of training. With one, the time of a whole step, snapshots and losses are estimated
    too. A recipe has one."""
    stem: Literal["auto", "small", "standard"] = "auto"
    """Its first layers, as --backbone.stem of training."""
    image_size: Count = 224
    """Side of the images that the network sees in training, in pixels."""
    memory_gigabytes: Positive = 80.0
    """Memory of a rank, in 10^9 bytes; a bank that needs more than half of it is marked."""
    gather_bytes_per_second: Positive = 0.9e12
    """Bytes of rows that a rank reads one by one; `benchmarks/objectives.py` measures it. A guess for a data-centre
    GPU; two CPU cores reached 7.6e9."""
    flops_per_second: Positive = 110e12
    """Floating-point operations of a rank's products of queries and rows. A guess for a data-centre GPU; two CPU cores
    reached 154e9."""
    network_flops_per_second: Positive = 70e12
    """Floating-point operations of a rank's network, a multiplication and an addition counted as two;
    `benchmarks/scaling.py` measures it. A guess for a data-centre GPU."""
    link_bytes_per_second: Positive = 25e9
    """What a rank can send to others; 200 Gbit/s by default."""
    collective_seconds: Amount = 30e-6
    """The least that each collective of a step takes."""
    host_copy_bytes_per_second: Positive = 10e9
    """At which a rank copies its part of a snapshot before it is written, while training waits. A guess."""
    storage_bytes_per_second: Positive = 1e9
    """At which all ranks together write a snapshot. A guess for shared storage."""
    rank_mtbf_hours: Positive = 50_000.0
    """Mean hours until a given rank is lost; W ranks fail W times as often. 419 interruptions in 54 days of 16,384 GPUs
    (Llama 3, arXiv 2407.21783) are 50,000 hours."""
    restart_seconds: Amount = 60.0
    """From a loss to the first step of the new group."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_negatives is None:
            return
        if "num_negatives" not in {field.name for field in dataclasses.fields(self.objective)}:
            raise ValueError(
                f"num_negatives is {self.num_negatives}, but {self.objective.name} draws none: omit it"
            )
        # As a field of its own it is on the command line beside the others; the objective is what counts.
        changed = dataclasses.replace(self.objective, **{"num_negatives": self.num_negatives})
        object.__setattr__(self, "objective", changed)

    @classmethod
    def of_run(cls, config: RunConfig) -> PlanConfig:
        """The plan of a run on a data set of ImageNet's size, with 1 to 64 workers."""
        return cls(
            instances=(1_281_167,),
            world_size=(1, 8, 16, 64),
            embedding_dim=config.backbone.embedding_dim,
            batch_size=config.training.batch_size,
            objective=config.objective,
            dtype=config.bank.dtype,
            network=config.backbone.name,
            stem=config.backbone.stem,
            image_size=config.augmentation.training_size or config.augmentation.image_size,
        )
