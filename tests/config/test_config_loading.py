from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tworeel.config import RunConfig, load_config
from tworeel.config.schema import TrainConfig
from tworeel.errors import UserError

Load = Callable[..., RunConfig]
Problems = Callable[..., tuple[str, ...]]


def test_what_is_not_written_has_its_default(load: Load, tmp_path: Path) -> None:
    config = load()
    assert config.train == TrainConfig(output=tmp_path / "output")
    assert config.model.dtype == "bfloat16"
    assert config.engine.devices is None


def test_toml_lists_and_strings_become_tuples_and_paths(load: Load) -> None:
    config = load('[engine]\ndevices = ["cuda:0", "cuda:1"]\n[lora]\ninit_from = "/old.safetensors"')
    assert config.engine.devices == ("cuda:0", "cuda:1")
    assert config.lora.init_from is not None and config.lora.init_from.name == "old.safetensors"


def test_an_integer_is_a_number(load: Load) -> None:
    assert load("[train]\nlearning_rate = 1").train.learning_rate == 1.0


def test_paths_start_at_the_folder_of_the_file(load: Load, tmp_path: Path) -> None:
    config = load('[cache]\nfolder = "../cache"')
    assert config.data.sources[0].path == tmp_path / "clips"
    assert config.cache.folder == tmp_path.parent / "cache"


def test_the_home_folder_may_be_written_as_a_tilde(load: Load) -> None:
    config = load('[train]\noutput = "~/runs"', {"model.path": "~/wan"})
    assert config.train.output == Path.home() / "runs"
    assert config.model.path == str(Path.home() / "wan")


def test_a_hub_id_stays_and_a_folder_beside_the_file_is_found(load: Load, tmp_path: Path) -> None:
    assert load().model.path == "wan"
    (tmp_path / "wan").mkdir()
    assert load().model.path == str(tmp_path / "wan")


def test_paths_of_the_command_line_start_at_the_current_folder(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "elsewhere"
    here.mkdir()
    monkeypatch.chdir(here)
    config = load("", {"data.sources": [{"path": "mine"}], "train.output": "run"})
    assert config.data.sources[0].path == here / "mine"
    assert config.train.output == here / "run"


def test_the_command_line_alone_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(None, {"model.path": "org/wan", "data.sources": [{"path": Path("clips")}]})
    assert config.model.path == "org/wan"
    assert config.train.output == tmp_path / "output"


def test_strings_of_the_command_line_are_read_as_toml_values(load: Load) -> None:
    config = load(
        "[train]\nsteps = 5",
        {
            "train.steps": "7",
            "train.betas": "[0.8, 0.9]",
            "train.tensorboard": "false",
            "train.name": "2024",
            "lora.targets": "attention",
            "lora.alpha": "16",
            "model.vae": r"C:\new\vae",
        },
    )
    assert (config.train.steps, config.train.betas, config.train.tensorboard) == (7, (0.8, 0.9), False)
    assert (config.train.name, config.lora.targets, config.lora.alpha) == ("2024", "attention", 16.0)
    assert config.model.vae == r"C:\new\vae"


def test_none_unsets_an_option(load: Load) -> None:
    config = load('[train]\nmax_grad_norm = "none"\nshift = 3.0', {"train.shift": "none"})
    assert config.train.max_grad_norm is None
    assert config.train.shift is None


def test_a_byte_order_mark_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[model]\npath = "a"\n[[data.sources]]\npath = "b"', encoding="utf-8-sig")
    assert load_config(path, {}).model.path == "a"


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (
            "[train]\nlearning_rte = 0.1",
            "train.learning_rte = 0.1: unknown key (did you mean 'learning_rate'?)",
        ),
        ("[train]\nrank = 3", "train.rank = 3: unknown key (belongs to [lora])"),
        ("[train]\ndtype = 3", "train.dtype = 3: unknown key (belongs to [model] or [cache])"),
        ("[train]\nresidenc = 3", "train.residenc = 3: unknown key (did you mean 'residency' in [engine]?)"),
        (
            "[lora]\nqqqq = 3",
            "lora.qqqq = 3: unknown key; allowed: rank, alpha, targets, rslora, dora, init_from",
        ),
        ("[trian]\nsteps = 3", "[trian]: unknown section (did you mean 'train'?)"),
        ("[train]\nsteps = 0", "train.steps = 0: must be an integer > 0"),
        ("[train]\nsteps = 1.5", "train.steps = 1.5: must be an integer > 0"),
        ("[lora]\nrank = true", "lora.rank = true: must be an integer > 0"),
        ('[train]\nlearning_rate = "0.1"', 'train.learning_rate = "0.1": must be a number > 0'),
        ("[train]\nlearning_rate = true", "train.learning_rate = true: must be a number > 0"),
        ("[train]\nlearning_rate = nan", "train.learning_rate = nan: must be a number > 0"),
        ("[train]\nlearning_rate = inf", "train.learning_rate = inf: must be a number > 0"),
        ("[train]\nname = 2024-01-01", "train.name = 2024-01-01: must be a string"),
        ("[train]\nbetas = [0.9]", "train.betas = [0.9]: must be a list of two numbers >= 0 and < 1"),
        ("[lora]\ndora = 1", "lora.dora = 1: must be true or false"),
        ("[lora]\ntargets = 4", "lora.targets = 4: must be a list of strings or a string"),
        ("[engine]\ndevices = []", 'engine.devices = []: must be a list of one or more strings or "none"'),
        (
            '[engine]\nresidency = "cpu"',
            'engine.residency = "cpu": must be "auto" or "keep" or "selective" or "recompute" or "offload" '
            'or "offload-selective"',
        ),
        ("[train]\nkeep_checkpoints = 1", "train.keep_checkpoints = 1: must be an integer >= 2"),
        (
            "[train]\nsteps = 5\nwarmup_steps = 6",
            "train.warmup_steps = 6, train.steps = 5: warmup_steps must not exceed steps",
        ),
        (
            '[engine]\ndevices = ["cpu", "cpu"]\nsplit_at = [3, 5]',
            'engine.split_at = [3, 5], engine.devices = ["cpu", "cpu"], engine.stages_per_device = 1: '
            "split_at must have one number less than there are stages",
        ),
        (
            '[engine]\nsplit_at = [3]\nstages_per_device = "auto"',
            'engine.split_at = [3], engine.stages_per_device = "auto": split_at needs a number of stages',
        ),
        (
            '[engine]\nstreamed_blocks = [1, 1]\nstages_per_device = "auto"',
            'engine.streamed_blocks = [1, 1], engine.stages_per_device = "auto": '
            "streamed_blocks needs a number of stages",
        ),
        (
            "[engine]\nstages_per_device = 0",
            'engine.stages_per_device = 0: must be an integer > 0 or "auto"',
        ),
        ("[engine]\nsplit_at = [5, 5]", "engine.split_at = [5, 5]: block numbers must increase"),
    ],
)
def test_a_mistake_is_one_line_with_the_key_and_what_is_allowed(
    problems: Problems, more: str, line: str
) -> None:
    assert problems(more) == (line,)


def test_all_mistakes_are_reported_at_once(problems: Problems) -> None:
    lines = problems(
        "weigt = 2\n[data]\nmin_aspect = 3\nframes = [1, 'a']\n"
        "[train]\nsteps = 0\nstps = 4\n[engine]\nsplit_at = [2, 1]",
        {"lora.rnk": "3", "lora.rank": "x"},
        base='[model]\n[[data.sources]]\npath = "clips"\n',
    )
    assert sorted(line.split()[0].rstrip(":") for line in lines) == [
        "data.frames",
        "data.min_aspect",
        "data.sources[0].weigt",
        "engine.split_at",
        "lora.rank",
        "lora.rnk",
        "model.path",
        "train.steps",
        "train.stps",
    ]


def test_what_is_required_and_missing_is_named_with_its_flag(problems: Problems) -> None:
    model, data = problems(base="")
    assert model.startswith("model.path: missing (on the command line: --model); Hub id")
    assert data.startswith("data.sources: missing (on the command line: --data)")


@pytest.mark.parametrize(
    ("base", "line"),
    [
        ('[data]\nsources = "clips"', 'data.sources = "clips": must be a list of one or more tables'),
        (
            '[data.sources]\npath = "clips"',
            'data.sources = {path = "clips"}: must be a list of one or more tables',
        ),
        ('[data]\nsources = ["clips"]', 'data.sources[0] = "clips": must be a table with a path'),
        ("[[data.sources]]\nweight = 1", "data.sources[0].path: missing"),
        ("[[data.sources]]\npath = 3", "data.sources[0].path = 3: must be a path"),
    ],
)
def test_a_wrong_dataset_is_explained(problems: Problems, base: str, line: str) -> None:
    (found,) = problems(base=base, overrides={"model.path": "wan"})
    assert found.startswith(line)


def test_a_section_that_is_no_table_is_refused(problems: Problems) -> None:
    assert problems(base="train = 3\n[model]\npath = 'a'\n[[data.sources]]\npath = 'b'") == (
        "train = 3: must be a table, [train]",
    )
    assert problems(overrides={"steps": "3"}) == ("steps = 3: unknown key (belongs to [train] or [sample])",)


def test_a_syntax_error_names_the_file_and_the_line(problems: Problems) -> None:
    (line,) = problems("[train]\nsteps = = 3")
    assert "run.toml: not valid TOML" in line and "line 7" in line


def test_what_is_nested_too_deeply_is_told_in_a_line(problems: Problems) -> None:
    (line,) = problems("deep = " + 5000 * "[")
    assert line.endswith("run.toml: is nested too deeply")
    (line,) = problems(overrides={"lora.rank": 5000 * "["})
    assert line.startswith("lora.rank = ") and line.endswith("must be an integer > 0")


def test_a_windows_path_in_double_quotes_gets_a_hint(problems: Problems) -> None:
    (line,) = problems('[cache]\nfolder = "C:\\users\\me"')
    assert "line 7" in line and "single quotes" in line


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\x00")
    for path, words in ((tmp_path / "none.toml", "no such file"), (tmp_path, ""), (binary, "UTF-8")):
        with pytest.raises(UserError) as caught:
            load_config(path, {})
        assert str(path) in str(caught.value) and words in str(caught.value)
