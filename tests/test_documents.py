"""What the documents say can be followed: links, commands, flags, files. No snippet of Python is run."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import tyro
import yaml

from instdisc import compare, embed, evaluate, explore, export, inspect, plan, search, serve, train
from instdisc.comparison.points import plan_points
from instdisc.settings.recipes import RECIPES

CHECKOUT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    path.relative_to(CHECKOUT).as_posix()
    for path in (
        *CHECKOUT.glob("*.md"),
        *(
            document
            for part in ("docs", "deploy", "benchmarks")
            for document in (CHECKOUT / part).rglob("*.md")
        ),
    )
)


def parse_comparison(arguments: Sequence[str]) -> None:
    """Parse a comparison and all of its points."""
    recipe, config, options = compare.parse(arguments)
    if recipe is not None:
        plan_points(recipe, config, options, train.parse)


PROGRAMS: dict[str, Callable[[Sequence[str]], object]] = {
    "train": train.main,
    "compare": compare.main,
    "embed": embed.main,
    "explore": explore.main,
    "evaluate": evaluate.main,
    "search": search.main,
    "serve": serve.main,
    "inspect": inspect.main,
    "export": export.main,
    "plan": plan.main,
}
PARSERS: dict[str, Callable[[Sequence[str]], object]] = {
    "train": train.parse,
    "compare": parse_comparison,
    "embed": embed.parse,
    "explore": explore.parse,
    "evaluate": evaluate.parse,
    "search": lambda arguments: tyro.cli(search.SearchConfig, args=arguments),
    "serve": serve.parse,
    "inspect": inspect.parse,
    "export": lambda arguments: tyro.cli(export.ExportConfig, args=arguments),
    "plan": plan.parse,
}
PLACEHOLDERS = {"RECIPE": "sample"}  # all others stand for a path, which a parser takes as it is

_LINK = re.compile(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"")
_BLOCK = r"^```.*?^```$|^ {4}.*?$"
_FLAG = re.compile(r"--[a-z][a-z0-9.-]*[a-z0-9]")


class Command(NamedTuple):
    """A program of the project with arguments, as a document has it."""

    document: str
    program: str
    arguments: tuple[str, ...]


def read(document: str) -> str:
    return (CHECKOUT / document).read_text()


def without_blocks(text: str) -> str:
    """A document without what is set as code in lines of its own."""
    return re.sub(_BLOCK, "", text, flags=re.MULTILINE | re.DOTALL)


def code_spans(document: str) -> list[str]:
    return [
        span.replace("\n", " ")
        for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", without_blocks(read(document)))
    ]


def code_lines(document: str) -> list[str]:
    """The lines that are set as code, continued lines as one."""
    text = read(document).replace("\\\n", " ")
    blocks = re.findall(_BLOCK, text, flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def anchors(document: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(document.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands() -> Iterator[Command]:
    for document in DOCUMENTS:
        for line in [*code_lines(document), *code_spans(document)]:
            for program, rest in re.findall(r"python -m instdisc\.(\w+)(.*)", line):
                words = tuple(PLACEHOLDERS.get(word, word) for word in shlex.split(rest, comments=True))
                yield Command(document, program, words)


COMMANDS = list(commands())


def test_all_programs_are_documented() -> None:
    assert {command.program for command in COMMANDS if command.arguments} == PROGRAMS.keys() == PARSERS.keys()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_relative_links_lead_somewhere(document: str) -> None:
    for groups in _LINK.findall(without_blocks(read(document))):
        path, _, anchor = "".join(groups).partition("#")
        if re.match(r"[a-z]+:", path):
            continue
        target = (CHECKOUT / document).parent / path if path else CHECKOUT / document
        assert target.exists(), f"{document}: {path} does not exist"
        assert not anchor or anchor in anchors(target), f"{document}: {path} has no heading for #{anchor}"


@pytest.mark.parametrize(
    "command",
    COMMANDS,
    ids=lambda command: f"{command.document}-{command.program}-{' '.join(command.arguments)}",
)
def test_documented_commands_are_taken(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    if not command.arguments:  # the name of the program
        assert command.program in PARSERS
    elif "--help" in command.arguments:
        with pytest.raises(SystemExit) as exit_:
            PARSERS[command.program](command.arguments)
        assert exit_.value.code == 0
    else:
        try:
            PARSERS[command.program](command.arguments)
        except SystemExit:
            pytest.fail(f"refused: {capsys.readouterr()}")


@pytest.mark.parametrize(
    "arguments", [["sample", "--knn.neighbors", "5"], ["sample", "--data.path"], ["npid"]]
)
def test_a_wrong_command_is_not_taken(arguments: list[str]) -> None:
    with pytest.raises((SystemExit, ValueError)):
        PARSERS["train"](arguments)


@pytest.fixture(scope="module")
def flags() -> set[str]:
    """All flags of the programs, by their help, and those of the benchmarks and examples, by their source."""
    found: set[str] = set()
    helped = [("train", [recipe]) for recipe in RECIPES]
    helped += [(program, []) for program in PROGRAMS if program != "train"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")  # lest a flag be broken in two
        for program, arguments in helped:
            text = io.StringIO()
            with contextlib.redirect_stdout(text), pytest.raises(SystemExit):
                PROGRAMS[program]([*arguments, "--help"])
            found |= set(_FLAG.findall(text.getvalue()))
    for part in ("benchmarks", "examples", "tests/e2e"):
        for path in (CHECKOUT / part).glob("*.py"):
            found |= set(re.findall(r"add_argument\(\s*\"(--[\w-]+)\"", path.read_text()))
    return found


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documented_flags_exist(document: str, flags: set[str]) -> None:
    spans = code_spans(document)
    if document == "CHANGELOG.md":  # beside a flag stands what it was called before
        renamed = re.findall(r"^\| `(--[^`]+)`.*\| `(--[^`]+)` \|$", read(document), flags=re.MULTILINE)
        spans = [after for _, after in renamed]
        assert spans
    for span in spans:
        if span.startswith("--"):
            for flag in _FLAG.findall(span):
                group = f"{flag}.*" in span
                assert any(each.startswith(f"{flag}.") for each in flags) if group else flag in flags, flag


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documented_files_exist(document: str) -> None:
    for span in code_spans(document):
        if re.fullmatch(r"(cluster|instdisc|pipelines|tests|benchmarks|docs|deploy)/[a-z0-9_/.-]*", span):
            assert (CHECKOUT / span).exists(), f"{document}: {span}"


def test_the_readme_stays_short() -> None:
    text = read("README.md")
    assert len(text.splitlines()) <= 120
    assert len(text.split()) <= 1200


def test_one_version_everywhere() -> None:
    version = tomllib.loads(read("pyproject.toml"))["project"]["version"]
    assert yaml.safe_load(read("CITATION.cff"))["version"] == version
    assert f"\n## {version}\n" in read("CHANGELOG.md")
