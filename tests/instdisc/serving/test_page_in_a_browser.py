"""The page, driven in Chromium by a script that does what a person would: drop, click, type, select, download."""

from __future__ import annotations

import html
import json
import re
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi.responses import HTMLResponse

from cluster.collection import open_collection
from instdisc.serving.app import make_app
from instdisc.settings.serve import ServeConfig
from tests.debian import need
from tests.ray_cluster import CHECKOUT, wait_until

PAGE = CHECKOUT / "instdisc/serving/page.html"
PERSON = Path(__file__).with_name("person.js")


@pytest.fixture
def address(config: Callable[..., ServeConfig], served_index: Path, tmp_path: Path) -> Iterator[str]:
    """The API under uvicorn, as in a replica, with the page and its probe at `/probed`."""
    app = make_app(config(), None, 0)
    (tmp_path / "explored").mkdir()
    shown = [{"row": 0, "others": [1], "similarities": [0.99]}]
    identity = dict(open_collection(served_index).identity)
    (tmp_path / "explored" / "duplicates.json").write_text(json.dumps({**identity, "shown": shown}))
    places = {"rows": [0, 5, 7], "places": [[-3, -2], [0, 0], [3, 2]]}
    found = {**identity, "images": 32, "shown": places}
    (tmp_path / "explored" / "map.json").write_text(json.dumps(found))

    @app.get("/probed")
    def probed() -> HTMLResponse:
        return HTMLResponse(f"{PAGE.read_text()}<script>{PERSON.read_text()}</script>")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        wait_until(lambda: server.started, timeout_s=60)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join(timeout=30)


@pytest.mark.browser
@pytest.mark.parametrize("size", ["1280,900", "500,900"])
def test_a_person_finds_images(address: str, served_index: Path, tmp_path: Path, size: str) -> None:
    browser = need("chromium", "chromium-browser", "google-chrome", package="chromium")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    options += [
        f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=20000",
        f"--window-size={size}",
    ]
    done = subprocess.run(
        [browser, *options, "--dump-dom", f"{address}/probed"],
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None
    saw: dict[str, Any] = json.loads(html.unescape(title[1]))
    assert "error" not in saw, json.dumps(saw)
    assert saw["dropped"][:2] == [24, "red/3.png"]
    assert float(saw["dropped"][2]) > 0.999
    assert saw["list"] == ["colors-selected.txt", "green/1.png\ngreen/2.png\n"]
    assert len(saw["duplicates"]) == 2
    assert "instdisc.explore" in saw["missing"]
    assert saw["under"] == saw["near"] == open_collection(served_index).read("keys")[5]
    assert "not an image" in saw["refused"]
    assert {name: saw[name] for name in ("name", "count", "elsewhere", "wide")} == {
        "name": "colors",
        "count": "2",
        "elsewhere": [],
        "wide": 0,
    }
    for what in ("invites", "clicked", "left_out", "slash", "arrow", "opened"):
        assert saw[what], what
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert [line for line in console if "400" not in line] == []  # of the file that is no image
