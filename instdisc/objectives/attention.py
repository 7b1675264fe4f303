"""Attention with its log-sum-exp: the softmax over all rows of a shard without a tensor of all its scores.

The gradient of the non-parametric softmax is a difference of an attention output and a row of the bank, and its loss a
difference of a log-sum-exp and a score. Which kernel computes them is chosen here alone, on CPUs by what
`benchmarks/attention.py` measures, on GPUs by what PyTorch itself would take:

    CPU   float32, float16   PyTorch's fused attention, the rows in parts
    CPU   bfloat16           two matrix products for each block of rows; there the fused kernel is slower
    CUDA  float16, bfloat16  FlashAttention, the rows in parts; the memory-efficient kernel on devices without it
    CUDA  float32            memory-efficient attention, the rows in parts

The fused kernels spread queries, not rows, over the processors, and a batch has too few queries to occupy them. The
rows are therefore cut into parts that stand along the batch axis, each sees all queries, and the results of the parts
merge by their log-sum-exp. Where no fused kernel takes the tensors, blocks of two products serve.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_efficient_attention, can_use_flash_attention

AttentionKernel = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
"""From queries (P, 1, G, D), rows (P, 1, L, D) and the scale of the scores to outputs (P, 1, G, D) and log-sum-exps
(P, 1, G or more)."""

# Rows of a block of two products: scores that stay in the cache on a CPU, yet few waits of its threads for each other;
# on a GPU launches worth their time. So many weights of 1 add up to what float16 can hold.
_BLOCK_ROWS = {"cpu": 4096, "cuda": 32768}
# No part is smaller.
_PART_ROWS = 1024
# Parts times queries, at most: two blocks of 128 queries for each multiprocessor of a large GPU; little to merge.
_PARTIAL_RESULTS = 2 * 128 * 128
# FlashAttention takes embeddings of such a multiple only.
_DIM_MULTIPLE = 8


def attend(queries_GD: Tensor, rows_SD: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Mean of the rows under the softmax of their similarities, and the logarithm of its denominator.

    Exact but for rounding, at any temperature; not differentiable.

    Args:
        queries_GD: (G, D), dtype of the rows.
        rows_SD: (S, D), float32, float16 or bfloat16, at least one.
        temperature: τ, above 0.

    Returns:
        `Σ_j softmax_j(v_j·f/τ) v_j`, float32 (G, D), and `log Σ_j exp(v_j·f/τ)`, float32 (G,).
    """
    kernel = choose_kernel(queries_GD, rows_SD)
    if kernel is None:
        return attend_in_blocks(queries_GD, rows_SD, temperature)
    return attend_in_parts(kernel, queries_GD, rows_SD, temperature)


def choose_kernel(queries_GD: Tensor, rows_SD: Tensor) -> AttentionKernel | None:
    """The fused kernel to call on these tensors; None where blocks of two products are faster or all there is."""
    if rows_SD.device.type == "cpu":
        return None if rows_SD.dtype == torch.bfloat16 else fused_cpu_kernel()
    if rows_SD.shape[1] % _DIM_MULTIPLE:
        return None
    rows_11SD = rows_SD[None, None]
    asked = SDPAParams(queries_GD[None, None], rows_11SD, rows_11SD, None, 0.0, False, False)
    if can_use_flash_attention(asked):
        flash = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention", None)
        return flash and (lambda queries, rows, scale: flash(queries, rows, rows, scale=scale)[:2])
    if can_use_efficient_attention(asked):
        efficient = getattr(torch.ops.aten, "_scaled_dot_product_efficient_attention", None)
        return efficient and (
            lambda queries, rows, scale: efficient(queries, rows, rows, None, True, scale=scale)[:2]
        )
    return None


def fused_cpu_kernel() -> AttentionKernel | None:
    """PyTorch's fused attention on CPUs, for any dtype and dimension."""
    fused = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    return fused and (lambda queries, rows, scale: fused(queries, rows, rows, scale=scale))


def attend_in_parts(
    kernel: AttentionKernel, queries_GD: Tensor, rows_SD: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """`attend` by a fused kernel. What is left after equal parts, fewer rows than parts, is one more call."""
    num_queries, dim = queries_GD.shape
    parts = max(1, min(len(rows_SD) // _PART_ROWS, _PARTIAL_RESULTS // num_queries))
    in_parts = len(rows_SD) // parts * parts
    outputs, log_sums = [], []
    for rows_PLD in (rows_SD[:in_parts].view(parts, -1, dim), rows_SD[None, in_parts:]):
        if rows_PLD.shape[1]:
            queries_P1GD = queries_GD.expand(len(rows_PLD), 1, -1, -1)
            output_P1GD, log_sum_P1G = kernel(queries_P1GD, rows_PLD[:, None], 1 / temperature)
            outputs.append(output_P1GD[:, 0].float())
            # The memory-efficient kernel pads the log-sum-exps of each part.
            log_sums.append(log_sum_P1G[:, 0, :num_queries])
    log_sums_PG = torch.cat(log_sums)
    attended_GD = torch.einsum("pg,pgd->gd", torch.softmax(log_sums_PG, dim=0), torch.cat(outputs))
    return attended_GD, torch.logsumexp(log_sums_PG, dim=0)


def attend_in_blocks(queries_GD: Tensor, rows_SD: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """`attend` by two matrix products for each block of rows, on CPUs and GPUs.

    The blocks' results merge by their maxima, at any temperature (Milakov and Gimelshein 2018, "Online normalizer
    calculation for softmax"). A block's exponentials are taken against its own maximum: against the highest so far,
    those of many far rows could all be less than half precision holds. All blocks share the memory of the first.
    """
    num_queries, dim = queries_GD.shape
    scale = 1 / temperature
    highest_G = queries_GD.new_full((num_queries,), -torch.inf, dtype=torch.float32)
    mass_G = torch.zeros_like(highest_G)
    attended_GD = queries_GD.new_zeros(num_queries, dim, dtype=torch.float32)
    block = min(len(rows_SD), _BLOCK_ROWS[rows_SD.device.type])
    products = queries_GD.new_empty(num_queries * block)
    weights = products.float()  # of float32 rows the same memory
    for first in range(0, len(rows_SD), block):
        rows_bD = rows_SD[first : first + block]
        products_Gb = products[: num_queries * len(rows_bD)].view(num_queries, -1)
        weights_Gb = weights[: num_queries * len(rows_bD)].view(num_queries, -1)
        weights_Gb.copy_(torch.mm(queries_GD, rows_bD.T, out=products_Gb))
        block_G = weights_Gb.amax(dim=1)
        weights_Gb.sub_(block_G[:, None]).mul_(scale).exp_()
        higher_G = torch.maximum(highest_G, block_G)
        past_G, present_G = torch.exp((highest_G - higher_G) * scale), torch.exp((block_G - higher_G) * scale)
        mass_G.mul_(past_G).addcmul_(weights_Gb.sum(dim=1), present_G)
        sums_GD = (products_Gb.copy_(weights_Gb) @ rows_bD).float()
        attended_GD.mul_(past_G[:, None]).addcmul_(sums_GD, present_G[:, None])
        highest_G = higher_G
    return attended_GD / mass_G[:, None], highest_G * scale + torch.log(mass_G)
