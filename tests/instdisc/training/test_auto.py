"""`auto` chooses settings that fit images, machine and time, and says the command that does the same."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import pytest
import torch
import torchvision

from instdisc.common.errors import ConfigError
from instdisc.runs.run_directory import RunDirectory
from instdisc.settings.auto import AutoConfig, command_line, plain
from instdisc.settings.run import DataConfig, RunConfig
from instdisc.train import main, parse
from instdisc.training import auto
from instdisc.training.start import open_all_images
from tests.instdisc.program import bank_of, picture, summary_of, write_pictures

HERE = ["--num-workers", "0", "--metrics.port", "0", "--loader.backend", "host", "--knn.k", "5"]


@pytest.fixture(autouse=True)
def short_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "_TRIAL_SECONDS", 0.2)


def chosen(images: Path, *options: str) -> tuple[RunConfig, auto.Choice]:
    arguments = ["auto", *HERE, "--data.path", str(images), *options]
    config = parse(arguments)[1]
    assert isinstance(config, AutoConfig)
    train, _ = open_all_images(config)
    choice = auto.choose(config, train, lambda settings: parse(arguments, settings)[1])
    return choice.config, choice


def test_small_images(tmp_path: Path) -> None:
    config, choice = chosen(write_pictures(tmp_path / "images", 40, classes=4), "--minutes", "0.05")
    assert config.backbone.name == "resnet8"
    assert config.augmentation.image_size == 32
    assert config.training.batch_size == 8
    assert config.objective.name == "spreading"
    assert "40, shorter side 36 pixels (median), 4 classes" in str(choice)


def test_epochs_follow_the_minutes(tmp_path: Path) -> None:
    images = write_pictures(tmp_path / "images", 40)
    short, long = (chosen(images, "--minutes", minutes)[0].training.epochs for minutes in ("0.01", "0.05"))
    assert 1 <= short < long
    most, _ = chosen(images, "--minutes", "5000")
    assert (most.training.epochs, most.backbone.name) == (auto._MOST_EPOCHS, "resnet20")


def test_photographs_begin_with_weights_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    images = tmp_path / "images"
    images.mkdir()
    for number in range(8):
        picture(number, 200).save(images / f"{number}.png")
    without, _ = chosen(images, "--minutes", "0.01")
    assert (without.backbone.name, without.init.weights) == ("resnet8", None)
    url = torchvision.models.ResNet18_Weights.DEFAULT.url
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(torchvision.models.resnet18().state_dict(), folder / url.rpartition("/")[2])
    config, choice = chosen(images, "--minutes", "0.01")
    assert (config.backbone.name, config.init.weights) == ("resnet18", "torchvision")
    assert config.augmentation.image_size > 64
    assert "weights of torchvision" in str(choice)


def test_given_options_are_kept_and_timed(tmp_path: Path) -> None:
    images = write_pictures(tmp_path / "images", 40)
    options = ["--backbone.name", "resnet20", "--training.batch-size", "4"]
    config, _ = chosen(images, *options, "--minutes", "0.05", "--training.seed", "3")
    assert (config.backbone.name, config.training.batch_size, config.training.seed) == ("resnet20", 4, 3)
    with pytest.raises(ConfigError, match="vit_b_16 cannot take images of 32 pixels"):
        chosen(images, "--backbone.name", "vit_b_16")
    assert chosen(images, "--training.epochs", "7")[0].training.epochs == 7


def test_the_command_does_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    images = write_pictures(tmp_path / "some images", 40, classes=4)
    options = ["--minutes", "0.02", "--knn.no-baselines", "--augmentation.crop-scale", "0.3", "1.0"]
    assert main(["auto", *HERE, "--data.path", str(images), *options]) == 0
    said = capsys.readouterr().err
    line = next(line for line in said.splitlines() if "instdisc.train sample" in line)
    python, _, module, *arguments = shlex.split(line)
    assert (python, module) == ("python", "instdisc.train")
    recipe, config = RunDirectory(tmp_path / "runs" / "auto").stored_config()
    by_hand = parse([*arguments, "--overwrite"])[1]
    assert recipe == "auto"
    assert dataclasses.replace(by_hand, run_dir=None, overwrite=False) == config
    assert main([*arguments, "--run-dir", "by-hand"]) == 0
    assert (bank_of(tmp_path / "by-hand") == bank_of(tmp_path / "runs" / "auto")).all()


def test_it_resumes_with_its_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    images = write_pictures(tmp_path / "images", 40)
    command = ["auto", *HERE, "--data.path", str(images), "--minutes", "0.02"]
    assert main(command) == 0
    run = RunDirectory(tmp_path / "runs" / "auto")
    epochs = summary_of(run.path)["epochs"]
    run.summary.unlink()
    capsys.readouterr()
    assert main([*command, "--minutes", "9"]) == 0
    assert "by hand" not in capsys.readouterr().err
    assert summary_of(run.path)["epochs"] == epochs
    assert main([*command, "--training.epochs", str(epochs + 1)]) == 0
    assert summary_of(run.path)["epochs"] == epochs + 1


def test_the_images_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["auto"]) == 2
    assert "--data.path" in capsys.readouterr().err


def test_every_kind_of_option_is_said() -> None:
    arguments = ["--data.path", "a b", "--data.test-path", "None", "--knn.no-baselines", "--num-workers", "2"]
    arguments += ["--optimizer.milestones", "1", "2.5", "--bank.dtype", "float16", "--data.verify"]
    config = parse(["sample", *arguments, "--run-dir", "here"])[1]
    said = shlex.split(command_line(config, Path("here")))
    assert parse(said[3:])[1] == config
    auto_config = parse(["auto", *arguments, "--minutes", "3"])[1]
    assert isinstance(auto_config, AutoConfig)
    assert not isinstance(plain(auto_config), AutoConfig)


def test_no_minutes_are_refused() -> None:
    with pytest.raises(ValueError, match="minutes is 0, expected above 0"):
        AutoConfig(data=DataConfig(path="images"), minutes=0)
