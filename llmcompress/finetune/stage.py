"""The finetune stage: a frozen base, an adapter trained on it, and a folder that plain PEFT loads.

    checkpoint ──base.py──> frozen model ──attach──> + adapter ──trainer.py──> OUT/adapter_model.safetensors
    data ──examples.py──> rows ──────────────────────────┘                        adapter_config.json, tokenizer, report

The held-out loss is taken of the base, of the adapter before its first step, and at the end. The folder is written
beside the output, loaded again by PEFT, compared with the model that was trained, and only then renamed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.checkpoint.source import load_tokenizer, side_files
from llmcompress.checkpoint.writer import file_digests, give_name
from llmcompress.compress.assemble import describe_source
from llmcompress.compress.workspace import Workspace
from llmcompress.console import Progress
from llmcompress.data.collate import collate, padding_token
from llmcompress.data.examples import TrainingSet, load_examples
from llmcompress.distributed import num_processes, sharded, speaks
from llmcompress.errors import LLMCompressError
from llmcompress.finetune import lora
from llmcompress.finetune.base import BasePlan, compute_dtype, load_base, own_device, plan_base, targets
from llmcompress.finetune.initialization import first_factors, quantized_weight, require_residual
from llmcompress.finetune.settings import FinetuneSettings
from llmcompress.memory import large_blocks_kept
from llmcompress.models import meta as skeleton
from llmcompress.models.config import max_positions
from llmcompress.models.loading import best_device
from llmcompress.models.vocabulary import check_ids
from llmcompress.report import ADAPTER, Check, Finetune, Output, RunReport, Training
from llmcompress.seed import derive
from llmcompress.training import sharding
from llmcompress.training.failures import TrainingFailedError
from llmcompress.training.heldout import heldout_loss
from llmcompress.training.trainer import (
    DRIVER,
    last_checkpoint,
    load_trained,
    total_steps,
    train,
)

RELOAD_BOUND = 1e-4
"""Largest difference of logits, over their largest size, between the adapter in memory and the one on disk."""
REPACKED = (
    "On processors with AVX512-BF16, bitsandbytes repacks NF4 weights when a layer is evaluated, and PEFT's DoRA reads "
    "the repacked ones wrongly: set support_avx512bf16_for_cpu to False on each Linear4bit before the first forward "
    "pass, or merge the adapter."
)
SHARDED = (
    "Trained with the model sharded over {} processes by FSDP, of which the first held {:.0%} of the parameters' bytes "
    "between steps; read anew to be saved and checked."
)
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


_Losses = tuple[int, float | None, float | None, float | None]
_Trained = tuple[Any, Training, _Losses]
"""The model with its trained adapter; held-out tokens, and losses of the base, before the first step and at the end."""


@dataclass
class _Job:
    """What the steps of one fine-tuning share."""

    source: Checkpoint
    settings: FinetuneSettings
    plan: BasePlan
    rows: TrainingSet
    padding: int
    seed: int
    progress: Progress
    budget: lora.Budget | None
    notes: list[str] = field(default_factory=list)

    def heldout(self, model: Any) -> tuple[float | None, int]:
        """Loss over the held-out rows, None where there are none, and their learned tokens."""
        if not self.rows.heldout:
            return None, 0
        loss, count = heldout_loss(model, self.rows.heldout, self.padding, self.settings.training.batch_size)
        return loss, count


@large_blocks_kept()
def finetune(
    source: Checkpoint, out: Path, settings: FinetuneSettings, *, seed: int, key: str, report: RunReport,
    progress: Progress,
) -> RunReport:  # fmt: skip
    """Train an adapter on `source` into the folder `out`; `key` names this work, so a killed run goes on.

    Raises: LLMCompressError for anything a user can mend; training that failed leaves the adapter of its last good
    checkpoint in a folder that the message names.
    """
    job = _prepare(source, settings, seed, progress)
    source.require_finite()
    report.source = report.source or describe_source(source, skeleton.build(source, quantized=job.plan.stored))
    model = load_base(source, job.plan, settings.training.precision)
    check_ids((token for row in (*job.rows.train, *job.rows.heldout) for token in row.ids), model)
    names = targets(model, settings.target_modules)
    workspace = _workspace(out, key)
    adapted, training, losses = (_train_sharded if sharded() else _train_whole)(job, model, names, workspace, out)
    if speaks():
        report.finetune = _part(job, adapted, training, losses)
        report.checks = [*_budget_check(report.finetune)]
        report.notes += job.notes
        report.notes += [REPACKED] if settings.dora and job.plan.nf4 else []
        _write(job, adapted, workspace, report)
        give_name(workspace.final, out)
        workspace.discard()
    return report


def _train_whole(job: _Job, model: nn.Module, names: Sequence[str], workspace: Workspace, out: Path) -> _Trained:
    """Train with the whole model in every process."""
    base_loss, _ = job.heldout(model)
    adapted = _attach(job, model, names)
    start_loss, _ = job.heldout(adapted)
    training = _train(job, adapted, workspace, out)
    end_loss, count = job.heldout(adapted)
    return adapted, training, (count, base_loss, start_loss, end_loss)


def _train_sharded(job: _Job, model: nn.Module, names: Sequence[str], workspace: Workspace, out: Path) -> _Trained:
    """Train with the model sharded over the processes; held-out losses are taken by all of them together.

    A fresh adapter adds nothing, so the loss before the first step is that of the base.
    """
    dtype = compute_dtype(job.settings.training.precision)
    sharding.view_codes_as(model, dtype, own_device())
    adapted = _attach(job, model, names)
    before, after = sharding.bytes_held(adapted), 0
    losses: list[tuple[float | None, int]] = []

    def around(model: Any) -> None:
        nonlocal after
        after = sharding.bytes_held(model)
        with nullcontext() if losses else lora.muted(model):
            losses.append(job.heldout(model))

    training = _train(job, adapted, workspace, out, around)
    job.notes.append(SHARDED.format(training.num_processes, after / before))
    (base_loss, count), (end_loss, _) = losses
    whole = _whole(job, workspace.folder / "training") if speaks() else adapted
    return whole, training, (count, base_loss, base_loss, end_loss)


def _whole(job: _Job, folder: Path) -> Any:
    """The base read anew with the adapter of the last checkpoint in `folder`."""
    checkpoint = last_checkpoint(folder)
    assert checkpoint is not None, "training ends with a checkpoint"
    model = load_base(job.source, job.plan, job.settings.training.precision)
    adapted = _attach(job, model, targets(model, job.settings.target_modules))
    load_trained(adapted, checkpoint)
    return adapted


def _workspace(out: Path, key: str) -> Workspace:
    """The scratch folder: opened by the process that writes, before the others look into it."""
    if num_processes() == 1:
        return Workspace.open(out, key)
    from accelerate import PartialState

    state = PartialState(cpu=best_device().type == "cpu")
    with state.main_process_first():
        return Workspace.open(out, key)


def _prepare(source: Checkpoint, settings: FinetuneSettings, seed: int, progress: Progress) -> _Job:
    """Everything that can be refused before weights are read."""
    if sharded():
        sharding.require_configuration()
        sharding.require_adapter(settings.adapter, settings.dora, settings.init)
    plan = plan_base(source, settings.base, settings.adapter, settings.double_quant)
    require_residual(plan, settings.init, source.name)
    longest = max_positions(source.config)
    if longest is not None and settings.data.seq_len > longest:
        raise LLMCompressError(
            f"data: seq_len is {settings.data.seq_len}; {source.name} takes at most {longest} positions",
            f"pass --seq-len {longest} or less",
        )
    tokenizer = load_tokenizer(source)
    rows = load_examples(settings.data, tokenizer, seed)
    for bad in rows.summary.rejected:
        progress.message(f"data: {bad.count} rows left out ({bad.reason}), first {bad.locations[0]}")
    padding = padding_token(tokenizer)
    budget = None
    if settings.adapter == "adalora":
        total = total_steps(len(rows.train), settings.training)
        of = settings.adalora
        budget = lora.Budget.of(
            settings.rank, of.initial_rank, of.warmup_frac, of.final_frac, total, of.orthogonality,
            settings.training.accumulation * num_processes(),
        )  # fmt: skip
    return _Job(source, settings, plan, rows, padding, seed, progress, budget)


def _attach(job: _Job, model: nn.Module, names: Sequence[str]) -> Any:
    settings = job.settings
    factors = {}
    if settings.init != "default":
        rows = job.rows.train[: settings.init_rows] if settings.init == "residual" else None
        factors = first_factors(job.source, model, job.plan, names, settings.rank, rows, job.padding, job.progress)
    shape = lora.Shape(settings.rank, _alpha(settings), settings.dropout, settings.dora, settings.rslora)
    adapted = lora.attach(model, names, shape, job.budget, derive(job.seed, "adapter"))
    if factors:
        stored = skeleton.stored_names(skeleton.build(job.source), job.source.stored)
        dense = quantized_weight(job.source, job.plan.scheme)
        lora.put_factors(adapted, factors, lambda name: dense(stored[f"{name}.weight"]))
    return adapted


def _alpha(settings: FinetuneSettings) -> float:
    return settings.alpha if settings.alpha is not None else 2.0 * settings.rank


def _train(
    job: _Job, adapted: Any, workspace: Workspace, out: Path, around: Callable[[Any], None] | None = None
) -> Training:
    driver = lora.AdaLoraDriver(adapted, job.budget) if job.budget else None
    try:
        return train(
            adapted,
            job.rows.train,
            job.settings.training,
            workspace.folder / "training",
            padding=job.padding,
            seq_len=job.settings.data.seq_len,
            seed=job.seed,
            progress=job.progress,
            driver=driver,
            around=around,
        )
    except TrainingFailedError as error:
        if error.checkpoint is None or not speaks():
            raise
        if sharded():
            adapted = _whole(job, error.checkpoint.parent)
        else:
            load_trained(adapted, error.checkpoint)
        if driver:
            driver.restore(torch.load(error.checkpoint / DRIVER, weights_only=True))
        kept = out.parent / f"{out.name}.last-good"
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir(parents=True)
        lora.save(adapted, kept, job.source.hub_id or job.source.name, job.budget)
        raise TrainingFailedError(f"{error.message}; its adapter is in {kept}", error.hint or "") from error


def _part(job: _Job, adapted: Any, training: Training, losses: _Losses) -> Finetune:
    settings, plan = job.settings, job.plan
    count, base, start, end = losses
    return Finetune(
        adapter=settings.adapter,
        base=job.source.name,
        base_identity=job.source.identity(),
        base_weights="stored nf4" if plan.stored else "nf4" if plan.nf4 else "full",
        double_quant=bool(plan.scheme and plan.scheme.grid.double_quant),
        full_precision_linears=plan.kept,
        compute_dtype=str(compute_dtype(settings.training.precision)).removeprefix("torch."),
        init=settings.init,
        rank=settings.rank,
        initial_rank=job.budget.initial if job.budget else None,
        alpha=_alpha(settings),
        dropout=settings.dropout,
        dora=settings.dora,
        rslora=settings.rslora,
        modules=lora.modules(adapted),
        data=job.rows.summary,
        data_path=settings.data.path,
        training=training,
        learning_rate=settings.training.learning_rate,
        heldout_tokens=count,
        heldout_loss_base=base,
        heldout_loss_initial=start,
        heldout_loss=end,
    )


def _budget_check(part: Finetune) -> list[Check]:
    """AdaLoRA: whether ranks fell as far as was asked. Ties in importance may cut a few triplets more, never fewer."""
    if part.adapter != "adalora":
        return []
    average = part.average_rank()
    passed = part.rank - 0.5 <= average <= part.rank
    detail = (
        f"average rank {average:.3f} over {len(part.modules)} linears, target {part.rank}, from {part.initial_rank}"
    )
    return [Check(name="rank budget", passed=passed, detail=detail)]


def _write(job: _Job, adapted: Any, workspace: Workspace, report: RunReport) -> None:
    folder = workspace.final
    folder.mkdir(parents=True)
    lora.save(adapted, folder, job.source.hub_id or job.source.name, job.budget)
    for path in side_files(job.source.folder):
        if path.name != "generation_config.json" and path.suffix != ".py":
            shutil.copyfile(path, folder / path.name)
    report.checks = [*report.checks, _reload_check(job, adapted, folder)]
    sizes = {name: (folder / name).stat().st_size for name in (WEIGHTS, CONFIG)}
    assert report.finetune is not None
    stored = sum(module.rank * sum(module.shape) for module in report.finetune.modules)
    report.output = Output(
        format=ADAPTER,
        files=sizes,
        digests=file_digests(folder, sizes),
        weights_bytes=sizes[WEIGHTS],
        bits_per_weight=8 * sizes[WEIGHTS] / stored,
        bits_per_weight_model=8 * sizes[WEIGHTS] / stored,
        quantized_parameters=0,
        total_parameters=stored,
    )
    report.save(folder)


def _reload_check(job: _Job, adapted: Any, folder: Path) -> Check:
    """The adapter from disk on the same base, by plain PEFT, against the model that was trained."""
    row = (job.rows.heldout or job.rows.train)[0]
    batch = {k: v.to(adapted.device) for k, v in collate([row], job.padding).items() if k != "labels"}
    adapted.eval()
    with torch.no_grad():
        here = adapted(**batch, use_cache=False).logits.float()
        again = lora.load(adapted.unload(), [(folder, 1.0)])
        there = again(**batch, use_cache=False).logits.float()
    difference = float((here - there).abs().max() / here.abs().max())
    detail = (
        f"logits of {len(row.ids)} tokens through PEFT from disk differ by {difference:.2g} of the largest, "
        f"{RELOAD_BOUND:g} allowed"
    )
    return Check(name="reload", passed=difference <= RELOAD_BOUND, detail=detail)
