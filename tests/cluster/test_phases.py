"""How the time of a step is divided; on a clock that the test turns."""

from __future__ import annotations

import pytest
import torch

from cluster.phases import Phases


class Clock:
    """Seconds that pass only when told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("time.perf_counter", clock)
    return clock


def test_phases_add_up_and_what_is_between_counts_for_none(clock: Clock) -> None:
    phases = Phases(torch.device("cpu"))
    for seconds in (1.0, 2.0):
        with phases("exchange"):
            clock.now += seconds
        clock.now += 10
    with phases("objective"):
        clock.now += 4
    assert phases.finish_step() == [{"exchange": 3.0, "objective": 4.0}]
    assert phases.finish_step() == []


def test_what_is_timed_between_steps_counts_for_none(clock: Clock) -> None:
    phases = Phases(torch.device("cpu"))
    with phases("exchange"):
        clock.now += 1
    phases.begin_step()
    with phases("exchange"):
        clock.now += 2
    assert phases.finish_step() == [{"exchange": 2.0}]


def test_an_inner_phase_is_taken_out_of_the_outer(clock: Clock) -> None:
    phases = Phases(torch.device("cpu"))
    with phases("objective"):
        clock.now += 1
        with phases("exchange"):
            clock.now += 2
        clock.now += 4
    assert phases.finish_step() == [{"objective": 5.0, "exchange": 2.0}]


def test_an_error_ends_its_phase(clock: Clock) -> None:
    phases = Phases(torch.device("cpu"))

    def fail() -> None:
        with phases("exchange"):
            clock.now += 1
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    clock.now += 2
    assert phases.finish_step() == [{"exchange": 1.0}]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_work_on_a_gpu_is_timed_where_it_is_done() -> None:
    device = torch.device("cuda")
    phases = Phases(device)
    with phases("exchange"):
        torch.cuda._sleep(100_000_000)  # type: ignore[no-untyped-call]
    with phases("objective"):
        pass
    torch.cuda.synchronize()
    (seconds,) = phases.finish_step()
    assert seconds["exchange"] > 10 * seconds["objective"]
