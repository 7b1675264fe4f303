"""An index wherever a run may stand: searched, evaluated, on the page, and opened in Python."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import instdisc
from cluster.collection import open_collection
from instdisc import evaluate, search
from instdisc.index.readout import read_whitening
from tests.instdisc.index.conftest import Embed
from tests.instdisc.program import solid
from tests.instdisc.test_evaluate import CLASSES


@pytest.fixture
def index(embed: Embed, trained: Path, images: Path, tmp_path: Path) -> Path:
    """Of the images of the run, in another place, and two without a class; some blocks lack rows."""
    solid(images / "more", {"gray": (120, 120, 120)}, 2)
    assert embed(trained, "--data.root", images, "--block-rows", "8")[0] == 0
    assert embed("--append", "--data.path", images / "more", "--block-rows", "8")[0] == 0
    assert embed("--remove", "blue/1.png", "red/9.png")[0] == 0
    return tmp_path / "index"


@pytest.fixture
def ran(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Any:
    """Run a program; returns status and what it said."""

    def ran(program: Any, *arguments: Path | str) -> tuple[int, str]:
        status = program.main([*map(str, arguments)])
        captured = capfd.readouterr()
        return status, captured.out + captured.err

    return ran


@pytest.mark.parametrize("readout", ["plain", "whitened"])
def test_search(ran: Any, index: Path, images: Path, tmp_path: Path, readout: str) -> None:
    query = images / "green" / "4.png"
    output = ["--k", "5", "--readout", readout, "--output", tmp_path / "drawn.png"]
    status, said = ran(search, index, query, *output)
    assert status == 0, said
    opened = open_collection(index)
    rows, keys = opened.read("embeddings"), opened.read("keys").tolist()
    if readout == "whitened":
        rows = read_whitening(opened)(torch.from_numpy(rows)).numpy()
    similarities = rows @ rows[keys.index("green/4.png")]
    found = [line.split() for line in said.splitlines() if "(row" in line]
    assert [float(line[0]) for line in found] == pytest.approx(np.sort(similarities)[::-1][:5], abs=2e-3)
    assert [keys[int(line[4].rstrip(")"))] for line in found] == [line[2] for line in found]
    assert "class by the vote" in said
    with Image.open(tmp_path / "drawn.png") as drawing:
        assert drawing.size == (6 * 122 + 20, 166)


def test_images_that_moved_are_found_all_the_same(
    ran: Any, embed: Embed, index: Path, images: Path, tmp_path: Path
) -> None:
    moved = images.rename(tmp_path / "moved")
    query = moved / "green" / "4.png"
    status, said = ran(search, index, query, "--k", "3", "--output", tmp_path / "drawn.png")
    assert status == 0, said
    assert said.count("(row") == 3
    assert re.search(r"3 of these images are not where they were, e\.g\. green/\d.png: ", said)
    assert f"embed --output {index} --data.root" in said
    with Image.open(tmp_path / "drawn.png") as drawing:
        found = drawing.convert("RGB").crop((142, 10, 254, 122))
    assert {color for _, color in found.getcolors() or []} >= {(128, 128, 128), (255, 255, 255)}
    assert embed("--data.root", f"{images}={moved}")[0] == 0
    _, said = ran(search, index, query, "--k", "3", "--output", tmp_path / "drawn.png")
    assert "not where they were" not in said


@pytest.mark.parametrize("recompute", [[], ["--recompute"]])
def test_evaluate(ran: Any, index: Path, tmp_path: Path, recompute: list[str]) -> None:
    """By the test images of the run, which the index is of."""
    where = ["--output", tmp_path / "out", "--num-actors", "0", "--metrics.port", "0", "--k", "5"]
    status, said = ran(evaluate, index, *where, "--protocols", "knn,statistics,page", *recompute)
    assert status == 0, said
    result = json.loads((tmp_path / "out" / "knn.json").read_text())
    assert result["bank"] == ("recomputed" if recompute else "indexed")
    assert (result["query_kind"], result["queries"], result["rows"]) == ("test-set", 6, 28)
    assert result["accuracies"]["k5"]["top1"] == result["whitened"]["top1"] == 1.0
    page = (tmp_path / "out" / "index.html").read_text()
    assert "index of 30 images of 3 classes" in page
    assert page.count("data:image") == 3 * 3 * 11 == len(re.findall("<img", page))


def test_other_images_are_evaluated_by_each_other(
    ran: Any, embed: Embed, trained: Path, images: Path, tmp_path: Path
) -> None:
    """The index is enough, without its run; a recomputed query is the row itself."""
    other = solid(tmp_path / "other", CLASSES, 4)
    embed(trained, "--data.path", other)
    where = ["--output", tmp_path / "out", "--num-actors", "0", "--metrics.port", "0", "--k", "3"]
    status, said = ran(evaluate, tmp_path / "index", *where)
    assert status == 0, said
    result = json.loads((tmp_path / "out" / "knn.json").read_text())
    assert (result["query_kind"], result["queries"], result["rows"]) == ("leave-one-out", 12, 12)
    status, said = ran(
        evaluate, tmp_path / "index", *where, "--queries.path", images, "--protocols", "knn,page"
    )
    assert status == 0, said
    assert json.loads((tmp_path / "out" / "knn.json").read_text())["queries"] == 32 - 2


def test_the_python_face(index: Path, trained: Path, images: Path) -> None:
    run = instdisc.open_run(index)
    assert len(run) == 30
    assert repr(run) == f"<Run {index}: 30 embeddings of 16>"
    keys = run.keys().tolist()
    scores, rows = run.nearest(run.embeddings()[:3], k=2)
    assert rows[:, 0].tolist() == [0, 1, 2] or scores[:, 0] == pytest.approx(1, abs=1e-5)
    vector = run.embed([images / keys[4]])
    assert vector[0] == pytest.approx(run.embeddings()[4], abs=1e-3)
    assert vector == pytest.approx(instdisc.open_run(trained).embed([images / keys[4]]), abs=1e-6)


def test_queries_that_do_not_fit_the_index(ran: Any, index: Path, tmp_path: Path) -> None:
    where = ["--output", tmp_path / "out", "--num-actors", "0", "--metrics.port", "0"]
    for name, rows in (("small", np.ones((2, 8))), ("nan", np.full((2, 16), np.nan))):
        np.save(tmp_path / f"{name}.npy", rows)
        np.save(tmp_path / "labels.npy", np.zeros(2, np.int64))
        queries = ["--queries.path", tmp_path / f"{name}.npy", "--queries.labels", tmp_path / "labels.npy"]
        status, said = ran(evaluate, index, *where, *queries)
        assert status == 2
        assert ("8 dimensions and the bank 16" if name == "small" else "not finite") in said
    (tmp_path / "empty.png").touch()
    status, said = ran(search, index, tmp_path / "empty.png")
    assert status == 2
    assert "Traceback" not in said
