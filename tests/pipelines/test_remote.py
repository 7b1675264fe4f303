"""Tars by URL: over HTTP from a server that fails when told to, and from an S3 server."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import s3fs

from pipelines import remote
from pipelines.build import build_manifest
from pipelines.decode import CorruptImage
from pipelines.errors import DataError
from pipelines.manifest import Manifest
from pipelines.places import Url, place, without_secrets
from pipelines.reader import ImageReader
from pipelines.remote import Span, StorageError, facts, read_ranges
from tests.pipelines.images import BACKENDS, encode, fail, in_order, load, photo, same
from tests.pipelines.stored import write_tar
from tests.range_server import RangeServer, range_server
from tests.s3 import s3_bucket, s3_server


@pytest.fixture
def server() -> Iterator[RangeServer]:
    with range_server() as state:
        yield state


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_FIRST_WAIT_S", 0.001)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3_server() as url:
        yield url


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> s3fs.S3FileSystem:
    return s3_bucket(endpoint, "images", monkeypatch)


def noise(side: int, seed: int) -> bytes:
    """A PNG of about 3 · side² bytes."""
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (side, side + seed, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_tars(folder: Path) -> dict[str, bytes]:
    """Two tars of small and large images with labels, and a file of class names."""
    for name, offset in (("train-0.tar", 0), ("train-1.tar", 6)):
        members: dict[str, bytes] = {}
        for number in range(offset, offset + 6):
            members[f"{number:03}.png"] = noise(170 if number % 3 else 20, number)
            members[f"{number:03}.cls"] = b"%d" % (number % 2)
        members[f"long/{'n' * 120}-{offset}.jpg"] = encode(photo(40, 50, offset), "JPEG")
        members[f"{offset}-broken.png"] = b"\x89PNG\r\n\x1a\n" + bytes(90_000)
        write_tar(folder / name, members)
    (folder / "classnames.txt").write_text("cat\ndog\n")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same(far: Manifest, near: Manifest) -> None:
    assert far.fingerprint == near.fingerprint
    assert far.rejected == near.rejected
    rows = list(range(len(near)))
    assert ImageReader(far).read_many(rows) == ImageReader(near).read_many(rows)


def test_a_manifest_of_urls_is_that_of_the_files(server: RangeServer, tmp_path: Path) -> None:
    files = write_tars(tmp_path)
    server.files = {f"/data/{name}": content for name, content in files.items()}
    near = build_manifest(tmp_path)
    pattern = f"{server.url}/data/train-{{0..1}}.tar"
    far = build_manifest(pattern)
    assert far.class_names == ("cat", "dog")
    assert str(far.root) == f"{server.url}/data"
    assert far.name(0) == "train-0.tar!000.png"
    assert_same(far, near)
    listed = tmp_path / "list.txt"
    listed.write_text(f"{server.url}/data/train-0.tar\n{server.url}/data/train-1.tar\n")
    assert build_manifest(listed).fingerprint == near.fingerprint
    far.save(tmp_path / "manifest")
    assert_same(Manifest.load(tmp_path / "manifest"), near)
    assert pickle.loads(pickle.dumps(far)).root == far.root


def test_listing_reads_no_images(server: RangeServer, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {f"{number}.png": noise(300, number) for number in range(40)})
    server.files = {"/x.tar": path.read_bytes()}
    far = build_manifest(f"{server.url}/x.tar")
    assert far.fingerprint == build_manifest(path).fingerprint
    assert server.bytes_sent < 0.1 * path.stat().st_size


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_are_those_of_the_files(server: RangeServer, tmp_path: Path, backend: str) -> None:
    files = write_tars(tmp_path)
    server.files = {f"/{name}": content for name, content in files.items()}
    near, far = build_manifest(tmp_path), build_manifest(f"{server.url}/train-{{0..1}}.tar")
    server.failures = 3
    requests = in_order(len(near), 7)
    options = {"on_corrupt": fail}
    assert same(load(near, requests, backend, **options), load(far, requests, backend, **options))


def test_ranges_that_lie_close_together_are_one_request(server: RangeServer) -> None:
    content = bytes(range(256)) * 1024
    server.files = {"/a": content, "/b": content}
    a, b = Url(f"{server.url}/a"), Url(f"{server.url}/b")
    wanted = [Span(a, 5000, 6000), Span(b, 0, 10), Span(a, 0, 5000), Span(a, 200_000, 200_100)]
    assert read_ranges(wanted) == [content[each.start : each.stop] for each in wanted]
    assert len(server.requests) == 3
    assert read_ranges([]) == []


def test_a_request_that_fails_is_made_again(server: RangeServer) -> None:
    server.files = {"/a": bytes(1000)}
    server.failures = 4
    assert read_ranges([Span(Url(f"{server.url}/a"), 0, 10)]) == [bytes(10)]
    server.failures = 1000
    with pytest.raises(
        StorageError, match=r"cannot read http://.*/a: tried 6 times in .*503.*resumes from the newest"
    ):
        read_ranges([Span(Url(f"{server.url}/a"), 0, 10)])
    with pytest.raises(StorageError, match="tried 6 times"):
        facts(Url(f"{server.url}/a"))


def test_storage_that_is_not_there() -> None:
    with pytest.raises(DataError, match=r"cannot read http://127\.0\.0\.1:9/x\.tar: tried 6 times"):
        build_manifest("http://127.0.0.1:9/x.tar")


def test_a_tar_that_shrinks(server: RangeServer, tmp_path: Path) -> None:
    content = write_tar(
        tmp_path / "x.tar", {f"{number}.png": noise(100, number) for number in range(4)}
    ).read_bytes()
    server.files = {"/x.tar": content}
    manifest = build_manifest(f"{server.url}/x.tar")
    server.files["/x.tar"] = content[: int(manifest.offsets[2]) + 100]
    found = ImageReader(manifest).read_many([0, 2, 3])
    assert isinstance(found[0], bytes)
    assert [str(each) for each in found[1:]] == [
        f"is cut short: 100 of {manifest.sizes[2]} bytes",
        f"is cut short: 0 of {manifest.sizes[3]} bytes",
    ]
    del server.files["/x.tar"]
    with pytest.raises(CorruptImage, match="cannot be read: not there"):
        ImageReader(manifest).read(0)
    server.files["/x.tar"] = content[:-20_000]
    with pytest.raises(DataError, match=r"x\.tar is cut short"):
        build_manifest(f"{server.url}/x.tar")


def test_a_server_without_ranges_is_refused(server: RangeServer, tmp_path: Path) -> None:
    server.files = {"/x.tar": write_tar(tmp_path / "x.tar", {"0.png": noise(100, 0)}).read_bytes()}
    server.ignores_ranges = True
    with pytest.raises(DataError, match="the server sends whole files only"):
        build_manifest(f"{server.url}/x.tar")


@pytest.mark.parametrize("status", [401, 403])
def test_no_right(server: RangeServer, status: int) -> None:
    server.status = status
    with pytest.raises(
        DataError, match=r"no right to read http://.*/x\.tar: .*credentials where fsspec looks"
    ):
        build_manifest(f"{server.url}/x.tar")
    assert len(server.requests) <= 2


def test_what_is_not_there(server: RangeServer) -> None:
    with pytest.raises(DataError, match=r"cannot read http://.*x\.tar"):
        build_manifest(f"{server.url}/x.tar")
    with pytest.raises(DataError, match=r"images lie in uncompressed \.tar files"):
        build_manifest(f"{server.url}/x.tar.gz")
    with pytest.raises(DataError, match=r"nosuch:// is not a kind of URL that fsspec knows"):
        build_manifest("nosuch://host/x.tar")
    with pytest.raises(DataError, match=r"different kinds of storage"):
        build_manifest([f"{server.url}/x.tar", "s3://images/x.tar"])


def test_a_scheme_that_is_not_installed_names_its_package() -> None:
    with pytest.raises(DataError, match=r"gs:// URLs need its package: .*gcsfs"):
        build_manifest("gs://bucket/x.tar")


def test_credentials_are_refused_and_not_printed() -> None:
    for url in (
        "https://me:hidden@host/x.tar",
        "https://host/x.tar?X-Amz-Signature=hidden",
        "ftp://me:hidden@host/x.tar",
    ):
        with pytest.raises(DataError, match="holds credentials; leave them out") as caught:
            place(url)
        assert "hidden" not in str(caught.value)
    for said in (
        "https://host/x?sig=hidden'",
        "ftp://me:hidden@host",
        "Authorization: Bearer hidden",
        "secret_key=hidden",
    ):
        assert "hidden" not in without_secrets(said)
    assert without_secrets("Cannot connect to host 127.0.0.1:9") == "Cannot connect to host 127.0.0.1:9"


def test_urls_are_written_as_they_were() -> None:
    for text in ("s3://b/a/x.tar", "memory://x.tar", "https://host:80/a/b"):
        assert str(Url(text)) == text
    assert str(Url("s3://b/a") / "x.tar") == "s3://b/a/x.tar"
    assert str(place("file:///a/b")) == "/a/b"
    with pytest.raises(DataError, match="names no host or bucket"):
        place("hdfs:///a")


def test_s3(bucket: s3fs.S3FileSystem, tmp_path: Path) -> None:
    for name, content in write_tars(tmp_path).items():
        bucket.pipe_file(f"images/set/{name}", content)
    near = build_manifest(tmp_path)
    for named in (
        "s3://images/set/train-{0..1}.tar",
        "s3://images/set/train-*.tar",
        "s3://images/set",
        "s3://images/set/",
    ):
        assert build_manifest(named).fingerprint == near.fingerprint
    far = build_manifest("s3://images/set")
    assert_same(far, near)
    bucket.pipe_file("images/set/train-1.tar", b"")
    found = ImageReader(far).read_many([0, len(far) - 1])
    assert isinstance(found[0], bytes)
    assert "is cut short: 0 of" in str(found[1])
    for named in ("s3://nowhere/x.tar", "s3://images/x.tar", "s3://nowhere/*.tar", "s3://images/none-*.tar"):
        with pytest.raises(DataError, match=named.replace("*", r"\*")):
            build_manifest(named)


def test_s3_without_credentials(endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    s3fs.S3FileSystem.clear_instance_cache()
    remote._opened.cache_clear()
    try:
        with pytest.raises(DataError, match=r"no right to read s3://images/x\.tar: .*~/\.aws"):
            build_manifest("s3://images/x.tar")
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        remote._opened.cache_clear()
