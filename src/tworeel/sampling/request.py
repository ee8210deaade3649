"""What is to be rendered, and what can be known to be wrong with it before a weight is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tworeel.config.schema import RunConfig
from tworeel.data.images import read_image
from tworeel.data.references import fit_references
from tworeel.errors import UserError, collected
from tworeel.models.family import Family, Sampling, Traits

REFERENCE = "reference_image_0"


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """A contact sheet: prompts by strengths."""

    prompts: tuple[str, ...]
    strengths: tuple[float, ...]
    negative_prompt: str
    images: Mapping[str, Path]
    """Condition images by the names of `Traits.image_inputs`, or reference images."""
    seed: int
    steps: int
    guidance: float
    has_negative: bool
    """Whether the negative prompt is used."""
    width: int
    height: int
    frames: int

    @property
    def captions(self) -> tuple[str, ...]:
        """Every text that has to be embedded."""
        return (*self.prompts, self.negative_prompt) if self.has_negative else self.prompts


def require_sampling(family: Family) -> Sampling:
    """Return how the family renders.

    Raises:
        UserError: it does not yet.
    """
    if family.sampling is None:
        raise UserError(f"sample: models of the family {family.name} cannot be rendered yet")
    return family.sampling


def make_request(
    config: RunConfig, family: Family, traits: Traits, strengths: tuple[float, ...]
) -> SampleRequest:
    """Take the request from a configuration; `strengths` are those where it names none.

    Raises:
        UserError: the family renders nothing yet; or everything that is wrong with the request.
    """
    sampling = require_sampling(family)
    asked = config.sample
    width, height = asked.size or _fitted(config.data.resolution, traits.spatial_multiple)
    given = {_first_name(traits): asked.image, "last_image": asked.last_image}
    guidance = sampling.guidance(traits) if asked.guidance is None else asked.guidance
    request = SampleRequest(
        prompts=asked.prompts,
        strengths=tuple(dict.fromkeys(asked.strengths or strengths)),
        negative_prompt=asked.negative_prompt,
        images={name: path for name, path in given.items() if path is not None},
        seed=asked.seed,
        steps=asked.steps,
        guidance=guidance,
        has_negative=guidance > 1 and sampling.takes_negative(traits),
        width=width,
        height=height,
        frames=sampling.frames if asked.frames is None else asked.frames,
    )
    if problems := tuple(_problems(request, traits)):
        raise UserError(*problems)
    return request


def _first_name(traits: Traits) -> str:
    """What `sample.image` is to a model: the first frame, or a reference."""
    return REFERENCE if traits.reference_images else "first_image"


def _fitted(size: tuple[int, int], multiple: int) -> tuple[int, int]:
    """A size of training buckets; theirs are rounded to what the model takes, too."""
    width, height = (max(multiple, length // multiple * multiple) for length in size)
    return width, height


def _problems(request: SampleRequest, traits: Traits) -> Iterator[str]:
    if not request.prompts:
        yield "sample.prompts: none given ('tworeel sample' takes --prompt)"
    multiple, stride = traits.spatial_multiple, traits.temporal_stride
    if request.width % multiple or request.height % multiple:
        size = f"[{request.width}, {request.height}]"
        yield f"sample.size = {size}: {traits.variant} takes multiples of {multiple} pixels"
    if (request.frames - 1) % stride:
        yield f"sample.frames = {request.frames}: {traits.variant} takes {stride}k+1 frames"
    yield from _image_problems(request.images, traits)


def _image_problems(images: Mapping[str, Path], traits: Traits) -> Iterator[str]:
    options = {_first_name(traits): "sample.image", "last_image": "sample.last_image"}
    for name in traits.image_inputs:
        if name not in images and not traits.image_optional:
            yield f"{options[name]}: missing; {traits.variant} starts from images"
    for name, path in images.items():
        if name not in traits.image_inputs and name != REFERENCE:
            yield f"{options[name]} = '{path}': {traits.variant} takes no such image; leave it out"
        else:
            found: list[str] = []
            if name == REFERENCE:
                fit_references([path], traits, found)
            else:
                with collected(found):
                    read_image(path)
            yield from (f"{options[name]}: {problem}" for problem in found)
