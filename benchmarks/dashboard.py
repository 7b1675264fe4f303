"""Every chart of the Grafana dashboard in one picture, from a run that a real Prometheus watched.

    python -m benchmarks.dashboard PICTURE.png [--minutes 4]

Trains with two workers under Ray as the tests do, evaluates a snapshot meanwhile, asks the server what the charts of
`deploy/grafana/dashboard.json` ask, and draws the answers under their titles. Needs prometheus and chromium.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import secrets
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from markupsafe import Markup

from instdisc.evaluation.plots import Series, axis_over, line_chart
from tests.deploy.live import watched_run
from tests.deploy.manifests import DEPLOY
from tests.deploy.prometheus import Prometheus

COLUMNS, CARD_WIDTH, CARD_HEIGHT, ROW_HEIGHT = 3, 520, 292, 54
_FEW = 30  # points, which a line would hardly show
COLORS = ("#2563c9", "#d9632b", "#1d8a4b", "#8a4fc7", "#c2a012", "#6f7d8f")
STYLE = (
    "body{margin:0;padding:20px;background:#f6f7f9;color:#1b1f26;font:14px system-ui,sans-serif}"
    ".charts{display:grid;grid-template-columns:repeat(3,1fr);gap:14px}"
    ".card{background:#fff;border:1px solid #dfe3e9;border-radius:8px;padding:10px 12px}"
    "h2{font-size:18px;margin:22px 0 10px}h3{font-size:14px;margin:0}"
    "ul{display:flex;flex-wrap:wrap;gap:0 14px;margin:2px 0;padding:0;list-style:none;font-size:12px;height:18px}"
    "svg{display:block;width:100%}.grid{stroke:#dfe3e9}.axis{stroke:#626b78}"
    ".tick,.name{fill:#626b78;font:12px system-ui,sans-serif}.line{fill:none;stroke-width:2}"
)


def ask(server: Prometheus, target: dict[str, Any], start: float, stop: float) -> list[Series]:
    """What an expression gave from `start` to `stop`, over the seconds since `start`."""
    expression = target["expr"].replace("$__rate_interval", "30s").replace("$run", "live")
    expression = re.sub(r"\$(cluster|namespace|rank)\b", ".*", expression)
    found = []
    for answer in server.query_range(expression, start, stop, 1):
        labels = answer["metric"]
        legend = re.sub(
            r"{{(\w+)}}", lambda name, at=labels: at.get(name[1], ""), target.get("legendFormat", "{{run}}")
        )
        points = [(float(when) - start, float(value)) for when, value in answer["values"]]
        points = [point for point in points if math.isfinite(point[1])]
        if points:
            x, y = zip(*points, strict=True)
            found.append(Series(legend.strip(), x, y, marks=len(x) < _FEW))
    return found


def series_of(
    server: Prometheus, panel: dict[str, Any], start: float, stop: float
) -> tuple[str, list[Series]]:
    """The name of the horizontal axis, and what the panel draws over it."""
    answers = [ask(server, target, start, stop) for target in panel["targets"]]
    if panel["type"] != "xychart":
        return "seconds", [series for answer in answers for series in answer]
    names = panel["transformations"][1]["options"]["renameByName"]
    horizontal, *others = (names[f"Value #{target['refId']}"] for target in panel["targets"])
    at = {series.name: dict(zip(series.x, series.y, strict=True)) for series in answers[0]}
    curves = []
    for name, answer in zip(others, answers[1:], strict=True):
        for series in answer:
            points = [
                (at[series.name][when], y)
                for when, y in zip(series.x, series.y, strict=True)
                if when in at[series.name]
            ]
            curves.append(Series(f"{series.name} {name}", *zip(*points, strict=True)))
    return horizontal, curves


def card(server: Prometheus, panel: dict[str, Any], start: float, stop: float) -> Markup:
    horizontal, series = series_of(server, panel, start, stop)
    values = [value for each in series for value in each.y]
    is_share = panel["fieldConfig"]["defaults"].get("unit") == "percentunit"
    y_axis = axis_over("", values or [0.0, 1.0], percent=is_share)
    along = [x for each in series for x in each.x] if horizontal != "seconds" else [0.0, stop - start]
    chart = line_chart(panel["title"], series, axis_over(horizontal, along, tight=True), y_axis)
    legend = Markup("").join(
        Markup('<li style="color:{}">{}</li>').format(COLORS[number % len(COLORS)], each.name)
        for number, each in enumerate(series)
    )
    return Markup('<div class="card"><h3>{}</h3><ul>{}</ul>{}</div>').format(panel["title"], legend, chart)


def draw(server: Prometheus, start: float, stop: float) -> tuple[str, int]:
    """The picture as HTML, and its height in pixels."""
    body, height, cards = [], 60, 0
    for panel in json.loads((DEPLOY / "grafana/dashboard.json").read_text())["panels"]:
        if panel["type"] == "row":
            height += ROW_HEIGHT + -(-cards // COLUMNS) * CARD_HEIGHT
            cards = 0
            end = Markup("</div>") if body else Markup("")
            body.append(end + Markup('<h2>{}</h2><div class="charts">').format(panel["title"]))
        else:
            cards += 1
            body.append(card(server, panel, start, stop))
    height += -(-cards // COLUMNS) * CARD_HEIGHT
    colors = "".join(
        f".line.c{number}{{stroke:{each}}}.mark.c{number}{{fill:{each}}}"
        for number, each in enumerate(COLORS, 1)
    )
    return f"<meta charset=utf-8><style>{STYLE}{colors}</style>{Markup('').join(body)}</div>", height


def photograph(html: str, height: int, picture: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    assert browser is not None, "needs chromium"
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        page.write_text(html)
        size = f"--window-size={COLUMNS * CARD_WIDTH},{height}"
        command = [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={folder}/profile",
        ]
        command += [size, f"--screenshot={picture.absolute()}", page.as_uri()]
        subprocess.run(command, check=True, capture_output=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("picture", type=Path)
    parser.add_argument("--minutes", type=float, default=4.0, help="of training in the picture")
    arguments = parser.parse_args()
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with tempfile.TemporaryDirectory() as folder, watched_run(Path(folder)) as watched:
        start = time.time() - 20
        time.sleep(30 * arguments.minutes)
        watched.evaluate()
        time.sleep(max(0.0, start + 60 * arguments.minutes - time.time()))
        photograph(*draw(watched.server, start, time.time()), arguments.picture)


if __name__ == "__main__":
    main()
