"""Compiled, fitted, streamed, parked and interleaved on real devices: the gradients of the plain model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_wan import gradients, make_wan, square_loss

from tworeel import Pipeline
from tworeel.engine import attention_backend, parking
from tworeel.engine.passage import Passage
from tworeel.engine.releasing import release_memory

pytestmark = pytest.mark.gpu

SIZES = {"num_attention_heads": 4, "attention_head_dim": 64, "ffn_dim": 512, "num_layers": 8}
GIB = 2**30


def make_model(device: torch.device | str = "cpu") -> nn.Module:
    """A bf16 transformer that is wide enough for every attention kernel."""
    return make_wan("t2v", torch.bfloat16, **SIZES).to(device)


def make_batches(count: int, *, alike: bool = True, side: int = 16) -> list[dict[str, Tensor]]:
    """Micro-batches of a square's tokens: 256, or 256, 128 and 64; more with a longer side."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(torch.bfloat16)

    return [
        {
            "hidden_states": randn(1, 16, 4 if alike else 4 >> i % 3, side, side),
            "timestep": torch.tensor([500.0]),
            "encoder_hidden_states": randn(1, 12, 16),
        }
        for i in range(count)
    ]


def step(
    devices: list[torch.device], *, alike: bool = True, side: int = 16, **options: Any
) -> tuple[dict[str, Tensor], Pipeline]:
    """The second step's gradients, on the CPU."""
    model = make_model()
    pipeline = Pipeline(model, devices, **options)
    for _ in range(2):
        model.zero_grad()
        pipeline.step(make_batches(4, alike=alike, side=side), square_loss)
    return {name: gradient.cpu() for name, gradient in gradients(model).items()}, pipeline


@pytest.fixture
def expected(gpu: torch.device) -> dict[str, Tensor]:
    """Gradients of the unsplit eager model on one GPU."""
    return step([gpu])[0]


@pytest.fixture(autouse=True)
def _everything_is_worth_a_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parking, "SMALLEST", 0)


@pytest.fixture
def _full_memory(cuda: torch.device) -> Iterator[None]:
    yield
    torch.cuda.set_per_process_memory_fraction(1.0, cuda)


def assert_alike(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """The same directions: what is compiled rounds in other places."""
    for name, gradient in theirs.items():
        cosine = torch.cosine_similarity(ours[name].double().flatten(), gradient.double().flatten(), dim=0)
        assert cosine >= 0.999, f"{name}: {cosine}"


@pytest.mark.parametrize("residency", ["keep", "selective", "recompute", "offload", "offload-selective"])
@pytest.mark.parametrize("compile", [False, True])
def test_every_residency_gives_the_gradients_of_the_plain_model(
    two_gpus: list[torch.device], expected: dict[str, Tensor], residency: str, compile: bool
) -> None:
    found, pipeline = step(two_gpus, residency=residency, compile=compile, slack=1)
    assert_alike(found, expected)
    assert (pipeline.split.host_pool.held > 0) == residency.startswith("offload")
    assert not (pipeline.split.compiler and pipeline.split.compiler.failed)


@pytest.mark.parametrize("residency", ["keep", "selective", "recompute", "offload", "offload-selective"])
def test_blocks_launched_from_cpp_give_the_gradients_of_the_plain_model(
    two_gpus: list[torch.device], expected: dict[str, Tensor], residency: str
) -> None:
    found, pipeline = step(two_gpus, residency=residency, compile=True, cpp_wrapper=True, slack=1)
    assert_alike(found, expected)
    assert pipeline.split.compiler is not None and not pipeline.split.compiler.failed


@pytest.mark.parametrize(
    "how", [{}, {"compile": True}, {"compile": True, "cpp_wrapper": True}], ids=["eager", "compiled", "cpp"]
)
def test_streamed_weights_give_the_gradients_of_the_plain_model(
    two_gpus: list[torch.device], expected: dict[str, Tensor], how: dict[str, bool]
) -> None:
    found, pipeline = step(two_gpus, residency="selective", streamed=(3, 2), slack=1, **how)
    assert_alike(found, expected)
    assert pipeline.split.streamed_bytes > 0


@pytest.mark.parametrize("cpp_wrapper", [False, True])
def test_compiled_blocks_give_the_gradients_of_the_plain_model_for_clips_of_several_sizes(
    two_gpus: list[torch.device], cpp_wrapper: bool
) -> None:
    expected, _ = step(two_gpus[:1], alike=False)
    options: dict[str, Any] = {"residency": "recompute", "compile": True, "cpp_wrapper": cpp_wrapper}
    found, pipeline = step(two_gpus, alike=False, slack=1, **options)
    assert_alike(found, expected)
    assert pipeline.split.compiler is not None and not pipeline.split.compiler.failed


def test_interleaved_stages_give_the_gradients_of_the_plain_model(
    two_gpus: list[torch.device], expected: dict[str, Tensor]
) -> None:
    found, _ = step(two_gpus * 2, residency="recompute")
    assert_alike(found, expected)


def test_auto_keeps_everything_where_there_is_room(two_gpus: list[torch.device]) -> None:
    _, pipeline = step(two_gpus, residency="auto")
    assert pipeline.split.residency_in_words() == "stage 0: 4 keep; stage 1: 4 keep"


@pytest.mark.usefixtures("_full_memory")
def test_auto_keeps_less_where_there_is_little_room(cuda: torch.device) -> None:
    """The eight blocks would keep 0.4 GiB. What cuBLAS holds by now is no part of the room."""
    expected = step([cuda], residency="keep", side=64)[0]  # its threads end, their workspaces are free again
    release_memory()
    total = torch.cuda.get_device_properties(cuda).total_memory
    limit = torch.cuda.memory_reserved(cuda) + 0.3 * GIB
    torch.cuda.set_per_process_memory_fraction(limit / total, cuda)
    found, pipeline = step([cuda], residency="auto", side=64)
    assert "8 keep" not in pipeline.split.residency_in_words()
    assert_alike(found, expected)


class Open:
    """A gate that lets every micro-batch through."""

    def advance(self, stage: int, to: int) -> None: ...


def test_what_an_earlier_stage_has_made_comes_before_what_others_queue_there_later(
    cuda: torch.device, two_gpus: list[torch.device]
) -> None:
    passage, behind = (Passage(two_gpus, Open()) for _ in range(2))
    made, hidden, other = (torch.ones(8, device=cuda) for _ in range(3))
    passage.arrive(1, (hidden,), block=True)
    torch.cuda._sleep(2_000_000_000)  # a second of another micro-batch's work
    with torch.cuda.stream(torch.cuda.Stream(two_gpus[1])):
        behind.arrive(1, (other,), block=True)  # its copy waits for that
    (brought,) = passage.gather((made,))
    assert brought.device == two_gpus[1]
    torch.cuda.current_stream(two_gpus[1]).synchronize()
    assert not torch.cuda.current_stream(cuda).query()


def test_the_deterministic_kernel_gives_the_same_bits_again(two_gpus: list[torch.device]) -> None:
    with attention_backend("deterministic", two_gpus):
        first, second = (step(two_gpus, residency="recompute", slack=1)[0] for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", ["auto", "cudnn", "flash", "efficient"])
def test_every_attention_kernel_gives_the_same_gradients(
    two_gpus: list[torch.device], expected: dict[str, Tensor], name: Any
) -> None:
    with attention_backend(name, two_gpus):
        assert_alike(step(two_gpus, residency="keep")[0], expected)
