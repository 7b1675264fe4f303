"""The Triton kernel against PyTorch's own operations: interpreted on the CPU, compiled, and run on a GPU if any."""

from __future__ import annotations

import multiprocessing
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from instdisc.model.bank import Bank, random_unit_rows
from instdisc.objectives.nce import NCE, gpu_kernel
from instdisc.settings.objectives import NCEConfig

Shape = tuple[int, int, int, int]  # queries, rows, negatives, dimension
SHAPES: list[Shape] = [(1, 1, 1, 1), (3, 7, 5, 3), (2, 50, 300, 128), (5, 2000, 601, 33), (2, 400, 31, 257)]
LARGE: list[Shape] = [(256, 100_000, 4096, 128), (8, 5000, 4096, 1024)]


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """A process where Triton interprets kernels on the CPU; what it does depends on its environment at the start."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            pool.submit(int).result()
        yield pool


def assert_agreement(device: str, shape: Shape, dtype: torch.dtype, temperature: float) -> None:
    """Compare the kernel with PyTorch's operations on the CPU, in float32 with the same numbers."""
    from instdisc.objectives.nce_triton import negative_terms

    num_queries, num_rows, num_negatives, dim = shape
    queries = random_unit_rows(0, num_queries, dim, seed=1).to(dtype)
    rows = random_unit_rows(0, num_rows, dim, seed=2).to(dtype)
    rows[0] = queries[0]
    generator = torch.Generator().manual_seed(3)
    negatives = torch.randint(num_rows, (num_queries, num_negatives), generator=generator)
    negatives[:, -1] = 0  # as near as rows come
    objective = NCE(NCEConfig(temperature=temperature, num_negatives=1000), 5000, Bank(rows))
    terms = negative_terms(
        queries.to(device),
        negatives.to(device),
        rows.to(device),
        weight=1.25,
        temperature=temperature,
        logit_offset=objective._logit_offset.to(device),
    ).cpu()
    expected = objective.negative_terms(queries.float(), negatives, 1.25, rows.float())
    assert terms.dtype == torch.float32
    # Rounding of a score counts 1/τ times, in its coefficient as in its logit.
    tolerance = 1e-6 + 2e-7 / temperature
    largest = float(expected[:, :dim].abs().max())
    torch.testing.assert_close(terms[:, :dim], expected[:, :dim], rtol=0, atol=tolerance * largest)
    torch.testing.assert_close(terms[:, dim:], expected[:, dim:], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("temperature", [0.005, 0.07])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_interpreted(
    interpreter: ProcessPoolExecutor, shape: Shape, dtype: torch.dtype, temperature: float
) -> None:
    interpreter.submit(assert_agreement, "cpu", shape, dtype, temperature).result()


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("dtype", "dim"), [("fp32", 128), ("bf16", 33)])
def test_compiles_for_gpus_of_several_generations(
    tmp_path: Path, capability: int, dtype: str, dim: int
) -> None:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from instdisc.objectives.nce_triton import _BLOCK_NUMBERS, _kernel

    types = [f"*{dtype}", "*i64", f"*{dtype}", "*fp32", "*fp32", "i32", "i32", "fp32", *3 * ["constexpr"]]
    block_dim = triton.next_power_of_2(dim)
    constants = {"dim": dim, "block_dim": block_dim, "block": _BLOCK_NUMBERS // block_dim}
    aligned = {(pointer,): [["tt.divisibility", 16]] for pointer in range(5)}  # as PyTorch's memory is
    source = ASTSource(_kernel, dict(zip(_kernel.arg_names, types, strict=True)), constants, aligned)
    target = GPUTarget("cuda", capability, warp_size=32)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(triton.compile(source, target, {"enable_fp_fusion": True}).asm["cubin"])
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run(
        [cuobjdump, "-res-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    if dim == 128:
        assert registers <= 168  # of 65,536: three programs of four warps on a multiprocessor
        assert stack == 0  # nothing is spilled to memory
    assert stack <= 128  # bytes; rows that are no whole vectors need more addresses than there are registers


def test_without_triton_pytorch_serves(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delitem(sys.modules, "instdisc.objectives.nce_triton", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert gpu_kernel.__wrapped__() is None
    assert "Triton does not work" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("temperature", [0.005, 0.07])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE])
def test_on_the_gpu(shape: Shape, dtype: torch.dtype, temperature: float) -> None:
    assert gpu_kernel() is not None
    assert_agreement("cuda", shape, dtype, temperature)
