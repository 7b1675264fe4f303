"""What a run needs is worked out before the first step, and refused with what would fit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cluster.group import Worker
from instdisc.common.errors import ConfigError
from instdisc.training import memory
from instdisc.training.memory import BankShard, check_memory, network_bytes

GB = 10**9
GPU = Worker(0, 8, 0, 8, 0, torch.device("cuda", 0))


def test_what_training_keeps_is_counted_without_memory() -> None:
    network = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 64, 2))
    weights = 3 * 5 * 9 + 5 + 5 * 64 * 2 + 2
    images, hidden = (
        7 * 3 * 64,
        7 * 5 * 64,
    )  # the convolution keeps its input; ReLU and the last layer share theirs
    for dtype, itemsize in ((torch.float32, 4), (torch.bfloat16, 2)):
        counted = network_bytes(network, (7, 3, 8, 8), dtype, batches=2)
        assert counted == 3 * 4 * weights + itemsize * (images + hidden) + 2 * 4 * images
    assert next(network.parameters()).device.type == "cpu"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """A node with GPUs, of which only the memory is looked at."""
    free = {"gpu": 80 * GB, "host": 400 * GB}
    monkeypatch.setattr(memory, "_can_compute", lambda device, dtype: True)
    monkeypatch.setattr(memory, "host_bytes", lambda: free["host"])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free["gpu"], 80 * GB))
    return free


def test_bank_network_and_batches_share_a_gpu(machine: dict[str, float]) -> None:
    shard = BankShard(num_rows=100_000_000, dim=128, dtype=torch.float16, copies=0)  # 25.6 GB
    check_memory(shard, GPU, besides=50 * GB)
    with pytest.raises(
        ConfigError, match=r"need 25\.6 GB of the GPU.*about 57\.1 GB, and 80\.0 GB.*89,267,642 rows fit"
    ):
        check_memory(shard, GPU, besides=55 * GB)


def test_the_copies_for_snapshots_of_all_ranks_of_a_node_share_the_host(machine: dict[str, float]) -> None:
    machine["host"] = 200 * GB
    with pytest.raises(ConfigError, match=r"need 25\.6 GB of the host for the copy.*25\.0 GB are free"):
        check_memory(BankShard(num_rows=100_000_000, dim=128, dtype=torch.float16, copies=0), GPU)
