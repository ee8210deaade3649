"""Previews during a run: the live model renders, and the training goes on as if it had not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tworeel.cache.store import CacheStore
from tworeel.config.schema import RunConfig
from tworeel.engine import Split, random_state_kept
from tworeel.engine.releasing import release_memory
from tworeel.errors import UserError
from tworeel.models.family import Picture
from tworeel.sampling.encoding import encode_request
from tworeel.sampling.files import Sheet, write_takes
from tworeel.sampling.rendering import Renderer, takes_of
from tworeel.sampling.request import SampleRequest, require_sampling
from tworeel.training.assembly import encoding_devices
from tworeel.training.loadable import torch_dtype
from tworeel.training.preflight import Job, cache_folder, text_options
from tworeel.training.report import RunObserver
from tworeel.training.run_folder import RunFolder
from tworeel.training.space import write_errors_in_words


def encode_previews(config: RunConfig, job: Job, observer: RunObserver) -> list[Picture]:
    """Encode what a run's previews need; the encoders are gone when it returns."""
    if job.previews is None:
        return []
    return encode_request(
        CacheStore(cache_folder(config)),
        job.family,
        job.source,
        job.previews,
        devices=encoding_devices(config),
        dtype=torch_dtype(config.cache.dtype),
        text=text_options(config),
        observer=observer,
    )


@dataclass(frozen=True, kw_only=True)
class Previews:
    """Renders in the middle of a run."""

    config: RunConfig
    job: Job
    split: Split
    """The live model."""
    pictures: Sequence[Picture]
    folder: RunFolder
    observer: RunObserver

    def render_if_due(self, step: int) -> None:
        """Render after some steps.

        One that memory or disk have no room for is left out, and that is said: a run does not end for a
        picture.

        Raises:
            Stopped: a signal came; the model is as it was.
        """
        every, request = self.config.sample.every, self.job.previews
        if every is None or request is None or step % every:
            return
        count = len(self.pictures) * len(request.strengths)
        self.observer.say(f"step {step}: rendering {count} {'preview' if count == 1 else 'previews'}")
        release_memory()
        try:
            with random_state_kept(self.split.placement.devices):
                sheet = self._render(step, request)
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
            self.observer.say(f"step {step}: no preview, there is too little memory for it: {reason}")
        except UserError as error:
            self.observer.say(f"step {step}: no preview: {error}")
        else:
            self.observer.say(f"step {step}: preview {sheet.path}")
        release_memory()

    def _render(self, step: int, request: SampleRequest) -> Sheet:
        source, devices = self.job.source, self.job.placement.devices
        sampling, takes = require_sampling(self.job.family), takes_of(self.pictures, request.strengths)
        renderer = Renderer(
            sampling,
            source,
            [self.split.model.config],
            device=devices[0],
            dtype=torch_dtype(self.config.model.dtype),
            seed=request.seed,
            poll=self.observer.poll,
        )
        latents = renderer.render(takes, 0, self.split)
        release_memory()
        decoder = sampling.open_decoder(source, roomiest(devices), torch_dtype(self.config.cache.dtype))
        path = self.folder.samples(step)
        with write_errors_in_words(path, "a preview", "the training goes on"):
            return write_takes(
                path, request.prompts, takes, latents, decoder, source.traits.frame_rate, self.observer.poll
            )


def roomiest(devices: Sequence[torch.device]) -> torch.device:
    """The device with the most free memory."""

    def free(device: torch.device) -> int:
        return 0 if device.type == "cpu" else torch.accelerator.get_memory_info(device)[0]

    return max(devices, key=free)
