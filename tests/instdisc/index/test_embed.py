"""The program that makes an index and changes it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import torch
from PIL import Image

import instdisc
from cluster.collection import Collection, open_block
from cluster.lease import Lease
from cluster.snapshots import open_snapshot, seal
from cluster.storage import Storage
from instdisc import inspect
from instdisc.evaluation.source import Source
from instdisc.index.images import manifest_of
from instdisc.index.model import model_of
from instdisc.index.readout import read_whitening
from instdisc.model.whitening import fit
from pipelines.manifest import Manifest
from pipelines.reader import ImageReader
from tests.instdisc.index.conftest import Embed
from tests.instdisc.program import picture, solid
from tests.instdisc.test_evaluate import add_snapshot
from tests.processes import files_of_at_most

Opened = Callable[[], Collection]
ROOT = Path(__file__).resolve().parents[3]


def done(outcome: tuple[int, str], *texts: str) -> None:
    status, said = outcome
    assert status == 0, said
    for text in texts:
        assert text in said


def refused(outcome: tuple[int, str], *texts: str) -> None:
    status, said = outcome
    assert status == 2, said
    assert "Traceback" not in said
    said = " ".join(said.replace("│", " ").split())
    for text in texts:
        assert text in said


def vectors_of(trained: Path, index: Collection) -> np.ndarray:
    """What the run's network gives for the images of an index, in the order of its rows."""
    manifest = manifest_of(index)
    places = [manifest.root / manifest.name(row) for row in range(len(manifest))]
    return instdisc.open_run(trained).embed(places)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_index_holds_what_the_network_gives(
    embed: Embed, opened: Opened, trained: Path, dtype: str
) -> None:
    done(embed(trained, "--dtype", dtype, "--block-rows", "8"), "30 images added", f"30 images, 16 x {dtype}")
    index, manifest = opened(), Manifest.load(trained / "manifest")
    rows = index.read("embeddings")
    assert rows.dtype == dtype
    assert rows == pytest.approx(vectors_of(trained, index), abs=2e-5 if dtype == "float32" else 1e-3)
    assert index.read("keys").tolist() == list(manifest.keys)
    assert index.read("labels").tolist() == manifest.labels.tolist()
    assert index.attributes["class_names"] == list(manifest.class_names)
    assert index.read("image_sizes").tolist() == [[32, 32]] * 30
    assert model_of(index) == model_of(open_snapshot(trained / "snapshots"))
    white = fit(torch.from_numpy(rows.astype(np.float32)))
    torch.testing.assert_close(read_whitening(index).mean_D, white.mean_D)
    torch.testing.assert_close(read_whitening(index).matrix_DK, white.matrix_DK)
    done(embed("--verify"), "whole, 30 images in 4 blocks")
    assert inspect.main([opened().url]) == 0


def test_the_images_of_an_index_are_those_of_its_manifest(
    embed: Embed, opened: Opened, trained: Path
) -> None:
    embed(trained, "--block-rows", "8")
    ours, theirs = manifest_of(opened()), Manifest.load(trained / "manifest")
    assert ours.fingerprint == theirs.fingerprint
    chosen = manifest_of(opened(), np.array([20, 3]))
    assert [chosen.name(0), chosen.name(1)] == [ours.name(20), ours.name(3)]
    reader = ImageReader(ours)
    assert reader.decode(7).tobytes() == ImageReader(theirs).decode(7).tobytes()


def test_other_images_and_then_more(embed: Embed, opened: Opened, trained: Path, images: Path) -> None:
    """New ones become rows, of new classes too; those that changed are embedded again; the rest stays."""
    done(embed(trained, "--data.path", images), "30 images added")
    before = opened()
    solid(images / "more", {"gray": (120, 120, 120)}, 2)
    shutil.move(images / "more" / "gray", images / "gray")
    (images / "more").rmdir()
    Image.new("RGB", (32, 32), "white").save(images / "red" / "3.png")
    refused(embed(trained, "--data.path", images), "lacks 3 of these 32 images: pass --append")
    done(embed("--append", "--data.path", images), "2 images added, 1 embedded again, 29 were there")
    index = opened()
    keys = index.read("keys").tolist()
    assert keys == [
        *(key for key in before.read("keys") if key != "red/3.png"),
        "gray/0.png",
        "gray/1.png",
        "red/3.png",
    ]
    assert index.read("embeddings") == pytest.approx(vectors_of(trained, index), abs=2e-5)
    names = np.array(index.attributes["class_names"])[index.read("labels")].tolist()
    assert names == [key.partition("/")[0] for key in keys]
    assert before.read("keys").tolist()[23] == "red/3.png"  # a reader of the state before still sees that
    done(embed("--append", "--data.path", images), "nothing to embed: all 32 images")
    done(embed("--compact"), "32 images")
    assert opened().read("keys").tolist() == keys
    done(embed("--verify"), "whole, 32 images in 1 blocks")


def test_a_name_that_means_another_image_is_told_apart(
    embed: Embed, opened: Opened, trained: Path, images: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other" / "red"
    other.mkdir(parents=True)
    for name in ("0.png", "same.png"):
        picture(5).save(other / name)
    shutil.copy(images / "red" / "1.png", other / "1.png")
    embed(trained, "--data.path", images)
    done(embed("--append", "--data.path", other.parent), "2 images added, 0 embedded again, 1 were there")
    assert opened().read("keys").tolist()[30:] == [f"{other}/0.png", "red/same.png"]
    # The two loaders resize to the same pixels up to rounding.
    assert opened().read("embeddings") == pytest.approx(vectors_of(trained, opened()), abs=1e-3)
    done(embed("--append", "--data.path", other.parent), "nothing to embed")
    picture(6).save(other / "0.png")
    done(embed("--append", "--data.path", other.parent), "0 images added, 1 embedded again, 2 were there")


def test_images_are_removed_by_key_pattern_and_file(
    embed: Embed, opened: Opened, trained: Path, tmp_path: Path
) -> None:
    embed(trained)
    names = [f"unknown/{number}.png" for number in range(100_000)]
    (tmp_path / "keys.txt").write_text("\n".join([*names, "red/1.png", "", "red/2.png"]))
    done(
        embed("--remove", f"@{tmp_path / 'keys.txt'}", "green/?.png", "blue/[", "blue/0.png"),
        "13 images removed",
    )
    keys = opened().read("keys").tolist()
    assert len(keys) == 17
    assert not {"red/1.png", "red/2.png", "blue/0.png"} & set(keys)
    assert not any(key.startswith("green") for key in keys)


def test_names_to_remove_that_are_unknown_are_printed(embed: Embed, opened: Opened, trained: Path) -> None:
    embed(trained)
    status, said = embed("--remove", "red/1.png", "nothing.png", "gray/*")
    assert status == 0
    assert "unknown: nothing.png\nunknown: gray/*\n1 images removed, 2 names are unknown" in said
    refused(embed("--remove", "red/1.png"), "unknown: red/1.png", "none of the 1 names given")
    refused(embed("--remove", "@/nowhere.txt"), "cannot be read")
    assert opened().num_rows == 29


def test_removed_images_come_back(embed: Embed, opened: Opened, trained: Path, images: Path) -> None:
    embed(trained, "--data.path", images)
    embed("--remove", "red/*")
    done(embed("--append", "--data.path", images), "10 images added, 0 embedded again, 20 were there")
    assert sorted(opened().read("keys")) == sorted(Manifest.load(trained / "manifest").keys)
    embed("--remove", "*")
    done(embed("--append", "--data.path", images), "30 images added")
    done(embed("--verify"), "whole, 30 images")


def test_images_that_cannot_be_decoded_are_named_and_left_out(
    embed: Embed, opened: Opened, trained: Path, images: Path
) -> None:
    for name in ("3", "4"):
        path = images / "red" / f"{name}.png"
        path.write_bytes(path.read_bytes()[:-300])
    said = embed(trained, "--data.path", images, "--block-rows", "8")
    done(said, "28 images added", "2 cannot be decoded", "red/3.png: ", "red/4.png: ")
    assert opened().num_rows == 28
    assert opened().read("embeddings") == pytest.approx(vectors_of(trained, opened()), abs=2e-5)


def test_a_full_disk_costs_nothing_of_an_index(
    embed: Embed, opened: Opened, trained: Path, images: Path
) -> None:
    done(embed(trained, "--data.path", images), "30 images added")
    before = opened().read("embeddings")
    solid(images / "more", {"gray": (120, 120, 120)}, 20)
    with files_of_at_most(600):
        status, said = embed("--append", "--data.path", images)
    assert status == 1
    assert "cannot be written to" in said
    assert "free some space there" in said
    assert (opened().read("embeddings") == before).all()
    done(embed("--append", "--data.path", images), "20 images added")


def test_none_of_the_images_can_be_decoded(embed: Embed, trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    picture(0).save(folder / "0.png")
    (folder / "0.png").write_bytes((folder / "0.png").read_bytes()[:-100])
    refused(embed(trained, "--data.path", folder), "none of the images can be decoded")
    assert not (tmp_path / "index" / "STATE.json").exists()


def test_vectors_of_two_networks_do_not_mix(
    embed: Embed, opened: Opened, trained: Path, tmp_path: Path
) -> None:
    embed(trained)
    other = Path(shutil.copytree(trained, tmp_path / "other"))
    snapshot = open_snapshot(other / "snapshots")
    weights = snapshot.read_file("network.safetensors")
    changed = add_snapshot(other, snapshot.step + 1)
    done(embed(changed), "nothing to embed")  # another step, the same weights
    piece = Path(changed) / "test" / "network.safetensors"
    piece.write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    refused(embed(changed, "--append"), "network.safetensors")  # the snapshot is damaged
    document = json.loads((Path(changed) / "COMMIT.json").read_text())
    document["pieces"]["network.safetensors"] = [
        len(weights),
        int(google_crc32c.value(piece.read_bytes())),
    ]
    (Path(changed) / "COMMIT.json").write_bytes(seal({k: v for k, v in document.items() if k != "crc32c"}))
    refused(embed(changed, "--append"), "vectors of another network", "choose another --output")
    assert opened().num_rows == 30


def test_one_process_writes_at_a_time(embed: Embed, opened: Opened, trained: Path, tmp_path: Path) -> None:
    embed(trained)
    holder = Lease(Storage.at(tmp_path / "index"), "LEASE", lambda holder: None)
    holder.acquire(settle=False)
    for arguments in (["--remove", "red/*"], ["--compact"], [trained, "--append"]):
        refused(
            embed(*arguments), f"another process is writing to {tmp_path / 'index'} (process {os.getpid()} on"
        )
    done(embed("--verify"), "whole, 30 images")
    holder.release()
    done(embed("--remove", "red/*"), "10 images removed")


def test_where_images_moved_to(
    embed: Embed, opened: Opened, trained: Path, images: Path, tmp_path: Path
) -> None:
    embed(trained, "--data.path", images)
    moved = images.rename(tmp_path / "moved")
    done(embed("--data.root", moved), "30 images")
    assert vectors_of(trained, opened()).shape == (30, 16)
    done(embed("--append", "--data.path", moved), "nothing to embed")
    solid(tmp_path / "second", {"gray": (120, 120, 120)}, 2)
    embed("--append", "--data.path", tmp_path / "second")
    (tmp_path / "second").rename(tmp_path / "third")
    refused(embed("--data.root", tmp_path / "third"), "lie in 2 folders", "--data.root OLD=NEW")
    refused(embed("--data.root", f"/nowhere={tmp_path}"), "/nowhere is none of the folders")
    done(embed("--data.root", f"{tmp_path / 'second'}={tmp_path / 'third'}"), "32 images")
    assert vectors_of(trained, opened()).shape == (32, 16)


def test_the_run_whose_images_moved(embed: Embed, trained: Path, images: Path, opened: Opened) -> None:
    done(embed(trained, "--data.root", images), "30 images added")
    assert manifest_of(opened()).root == images


def test_what_cannot_be_done_is_refused(embed: Embed, trained: Path, tmp_path: Path) -> None:
    refused(embed("--data.path", trained), "name a RUN to embed images with")
    refused(embed("--append", "--remove", "a"), "--append and --remove, expected one of them")
    refused(embed(trained, "--compact"), "got --compact with RUN")
    refused(embed(trained, "--block-rows", "0"), "at least 1")
    refused(embed(trained, "--data.path", tmp_path / "nothing"), "--data.path: ")
    (tmp_path / "file").write_text("")
    refused(embed(trained, output=tmp_path / "file"), "is a file: choose another --output")
    refused(embed(trained, output=trained), "holds other files")
    refused(embed(tmp_path / "nothing"), "")
    for action in (["--compact"], ["--remove", "a"], ["--verify"]):
        refused(embed(*action, output=tmp_path / "nothing"), "there is no index")
    embed(trained)
    refused(embed(), "holds an index already: say what to do")
    refused(embed("--append"), "Name them with --data.path")


def test_what_is_broken_is_named(embed: Embed, trained: Path, tmp_path: Path) -> None:
    embed(trained)
    piece = next((tmp_path / "index" / "blocks").rglob("embeddings/c.0.0"))
    content = bytearray(piece.read_bytes())
    content[40] ^= 1
    piece.write_bytes(content)
    status, said = embed("--verify")
    assert status == 1
    assert "embeddings/c.0.0: its checksum differs" in said
    assert inspect.main([str(tmp_path / "index")]) == 1


def test_an_index_is_a_source_without_its_run(
    embed: Embed, trained: Path, images: Path, tmp_path: Path
) -> None:
    """It holds the network, so that another one can be made of it."""
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    embed(run, "--data.path", images)
    assert Source(str(tmp_path / "index")).has_run
    shutil.rmtree(run)
    done(embed(tmp_path / "index", "--data.path", images, output=tmp_path / "again"), "30 images added")
    source = Source(str(tmp_path / "again"))
    assert not source.has_run
    assert model_of(source.snapshot) == model_of(open_snapshot(trained / "snapshots"))


@pytest.mark.slow
def test_a_killed_command_goes_on_where_it_was(
    embed: Embed, opened: Opened, trained: Path, images: Path, tmp_path: Path
) -> None:
    """The first blocks are not embedded again, there is no index before all are there, and it is the same then."""
    solid(images / "more", {"gray": (120, 120, 120)}, 400)
    index = tmp_path / "index"
    arguments = [str(trained), "--data.path", str(images), "--output", str(index), "--block-rows", "8"]
    arguments += ["--num-actors", "0", "--loader.backend", "host"]
    with subprocess.Popen([sys.executable, "-m", "instdisc.embed", *arguments], cwd=ROOT) as process:
        while not len(list(index.glob("blocks/*/COMMIT.json"))) >= 3:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    first = {path.parent.name: path.read_bytes() for path in index.glob("blocks/*/COMMIT.json")}
    assert 3 <= len(first) < 54
    assert not (index / "STATE.json").exists()
    done(embed(trained, "--data.path", images, "--block-rows", "8"), "430 images added")
    for name, commit in first.items():
        assert (index / "blocks" / name / "COMMIT.json").read_bytes() == commit
        assert open_block(str(index), name) is not None
    assert opened().read("embeddings") == pytest.approx(vectors_of(trained, opened()), abs=2e-5)
    done(embed("--verify"), "whole, 430 images in 54 blocks")
