"""All programs answer the same to the same cause, and to what needs no network or cluster at once."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from cluster.errors import ClusterError, SnapshotError, SnapshotWriteError, WorkerLostError
from cluster.stopping import RunStopped
from instdisc import compare, embed, evaluate, explore, export, inspect, plan, search, serve, train
from instdisc.common import command
from instdisc.common.errors import ConfigError, NonFiniteError
from pipelines.errors import DataError
from tests.instdisc.program import picture
from tests.ray_cluster import CHECKOUT

Main = Callable[[Sequence[str] | None], int]

PROGRAMS: dict[str, tuple[Main, list[str]]] = {
    "compare": (compare.main, ["--report", "SOURCE"]),
    "train": (train.main, ["sample", "--num-workers", "0", "--data.path", "SOURCE"]),
    "embed": (embed.main, ["SOURCE", "--output", "index", "--num-actors", "0"]),
    "explore": (explore.main, ["SOURCE", "--num-actors", "0"]),
    "evaluate": (evaluate.main, ["SOURCE", "--num-actors", "0"]),
    "search": (search.main, ["SOURCE", "IMAGE"]),
    "serve": (serve.main, ["SOURCE"]),
    "export": (export.main, ["SOURCE", "--format", "safetensors"]),
    "inspect": (inspect.main, ["SOURCE"]),
    "plan": (plan.main, []),
}
WITH_SOURCE = [name for name in PROGRAMS if name != "plan"]


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path], list[str]]:
    monkeypatch.chdir(tmp_path)
    picture(0).save(tmp_path / "image.png")

    def of(name: str, source: Path) -> list[str]:
        replaced = {"SOURCE": str(source), "IMAGE": str(tmp_path / "image.png")}
        return [replaced.get(argument, argument) for argument in PROGRAMS[name][1]]

    return of


@pytest.mark.parametrize("name", PROGRAMS)
def test_an_unknown_option(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert PROGRAMS[name][0]([*PROGRAMS[name][1], "--no-such-option"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: Unrecognized options: --no-such-option; see python -m instdisc.")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["plan", "--batch-size", "x"],
            "error: --batch-size: invalid literal for int() with base 10: 'x'; see",
        ),
        (
            ["plan", "--batch-sizes", "4"],
            "error: Unrecognized options: --batch-sizes, 4; did you mean --batch-size?",
        ),
        (["plan", "--objective", "no"], "error: invalid choice 'no' for argument '--objective'"),
        (["search"], "error: RUN_OR_INDEX is missing; see python -m instdisc.search --help"),
        (["export", "run"], "error: --format is missing"),
        (
            ["train", "sample", "--knn.temperature", "0.1", "--objective.temperature=0"],
            "error: --objective.temperature is 0.0, expected at least 0.005",
        ),
    ],
)
def test_options_that_cannot_be_read(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert PROGRAMS[arguments[0]][0](arguments[1:]) == 2
    assert capsys.readouterr().err.startswith(message)


def help_of(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        PROGRAMS[name][0]([*(["sample"] if name == "train" else []), "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "positionals"),
    [
        ("train", ""),
        ("compare", "[--vary STR] [--recipes STR] [--run-dir PATH] [--report [PATH [PATH ...]]]"),
        ("embed", "[RUN]"),
        ("explore", "RUN_OR_INDEX"),
        ("evaluate", "RUN_OR_INDEX"),
        ("search", "RUN_OR_INDEX IMAGE [IMAGE ...]"),
        ("serve", "INDEX"),
        ("export", "RUN_OR_INDEX"),
        ("inspect", "PATH"),
        ("plan", ""),
    ],
)
def test_help_names_the_program_and_what_it_takes(
    name: str, positionals: str, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = help_of(name, capsys).splitlines()[0]
    assert usage.startswith(f"usage: python -m instdisc.{name}")
    assert usage.replace("[OPTIONS]", "").partition("[-h]")[2].partition(" -f ")[0].strip() == positionals


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_line_break_of_a_docstring_is_left_in_help(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    _, begin, options = help_of(name, capsys).partition("show this help message")
    lines = [line.replace("│", " ").rstrip() for line in (begin + options).splitlines()]
    indents = [len(line) - len(line.lstrip()) for line in lines]
    width = max(map(len, lines))
    early = [
        line
        for line, below, indent, indent_below in zip(lines, lines[1:], indents, indents[1:], strict=False)
        if line and below and indent == indent_below and not line.lstrip().startswith("-")
        if len(line) + 1 + len(below.split()[0]) <= width and not below.lstrip().startswith("-")
    ]
    assert early == []


def test_training_without_a_recipe_prints_usage_as_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        train.main([])
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("usage: python -m instdisc.train RECIPE")


def test_help_begins_with_the_usual_options(capsys: pytest.CaptureFixture[str]) -> None:
    first, _, rest = help_of("train", capsys).partition("show this help message")
    usual = re.findall(r"^ *(--[a-z.-]+) ", first, re.MULTILINE)
    assert len(usual) >= 12
    assert len(first.splitlines()) <= 24
    assert [option for option in usual if f"{option} " not in rest and f"{option}," not in rest] == []


@pytest.mark.parametrize("name", [name for name in WITH_SOURCE if name != "compare"])
@pytest.mark.parametrize("source", ["~nobody-at-all/x", "a" * 400])
def test_a_path_that_cannot_be(
    name: str, source: str, arguments: Callable[[str, Path], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert PROGRAMS[name][0](arguments(name, Path(source))) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_working_directory_that_was_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As Ray's nodes on one machine do with each other's copies of a job's."""
    (tmp_path / "job").mkdir()
    monkeypatch.chdir(tmp_path / "job")
    (tmp_path / "job").rmdir()
    assert command.run(lambda arguments: print(Path.cwd()), []) == 1
    assert "was deleted" in capsys.readouterr().err


@pytest.mark.parametrize("name", WITH_SOURCE)
def test_a_source_that_is_not_there(
    name: str,
    arguments: Callable[[str, Path], list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert PROGRAMS[name][0](arguments(name, tmp_path / "nowhere")) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "nowhere" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("raised", "status"),
    [
        (None, 0),
        (ConfigError("x"), 2),
        (DataError("x"), 2),
        (NonFiniteError("x"), 2),
        (SnapshotError("x"), 2),
        (SnapshotWriteError("x"), 1),
        (ClusterError("x"), 1),
        (WorkerLostError("x"), 1),
        (PermissionError("x"), 1),
        (KeyboardInterrupt(), 130),
        (RunStopped("x"), 130),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, int) else str(value),
)
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_same_cause_has_the_same_status(
    name: str, raised: BaseException | None, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def body(arguments: Sequence[str]) -> None:
        if raised is not None:
            raise raised

    monkeypatch.setattr(f"instdisc.{name}._{name}", body)
    assert PROGRAMS[name][0]([]) == status


def test_sigterm_ends_a_program_as_ctrl_c_does() -> None:
    handler = signal.getsignal(signal.SIGTERM)
    assert command.run(lambda _: os.kill(os.getpid(), signal.SIGTERM), []) == 130
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_reader_that_closes_the_output_is_no_error_to_speak_of() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "instdisc.train", "sample", "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=CHECKOUT,
        text=True,
    ) as program:
        assert program.stdout is not None
        assert program.stderr is not None
        program.stdout.close()
        assert program.stderr.read() == ""
    assert program.returncode == 1


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&- <&-"])
def test_streams_that_were_closed_drop_what_is_written(closed: str, tmp_path: Path) -> None:
    """No file that the program opens may get their numbers, or messages would be written into it."""
    code = (
        "import os, sys\n"
        "from instdisc.common.command import run\n"
        "def program(_):\n"
        "    with open('file', 'w') as file:\n"
        "        assert file.fileno() > 2\n"
        "        print('said'); print('said', file=sys.stderr); os.write(1, b'said')\n"
        "sys.exit(run(program, []))\n"
    )
    (tmp_path / "program.py").write_text(code)
    done = subprocess.run(
        f"{sys.executable} program.py {closed}",
        shell=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
        check=False,
    )
    assert done.returncode == 0
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize(
    "line",
    [
        ["train"],
        ["train", "sample", "--help"],
        ["train", "sample", "--training.epochs", "0"],
        ["evaluate", "--help"],
        ["evaluate", "runs/x", "--protocols", "magic"],
        ["search", "--help"],
        ["serve", "--help"],
        ["export", "--help"],
        ["inspect", "--help"],
        ["plan", "--help"],
        ["compare", "--help"],
        ["compare", "sample", "--vary", "training.epochs=0,1"],
    ],
    ids=" ".join,
)
def test_help_and_errors_of_settings_import_nothing_heavy(line: list[str]) -> None:
    """The bound is generous; `benchmarks/results` has the time itself."""
    heavy = ("torch", "torchvision", "ray", "zarr", "PIL", "faiss", "nvidia")
    code = (
        "import json, sys\n"
        f"sys.argv = {line}\n"
        f"from instdisc.{line[0]} import main\n"
        "try:\n    main()\n"
        "except SystemExit:\n    pass\n"
        f"print(json.dumps([name for name in {heavy} if name in sys.modules]))"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert json.loads(said.stdout.splitlines()[-1]) == []
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3
