"""The rules are right, and everything they and the dashboard ask for is there in a real server."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.metrics import Metrics, exported
from cluster.settings import MetricsConfig
from deploy.grafana.charts import ROWS
from deploy.grafana.dashboard import dashboard
from instdisc.common.metrics import EVALUATION, PREFIX, TRAINING
from tests.debian import need
from tests.deploy.live import WatchedRun, watched_run
from tests.deploy.manifests import DEPLOY
from tests.deploy.prometheus import Prometheus, prometheus
from tests.ray_cluster import free_port, wait_until

RULES = [
    rule
    for group in yaml.safe_load((DEPLOY / "prometheus/rules.yml").read_text())["groups"]
    for rule in group["rules"]
]
ALERTS = [rule for rule in RULES if "alert" in rule]
DASHBOARD = json.loads((DEPLOY / "grafana/dashboard.json").read_text())
CHARTS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
CURVES = [panel for panel in CHARTS if panel["type"] == "xychart"]
EXPRESSIONS = [target["expr"] for panel in CHARTS for target in panel["targets"]]


def promtool(*arguments: str) -> None:
    done = subprocess.run(
        [need("promtool", package="prometheus"), *arguments],
        cwd=DEPLOY / "prometheus",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_configuration_and_rules_are_valid() -> None:
    promtool("check", "config", "prometheus.yml")
    promtool("check", "rules", "--lint=all", "--lint-fatal", "rules.yml")


def test_rules_do_what_their_tests_say() -> None:
    promtool("test", "rules", "rules.test.yml")


def test_every_alert_is_shown_to_fire_and_to_be_silent() -> None:
    tested: dict[str, list[bool]] = {}
    for group in yaml.safe_load((DEPLOY / "prometheus/rules.test.yml").read_text())["tests"]:
        for case in group["alert_rule_test"]:
            fires = bool(case.get("exp_alerts"))
            tested.setdefault(case["alertname"], []).append(fires)
            # Where the one run fires another with the same metrics does not.
            silent = any('run="good"' in each["series"] for each in group["input_series"])
            assert silent, group["name"]
    assert set(tested) == {alert["alert"] for alert in ALERTS}
    for name, fires in tested.items():
        assert set(fires) == {True, False}, name


def test_every_alert_says_what_is_wrong_and_names_a_heading_of_the_runbook() -> None:
    readme = (DEPLOY / "README.md").read_text()
    headings = re.findall(r"^### (.+)$", readme, flags=re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for alert in ALERTS:
        assert set(alert["annotations"]) == {"summary", "description", "runbook_url"}
        assert "{{" not in alert["annotations"]["summary"], "the same for all runs, to group by"
        assert all(
            label in alert["annotations"]["description"] for label in ("$labels.namespace", "$labels.run")
        )
        address, _, anchor = alert["annotations"]["runbook_url"].partition("#")
        assert re.fullmatch(r"https://\S+/deploy/README\.md", address)
        assert anchor in anchors, alert["alert"]
        assert alert["labels"]["severity"] in ("critical", "warning")


def test_runs_are_told_apart_by_cluster_and_namespace_everywhere() -> None:
    recorded = {rule["record"] for rule in RULES if "record" in rule}
    for name in recorded:
        assert re.fullmatch(r"cluster_namespace_run(_\w+)?:instdisc_\w+:\w+", name)
    expressions = [rule["expr"] for rule in RULES] + EXPRESSIONS
    for by in re.findall(r"\bby \(([^)]*)\)", " ".join(expressions)):
        ours = by.split(", ")
        assert "run" not in ours or ours[:3] == ["cluster", "namespace", "run"]
    used = re.findall(r"\w+:instdisc_\w+:\w+", " ".join(expressions))
    assert set(used) <= recorded
    for expression in EXPRESSIONS:
        assert 'cluster=~"$cluster", namespace=~"$namespace", run=~"$run"' in expression


def test_the_dashboard_shows_every_metric_and_stands_in_rows() -> None:
    rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert rows == list(ROWS)
    variables = [each["name"] for each in DASHBOARD["templating"]["list"]]
    assert variables == ["datasource", "cluster", "namespace", "run", "rank"]
    ours = re.sub(r"\w+:instdisc_\w+:\w+", "", " ".join(EXPRESSIONS))
    names = set(re.findall(rf"{PREFIX}\w+?(?=_sum|_count|_bucket|\b)", ours))
    assert names == {PREFIX + metric.name for metric in TRAINING.metrics + EVALUATION.metrics}
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    for panel in CHARTS:
        assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])


def test_the_dashboard_is_what_its_source_writes() -> None:
    written = (DEPLOY / "grafana/dashboard.json").read_text()
    assert written == dashboard(), "run python -m deploy.grafana.dashboard"


def filled(expression: str, **chosen: str) -> str:
    """An expression of the dashboard as Grafana asks it; all values of a variable that is not given."""
    values = {
        "cluster": ".*",
        "namespace": ".*",
        "run": "live",
        "rank": ".*",
        "__rate_interval": "2m",
    } | chosen
    for name, value in values.items():
        expression = expression.replace(f"${name}", value)
    assert not re.search(r"\$[a-z_]", expression)
    return expression


def test_only_the_gpus_and_nodes_of_the_chosen_runs_are_shown(tmp_path: Path) -> None:
    """As on Kubernetes, where Prometheus renames the labels in which the exporter says whose a GPU is."""
    where = 'cluster="c", namespace="n"'
    charts = {panel["title"]: panel["targets"][0]["expr"] for panel in CHARTS}
    gpu = 'DCGM_FI_DEV_GPU_UTIL{cluster="c", namespace="gpu-operator", pod="dcgm", exported_namespace="n"'
    series = {
        f'instdisc_world_size{{{where}, run="live", rank="0", pod="ours", instance="10.0.0.1:9500"}}': "1x9",
        f'instdisc_world_size{{{where}, run="other", rank="0", pod="theirs", instance="10.0.0.2:9500"}}': "1x9",
        gpu + ', gpu="0", exported_pod="ours"}': "91x9",
        gpu + ', gpu="0", exported_pod="theirs"}': "92x9",
        f'ray_node_cpu_utilization{{{where}, ip="10.0.0.1", SessionName="s1"}}': "31x9",
        f'ray_node_cpu_utilization{{{where}, ip="10.0.0.2", SessionName="s2"}}': "32x9",
        f'ray_actors{{{where}, State="ALIVE", SessionName="s1"}}': "3x9",
        f'ray_actors{{{where}, State="ALIVE", SessionName="s2"}}': "4x9",
    }
    expected = {
        "GPU utilisation": (
            f'DCGM_FI_DEV_GPU_UTIL{{gpu="0", {where}, pod="ours", exported_namespace="n", exported_pod="ours"}}',
            91,
        ),
        "Processors of a node": (f'ray_node_cpu_utilization{{{where}, ip="10.0.0.1", SessionName="s1"}}', 31),
        "Ray actors": ('{State="ALIVE"}', 3),
    }
    asked = [(filled(charts[title]), "5m", [sample]) for title, sample in expected.items()]
    check_expressions(tmp_path, series, asked)


def test_curves_of_several_runs_share_a_chart(tmp_path: Path) -> None:
    """Even of runs of one name, and where one is ahead of the other."""
    labels = ['{cluster="c", namespace="n", run="same"}', '{cluster="c", namespace="other", run="same"}']
    series = {
        f'{metric}{each[:-1]}, rank="0"}}': values
        for metric in (
            "instdisc_epoch",
            "instdisc_loss",
            "instdisc_knn_accuracy_ratio",
            "instdisc_bank_knn_accuracy_ratio",
            "instdisc_knn_balanced_accuracy_ratio",
            "instdisc_instance_recall_ratio",
        )
        for each, values in zip(labels, ("0+1x9", "0+2x9"), strict=True)
    }
    asked = [
        (filled(target["expr"], run="same"), "3m", list(zip(labels, (3, 6), strict=True)))
        for panel in CURVES
        for target in panel["targets"]
    ]
    check_expressions(tmp_path, series, asked)


def check_expressions(
    folder: Path, series: dict[str, str], asked: list[tuple[str, str, list[tuple[str, float]]]]
) -> None:
    """Let promtool check what expressions, at a time each, give for these series under the project's rules."""
    test = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {
                "expr": expression,
                "eval_time": moment,
                "exp_samples": [{"labels": labels, "value": value} for labels, value in samples],
            }
            for expression, moment, samples in asked
        ],
    }
    file = folder / "tests.yml"
    file.write_text(yaml.safe_dump({"rule_files": [str(DEPLOY / "prometheus/rules.yml")], "tests": [test]}))
    promtool("test", "rules", str(file))


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WatchedRun]:
    """A run of two workers, and a server that watches it."""
    with watched_run(tmp_path_factory.mktemp("live")) as run:
        yield run


@pytest.fixture(scope="module")
def live(watched: WatchedRun) -> tuple[Prometheus, float]:
    """The server, and the time at which it had seen an evaluation too."""
    return watched.server, watched.evaluate()


def has_data(live: tuple[Prometheus, float], expression: str) -> bool:
    server, moment = live
    return any(value == value for _, value in server.query(expression, moment))  # NaN is none


@pytest.mark.parametrize("panel", CHARTS, ids=[panel["title"] for panel in CHARTS])
def test_every_chart_has_data(live: tuple[Prometheus, float], panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        assert has_data(live, filled(target["expr"])), target["expr"]


@pytest.mark.parametrize("panel", CURVES, ids=[panel["title"] for panel in CURVES])
def test_curves_over_epochs_have_both_values_of_a_run(
    live: tuple[Prometheus, float], panel: dict[str, Any]
) -> None:
    server, moment = live
    answers = [server.query(filled(target["expr"]), moment) for target in panel["targets"]]
    runs = [[labels for labels, _ in answer] for answer in answers]
    assert runs == [[{"run": "live"}]] * len(answers)
    assert all(target["format"] == "table" for target in panel["targets"])


@pytest.mark.parametrize("rule", RULES, ids=[rule.get("record", rule.get("alert")) for rule in RULES])
def test_every_rule_has_data(live: tuple[Prometheus, float], rule: dict[str, Any]) -> None:
    if "record" in rule:
        assert has_data(live, rule["record"])
        return
    # An alert gives data when it fires only; what it looks at is always there.
    names = re.findall(r"(?:\w+:)?instdisc_\w+(?::\w+)?|\bup\{[^}]*\}", rule["expr"])
    assert names
    for name in names:
        assert has_data(live, name), name


def test_targets_bear_run_and_rank_and_are_up(live: tuple[Prometheus, float]) -> None:
    server, moment = live
    labels = [labels for labels, _ in server.query('up{job=~"instdisc.*"} == 1', moment)]
    assert sorted((each["job"], each["run"], each["rank"]) for each in labels) == [
        ("instdisc", "live", "0"),
        ("instdisc", "live", "1"),
        ("instdisc-evaluation", "live", "0"),
    ]
    assert not server.query('{exported_run!=""}', moment)


def expression_of(alert: str) -> str:
    (expression,) = [rule["expr"] for rule in ALERTS if rule["alert"] == alert]
    return str(expression)


def test_a_run_that_somebody_stopped_alerts_nobody(
    watched: WatchedRun, live: tuple[Prometheus, float]
) -> None:
    server, _ = live
    watched.stop()
    gone = expression_of("InstdiscVanished").partition("unless last_over_time")[0]
    wait_until(lambda: bool(server.query(gone)), timeout_s=60)
    assert not server.query(expression_of("InstdiscVanished"))
    assert not server.query(expression_of("InstdiscWorkerLost"))


@contextmanager
def worker(directory: Path, rank: int) -> Iterator[str]:
    """The address at which a worker serves its metrics."""
    config = MetricsConfig(port=free_port())
    with exported(
        Metrics(TRAINING, run="live", rank=rank), config, local_rank=0, world_size=2, directory=directory
    ) as endpoint:
        assert endpoint is not None
        yield endpoint.address


@pytest.mark.prometheus
def test_the_list_of_targets_follows_workers_that_end_and_start_again(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    directory = tmp_path / ".metrics"
    with worker(directory, 0) as stays, prometheus(tmp_path, tmp_path / "scratch") as server:
        with worker(directory, 1) as ends:
            wait_until(lambda: server.targets() == sorted([stays, ends]), timeout_s=60)
        wait_until(lambda: server.targets() == [stays], timeout_s=60)
        with worker(directory, 1) as again:
            wait_until(lambda: server.targets() == sorted([stays, again]), timeout_s=60)


@pytest.mark.prometheus
@pytest.mark.parametrize("stopping", [0, 1])
def test_a_run_that_vanished_alerts_unless_it_was_stopping(tmp_path: Path, stopping: int) -> None:
    (tmp_path / "scratch").mkdir()
    metrics = Metrics(TRAINING, run="live", rank=0)
    metrics.set(epoch=1, epochs=2, world_size=1, loss=3, stopping=stopping)
    config = MetricsConfig(port=free_port())
    with prometheus(tmp_path, tmp_path / "scratch") as server:
        with exported(metrics, config, local_rank=0, world_size=1, directory=tmp_path / ".metrics"):
            wait_until(
                lambda: bool(server.query("cluster_namespace_run:instdisc_stopping:max")), timeout_s=60
            )
        wait_until(lambda: not server.query("instdisc_epoch"), timeout_s=60)
        alerting = server.query(expression_of("InstdiscVanished"))
        assert alerting == ([] if stopping else [({"run": "live"}, 0.5)])
