"""Every form of given weights changes the start and nothing else; what does not fit is named."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from cluster.group import Worker
from cluster.metrics import Metrics
from cluster.settings import ActorsConfig
from instdisc.common.errors import ConfigError
from instdisc.common.metrics import TRAINING
from instdisc.evaluation.context import Evaluation
from instdisc.evaluation.source import Source
from instdisc.export import main as export
from instdisc.model.backbone import build_embedder, head_of
from instdisc.runs.network import load_network
from instdisc.runs.run_directory import RunDirectory
from instdisc.settings.evaluation import EvaluationConfig
from instdisc.settings.model import BackboneConfig
from instdisc.settings.run import RunConfig
from instdisc.train import main, parse
from instdisc.training.saving import RunSnapshots
from instdisc.training.trainer import Trainer
from instdisc.training.weights import starting_weights
from instdisc.training.worker import TrainingRun
from pipelines.build import build_manifest
from pipelines.settings import LoaderConfig
from tests.instdisc.program import SMALL, Run, refused, write_pictures
from tests.processes import run_ranks
from tests.reference import spreading_symmetric
from tests.steps import take_step

BATCH, IMAGES = 6, 24
EXACT = ["--training.precision", "float32", "--loader.backend", "host"]


def configured(*options: str, path: Path | str = "unused") -> RunConfig:
    return parse(["sample", *SMALL, *EXACT, "--data.path", str(path), "--data.test-path", "None", *options])[
        1
    ]


def trainer_of(config: RunConfig, weights: dict[str, Tensor] | None, folder: Path) -> Trainer:
    file = None
    if weights is not None:
        file = folder / "init.safetensors"
        save_file(weights, file)
    return Trainer(Worker(0, 1, 0, 1, 0, torch.device("cpu")), config, IMAGES, file)


def batch(config: RunConfig) -> tuple[Tensor, Tensor]:
    side = config.augmentation.image_size
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, BATCH, 3, side, side, generator=generator), torch.arange(BATCH)


def randomized(network: nn.Module) -> nn.Module:
    """With weights and statistics that no seed of a run gives."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in network.state_dict().values():
            if value.is_floating_point():
                value.add_(0.02 * torch.rand(value.shape, generator=generator))
    return network


def without_classifier(network: nn.Module) -> nn.Module:
    network = copy.deepcopy(network)
    network.set_submodule(head_of(network)[0], nn.Identity())
    return network


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where torch and timm keep what they download, with networks of our own in it."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def into_torch_cache(hub: Path, network: nn.Module, weights: Any) -> None:
    folder = hub / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(network.state_dict(), folder / weights.url.rpartition("/")[2])


def into_timm_cache(hub: Path, network: nn.Module, name: str) -> None:
    snapshot = hub / "hf" / f"models--timm--{name}" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    save_file(network.state_dict(), snapshot / "model.safetensors")
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)


def from_torchvision(name: str) -> Callable[[Path], tuple[list[str], nn.Module]]:
    def prepare(hub: Path) -> tuple[list[str], nn.Module]:
        network = randomized(torchvision.models.shufflenet_v2_x0_5())
        into_torch_cache(hub, network, torchvision.models.ShuffleNet_V2_X0_5_Weights.DEFAULT)
        options = ["--backbone.name", "shufflenet_v2_x0_5", "--augmentation.image-size", "72"]
        return [*options, "--init.weights", name], without_classifier(network)

    return prepare


def from_timm(hub: Path) -> tuple[list[str], nn.Module]:
    network = randomized(timm.create_model("test_resnet"))
    into_timm_cache(hub, network, "test_resnet.r160_in1k")
    network.reset_classifier(0)
    return ["--init.weights", "timm:test_resnet.r160_in1k"], network


def from_file(hub: Path) -> tuple[list[str], nn.Module]:
    network = randomized(build_embedder(BackboneConfig(name="resnet8", embedding_dim=10), 32).backbone)
    bare = {name: value for name, value in network.state_dict().items() if not name.startswith("fc")}
    save_file(bare, hub / "weights.safetensors")
    return ["--init.weights", str(hub / "weights.safetensors")], without_classifier(network)


def from_checkpoint_of_timm(hub: Path) -> tuple[list[str], nn.Module]:
    """As a training program writes it: nested, with prefixes, and with what is none of the network's."""
    network = randomized(timm.create_model("test_resnet"))
    state = {f"module.encoder_q.{name}": value for name, value in network.state_dict().items()}
    other = {f"module.encoder_k.{name}": value + 1 for name, value in network.state_dict().items()}
    content = {"epoch": 7, "state_dict": state | other, "optimizer": {"state": {0: {"step": 9.0}}}}
    torch.save(content, hub / "checkpoint.pth")
    network.reset_classifier(0)
    options = ["--backbone.name", "timm:test_resnet"]
    return [*options, "--init.weights", str(hub / "checkpoint.pth")], network


FORMS: dict[str, Callable[[Path], tuple[list[str], nn.Module]]] = {
    "torchvision": from_torchvision("torchvision"),
    "torchvision by name": from_torchvision("ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1"),
    "timm": from_timm,
    "safetensors": from_file,
    "state dict": from_checkpoint_of_timm,
}


@pytest.mark.parametrize("form", FORMS)
def test_training_begins_with_the_weights_and_is_otherwise_the_same(form: str, hub: Path) -> None:
    options, body = FORMS[form](hub)
    config = configured(*options)
    weights = starting_weights(config)
    assert weights is not None
    trainer, random = (trainer_of(config, given, hub) for given in (weights, None))
    name, head = head_of(random.embedder.backbone)
    torch.testing.assert_close(head_of(trainer.embedder.backbone)[1].weight, head.weight, rtol=0, atol=0)
    assert torch.equal(trainer.bank.rows, random.bank.rows)
    assert not any(key.startswith(name) for key in weights)

    images, ids = batch(config)
    reference = nn.Sequential(body, copy.deepcopy(head)).double().train()
    with torch.no_grad():
        embeddings = F.normalize(reference(images.flatten(0, 1).double()), dim=1)
    expected = spreading_symmetric(embeddings, embeddings, config.objective.temperature) / len(embeddings)
    losses = [take_step(each, images, ids, learning_rate=0.1)["loss"] for each in (trainer, random)]
    assert losses[0] == pytest.approx(float(expected), rel=1e-4)
    assert losses[1] != pytest.approx(float(expected), rel=1e-2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two epochs of three steps."""
    folder = tmp_path_factory.mktemp("trained")
    images = write_pictures(folder / "images", IMAGES, classes=3)
    options = [*SMALL, *EXACT, "--data.path", str(images), "--data.test-path", "None"]
    assert main(["sample", *options, "--run-dir", str(folder / "run")]) == 0
    return folder


def test_a_run_as_the_start_takes_the_next_step_of_that_run(trained: Path, tmp_path: Path) -> None:
    """Once bank, optimizer and the number of steps are restored too."""
    config = configured("--init.weights", str(trained / "run"), path=trained / "images")
    run = RunDirectory(trained / "run")
    manifest = build_manifest(trained / "images")
    steps = []
    for given in (starting_weights(config), None):
        trainer = trainer_of(config, given, tmp_path)
        begun = copy.deepcopy(trainer.embedder.state_dict())
        snapshots = RunSnapshots(trainer, manifest, config, run.snapshots, run.settings()["run_id"])
        assert snapshots.restore() is not None
        snapshots.abandon()
        if given is not None:
            for name, value in trainer.embedder.state_dict().items():
                assert torch.equal(begun[name], value), name
            trainer.embedder.load_state_dict(begun)
        steps.append((take_step(trainer, *batch(config), learning_rate=0.1), trainer.embedder.state_dict()))
    (means, after), (own_means, own_after) = steps
    assert means == own_means
    assert all(torch.equal(after[name], own_after[name]) for name in own_after)


def begun(rank: int, world_size: int, trained: Path, out: Path, options: list[str]) -> Tensor:
    """This rank's rows when the first step is about to be taken."""
    torch.set_num_threads(1)
    config = configured("--init.weights", str(trained / "run"), *options, path=trained / "images")
    worker = Worker(rank, world_size, rank, world_size, 0, torch.device("cpu"))
    training = TrainingRun(worker, "sample", config, RunDirectory(out), Metrics(TRAINING, run="", rank=rank))
    training._begin()
    return training.trainer.bank.rows.clone()


@pytest.mark.parametrize("objective", [[], ["--bank.dtype", "bfloat16"]])
def test_the_bank_begins_with_the_embeddings_of_the_start(
    trained: Path, tmp_path: Path, objective: list[str]
) -> None:
    out = RunDirectory(tmp_path / "out")
    config = configured("--init.weights", str(trained / "run"), *objective, path=trained / "images")
    out.prepare("sample", config, build_manifest(trained / "images"), None, starting_weights(config))
    evaluation = EvaluationConfig(
        source=str(trained / "run"),
        recompute=True,
        actors=ActorsConfig(num_actors=0),
        loader=LoaderConfig(backend="host"),
    )
    with Evaluation(evaluation) as opened:
        expected = torch.from_numpy(opened.compute(opened.source.train))
    alone, together = (
        torch.cat(run_ranks(world_size, begun, trained, out.path, objective)) for world_size in (1, 2)
    )
    torch.testing.assert_close(alone.float(), expected, rtol=0, atol=1e-2 if objective else 1e-5)
    assert torch.equal(alone, together)
    (random,) = run_ranks(1, begun, trained, out.path, ["--init.bank", "random"])
    assert not torch.allclose(random, expected, atol=0.1)


def test_a_run_that_resumes_does_not_need_the_weights(run: Run, trained: Path, tmp_path: Path) -> None:
    given = tmp_path / "given"
    shutil.copytree(trained / "run", given)
    images = trained / "images"
    status, said, out = run(images, "--init.weights", "given")
    assert status == 0, said
    assert "network at its start" in said
    (out / "summary.json").unlink()
    shutil.rmtree(given)
    status, said, _ = run(images, "--init.weights", "given")
    assert status == 0, said
    refused(run(images, "--init.weights", "another"), "init.weights is", "given", "another")


def test_a_run_that_was_killed_before_its_first_snapshot_begins_with_the_same_weights(
    run: Run, trained: Path, tmp_path: Path
) -> None:
    given = tmp_path / "given"
    shutil.copytree(trained / "run", given)
    options = ["--init.weights", "given", "--training.epochs", "1"]
    _, _, out = run(trained / "images", *options)
    whole = RunDirectory(out).open_snapshot().read("embeddings")
    shutil.rmtree(given)
    shutil.rmtree(out / "snapshots")
    (out / "summary.json").unlink()
    status, said, _ = run(trained / "images", *options)
    assert status == 0, said
    np.testing.assert_array_equal(RunDirectory(out).open_snapshot().read("embeddings"), whole)
    shutil.rmtree(out / "snapshots")
    for name in ("summary.json", "init.safetensors"):
        (out / name).unlink()
    refused(run(trained / "images", *options), "lacks init.safetensors", "--overwrite")


def test_networks_of_timm_train_and_export(
    run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    images = write_pictures(tmp_path / "images", IMAGES)
    options = ["--backbone.name", "timm:test_vit", "--augmentation.training-size", "None", "--knn.every", "0"]
    status, said, out = run(images, *options, "--training.epochs", "1", "--augmentation.image-size", "32")
    assert status == 0, said
    network = load_network(RunDirectory(out).open_snapshot())
    assert Source(str(out)).backbone.name == "timm:test_vit"
    assert export([str(out), "--format", "safetensors"]) == 0
    printed = capfd.readouterr().out
    names: dict[str, Any] = {}
    exec(printed.partition("\n\n")[2], names)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(names["network"](pixels), network(pixels))
    assert export([str(out), "--format", "torchvision"]) == 2


def test_weights_that_cannot_be_downloaded_are_asked_for(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    config = configured("--backbone.name", "resnet18", "--init.weights", "torchvision")
    with pytest.raises(ConfigError, match=r"could not be read .*resnet18.*\.pth .*checkpoints"):
        starting_weights(config)
    config = configured("--init.weights", "timm:test_resnet")
    with pytest.raises(ConfigError, match="timm:test_resnet could not be read"):
        starting_weights(config)


def test_a_run_of_another_network_is_refused(trained: Path) -> None:
    config = configured("--backbone.name", "resnet20", "--init.weights", str(trained / "run"))
    with pytest.raises(ConfigError, match=r"holds a resnet8, .* give --backbone.name resnet8"):
        starting_weights(config)


def test_a_frozen_backbone_keeps_its_weights_and_a_scaled_one_moves_less(tmp_path: Path) -> None:
    def moved(*options: str, frozen: bool = False) -> tuple[float, float]:
        trainer = trainer_of(configured("--optimizer.weight-decay", "0", *options), None, tmp_path)
        before = copy.deepcopy(list(trainer.embedder.parameters()))
        take_step(trainer, *batch(trainer.config), learning_rate=0.1, frozen=frozen)
        steps = [
            float((new - old).detach().norm())
            for new, old in zip(trainer.embedder.parameters(), before, strict=True)
        ]
        return sum(steps[:-2]), sum(steps[-2:])

    (body, head), (frozen_body, frozen_head) = moved(), moved(frozen=True)
    scaled_body, scaled_head = moved("--optimizer.backbone-rate-scale", "0.1")
    assert frozen_body == 0
    assert scaled_body == pytest.approx(0.1 * body, rel=1e-3)
    assert frozen_head == head == scaled_head
    assert body > 0


def test_the_head_alone_is_trained_for_the_frozen_epochs(run: Run, tmp_path: Path) -> None:
    images = write_pictures(tmp_path / "images", IMAGES)
    begun = build_embedder(BackboneConfig(name="resnet8", embedding_dim=16), 32).backbone.state_dict()
    given = str(tmp_path / "w.pth")
    torch.save(begun, given)
    networks = {}
    for frozen in ("2", "1"):
        options = ["--init.weights", given, "--optimizer.frozen-epochs", frozen, "--overwrite"]
        assert run(images, *options)[0] == 0
        networks[frozen] = load_network(RunDirectory(tmp_path / "out").open_snapshot()).backbone.state_dict()
    assert torch.equal(networks["2"]["layer3.0.conv1.weight"], begun["layer3.0.conv1.weight"])
    assert not torch.equal(networks["2"]["fc.weight"], begun["fc.weight"])
    assert not torch.equal(networks["1"]["layer3.0.conv1.weight"], begun["layer3.0.conv1.weight"])
