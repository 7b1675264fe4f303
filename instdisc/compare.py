"""Compare runs: `python -m instdisc.compare RECIPE --vary NAME=VALUE,VALUE … [--run-dir DIR] [any option of train]`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from instdisc.common import command
from instdisc.common.errors import ConfigError
from instdisc.comparison.points import plan_points
from instdisc.settings.compare import CompareConfig
from instdisc.train import parse as parse_training

_OWN = ("--vary", "--recipes", "--run-dir", "--report", "--help", "-h")


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is to be compared and print the table.

    Returns:
        See `instdisc.common.command.run`; 1 if none of the runs finished.
    """
    return command.run(_compare, arguments, level=logging.INFO)


def _compare(arguments: Sequence[str]) -> int:
    recipe, config, options = parse(arguments)
    planned = [] if recipe is None else plan_points(recipe, config, options, parse_training)
    from instdisc.comparison import report, runs  # takes seconds

    if recipe is None:
        results = runs.stored_outcomes(config.report)
    else:
        results = []
        for result in runs.train_points(planned):
            results.append(result)
            report.write(config.run_dir, recipe, results)  # so that what is there can be read, and is kept
    page = report.write(config.run_dir, recipe or "comparison", results)
    print(report.as_text(report.table(report.groups_of(results))))
    failed = report.failures(results)
    if failed is not None:
        print(f"\n{failed.title}:\n" + "\n".join(f"  {name}: {reason}" for name, reason in failed.rows))
    print(f"\npage: {page}")
    return 0 if any(result.error is None for result in results) else 1


def parse(arguments: Sequence[str]) -> tuple[str | None, CompareConfig, list[str]]:
    """Read the command line.

    Returns:
        The recipe, None if existing runs are compared; what to compare; the options of training.

    Raises:
        ConfigError: Neither a recipe nor runs were named, or both; or as `command.read_options`.
        SystemExit: Help was asked for (status 0).
    """
    recipe = arguments[0] if arguments and not arguments[0].startswith("-") else None
    own: list[str] = []
    options: list[str] = []
    taking = options
    for word in arguments[recipe is not None :]:
        if word.startswith("-") and not _is_number(word):
            taking = own if word.partition("=")[0] in _OWN else options
        taking.append(word)
    config = command.read_options(
        CompareConfig,
        own if recipe is not None else own + options,
        program="instdisc.compare" if recipe is None else f"instdisc.compare {recipe}",
        description="Train a recipe with several values of its settings, or several recipes, and compare the runs. All "
        "options of `python -m instdisc.train RECIPE` can be given too.",
    )
    if config.report and (recipe is not None or options):
        raise ConfigError(
            "--report compares runs that exist: give no recipe and no options of training with it"
        )
    if recipe is None and not config.report:
        raise ConfigError(
            "nothing to compare: give a recipe, such as sample --vary training.seed=0,1,2, or --report RUN …"
        )
    return recipe, config, options


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
