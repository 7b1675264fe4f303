"""What is exported, where, and that nothing about it stops the program."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import socket
import sys
import threading
import time
import urllib.request
from pathlib import Path

import prometheus_client
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.metrics import Metrics, exported, remove_targets
from cluster.settings import MetricsConfig
from instdisc.common.metrics import EVALUATION, TRAINING
from tests.ray_cluster import free_port, killed_at_last, wait_until


def scrape(address: str) -> dict[str, float]:
    """Every sample by name, labels checked; of histograms count, sum and buckets by their bound."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as response:
        text = response.read().decode()
    samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = dict(sample.labels)
            bound = labels.pop("le", None)
            assert labels == {"run": "blue", "rank": "3"}
            samples[sample.name if bound is None else f"{sample.name}{{{bound}}}"] = sample.value
    return samples


def test_recorded_values_are_served_and_the_file_is_there_meanwhile(tmp_path: Path) -> None:
    metrics = Metrics(TRAINING, run="blue", rank=3)
    metrics.observe("step_seconds", 0.03)
    metrics.observe("step_seconds", 0.07)
    metrics.add("images_total", 256)
    metrics.set(loss=5.5, knn_accuracy_ratio=None)
    config = MetricsConfig(port=free_port())
    with exported(metrics, config, local_rank=0, world_size=4, directory=tmp_path / "targets") as endpoint:
        assert endpoint is not None
        samples = scrape(endpoint.address)
        (file,) = (tmp_path / "targets").iterdir()
        assert json.loads(file.read_text()) == [
            {"targets": [endpoint.address], "labels": {"run": "blue", "rank": "3"}}
        ]
    assert samples["instdisc_step_seconds_count"] == 2
    assert samples["instdisc_step_seconds_sum"] == pytest.approx(0.1)
    assert samples["instdisc_step_seconds_bucket{0.05}"] == 1
    assert samples["instdisc_images_total"] == 256
    assert samples["instdisc_loss"] == 5.5
    assert samples["instdisc_corrupt_images_total"] == 0
    assert "instdisc_knn_accuracy_ratio" not in samples
    assert not any(name.endswith("_created") for name in samples)
    assert list((tmp_path / "targets").iterdir()) == []
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://{endpoint.address}/metrics", timeout=10)


def test_age_counts_from_its_timestamp() -> None:
    metrics = Metrics(TRAINING, run="blue", rank=0)
    labels = {"run": "blue", "rank": "0"}
    assert metrics.registry.get_sample_value("instdisc_snapshot_age_seconds", labels) is None
    metrics.set(snapshot_timestamp_seconds=time.time() - 100)
    first = metrics.registry.get_sample_value("instdisc_snapshot_age_seconds", labels)
    second = metrics.registry.get_sample_value("instdisc_snapshot_age_seconds", labels)
    assert first is not None
    assert second is not None
    assert 100 <= first < second
    metrics.set(snapshot_timestamp_seconds=time.time() + 1000)
    age = metrics.registry.get_sample_value("instdisc_snapshot_age_seconds", labels)
    assert age is not None
    assert age < 0


def test_names_are_unique_and_in_base_units() -> None:
    names = [metric.name for metric in TRAINING.metrics + EVALUATION.metrics]
    assert len(names) == len(set(names))
    for metric in TRAINING.metrics + EVALUATION.metrics:
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name
        assert metric.kind != "histogram" or metric.name.endswith("_seconds"), metric.name
        assert not metric.name.endswith(("_ms", "_percent", "_mb", "_count")), metric.name


@pytest.mark.parametrize("call", ["set", "add", "observe"])
def test_unknown_name_is_refused(call: str) -> None:
    metrics = Metrics(TRAINING, run="blue", rank=0)
    with pytest.raises(KeyError, match="speed"):
        metrics.set(speed=1.0) if call == "set" else getattr(metrics, call)("speed", 1.0)


@pytest.mark.slow
def test_taken_ports_are_passed_over(tmp_path: Path) -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", port)):
        metrics = Metrics(TRAINING, run="blue", rank=3)
        config = MetricsConfig(port=port)
        with exported(metrics, config, local_rank=0, world_size=4, directory=tmp_path) as endpoint:
            assert endpoint is not None
            assert port < int(endpoint.address.rpartition(":")[2]) < port + 16
            assert scrape(endpoint.address)


def test_a_port_that_a_predecessor_still_holds_is_waited_for(tmp_path: Path) -> None:
    port = free_port()
    predecessor = socket.create_server(("127.0.0.1", port))
    threading.Timer(1, predecessor.close).start()
    metrics = Metrics(TRAINING, run="blue", rank=3)
    with exported(
        metrics, MetricsConfig(port=port), local_rank=0, world_size=4, directory=tmp_path
    ) as endpoint:
        assert endpoint is not None
        assert endpoint.address == f"127.0.0.1:{port}"


@pytest.mark.slow
def test_no_free_port_costs_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    last = 65_535
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # then somebody else has it
            stack.enter_context(socket.create_server(("127.0.0.1", last)))
        metrics = Metrics(TRAINING, run="blue", rank=535)
        config = MetricsConfig(port=65_000)
        with (
            caplog.at_level(logging.WARNING),
            exported(metrics, config, local_rank=535, world_size=536, directory=tmp_path) as endpoint,
        ):
            assert endpoint is None
            metrics.add("images_total", 8)
    (record,) = caplog.records
    assert "rank 535 serves no metrics: cannot listen on ports 65535 to 65550" in record.message
    assert "--metrics.port" in record.message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("port", [0, None])
def test_without_a_port_nothing_is_served_or_said(
    port: int | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = Metrics(TRAINING, run="blue", rank=0)
    with exported(
        metrics, MetricsConfig(port=port), local_rank=0, world_size=1, directory=tmp_path
    ) as endpoint:
        assert endpoint is None
    assert caplog.records == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("port", [-1, 80, 70_000])
def test_impossible_port_is_refused(port: int) -> None:
    with pytest.raises(ValueError, match=str(port)):
        MetricsConfig(port=port)


def test_directory_that_cannot_be_written_costs_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    metrics = Metrics(TRAINING, run="blue", rank=3)
    with exported(
        metrics,
        MetricsConfig(port=free_port()),
        local_rank=0,
        world_size=4,
        directory=tmp_path / "file" / "targets",
    ) as endpoint:
        assert endpoint is not None
        assert scrape(endpoint.address)
    (record,) = caplog.records
    assert "Prometheus will not find" in record.message


def test_a_smaller_group_drops_the_files_of_the_larger(tmp_path: Path) -> None:
    for name in ("rank-1.json", "rank-2.json", "rank-10.json", "evaluation-0.json", "mine.json"):
        (tmp_path / name).write_text("[]")
    metrics = Metrics(TRAINING, run="blue", rank=0)
    with exported(metrics, MetricsConfig(port=free_port()), local_rank=0, world_size=2, directory=tmp_path):
        names = {path.name for path in tmp_path.iterdir()}
    assert names == {"rank-0.json", "rank-1.json", "evaluation-0.json", "mine.json"}


def test_an_evaluation_is_no_worker_of_the_training_job(tmp_path: Path) -> None:
    metrics = Metrics(EVALUATION, run="blue", rank=0)
    with exported(metrics, MetricsConfig(port=free_port()), local_rank=0, world_size=1, directory=tmp_path):
        (target,) = json.loads((tmp_path / "evaluation-0.json").read_text())
    assert target["labels"] == {"run": "blue", "rank": "0", "job": "instdisc-evaluation"}


def test_a_successor_keeps_its_file_when_the_old_worker_ends(tmp_path: Path) -> None:
    metrics = Metrics(TRAINING, run="blue", rank=0)
    with exported(metrics, MetricsConfig(port=free_port()), local_rank=0, world_size=1, directory=tmp_path):
        (tmp_path / "rank-0.json").write_text("[]")
    assert (tmp_path / "rank-0.json").read_text() == "[]"


@pytest.mark.slow
def test_a_killed_worker_leaves_its_file_and_its_successor_renews_it(tmp_path: Path) -> None:
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom cluster.metrics import *\n"
        "from cluster.settings import MetricsConfig\nfrom instdisc.common.metrics import TRAINING\n"
        "with exported(Metrics(TRAINING, run='blue', rank=0), MetricsConfig(port=int(sys.argv[1])), local_rank=0,"
        " world_size=1, directory=Path(sys.argv[2])):\n    time.sleep(100)\n"
    )
    file = tmp_path / "rank-0.json"
    with killed_at_last([sys.executable, "-c", program, str(free_port()), str(tmp_path)]):
        wait_until(file.exists, timeout_s=60)
    left = file.read_text()
    metrics = Metrics(TRAINING, run="blue", rank=0)
    with exported(
        metrics, MetricsConfig(port=free_port()), local_rank=0, world_size=1, directory=tmp_path
    ) as endpoint:
        assert endpoint is not None
        assert file.read_text() != left
        assert json.loads(file.read_text())[0]["targets"] == [endpoint.address]
    assert not file.exists()


def test_two_runs_in_one_process_do_not_mix() -> None:
    first, second = (Metrics(TRAINING, run="blue", rank=rank) for rank in (0, 1))
    first.add("images_total", 5)
    value = second.registry.get_sample_value("instdisc_images_total", {"run": "blue", "rank": "1"})
    assert value == 0
    assert "instdisc" not in prometheus_client.generate_latest().decode()


def test_the_last_values_are_read_before_the_end_where_somebody_reads(tmp_path: Path) -> None:
    metrics = Metrics(TRAINING, run="blue", rank=3)
    config, seen = MetricsConfig(port=free_port()), []
    with exported(metrics, config, local_rank=0, world_size=1, directory=tmp_path) as endpoint:
        assert endpoint is not None
        endpoint.wait_until_read()  # nobody did yet
        for _ in range(2):
            seen.append(scrape(endpoint.address))
            time.sleep(0.3)
        metrics.set(loss=float("nan"))
        reader = threading.Timer(0.2, lambda: seen.append(scrape(endpoint.address)))
        reader.start()
        endpoint.wait_until_read()
        assert len(seen) == 3 or reader.is_alive()  # the answer may be under way to the reader
        reader.join()
        assert math.isnan(seen[2]["instdisc_loss"])
        endpoint.wait_until_read()  # returns although nobody reads any more


def test_files_that_nobody_expects_stop_nothing(tmp_path: Path) -> None:
    """A directory that stands for a target, a target of other bytes, and a run whose name is no text."""
    (tmp_path / "rank-7.json").mkdir()
    (tmp_path / "rank-5.json").touch()
    metrics = Metrics(TRAINING, run=os.fsdecode(b"r\xff3"), rank=0)
    config = MetricsConfig(port=free_port())
    with exported(metrics, config, local_rank=0, world_size=1, directory=tmp_path) as endpoint:
        assert endpoint is not None
        with urllib.request.urlopen(f"http://{endpoint.address}/metrics", timeout=10) as response:
            assert 'run="r\ufffd3"' in response.read().decode()
        (tmp_path / "rank-0.json").write_bytes(b"\xff\xfe")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank-0.json", "rank-7.json"]
    remove_targets(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["rank-7.json"]
