"""Tars kept on the node's own disk: what is read is right at any moment, whoever fills the folder or is killed."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipelines import cache as cache_module
from pipelines import remote
from pipelines.build import build_manifest
from pipelines.cache import TarCache, check_cache
from pipelines.errors import DataError
from pipelines.manifest import Manifest
from pipelines.places import Url
from pipelines.reader import ImageReader
from pipelines.settings import CacheConfig
from tests.pipelines.stored import png, write_tar
from tests.processes import files_of_at_most
from tests.range_server import RangeServer, range_server

NUM_TARS = 4


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RangeServer]:
    with range_server() as state:
        for number in range(NUM_TARS):
            members = {f"{number}-{each}.png": png(each + 1, number + 1) for each in range(5)}
            state.files[f"/{number}.tar"] = write_tar(
                tmp_path / "near" / f"{number}.tar", members
            ).read_bytes()
        yield state


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(remote, "_FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(cache_module, "_LOOK_AGAIN_S", 0.05)
    yield
    cache_module.open_cache.cache_clear()


def urls(server: RangeServer) -> list[Url]:
    return [Url(server.url + name) for name in sorted(server.files)]


def config(tmp_path: Path, most_bytes: int = 1 << 30) -> CacheConfig:
    return CacheConfig(folder=tmp_path / "cache", most_bytes=most_bytes)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def kept(cache: TarCache, server: RangeServer) -> list[int]:
    return [number for number, url in enumerate(urls(server)) if cache.path(url)]


def images(manifest: Manifest, cache: CacheConfig | None = None) -> list[object]:
    return list(ImageReader(manifest, cache).read_many(range(len(manifest))))


def test_images_are_the_same_before_and_after_their_tars_are_kept(
    server: RangeServer, tmp_path: Path
) -> None:
    near, far = build_manifest(tmp_path / "near"), build_manifest(f"{server.url}/{{0..3}}.tar")
    expected = images(near)
    reader = ImageReader(far, config(tmp_path))
    cache = cache_module.open_cache(config(tmp_path))
    rows = range(len(far))
    while len(kept(cache, server)) < NUM_TARS:
        assert reader.read_many(rows) == expected
    server.files.clear()
    assert reader.read_many(rows) == expected
    cache.close()


def test_a_small_cache_keeps_the_first_tars(server: RangeServer, tmp_path: Path) -> None:
    size = len(server.files["/0.tar"])
    cache = TarCache(config(tmp_path, 2 * size + size // 2))
    cache.want(urls(server))
    until(lambda: kept(cache, server) == [0, 1])
    time.sleep(0.2)
    cache.close()
    assert kept(cache, server) == [0, 1]
    assert sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.*tar*")) <= 2 * size + size // 2


def test_tars_of_earlier_runs_make_room(server: RangeServer, tmp_path: Path) -> None:
    size = len(server.files["/0.tar"])
    first, second = TarCache(config(tmp_path, 2 * size)), TarCache(config(tmp_path, 2 * size))
    first.want(urls(server)[:2])
    until(lambda: kept(first, server) == [0, 1])
    first.close()
    second.want(urls(server)[1:3])
    until(lambda: kept(second, server) == [1, 2])
    second.close()
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 2


def test_another_version_of_a_tar_is_fetched_anew(server: RangeServer, tmp_path: Path) -> None:
    url = urls(server)[0]
    for version in (1, 2):
        server.versions["/0.tar"] = version
        cache = TarCache(config(tmp_path))
        cache.want([url])
        until(lambda cache=cache: cache.path(url) is not None)  # type: ignore[misc]
        cache.close()
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 2


def test_a_tar_that_changes_while_it_is_fetched_is_not_kept(
    server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pieces = cache_module._pieces

    def change(wanted: cache_module._Wanted) -> Iterator[bytes | None]:
        yield from pieces(wanted)
        server.versions["/0.tar"] = 7

    monkeypatch.setattr(cache_module, "_pieces", change)
    cache = TarCache(config(tmp_path))
    cache.want(urls(server)[:1])
    until(lambda: "changed while it was fetched" in caplog.text)
    cache.close()
    assert not list((tmp_path / "cache").glob("*.tar"))
    assert kept(cache, server) == []


def test_two_runs_share_a_folder(
    server: RangeServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, same, other = (TarCache(config(tmp_path)) for _ in range(3))
    first.want(urls(server)[:2])
    until(lambda: kept(first, server) == [0, 1])
    requests = len(server.requests)
    same.want(urls(server)[:2])
    until(lambda: kept(same, server) == [0, 1])
    assert all(method.startswith("HEAD") for method, _ in server.requests[requests:])
    assert "another run" not in caplog.text
    other.want(urls(server)[1:])
    until(lambda: f"is being filled by another run, process {os.getpid()} on" in caplog.text)
    assert kept(other, server) == [1]
    first.close()
    same.close()
    until(lambda: kept(other, server) == [1, 2, 3])
    other.close()


def test_a_file_that_somebody_deleted_or_cut(server: RangeServer, tmp_path: Path) -> None:
    far = build_manifest(f"{server.url}/{{0..3}}.tar")
    cache = cache_module.open_cache(config(tmp_path))
    expected = images(far)
    assert images(far, config(tmp_path)) == expected
    until(lambda: len(kept(cache, server)) == NUM_TARS)
    for path in (tmp_path / "cache").glob("*.tar"):
        path.unlink()
    assert images(far, config(tmp_path)) == expected
    cache.close()


def _fill(folder: Path, wanted: list[str]) -> None:
    TarCache(CacheConfig(folder=folder, most_bytes=1 << 30)).want(map(Url, wanted))
    time.sleep(60)


def test_what_a_killed_process_leaves_is_never_read(server: RangeServer, tmp_path: Path) -> None:
    folder, wanted = tmp_path / "cache", [str(url) for url in urls(server)]
    contents = set(server.files.values())
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_fill, args=(folder, wanted))
    process.start()
    until(lambda: folder.exists() and any(folder.glob("*.tar")))
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert {path.read_bytes() for path in folder.glob("*.tar")} <= contents
    (folder / "torn.partial").write_bytes(b"half")
    cache = TarCache(config(tmp_path))
    cache.want(urls(server))
    until(lambda: len(kept(cache, server)) == NUM_TARS)
    cache.close()
    assert not list(folder.glob("*.partial"))
    assert {path.read_bytes() for path in folder.glob("*.tar")} == contents


def test_a_full_disk_is_said_once(
    server: RangeServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["/1.tar"] += bytes(200_000)
    with files_of_at_most(150_000):
        caches = [TarCache(config(tmp_path)) for _ in range(2)]
        for cache in caches:
            cache.want(urls(server))
        until(lambda: "cannot take more (File too large): of 4 tars 1 are kept" in caplog.text)
        time.sleep(0.3)
        assert [kept(cache, server) for cache in caches] == [[0], [0]]
    for cache in caches:
        cache.close()
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, server: RangeServer, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"cannot keep tars in .*/cache: File exists; name a writable folder"):
        check_cache(config(tmp_path))
    far = build_manifest(f"{server.url}/{{0..3}}.tar")
    assert images(far, config(tmp_path)) == images(far)
    until(lambda: "images are read from their storage instead" in caplog.text)
