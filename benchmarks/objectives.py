"""Time and memory of the objectives beside the formulation that public code uses, alternating in one run.

    python benchmarks/objectives.py [--only NAME] [--json FILE]

One step's forward and gradient with a bank of 1,281,167 rows of 128 and a batch of 256, as in ImageNet training; of
the parametric softmax also the update of its weights. On a machine with a GPU it is used. What several ranks send, hold
and agree on is measured by `benchmarks/ranks.py`.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import math
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from cluster.exchange import Exchange
from instdisc.model.bank import Bank, random_unit_rows
from instdisc.objectives.base import BatchQueries, Objective, build_objective
from instdisc.objectives.loss import loss_and_gradient
from instdisc.objectives.nce import NCE
from instdisc.settings.objectives import (
    InfoNCEConfig,
    NCEConfig,
    ObjectiveConfig,
    ParametricSoftmaxConfig,
    SoftmaxConfig,
    SpreadingConfig,
)

REPEATS = 9
LEARNING_RATE = 0.03


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    objective: str
    dtype: str
    seconds: float
    peer: str
    peer_seconds: float
    speedup: float
    extra_megabytes: float
    peer_extra_megabytes: float


@dataclass(frozen=True)
class Case:
    """What is measured, and against which formulation of public code.

    Attributes:
        name: In the table.
        config: The objective.
        dtype: Of the bank.
        peer: See `PEERS`.
        peer_dtype: Of the bank that the peer works on.
        comparable: Whether both must give the same numbers.
    """

    name: str
    config: ObjectiveConfig
    dtype: torch.dtype
    peer: str
    peer_dtype: torch.dtype
    comparable: bool = True


@dataclass(frozen=True)
class Step:
    """The numbers of one step."""

    objective: Objective
    bank: Bank
    queries: Tensor
    ids: Tensor
    generator: torch.Generator
    sound: Tensor

    def ours(self) -> tuple[Tensor, Tensor]:
        """Loss (Q,) and gradient (Q, D)."""
        exchange = Exchange(0, 1)
        queries, ids, generator = self.queries, self.ids, self.generator.manual_seed(3)
        result, _ = loss_and_gradient(
            self.objective, self.bank, exchange, queries, ids.cpu()[None], generator
        )
        self.objective.update(LEARNING_RATE, len(queries), self.sound)
        return result.loss_Q, result.gradient_QD


def gather_then_bmm(step: Step, noise: NCE) -> tuple[Tensor, Tensor]:
    """NCE as public code computes it: all sampled rows gathered at once, then autograd."""
    config, bank = noise.config, step.bank.rows
    negatives, _ = noise.draw(len(step.queries), step.bank, step.generator.manual_seed(3))
    queries = step.queries.detach().to(bank.dtype).requires_grad_()
    chosen = torch.cat([step.ids[:, None], negatives], dim=1)
    rows = bank.index_select(0, chosen.flatten()).view(*chosen.shape, -1)
    scores = torch.bmm(rows, queries[:, :, None])[..., 0].float() / config.temperature
    logits = scores - noise.log_partition + math.log(len(bank) / config.num_negatives)
    loss = F.softplus(-logits[:, 0]) + F.softplus(logits[:, 1:]).sum(dim=1)
    return loss.detach(), torch.autograd.grad(loss.sum(), queries)[0]


def all_logits(step: Step, noise: NCE) -> tuple[Tensor, Tensor]:
    """The softmax over all rows as public code computes it: all logits of the batch at once, then autograd."""
    queries = step.queries.detach().to(step.bank.rows.dtype).requires_grad_()
    logits = (queries / step.objective.config.temperature @ step.bank.rows.T).float()
    loss = F.cross_entropy(logits, step.ids, reduction="none")
    return loss.detach(), torch.autograd.grad(loss.sum(), queries)[0]


def linear_layer(step: Step, noise: NCE) -> tuple[Tensor, Tensor]:
    """The parametric softmax as a linear layer: all logits, the gradient of all weights by autograd, and their SGD."""
    config, tables = step.objective.config, step.objective.tables()
    queries = step.queries.detach().requires_grad_()
    weights = tables["weights"].detach().requires_grad_()
    loss = F.cross_entropy(queries / config.temperature @ weights.T, step.ids, reduction="none")
    gradient, weights_gradient = torch.autograd.grad(loss.sum(), (queries, weights))
    momentum = tables["weights_momentum"].mul_(config.momentum).add_(weights_gradient, alpha=1 / len(queries))
    tables["weights"].sub_(momentum, alpha=LEARNING_RATE)
    return loss.detach(), gradient


def gather_then_mm(step: Step, noise: NCE) -> tuple[Tensor, Tensor]:
    """InfoNCE as public code computes it: logits of the positive and the gathered shared rows, then autograd."""
    bank, temperature = step.bank.rows, step.objective.config.temperature
    sample = BatchQueries(step.queries, step.ids, 1, slice(0, 0), step.ids.cpu()[None])
    negatives, _ = step.objective.draw(sample, step.bank, step.generator.manual_seed(3))
    queries = step.queries.detach().to(bank.dtype).requires_grad_()
    positives = (queries * bank[step.ids]).sum(dim=1, keepdim=True)
    logits = torch.cat([positives, queries @ bank[negatives].T], dim=1).float() / temperature
    loss = F.cross_entropy(logits, torch.zeros_like(step.ids), reduction="none")
    return loss.detach(), torch.autograd.grad(loss.sum(), queries)[0]


def batch_autograd(step: Step, noise: NCE) -> tuple[Tensor, Tensor]:
    """Invariant-spreading by autograd over the batch's similarities, keys detached as in the authors' code."""
    queries = step.queries.detach().requires_grad_()
    count = len(queries)
    number = torch.arange(count, device=queries.device)
    scores = (queries @ queries.detach().T / step.objective.config.temperature).double()
    log_probability = torch.log_softmax(scores.masked_fill(number[:, None] == number, -torch.inf), dim=1)
    positive = number.roll(count // 2)
    repelled = (number[:, None] != number) & (positive[:, None] != number)
    complement = torch.log(-torch.expm1(log_probability.masked_fill(~repelled, -torch.inf)))
    loss = -log_probability[number, positive] - complement.sum(dim=1)
    return loss.detach(), torch.autograd.grad(loss.sum(), queries)[0]


PEERS: dict[str, Callable[[Step, NCE], tuple[Tensor, Tensor]]] = {
    "gather then bmm": gather_then_bmm,
    "all logits": all_logits,
    "linear layer": linear_layer,
    "gather then mm": gather_then_mm,
    "autograd": batch_autograd,
}

FULL, HALF = torch.float32, torch.bfloat16
CASES = (
    Case("nce", NCEConfig(), FULL, "gather then bmm", FULL),
    Case("nce", NCEConfig(), HALF, "gather then bmm", HALF),
    Case("softmax", SoftmaxConfig(), FULL, "all logits", FULL),
    Case("softmax", SoftmaxConfig(), HALF, "gather then bmm", FULL, comparable=False),
    Case("infonce", InfoNCEConfig(), FULL, "gather then mm", FULL),
    Case("infonce", InfoNCEConfig(), HALF, "gather then mm", HALF),
    Case("parametric", ParametricSoftmaxConfig(), FULL, "linear layer", FULL),
    Case("spreading", SpreadingConfig(), FULL, "autograd", FULL),
)


def measure(case: Case, sizes: tuple[int, int, int], device: torch.device) -> Row:
    """Time and memory of one objective beside its peer on the same numbers."""
    num_instances, dim, batch = sizes
    exact = random_unit_rows(0, num_instances, dim, seed=0).to(device)
    generator = torch.Generator().manual_seed(1)
    queries = F.normalize(torch.randn(batch, dim, generator=generator), dim=1).repeat(case.config.views, 1)
    queries = F.normalize(queries + 0.05 * torch.randn(queries.shape, generator=generator), dim=1).to(device)
    ids = torch.randperm(num_instances, generator=generator)[:batch].repeat(case.config.views).to(device)
    draws = torch.Generator(device)

    def step_on(dtype: torch.dtype) -> Step:
        bank = Bank(exact.to(dtype))
        sound = torch.ones((), dtype=torch.bool, device=device)
        return Step(build_objective(case.config, num_instances, bank), bank, queries, ids, draws, sound)

    step, peer_step = step_on(case.dtype), step_on(case.peer_dtype)
    noise_config = case.config if isinstance(case.config, NCEConfig) else NCEConfig()
    noise = NCE(noise_config, num_instances, peer_step.bank)

    def peer() -> tuple[Tensor, Tensor]:
        return PEERS[case.peer](peer_step, noise)

    if case.comparable:
        tolerance = 1e-4 if case.dtype == FULL else 3e-2
        for mine, theirs in zip(step.ours(), peer(), strict=True):
            scale = float(theirs.abs().max())
            torch.testing.assert_close(mine, theirs.float(), rtol=tolerance, atol=tolerance * scale)
        trained, expected = step.objective.tables(), peer_step.objective.tables()
        torch.testing.assert_close(trained, expected, rtol=tolerance, atol=tolerance * LEARNING_RATE)
    seconds, peer_seconds = alternate(step.ours, peer, device)
    # Tables that ours keeps for itself between steps; the peer makes them anew.
    own_tables = case.config.tables_beside_bank - len(step.objective.tables())
    own_bytes = own_tables * exact.numel() * exact.element_size()
    return Row(
        objective=case.name,
        dtype=str(case.dtype).removeprefix("torch."),
        seconds=seconds,
        peer=f"{case.peer}, {str(case.peer_dtype).removeprefix('torch.')}",
        peer_seconds=peer_seconds,
        speedup=peer_seconds / seconds,
        extra_megabytes=own_bytes / 1e6 + extra_megabytes(step.ours, device),
        peer_extra_megabytes=extra_megabytes(peer, device),
    )


def alternate(
    ours: Callable[[], object], peer: Callable[[], object], device: torch.device
) -> tuple[float, float]:
    """Median seconds of both, measured in turns after a warm-up."""
    times: dict[Callable[[], object], list[float]] = {ours: [], peer: []}
    for repeat in range(REPEATS + 1):
        for function, seconds in times.items():
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            if repeat:
                seconds.append(time.perf_counter() - start)
    return statistics.median(times[ours]), statistics.median(times[peer])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def extra_megabytes(function: Callable[[], object], device: torch.device) -> float:
    """The most memory (10^6 bytes) in use during a call, above what was in use before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    # Memory that the allocator kept from earlier calls would hide what this one needs.
    ctypes.CDLL(None).malloc_trim(0)
    before, most, done = resident_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    function()
    done.set()
    watcher.join()
    return max(0, most - before) / 1e6


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def print_row(row: Row) -> None:
    timed = f"{1e3 * row.seconds:>9.1f}  {row.peer:<29}{1e3 * row.peer_seconds:>9.1f}{row.speedup:>9.2f}"
    memory = f"{row.extra_megabytes:>10.1f}{row.peer_extra_megabytes:>9.1f}"
    print(f"{row.objective:<12}{row.dtype:<10}{timed}{memory}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--instances", type=int, default=1_281_167)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--only", choices=sorted({case.name for case in CASES}), help="one objective")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = (arguments.instances, arguments.dim, arguments.batch)
    print(
        f"n = {arguments.instances:,}, D = {arguments.dim}, batch {arguments.batch}, {device}, "
        f"torch {torch.__version__}"
    )
    print(f"{'objective':<12}{'dtype':<10}{'ms':>9}  {'peer':<29}{'peer ms':>9}{'speedup':>9}", end="")
    print(f"{'extra MB':>10}{'peer MB':>9}")
    rows = []
    for case in CASES:
        if arguments.only in (None, case.name):
            rows.append(measure(case, sizes, device))
            print_row(rows[-1])
    if arguments.json:
        arguments.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
