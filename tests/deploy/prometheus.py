"""A real Prometheus server with the rules of this project, scraping what a directory lists."""

from __future__ import annotations

import json
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.debian import need
from tests.deploy.manifests import DEPLOY
from tests.ray_cluster import free_port, wait_until


@dataclass(frozen=True)
class Prometheus:
    """A server that answers at `url`."""

    url: str

    def query(self, expression: str, at: float | None = None) -> list[tuple[dict[str, str], float]]:
        """Labels and value of every series that the expression gives at a Unix time, now by default."""
        moment = {} if at is None else {"time": str(at)}
        answer = self._get("query", query=expression, **moment)
        assert answer["resultType"] == "vector", answer
        return [(each["metric"], float(each["value"][1])) for each in answer["result"]]

    def query_range(self, expression: str, start: float, stop: float, step: float) -> list[dict[str, Any]]:
        """Labels (`metric`) and `values`, pairs of Unix time and text, of every series between two times."""
        window = {"start": str(start), "end": str(stop), "step": str(step)}
        series: list[dict[str, Any]] = self._get("query_range", query=expression, **window)["result"]
        return series

    def targets(self, job: str = "instdisc") -> list[str]:
        """Addresses that a job scrapes."""
        found = self._get("targets")["activeTargets"]
        return sorted(each["labels"]["instance"] for each in found if each["scrapePool"] == job)

    def _get(self, what: str, **parameters: str) -> Any:
        address = f"{self.url}/api/v1/{what}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(address, timeout=30) as response:
            return json.load(response)["data"]


@contextmanager
def prometheus(
    run_directory: Path, scratch: Path, *, ray_directory: Path | None = None, gpus: str | None = None
) -> Iterator[Prometheus]:
    """Start a server with the deployed configuration and rules, all intervals a second, and end it.

    Args:
        run_directory: Whose `.metrics` lists the targets.
        scratch: Where the server keeps its own files.
        ray_directory: Where Ray lists its nodes.
        gpus: Address of an exporter of GPU metrics.
    """
    text = (
        (DEPLOY / "prometheus" / "prometheus.yml").read_text().replace("/run-directory", str(run_directory))
    )
    config = yaml.safe_load(text.replace("/tmp/ray", str(ray_directory or scratch)))
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    rules, rule_file = yaml.safe_load((DEPLOY / "prometheus/rules.yml").read_text()), scratch / "rules.yml"
    for group in rules["groups"]:
        group["interval"] = "1s"
    rule_file.write_text(yaml.safe_dump(rules))
    config["rule_files"] = [str(rule_file)]
    jobs = {each["job_name"]: each for each in config["scrape_configs"]}
    for name in ("instdisc", "ray"):
        jobs[name]["file_sd_configs"][0]["refresh_interval"] = "1s"
    jobs["dcgm"]["static_configs"][0]["targets"] += [gpus] if gpus else []
    file, log, address = scratch / "prometheus.yml", scratch / "prometheus.log", f"127.0.0.1:{free_port()}"
    file.write_text(yaml.safe_dump(config))
    command = [
        need("prometheus", package="prometheus"),
        *(f"--config.file={file}", f"--storage.tsdb.path={scratch / 'data'}"),
        f"--web.listen-address={address}",
    ]
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        url = f"http://{address}"
        wait_until(lambda: server.poll() is not None or _is_ready(url), timeout_s=60)
        assert server.poll() is None, log.read_text()
        yield Prometheus(url)
    finally:
        server.kill()
        server.wait()


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/-/ready", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False
