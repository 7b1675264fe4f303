"""An index of a small run, which the tests of a session share and do not change, and the API over it."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from cluster import lease
from cluster.settings import MetricsConfig
from instdisc.embed import main as embed
from instdisc.serving.app import make_app
from instdisc.settings.serve import LimitsConfig, ServeConfig
from tests.instdisc.program import solid
from tests.instdisc.test_evaluate import CLASSES, train_small

TOKEN = "a token for tests, not for use"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
HERE = ["--num-actors", "0", "--loader.threads", "1", "--loader.backend", "host"]


@pytest.fixture(scope="session")
def served_index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 images of three colors with labels, and 2 gray ones without, in `images` beside the index."""
    folder = tmp_path_factory.mktemp("served")
    run = train_small(folder, solid(folder / "test", CLASSES, 2))
    images = Path(shutil.copytree(folder / "train", folder / "images"))
    solid(folder / "plain", {"gray": (120, 120, 120)}, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease, "_SETTLE_S", 0.01)
        place = ["--output", str(folder / "colors")]
        assert embed([str(run), "--data.path", str(images), *place, *HERE]) == 0
        assert embed(["--append", "--data.path", str(folder / "plain" / "gray"), *place, *HERE]) == 0
    return folder / "colors"


@pytest.fixture
def config(served_index: Path, tmp_path: Path) -> Callable[..., ServeConfig]:
    """Settings for the index, without metrics."""

    def config(**changed: Any) -> ServeConfig:
        limits = LimitsConfig(**changed.pop("limits", {}))
        more = {"index": str(served_index), "explored": tmp_path / "explored", **changed}
        return ServeConfig(limits=limits, metrics=MetricsConfig(port=0), **more)

    return config


@pytest.fixture
def client(config: Callable[..., ServeConfig]) -> Iterator[Callable[..., TestClient]]:
    """Serve the index in this process, and talk to it; settings may be given."""
    with ExitStack() as stack:

        def client(*, token: str | None = TOKEN, **changed: Any) -> TestClient:
            digest = None if token is None else hashlib.sha256(token.encode()).digest()
            app = make_app(config(**changed), digest, 0)
            return stack.enter_context(TestClient(app, raise_server_exceptions=False))

        yield client
