"""Every objective over banks of half precision: what the same numbers give in float32, whatever their range."""

from __future__ import annotations

import pytest
import torch

from cluster.group import Worker
from instdisc.common.errors import ConfigError
from instdisc.model.bank import Bank
from instdisc.objectives.nce import NCE
from instdisc.settings.objectives import (
    InfoNCEConfig,
    NCEConfig,
    ObjectiveConfig,
    ParametricSoftmaxConfig,
    SoftmaxConfig,
    SpreadingConfig,
)
from instdisc.training.memory import BankShard, check_memory
from tests.instdisc.objectives.objective_steps import KINDS, step

HALF = [torch.float16, torch.bfloat16]
TEMPERATURE = 0.2
CONFIGS = [
    NCEConfig(temperature=TEMPERATURE, num_negatives=40),
    NCEConfig(temperature=TEMPERATURE, num_negatives=400),
    SoftmaxConfig(temperature=TEMPERATURE),
    InfoNCEConfig(temperature=TEMPERATURE, num_negatives=40),
    InfoNCEConfig(temperature=TEMPERATURE, num_negatives=40, shared_negatives=False),
    ParametricSoftmaxConfig(temperature=TEMPERATURE),
    SpreadingConfig(temperature=TEMPERATURE),
]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_half_precision_differs_by_its_rounding(
    config: ObjectiveConfig, kind: str, dtype: torch.dtype
) -> None:
    exact = step(0, 1, config, kind, 1009, 16, torch.float32, dtype).result
    half = step(0, 1, config, kind, 1009, 16, dtype, dtype).result
    # Scores of at most 1 and weights of at most 1 are rounded.
    tolerance = torch.finfo(dtype).eps / TEMPERATURE
    torch.testing.assert_close(half.loss_Q, exact.loss_Q, rtol=0, atol=tolerance)
    torch.testing.assert_close(half.gradient_QD, exact.gradient_QD, rtol=0, atol=tolerance / TEMPERATURE / 4)


@pytest.mark.parametrize("dense", [True, False])
def test_the_largest_sums_of_float16_overflow_nowhere(monkeypatch: pytest.MonkeyPatch, dense: bool) -> None:
    """4,096 equal rows that all count fully at the lowest temperature: the gradient is 4,096/0.005."""
    monkeypatch.setattr("instdisc.objectives.nce._DENSE_ROWS_PER_NEGATIVE", 100 if dense else 0)
    rows = torch.nn.functional.one_hot(torch.zeros(100, dtype=torch.long), 8).half()
    objective = NCE(NCEConfig(temperature=0.005), 100, Bank(rows))
    objective.log_partition.zero_()
    negatives, weight = objective.draw(3, Bank(rows), torch.Generator().manual_seed(0))
    terms = objective.negative_terms(rows[:3], negatives, weight, rows)
    torch.testing.assert_close(terms[:, 0], torch.full((3,), 4096 / 0.005), rtol=1e-3, atol=0)


def test_a_device_without_the_dtype_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("\"addmm_impl_cpu_\" not implemented for 'Half'")

    monkeypatch.setattr(torch, "mm", refuse)
    with pytest.raises(
        ConfigError, match=r"cpu cannot compute with a bank of float16: use --bank\.dtype float32"
    ):
        check_memory(
            BankShard(num_rows=10, dim=8, dtype=torch.float16, copies=0),
            Worker(0, 1, 0, 1, 0, torch.device("cpu")),
        )
