"""FLUX.2 in the benchmarks: two lists of blocks, in its double blocks two streams."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from listening import Listener

from tworeel.benchmarks import baseline
from tworeel.benchmarks.models import build, make_batches, mean_square
from tworeel.benchmarks.naive import device_hooks
from tworeel.benchmarks.preparing import Prepared, Settings, gradients_of, prepare
from tworeel.benchmarks.run import Bench
from tworeel.benchmarks.shapes import Case, make_cases, model_shape
from tworeel.benchmarks.widths import FLUX2_DEV, MODELS, TINY_FLUX2, TINY_TOKENS, Flux2Shape
from tworeel.errors import UserError

RATES = {"cpu": 1e9}


@pytest.fixture
def image() -> Case:
    (found,) = make_cases(TINY_FLUX2, tokens=[16], micro_batches=[2])
    return found


def test_the_standard_cases_are_two_sizes_of_image_and_eight_of_them() -> None:
    small, large = make_cases(FLUX2_DEV)
    assert (small.name, small.tokens, small.micro_batches) == ("512x512", 1024, 8)
    assert (large.name, large.tokens, large.micro_batches) == ("1024x1024", 4096, 8)
    (tiny,) = make_cases(TINY_FLUX2)
    assert (tiny.tokens, tiny.micro_batches) == (TINY_TOKENS, 4)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ("480x832x49", "must be WIDTHxHEIGHT or one of standard, 512x512"),
        ("512x500", "multiples of 16 for flux2-dev"),
    ],
)
def test_a_size_that_an_image_cannot_have_is_refused(shape: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make_cases(FLUX2_DEV, shapes=[shape])


@pytest.mark.parametrize(
    ("name", "billions"), [("flux2-dev", 32.22), ("flux2-klein-4b", 3.88), ("flux2-klein-9b", 9.08)]
)
def test_the_published_models_have_their_sizes(name: str, billions: float) -> None:
    shape = model_shape(name)
    model = build(shape, shape.blocks)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)


def test_fewer_blocks_keep_the_shares_of_both_kinds() -> None:
    config = FLUX2_DEV.config(14)
    assert (config["num_layers"], config["num_single_layers"]) == (2, 12)
    assert isinstance(shape := MODELS["flux2-klein-4b"], Flux2Shape) and shape.config()["num_layers"] == 5


def test_an_image_comes_with_what_the_transformer_takes(image: Case) -> None:
    (dev, _) = make_batches(image, torch.bfloat16, torch.device("cpu"))
    assert dev["hidden_states"].shape == (1, 16, 16) and dev["encoder_hidden_states"].shape == (1, 512, 96)
    assert dev["img_ids"].shape == (1, 16, 4) and dev["guidance"].item() == 1
    klein = replace(image, model=replace(TINY_FLUX2, variant="flux2-klein-4b"))
    assert make_batches(klein, torch.float32, torch.device("cpu"))[0]["guidance"] is None


@pytest.mark.parametrize("at", [1, 2, 3])
def test_hooks_give_the_gradients_of_the_plain_model_wherever_it_is_cut(
    image: Case, settings: Settings, at: int
) -> None:
    prepared = prepare(image, replace(settings, split_at=(at,)), blocks=5)

    def gradients() -> dict[str, torch.Tensor]:
        prepared.model.zero_grad(set_to_none=True)
        for batch in prepared.batches:
            mean_square(prepared.model(**batch)).backward()
        return gradients_of(prepared.model)

    plain = gradients()
    with device_hooks(prepared.model, prepared.placement):
        naive = gradients()
    assert all(float(gradient.norm()) > 0 for gradient in plain.values())
    for name in plain:
        torch.testing.assert_close(naive[name], plain[name])


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_case_is_measured_and_agrees_with_the_naive_run(
    image: Case, settings: Settings, quantize: str | None
) -> None:
    wanted = replace(settings, compare_naive=True, check=True, quantize=quantize)  # type: ignore[arg-type]
    result = Bench(RATES, Listener()).run(image, wanted)
    assert result.measured and result.measured.agreement
    assert result.measured.agreement.cosine > (0.9999 if quantize is None else 0.99)
    assert result.naive and result.naive.precision == "fp32"
    assert len(result.measured.spans) == 2 * 2 * image.micro_batches


def refuse_bf16(make: Callable[..., Prepared], *args: object) -> Prepared:
    if any(isinstance(arg, Settings) and arg.quantize is None for arg in args):
        raise torch.OutOfMemoryError("CUDA out of memory")
    return make(*args)


def test_where_bf16_does_not_fit_the_naive_run_has_the_precision_of_the_case(
    image: Case, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baseline, "prepare", lambda *args: refuse_bf16(prepare, *args))
    listener = Listener()
    wanted = replace(settings, compare_naive=True, check=True, quantize="int8", residency="keep")
    result = Bench(RATES, listener).run(image, wanted)
    assert "  the fp32 baseline does not fit: it runs in int8 too" in listener.lines
    assert result.naive and result.naive.precision == "int8" and result.speedup
    assert result.measured and result.measured.agreement and result.measured.agreement.cosine > 0.9999


def test_a_naive_run_that_fits_in_no_precision_is_told(
    image: Case, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baseline, "prepare", lambda *args: refuse_bf16(prepare, *args))
    result = Bench(RATES, Listener()).run(image, replace(settings, compare_naive=True))
    assert result.naive and result.naive.seconds_per_clip is None
    assert result.measured and result.speedup is None
