"""One rank's network, shard of the bank, objective and optimizer, and the step that moves them."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from contextlib import AbstractContextManager
from pathlib import Path

import torch
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
from instdisc.model.features import mirrored_features
from instdisc.objectives.base import build_objective
from instdisc.objectives.loss import loss_and_gradient
from instdisc.settings.run import RunConfig
from instdisc.training.buffers import Buffers
from instdisc.training.memory import BankShard, check_memory, network_bytes
from instdisc.training.observed import Observed, StepReport, UnreadReport
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
        buffers: Those of the network, such as running statistics.
        steps: Steps launched; once all are read, done.

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
            from safetensors.torch import load_file  # not at the top: nothing else here needs it

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
        self.buffers = Buffers(self.embedder.backbone, self.exchange)
        self._sound = torch.ones((), dtype=torch.bool, device=worker.device)
        self._unread: deque[UnreadReport] = deque()
        self.steps = 0

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

    def announce(self, instance_ids_B: Tensor, *, flag: int = 0) -> Announcement:
        """Begin to tell all ranks which images this rank's next batch has, while the devices are still busy.

        Args:
            instance_ids_B: int64 (B,) on the CPU, -1 for an image that could not be decoded; it gets no weight.
            flag: Something that all ranks are to know: the announcement's `flag` is the largest of all ranks.

        Collectives: one all-gather between the hosts; every rank must call.
        """
        return self.exchange.announce(instance_ids_B, flag=flag)

    def step(
        self, images_VBCHW: Tensor, announced: Announcement, learning_rate: float, *, frozen: bool = False
    ) -> None:
        """Launch one step on this rank's part of the global batch; `read` says what it did.

        On a GPU the host waits for nothing. Whether all numbers are finite is known to the device alone: from the first
        step on in which they are not, weights, buffers, bank and objective stay as they are.

        Args:
            images_VBCHW: float (V, B, 3, H, W), normalized; as many views as the objective compares.
            announced: Their instance ids.
            learning_rate: The rate of this step.
            frozen: Train the head alone.

        Raises:
            ConfigError: The objective compares another number of views.

        Collectives: all-gather, all-to-all, all-reduce of gradients and of the means, all-to-all; every rank must call.
        """
        if len(images_VBCHW) != self.config.objective.views:
            raise ConfigError(
                f"{self.config.objective.name} compares {self.config.objective.views} view(s) of every image and "
                f"the loader gives {len(images_VBCHW)}: open it with views={self.config.objective.views}"
            )
        self.phases.begin_step()
        self.buffers.keep()
        observed, embedded = self._forward_backward(images_VBCHW, announced)
        if frozen:
            freeze_backbone(self.optimizer)
        gradients = [parameter.grad for parameter in self.embedder.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        observed = Observed(observed.names, self.exchange.sum(observed.values))
        self._sound = sound = self._sound & observed.is_finite & torch.isfinite(norm)
        self.buffers.put_back_unless(sound)
        set_rate(self.optimizer, learning_rate)
        with self.phases("optimizer"):
            self.optimizer.step_if(sound)
        num_queries = self.config.training.batch_size * self.config.objective.views
        self.objective.update(learning_rate, num_queries, sound)
        for part in embedded:
            self._update_bank(*part, sound)
        self.objective.observe(observed.means(), sound & (observed.num_embeddings > 0))
        self.steps += 1
        numbers = self.objective.numbers()
        self._unread.append(UnreadReport(self.steps, learning_rate, observed, norm, numbers))

    @property
    def unread(self) -> int:
        """Steps launched that have not been read."""
        return len(self._unread)

    def wait(self) -> None:
        """Wait until the device has done all steps launched."""
        for unread in self._unread:
            unread.wait()

    def read(self) -> StepReport:
        """What the oldest unread step did; waits until the device has done it.

        Raises:
            NonFiniteError: Loss or embeddings were not finite on some rank, or the gradient was not. Raised on all
                ranks that read the same step. Neither this step nor those after it have changed anything, `steps` is
                again the number of those before it, and none is left to be read.
        """
        unread = self._unread.popleft()
        try:
            return unread.read()
        except NonFiniteError:
            self.steps -= 1 + len(self._unread)
            self._unread.clear()
            raise

    def _forward_backward(
        self, images_VBCHW: Tensor, announced: Announcement
    ) -> tuple[Observed, list[tuple[Tensor, Tensor]]]:
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
        observed: list[Observed] = []
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
            observed.append(Observed.of(result, ids_Q, detached_QD, self.exchange))
            embedded.append((detached_QD, ids_Wb.flatten()))
        return Observed.total(observed), embedded

    def _update_bank(self, embeddings_QD: Tensor, batch_ids: Tensor, sound: Tensor) -> None:
        """Mix every image's embedding, the mean of its views, into its row."""
        views = self.config.objective.views
        embeddings_BD = embeddings_QD.view(views, -1, embeddings_QD.shape[1]).mean(dim=0)
        owned_ids, rows = self.exchange.route(embeddings_BD, batch_ids, self.partition)
        self.bank.update(owned_ids, rows, momentum=self.config.bank.momentum, sound=sound)

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

    @torch.no_grad()
    def features(self, images_BCHW: Tensor) -> Tensor:
        """What `mirrored_features` returns, float32 (B, F), of images as for `embed`."""
        self.embedder.eval()
        return mirrored_features(self.embedder, images_BCHW.to(self.worker.device))

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
