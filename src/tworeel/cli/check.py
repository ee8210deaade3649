"""`tworeel check`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tworeel.cli import options
from tworeel.cli.importing import importing
from tworeel.cli.watching import watching
from tworeel.errors import raise_if_any
from tworeel.report.console import complain, console, say

if TYPE_CHECKING:
    from tworeel.config import RunConfig
    from tworeel.data.scan import Scan
    from tworeel.models.family import Traits
    from tworeel.training.preflight import Job


def check(
    config: options.ConfigFile = None,
    model: options.Model = None,
    data: options.Data = None,
    expert: options.Expert = None,
    output: options.Output = None,
    devices: options.Devices = None,
    steps: options.Steps = None,
    rank: options.Rank = None,
    settings: options.Settings = None,
    skip_broken: options.SkipBroken = None,
) -> None:
    """Say everything that is wrong, and what will be trained on.

    Looks at the model's files, every clip, the devices and the options; takes what 'train' takes. Nothing is
    loaded, encoded or written.
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
        train__output=output,
        train__steps=steps,
    )
    with watching() as observer:
        # After what needs none of them; a Ctrl-C is heard meanwhile
        with importing():
            from tworeel.report.tables import model_lines
            from tworeel.training.preflight import survey

        found = survey(run_config, observer)
    for line in model_lines(found.source) if found.source else []:
        say(line)
    if found.source and found.scan:
        _show_data(run_config, found.scan, found.source.traits)
    raise_if_any(found.problems)
    assert found.job is not None, "neither a job nor a problem"
    _show_stages(found.job)
    _show_what_to_do(run_config)


_SHOWN = 5
"""Names of files in a line."""


def _show_data(config: RunConfig, scan: Scan, traits: Traits) -> None:
    from tworeel.report.tables import bucket_table, step_tokens

    console.print(bucket_table(scan.clips, traits))
    enlarged = sum(file.enlarged for file in scan.files)
    say(f"{_count(len(scan.clips), 'clip')} of {_count(len(scan.files), 'file')}")
    say(f"{len(scan.truncated):,} files are longer than their clips; {enlarged:,} are enlarged")
    if scan.passed_over:
        first = ", ".join(path.name for path in scan.passed_over[:_SHOWN])
        more = f" and {len(scan.passed_over) - _SHOWN:,} more" if len(scan.passed_over) > _SHOWN else ""
        say(f"Passed over, as neither clips nor captions of clips: {first}{more}")
    if scan.repeating:
        rate = config.data.frame_rate or traits.frame_rate
        say(
            f"{_count(len(scan.repeating), 'clip')} with frames more than once: a file has fewer than "
            f"{rate:g} a second (data.frame_rate), and its motion is learnt as it stutters"
        )
    weights = [source.weight * source.repeats for source in config.data.sources]
    mean, most = step_tokens(scan.clips, weights, traits, config.train.micro_batches)
    count = config.train.micro_batches
    say(f"An optimizer step is {count} clips: {mean:,.0f} tokens on average, at most {most:,}")
    for line in scan.skipped:
        complain("skipped", line)


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _show_stages(job: Job) -> None:
    for stage, device in enumerate(job.placement.devices):
        blocks = job.placement.blocks_of(stage)
        say(f"Stage {stage}: {device}, blocks {blocks[0]} to {blocks[-1]}")
    say(f"The LoRA adapts {len(job.targets):,} layers.")


def _show_what_to_do(config: RunConfig) -> None:
    from tworeel.training.checkpoint import CheckpointStore
    from tworeel.training.run_folder import RunFolder

    folder = RunFolder(config.train.output)
    if CheckpointStore(folder.checkpoints).steps():
        say(
            f"Nothing is wrong, but {folder.path} holds a run: 'tworeel train' needs --resume to go on "
            "with it, or another --output."
        )
    elif results := folder.loras(config.train.name):
        names = ", ".join(path.name for path in results)
        say(f"Nothing is wrong, but {folder.path} holds {names}: 'tworeel train' needs another --output.")
    else:
        say("Nothing is wrong: 'tworeel train' can start.")
