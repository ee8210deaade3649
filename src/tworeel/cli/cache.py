"""`tworeel cache`."""

from __future__ import annotations

from tworeel.cli import options
from tworeel.cli.importing import importing
from tworeel.cli.watching import watching
from tworeel.report.console import complain, say


def cache(
    config: options.ConfigFile = None,
    model: options.Model = None,
    data: options.Data = None,
    expert: options.Expert = None,
    output: options.Output = None,
    devices: options.Devices = None,
    settings: options.Settings = None,
    skip_broken: options.SkipBroken = None,
) -> None:
    """Encode clips and captions ahead of training.

    All devices encode side by side. 'train' does it too; this is for doing it earlier or elsewhere. What is
    cached already is not encoded again.
    """
    run_config = options.read_config(
        config,
        settings,
        model__path=model,
        model__expert=expert,
        data__sources=options.datasets(data),
        data__skip_broken=skip_broken,
        cache__devices=options.device_list(devices),
        train__output=output,
    )
    with watching() as observer:
        # After what needs none of them; a Ctrl-C is heard meanwhile
        with importing():
            from tworeel.training.assembly import cache_clips
            from tworeel.training.preflight import preflight

        job = preflight(run_config, observer)
        index = cache_clips(run_config, job, observer)
    for line in job.scan.skipped:
        complain("skipped", line)
    say(f"{len(job.clips):,} clips are in the cache: {index.store.folder}")
