"""From the loader's thread to the consumer: who may touch the memory of a batch, and until when.

On a GPU a call returns before its work is done, so that "afterwards" has to be said in terms of streams. The rule:

1. A batch is filled by the loader's thread alone, in torch's memory, on a stream of the loader's own. What it is filled
   from, such as the outputs of DALI, is kept until that stream has been synchronized, which the loader's thread does:
   neither the consumer's thread nor its stream waits.
2. It is handed over when it is complete. From then on it is the consumer's: the loader neither reads nor writes it.
3. Its memory is free again when the consumer has dropped it and what the consumer's stream held at that moment has been
   done: that stream is noted at the handover. A consumer that uses the batch on yet another stream notes that one
   itself (`Tensor.record_stream`).

On the CPU work is done when a call returns, and references are all there is to it.
"""

from __future__ import annotations

import torch

from pipelines.batch import Batch


class Handover:
    """Applies the rule above to the batches of one loader.

    Args:
        device: Where the batches go; a GPU with its index.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def enter_thread(self) -> None:
        """Have the calling thread, the loader's, work on the device and its own stream; CUDA keeps both per thread."""
        if self._stream is not None:
            torch.cuda.set_device(self._device)
            torch.cuda.set_stream(self._stream)

    def complete(self, batch: Batch) -> Batch:
        """Wait in the loader's thread until a batch is filled."""
        if self._stream is not None:
            self._stream.synchronize()
        return batch

    def give(self, batch: Batch) -> Batch:
        """Pass a complete batch to the consumer, in whose thread this is called; nothing waits."""
        if self._stream is not None:
            batch.images.record_stream(torch.cuda.current_stream(self._device))
        return batch


def with_index(device: torch.device) -> torch.device:
    """The same device; a GPU named without an index becomes the calling thread's current one."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
