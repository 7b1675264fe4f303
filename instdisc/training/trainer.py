"""One rank's network, shard of the bank, objective and optimizer, and the step that moves them."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from cluster.exchange import Announcement, Exchange
from cluster.group import Worker
from cluster.partition import Partition
from cluster.phases import Phases
from instdisc.common.errors import ConfigError, NonFiniteError
from instdisc.common.seeding import derive_seed
from instdisc.model.backbone import Embedder, build_embedder
from instdisc.model.bank import Bank, random_unit_rows
from instdisc.objectives.base import Result, build_objective
from instdisc.objectives.loss import loss_and_gradient
from instdisc.settings.run import RunConfig
from instdisc.training.memory import BankShard, check_memory, network_bytes
from instdisc.training.optim import build_optimizer, freeze_backbone, set_rate


class Trainer:
    """The state of training on one rank. Every method that says so must be called by all ranks together.

    Attributes:
        exchange: The collectives, with their count of bytes.
        phases: How the time of a step divides.
        partition: Which rank owns which rows of the bank.
        embedder: The network itself, without the wrappers that training needs.
        bank: This rank's rows.
        objective: Loss and gradient.
        steps: Steps done.
        stop_agreed: Whether some rank asked, with the last step, to stop.

    Args:
        worker: This rank.
        config: Settings.
        num_instances: n, images of the data set and rows of the bank.
        weights: The file of weights to begin from, by the names of the backbone; layers that it lacks are random.

    Raises:
        ConfigError: The settings do not fit each other or the workers.
    """

    def __init__(
        self, worker: Worker, config: RunConfig, num_instances: int, weights: Path | None = None
    ) -> None:
        self.worker, self.config = worker, config
        self.phases = Phases(worker.device)
        self.exchange = Exchange(worker.rank, worker.world_size, self.phases)
        self.local_batch = config.training.local_batch(worker.world_size)
        try:
            self.partition = Partition(num_instances, worker.world_size)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        seed = config.training.seed
        torch.manual_seed(derive_seed(seed, "weights"))
        embedder = build_embedder(config.backbone, config.augmentation.image_size)
        if weights is not None:
            embedder.backbone.load_state_dict(load_file(weights), strict=False)
        embedder = embedder.to(worker.device)
        self.embedder = embedder.to(memory_format=torch.channels_last)
        self._autocast_dtype = training_dtype(config, worker.device)
        if self._autocast_dtype == torch.float32:
            # What was asked for: by default convolutions on GPUs round to TF32, 10 bits of precision.
            # (By the old flag: the newer one makes `torch.export` and `torch.compile` raise as they read this one.)
            torch.backends.cudnn.allow_tf32 = False
        start, stop = self.partition.start(worker.rank), self.partition.stop(worker.rank)
        objective, dtype = config.objective, getattr(torch, config.bank.dtype)
        dim = config.backbone.embedding_dim
        shard = BankShard(num_rows=stop - start, dim=dim, dtype=dtype, copies=objective.tables_beside_bank)
        check_memory(shard, worker, self._bytes_beside_bank())
        self._network = _wrap(self.embedder, config, worker)
        self.exchange.barrier()  # no rank may take memory that another has yet to count
        rows = random_unit_rows(start, stop, dim, seed=seed, dtype=dtype, device=worker.device)
        self.bank = Bank(rows, start)
        self.objective = build_objective(objective, num_instances, self.bank)
        self.optimizer = build_optimizer(config.optimizer, self.embedder.backbone)
        self._generator = torch.Generator(worker.device)
        self._buffers = {
            name: buffer
            for name, buffer in self.embedder.backbone.named_buffers()
            if buffer.is_floating_point()
        }
        self.steps = 0
        self.stop_agreed = False

    @torch.no_grad()
    def fill_bank(self, embeddings_SD: Tensor, present_S: Tensor) -> None:
        """Begin with these rows of the bank, before the first step.

        Args:
            embeddings_SD: (S, D), unit rows, one for every row of this rank.
            present_S: bool (S,); where it is false the row stays as it is.
        """
        self.bank.rows[present_S] = embeddings_SD[present_S].to(self.bank.rows.dtype)
        # Tables that an objective keeps beside the bank begin as the bank does.
        self.objective = build_objective(self.config.objective, self.partition.num_rows, self.bank)

    def step(
        self,
        images_VBCHW: Tensor,
        instance_ids_B: Tensor,
        learning_rate: float,
        *,
        frozen: bool = False,
        stop: bool = False,
    ) -> dict[str, float]:
        """One step on this rank's part of the global batch.

        Args:
            images_VBCHW: float (V, B, 3, H, W), normalised; as many views as the objective compares.
            instance_ids_B: int64 (B,) on the CPU, -1 for an image that could not be decoded; it gets no weight.
            learning_rate: The rate of this step.
            frozen: Train the head alone.
            stop: This rank asks all to stop after this step; see `stop_agreed`.

        Returns:
            Means over the embeddings of the global batch: `loss`, what else the objective reports,
            `negative_similarity`, `embedding_norm`; and `gradient_norm`. Empty if no image could be decoded.

        Raises:
            ConfigError: The objective compares another number of views.
            NonFiniteError: Loss or embeddings are not finite on some rank, or the gradient is not. Raised on all ranks;
                weights, buffers and bank are as before the step.

        Collectives: all-gather between the hosts, all-gather, all-to-all, all-reduce of gradients and of the means,
            all-to-all; every rank must call.
        """
        if len(images_VBCHW) != self.config.objective.views:
            raise ConfigError(
                f"{self.config.objective.name} compares {self.config.objective.views} view(s) of every image and "
                f"the loader gives {len(images_VBCHW)}: open it with views={self.config.objective.views}"
            )
        self.phases.begin_step()
        buffers_before = {name: buffer.clone() for name, buffer in self._buffers.items()}
        announced = self.exchange.announce(instance_ids_B, flag=stop)
        observed, embedded = self._forward_backward(images_VBCHW, announced)
        if frozen:
            freeze_backbone(self.optimizer)
        gradients = [parameter.grad for parameter in self.embedder.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self.stop_agreed = announced.flag
        # The one place where the host waits for the device.
        *totals, gradient_norm = torch.cat([self.exchange.sum(observed.values), norm.double()[None]]).tolist()
        try:
            means = observed.means(totals, gradient_norm)
        except NonFiniteError:
            self._load_buffers(buffers_before)
            raise
        set_rate(self.optimizer, learning_rate)
        with self.phases("optimizer"):
            self.optimizer.step()
        self.objective.update(learning_rate, self.config.training.batch_size * self.config.objective.views)
        for part in embedded:
            self._update_bank(*part)
        if means:
            self.objective.observe(means)
        self.steps += 1
        return means

    def _forward_backward(
        self, images_VBCHW: Tensor, announced: Announcement
    ) -> tuple[_Observed, list[tuple[Tensor, Tensor]]]:
        """Gradients of the mean loss over the global batch, part by part.

        Returns:
            What was observed on this rank, and for every part its embeddings and the instance ids of the images of all
            ranks, on the CPU.
        """
        training, device = self.config.training, self.worker.device
        self._generator.manual_seed(derive_seed(training.seed, "negatives", self.steps, self.worker.rank))
        torch.manual_seed(derive_seed(training.seed, "dropout", self.steps, self.worker.rank))
        self._network.train()
        self.optimizer.zero_grad(set_to_none=True)
        observed: list[_Observed] = []
        embedded: list[tuple[Tensor, Tensor]] = []
        parts = training.accumulation
        for part, images_VbCHW in enumerate(images_VBCHW.to(device).chunk(parts, dim=1)):
            is_last = part == parts - 1
            images_QCHW = images_VbCHW.flatten(0, 1).contiguous(memory_format=torch.channels_last)
            with contextlib.nullcontext() if is_last else self._without_all_reduce():
                with self._autocast():
                    embeddings_QD, norms_Q = self._network(images_QCHW)
                detached_QD = embeddings_QD.detach()
                ids_Wb = announced.ids.chunk(parts, dim=1)[part]
                with self.phases("objective"):
                    result, ids_Q = loss_and_gradient(
                        self.objective, self.bank, self.exchange, detached_QD, ids_Wb, self._generator
                    )
                result.sums["embedding_norm"] = norms_Q.double() @ (ids_Q >= 0).double()
                scale = self.local_batch * self.config.objective.views
                embeddings_QD.backward(result.gradient_QD / scale)
            observed.append(_Observed.of(result, ids_Q, detached_QD, self.exchange))
            embedded.append((detached_QD, ids_Wb.flatten()))
        return _Observed.total(observed), embedded

    def _update_bank(self, embeddings_QD: Tensor, batch_ids: Tensor) -> None:
        """Mix every image's embedding, the mean of its views, into its row."""
        views = self.config.objective.views
        embeddings_BD = embeddings_QD.view(views, -1, embeddings_QD.shape[1]).mean(dim=0)
        owned_ids, rows = self.exchange.route(embeddings_BD, batch_ids, self.partition)
        self.bank.update(owned_ids, rows, momentum=self.config.bank.momentum)

    @torch.no_grad()
    def embed(self, images_BCHW: Tensor) -> Tensor:
        """Embed images for evaluation, with the running statistics, in float32 like whoever loads the network later.

        Args:
            images_BCHW: float (B, 3, H, W).

        Returns:
            float32 (B, D), unit rows.
        """
        self.embedder.eval()
        embeddings: Tensor = self.embedder(images_BCHW.to(self.worker.device))
        return embeddings

    def buffers(self) -> dict[str, Tensor]:
        """This rank's running statistics by the network's names, copied to the CPU."""
        return {name: buffer.detach().to("cpu", copy=True) for name, buffer in self._buffers.items()}

    def averaged_buffers(self) -> dict[str, Tensor]:
        """The mean of the ranks' running statistics, which each gathered from its own images, on the CPU.

        Collectives: one all-reduce; every rank must call.
        """
        local = self.buffers()
        if not local or self.worker.world_size == 1:
            return local
        flat = torch.cat([buffer.flatten() for buffer in self._buffers.values()])
        mean = (self.exchange.sum(flat) / self.worker.world_size).cpu()
        parts = torch.split(mean, [buffer.numel() for buffer in local.values()])
        return {name: part.view_as(local[name]) for name, part in zip(local, parts, strict=True)}

    @contextlib.contextmanager
    def with_averaged_buffers(self) -> Iterator[None]:
        """Within, the network has the averaged running statistics; afterwards this rank's own again.

        Collectives: one all-reduce; every rank must call.
        """
        local = self.buffers()
        self._load_buffers(self.averaged_buffers())
        try:
            yield
        finally:
            self._load_buffers(local)

    def _load_buffers(self, values: dict[str, Tensor]) -> None:
        for name, buffer in self._buffers.items():
            buffer.copy_(values[name])

    def _bytes_beside_bank(self) -> int:
        """What else a GPU has to hold; see `network_bytes`."""
        if self.worker.device.type != "cuda":
            return 0
        config = self.config
        side = config.augmentation.training_size or config.augmentation.image_size
        at_a_time = config.objective.views * self.local_batch // config.training.accumulation
        # The one in training, the next one and those that the decoder works on.
        batches = (2 + config.loader.prefetch) * config.training.accumulation
        return network_bytes(self.embedder, (at_a_time, 3, side, side), self._autocast_dtype, batches)

    def _autocast(self) -> AbstractContextManager[object]:
        dtype = self._autocast_dtype
        return torch.autocast(self.worker.device.type, dtype=dtype, enabled=dtype != torch.float32)

    def _without_all_reduce(self) -> AbstractContextManager[object]:
        if isinstance(self._network, DistributedDataParallel):
            return self._network.no_sync()
        return contextlib.nullcontext()


class _TrainedNetwork(nn.Module):
    """The network as it is trained: images to embeddings (Q, D) and the lengths (Q,) that they had before."""

    def __init__(self, embedder: Embedder) -> None:
        super().__init__()
        self.embedder = embedder

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.embedder.backbone(images).float()
        return F.normalize(outputs, dim=1), outputs.detach().norm(dim=1)


class _Observed(NamedTuple):
    """What a step reports, as one vector that can be summed over parts and ranks.

    Attributes:
        names: Of the objective's sums.
        values: float64: those sums, the number of embeddings, and for every rank whether it saw a non-finite number.
    """

    names: tuple[str, ...]
    values: Tensor

    @classmethod
    def of(cls, result: Result, ids: Tensor, embeddings: Tensor, exchange: Exchange) -> _Observed:
        flags = torch.zeros(exchange.world_size, dtype=torch.float64, device=ids.device)
        norm = result.sums["embedding_norm"]  # an infinite one makes an embedding of zeros
        flags[exchange.rank] = ~(
            torch.isfinite(embeddings).all() & torch.isfinite(result.loss_Q).all() & torch.isfinite(norm)
        )
        count = (ids >= 0).sum().double()
        values = torch.cat([torch.stack([*result.sums.values(), count]), flags])
        return cls(tuple(result.sums), values)

    @classmethod
    def total(cls, parts: list[_Observed]) -> _Observed:
        return cls(parts[0].names, torch.stack([part.values for part in parts]).sum(dim=0))

    def means(self, totals: list[float], gradient_norm: float) -> dict[str, float]:
        """Means over all embeddings from the totals over all ranks, and the gradient norm; empty if there was none.

        Raises:
            NonFiniteError: Some rank saw a non-finite number, and which; or the gradient is not finite.
        """
        *sums, count = totals[: len(self.names) + 1]
        flags = totals[len(self.names) + 1 :]
        ranks = [rank for rank, flag in enumerate(flags) if flag]
        if ranks:
            raise NonFiniteError(
                f"loss or embeddings are not finite on rank {', '.join(map(str, ranks))} of {len(flags)}"
            )
        if not math.isfinite(gradient_norm):
            raise NonFiniteError("the gradient is not finite on any rank")
        if not count:
            return {}
        return {name: value / count for name, value in zip(self.names, sums, strict=True)} | {
            "gradient_norm": gradient_norm
        }


def training_dtype(config: RunConfig, device: torch.device) -> torch.dtype:
    """The type of the network's arithmetic; see `TrainingConfig.precision`."""
    if config.training.precision != "auto":
        return torch.bfloat16 if config.training.precision == "bfloat16" else torch.float32
    if device.type == "cuda":
        return torch.bfloat16
    capabilities = torch.cpu.get_capabilities()
    fast = any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))
    return torch.bfloat16 if fast else torch.float32


def _wrap(embedder: Embedder, config: RunConfig, worker: Worker) -> nn.Module:
    """Add what training needs around the network; parameters and buffers stay the embedder's own."""
    training = config.training
    network: nn.Module = _TrainedNetwork(embedder)
    if training.sync_batch_norm and worker.world_size > 1:
        if worker.device.type != "cuda":
            raise ConfigError("training.sync_batch_norm needs GPUs: turn it off for workers on CPUs")
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
    if training.compile:
        network = torch.compile(network)  # type: ignore[assignment]
    if worker.world_size > 1:
        # Buffers are averaged when they are needed instead of broadcast in every step. DDP reorders its sums after
        # the first step unless it looks for unused parameters: a resumed run would differ in the last bits.
        on_cpu = worker.device.type == "cpu"
        if on_cpu:
            _spend_ddp_warning()
        network = DistributedDataParallel(
            network,
            forward_sync_buffers=False,
            find_unused_parameters=on_cpu,
            gradient_as_bucket_view=True,  # gradients are summed where they are, without a copy of all of them
        )
    return network


def _spend_ddp_warning() -> None:
    """Have DDP warn that no parameter is unused, which it does once per process, with stderr redirected.

    Its C++ code prints to file descriptor 2, past Python's `warnings`; the log level would silence all other warnings
    of C++ too.

    Collectives: those of DDP's constructor; every rank must call.
    """
    network = DistributedDataParallel(nn.LayerNorm(1), find_unused_parameters=True)
    stderr = os.dup(2)
    try:
        with Path(os.devnull).open("w") as devnull:
            os.dup2(devnull.fileno(), 2)
        network(torch.zeros(1, 1))
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
