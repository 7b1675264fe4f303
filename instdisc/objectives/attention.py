"""Attention with its log-sum-exp: the softmax over all rows of a shard without a tensor of all its scores.

The gradient of the non-parametric softmax is a difference of an attention output and a row of the bank, and its loss a
difference of a log-sum-exp and a score. Which kernel computes them is chosen here alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK_ROWS = 8192


def attend(queries_GD: Tensor, rows_SD: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Mean of the rows under the softmax of their similarities, and the logarithm of its denominator.

    Blocks of rows are visited one after the other; the running maximum keeps every exponential between 0 and 1, at any
    temperature (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax").

    Args:
        queries_GD: (G, D), dtype of the rows.
        rows_SD: (S, D), float32, float16 or bfloat16, at least one.
        temperature: τ, above 0.

    Returns:
        `Σ_j softmax_j(v_j·f/τ) v_j`, float32 (G, D), and `log Σ_j exp(v_j·f/τ)`, float32 (G,).
    """
    num_queries, dim = queries_GD.shape
    highest_G = queries_GD.new_full((num_queries,), -torch.inf, dtype=torch.float32)
    mass_G = torch.zeros_like(highest_G)
    attended_GD = queries_GD.new_zeros(num_queries, dim, dtype=torch.float32)
    for first in range(0, len(rows_SD), _BLOCK_ROWS):
        rows_bD = rows_SD[first : first + _BLOCK_ROWS]
        scores_Gb = (queries_GD @ rows_bD.T).float().div_(temperature)
        higher_G = torch.maximum(highest_G, scores_Gb.amax(dim=1))
        rescale_G = torch.exp(highest_G - higher_G)
        weights_Gb = scores_Gb.sub_(higher_G[:, None]).exp_()
        mass_G = mass_G * rescale_G + weights_Gb.sum(dim=1)
        attended_GD.mul_(rescale_G[:, None]).add_(weights_Gb.to(rows_bD.dtype) @ rows_bD)
        highest_G = higher_G
    return attended_GD / mass_G[:, None], highest_G + torch.log(mass_G)
