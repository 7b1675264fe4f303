"""Tensors that say they are on a GPU and compute on the CPU: mixing devices raises, and every wait is written down.

For a process of its own: `begin` changes PyTorch for good. A wait is what makes the host stand still until the GPU has
done all that it was given: a copy from the GPU, a copy to it from memory that is not pinned, a result whose size
depends on numbers on the GPU.
"""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

GPU = torch.device("cuda", 0)
CHECKOUT = Path(__file__).resolve().parents[1]
_SIZE_DEPENDS_ON_NUMBERS = {
    *(
        "nonzero",
        "_unique2",
        "unique_dim",
        "unique_consecutive",
        "masked_select",
        "bincount",
        "repeat_interleave",
    ),
    *("_local_scalar_dense", "equal", "is_nonzero"),
}
_INDEXING = {"index", "index_put_", "index_put", "_index_put_impl_", "_unsafe_index"}
_COPIES = {"_to_copy", "copy_"}
_NCCL_TYPES = {
    *(torch.uint8, torch.int8, torch.int32, torch.int64, torch.bool),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
}

_WITHOUT_A_KERNEL = {
    "empty",
    "empty_strided",
    "empty_like",
    "new_empty",
    "new_empty_strided",
    "detach",
    "_pin_memory",
}

waits: Counter[str] = Counter()
"""How often the host waited, by the line of the project that made it."""
launches: Counter[str] = Counter()
"""How often each operation was launched on the GPU; views and allocations launch nothing."""
collectives: Counter[str] = Counter()
"""How often each collective was called."""


def forget() -> None:
    """Count from 0 again."""
    for counter in (waits, launches, collectives):
        counter.clear()


class OnGpu(Tensor):
    """A tensor on the GPU; `elem`, on the CPU, has its numbers."""

    elem: Tensor

    @staticmethod
    def __new__(cls, elem: Tensor) -> OnGpu:
        with torch._C._DisableTorchDispatch():
            empty = torch.empty_strided(elem.size(), elem.stride(), dtype=elem.dtype, device="meta")
            tensor = torch.Tensor._make_subclass(  # type: ignore[call-arg]
                cls, empty, False, dispatch_device=True, device_for_backend_keys=GPU
            )
        tensor.elem = elem
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def is_meta(self) -> bool:
        return False

    def tolist(self) -> Any:
        _wait("tolist")
        return self.elem.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class PretendGpu(TorchDispatchMode):
    """Within, new tensors may be made on the GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _place() -> str:
    """The innermost line of the project that led here."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(CHECKOUT) and "tests" not in path.parts:
            return f"{path.relative_to(CHECKOUT)}: {frame.line}"
    return "?"


def _wait(operation: str) -> None:
    waits[f"{operation} at {_place()}"] += 1


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """Check the devices of one call, note whether it waits, and compute it on the CPU."""
    if func is torch.ops.prim.device.default:
        return GPU
    name = func._schema.name.partition("::")[2]
    given, _ = tree_flatten((args, kwargs))
    on_gpu = [each for each in given if isinstance(each, OnGpu)]
    asked = kwargs.get("device")
    to_gpu = asked is not None and torch.device(asked).type == "cuda"
    result_on_gpu = bool(on_gpu) or to_gpu
    if name in _COPIES:
        target_on_gpu = to_gpu if name == "_to_copy" and asked is not None else isinstance(args[0], OnGpu)
        source = args[0] if name == "_to_copy" else args[1]
        if target_on_gpu != isinstance(source, OnGpu):
            on_host = source if target_on_gpu else args[0]
            without_waiting = kwargs.get("non_blocking") or (name == "copy_" and args[2:] == (True,))
            if not (getattr(on_host, "pinned", False) and without_waiting):
                _wait("copy to the GPU" if target_on_gpu else "copy from the GPU")
        result_on_gpu = target_on_gpu
    elif on_gpu:
        _check_devices(name, args, given)
        if name in _SIZE_DEPENDS_ON_NUMBERS:
            _wait(name)
    if (on_gpu or to_gpu) and not func.is_view and name not in _WITHOUT_A_KERNEL:
        launches[name] += 1
    plain_args, plain_kwargs = tree_map(_plain, args), tree_map(_plain, kwargs)
    if to_gpu:
        plain_kwargs["device"] = torch.device("cpu")
    pinned = plain_kwargs.pop("pin_memory", None)
    kernel = _KERNELS.get(name, func)
    result = kernel(*plain_args, **plain_kwargs)
    if pinned:
        result.pinned = True
    if name == "_to_copy" and result is plain_args[0]:
        result = result.clone()
    same = {id(each.elem): each for each in on_gpu}  # what is changed in place remains the object that it was

    def place(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) in same:
            return same[id(value)]
        return OnGpu(value) if result_on_gpu else value

    return tree_map(place, result)


def _check_devices(name: str, args: Any, given: list[Any]) -> None:
    if name in _INDEXING:
        if not isinstance(args[0], OnGpu):
            raise RuntimeError(f"CPU tensor indexed by one on the GPU at {_place()}")
        for index in args[1]:
            if isinstance(index, OnGpu) and index.dtype in (torch.bool, torch.uint8):
                _wait(f"{name} by a mask")
            elif isinstance(index, Tensor) and not isinstance(index, OnGpu):
                _wait(f"{name} by an index on the CPU")
        given = [each for each in args[2:] if isinstance(each, Tensor)]
    for each in given:
        if isinstance(each, Tensor) and not isinstance(each, OnGpu) and each.dim() > 0:
            raise RuntimeError(f"{name}: tensors on CPU and GPU mixed at {_place()}")


def _plain(value: Any) -> Any:
    return value.elem if isinstance(value, OnGpu) else value


def _attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    scores = torch.einsum("bhqd,bhkd->bhqk", query.float(), key.float()) * scale
    return (torch.softmax(scores, -1) @ value.float()).to(query.dtype), torch.logsumexp(scores, -1)


def _flash(query: Tensor, key: Tensor, value: Tensor, *_: Any, scale: float) -> tuple[Any, ...]:
    unused = torch.zeros((), dtype=torch.int64)
    return (*_attention(query, key, value, scale), unused, unused, 0, 0, *3 * [unused])


def _efficient(query: Tensor, key: Tensor, value: Tensor, *_: Any, scale: float) -> tuple[Any, ...]:
    """Pads the log-sum-exps to a multiple of 32."""
    out, log_sums = _attention(query, key, value, scale)
    padded = torch.nn.functional.pad(log_sums, (0, -log_sums.shape[-1] % 32), value=torch.inf)
    return (out, padded, *2 * [torch.zeros((), dtype=torch.int64)])


_KERNELS = {
    "_scaled_dot_product_flash_attention": _flash,
    "_scaled_dot_product_efficient_attention": _efficient,
}


class Generator(torch.Generator):
    """Of any device."""

    def __new__(cls, device: object = None) -> Generator:
        return super().__new__(cls)


class Event:
    """Of CUDA; it has passed when it is asked for."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.known_to_have_passed = False

    def record(self) -> None: ...

    def query(self) -> bool:
        self.known_to_have_passed = True
        return True

    def synchronize(self) -> None:
        if not self.known_to_have_passed:
            _wait("for an event")

    def elapsed_time(self, end: Event) -> float:
        return 1.0


class _Work:
    """A collective that another thread carries out."""

    def wait(self) -> None: ...


def begin() -> None:
    """Make this process one with a GPU that is only pretended, and with ranks that all send what this one sends."""
    torch._C._ensureCUDADeviceGuardSet()
    torch._C._set_only_lift_cpu_tensors(True)  # type: ignore[attr-defined]
    torch.cuda._lazy_init = lambda: None
    changes: dict[Any, dict[str, Any]] = {
        torch: {"Generator": Generator},
        torch.cuda: {
            "Event": Event,
            "device": lambda device: contextlib.nullcontext(),
            "mem_get_info": lambda device: (80 << 30, 80 << 30),
            "is_bf16_supported": lambda including_emulation: True,
        },
        Tensor: {"pin_memory": _pin_memory},
        dist: {
            "all_gather_into_tensor": _all_gather,
            "all_to_all_single": _all_to_all,
            "all_reduce": _all_reduce,
            "barrier": lambda: None,
        },
    }
    for owner, values in changes.items():
        for name, value in values.items():
            setattr(owner, name, value)


def _pin_memory(tensor: Tensor) -> Tensor:
    assert not isinstance(tensor, OnGpu)
    pinned = tensor.clone()
    pinned.pinned = True  # type: ignore[attr-defined]
    return pinned


def _check_sent(*tensors: Tensor) -> None:
    """Refuse what NCCL would refuse."""
    for tensor in tensors:
        assert isinstance(tensor, OnGpu), f"CPU tensor given to NCCL at {_place()}"
        assert tensor.is_contiguous(), f"not contiguous at {_place()}"
        assert tensor.dtype in _NCCL_TYPES, (tensor.dtype, _place())


def _all_reduce(tensor: Tensor, op: object = None) -> None:
    _check_sent(tensor)
    collectives["all-reduce"] += 1


def _all_gather(out: Tensor, tensor: Tensor, async_op: bool = False) -> _Work:
    if isinstance(out, OnGpu) or isinstance(tensor, OnGpu):
        _check_sent(out, tensor)
        collectives["all-gather"] += 1
    else:
        assert async_op, f"the host waits for the other hosts at {_place()}"
        collectives["all-gather between hosts"] += 1
    _plain(out).view(-1, tensor.numel()).copy_(_plain(tensor).reshape(1, -1))
    return _Work()


def _all_to_all(out: Tensor, tensor: Tensor, received: Any = None, sent: Any = None) -> None:
    _check_sent(out, tensor)
    collectives["all-to-all"] += 1
    assert out.dtype == tensor.dtype
    if sent is not None:
        assert (sum(received), sum(sent)) == (len(out), len(tensor))
    count = min(out.numel(), tensor.numel())
    _plain(out).zero_()  # of the ranks that are not there; what lies in new memory may be NaN
    _plain(out).view(-1)[:count].copy_(_plain(tensor).reshape(-1)[:count])
