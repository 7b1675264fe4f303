"""The API in this process, without Ray: answers, and what is refused."""

from __future__ import annotations

import asyncio
import io
import json
import os
import shutil
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

import instdisc
from cluster import lease
from cluster.collection import open_collection
from instdisc.embed import main as embed
from instdisc.index.readout import read_whitening
from instdisc.runs.claim import claim_index
from instdisc.serving.access import Rates
from instdisc.serving.together import Together, TooManyWaitError
from tests.instdisc.program import solid
from tests.instdisc.serving.conftest import BEARER, HERE

Client = Callable[..., TestClient]
RED = "red/3.png"


@pytest.fixture(scope="session")
def rows(served_index: Path) -> Any:
    """Vectors and keys of the index."""
    index = open_collection(served_index)
    return index.read("embeddings").astype(np.float64), index.read("keys").tolist()


def nearest(rows: Any, vector: Any, k: int) -> list[tuple[str, float]]:
    """Formula: the largest cosines."""
    vectors, keys = rows
    cosines = vectors @ (np.asarray(vector) / np.linalg.norm(vector))
    return [(keys[row], float(cosines[row])) for row in np.argsort(-cosines, kind="stable")[:k]]


def assert_found(answer: Any, expected: list[tuple[str, float]]) -> None:
    assert answer.status_code == 200, answer.text
    found = answer.json()["neighbors"]
    assert [each["similarity"] for each in found] == pytest.approx([value for _, value in expected], abs=2e-5)
    by_key = dict(expected)
    assert (
        sum(each["key"] in by_key for each in found) >= len(found) - 1
    )  # the last may be as near as another


def test_a_vector_a_key_and_an_image_find_the_same(client: Client, rows: Any, served_index: Path) -> None:
    api = client()
    vectors, keys = rows
    vector = vectors[keys.index(RED)]
    found = api.post("/search?k=5", json={"vector": (3 * vector).tolist()})
    assert_found(found, nearest(rows, vector, 5))
    assert found.json()["neighbors"][0] == {"key": RED, "label": "red", "similarity": 1.0}
    others = [each for each in nearest(rows, vector, 6) if each[0] != RED][:5]
    assert_found(api.post("/search?k=5", json={"key": RED}), others)
    data = (served_index.parent / "images" / RED).read_bytes()
    expected = instdisc.open_run(served_index).embed([served_index.parent / "images" / RED])[0]
    for sent in ({"content": data}, {"files": {"image": data}}):
        assert_found(api.post("/search?k=5", **sent), nearest(rows, expected, 5))
    gray = api.post("/search?k=2", json={"vector": vectors[keys.index("0.png")].tolist()}).json()
    assert gray["neighbors"][0]["label"] is None


def test_whitened(client: Client, rows: Any, served_index: Path) -> None:
    vectors, keys = rows
    whitening = read_whitening(open_collection(served_index))
    whitened = whitening(torch.from_numpy(vectors.astype(np.float32))).numpy().astype(np.float64)
    vector = vectors[keys.index(RED)].tolist()
    found = client().post("/search?k=4&readout=whitened", json={"vector": vector})
    assert_found(found, nearest((whitened, keys), whitened[keys.index(RED)], 4))
    refused = client(whitened=False).post("/search?readout=whitened", json={"vector": vector})
    assert refused.status_code == 400


def test_more_than_there_are(client: Client, rows: Any) -> None:
    found = client().post("/search?k=200", json={"key": RED}).json()["neighbors"]
    assert sorted(each["key"] for each in found) == sorted(set(rows[1]) - {RED})


def png_that_says(width: int, height: int) -> bytes:
    """A header that promises many pixels, and a few bytes that unpack to them."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1 << 20))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def cut_short() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 60).save(buffer, "JPEG")
    return buffer.getvalue()[:700]


@pytest.mark.parametrize(
    ("sent", "status", "said"),
    [
        ({"content": b""}, 400, "0 bytes"),
        ({"content": b"no image at all"}, 400, "not an image"),
        ({"content": cut_short()}, 400, "damaged or cut short"),
        ({"content": png_that_says(60_000, 60_000)}, 413, "too large"),
        ({"content": png_that_says(9_000, 9_000)}, 413, "the most are 50,000,000"),
        ({"content": png_that_says(3_000, 3_000)}, 400, "damaged or cut short"),
        ({"content": bytes(2_000_000)}, 413, "1,000,000 bytes"),
        ({"files": {"image": b""}}, 400, "0 bytes"),
        ({"files": {"picture": b"x"}}, 400, "'image'"),
        ({"content": b"--x", "headers": {"Content-Type": "multipart/form-data"}}, 400, "form"),
        ({"json": {"vector": [1.0] * 8}}, 400, "has 8 numbers, those of this index have 16"),
        ({"content": json.dumps({"vector": [float("nan")] * 16})}, 400, "NaN"),
        ({"content": '{"vector": [' + "1e400," * 15 + "1]}"}, 400, "NaN, infinity"),
        ({"content": '{"vector": [' + "9" * 400 + ",1" * 15 + "]}"}, 400, "infinity"),
        ({"json": {"vector": [0] * 16}}, 400, "zeros"),
        ({"json": {"vector": ["1"] * 16}}, 400, "no list of numbers"),
        ({"json": {"vector": [1.0] * 16, "key": RED}}, 400, "expected"),
        ({"json": []}, 400, "expected"),
        ({"content": "[" * 100_000}, 400, "no JSON"),
        ({"json": {"key": "../../etc/passwd"}}, 404, "no image of that key"),
        ({"content": '{"key": "\\ud800"}'}, 404, "no image of that key"),
    ],
)
def test_queries_that_are_refused(
    client: Client, served_index: Path, sent: dict[str, Any], status: int, said: str
) -> None:
    if isinstance(sent.get("content"), str):
        sent = {**sent, "headers": {"Content-Type": "application/json"}}
    answer = client(limits={"request_bytes": 1_000_000}).post("/search", **sent)
    assert (answer.status_code, said in answer.json()["error"]) == (status, True), answer.text
    assert str(served_index.parent) not in answer.text
    assert "Traceback" not in answer.text


@pytest.mark.parametrize("query", ["k=0", "k=x", "k=201", "readout=other"])
def test_options_out_of_range(client: Client, query: str) -> None:
    answer = client().post(f"/search?{query}", json={"key": RED})
    assert answer.status_code == 400
    assert answer.json()["error"].startswith(query.split("=")[0])


def test_a_body_that_does_not_say_its_size(client: Client) -> None:
    pieces = (bytes(100_000) for _ in range(30))
    answer = client(limits={"request_bytes": 1_000_000}).post("/search", content=pieces)
    assert answer.status_code == 413


def test_images(client: Client, served_index: Path) -> None:
    api = client()
    whole = api.get("/image", params={"key": RED})
    assert whole.content == (served_index.parent / "images" / RED).read_bytes()
    assert whole.headers["content-type"] == "image/png"
    assert whole.headers["x-content-type-options"] == "nosniff"
    small = Image.open(io.BytesIO(api.get("/thumbnail", params={"key": RED, "side": 16}).content))
    assert small.size == (16, 16)
    for key in ("", "..", "/etc/passwd", "../images/red/3.png", str(served_index.parent / "images" / RED)):
        for path in ("/image", "/thumbnail"):
            assert api.get(path, params={"key": key}).status_code == 404
    listed = api.get("/images", params={"text": "RED", "limit": 3}).json()
    assert listed["total"] == 10
    assert listed["images"][0] == {"key": "red/0.png", "label": "red"}
    assert api.get("/images", params={"label": "green"}).json()["total"] == 10
    assert (
        api.get("/images", params={"text": "5", "label": "blue"}).json()["images"][0]["key"] == "blue/5.png"
    )
    assert api.get("/index").json()["rows"] == 32


def test_images_that_moved_or_are_others_now(
    client: Client, served_index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_SETTLE_S", 0.01)
    folder = tmp_path / "images"
    (folder / "in").mkdir(parents=True)
    for name, tone in (("a", 10), ("b", 120), ("c", 250)):
        Image.new("RGB", (32, 32), (tone, 40, 90)).save(folder / "in" / f"{name}.png")
    Image.new("RGB", (32, 32), "olive").save(folder / "in" / "d.bmp")
    Image.new("RGB", (32, 32), "white").save(tmp_path / "secret.bmp")
    assert (
        embed([str(served_index), "--data.path", str(folder), "--output", str(tmp_path / "index"), *HERE])
        == 0
    )
    api = client(index=str(tmp_path / "index"))
    secret = tmp_path / "secret.png"
    Image.new("RGB", (33, 31), "white").save(secret)
    (folder / "in" / "a.png").unlink()
    (folder / "in" / "a.png").symlink_to(secret)
    (folder / "in" / "b.png").unlink()
    (folder / "in" / "d.bmp").unlink()
    (folder / "in" / "d.bmp").symlink_to(tmp_path / "secret.bmp")  # as large, with as many pixels
    assert api.get("/image", params={"key": "in/c.png"}).status_code == 200
    for key in ("in/a.png", "in/b.png", "in/d.bmp"):
        for path in ("/image", "/thumbnail"):
            answer = api.get(path, params={"key": key})
            assert answer.status_code == 410, key
            assert str(tmp_path) not in answer.text
    answer = api.post("/search", json={"key": "in/c.png"}).json()
    assert len(answer["neighbors"]) == 3
    assert answer["moved"] == ["in/b.png"]
    assert str(tmp_path) not in json.dumps(answer)


def test_tokens(client: Client) -> None:
    api = client(host="0.0.0.0")
    for wrong in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Basic {BEARER['Authorization'][7:]}"},
    ):
        for path in ("/index", "/images", f"/image?key={RED}", f"/thumbnail?key={RED}", "/galleries", "/map"):
            assert api.get(path, headers=wrong).status_code == 401
        assert api.post("/search", json={"key": RED}, headers=wrong).status_code == 401
        assert api.post("/session", headers=wrong).status_code == 401
    assert api.get("/index", headers={"Cookie": "instdisc=x"}).status_code == 401
    assert api.get("/health").json() == {"status": "ok"}
    assert api.get("/").status_code == 200
    assert api.get("/index", headers=BEARER).status_code == 200
    given = api.post("/session", headers=BEARER)
    assert given.status_code == 204
    assert "httponly" in given.headers["set-cookie"].lower()
    assert "samesite=strict" in given.headers["set-cookie"].lower()
    assert api.post("/search", json={"key": RED}).status_code == 200  # by the cookie


def test_a_name_that_leads_to_this_machine_is_not_ours(client: Client) -> None:
    api = client()
    assert api.get("/index").status_code == 200
    assert api.get("/index", headers={"Host": "somewhere.example"}).status_code == 400


def test_rates(client: Client) -> None:
    api = client(limits={"rate": 0.5})
    assert api.post("/search", json={"key": RED}).status_code == 200
    answer = api.post("/search", json={"key": RED})
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) in (1, 2)
    assert api.get("/images").status_code == 200
    rates = Rates(2.0)
    assert [rates.wait_s("a", 10.0), rates.wait_s("a", 10.0), rates.wait_s("a", 10.0)] == [0, 0, 0.5]
    assert [rates.wait_s("b", 10.0), rates.wait_s("a", 10.5)] == [0, 0]


def test_what_waits_is_done_together() -> None:
    calls: list[list[int]] = []

    def double(items: list[int]) -> list[int]:
        calls.append(items)
        time.sleep(0.05)
        if 13 in items:
            raise ValueError("unlucky")
        return [2 * item for item in items]

    async def ask() -> None:
        together = Together(double, most=4, waiting=6)
        first = asyncio.create_task(together(0))
        await asyncio.sleep(0.02)  # the first call is under way
        waiting = [asyncio.create_task(together(item)) for item in (1, 2, 3, 4, 5, 6)]
        await asyncio.sleep(0)
        with pytest.raises(TooManyWaitError):
            await together(7)
        waiting[0].cancel()
        assert await first == 0
        assert [await each for each in waiting[1:]] == [4, 6, 8, 10, 12]
        with pytest.raises(ValueError, match="unlucky"):
            await together(13)
        assert await together(8) == 16
        together.close()

    asyncio.run(ask())
    assert calls[:3] == [[0], [2, 3, 4], [5, 6]]  # the one that was given up is left out


def test_a_change_of_the_index_is_served(
    client: Client, served_index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_SETTLE_S", 0.01)
    monkeypatch.setattr("instdisc.serving.service._LOOK_S", 0.05)
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (32, 32), "red").save(folder / "a.png")
    where = ["--output", str(tmp_path / "index"), *HERE]
    assert embed([str(served_index), "--data.path", str(folder), *where]) == 0
    api = client(index=str(tmp_path / "index"))
    Image.new("RGB", (32, 32), "navy").save(folder / "b.png")
    assert embed(["--append", "--data.path", str(folder), *where]) == 0
    give_up_at = time.monotonic() + 30
    while api.get("/index").json()["generation"] == 1:
        assert time.monotonic() < give_up_at
        time.sleep(0.02)
    assert [each["key"] for each in api.post("/search", json={"key": "a.png"}).json()["neighbors"]] == [
        "b.png"
    ]


def test_galleries(client: Client, served_index: Path, tmp_path: Path) -> None:
    api = client()
    assert set(api.get("/galleries").json()["missing"]) == {"duplicates", "strangers", "clusters"}
    identity = dict(open_collection(served_index).identity)
    shown = {"shown": [{"row": 1, "others": [2, -1], "similarities": [0.9, 0.1]}]}
    central = {"clusters": {"2": {"sizes": [32], "central": [[{"row": 0, "similarity": 0.5}]]}}}
    place = tmp_path / "explored"
    place.mkdir()
    (place / "duplicates.json").write_text(json.dumps({**identity, **shown}))
    (place / "strangers.json").write_text(json.dumps({**identity, **shown, "attempt": "other"}))
    (place / "clusters.json").write_text(json.dumps({**identity, **central}))
    found = api.get("/galleries").json()
    keys = open_collection(served_index).read("keys").tolist()
    assert found["duplicates"][0]["key"] == keys[1]
    assert [each["key"] for each in found["duplicates"][0]["others"]] == [keys[2]]
    assert found["clusters"][0]["clusters"][0]["central"][0]["similarity"] == 0.5
    assert "earlier state" in found["missing"]["strangers"]


def test_the_map(client: Client, served_index: Path, tmp_path: Path) -> None:
    api = client()
    assert "run python -m instdisc.explore" in api.get("/map").json()["missing"]
    (tmp_path / "explored").mkdir()
    shown = {"rows": [0, 31], "places": [[0.5, -1], [2, 3]]}
    values = {**dict(open_collection(served_index).identity), "images": 32, "shown": shown}
    (tmp_path / "explored" / "map.json").write_text(json.dumps(values))
    keys = open_collection(served_index).read("keys").tolist()
    found = api.get("/map").json()
    assert (found["keys"], found["places"]) == ([keys[0], keys[31]], shown["places"])
    assert (found["images"], found["labels"][1]) == (32, None)
    (tmp_path / "explored" / "map.json").write_text(json.dumps({**values, "shown": {"rows": [99]}}))
    assert api.get("/map").status_code == 503


def test_images_are_added_and_removed(client: Client, served_index: Path, tmp_path: Path) -> None:
    """By the programs themselves, in processes of their own; what an image becomes can be searched at once."""
    index, images = Path(shutil.copytree(served_index, tmp_path / "index")), tmp_path / "new"
    api = client(index=str(index), add_from=(str(images),))
    solid(images, {"red": (200, 30, 30), "yellow": (220, 220, 40)}, 1)
    for path, body in (("/images/add", None), ("/images/remove", {"keys": [RED]})):
        for wrong in ({}, {"Authorization": "Bearer x"}, {"Cookie": "instdisc=x"}):
            assert api.post(path, json=body, headers=wrong).status_code == 401
        assert client(token=None).post(path, json=body, headers=BEARER).status_code == 403
    added = api.post("/images/add", headers=BEARER)
    assert added.json() == {"added": 1, "generation": 3, "rows": 33}, added.text  # one is there already
    found = api.post("/search?k=1", content=(images / "yellow" / "0.png").read_bytes()).json()
    assert found["neighbors"][0]["key"] == "yellow/0.png"
    removed = api.post("/images/remove", json={"keys": [RED, "red/99.png", "blue/*"]}, headers=BEARER)
    assert removed.json() == {"removed": 11, "unknown": ["red/99.png"], "generation": 4, "rows": 22}
    assert api.get("/image", params={"key": RED}).status_code == 404
    with claim_index(str(index)):
        busy = api.post("/images/remove", json={"keys": ["red/1.png"]}, headers=BEARER)
    assert busy.status_code == 409
    assert f"process {os.getpid()} of" in busy.json()["error"]
    assert str(tmp_path) not in busy.text


def test_changes_that_are_refused(client: Client) -> None:
    api = client()
    assert "--add-from" in api.post("/images/add", headers=BEARER).json()["error"]
    for body in (b"", b"[]", b'{"keys": "red"}', b'{"keys": [1]}', b'{"keys": ["a\\nb"]}'):
        assert api.post("/images/remove", content=body, headers=BEARER).status_code == 400
