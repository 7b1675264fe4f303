"""The negatives of noise-contrastive estimation on GPUs, as one Triton kernel.

PyTorch's own operations copy the sampled rows and read the copy twice, for the scores and for the gradient: four times
the traffic of the rows themselves. But as Z is a constant, a row's coefficient follows from its own score: read once
into registers, the row gives its score and is added to the gradient.

A program serves one query and a part of its negatives, so that a small batch occupies the GPU too. Each lane of a block
keeps sums of its own, reduced once at the end: nothing in the loop waits for other warps.

Imported only where a GPU holds the rows; Triton comes with PyTorch's builds for GPUs.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# Numbers of a block of rows: 32 registers of each thread of four warps.
_BLOCK_NUMBERS = 4096
# Negatives of a program, at least, and programs to aim at: some for each multiprocessor.
_PART_NEGATIVES = 256
_PROGRAMS = 2048


def build_driver() -> None:
    """Build what Triton launches kernels with; raises RuntimeError and others without a GPU or a C compiler."""
    _ = triton.runtime.driver.active.utils


def negative_terms(
    queries_GD: Tensor,
    negatives_GK: Tensor,
    rows_SD: Tensor,
    *,
    weight: float,
    temperature: float,
    logit_offset: Tensor,
) -> Tensor:
    """`NCE.negative_terms` in float32 arithmetic, for rows of any dtype and dimension.

    Args:
        queries_GD: (G, D), dtype of the rows.
        negatives_GK: int64 (G, K), positions in this shard.
        rows_SD: (S, D), this shard, contiguous.
        weight: How often each draw counts.
        temperature: τ.
        logit_offset: `log(n/m) - log Z`, a scalar on the device: the host does not know it.
    """
    (num_queries, dim), num_negatives = queries_GD.shape, negatives_GK.shape[1]
    part = max(_PART_NEGATIVES, triton.cdiv(num_queries * num_negatives, _PROGRAMS))
    parts, block_dim = triton.cdiv(num_negatives, part), triton.next_power_of_2(dim)
    terms_PGC = queries_GD.new_empty(parts, num_queries, dim + 3, dtype=torch.float32)
    tensors = (queries_GD.contiguous(), negatives_GK.contiguous(), rows_SD, terms_PGC, logit_offset.float())
    block = min(128, max(4, _BLOCK_NUMBERS // block_dim))
    with torch.cuda.device(rows_SD.get_device()):
        _kernel[(num_queries, parts)](
            *tensors, *(num_negatives, part, 1 / temperature), *(dim, block_dim, block), enable_fp_fusion=True
        )
    terms_GC = terms_PGC.sum(dim=0)
    terms_GC[:, :dim] *= weight / temperature
    terms_GC[:, dim] *= weight
    terms_GC[:, dim + 2] = torch.logsumexp(terms_PGC[..., dim + 2], dim=0) + math.log(weight)
    return terms_GC


def _negatives_of_a_query(
    queries: tl.tensor,
    negatives: tl.tensor,
    rows: tl.tensor,
    terms: tl.tensor,
    logit_offset: tl.tensor,
    num_negatives: tl.tensor,
    part: tl.tensor,
    scale: tl.tensor,
    dim: tl.constexpr,
    block_dim: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Write one part's gradient (without 1/τ), loss, 0 and log-sum-exp of one query; arguments point to tensors."""
    query = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block_dim)
    inside = columns < dim
    offset = tl.load(logit_offset)
    query_D = tl.load(queries + query * dim + columns, mask=inside, other=0).to(tl.float32)
    gradient_KD = tl.zeros([block, block_dim], tl.float32)
    loss_K = tl.zeros([block], tl.float32)
    mass_K = tl.zeros([block], tl.float32)
    highest_K = tl.full([block], -1e30, tl.float32)  # not infinity, whose difference with itself is no number
    first = tl.program_id(1) * part
    stop = tl.minimum(first + part, num_negatives)
    for start in range(first, stop, block):
        draws = start + tl.arange(0, block)
        drawn = draws < stop
        positions = tl.load(negatives + query * num_negatives + draws, mask=drawn, other=0)
        here = drawn[:, None] & inside[None, :]
        row_KD = tl.load(rows + positions[:, None] * dim + columns[None, :], mask=here, other=0).to(
            tl.float32
        )
        scaled_K = tl.sum(row_KD * query_D[None, :], axis=1) * scale
        logit_K = scaled_K + offset
        small_K = tl.exp(-tl.abs(logit_K))
        sigmoid_K = tl.where(logit_K >= 0, 1.0, small_K) / (1 + small_K)
        gradient_KD += sigmoid_K[:, None] * row_KD  # rows that were not drawn are 0
        loss_K += tl.where(drawn, tl.maximum(logit_K, 0) + tl.log(1 + small_K), 0.0)
        higher_K = tl.maximum(highest_K, tl.where(drawn, scaled_K, -1e30))
        added_K = tl.where(drawn, tl.exp(scaled_K - higher_K), 0.0)
        mass_K = mass_K * tl.exp(highest_K - higher_K) + added_K
        highest_K = higher_K
    highest = tl.max(highest_K, axis=0)
    log_sum = highest + tl.log(tl.sum(mass_K * tl.exp(highest_K - highest), axis=0))
    out = terms + (tl.program_id(1) * tl.num_programs(0) + query) * (dim + 3)
    tl.store(out + columns, tl.sum(gradient_KD, axis=0), mask=inside)
    tl.store(out + dim, tl.sum(loss_K, axis=0))
    tl.store(out + dim + 1, 0.0)
    tl.store(out + dim + 2, log_sum)


_kernel = triton.jit(_negatives_of_a_query)
