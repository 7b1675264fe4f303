"""`--training.compile`: one compilation serves all steps, in one piece, and training is the same."""

from __future__ import annotations

import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from tests.instdisc.training.test_trainer import RATE, make_trainer, my_part
from tests.steps import take_step


def test_the_network_is_compiled_once_and_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    counters.clear()
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    compiled, plain = (make_trainer(0, 1, name="resnet8", compile=compile) for compile in (True, False))
    for _ in range(3):
        found, expected = (
            take_step(trainer, *my_part(0, 1), learning_rate=RATE) for trainer in (compiled, plain)
        )
        assert found == pytest.approx(expected, rel=1e-5)
    assert counter.frame_count == 1
    assert not counters["graph_break"]
    compiled.embed(my_part(0, 1)[0][0])  # evaluation takes the network as it is
    assert counter.frame_count == 1
