import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from cluster.errors import ClusterError, WorkerLostError
from cluster.failures import capture
from cluster.group import Worker
from cluster.launch import launch
from cluster.settings import LaunchConfig
from tests.ray_cluster import (
    CHECKOUT,
    RayCluster,
    free_port,
    processes_of_this_block,
    ray_head,
    wait_until,
)

HERE = LaunchConfig(num_workers=0)
TWO = LaunchConfig(num_workers=2)


class ImageError(ValueError):
    """Stands for the errors of a program that uses the launcher."""


def describe_worker(worker: Worker, scale: float) -> dict[str, object]:
    """What this worker is, and what the group sums up to."""
    total = torch.tensor([scale * (worker.rank + 1)])
    ranks: list[object] = [None] * worker.world_size
    if worker.world_size > 1:
        dist.all_reduce(total)
        dist.all_gather_object(
            ranks, (worker.rank, worker.local_rank, worker.local_world_size, worker.node_rank)
        )
    Path(f"rank-{worker.rank}").touch()
    logging.getLogger(__name__).info("rank %d informs", worker.rank)
    logging.getLogger(__name__).warning("rank %d warns", worker.rank)
    return {
        "sum": total.item(),
        "ranks": ranks,
        "device": str(worker.device),
        "threads": torch.get_num_threads(),
        "directory": str(Path.cwd()),
    }


def raise_on_last(worker: Worker, error: BaseException) -> None:
    if worker.rank == worker.world_size - 1:
        raise error
    dist.barrier()  # which the last rank never joins


def die_once(worker: Worker, marks: Path) -> int:
    """Kill rank 1 of the first group; later groups return how many came before."""
    groups_before = len(list(marks.iterdir()))
    assert worker.restarts == groups_before
    dist.barrier()
    if worker.is_rank_zero:
        (marks / str(groups_before)).touch()
    dist.barrier()
    if groups_before == 0 and worker.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        dist.barrier()
    except RuntimeError as error:
        if not capture(error).lost_peer:
            raise ValueError("not recognized as the consequence of a lost worker") from error
        raise
    return groups_before


def report_and_sleep(worker: Worker, marks: Path) -> None:
    (marks / str(worker.rank)).touch()
    time.sleep(600)


@pytest.fixture
def on_cluster(ray_cluster: RayCluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster.address)
    monkeypatch.chdir(tmp_path)


def test_zero_workers_is_a_plain_call_in_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = launch(describe_worker, 3.0, HERE, name="test", storage=tmp_path)
    assert result["sum"] == 3.0
    assert not dist.is_initialized()
    with pytest.raises(ImageError, match="no such image"):
        launch(raise_on_last, ImageError("no such image"), HERE, name="test", storage=tmp_path)
    assert not (tmp_path / ".ray").exists()


@pytest.mark.parametrize("config", [HERE, TWO])
def test_results_are_not_left_in_what_ray_deletes(config: LaunchConfig, tmp_path: Path) -> None:
    storage = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1" / "runs"
    with pytest.raises(ClusterError, match=r"which Ray deletes; give an absolute path .*\(--run-dir\)"):
        launch(describe_worker, 1.0, config, name="test", storage=storage)


def test_ray_is_not_imported_for_zero_workers(tmp_path: Path) -> None:
    program = f"""
import sys
from pathlib import Path
from cluster.launch import launch
from cluster.settings import LaunchConfig
def function(worker, payload):
    assert worker.world_size == 1
launch(function, None, LaunchConfig(num_workers=0), name="test", storage=Path({str(tmp_path)!r}))
assert "ray" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], cwd=CHECKOUT, check=True)


@pytest.mark.usefixtures("on_cluster")
def test_two_workers_form_a_group(tmp_path: Path) -> None:
    config = LaunchConfig(num_workers=2, cpus_per_worker=1)
    result = launch(describe_worker, 0.5, config, name="test", storage=Path("state"))
    assert result == {
        "sum": 1.5,
        "ranks": [(0, 0, 2, 0), (1, 1, 2, 0)],
        "device": "cpu",
        "threads": 1,
        "directory": str(tmp_path),
    }
    # Relative paths lead to the caller's directory, and Ray Train's files to one place in it.
    assert {path.name for path in tmp_path.iterdir()} == {"rank-0", "rank-1", "state"}
    assert [path.name for path in (tmp_path / "state").iterdir()] == [".ray"]


@pytest.mark.usefixtures("on_cluster")
def test_open_settings_follow_the_cluster(tmp_path: Path) -> None:
    result = launch(describe_worker, 1.0, LaunchConfig(num_workers=1), name="test", storage=tmp_path)
    assert (result["sum"], result["threads"]) == (1.0, 2)


@pytest.mark.usefixtures("on_cluster")
def test_exception_of_one_rank_ends_the_others_and_comes_back_as_it_was(tmp_path: Path) -> None:
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(ImageError) as caught:
        launch(raise_on_last, ImageError("no such image"), TWO, name="test", storage=tmp_path)
    assert str(caught.value) == "no such image"
    assert caught.value.__notes__ == ["(raised on rank 1 of 2)"]
    assert "in raise_on_last" in str(caught.value.__cause__)
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.usefixtures("on_cluster")
def test_killed_worker_is_named_and_the_group_restarted_where_allowed(tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    with pytest.raises(WorkerLostError, match="rank 1 of 2 died: its worker process has died"):
        launch(die_once, marks, TWO, name="test", storage=tmp_path)
    for mark in marks.iterdir():
        mark.unlink()
    config = LaunchConfig(num_workers=2, max_restarts=1)
    assert launch(die_once, marks, config, name="test", storage=tmp_path) == 1


@pytest.mark.usefixtures("on_cluster")
def test_request_that_can_never_fit_is_refused(tmp_path: Path) -> None:
    def refused(config: LaunchConfig) -> str:
        with pytest.raises(ClusterError) as caught:
            launch(describe_worker, 1.0, config, name="test", storage=tmp_path)
        return str(caught.value)

    assert refused(LaunchConfig(num_workers=3)) == (
        "asked for 3 workers of 1 CPU each (PACK), but the cluster has room for 2: 1 node with 2 CPUs; "
        "ask for --num-workers 2 or fewer, or for less with --cpus-per-worker"
    )
    assert "lower --cpus-per-worker" in refused(LaunchConfig(cpus_per_worker=3))
    assert "--gpus-per-worker 0" in refused(LaunchConfig(gpus_per_worker=1))
    assert "room for 1" in refused(LaunchConfig(num_workers=2, strategy="STRICT_SPREAD"))


@pytest.mark.usefixtures("on_cluster")
def test_elastic_group_has_an_allowed_number_of_workers_that_fits(tmp_path: Path) -> None:
    config = LaunchConfig(num_workers=4, min_workers=1, cpus_per_worker=1)
    for allowed, started in (((1, 2, 4), 2), ((1, 3, 4), 1)):
        result = launch(
            describe_worker, 1.0, config, name="test", storage=tmp_path, is_allowed=allowed.__contains__
        )
        ranks = result["ranks"]
        assert isinstance(ranks, list)
        assert len(ranks) == started
    with pytest.raises(ClusterError, match="no number of workers from 1 to 4 divides the work evenly"):
        launch(
            describe_worker, 1.0, config, name="test", storage=tmp_path, is_allowed=lambda number: number > 4
        )


@pytest.mark.usefixtures("on_cluster")
def test_wait_for_busy_resources_is_bounded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import ray
    from ray.util.placement_group import placement_group

    ray.init()
    with contextlib.ExitStack() as stack:
        stack.callback(ray.shutdown)
        assert placement_group([{"CPU": 2}]).wait(60)
        with pytest.raises(ClusterError, match=r"waited 2 s for 1 worker .* free are 0 CPUs"):
            launch(describe_worker, 1.0, LaunchConfig(num_workers=1, wait_s=2), name="test", storage=tmp_path)
        assert ray.is_initialized()  # whoever connected shall disconnect


@pytest.mark.ray
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine whose GPUs PyTorch cannot use")
def test_gpu_that_pytorch_cannot_use_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a driver that is too old: Ray counts the GPU all the same."""
    config = LaunchConfig(num_workers=1, gpus_per_worker=1, max_restarts=3)
    with ray_head(num_cpus=2, num_gpus=1) as cluster:
        for name, value in (cluster.environment | {"RAY_ADDRESS": cluster.address}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ClusterError, match=r"PyTorch sees none .*driver") as raised:
            launch(describe_worker, 1.0, config, name="none", storage=tmp_path)
    assert not isinstance(raised.value, WorkerLostError)  # which would be tried again


@pytest.mark.ray
def test_cluster_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ClusterError, match=f"RAY_ADDRESS is '{address}'.*refused"):
        launch(describe_worker, 1.0, TWO, name="test", storage=tmp_path)


@pytest.mark.ray
def test_address_of_jobs_is_not_that_of_the_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with pytest.raises(ClusterError, match=r"`ray job submit --address http://127.0.0.1:8265 .*HOST:6379"):
        launch(describe_worker, 1.0, TWO, name="test", storage=tmp_path)


@pytest.mark.ray
def test_too_long_a_name_for_rays_sockets_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / ("x" * 90)
    directory.mkdir()
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setenv("RAY_TMPDIR", str(directory))
    with pytest.raises(ClusterError, match=f"{directory}, the directory for temporary files.*RAY_TMPDIR"):
        launch(describe_worker, 1.0, TWO, name="test", storage=tmp_path)


def test_submitted_job_runs_on_the_cluster(ray_cluster: RayCluster, tmp_path: Path) -> None:
    job = ray_cluster.submit("python", "-m", "tests.cluster.test_launch", str(tmp_path))
    assert job.returncode == 0, job.stdout
    assert "the sum is 1.5" in job.stdout
    assert [path.name for path in tmp_path.iterdir()] == [".ray"]

    job = ray_cluster.submit("python", "-m", "tests.cluster.test_launch", "results")
    assert job.returncode == 1
    assert "give an absolute path" in job.stdout


@pytest.mark.ray
def test_own_cluster_leaves_nothing_running(tmp_path: Path) -> None:
    environment: dict[str, str] = {}
    with processes_of_this_block(environment) as alive:
        program = subprocess.run(
            [sys.executable, "-m", "tests.cluster.test_launch", str(tmp_path)],
            cwd=tmp_path,
            env=os.environ | environment | {"RAY_ADDRESS": "local", "PYTHONPATH": str(CHECKOUT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=True,
        )
        wait_until(lambda: not alive(), timeout_s=30)
    # Rank 0 speaks, the others only warn, and Ray says nothing.
    lines = [line.partition("] ")[2] or line for line in program.stdout.splitlines()]
    expected = ["INFO rank 0 informs", "WARNING rank 0 warns", "WARNING rank 1 warns", "the sum is 1.5"]
    assert sorted(lines) == sorted(expected), program.stdout


@pytest.mark.ray
def test_interrupt_stops_workers_and_cluster(tmp_path: Path) -> None:
    environment: dict[str, str] = {}
    with processes_of_this_block(environment) as alive:
        program = subprocess.Popen(
            [sys.executable, "-m", "tests.cluster.test_launch", str(tmp_path), "sleep"],
            cwd=CHECKOUT,
            env=os.environ | environment | {"RAY_ADDRESS": "local"},
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_until(lambda: {"0", "1"} <= {path.name for path in tmp_path.iterdir()}, timeout_s=120)
        program.send_signal(signal.SIGINT)
        assert program.stderr is not None
        # The function does not ask whether to stop, so the first signal has no effect.
        for line in program.stderr:
            if "a second signal kills them" in line:
                break
        program.send_signal(signal.SIGINT)
        _, errors = program.communicate(timeout=60)
        assert program.returncode == -signal.SIGINT, errors
        assert errors.rstrip().endswith("KeyboardInterrupt")
        wait_until(lambda: not alive(), timeout_s=30)


@pytest.mark.parametrize(
    "setting",
    [
        {"num_workers": -1},
        {"cpus_per_worker": 0},
        {"gpus_per_worker": 2},
        {"wait_s": 0},
        {"wait_s": float("nan")},
        {"max_restarts": -1},
        {"min_workers": 0},
        {"min_workers": 3, "num_workers": 2},
        {"stop_grace_s": -1},
    ],
)
def test_config_refuses_what_no_cluster_has(setting: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        LaunchConfig(**setting)  # type: ignore[arg-type]


def main(storage: str, action: str = "describe") -> None:
    """What the tests above run as a program of its own."""
    if action == "sleep":
        launch(report_and_sleep, Path(storage), LaunchConfig(), name="test", storage=Path(storage))
    else:
        result = launch(describe_worker, 0.5, LaunchConfig(), name="test", storage=Path(storage))
        print("the sum is", result["sum"])


if __name__ == "__main__":
    main(*sys.argv[1:])
