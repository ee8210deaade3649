"""The plan beside what is measured: peaks and time of some training steps with an optimizer.

    python bench/planning.py                        all cases, on all GPUs
    python bench/planning.py --list                 their numbers and names
    python bench/planning.py --cases 3 7 flux2      those with these numbers, or with this in their name
    python bench/planning.py --stages 1 --devices cuda:1 --blocks 8 --cases i2v
                                                    with one stage, on this GPU alone, with 8 blocks
    python bench/planning.py --phase edges          the longest clip that a plan accepts under a limit, and
                                                    the next longer one, forced
    python bench/planning.py --phase splits         unequal limits: every second boundary against the planned
    python bench/planning.py --tiny                 seconds, on the CPU: no peaks, to see that it works

Transformers of real size with random weights, a LoRA on all linear layers of the blocks. Figures are told and
written as soon as each case is done; one that fails does not end the others. With fewer blocks a step is
shorter in proportion, and the longest clip about the same, since blocks that find no room are streamed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import measuring
import torch
from measuring import console, gib
from planning_cases import PHASES, TINY_PHASES, Case, chosen
from planning_runs import Bench, Measured

from tworeel.benchmarks import machine
from tworeel.engine.releasing import clear_frames, release_memory
from tworeel.planning.plans import Plan
from tworeel.units import GIB

EDGE_STEPS = (3, 2)
"""Of a clip that is accepted, and of one that is refused."""
WITHIN = 0.05
"""Of a measured peak, or half a GiB: what a plan may be off."""
UNDER = 0.02
"""Of a measured peak: what a plan may be under it."""
NEAR = 0.9
"""Of a limit: a clip that is refused should come as near to it."""
EVERY = 2
"""Which boundaries are tried."""

Results = dict[str, Any]


def compared(case: Case, plan: Plan, found: Measured) -> Results:
    """The plan's figures beside the measured ones, told at once."""
    _say(f"  {'planned':9}{_figures(plan.peaks, plan.seconds_per_step)}, split at {plan.split_at}")
    _say(f"  {'measured':9}{_figures(found.peaks, found.seconds)}, {found.residency or 'ran out of memory'}")
    if found.settled:
        _say(f"  {'':9}{_peaks(found.settled)} after the first step")
    for name, lines in found.at_peak.items():
        _say("\n    ".join([f"  at the peak of {name}:", *lines]))
    result = {"case": case.name, "plan": plan.as_json(), "measured": asdict(found)}
    if found.seconds is None:
        return result
    # The first step also tries out what fits, up to the limit, and has no moments of an optimizer yet.
    peaks = found.settled or found.peaks
    off = {name: plan.peaks[name] / peak - 1 for name, peak in peaks.items()}
    time_off = plan.seconds_per_step / found.seconds - 1 if case.steps > 2 else None
    shares = ", ".join(f"{name} {100 * share:+.1f} %" for name, share in off.items())
    time = "" if time_off is None else f"; time {100 * time_off:+.1f} %"
    _say(f"  {'off':9}{shares or 'peaks not measured'}{_verdict(plan, peaks)}{time}")
    return {**result, "off": off, "time_off": time_off}


def _verdict(plan: Plan, peaks: dict[str, int]) -> str:
    too_far = [
        name for name, peak in peaks.items() if abs(plan.peaks[name] - peak) > max(WITHIN * peak, GIB / 2)
    ]
    too_low = [name for name, peak in peaks.items() if plan.peaks[name] < (1 - UNDER) * peak]
    words = {"TOO FAR OFF": too_far, "TOO LOW": too_low}
    return "".join(f", {word} ({' '.join(names)})" for word, names in words.items() if names)


def _figures(peaks: dict[str, int], seconds: float | None) -> str:
    return f"{_peaks(peaks)}; {'no step' if seconds is None else f'{seconds:.2f} s a step'}"


def _peaks(peaks: dict[str, int]) -> str:
    return ", ".join(f"{name} {gib(size)}" for name, size in peaks.items()) or "no peaks"


def run_case(bench: Bench, case: Case) -> Iterator[tuple[str, Results]]:
    """As it is planned; where the host is what limits, once more after that, if it is asked for."""
    planner = bench.planner(case)
    plan = planner.best()
    found = bench.run(case, planner.request, plan)
    yield case.name, compared(case, plan, found)
    if bench.again and plan.host_bound and found.seconds is not None:
        # As a run's first steps teach later plans
        case = replace(case, at=plan.split_at)
        planner = bench.planner(case, host_factor=found.seconds / plan.seconds_per_step)
        plan = planner.best()
        _say("  once more, with what the host has taken")
        yield f"{case.name}, once more", compared(case, plan, bench.run(case, planner.request, plan))


def run_edge(bench: Bench, case: Case) -> Iterator[tuple[str, Results]]:
    """The longest clip that is accepted, and the next longer one."""
    found = bench.longest(case)
    if found is None:
        raise ValueError("nothing fits")
    for is_refused, some in enumerate(found):
        if some is None:
            _say("  no longer clip is refused")
            continue
        _say(f"  {some.frames} frames, {'refused' if is_refused else 'accepted'}")
        some = replace(some, steps=EDGE_STEPS[is_refused])
        planner = bench.planner(some)
        plan = planner.best()
        result = compared(some, plan, bench.run(some, planner.request, plan))
        told = _told_edge(plan, result["measured"], bool(is_refused))
        _say(f"  {told}")
        yield some.name, {**result, "refused": bool(is_refused), "verdict": told}


def _told_edge(plan: Plan, found: Results, is_refused: bool) -> str:
    limits = Counter[str]()
    for stage in plan.stages:
        limits[stage.device] += stage.free
    shares = [peak / limits[name] for name, peak in found["peaks"].items()]
    share = f"its peak is {100 * max(shares):.1f} % of what there is" if shares else "no peaks"
    if found["seconds"] is None:
        return f"ran out of memory: {'as planned' if is_refused else 'NOT AS PLANNED'}; {share}"
    if is_refused:
        near = not shares or max(shares) >= NEAR
        return f"trained, {share}: {'near enough' if near else 'REFUSED WITHOUT NEED'}"
    return f"trained as planned, {share}"


def run_split(bench: Bench, case: Case) -> Iterator[tuple[str, Results]]:
    """The planned boundary against others; told after each of them."""
    best = bench.planner(case).best()
    planned = best.split_at[0]
    times: dict[int, float] = {}
    # The planned one first, then those near it: a run that is killed has something to compare with.
    others = [at for at in range(EVERY, case.num_blocks, EVERY) if at != planned]
    others.sort(key=lambda at: abs(at - planned))
    for at in (planned, *others):
        some = replace(case, at=(at,))
        planner = bench.planner(some)
        plan = planner.best()
        found = bench.run(some, planner.request, plan) if plan.fits else None
        if found is not None and found.seconds is not None:
            times[at] = found.seconds
            _say(f"  split at {at}: {found.seconds:.2f} s (planned {plan.seconds_per_step:.2f})")
            yield case.name, {"planned": planned, "seconds": times}
    fastest = min(times, key=times.__getitem__, default=None)
    _say(f"  planned at {planned}: {times.get(planned)} s; fastest at {fastest}")


RUNS: dict[str, Callable[[Bench, Case], Iterator[tuple[str, Results]]]] = {
    "cases": run_case,
    "edges": run_edge,
    "splits": run_split,
}


def run_phase(phase: str, cases: list[tuple[int, Case]], bench: Bench, path: Path) -> list[str]:
    """Run the cases of a phase; the names of those that failed."""
    failed = []
    for number, case in cases:
        name = f"{phase.removesuffix('s')} {case.name}"
        if case.stages > len(bench.devices):
            _say(f"[{number}] {name}: left out, there are {len(bench.devices)} devices")
            continue
        _say(f"[{number}] {name}")
        begin = time.perf_counter()
        try:
            for told, result in RUNS[phase](bench, case):
                took = time.perf_counter() - begin
                measuring.add_results(
                    path, {f"{phase.removesuffix('s')} {told}": {**result, "took": took}}, quiet=True
                )
        except Exception as error:  # noqa: BLE001  # the other cases are worth their minutes
            failed.append(name)
            console.print_exception()
            measuring.add_results(path, {name: {"error": f"{type(error).__name__}: {error}"}}, quiet=True)
            clear_frames(error)
        release_memory()
        _say(f"  took {time.perf_counter() - begin:.1f} s in all")
    return failed


def _say(line: str) -> None:
    console.print(line, markup=False, soft_wrap=True)


def cases_of(phase: str, options: argparse.Namespace) -> list[tuple[int, Case]]:
    """The cases of a phase, changed as the command line wants them."""
    found = chosen((TINY_PHASES if options.tiny else PHASES)[phase], options.cases)
    changes: dict[str, Any] = {
        name: value
        for name in ("blocks", "stages", "steps", "compile")
        if (value := getattr(options, name)) is not None
    }
    return [(number, replace(case, **changes)) for number, case in found]


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--phase", choices=RUNS, nargs="+", default=["cases"])
    parser.add_argument("--cases", nargs="+", default=[], help="numbers, or parts of names; all by default")
    parser.add_argument("--list", action="store_true", help="only tell the cases")
    parser.add_argument("--devices", help="for example cuda:0,cuda:1; all by default")
    parser.add_argument("--stages", type=int, help="instead of each case's own: 1 runs it on one device")
    parser.add_argument("--blocks", type=int, help="of the model; all by default")
    parser.add_argument("--steps", type=int, help="3 by default; those after the second are timed")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="compile blocks; as each case says by default",
    )
    parser.add_argument("--at-peak", action="store_true", help="tell what lies in each GPU's memory then")
    parser.add_argument(
        "--again",
        action="store_true",
        help="where the host limits, plan and run a case once more with what it has taken",
    )
    parser.add_argument("--json", type=Path, default=Path("planning.json"), help="file for the figures")
    parser.add_argument("--tiny", action="store_true", help="a model of a few million parameters")
    return parser.parse_args()


def _devices(names: str | None) -> list[torch.device]:
    if names is not None:
        return measuring.devices_from(names)
    return measuring.default_devices(max(2, torch.accelerator.device_count()))


def main() -> int:
    """Run the phases that are asked for; 1 if a case failed."""
    options = parse_arguments()
    if options.list:
        for phase in options.phase:
            for number, case in cases_of(phase, options):
                _say(f"{phase} {number}: {case.name}")
        return 0
    devices = _devices(options.devices)
    if options.at_peak and any(device.type != "cuda" for device in devices):
        sys.exit("--at-peak: only CUDA's allocator tells what lies in memory")
    facts = machine.facts(dict.fromkeys(devices))
    measuring.print_machine(facts)
    machine.wake(devices)
    measuring.add_results(options.json, {"machine": facts})
    bench = Bench(devices, looks=options.at_peak, again=options.again)
    failed = [
        name
        for phase in options.phase
        for name in run_phase(phase, cases_of(phase, options), bench, options.json)
    ]
    for name in failed:
        _say(f"failed: {name}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
