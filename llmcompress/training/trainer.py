"""The one place that wires transformers' Trainer, for fine-tuning and distillation alike.

The loop, the optimizer, mixed precision and processes are Trainer's. Ours is what surrounds it:

    rows ──order drawn from the seed──> Trainer ──every step──> progress bar, driver (AdaLoRA's budget)
                                           ├──loss not finite──> stop, with advice; the last good checkpoint stays
                                           └──every so often──> checkpoint-N/ trained weights, optimizer, random state,
                                                                driver state, and last of all the mark `complete`

A run that was killed goes on from the last checkpoint with the mark and gives the same losses as one that was not. Only
weights that are trained are written: the base of an adapter is on disk already. Where the model is sharded over the
processes, sharding.py says what differs.
"""

from __future__ import annotations

import math
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from llmcompress.console import Progress, Step, quiet
from llmcompress.data.collate import Example, collate
from llmcompress.distributed import num_processes, sharded, speaks
from llmcompress.models.loading import best_device
from llmcompress.report import CurvePoint, Training
from llmcompress.seed import derive
from llmcompress.training import sharding
from llmcompress.training.failures import TrainingFailedError, is_out_of_memory, not_finite, out_of_memory
from llmcompress.training.settings import TrainingSettings

WEIGHTS, DRIVER, COMPLETE = "trained.pt", "driver.pt", "complete"
MOST_POINTS = 400
"""Points of a loss curve; in longer runs each is the mean over several steps."""

Loss = Callable[[Any, dict[str, torch.Tensor], Any], tuple[torch.Tensor, Any]]
"""(model, batch, trained tokens of the whole step or None) -> (loss, outputs): what is minimized."""


class Driver(Protocol):
    """Something that acts on every optimizer step and has a state of its own."""

    def start(self, total_steps: int) -> None:
        """The run has so many optimizer steps."""
        ...

    def step(self, step: int) -> None:
        """Step number `step` (from 0) was taken; its gradients are still there."""
        ...

    def state(self) -> dict[str, Any]:
        """What it must remember over an interruption."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a remembered state."""
        ...


@dataclass
class _Watch(TrainerCallback):
    """Moves the bar and the driver, and marks checkpoints that are whole."""

    bar: Step
    driver: Driver | None
    losses: list[float] = field(default_factory=list)
    around: Callable[[Any], None] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Skip what an earlier run did."""
        if self.around:
            self.around(model)
        if state.global_step:
            self.bar.advance(state.global_step, f"resumed at step {state.global_step}")
        if self.driver:
            self.driver.start(state.max_steps)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called between the optimizer's step and the clearing of gradients."""
        if self.driver:
            self.driver.step(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One step further."""
        self.bar.advance(1, f"loss {self.losses[-1]:.4f}" if self.losses else "")

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """The last step was taken and is saved."""
        if self.around:
            self.around(model)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Everything of the checkpoint is written."""
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()


class Guarded:
    """What is ours of a trainer, laid over transformers' Trainer or a subclass of it: our loss, an end to a loss that
    is no number, and checkpoints of the trained weights alone."""

    args: Any
    state: Any
    model: Any
    accelerator: Any

    def __init__(self, *args: Any, loss: Loss | None, driver: Driver | None, watch: _Watch, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.loss, self.driver, self.watch = loss, driver, watch
        self.names = [name for name, _ in trained(self.model)]
        if sharded():
            sharding.shard(self)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The caller's loss where there is one, else the model's own."""
        if self.loss is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        loss, outputs = self.loss(model, inputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One batch; a loss that is no number ends the run before it reaches the weights."""
        loss: torch.Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        if not bool(torch.isfinite(loss)):
            raise self.not_finite("the loss")
        self.watch.losses[:] = [float(loss)]
        return loss

    def not_finite(self, what: str) -> TrainingFailedError:
        """The error, with the place of the last good checkpoint."""
        rate = self.args.learning_rate
        return not_finite(what, self.state.global_step, rate, last_checkpoint(Path(str(self.args.output_dir))))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The trained weights, whole; written by one process."""
        if sharded():
            weights = sharding.gather_trained(self.model)
            if speaks():
                self._save(output_dir, weights)
        else:
            super().save_model(output_dir, _internal_call)  # type: ignore[misc]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if sharded():
            sharding.save_optimizer(self, Path(output_dir))
        else:
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(str(output_dir or self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        own = state_dict or dict(trained(self.accelerator.unwrap_model(self.model)))
        weights = {name: own[name].detach().cpu() for name in self.names}
        wrong = next((name for name, value in weights.items() if not bool(torch.isfinite(value).all())), None)
        if wrong:
            raise self.not_finite(f"the weight {wrong}")
        torch.save(weights, folder / WEIGHTS)
        if self.driver:
            torch.save(self.driver.state(), folder / DRIVER)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        if sharded():
            return  # `train` has put the weights in while they were whole
        load_trained(self.accelerator.unwrap_model(model or self.model), folder)
        if self.driver:
            self.driver.restore(torch.load(folder / DRIVER, weights_only=True))


class _Trainer(Guarded, Trainer):
    """Trainer with what is ours."""


@dataclass(frozen=True)
class Engine:
    """Who runs the loop. trainer: `Guarded` over a Trainer; arguments: the class of its arguments; rows: the training
    rows as it wants them."""

    trainer: Callable[..., Any] = _Trainer
    arguments: Callable[..., Any] = TrainingArguments
    rows: Callable[[Sequence[Any]], Any] = lambda rows: rows


PLAIN = Engine()


def train(
    model: nn.Module,
    rows: Sequence[Example],
    settings: TrainingSettings,
    folder: Path,
    *,
    padding: int,
    seq_len: int,
    seed: int,
    progress: Progress,
    loss: Loss | None = None,
    driver: Driver | None = None,
    batch: Callable[[Sequence[Any]], dict[str, torch.Tensor]] | None = None,
    engine: Engine = PLAIN,
    around: Callable[[Any], None] | None = None,
) -> Training:
    """Train what in `model` requires a gradient on `rows`, in place; goes on from the last checkpoint in `folder`.

    padding: token id that fills up rows. batch: makes a batch of some rows (default: of examples). loss: what is
    minimized (default: the model's own on `labels`). engine: who runs the loop (default: transformers' Trainer).
    around: called before the first step and after the last with the model that all processes compute together. The
    curve has one point per step, or per several in long runs.

    Raises: TrainingFailedError for a loss that is not finite and for memory that ran out, with advice.
    """
    total = total_steps(len(rows), settings)
    resumed = last_checkpoint(folder)
    start, size = time.monotonic(), sum(value.numel() for _, value in trained(model))
    if resumed and sharded():
        load_trained(model, resumed)
    if resumed:
        progress.message(f"training: goes on from the checkpoint of step {resumed.name.rpartition('-')[2]}")
    with progress.step("training", total) as bar:
        watch = _Watch(bar, driver, around=around)
        trainer = engine.trainer(
            model=model,
            args=engine.arguments(**_arguments(settings, folder, total, derive(seed, "training"))),
            train_dataset=engine.rows(rows),
            data_collator=batch or partial(collate, padding=padding),
            callbacks=[watch],
            loss=loss,
            driver=driver,
            watch=watch,
        )
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        try:
            with quiet("transformers", "accelerate"), warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise out_of_memory(error, settings.batch_size, seq_len, last_checkpoint(folder)) from error
    wrong = next((name for name, value in trained(model) if not bool(torch.isfinite(value).all())), None)
    if wrong:
        raise trainer.not_finite(f"the weight {wrong}")
    return Training(
        steps=int(trainer.state.global_step),
        epochs=float(trainer.state.epoch or 0),
        effective_batch=settings.batch_size * settings.accumulation * num_processes(),
        trained_parameters=size,
        resumed_from=int(resumed.name.rpartition("-")[2]) if resumed else None,
        seconds=time.monotonic() - start,
        num_processes=num_processes(),
        curve=[_point(row) for row in trainer.state.log_history if "loss" in row],
    )


def trained(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Name and value of every parameter that requires a gradient, in the model's order."""
    return [(name, value) for name, value in model.named_parameters() if value.requires_grad]


def load_trained(model: nn.Module, checkpoint: Path) -> None:
    """Put the weights of a checkpoint of `train` into the model that it was of."""
    saved = torch.load(checkpoint / WEIGHTS, weights_only=True)
    with torch.no_grad():
        for name, value in trained(model):
            value.copy_(saved[name])


def last_checkpoint(folder: Path) -> Path | None:
    """The latest whole checkpoint in `folder`, or None; those that a kill left half-written are removed."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    whole = [path for path in checkpoints if (path / COMPLETE).is_file()]
    if speaks():
        for path in set(checkpoints) - set(whole):
            shutil.rmtree(path, ignore_errors=True)
    return whole[-1] if whole else None


def total_steps(num_rows: int, settings: TrainingSettings) -> int:
    """Optimizer steps of a run, as Trainer counts them: the last step of an epoch may have fewer batches."""
    if settings.max_steps is not None:
        return settings.max_steps
    batches = math.ceil(num_rows / (settings.batch_size * num_processes()))
    return math.ceil(settings.epochs * max(1, math.ceil(batches / settings.accumulation)))


def _arguments(settings: TrainingSettings, folder: Path, total: int, seed: int) -> dict[str, Any]:
    on_cpu = best_device().type == "cpu"
    half = settings.precision == "bfloat16" or (settings.precision == "auto" and not on_cpu)
    recompute: dict[str, Any] = {}
    if settings.gradient_checkpointing:
        recompute = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    return dict(
        output_dir=str(folder),
        max_steps=total,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule if settings.schedule != "constant" else "constant_with_warmup",
        warmup_steps=math.ceil(settings.warmup_frac * total),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        **recompute,
        bf16=half,
        use_cpu=on_cpu,
        seed=seed,
        save_strategy="steps",
        save_steps=settings.save_every or max(1, math.ceil(total / 10)),
        save_total_limit=2,
        logging_steps=max(1, total // MOST_POINTS),
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=not on_cpu,
        ddp_find_unused_parameters=False if num_processes() > 1 else None,
    )


def _point(row: dict[str, Any]) -> CurvePoint:
    return CurvePoint(
        step=int(row["step"]),
        loss=float(row["loss"]),
        learning_rate=float(row["learning_rate"]),
        gradient_norm=float(row["grad_norm"]) if "grad_norm" in row else None,
    )
