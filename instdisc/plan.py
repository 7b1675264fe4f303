"""Estimate what a run needs before renting machines: `python -m instdisc.plan [RECIPE] [--world-size W …] …`.

Memory and bytes follow from the sizes alone; times also from rates, which can be set.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from instdisc.common import command
from instdisc.common.errors import ConfigError
from instdisc.settings.model import BackboneConfig
from instdisc.settings.plan import PlanConfig
from instdisc.settings.recipes import RECIPES
from instdisc.training.costs import cost, network_size, run_cost


def report(config: PlanConfig) -> str:
    """The table and its assumptions."""
    lines = [
        f"per rank and step of {config.batch_size:,} images, D = {config.embedding_dim}, {config.dtype} rows,",
        f"{config.objective}",
        "",
        f"{'instances':>14} {'ranks':>6} {'memory':>10} {'sent':>10} {'exchange':>10} {'objective':>10}",
    ]
    crowded = False
    for num_instances in config.instances:
        for world_size in config.world_size:
            try:
                each = cost(config, num_instances, world_size)
            except ValueError as error:
                lines.append(f"{num_instances:>14,} {world_size:>6} {error}")
                continue
            full = each.memory_bytes > config.memory_gigabytes * 1e9 / 2
            crowded |= full
            lines.append(
                f"{num_instances:>14,} {world_size:>6} {_bytes(each.memory_bytes):>10} {_bytes(each.sent_bytes):>10} "
                f"{_milliseconds(each.exchange_seconds):>10} {_milliseconds(each.objective_seconds):>10}"
                + (" *" if full else "")
            )
    if crowded:
        lines += ["", f"* bank and tables take more than half of a rank's {config.memory_gigabytes:g} GB"]
    if config.network is not None:
        lines += ["", *_of_the_run(config, config.network)]
    lines += [
        "",
        "rates assumed, not measured; measure yours with benchmarks/objectives.py and scaling.py and set them:",
        f"  rows read one by one at {config.gather_bytes_per_second:.3g} bytes/s, products done at "
        f"{config.flops_per_second:.3g} operations/s",
        f"  a rank sends {config.link_bytes_per_second:.3g} bytes/s, each collective takes at least "
        f"{config.collective_seconds:.3g} s, nothing overlaps",
    ]
    if config.network is None:
        lines += [
            "  not counted: the network itself, its gradients (twice its size per step), evaluation, snapshots"
        ]
    else:
        lines += [
            f"  the network does {config.network_flops_per_second:.3g} operations/s, and never waits for images",
            f"  a rank copies its part of a snapshot at {config.host_copy_bytes_per_second:.3g} bytes/s, all together "
            f"write it at {config.storage_bytes_per_second:.3g} bytes/s",
            f"  a rank is lost every {config.rank_mtbf_hours:,.0f} hours, a restart takes {config.restart_seconds:g} s",
            "  not counted: evaluation and measurements of the accuracy",
        ]
    return "\n".join(lines)


def _of_the_run(config: PlanConfig, name: str) -> list[str]:
    """The table of whole steps, snapshots and what is lost."""
    network = network_size(
        BackboneConfig(name=name, embedding_dim=config.embedding_dim, stem=config.stem), config.image_size
    )
    lines = [
        f"{name} at {config.image_size} pixels, {network.operations / 1e9:.3g} GFLOP an image forward, "
        f"{network.parameters:,} weights; snapshots as often as loses the least (--snapshots.every-steps)",
        "",
        f"{'instances':>14} {'ranks':>6} {'network':>8} {'gradients':>9} {'step':>8} {'images/s':>9} "
        f"{'snapshot':>8} {'written':>8} {'waits':>8} {'every steps':>11} {'lost':>6}",
    ]
    for num_instances in config.instances:
        for world_size in config.world_size:
            try:
                run = run_cost(config, network, num_instances, world_size)
            except ValueError:  # the table above says so
                continue
            lines.append(
                f"{num_instances:>14,} {world_size:>6} {_milliseconds(run.network_seconds):>8} "
                f"{_milliseconds(run.gradient_seconds):>9} {_milliseconds(run.step_seconds):>8} "
                f"{config.batch_size / run.step_seconds:>9,.0f} {_bytes(run.snapshot_bytes):>8} "
                f"{_milliseconds(run.write_seconds):>8} {_milliseconds(run.pause_seconds):>8} {run.every_steps:>11,} "
                f"{run.lost:>6.2%}"
            )
    return lines


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the plan.

    Returns:
        See `instdisc.common.command.run`.
    """
    return command.run(_plan, arguments)


def _plan(arguments: Sequence[str]) -> None:
    print(report(parse(arguments)))


def parse(arguments: Sequence[str]) -> PlanConfig:
    """Read the command line: perhaps a recipe, and what differs from it.

    Raises:
        ConfigError: An unknown recipe or option, or a value that cannot be.
        SystemExit: Help was asked for (status 0).
    """
    recipe = arguments[0] if arguments and not arguments[0].startswith("-") else None
    if recipe is not None and recipe not in RECIPES:
        raise ConfigError(f"unknown recipe {recipe!r}: plan for one of {', '.join(RECIPES)}, or for none")
    return command.read_options(
        PlanConfig,
        arguments[recipe is not None :],
        program="instdisc.plan" if recipe is None else f"instdisc.plan {recipe}",
        description="Estimate what a run will need; with the name of a recipe first, that of the whole recipe.",
        default=PlanConfig() if recipe is None else PlanConfig.of_run(RECIPES[recipe].config),
    )


if __name__ == "__main__":
    sys.exit(main())
