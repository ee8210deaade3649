"""Options that several commands have, and the configuration that they make."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tworeel.config import RunConfig, load_config
from tworeel.errors import UserError, collected, raise_if_any

ConfigFile = Annotated[
    Path | None,
    typer.Argument(
        help="TOML file with the run's options; 'tworeel config' writes one. Of a run's folder its own.",
        metavar="CONFIG",
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        help="Model: a folder, a single file or a hub id, in diffusers', Wan's or ComfyUI's layout."
    ),
]
Data = Annotated[
    list[Path] | None,
    typer.Option(
        help="Folder of clips with .txt captions, or a .csv / .jsonl list. Repeat it for more datasets.",
        metavar="PATH",
    ),
]
Expert = Annotated[
    str | None,
    typer.Option(help="Which expert of a Wan 2.2 A14B model: 'high' or 'low' noise.", metavar="high|low"),
]
Output = Annotated[
    Path | None, typer.Option(help="Folder of the run: checkpoints, metrics and the finished LoRA.")
]
Devices = Annotated[
    str | None,
    typer.Option(help="Devices that share the model, for example cuda:0,cuda:1. All GPUs by default."),
]
Steps = Annotated[int | None, typer.Option(help="Optimizer steps.")]
Rank = Annotated[int | None, typer.Option(help="Rank of the LoRA.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any other option as section.option=value. Repeat it.", metavar="KEY=VALUE"),
]
SkipBroken = Annotated[
    bool | None,
    typer.Option("--skip-broken", help="Leave out broken files and list them, rather than stop."),
]

Cards = Annotated[
    Path | None,
    typer.Option(help="A TOML file of cards that are not known; docs/planning.md shows one.", metavar="FILE"),
]


def read_config(config: Path | None, settings: list[str] | None, **options: Any) -> RunConfig:
    """Load the configuration that a command's options make.

    Args:
        config: the TOML file, or a run's folder, if one was given.
        settings: `key=value` each; weaker than options of their own.
        options: values by dotted key with `__` for the dot; None is not given.

    Raises:
        UserError: lists everything that is wrong.
    """
    overrides: dict[str, Any] = {}
    problems: list[str] = []
    for setting in settings or ():
        with collected(problems):
            key, value = _key_and_value(setting)
            overrides[key] = value
    for name, given in options.items():
        if given is not None:
            overrides[name.replace("__", ".")] = given
    with collected(problems):
        file = _file_of(config)
        loaded = load_config(file, overrides)
        if file is not None and "train.output" not in overrides:
            _refuse_moved(file.resolve().parent, loaded.train.output)
    raise_if_any(problems)
    return loaded


def _file_of(run: Path | None) -> Path | None:
    """The TOML file; of a run's folder its own."""
    from tworeel.training.run_folder import RunFolder

    if run is None or not run.is_dir():
        return run
    file = RunFolder(run).config
    if not file.is_file():
        raise UserError(f"{run}: holds no {file.name}; give the folder of a run, or a TOML file")
    return file


def _refuse_moved(folder: Path, output: Path) -> None:
    """Raise where the file is that of a run which lies in another folder than the file says."""
    from tworeel.training.run_folder import RunFolder

    if output.resolve() != folder and any(RunFolder(folder).checkpoints.glob("step-*/state.json")):
        raise UserError(
            f"train.output = '{output}': is not {folder}, where the file lies with a run's checkpoints; "
            "it was moved or copied: say which is meant, "
            f"--set train.output={folder} or --set train.output={output}"
        )


def datasets(paths: list[Path] | None) -> list[dict[str, Path]] | None:
    """Turn `--data` into `data.sources`."""
    return [{"path": path} for path in paths] if paths else None


def device_list(text: str | None) -> list[str] | None:
    """Turn `cuda:0,cuda:1` into a list."""
    return [name.strip() for name in text.split(",")] if text is not None else None


def _key_and_value(setting: str) -> tuple[str, str]:
    key, equals, value = setting.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {setting}: must be KEY=VALUE, for example train.steps=2000")
    return key.strip(), value.strip()
