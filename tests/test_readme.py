"""Every command, example and configuration of the documents is run, or listed with the reason why not.

Each document has a folder of its own, with tiny models and drawn clips at the paths that the documents name.
Its blocks run there in order, exactly as written, but for one rule: so that training takes seconds, the
options `SMALL` are added to `train`, `check` and `cache`, and `--steps` is divided by a hundred.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tworeel.cli.app import app
from tworeel.config import load_config
from tworeel.demo.checkpoint import write_checkpoint
from tworeel.demo.clips import write_clips

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])

SMALL = {
    "data.resolution": "[96,64]",
    "data.frames": "[1,5]",
    "lora.rank": "2",
    "train.steps": "2",
    "train.micro_batches": "2",
    "train.tensorboard": "false",
    "engine.devices": '["cpu","cpu"]',
}
CLIP_BENCH = "tworeel bench --shapes 480x832x49 --micro-batches 8"
IMAGE_BENCH = "tworeel bench --model flux2-dev --shapes"
SHORT = "--shapes 480x832x49 --blocks 16 --micro-batches 8 --micro-batches 4"
CAPPED = "--cap-gib 22.5 --cap-gib 30 --rounds 2 --compare naive"
INSTALLS = "would change the environment that the tests run in"
SCRIPTS, TRAINING = "python bench/diffsynth_scripts.py --script examples", "model_training/train.py"
NOT_RUN = {
    "make demo": "runs what tests/demo/test_demo_run.py runs, after an installation",
    "make test": "is what runs this test",
    "pip install .": INSTALLS,
    "pip install -c constraints.txt .": INSTALLS,
    "pip install '.[eightbit]'": INSTALLS,
    "python -m pip install -c constraints.txt -e .": INSTALLS,
    "python -m pip install -c constraints.txt -e .[dev]": INSTALLS,
    "tworeel demo": "run by tests/demo/test_demo_run.py",
    "python -m pytest -n 2": "is what runs this test",
    "python -m pytest -m gpu": "needs GPUs",
    "DIFFSYNTH_REPOSITORY=DiffSynth-Studio python -m pytest tests/diffsynth/test_scripts.py": (
        "needs DiffSynth's repository"
    ),
    "python bench/wan_a14b.py --phase write run resume": "needs GPUs; tests/bench runs it with --tiny",
    "python bench/wan_a14b.py --phase run resume --cap-gib 22.5": "needs GPUs",
    f"{CLIP_BENCH} --rounds 1 --cap-gib 22.5 --compare naive": "needs GPUs",
    "python bench/gradients.py --devices cuda:0,cuda:0": "needs GPUs; tests/bench runs it with --tiny",
    "python bench/gradients.py --devices cuda:0,cuda:0 --model flux2-dev --tokens 1024": "needs GPUs",
    f"{IMAGE_BENCH} 512x512 --precision fp8 --cap-gib 22.5 --rounds 3 --compare naive": "needs GPUs",
    f"{IMAGE_BENCH} 512x512 --split-at 25 --precision fp8 --precision int8 {CAPPED}": "needs GPUs",
    f"{IMAGE_BENCH} 512x512 --split-at 27 --precision bf16 --rounds 2 --compare naive": "needs GPUs",
    f"{IMAGE_BENCH} 1024x1024 --split-at 24 --precision fp8 {CAPPED}": "needs GPUs",
    f"{IMAGE_BENCH} 1024x1024 --split-at 26 --precision int8 {CAPPED}": "needs GPUs",
    **{
        f"{command} --rounds 3 --{launched}": "needs GPUs"
        for launched in ("cpp-wrapper", "no-cpp-wrapper")
        for command in (
            "tworeel bench --shapes image-1536",
            f"{IMAGE_BENCH} 512x512 --split-at 25 --precision fp8 --cap-gib 30",
        )
    },
    **{
        f"tworeel bench --shapes {options}": "needs GPUs; others of its kind are run without"
        for options in (
            "480x832x49 --precision fp8 --rounds 1 --compare naive",
            "480x832x49 --precision int8 --rounds 1 --compare naive",
            "480x832x49 --blocks 16 --micro-batches 4 --rounds 2",
            "image-1024 --rounds 3 --compare naive",
        )
    },
    f"tworeel bench --eager {SHORT} --rounds 2": "needs GPUs",
    f"tworeel bench {SHORT} --rounds 3 --timeline steps": "needs GPUs",
    "python bench/block_ways.py": "needs GPUs; tests/bench runs it with --tiny",
    "python bench/block_ways.py --model wan-5b --shape 1280x704x49": "needs GPUs",
    "python bench/block_ways.py --model flux2-dev --shape 1024x1024 --blocks 4": "needs GPUs",
    "python bench/planning.py --cases 2": "needs GPUs",
    "python bench/planning.py --cases 19 20 21": "needs GPUs",
    **{
        f"python bench/precision.py {options}": "takes a while; tests/bench runs it with --tiny"
        for options in (
            "--kinds fp8,int8",
            "--kinds fp8,int8 --model flux2-dev --tokens 4096",
            "--model wan-1.3b --tokens 256 --device cpu",
            "--model flux2-klein-4b --tokens 256 --device cpu",
            "--tiny",
            "--tiny --model flux2-dev",
        )
    },
    "tworeel bench --shapes image-1536 --rounds 3 --compare naive": "needs GPUs",
    f"{SCRIPTS}/wanvideo/{TRAINING} --offload --steps 2": "needs GPUs",
    f'{SCRIPTS}/wanvideo/{TRAINING} --offload --steps 2 --cap-gib 22.5 --cases "split, overlapping"': (
        "needs GPUs"
    ),
    f"{SCRIPTS}/wanvideo/{TRAINING} --task sft --offload --micro-batches 1 "
    '--cases "split, overlapping"': "needs GPUs",
    f"{SCRIPTS}/flux2/{TRAINING} --model flux2 --steps 2": "needs GPUs",
    f"{SCRIPTS}/flux2/{TRAINING} --model flux2 --offload --cap-gib 22.5 --steps 2 "
    '--cases "data process" "split, overlapping, fp8"': "needs GPUs",
    "python bench/flux2_dev.py --phase write text run --cap-gib 22.5": "needs GPUs",
    "DIFFSYNTH_DUAL_GPU=true python -m tworeel.diffsynth train.py --task sft": (
        "tests/diffsynth runs it where DiffSynth's repository is"
    ),
    "python bench/diffsynth_scripts.py --script train.py --json diffsynth.json": (
        "needs GPUs; tests/diffsynth runs it with --tiny"
    ),
    'python -c "import torch; print(torch.__version__, torch.cuda.device_count())"': "nothing of ours",
    "tworeel check --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --data clips": "needs a connection",
    "tworeel check --model black-forest-labs/FLUX.2-klein-base-4B --data pictures": "needs a connection",
}
EXAMPLES_NOT_RUN = {
    "WanPipeline.from_pretrained": "needs a model of many gigabytes",
    "transformer.to(weight_dtype)": "run by tests/trainers/test_diffusers_loop.py",
    'batch["target"].to(output[0].device)': "run by tests/trainers/test_diffusers_loop.py",
    "musubi_tuner": "run by tests/trainers/test_musubi_recipe.py",
    "flux2_model.py": "run by tests/trainers/test_aitoolkit_recipe.py",
    "BaseFlux2Setup.py": "run by tests/trainers/test_onetrainer_recipe.py",
}

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks_of(document: Path) -> list[tuple[str, str]]:
    """Language and content of each fenced block."""
    return _BLOCK.findall(document.read_text(encoding="utf-8"))


def commands_of(document: Path) -> Iterator[str]:
    for language, content in blocks_of(document):
        if language in ("sh", "bat"):
            yield from content.replace("\\\n", " ").splitlines()


@pytest.fixture(scope="session")
def offered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that the documents name, once."""
    folder = tmp_path_factory.mktemp("offered")
    write_checkpoint(folder / "models" / "Wan2.2-T2V-A14B", variant="wan2.2-t2v-a14b")
    write_checkpoint(folder / "models" / "Wan2.1-T2V-1.3B", variant="wan2.1-t2v-1.3b")
    comfyui = folder / "ComfyUI" / "models"
    flat = comfyui / "diffusion_models"
    write_checkpoint(flat, variant="wan2.1-t2v-1.3b", layout="comfyui")
    for name, place in {"wan_2.1_vae": "vae", "umt5_xxl_fp16": "text_encoders"}.items():
        (comfyui / place).mkdir()
        shutil.move(flat / f"{name}.safetensors", comfyui / place)
    (folder / "elsewhere").mkdir()
    shutil.copy(folder / "models" / "Wan2.1-T2V-1.3B" / "Wan2.1_VAE.pth", folder / "elsewhere")
    write_clips(folder / "clips", 2)
    return folder


def run_command(command: str) -> None:
    words = shlex.split(command)
    assert words[0] == "tworeel", f"neither ours nor listed in NOT_RUN: {command}"
    if "--steps" in words:
        value = words.index("--steps") + 1
        words[value] = str(int(words[value]) // 100)
    elif words[1] == "sample":
        words += ["--steps", "2"]
    if words[1] in ("train", "check", "cache", "plan"):
        words += [part for key, value in SMALL.items() for part in ("--set", f"{key}={value}")]
    app(words[1:], standalone_mode=False)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_block_of_the_document_runs(
    document: Path, offered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = tmp_path / "workspace"
    shutil.copytree(offered, workspace)
    monkeypatch.chdir(workspace)
    names: dict[str, object] = {"__name__": "example"}
    for language, content in blocks_of(document):
        if language in ("sh", "bat"):
            for command in content.replace("\\\n", " ").splitlines():
                if command not in NOT_RUN:
                    run_command(command)
        elif language == "python":
            if not any(needle in content for needle in EXAMPLES_NOT_RUN):
                exec(compile(content, str(document), "exec"), names)
        elif language == "toml":
            (workspace / "example.toml").write_text(content, encoding="utf-8")
            load_config(workspace / "example.toml", {})
        else:
            assert language == "text", f"a block in {document.name} does not say what it is"


def test_nothing_is_listed_as_not_run_that_no_document_has() -> None:
    commands = {command for document in DOCUMENTS for command in commands_of(document)}
    assert set(NOT_RUN) <= commands
    examples = "".join(content for document in DOCUMENTS for _, content in blocks_of(document))
    assert all(needle in examples for needle in EXAMPLES_NOT_RUN)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_files_that_are_named_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    files = re.findall(r"`((?:src|tests|bench|docs)/[\w/.-]+\w|\w+\.toml)`", text)
    missing = [link for link in links if not (document.parent / link).exists()]
    missing += [file for file in files if "/" in file and not (ROOT / file).exists()]
    assert not missing


def test_the_messages_that_troubleshooting_explains_are_messages_of_the_program() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    rows = re.findall(
        r"^\| (`[^|]+`) \|", (ROOT / "docs/troubleshooting.md").read_text("utf-8"), re.MULTILINE
    )
    assert len(rows) > 10
    fragments = [part for row in rows for part in re.split(r"…|`, `|`", row)]
    unknown = [part for part in fragments if len(part) > 3 and part.strip(": ,'()?=") not in source]
    assert not unknown
