"""Lists of the splits of data sets, from tiny archives of their layout."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from examples.retrieval_lists import main
from pipelines.build import build_manifest
from tests.instdisc.program import picture

PRODUCTS = "image_id class_id super_class_id path\n"


def save(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(folder / name)


def birds(folder: Path) -> None:
    names = ["001.Crow/a 1.png", "100.Pelican/b.png", "101.Pipit/c.png", "101.Pipit/d.png"]
    save(folder / "images", *names)
    (folder / "images.txt").write_text("".join(f"{number} {name}\n" for number, name in enumerate(names, 1)))
    (folder / "image_class_labels.txt").write_text("1 1\n2 100\n3 101\n4 101\n")
    (folder / "classes.txt").write_text("1 001.Crow\n100 100.Pelican\n101 101.Pipit\n")


def cars(folder: Path) -> None:
    names, classes = ["car_ims/1.png", "car_ims/2.png", "car_ims/3.png"], [98, 1, 99]
    save(folder, *names)
    rows = np.zeros((1, 3), [("relative_im_path", "O"), ("bbox_x1", "O"), ("class", "O"), ("test", "O")])
    for row, name, label in zip(rows[0], names, classes, strict=True):
        row["relative_im_path"], row["bbox_x1"], row["class"], row["test"] = name, 5, label, label % 2
    models = np.array([[f"Maker, model {number}" for number in range(1, 197)]], dtype=object)
    savemat(folder / "cars_annos.mat", {"annotations": rows, "class_names": models})


def products(folder: Path) -> None:
    save(folder, "chair_final/1_0.png", "chair_final/1_1.png", "sofa_final/11319_0.png")
    (folder / "Ebay_train.txt").write_text(
        f"{PRODUCTS}1 1 2 chair_final/1_0.png\n2 1 2 chair_final/1_1.png\n"
    )
    (folder / "Ebay_test.txt").write_text(f"{PRODUCTS}59552 11319 9 sofa_final/11319_0.png\n")


@pytest.mark.parametrize(
    ("write", "train", "test"),
    [
        (
            birds,
            [["images/001.Crow/a 1.png", "001.Crow"], ["images/100.Pelican/b.png", "100.Pelican"]],
            [["images/101.Pipit/c.png", "101.Pipit"], ["images/101.Pipit/d.png", "101.Pipit"]],
        ),
        (
            cars,
            [["car_ims/1.png", "Maker, model 98"], ["car_ims/2.png", "Maker, model 1"]],
            [["car_ims/3.png", "Maker, model 99"]],
        ),
        (
            products,
            [["chair_final/1_0.png", "1"], ["chair_final/1_1.png", "1"]],
            [["sofa_final/11319_0.png", "11319"]],
        ),
    ],
)
def test_lists(write: object, train: list[list[str]], test: list[list[str]], tmp_path: Path) -> None:
    write(tmp_path)  # type: ignore[operator]
    main(tmp_path)
    for name, expected in (("train", train), ("test", test)):
        with (tmp_path / f"{name}.csv").open(newline="") as file:
            assert list(csv.reader(file)) == [["path", "label"], *expected]
        manifest = build_manifest(tmp_path / f"{name}.csv", show_progress=False)
        found = {
            manifest.keys[row]: manifest.class_names[manifest.labels[row]] for row in range(len(manifest))
        }
        assert found == dict(expected)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"holds none of images\.txt, cars_annos\.mat"):
        main(tmp_path)
    products(tmp_path)
    (tmp_path / "sofa_final/11319_0.png").unlink()
    with pytest.raises(SystemExit, match=r"sofa_final/11319_0\.png, an image of the test split, is missing"):
        main(tmp_path)
    (tmp_path / "Ebay_test.txt").unlink()
    with pytest.raises(SystemExit, match=r"Ebay_test\.txt is missing"):
        main(tmp_path)
