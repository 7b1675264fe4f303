"""The page: what it shows, and that a browser shows it."""

from __future__ import annotations

import html
import json
import re
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest

from instdisc.evaluation import knn, page, statistics, unseen
from instdisc.evaluation.context import Evaluation
from instdisc.evaluation.gallery import Example, Picture, agreement
from instdisc.evaluation.plots import axis_over
from tests.debian import need

# Put at the end of a copy of the page: what went wrong, in the title of the document that the browser prints.
PROBE = """<script>
window.addEventListener("load", () => {
  const images = [...document.images].map(each => each.complete && each.naturalWidth > 0);
  const report = {
    images: images.length, decoded: images.filter(Boolean).length, charts: document.querySelectorAll("svg").length,
    wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    fetched: performance.getEntriesByType("resource").map(each => each.name).filter(name => !name.startsWith("data:")),
  };
  document.title = JSON.stringify(report);
});
</script>"""


@pytest.fixture
def made(evaluation: Evaluation) -> Path:
    """The page of a small run after three protocols."""
    evaluation.write("knn", knn.run(evaluation, knn.KnnConfig(k=5)))
    evaluation.write(
        "unseen", unseen.run(evaluation, unseen.UnseenConfig(classes="second-half", ranks=(1, 2)))
    )
    evaluation.write("statistics", statistics.run(evaluation, statistics.StatisticsConfig()))
    result = page.run(evaluation, page.PageConfig(examples=3, neighbors=4))
    assert result["summary"] == {"pictures": 45}
    return Path(result["page"])


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_nothing_is_loaded_from_elsewhere(made: Path) -> None:
    text = made.read_text()
    parser = _Tags()
    parser.feed(text)
    links = [
        value
        for tag, attributes in parser.tags
        if tag != "a"
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href", "srcset", "data", "action")
    ]
    assert len(links) == 46
    assert all(link is not None and link.startswith("data:") for link in links)
    opened = [attributes["href"] for tag, attributes in parser.tags if tag == "a"]
    assert len(opened) == 45  # each picture opens its file
    assert all(link is not None and Path(unquote(urlsplit(link).path)).is_file() for link in opened)
    assert "url(" not in text
    assert "@import" not in text


def test_what_the_page_says(made: Path) -> None:
    text = made.read_text()
    accuracy = json.loads((made.parent / "knn.json").read_text())["accuracies"]["k5"]["top1"]
    assert f"<b>{100 * accuracy:.1f}%</b>" in text
    for title in (
        "kNN top-1 of raw pixels",
        "Nearest rows of typical queries",
        "Training loss",
        "kNN accuracy while training",
        "Cosine similarity of pairs",
        "Weighted kNN",
    ):
        assert title in text
    assert text.count('class="example"') == 9
    assert text.count('class="agrees"') + text.count('class="differs"') == 36


@pytest.fixture
def browse(tmp_path: Path) -> Callable[..., str]:
    """Open a file in headless Chromium; returns the document as the browser has it."""
    browser = need("chromium", "chromium-browser", "google-chrome", package="chromium")

    def browse(file: Path, *more: str) -> tuple[str, str]:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
        options += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=10000", *more]
        result = subprocess.run(
            [browser, *options, "--dump-dom", file.as_uri()],
            capture_output=True,
            text=True,
            timeout=240,
            check=True,
        )
        return result.stdout, result.stderr

    return browse


@pytest.mark.parametrize("size", ["1280,900", "500,900"])
def test_a_browser_shows_it(made: Path, browse: Callable[..., tuple[str, str]], size: str) -> None:
    probed = made.with_name("probed.html")
    probed.write_text(made.read_text() + PROBE)
    document, said = browse(probed, f"--window-size={size}")
    title = re.search(r"<title>(.*?)</title>", document)
    assert title is not None
    report = json.loads(html.unescape(title[1]))
    assert report == {"images": 45, "decoded": 45, "charts": 4, "wide": 0, "fetched": []}
    assert "CONSOLE" not in said, said


def test_text_is_escaped() -> None:
    name = "<script>alert(1)</script>"
    picture = Picture(name, name, "", 0.5, agrees=True)
    contents = page.Page(
        title=name,
        subtitle=name,
        tiles=[(name, name)],
        charts=page.similarity_charts(
            {"edges": [-1, 0, 1], "pairs": {name: {"counts": [1, 3], "mean": 0.2}}}
        ),
        tables=[page.Table(name, (name,), [(name,)], name)],
        galleries=[(name, name, [Example(query=picture, neighbors=(picture,))])],
        footer=name,
    )
    text = page.render(contents)
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 12
    assert "cannot be decoded" in text


def test_agreement_is_the_share_of_the_votes() -> None:
    scores = np.array([[0.9, 0.8, 0.1], [0.5, 0.5, 0.5]], np.float32)
    labels = np.array([[1, 0, 1], [-1, 2, 3]])
    expected = [(np.exp(9) + np.exp(1)) / (np.exp(9) + np.exp(8) + np.exp(1)), 1 / 3]
    np.testing.assert_allclose(
        agreement(scores, labels, np.array([1, 3]), temperature=0.1), expected, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("values", "low", "high"), [([0.279, 0.47], 0.25, 0.5), ([4.9, 14.7], 4, 16), ([3, 3], 2.4, 3.6)]
)
def test_axes_end_at_round_values(values: list[float], low: float, high: float) -> None:
    axis = axis_over("", values)
    assert (axis.low, axis.high) == pytest.approx((low, high))
    assert len(axis.ticks) <= 8
