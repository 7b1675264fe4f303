"""Loss and gradient of a batch over all ranks: the one place where an objective meets the exchange."""

from __future__ import annotations

import torch
from torch import Tensor

from cluster.exchange import Exchange, to_device
from instdisc.model.bank import Bank
from instdisc.objectives.base import BatchQueries, Objective, Result


def loss_and_gradient(
    objective: Objective,
    bank: Bank,
    exchange: Exchange,
    embeddings_QD: Tensor,
    batch_ids_WB: Tensor,
    generator: torch.Generator,
) -> tuple[Result, Tensor]:
    """Queries to all owners, their parts back.

    Args:
        objective: With its state.
        bank: This rank's rows.
        exchange: Of the ranks.
        embeddings_QD: float32 (Q, D), unit rows, first all first views, then all second ones.
        batch_ids_WB: Instance ids of the images of all ranks, int64 (W, B) on the CPU, -1 for none.
        generator: For what the objective draws.

    Returns:
        Loss and gradient of this rank's embeddings, and their instance ids, int64 (Q,) on their device.

    Collectives: all-gather, all-to-all, and those of `Exchange.log_sum_exp` as the objective needs; every rank must
    call.
    """
    views = objective.config.views
    ids_Q = to_device(batch_ids_WB[exchange.rank].repeat(views), bank.rows.device)
    queries_GD, ids_G = exchange.gather(embeddings_QD.to(bank.rows.dtype), ids_Q)
    local = slice(exchange.rank * len(embeddings_QD), (exchange.rank + 1) * len(embeddings_QD))
    queries = BatchQueries(queries_GD, ids_G, views, local, batch_ids_WB)
    terms_GC = objective.shard_terms(queries, bank, generator, exchange.log_sum_exp)
    result = objective.merge(exchange.to_askers(terms_GC), ids_Q)
    result.sums["negative_similarity"] = _similarity_to_others(queries)
    return result, ids_Q


def _similarity_to_others(queries: BatchQueries) -> Tensor:
    """Mean cosine similarity to the embeddings of other images of the global batch, summed over this rank's own."""
    present_G = queries.instance_ids_G >= 0
    embeddings_GD = queries.embeddings_GD.double() * present_G[:, None]
    images_BD = embeddings_GD[queries.local].view(queries.views, -1, embeddings_GD.shape[1]).sum(dim=0)
    others = (present_G.sum() - queries.views).clamp(min=1)
    return (images_BD.sum(dim=0) @ embeddings_GD.sum(dim=0) - images_BD.square().sum()) / others
