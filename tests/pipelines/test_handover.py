"""The life of a batch on a GPU, with stand-ins: a device that works later, and a DALI that uses memory again at once.

No GPU is needed, and nothing is timed: what was called runs only when its stream is synchronized.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipelines import dali
from pipelines.batch import Batch, Loader
from pipelines.handover import Handover
from pipelines.loader import _OneAhead

GPU = torch.device("cuda", 1)
VIEWS, SHAPE = 2, (3, 4, 4, 3)


class LateDevice(TorchDispatchMode):
    """Copies are noted, and done when the stream is synchronized, with what then lies where they were to read."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[Callable[[], None]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.copy_.default:
            target, source = (memory_of(each) for each in args[:2])
            self.noted.append(lambda: np.copyto(target, source))
            return args[0]
        if func in (torch.ops.aten.stack.default, torch.ops.aten.cat.default):
            sources = [memory_of(each) for each in args[0]]
            out = func(*args, **(kwargs or {})).zero_()
            target = memory_of(out).reshape(len(sources), -1)
            self.noted.append(lambda: np.copyto(target, [source.ravel() for source in sources]))
            return out
        return func(*args, **(kwargs or {}))

    def synchronize(self) -> None:
        for work in self.noted:
            work()
        self.noted.clear()


def memory_of(tensor: torch.Tensor) -> npt.NDArray[np.float32]:
    """The memory of a contiguous tensor, without a reference to it: a GPU holds none to what it is about to read."""
    assert tensor.is_contiguous()
    numbers = (ctypes.c_float * tensor.numel()).from_address(tensor.data_ptr())
    return np.frombuffer(numbers, np.float32).reshape(tensor.shape)


class Output:
    """Of DALI: shares its memory with whoever asks; when the last one lets go, the next batch is written there."""

    def __init__(self, memory: npt.NDArray[np.float32]) -> None:
        shared = memory[:]
        weakref.finalize(shared, memory.fill, np.nan)
        self._shared = shared

    def as_tensor(self) -> npt.NDArray[np.float32]:
        return self._shared


class Pipeline:
    """Of DALI; knows the stream that was told to wait for it."""

    def __init__(self, memory: npt.NDArray[np.float32]) -> None:
        self._memory = memory
        self.waiting: Any = None

    def outputs(self, cuda_stream: Any = None) -> tuple[Output, ...]:
        self.waiting = cuda_stream
        return tuple(Output(view) for view in self._memory)


@pytest.mark.parametrize("views", [1, 2])
def test_dali_may_use_memory_again_only_when_it_has_been_copied(
    monkeypatch: pytest.MonkeyPatch, views: int
) -> None:
    memory = np.random.default_rng(0).random((views, *SHAPE), np.float32)
    expected, pipeline, device = torch.tensor(memory), Pipeline(memory), LateDevice()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: device)
    with device:
        images = dali.collect(pipeline, GPU)
    assert pipeline.waiting is device
    assert np.isnan(memory).all(), "the outputs were never let go"
    device.synchronize()
    assert torch.equal(images, expected)


class Stream:
    """Of CUDA; writes down what happens to it, and in which thread."""

    def __init__(self, device: torch.device, log: list[tuple[str, str]]) -> None:
        self.device, self._log = device, log

    def synchronize(self) -> None:
        self._log.append(("synchronized", threading.current_thread().name))


class Images(torch.Tensor):
    """Writes down for which streams its memory is kept."""

    kept_for: list[Any]

    def record_stream(self, stream: Any) -> None:
        self.kept_for.append(stream)


class TwoBatches(Loader):
    """Writes down when it fills a batch."""

    def __init__(self, log: list[tuple[str, str]]) -> None:
        self._left, self._log = 2, log

    def __next__(self) -> Batch:
        if not self._left:
            raise StopIteration
        self._left -= 1
        self._log.append(("filled", threading.current_thread().name))
        images = torch.zeros(1).as_subclass(Images)
        images.kept_for = []
        return Batch(images, torch.zeros(1, dtype=torch.int64))

    def close(self) -> None: ...


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str]]]:
    """What was done to CUDA's state per thread and to the loader's stream, in order."""
    log: list[tuple[str, str]] = []

    def note(event: str) -> Callable[[Any], None]:
        return lambda what: log.append((f"{event} {getattr(what, 'device', what)}", name()))

    def name() -> str:
        return threading.current_thread().name

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(device, log))
    monkeypatch.setattr(torch.cuda, "set_device", note("device"))
    monkeypatch.setattr(torch.cuda, "set_stream", note("stream of"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: (device, name()))
    return log


def test_a_batch_is_filled_on_the_loaders_stream_and_kept_for_the_consumers(
    cuda: list[tuple[str, str]],
) -> None:
    loader = _OneAhead(TwoBatches(cuda), Handover(GPU), None)
    batches = list(loader)
    loader.close()
    thread = cuda[0][1]
    assert thread.startswith("batches")
    assert cuda == [
        (event, thread) for event in ("device cuda:1", "stream of cuda:1", *2 * ("filled", "synchronized"))
    ]
    here = threading.current_thread().name
    assert [batch.images.kept_for for batch in batches] == 2 * [[(GPU, here)]]


def test_nothing_of_cuda_is_touched_on_the_cpu(cuda: list[tuple[str, str]]) -> None:
    loader = _OneAhead(TwoBatches(cuda), Handover(torch.device("cpu")), None)
    assert [batch.images.kept_for for batch in loader] == [[], []]
    loader.close()
    assert {event for event, _ in cuda} == {"filled"}
