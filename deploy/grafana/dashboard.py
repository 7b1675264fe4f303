"""Write dashboard.json, the Grafana dashboard, beside this file.

    python -m deploy.grafana.dashboard

What it shows is in `charts.py`. A test fails when this is forgotten.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deploy.grafana.charts import BY, NAME, ROWS, RUN, Chart

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
LEGEND = {"displayMode": "list", "placement": "bottom"}
LETTERS = "ABCDEFG"
COLUMNS, WIDTH, HEIGHT = 3, 8, 8


def panel(number: int, chart: Chart, x: int, y: int) -> dict[str, Any]:
    """A chart in Grafana's words."""
    view = against_the_first(chart) if chart.kind == "xychart" else over_time(chart)
    return {
        "id": number,
        "type": chart.kind,
        "title": chart.title,
        "description": chart.text,
        "datasource": DATASOURCE,
        "gridPos": {"h": HEIGHT, "w": WIDTH, "x": x, "y": y},
        **view,
        "targets": [
            {"refId": letter, "datasource": DATASOURCE, "expr": expression}
            | ({"format": "table"} if chart.kind == "xychart" else {"legendFormat": legend})
            for letter, (expression, legend) in zip(LETTERS, chart.targets, strict=False)
        ],
    }


def over_time(chart: Chart) -> dict[str, Any]:
    """How lines over time look."""
    custom = {
        "fillOpacity": 30 if chart.stacked else 0,
        "stacking": {"mode": "normal" if chart.stacked else "none"},
        "showPoints": "never",
        "spanNulls": False,
    }
    return {
        "fieldConfig": {"defaults": {"unit": chart.unit, "custom": custom}, "overrides": []},
        "options": {"legend": LEGEND, "tooltip": {"mode": "multi", "sort": "desc"}},
    }


def against_the_first(chart: Chart) -> dict[str, Any]:
    """What makes one table of the targets, and of the table one curve for each run."""
    columns = {
        f"Value #{letter}": legend for letter, (_, legend) in zip(LETTERS, chart.targets, strict=False)
    }
    x = {"id": "byName", "options": chart.targets[0][1]}
    properties = [{"id": "unit", "value": "short"}, {"id": "custom.axisLabel", "value": x["options"]}]
    return {
        "fieldConfig": {
            "defaults": {"unit": chart.unit, "custom": {"show": "lines"}},
            "overrides": [{"matcher": x, "properties": properties}],
        },
        "options": {
            "mapping": "auto",
            "series": [{"x": {"matcher": x}}],
            "legend": LEGEND,
            "tooltip": {"mode": "single"},
        },
        "transformations": [
            {"id": "merge", "options": {}},
            {"id": "organize", "options": {"excludeByName": {"Time": True}, "renameByName": columns}},
            {"id": "partitionByValues", "options": {"fields": BY.split(", "), "keepFields": False}},
        ],
    }


def variable(name: str, of: str) -> dict[str, Any]:
    """A choice of several values of a label; "All" also means series that lack it."""
    query = f"label_values({of}, {name})"
    return {
        "name": name,
        "label": name,
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": query, "refId": name},
        "definition": query,
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "sort": 3,
        "current": {"text": "All", "value": "$__all"},
    }


def panels() -> list[dict[str, Any]]:
    """All rows and charts, three charts beside each other."""
    made: list[dict[str, Any]] = []
    y = 0
    for title, charts in ROWS.items():
        place = {"h": 1, "w": 24, "x": 0, "y": y}
        row = {
            "id": len(made) + 1,
            "type": "row",
            "title": title,
            "collapsed": False,
            "gridPos": place,
            "panels": [],
        }
        made.append(row)
        y += 1
        for number, chart in enumerate(charts):
            line, column = divmod(number, COLUMNS)
            made.append(panel(len(made) + 1, chart, column * WIDTH, y + line * HEIGHT))
        y += -(-len(charts) // COLUMNS) * HEIGHT
    return made


def dashboard() -> str:
    """The file's text: a panel a line."""
    ours = '__name__=~"instdisc_.+"'
    frame = {
        "uid": "instdisc",
        "title": "instdisc",
        "tags": ["instdisc"],
        "schemaVersion": 39,
        "version": 2,
        "editable": True,
        "timezone": "browser",
        "refresh": "15s",
        "time": {"from": "now-3h", "to": "now"},
        "graphTooltip": 1,
        "templating": {
            "list": [
                {"name": "datasource", "label": "data source", "type": "datasource", "query": "prometheus"},
                variable("cluster", f"{{{ours}}}"),
                variable("namespace", f'{{{ours}, cluster=~"$cluster"}}'),
                variable("run", f'{{{ours}, cluster=~"$cluster", namespace=~"$namespace"}}'),
                variable("rank", f"instdisc_images_total{{{RUN}}}"),
            ]
        },
        "annotations": {
            "list": [
                {
                    "name": "alerts",
                    "enable": True,
                    "iconColor": "red",
                    "datasource": DATASOURCE,
                    "expr": f'ALERTS{{{RUN}, alertname=~"Instdisc.*", alertstate="firing"}}',
                    "titleFormat": "{{alertname}}",
                    "textFormat": NAME,
                }
            ]
        },
    }
    lines = ",\n  ".join(json.dumps(each) for each in panels())
    return f'{json.dumps(frame, indent=1)[:-2]},\n "panels": [\n  {lines}\n ]\n}}\n'


if __name__ == "__main__":
    Path(__file__).with_name("dashboard.json").write_text(dashboard())
