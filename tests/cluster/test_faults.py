"""Runs that lose workers and nodes, or are told to stop: a real cluster, and a function that counts."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from cluster.placement import WorkerGroup
from cluster.session import ray_session
from cluster.stopping import StopSignals
from tests.cluster.counting import Count, counting_program, ray_node
from tests.ray_cluster import CHECKOUT, RayCluster, ray_head, wait_until

RAYS_PATIENCE_S = 3  # between the signal and SIGKILL, where RAY_JOB_STOP_WAIT_TIME_S is not set
RAY = str(Path(sys.executable).parent / "ray")


def on(cluster: RayCluster) -> dict[str, str]:
    return cluster.environment | {"RAY_ADDRESS": cluster.address}


def stopped_at(said: str, reason: str) -> int:
    """The number at which the program says that it was stopped."""
    found = re.search(rf"stopped by {reason} at number (\d+); the next run resumes from there", said)
    assert found is not None, said
    assert "Traceback" not in said
    return int(found[1])


@pytest.mark.ray
def test_elastic_group_shrinks_grows_and_leaves_a_drained_node(tmp_path: Path) -> None:
    job = Count(tmp_path)
    config = {"num_workers": 2, "min_workers": 1, "cpus_per_worker": 1, "max_restarts": 1}
    with ExitStack() as stack:
        cluster = stack.enter_context(ray_head(num_cpus=0))
        second, third = (stack.enter_context(ray_node(cluster, f"127.0.0.{number}")) for number in (2, 3))
        program = stack.enter_context(counting_program(job, config, on(cluster)))
        job.wait_for_group(0)
        third.kill()
        job.wait_for_group(1)
        fourth = stack.enter_context(ray_node(cluster, "127.0.0.4"))
        group = job.wait_for_group(2)
        (drained,) = (worker["node_id"] for worker in group["workers"] if worker["node"] == second.ip)
        drain = [RAY, "drain-node", f"--address={cluster.address}", f"--node-id={drained}"]
        drain += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=test"]
        subprocess.run(
            [*drain, "--deadline-remaining-seconds=120"], env=os.environ | cluster.environment, check=True
        )
        job.wait_for_group(3)
        job.enough()
        said, _ = program.communicate(timeout=120)
    assert program.returncode == 0, said
    nodes = [sorted(worker["node"] for worker in group["workers"]) for group in job.groups]
    assert nodes == [[second.ip, third.ip], [second.ip], [second.ip, fourth.ip], [fourth.ip]]
    # What was lost is named; where there was time to save, no number was counted twice.
    assert "resuming from the last snapshot (restart 1 of 1)" in said
    begins = [group["begin"] for group in job.groups]
    assert (
        f"there is room for 2 workers instead of 1: saved at number {begins[2]}, resuming from there" in said
    )
    drain_line = rf"node {drained[:8]} is being drained, \d+ s left: saved at number {begins[3]}, resuming"
    assert re.search(drain_line, said), said


@pytest.mark.ray
def test_elastic_group_gets_the_nodes_that_a_growing_cluster_adds(tmp_path: Path) -> None:
    job = Count(tmp_path)
    config = {"num_workers": 3, "min_workers": 1, "cpus_per_worker": 1, "autoscaling": True}
    with ray_head(num_cpus=0, grows_to=3) as cluster, counting_program(job, config, on(cluster)) as program:
        begun = len(job.wait_for_group(0)["workers"])
        wait_until(lambda: len(job.groups[-1]["workers"]) == 3, timeout_s=240)
        job.enough()
        said, _ = program.communicate(timeout=120)
    assert program.returncode == 0, said
    assert begun == 1
    assert "there is room for 3 workers instead of" in said


@pytest.mark.ray
def test_strictly_spread_group_grows_to_other_nodes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    from ray.util.placement_group import placement_group

    from cluster.capacity import can_grow

    with ray_head(num_cpus=2) as cluster, monkeypatch.context() as patch:
        patch.setenv("RAY_ADDRESS", cluster.address)
        with ray_session():
            running = placement_group([{"CPU": 1.0}], "STRICT_SPREAD")
            ray.get(running.ready())
            assert can_grow(WorkerGroup(2, 1, 0, "PACK"), 1)
            assert not can_grow(WorkerGroup(2, 1, 0, "STRICT_SPREAD"), 1)
            with ray_node(cluster, "127.0.0.2"):
                assert can_grow(WorkerGroup(2, 1, 0, "STRICT_SPREAD"), 1)
                assert not can_grow(WorkerGroup(3, 1, 0, "STRICT_SPREAD"), 2)


def test_worker_that_is_sent_sigterm_saves_first(ray_cluster: RayCluster, tmp_path: Path) -> None:
    job = Count(tmp_path)
    with counting_program(job, {"num_workers": 2}, on(ray_cluster)) as program:
        os.kill(job.wait_for_group(0)["workers"][1]["pid"], signal.SIGTERM)
        begin = job.wait_for_group(1)["begin"]
        job.enough()
        said, _ = program.communicate(timeout=120)
    assert program.returncode == 0, said
    assert job.groups[1]["restarts"] == 0
    assert f"rank 1 was sent SIGTERM: saved at number {begin}, resuming from there" in said


def test_worker_that_is_sent_sigusr1_says_where_it_is(ray_cluster: RayCluster, tmp_path: Path) -> None:
    job = Count(tmp_path)
    with counting_program(job, {"num_workers": 2}, on(ray_cluster)) as program:
        (worker,) = job.wait_for_group(0)["workers"][1:]
        assert Path(f"/proc/{worker['pid']}/comm").read_text().startswith("ray::RayTrainWo")
        os.kill(worker["pid"], signal.SIGUSR1)
        sent = job.value
        wait_until(lambda: job.value > sent + 40, timeout_s=60)  # it went on, and Ray had the time to show it
        job.enough()
        said, _ = program.communicate(timeout=120)
    assert program.returncode == 0, said
    assert len(job.groups) == 1
    assert re.search(r'counting.py", line \d+ in count', said), said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_signal_lets_the_workers_save_and_the_next_run_goes_on(
    ray_cluster: RayCluster, tmp_path: Path, number: signal.Signals, num_workers: int
) -> None:
    job = Count(tmp_path)
    with counting_program(job, {"num_workers": num_workers}, on(ray_cluster)) as program:
        job.wait_for_group(0)
        program.send_signal(number)
        said, _ = program.communicate(timeout=120)
    assert program.returncode == 130, said
    assert stopped_at(said, number.name) == job.value
    job.enough()
    with counting_program(job, {"num_workers": 0}, {}) as program:
        said, _ = program.communicate(timeout=120)
    assert said == f"counted to {job.groups[1]['begin']}\n"


@pytest.mark.ray
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_or_a_closed_terminal_reaches_all_processes_and_the_workers_save(
    tmp_path: Path, number: signal.Signals
) -> None:
    job = Count(tmp_path)
    with counting_program(job, {"num_workers": 2}, {"RAY_ADDRESS": "local"}) as program:
        job.wait_for_group(0)
        os.killpg(program.pid, number)
        said, _ = program.communicate(timeout=120)
    assert stopped_at(said, number.name) == job.value


@pytest.mark.parametrize(
    ("name", "settings"),
    [("SIGTERM", {}), ("SIGINT", {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "60"})],
)
def test_job_that_is_stopped_saves_also_what_takes_longer_than_rays_patience(
    ray_cluster: RayCluster, tmp_path: Path, name: str, settings: dict[str, str]
) -> None:
    job = Count(tmp_path)
    environment = os.environ | ray_cluster.environment | {"RAY_ADDRESS": ray_cluster.dashboard}

    def ray_job(*arguments: str) -> str:
        command = [RAY, "job", *arguments]
        return subprocess.run(
            command, cwd=CHECKOUT, env=environment, check=True, stdout=subprocess.PIPE, text=True
        ).stdout

    submission = f"{name}-{tmp_path.name}"
    submit = ["submit", "--no-wait", "--working-dir", str(CHECKOUT), "--submission-id", submission]
    program = ["python", "-m", "tests.cluster.counting", str(tmp_path), '{"num_workers": 2}']
    ray_job(*submit, "--runtime-env-json", json.dumps({"env_vars": settings}), "--", *program)
    slow = job.wait_for_group(0)["workers"][1]["pid"]
    os.kill(slow, signal.SIGSTOP)
    threading.Timer(RAYS_PATIENCE_S + 3, os.kill, (slow, signal.SIGCONT)).start()
    ray_job("stop", submission)
    assert stopped_at(ray_job("logs", submission), name) == job.value


def test_job_that_ray_will_kill_early_says_so(ray_cluster: RayCluster, tmp_path: Path) -> None:
    job = Count(tmp_path)
    job.enough()
    command = ["env", "RAY_JOB_STOP_WAIT_TIME_S=8", "python", "-m", "tests.cluster.counting", str(tmp_path)]
    done = ray_cluster.submit(*command, '{"num_workers": 2}')
    assert "`ray job stop` kills this job after 8 s, less than the 60 s of --stop-grace-s" in done.stdout
    assert "counted to 0" in done.stdout


def test_hung_worker_is_reported(ray_cluster: RayCluster, tmp_path: Path) -> None:
    job = Count(tmp_path)
    config = {"num_workers": 2, "collective_timeout_s": 5}
    with counting_program(job, config, on(ray_cluster)) as program:
        hung = job.wait_for_group(0)["workers"][1]["pid"]
        os.kill(hung, signal.SIGSTOP)
        said, _ = program.communicate(timeout=120)
        wait_until(lambda: not Path(f"/proc/{hung}").exists(), timeout_s=60)
    assert program.returncode == 1
    assert "rank 0 of 2 lost another worker: Timed out waiting 5000ms" in said
    assert "another worker hangs, or needs longer than --collective-timeout-s allows" in said


def test_signals_interrupt_where_nothing_can_be_saved() -> None:
    with StopSignals(grace_s=60) as signals:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        assert signals.reason == "SIGTERM"
    with StopSignals(grace_s=0) as signals, signals.passed_on(print), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_second_signal_and_the_end_of_the_grace_interrupt() -> None:
    asked: list[str] = []
    with StopSignals(grace_s=60) as signals, signals.passed_on(asked.append):
        os.kill(os.getpid(), signal.SIGINT)
        wait_until(lambda: asked == ["SIGINT"], timeout_s=30)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    with StopSignals(grace_s=0.1) as signals, signals.passed_on(asked.append):
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            time.sleep(60)
    assert asked == ["SIGINT", "SIGTERM"]
