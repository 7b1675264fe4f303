"""Attention with its log-sum-exp against float64: every way to compute it, any number of rows, any temperature."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from instdisc.model.bank import random_unit_rows
from instdisc.objectives import attention

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def in_parts(queries: Tensor, rows: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    kernel = attention.fused_cpu_kernel()
    assert kernel is not None
    return attention.attend_in_parts(kernel, queries, rows, temperature)


WAYS = {"chosen": attention.attend, "parts": in_parts, "blocks": attention.attend_in_blocks}


def assert_exact(
    way: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]],
    queries: Tensor,
    rows: Tensor,
    temperature: float,
) -> None:
    attended, log_sums = way(queries, rows, temperature)
    assert attended.dtype == log_sums.dtype == torch.float32
    scores = queries.double() @ rows.double().T / temperature
    # A score's own rounding counts 1/τ times, in the logarithm and in the weights.
    tolerance = torch.finfo(rows.dtype).eps / min(temperature, 0.3)
    expected = torch.softmax(scores, dim=1) @ rows.double()
    torch.testing.assert_close(
        log_sums.double(), torch.logsumexp(scores, dim=1), rtol=1e-6, atol=2 * tolerance
    )
    torch.testing.assert_close(attended.double(), expected, rtol=0, atol=2 * tolerance)


@pytest.mark.parametrize("temperature", [0.005, 0.07, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("num_queries", "num_rows", "dim"), [(1, 1, 1), (5, 2, 3), (3, 53, 16), (33, 5003, 128)]
)
def test_any_shape_and_temperature(
    way: str, num_queries: int, num_rows: int, dim: int, dtype: torch.dtype, temperature: float
) -> None:
    queries = random_unit_rows(0, num_queries, dim, seed=1).to(dtype)
    rows = random_unit_rows(0, num_rows, dim, seed=2).to(dtype)
    rows[-1] = queries[0]  # as near as rows come
    assert_exact(WAYS[way], queries, rows, temperature)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
def test_equal_rows_with_the_highest_and_lowest_scores(way: str, dtype: torch.dtype, sign: int) -> None:
    row = torch.nn.functional.one_hot(torch.tensor([3]), 16).to(dtype)
    attended, log_sums = WAYS[way](sign * row, row.expand(5003, -1).clone(), 0.005)
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(attended, row.float(), rtol=tolerance, atol=0)
    expected = sign / 0.005 + torch.tensor([5003.0]).log()
    torch.testing.assert_close(log_sums, expected, rtol=1e-6, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
def test_many_far_rows_count_beside_a_near_one(way: str, dtype: torch.dtype) -> None:
    """Each weighs less than float16 holds, and together they are 0.6% of the sum."""
    rows = torch.tensor([[0.5, 0.75]]).repeat(200_000, 1).to(dtype)
    rows[0] = torch.tensor([1.0, 0.0])
    attended, _ = WAYS[way](rows[:1], rows, 0.5 / 17.35)
    assert attended[0, 1].item() == pytest.approx(0.75 * 199_999 * math.exp(-17.35), rel=0.04)


@pytest.mark.parametrize("block", [1, 7, 100, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_size_of_block(monkeypatch: pytest.MonkeyPatch, block: int, dtype: torch.dtype) -> None:
    monkeypatch.setattr(attention, "_BLOCK_ROWS", {"cpu": block})
    queries, rows = (random_unit_rows(0, count, 16, seed=count).to(dtype) for count in (5, 300))
    assert_exact(attention.attend_in_blocks, queries, rows, 0.1)


@pytest.mark.parametrize(("part_rows", "partial_results"), [(1, 1), (1, 35), (42, 10_000), (300, 10_000)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_parts(
    monkeypatch: pytest.MonkeyPatch, part_rows: int, partial_results: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(attention, "_PART_ROWS", part_rows)
    monkeypatch.setattr(attention, "_PARTIAL_RESULTS", partial_results)
    queries, rows = (random_unit_rows(0, count, 16, seed=count).to(dtype) for count in (5, 300))
    assert_exact(in_parts, queries, rows, 0.1)


@pytest.mark.parametrize(
    ("operator", "between"),
    [
        ("_scaled_dot_product_flash_attention", []),
        ("_scaled_dot_product_efficient_attention", ["attn_bias", "compute_log_sumexp"]),
    ],
)
def test_the_kernels_for_gpus_are_called_as_they_are_declared(operator: str, between: list[str]) -> None:
    schema = getattr(torch.ops.aten, operator).default._schema
    names = [argument.name for argument in schema.arguments]
    assert names[: 3 + len(between)] == ["query", "key", "value", *between]
    assert "scale" in {argument.name for argument in schema.arguments if argument.kwarg_only}
    assert schema.returns[0].name in ("output", "out")
    assert schema.returns[1].name in ("logsumexp", "log_sumexp")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dim", [3, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kernel_of_the_gpu(dtype: torch.dtype, dim: int) -> None:
    queries = random_unit_rows(0, 33, dim, seed=1).to("cuda", dtype)
    rows = random_unit_rows(0, 50_003, dim, seed=2).to("cuda", dtype)
    assert (attention.choose_kernel(queries, rows) is None) == (dim == 3)
    for temperature in (0.005, 0.07, 1.0):
        assert_exact(attention.attend, queries, rows, temperature)
        assert_exact(attention.attend_in_blocks, queries, rows, temperature)
