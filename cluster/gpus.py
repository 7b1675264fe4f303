"""Whether this process may compute on a GPU, and whether the node's driver is new enough for that."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import torch

from cluster.errors import ClusterError

_DRIVER = Path("/proc/driver/nvidia/version")  # in containers too
_VERSION = re.compile(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b")
# NVIDIA's oldest driver for all of a major version of CUDA ("minor version compatibility").
_OLDEST_DRIVER = {12: 525, 13: 580}


def driver_version(file: Path = _DRIVER) -> str | None:
    """Version of the NVIDIA driver of this node, such as `580.65.06`; None without one."""
    try:
        found = _VERSION.search(file.read_text())
    except OSError:
        return None
    return found.group(1) if found else None


def check_driver(found: str | None, cuda: str | None = torch.version.cuda) -> None:
    """Refuse a driver that PyTorch cannot compute with, which PyTorch itself takes for a node without a GPU.

    Args:
        found: `driver_version()`.
        cuda: The version of CUDA that PyTorch was built for, such as `13.2`; None if for none.

    Raises:
        ClusterError: Naming both versions.
    """
    oldest = _OLDEST_DRIVER.get(int(cuda.partition(".")[0])) if cuda else None
    if found is not None and oldest is not None and int(found.partition(".")[0]) < oldest:
        raise ClusterError(
            f"the NVIDIA driver of this node is {found}, but PyTorch for CUDA {cuda} needs {oldest} or newer: update "
            "the driver, or train on CPUs with --gpus-per-worker 0"
        )


def order_visible_gpus() -> None:
    """Have this process number its GPUs as their ids are, before CUDA starts.

    Ray sorts `CUDA_VISIBLE_DEVICES` as text, `0,1,10,11,2`, and ranks by number. NCCL is bound to the GPU whose index
    is the local rank, which from the eleventh GPU of a node on would be another rank's.
    """
    ids = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if all(each.isdigit() for each in ids):
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(sorted(ids, key=int))


def require_gpu() -> None:
    """Refuse to compute where a GPU was promised and none can be used.

    Raises:
        ClusterError: With the version of the driver.
    """
    driver = driver_version()
    check_driver(driver)
    if not torch.cuda.is_available():
        raise ClusterError(
            f"a worker was given a GPU, but PyTorch sees none (NVIDIA driver: {driver or 'none'}; PyTorch for CUDA "
            f"{torch.version.cuda}): pass --gpus-per-worker 0 to train on CPUs, or check what the node's Ray declares"
        )


def may_use_gpu() -> bool:
    """Whether this process may compute on a GPU: there is one and, in a process of Ray's, one was reserved for it.

    Ray hides no GPU from a process that reserved none.

    Raises:
        ClusterError: The driver is too old for the GPU that there is.
    """
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        of_ray = ray.get_runtime_context().worker.mode == ray.WORKER_MODE
        if of_ray and not ray.get_gpu_ids():
            return False
    if not torch.cuda.is_available():
        check_driver(driver_version())
        return False
    return True
