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
from instdisc.common.metrics import EVALUATION, PREFIX, TRAINING
from tests.debian import need
from tests.deploy.live import watched_run
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
    promtool("check", "rules", "rules.yml")


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


def test_every_alert_names_a_heading_of_the_runbook() -> None:
    readme = (DEPLOY / "README.md").read_text()
    headings = re.findall(r"^### (.+)$", readme, flags=re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for alert in ALERTS:
        file, _, anchor = alert["annotations"]["runbook"].partition("#")
        assert file == "deploy/README.md"
        assert anchor in anchors, alert["alert"]
        assert alert["labels"]["severity"] in ("critical", "warning")


def test_the_dashboard_shows_every_metric_and_stands_in_rows() -> None:
    rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert rows == ["Training", "Objective", "Loader", "Exchange", "Durability", "Evaluation"]
    variables = {each["name"] for each in DASHBOARD["templating"]["list"]}
    assert variables == {"datasource", "run", "rank"}
    names = set(re.findall(rf"{PREFIX}\w+?(?=_sum|_count|_bucket|\b)", " ".join(EXPRESSIONS)))
    assert names == {PREFIX + metric.name for metric in TRAINING.metrics + EVALUATION.metrics}
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    for panel in CHARTS:
        assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Prometheus, float]]:
    """A server that watches a run of two workers, and the time at which it had seen an evaluation too."""
    with watched_run(tmp_path_factory.mktemp("live")) as watched:
        yield watched.server, watched.evaluate()


def has_data(live: tuple[Prometheus, float], expression: str) -> bool:
    server, moment = live
    return any(value == value for _, value in server.query(expression, moment))  # NaN is none


@pytest.mark.parametrize("panel", CHARTS, ids=[panel["title"] for panel in CHARTS])
def test_every_chart_has_data(live: tuple[Prometheus, float], panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        expression = target["expr"].replace("$__rate_interval", "2m")
        expression = expression.replace("$run", "live").replace("$rank", ".*")
        assert "$" not in expression
        assert has_data(live, expression), expression


@pytest.mark.parametrize("rule", RULES, ids=[rule.get("record", rule.get("alert")) for rule in RULES])
def test_every_rule_has_data(live: tuple[Prometheus, float], rule: dict[str, Any]) -> None:
    if "record" in rule:
        assert has_data(live, rule["record"])
        return
    # An alert gives data when it fires only; what it looks at is always there.
    names = re.findall(r"(?:run:)?instdisc_\w+(?::\w+)?|\bup\{[^}]*\}", rule["expr"])
    assert names
    for name in names:
        assert has_data(live, name), name


def test_targets_bear_run_and_rank_and_are_up(live: tuple[Prometheus, float]) -> None:
    server, moment = live
    labels = [labels for labels, _ in server.query("up == 1", moment)]
    assert sorted((each["job"], each["run"], each["rank"]) for each in labels) == [
        ("instdisc", "live", "0"),
        ("instdisc", "live", "1"),
        ("instdisc-evaluation", "live", "0"),
    ]
    assert not server.query('{exported_run!=""}', moment)


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
