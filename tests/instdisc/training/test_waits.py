"""Steps of every objective on a pretended GPU: no devices are mixed, the host waits for nothing, launches are few."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

from instdisc.settings.objectives import (
    InfoNCEConfig,
    NCEConfig,
    ObjectiveConfig,
    ParametricSoftmaxConfig,
    SoftmaxConfig,
    SpreadingConfig,
)
from tests.pretended_steps import OBJECTIVES, count_step, measure

CASES: list[tuple[ObjectiveConfig, dict[str, Any]]] = [
    *OBJECTIVES.values(),
    (NCEConfig(num_negatives=64), {"dtype": "bfloat16"}),
    (SoftmaxConfig(), {"dtype": "float16", "flash": True}),
    (SoftmaxConfig(), {"fused": False}),
    (InfoNCEConfig(num_negatives=512), {"dtype": "bfloat16", "parts": 2}),
    (ParametricSoftmaxConfig(), {"parts": 2}),
    (SpreadingConfig(form="paper", key_gradient=True), {"dtype": "float16"}),
]


# Launches outside the network with one rank and with several; bytes that rank 0 of 8 sends, of 32 images with D = 16.
# `python -m benchmarks.step_counts` prints what there is.
BUDGETS = {
    "nce": (181, 185, 4_876),
    "nce, 4 parts": (577, 590, 4_876),
    "softmax": (140, 144, 5_646),
    "infonce": (165, 170, 5_646),
    "infonce, own negatives": (181, 186, 5_646),
    "parametric": (144, 149, 5_646),
    "spreading": (168, 175, 23_118),
}
# Sums that the owners agree on in each part; each is an all-gather.
AGREEMENTS = {"softmax": 1, "infonce": 1, "infonce, own negatives": 1, "parametric": 1, "spreading": 3}


@pytest.fixture(scope="module")
def pretending() -> Iterator[ProcessPoolExecutor]:
    """A process whose PyTorch pretends to have a GPU."""
    from tests import pretend_gpu

    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=pretend_gpu.begin) as pool:
        yield pool


@pytest.mark.parametrize("world_size", [1, 2, 8])
@pytest.mark.parametrize(("objective", "options"), CASES, ids=lambda case: getattr(case, "name", str(case)))
def test_a_step_waits_for_nothing(
    pretending: ProcessPoolExecutor, objective: ObjectiveConfig, options: dict[str, Any], world_size: int
) -> None:
    counts = pretending.submit(count_step, objective, world_size, **options).result()
    assert counts.waits == {}
    assert list(counts.waits_to_read.values()) == [1]  # for the event after an earlier step


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_keeps_to_its_budget(pretending: ProcessPoolExecutor, name: str) -> None:
    objective, options = OBJECTIVES[name]
    alone, of_two, of_eight = (
        pretending.submit(count_step, objective, world_size, **options).result() for world_size in (1, 2, 8)
    )
    launches_alone, launches, sent_bytes = BUDGETS[name]
    assert alone.launches <= launches_alone
    assert (alone.collectives, alone.sent_bytes) == ({}, 0)
    parts = options.get("parts", 1)
    for counts in (of_two, of_eight):
        assert counts.launches <= launches
        assert counts.collectives == {
            "all-gather between hosts": 1,
            "all-gather": parts * (1 + AGREEMENTS.get(name, 0)),
            "all-to-all": 2 * parts,
            "all-reduce": 1,
        }
        assert counts.sent_bytes <= sent_bytes


def test_a_wait_and_a_mixture_are_seen(pretending: ProcessPoolExecutor) -> None:
    waits, error = pretending.submit(careless).result()
    assert len(waits) == 6
    assert "mixed" in error


def careless() -> tuple[list[str], str]:
    """What must not go unseen."""
    import torch

    from tests import pretend_gpu

    pretend_gpu.forget()
    with pretend_gpu.PretendGpu():
        numbers = torch.arange(4, device="cuda")
        numbers[numbers > 2]
        numbers.unique()
        numbers.cpu()
        float(numbers[0])
        torch.zeros(4).to("cuda")
        torch.zeros(4).pin_memory().to("cuda", non_blocking=True)  # does not wait
        torch.zeros(4, pin_memory=True).copy_(numbers, non_blocking=True)  # neither does this
        torch.zeros(4, pin_memory=True).copy_(numbers)
        error = ""
        try:
            numbers + torch.zeros(4)
        except RuntimeError as mixed:
            error = str(mixed)
    return [name.partition(" at ")[0] for name in pretend_gpu.waits.elements()], error


@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize(("world_size", "dtype"), [(1, "float32"), (1, "bfloat16"), (8, "float32")])
def test_a_measurement_mixes_no_devices(
    pretending: ProcessPoolExecutor, world_size: int, dtype: str, leave_one_out: bool
) -> None:
    found = pretending.submit(measure, world_size, dtype=dtype, leave_one_out=leave_one_out).result()
    assert 0 <= found <= 1
