"""Settings of the objectives, and what the settings alone tell of one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple

from cluster.ranges import Amount, Count, Range, Ranged


class StepCost(NamedTuple):
    """What one rank computes in a step, as the owner of its rows, for the queries of all ranks.

    Attributes:
        operations: Floating-point operations of products of many queries with the same rows.
        gathered_rows: Rows that are read one by one, each for a single query unless `operations` counts its products.
    """

    operations: float
    gathered_rows: float


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(Ranged):
    """What every objective's settings tell, to the trainer and also where torch is not imported.

    Attributes:
        name: What the objective is called on a command line.
        implementation: Its subclass of `instdisc.objectives.base.Objective`, as "module:class".
        views: V, how many views of every image it compares.
        within_batch: Whether it tells images apart from those of the same batch, which may then not be cut into parts.
        tables_beside_bank: Float32 tables of the bank's shape that it keeps.
        agreed_bytes: For each call of `merge_log_sums` in a step, its bytes per query.
    """

    name: ClassVar[str]
    implementation: ClassVar[str]
    views: ClassVar[int] = 1
    within_batch: ClassVar[bool] = False
    tables_beside_bank: ClassVar[int] = 0
    agreed_bytes: ClassVar[tuple[int, ...]] = ()

    temperature: Annotated[float, Range(at_least=0.005, usual="0.07 to 0.2")] = 0.07
    """τ, at least 0.005; 0.07 to 0.2 are usual. Smaller tells neighbors apart more sharply."""

    def warnings(self, num_instances: int) -> list[str]:
        """What a user should know before training on so many images begins, a sentence each."""
        return []

    def step_cost(self, num_queries: int, shard_rows: int, share: float, dim: int) -> StepCost:
        """What a step costs one rank; unless overridden, that of comparing every query with every row.

        Args:
            num_queries: Of all ranks and views.
            shard_rows: Rows that the rank owns.
            share: Those rows over all rows.
            dim: D.
        """
        return StepCost(_product_operations(num_queries, shard_rows, dim), 0)


@dataclass(frozen=True, kw_only=True)
class SoftmaxConfig(ObjectiveConfig):
    """The softmax over every instance."""

    name: ClassVar[str] = "softmax"
    implementation: ClassVar[str] = "instdisc.objectives.softmax:Softmax"
    agreed_bytes: ClassVar[tuple[int, ...]] = (4,)

    proximal_weight: Amount = 0.0
    """λ of the proximal term ‖f_i - v_i‖², 0 or above; v_i is the row before this step's update."""


@dataclass(frozen=True, kw_only=True)
class NCEConfig(ObjectiveConfig):
    """Noise-contrastive estimation; τ and m are those of Wu et al. 2018, who freeze Z and add a proximal term."""

    name: ClassVar[str] = "nce"
    implementation: ClassVar[str] = "instdisc.objectives.nce:NCE"

    num_negatives: Annotated[int, Range(at_least=1, usual="4096")] = 4096
    """m, noise samples for each image, drawn uniformly from the whole bank."""
    proximal_weight: Amount = 0.0
    """λ of the proximal term ‖f_i - v_i‖², 0 or above; v_i is the row before this step's update."""
    log_partition_mode: Literal["moving-average", "frozen"] = "moving-average"
    """How Z is estimated: by a moving average throughout training, or averaged over the first batches and kept, as in
    the paper (which can diverge on small data)."""
    log_partition_momentum: Annotated[float, Range(at_least=0, below=1, usual="0.99")] = 0.99
    """Weight of the past in the moving average of Z, from 0 to below 1."""
    log_partition_batches: Count = 1
    """Batches that the frozen Z is averaged over, at least 1."""

    def warnings(self, num_instances: int) -> list[str]:
        """Too many negatives for the images."""
        return _warn_of_repeated_draws(self.num_negatives, num_instances)

    def step_cost(self, num_queries: int, shard_rows: int, share: float, dim: int) -> StepCost:
        """Every query reads rows of its own."""
        return StepCost(0, num_queries * _drawn(self.num_negatives, share))


@dataclass(frozen=True, kw_only=True)
class InfoNCEConfig(SoftmaxConfig):
    """The softmax over the positive and m sampled rows."""

    name: ClassVar[str] = "infonce"
    implementation: ClassVar[str] = "instdisc.objectives.infonce:InfoNCE"

    num_negatives: Annotated[int, Range(at_least=1, usual="65536")] = 65_536
    """m, rows of the bank that the positive is told apart from."""
    shared_negatives: bool = True
    """Draw the negatives once for all images of a batch, or of its part (`--training.accumulation`), which costs a
    small part of drawing for every image separately. Rows of these images are then never drawn."""

    def warnings(self, num_instances: int) -> list[str]:
        """Too many negatives for the images."""
        return _warn_of_repeated_draws(self.num_negatives, num_instances)

    def step_cost(self, num_queries: int, shard_rows: int, share: float, dim: int) -> StepCost:
        """Rows are read once and compared with every query, or every query reads rows of its own."""
        drawn = _drawn(self.num_negatives, share)
        if self.shared_negatives:
            return StepCost(_product_operations(num_queries, drawn, dim), drawn)
        return StepCost(0, num_queries * drawn)


@dataclass(frozen=True, kw_only=True)
class ParametricSoftmaxConfig(ObjectiveConfig):
    """The softmax over trained weights, one row per instance."""

    name: ClassVar[str] = "parametric"
    implementation: ClassVar[str] = "instdisc.objectives.parametric:ParametricSoftmax"
    tables_beside_bank: ClassVar[int] = 3  # weights, their gradient and momentum
    agreed_bytes: ClassVar[tuple[int, ...]] = (4,)

    temperature: float = 0.1
    """τ, at least 0.005; 0.07 to 0.2 are usual. Smaller tells neighbors apart more sharply."""
    momentum: Annotated[float, Range(at_least=0, below=1, usual="0.9")] = 0.9
    """Of the SGD that trains the weights, from 0 to below 1; its rate is that of the network."""
    weight_decay: Amount = 0.0
    """Of that SGD, 0 or above."""

    def step_cost(self, num_queries: int, shard_rows: int, share: float, dim: int) -> StepCost:
        """Scores are computed twice and the weights trained, which takes as long as five products instead of two."""
        return StepCost(2.5 * _product_operations(num_queries, shard_rows, dim), 0)


@dataclass(frozen=True, kw_only=True)
class SpreadingConfig(ObjectiveConfig):
    """The softmax within the batch, over two views; the defaults are those of the public code of Ye et al. 2019."""

    name: ClassVar[str] = "spreading"
    implementation: ClassVar[str] = "instdisc.objectives.spreading:Spreading"
    views: ClassVar[int] = 2
    within_batch: ClassVar[bool] = True
    agreed_bytes: ClassVar[tuple[int, ...]] = (8, 8, 16)

    temperature: float = 0.1
    """τ, at least 0.005; 0.07 to 0.2 are usual. Smaller tells neighbors apart more sharply."""
    form: Literal["symmetric", "paper"] = "symmetric"
    """Both views as queries and keys alike, as in the authors' code, or second views against first ones, as in the
    equations of the paper. Loss and gradient are means over the embeddings of both views, also of the paper's."""
    key_gradient: bool = False
    """Let the gradient through both operands of a similarity. Off, as in the authors' code: keys are constants. The
    paper's form needs it: first views are keys alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form == "paper" and not self.key_gradient:
            raise ValueError(
                "form is paper and key_gradient off, but first views would learn nothing: add --objective.key-gradient"
            )

    def step_cost(self, num_queries: int, shard_rows: int, share: float, dim: int) -> StepCost:
        """Every query is compared with the rank's share of them."""
        return StepCost(_product_operations(num_queries, num_queries * share, dim), 0)


OBJECTIVES: dict[str, type[ObjectiveConfig]] = {
    config.name: config
    for config in (NCEConfig, SoftmaxConfig, InfoNCEConfig, ParametricSoftmaxConfig, SpreadingConfig)
}
"""All of them by name."""


def _drawn(num_negatives: int, share: float) -> float:
    """Negatives that an owner draws: its share, and one at least."""
    return max(1.0, num_negatives * share)


def _product_operations(num_queries: int, rows: float, dim: int) -> float:
    """Those of scores and gradient: two products, a multiplication and an addition for each entry."""
    return 4 * num_queries * rows * dim


def _warn_of_repeated_draws(num_negatives: int, num_instances: int) -> list[str]:
    if num_negatives <= num_instances:
        return []
    return [
        f"drawing {num_negatives} negatives from only {num_instances} images: each image is used "
        f"{num_negatives / num_instances:.3g} times per step on average; lower --objective.num-negatives, or take a "
        "-softmax recipe, which compares with every image once"
    ]
