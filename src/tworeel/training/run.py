"""A training run from its configuration to the LoRA file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from tworeel import __version__
from tworeel.cache.build import CacheIndex
from tworeel.config.schema import RunConfig
from tworeel.config.writing import dump_config
from tworeel.engine import Pipeline, Split, attention_backend
from tworeel.engine.attention import before_first_product
from tworeel.errors import UserError, collected
from tworeel.files import sweep_temporaries, write_text_atomic
from tworeel.lora.files import describe_run, save_lora
from tworeel.lora.state import export_lora, lora_parameters, start_from, without_needless_alpha
from tworeel.models.family import Picture
from tworeel.planning.cards import Card, known_cards
from tworeel.planning.plans import Plan
from tworeel.report.plan import misfit, plan_lines
from tworeel.signals import Stopped
from tworeel.training.assembly import cache_clips, load_model, make_micro_batches, split_model
from tworeel.training.checkpoint import Checkpoint, CheckpointStore
from tworeel.training.choices import as_before
from tworeel.training.devices import forget_peaks
from tworeel.training.loop import Trainer
from tworeel.training.metrics import MetricsLog, read_metrics
from tworeel.training.micro_batches import MicroBatches, run_transformer
from tworeel.training.optimizer import make_optimizer
from tworeel.training.planned import PlannedRun, plan_job
from tworeel.training.preflight import Job, preflight
from tworeel.training.previews import Previews, encode_previews
from tworeel.training.report import Result, RunObserver, SilentRun, StepReport
from tworeel.training.run_folder import RunFolder
from tworeel.training.shortage import out_of_memory
from tworeel.training.space import (
    RESULTS,
    full_disk_as_user_error,
    require_space,
    space_of_results,
    write_errors_in_words,
)
from tworeel.training.state import (
    find_checkpoint,
    leave_course,
    require_same_model,
    restore_state,
    save_state,
)


def train(
    config: RunConfig,
    *,
    resume: bool | Path = False,
    anyway: bool = False,
    cards: Path | None = None,
    observer: RunObserver | None = None,
) -> Result:
    """Check, cache, train and export.

    Args:
        config: of the run.
        resume: True to go on from the newest intact checkpoint in the output folder, or the folder of one.
        anyway: train even if the plan does not fit the devices; it may run out of memory.
        cards: a file of cards that the planner's table does not have.
        observer: sees the progress, and may stop it by raising `Stopped`: a checkpoint is saved first.

    Raises:
        UserError: everything that was found wrong, or that the plan does not fit, before a weight is read;
            or what stopped the training.
        Stopped: a signal came; the work so far is saved.
    """
    watched = observer or SilentRun()
    before_first_product(config.engine.attention)
    folder = RunFolder(config.train.output)
    kept = "the checkpoints are intact; free some space, then --resume"
    with full_disk_as_user_error(folder.path, "the run", kept), folder.locked():
        sweep_temporaries(folder.path)
        store = CheckpointStore(folder.checkpoints, keep=config.train.keep_checkpoints)
        checkpoint: Checkpoint | None = None
        problems: list[str] = []
        with collected(problems):
            results = folder.loras(config.train.name)
            checkpoint = find_checkpoint(store, resume, config, watched, results)
        if checkpoint is not None:
            config = as_before(config, checkpoint.state["config"])
        known: Sequence[Card] = ()
        with collected(problems):
            known = known_cards(cards)
        job = preflight(config if checkpoint is None else _without_start(config), watched, problems)
        if checkpoint is not None:
            require_same_model(checkpoint, config, job.source.traits.variant)
        config, job, planned = plan_job(config, job, watched.say, known)
        if planned is not None:
            _tell(planned.plan, anyway, watched)
        if checkpoint is None:
            write_text_atomic(folder.config, dump_config(config))
        if planned is not None:
            write_text_atomic(folder.plan, json.dumps(planned.plan.as_json(), indent=1) + "\n")
        with _memory_told(job.placement.devices, folder, planned):
            index = cache_clips(config, job, watched)
            pictures = encode_previews(config, job, watched)
            return _train(config, job, planned, index, pictures, folder, store, checkpoint, watched)


def _without_start(config: RunConfig) -> RunConfig:
    """Of a run that goes on: what its LoRA began with is in its checkpoints."""
    return config.model_copy(update={"lora": config.lora.model_copy(update={"init_from": None})})


def _tell(plan: Plan, anyway: bool, observer: RunObserver) -> None:
    """Say what was planned; raise `UserError` if it does not fit, unless it is to be tried all the same."""
    for line in plan_lines(plan):
        observer.say(line)
    if plan.fits:
        return
    if not anyway:
        raise UserError(f"the plan does not fit: {misfit(plan)}. --anyway trains all the same")
    observer.say(f"Plan: this may run out of memory: {misfit(plan)}")


def _train(
    config: RunConfig,
    job: Job,
    planned: PlannedRun | None,
    index: CacheIndex,
    pictures: Sequence[Picture],
    folder: RunFolder,
    store: CheckpointStore,
    checkpoint: Checkpoint | None,
    observer: RunObserver,
) -> Result:
    model = load_model(config, job, observer.poll)
    if job.init_from is not None:
        for name in start_from(model, job.init_from, str(config.lora.init_from)):
            observer.say(f"lora.init_from has nothing for {name}: it starts as new")
    division = split_model(config, job, model)
    division.optimizer = optimizer = make_optimizer(lora_parameters(model).values(), config.train)
    batches = make_micro_batches(config, job, index)
    if checkpoint is not None:
        restore_state(checkpoint, model, optimizer)
        leave_course(store, checkpoint, batches.fingerprint, observer)
        # Not before: what is refused leaves the run as it was.
        write_text_atomic(folder.config, dump_config(config))
    pipeline = Pipeline(division, forward=run_transformer, slack=config.engine.slack)
    trainer = Trainer(pipeline, optimizer, config.train, observer)
    run = _Run(
        config=config,
        job=job,
        planned=planned,
        folder=folder,
        store=store,
        split=division,
        trainer=trainer,
        observer=observer,
        batches=batches,
        previews=Previews(
            config=config, job=job, split=division, pictures=pictures, folder=folder, observer=observer
        ),
    )
    run.require_space()
    with attention_backend(config.engine.attention, job.placement.devices):
        run.go(checkpoint.step if checkpoint else 0)
    return Result(
        lora=folder.lora(config.train.name),
        steps=config.train.steps,
        folder=folder.path,
        expert=job.source.traits.expert,
    )


@dataclass(frozen=True, kw_only=True)
class _Run:
    """The loop over the steps, with what is written on the way."""

    config: RunConfig
    job: Job
    planned: PlannedRun | None
    folder: RunFolder
    store: CheckpointStore
    split: Split
    trainer: Trainer
    observer: RunObserver
    batches: MicroBatches
    previews: Previews

    def require_space(self) -> None:
        """Raise `OutOfSpace` unless this run's checkpoints and its LoRA will fit on the disk."""
        lora, keep = self._checkpoint_size // 3, self.config.train.keep_checkpoints
        needed = space_of_results(lora, keep, self.folder.checkpoints)
        require_space(self.folder.path, needed, RESULTS)

    @property
    def _checkpoint_size(self) -> int:
        """Bytes of the LoRA's weights and two moments."""
        return 3 * sum(p.nbytes for p in lora_parameters(self.trainer.model).values())

    def go(self, done: int) -> None:
        """Train from step `done` on, and write the LoRA.

        Raises:
            Stopped: a signal came; the steps that were finished are saved.
        """
        steps = self.config.train.steps
        board = self.folder.tensorboard if self.config.train.tensorboard else None
        known = [line for line in read_metrics(self.folder.metrics) if line["step"] <= done]
        self.observer.train(done + 1, steps, [line["loss"] for line in known if "loss" in line])
        forget_peaks(self.job.placement.devices)  # what encoding and loading held is no peak of training
        with (
            MetricsLog(self.folder.metrics, done, board) as metrics,
            closing(self.batches.ahead(done, steps)) as ahead,
        ):
            try:
                for step, micro_batches in ahead:
                    report = self.trainer.step(step, micro_batches)
                    done = step + 1
                    metrics.write(done, _as_metrics(report))
                    self.observer.step(report)
                    self._compare(report)
                    self._export_if_due(done)
                    if done % self.config.train.save_every == 0 or done == steps:
                        self._save(done, metrics)
                    self.previews.render_if_due(done)
                    self.observer.poll()
            except Stopped:
                if done not in self.store.steps():
                    self._save(done, metrics)
                raise
        self._export(steps, self.config.train.name)

    def _compare(self, report: StepReport) -> None:
        """Keep what the step has measured for later plans, and say how it compares with this one."""
        if self.planned is None:
            return
        self.planned.keep_bytes(self.split)
        if line := self.planned.heard(report):
            self.observer.say(line)

    def _save(self, step: int, metrics: MetricsLog) -> None:
        metrics.sync()
        require_space(self.folder.path, self._checkpoint_size, "a checkpoint")
        save_state(
            self.store,
            step,
            self.trainer.model,
            self.trainer.optimizer,
            config=self.config,
            clips=self.batches.fingerprint,
            variant=self.job.source.traits.variant,
        )

    def _export_if_due(self, step: int) -> None:
        """Before the checkpoint of the same step: a run that is killed between the two writes it again."""
        every = self.config.train.export_every
        if every and step % every == 0 and step < self.config.train.steps:
            self._export(step, f"{self.config.train.name}-{step:06d}")

    def _export(self, step: int, name: str) -> None:
        config, traits = self.config, self.job.source.traits
        metadata = describe_run(
            version=__version__,
            model=traits.variant,
            expert=traits.expert,
            rank=config.lora.rank,
            alpha=config.lora.alpha or config.lora.rank,
            precision=config.model.quantize or config.model.dtype,
            steps=step,
            dataset=_dataset_summary(self.job),
        )
        lora = export_lora(self.trainer.model)
        if self.job.naming.native_parts is not None:
            # diffusers refuses files with fused layers and alpha; without, ComfyUI and it take the same file.
            lora = without_needless_alpha(lora)
        path = self.folder.lora(name)
        with write_errors_in_words(path, "the LoRA", "the checkpoints are intact; --resume goes on"):
            save_lora(path, lora, "comfyui", self.job.naming, metadata=metadata)


def _as_metrics(report: StepReport) -> dict[str, float]:
    return {
        "loss": report.loss,
        "grad_norm": report.grad_norm,
        "learning_rate": report.learning_rate,
        "seconds": report.seconds,
        **{f"memory/{device}": size for device, size in report.memory.items()},
        **{f"busy/stage{stage}": share for stage, share in enumerate(report.busy)},
    }


def _dataset_summary(job: Job) -> str:
    buckets = sorted({clip.bucket for clip in job.clips})
    shapes = ", ".join(dict.fromkeys(f"{b.frames}x{b.height}x{b.width}" for b in buckets))
    return f"{len(job.clips)} clips ({shapes})"


@contextmanager
def _memory_told(
    devices: tuple[torch.device, ...], folder: RunFolder, planned: PlannedRun | None
) -> Iterator[None]:
    """Turn an out-of-memory error into words; no batch is changed silently."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        kept = f"The checkpoints in {folder.checkpoints} are intact."
        raise out_of_memory(error, devices, kept, planned) from error
