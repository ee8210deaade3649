"""`tworeel plan`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tworeel.cli import options
from tworeel.cli.figures_file import output_problems, write_json
from tworeel.cli.importing import importing
from tworeel.cli.watching import watching
from tworeel.errors import UserError, collected, raise_if_any
from tworeel.report.console import console, say
from tworeel.units import GIB

if TYPE_CHECKING:
    from tworeel.config import RunConfig
    from tworeel.planning.budgets import Budget
    from tworeel.planning.plans import Plan

MOST_HOST_GIB = 100_000


def plan(
    config: options.ConfigFile = None,
    model: options.Model = None,
    data: options.Data = None,
    expert: options.Expert = None,
    gpus: Annotated[
        str | None,
        typer.Option(
            help="Cards that need not be here, for example '2x RTX 4090'. Those of this machine by default.",
            metavar="CARDS",
        ),
    ] = None,
    memory_gib: Annotated[
        str | None,
        typer.Option(help="Memory of each card, if it is another: 22.5, or 22.5,15.", metavar="GIB,..."),
    ] = None,
    host_memory_gib: Annotated[
        float | None,
        typer.Option(help="Memory of the machine; what is available here by default.", metavar="GIB"),
    ] = None,
    cards: options.Cards = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show what else was weighed, and why it is not the plan.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="File for all figures.", metavar="FILE")
    ] = None,
    devices: options.Devices = None,
    steps: options.Steps = None,
    rank: options.Rank = None,
    settings: options.Settings = None,
    skip_broken: options.SkipBroken = None,
) -> None:
    """Say what fits which cards, how fast, and why, before anything is loaded.

    Only headers and configurations are read; no GPU is touched, unless its free memory is asked for. 'train'
    follows the same plan. Ends with status 1 where it does not fit.

    tworeel plan --model MODEL --data FOLDER --gpus "2x RTX 4090"

    tworeel plan --model MODEL --data FOLDER --gpus "RTX 4090, RTX 3060 12GB" --explain
    """
    run_config = options.read_config(
        config,
        settings,
        model__path=model,
        model__expert=expert,
        data__sources=options.datasets(data),
        data__skip_broken=skip_broken,
        engine__devices=options.device_list(devices),
        lora__rank=rank,
        train__steps=steps,
    )
    problems = _option_problems(gpus, memory_gib, host_memory_gib, devices)
    problems += output_problems(json_file)
    with watching() as observer:
        # After what needs none of them; a Ctrl-C is heard meanwhile
        with importing():
            import torch

            from tworeel.engine.compiling import may_launch_from_cpp
            from tworeel.planning.choosing import choose
            from tworeel.planning.explaining import explained
            from tworeel.training.loadable import of_options
            from tworeel.training.planned import make_request
            from tworeel.training.preflight import survey

        budgets: tuple[Budget, ...] = ()
        with collected(problems):
            budgets = _budgets(run_config, gpus, memory_gib, cards)
        found = survey(run_config, observer, [torch.device(budget.device) for budget in budgets])
        raise_if_any([*problems, *found.problems])
        assert found.job is not None, "neither a job nor a problem"
        request = make_request(
            run_config,
            found.job,
            budgets,
            host_memory=None if host_memory_gib is None else int(host_memory_gib * GIB),
            # Devices of the configuration are this machine's.
            may_reorder=True if gpus is not None else None,
            may_launch_from_cpp=gpus is not None or may_launch_from_cpp(),
        )
        try:
            choice = choose(request)
            # At once: to find what else would do may take as long as the plan.
            _show(choice.plan, host_is_here=host_memory_gib is None)
            made = explained(choice, explain=explain)
        except ValueError as error:
            raise of_options(error) from None
    _show_others(made)
    if json_file is not None:
        write_json(json_file, made.as_json())
        say(f"Figures: {json_file}")
    if not made.fits:
        raise typer.Exit(1)


def _option_problems(
    gpus: str | None, memory_gib: str | None, host_memory_gib: float | None, devices: str | None
) -> list[str]:
    problems = []
    if memory_gib is not None and gpus is None:
        problems.append("--memory-gib: needs --gpus")
    if devices is not None and gpus is not None:
        problems.append(f"--devices {devices}: are devices of this machine; leave it out with --gpus")
    if host_memory_gib is not None and not 0 < host_memory_gib < MOST_HOST_GIB:
        problems.append(f"--host-memory-gib {host_memory_gib:g}: must be above 0 and below {MOST_HOST_GIB}")
    return problems


def _budgets(
    config: RunConfig, gpus: str | None, memory_gib: str | None, cards: Path | None
) -> tuple[Budget, ...]:
    from tworeel.planning.cards import known_cards, memory_sizes, parse_cards, with_memory
    from tworeel.planning.devices import budgets_of_devices
    from tworeel.training.devices import resolve_devices
    from tworeel.training.planned import budgets_of_cards

    known = known_cards(cards)
    if gpus is not None:
        problems: list[str] = []
        with collected(problems):
            chosen = parse_cards(gpus, known)
        with collected(problems):
            if memory_gib is not None:
                memory_sizes(memory_gib)
        raise_if_any(problems)
        return budgets_of_cards(chosen if memory_gib is None else with_memory(chosen, memory_gib))
    devices = resolve_devices(config.engine.devices)
    if any(device.type == "cpu" for device in devices):
        raise UserError(
            "--gpus: there is no GPU here to plan for; name some, for example --gpus '2x RTX 4090'"
        )
    return budgets_of_devices(devices, known)


def _show(plan: Plan, *, host_is_here: bool) -> None:
    from tworeel.report.plan import plan_tables, verdict_lines

    for table in plan_tables(plan, console):
        console.print(table)
    for line in verdict_lines(plan, host_is_here=host_is_here):
        say(line)


def _show_others(plan: Plan) -> None:
    from tworeel.report.plan import alternatives_table

    if plan.changes:
        console.print(alternatives_table(plan.changes, "With one of these it would"))
    elif not plan.fits:
        say("What would fit it: nothing that is known")
    if plan.alternatives:
        console.print(alternatives_table(plan.alternatives, "What else was weighed"))
