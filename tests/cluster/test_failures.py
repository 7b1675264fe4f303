import mmap
import os
import pickle
import signal
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from cluster.errors import ClusterError, WorkerLostError
from cluster.failures import WorkerFailure, capture, failed_start, out_of_memory, raise_root_cause
from tests.processes import run_ranks
from tests.ray_cluster import wait_until


class PickyError(ValueError):
    """Cannot be rebuilt from `args`, as many exceptions that build their own message."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")


def caught(error: BaseException, *, behind: BaseException | None = None) -> WorkerFailure:
    """What the driver gets when a worker raises `error` while handling `behind`."""
    try:
        try:
            if behind is not None:
                raise behind
        finally:
            raise error
    except BaseException as raised:
        failure: WorkerFailure = pickle.loads(pickle.dumps(capture(raised)))
        return failure


PEER = RuntimeError(
    "[/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:36063. This is typically caused by a "
    "remote worker hanging or bugs in the application. Check the logs of the remote worker"
)


def test_error_travels_with_its_type_message_and_traceback() -> None:
    failure = caught(KeyError("temperature"))
    assert type(failure.error) is KeyError
    assert failure.error.args == ("temperature",)
    assert "in caught" in failure.trace
    assert not failure.lost_peer


@pytest.mark.parametrize("error", [PickyError("a.png", "empty"), SystemExit(0), KeyboardInterrupt("stop")])
def test_error_that_cannot_be_raised_again_is_quoted(error: BaseException) -> None:
    failure = caught(error)
    assert type(failure.error) is ClusterError
    assert str(failure.error) == f"{type(error).__name__} in the worker function: {error}"


def test_lost_peer_is_seen_through_the_error_that_wraps_it() -> None:
    assert caught(PEER).lost_peer
    assert caught(ClusterError("exchange failed"), behind=PEER).lost_peer
    assert not caught(ValueError("Connection closed by peer")).lost_peer


def time_out(rank: int, world_size: int) -> WorkerFailure | None:
    """Stop rank 1, and return what rank 0 makes of the collective that rank 1 never joins."""
    impatient = dist.new_group(timeout=timedelta(seconds=1))
    dist.barrier(impatient)
    pids: list[int] = [0] * world_size
    dist.all_gather_object(pids, os.getpid())
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
        return None
    failure = None
    try:
        dist.all_reduce(torch.ones(1), group=impatient)
    except RuntimeError as error:
        failure = capture(error)
    wait_until(lambda: "T (stopped)" in Path(f"/proc/{pids[1]}/status").read_text(), timeout_s=30)
    os.kill(pids[1], signal.SIGCONT)
    return failure


def test_hung_peer_is_lost(tmp_path: Path) -> None:
    failure, _ = run_ranks(2, time_out)
    assert failure.lost_peer
    with pytest.raises(
        WorkerLostError, match=r"rank 0 of 2 lost .*Timed out.* --collective-timeout-s allows"
    ):
        raise_root_cause({0: failure}, 2, tmp_path)


# The words of NCCL's watchdog, for which a GPU is needed.
WATCHDOG = RuntimeError(
    "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE, NumelIn=1, "
    "NumelOut=1, Timeout(ms)=10000) ran for 10003 milliseconds before timing out."
)
PAIR = RuntimeError("Application timeout caused pair closure")  # gloo's for all collectives after a timeout

# What the backends of NCCL of PyTorch say, found in its library.
NCCL_TIMEOUTS = [
    "NCCL operation timed out",
    "Watchdog caught collective operation timeout: ",
    "timed out in blocking wait.",
    "milliseconds before timing out.",
    "NCCL timeout in: ",
]
NCCL_LOSSES = [
    "NCCL operation failed",
    "NCCL communicator was aborted on rank ",
    "Some NCCL operations have failed or timed out. ",
    "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
]


@pytest.mark.parametrize("message", [*NCCL_TIMEOUTS, *NCCL_LOSSES])
def test_what_nccl_says_of_a_lost_peer_is_known(message: str, tmp_path: Path) -> None:
    failure = caught(RuntimeError(message))
    assert failure.lost_peer
    said = "--collective-timeout-s" if message in NCCL_TIMEOUTS else "lost another worker"
    with pytest.raises(WorkerLostError, match=said):
        raise_root_cause({0: failure}, 2, tmp_path)


def test_pytorch_still_says_so() -> None:
    library = Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as contents:
        for message in [*NCCL_TIMEOUTS, *NCCL_LOSSES]:
            assert contents.find(message.encode()) >= 0, message


class OtherSideError(RuntimeError):
    """What Ray Train raises where forming the group raised `cause` in a worker."""

    def __init__(self, cause: Exception | None) -> None:
        super().__init__("Training failed due to controller error:\na page of text\nthe last line\n")
        self.controller_failure = self
        self.cause = cause


def test_a_start_that_no_second_attempt_would_mend_is_not_repeated() -> None:
    own = failed_start(OtherSideError(RuntimeError("nccl2 requires at least one CUDA device")))
    assert type(own) is ClusterError
    assert str(own) == "the workers cannot start: nccl2 requires at least one CUDA device"
    for cause in (None, PEER, RuntimeError("The client socket has timed out after 600000ms")):
        lost = failed_start(OtherSideError(cause))
        assert type(lost) is WorkerLostError
        assert str(lost) == "the worker group did not start: the last line"


@pytest.mark.parametrize("error", [WATCHDOG, PAIR])
def test_timeouts_are_seen_through_the_error_that_wraps_them(error: RuntimeError, tmp_path: Path) -> None:
    failure = caught(ClusterError("exchange failed"), behind=error)
    assert failure.lost_peer
    with pytest.raises(WorkerLostError, match="--collective-timeout-s"):
        raise_root_cause({1: failure}, 2, tmp_path)


def test_own_error_comes_before_death_and_lost_peers_and_low_ranks_before_high(tmp_path: Path) -> None:
    dead = RuntimeError("The actor is dead because it was killed. Some common causes include: (1) …")
    failures = {0: caught(PEER), 1: dead, 2: caught(ValueError("second")), 3: caught(ValueError("third"))}
    with pytest.raises(ValueError, match="second") as own:
        raise_root_cause(failures, 4, tmp_path)
    assert own.value.__notes__ == ["(raised on rank 2 of 4)"]
    with pytest.raises(WorkerLostError, match=r"^rank 1 of 4 died: it was killed \("):
        raise_root_cause({0: failures[0], 1: dead}, 4, tmp_path)
    with pytest.raises(
        WorkerLostError, match=r"rank 0 of 4 lost another worker: Connection closed by peer \S+$"
    ):
        raise_root_cause({0: failures[0], 3: caught(PEER)}, 4, tmp_path)


# What Ray 2.60 reported of a worker that it killed, on a node whose threshold was set to 22%.
OUT_OF_MEMORY = (Path(__file__).parent / "out_of_memory.txt").read_text().rstrip()
SHORTENED = (
    "out of memory on node 192.0.2.2: 5.27 of 23.54 GB used, most by ray::RayTrainWorker 1.41 GB, "
    "python -m benchmarks.images --photos imagenet-sample-160.tar 1.20 GB, python oom.py 0.39 GB; "
    "use fewer processes per node, a smaller batch or nodes with more memory"
)


def test_report_of_memory_is_shortened_and_kept(tmp_path: Path) -> None:
    directory = tmp_path / "run" / ".ray"
    with pytest.raises(WorkerLostError) as lost:
        raise_root_cause({0: caught(PEER), 1: RuntimeError(OUT_OF_MEMORY)}, 2, directory)
    kept = directory / "out-of-memory.txt"
    assert str(lost.value) == f"rank 1 of 2 died: {SHORTENED} (Ray's report: {kept})"
    assert kept.read_text() == OUT_OF_MEMORY + "\n"


def test_report_of_memory_that_cannot_be_kept_is_shortened_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    assert out_of_memory(OUT_OF_MEMORY, tmp_path / "file") == SHORTENED
    assert "Ray's report cannot be written to" in caplog.text


def test_other_reports_are_not_of_memory() -> None:
    assert out_of_memory("The actor is dead because its node has died.") is None
