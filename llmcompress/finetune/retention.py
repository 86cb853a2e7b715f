"""Retention: what merging and quantizing kept of an adapter, measured against the model that was trained.

    base + adapter, by PEFT, as trained ──┬──KL on held-out rows──> merged onto the NF4 values
                                          ├──────────────────────> merged onto the original weights
                                          ├──────────────────────> merged and quantized
                                          └──────────────────────> merged and merely rounded

and, linear by linear, how much of the update D the codes kept. Quantizing W + D moves a weight by less than half a step
or to another code; what matters is not the size of that noise but what of it points along D:

    kept = <Q(W + D) - Q(W), D> / <D, D>        1: all of it on average, 0: rounding swallowed it

Q(W) is the same quantization, with the same text, of the weights without the adapter. Where D is far below a step, luck
decides that figure: of one linear it may be -2 or +3. Its standard deviation, were each weight rounded on its own, is
sqrt(sum (Q(W + D) - Q(W) - kept D)^2 D^2) / <D, D>, and beyond `report.merge.MAX_NOISE` a card shows no projection.

What counts is the loss on the held-out rows, of base, base + adapter, merged and this very file, over the same tokens:

    gain kept = (loss of base - loss of file) / (loss of base - loss of base + adapter)
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.checkpoint.source import load_tokenizer
from llmcompress.compress.dequantized import load_dequantized
from llmcompress.compress.methods.base import METHODS
from llmcompress.console import Progress, Silent
from llmcompress.data.collate import Example, padding_token
from llmcompress.data.examples import load_examples
from llmcompress.data.settings import DataSettings
from llmcompress.errors import LLMCompressError, third_party
from llmcompress.finetune import lora
from llmcompress.finetune.base import BasePlan, load_base
from llmcompress.finetune.merge_target import MergePlan, plan_merge
from llmcompress.finetune.merge_writer import write_merged
from llmcompress.finetune.settings import AdapterRef
from llmcompress.finetune.update import merged_weight
from llmcompress.formats.base import FORMATS
from llmcompress.formats.roundtrip import row_scheme, unpack_row
from llmcompress.models.blocks import put_weight_OI
from llmcompress.models.vocabulary import num_embeddings
from llmcompress.report import AdapterRetention, Check, LinearRetention, LinearRow, Merge, RunReport
from llmcompress.training.heldout import heldout_kl, ratio_interval, row_losses

BATCH = 4
LOGITS_BOUND = 0.01
"""Rounding to bfloat16 gives about 1e-4 of this figure, another model about 1."""
Quantize = Callable[[Checkpoint, Path], None]
"""The quantization of the run, of another checkpoint into another folder."""


def measure_merge(plan: MergePlan, merged: Path, scratch: Path, part: Merge, seed: int, progress: Progress) -> None:
    """Fill in both ways' KL. `merged`: the checkpoint just written; `scratch`: where the other way is written to."""
    try:
        rows, padding = heldout_rows(plan, seed)
        trained = trained_model(plan)
    except LLMCompressError as error:
        part.not_measured = error.message
        return
    both = plan.target.plan.nf4 and not plan.target.plan.stored
    ways = ("dequantized", "original") if both else (plan.onto,)
    kl: dict[str, float] = {}
    with progress.step("comparing with base plus adapter", len(ways)) as bar:
        for way in ways:
            folder = merged if way == plan.onto else scratch
            if folder == scratch:
                shutil.rmtree(scratch, ignore_errors=True)
                write_merged(plan, scratch, way, Silent())
            model = load_base(Checkpoint.open(folder), BasePlan(False))
            kl[way], part.heldout_tokens = heldout_kl(trained, model, rows, padding, BATCH)
            del model
            bar.advance(1, f"onto {way}")
    shutil.rmtree(scratch, ignore_errors=True)
    part.kl_dequantized, part.kl_original = kl.get("dequantized"), kl.get("original")
    if both:
        part.closer = "dequantized" if kl["dequantized"] <= kl["original"] else "original"
    else:
        part.not_measured = "the base was not quantized on the fly, so there is one way to merge"


def peft_check(plan: MergePlan, merged: Path, seed: int) -> Check:
    """Logits of the whole merged model against those of PEFT on the base, on tokens drawn at random.

    Linears are compared one by one while they are merged; this sees what no linear shows: a tie, a replaced embedding,
    a name that was taken for another. Only for a base in full precision, where both are the same model up to rounding.
    """
    name = "merged logits"
    if plan.target.plan.nf4:
        return Check(name=name, passed=True, ran=False, detail="the base was NF4; the measured KL speaks of that")
    generator = torch.Generator().manual_seed(seed)
    try:
        with third_party("the two cannot be compared"):
            logits: list[torch.Tensor] = []
            for make in (lambda: trained_model(plan), lambda: load_base(Checkpoint.open(merged), BasePlan(False))):
                model: Any = make()
                if not logits:
                    tokens_BS = torch.randint(num_embeddings(model), (2, 32), generator=generator)
                with torch.inference_mode():
                    found = model(input_ids=tokens_BS.to(model.device), use_cache=False).logits.double().cpu()
                logits.append(found - found.mean(-1, keepdim=True))
                del model
    except LLMCompressError as error:
        return Check(name=name, passed=True, ran=False, detail=error.message)
    expected, found = logits
    same = expected.shape == found.shape
    distance = float((found - expected).square().sum() / expected.square().sum()) if same else float("inf")
    detail = (
        f"squared distance from the logits of base plus adapter by PEFT, over their own size: {distance:.2g} (bound "
        f"{LOGITS_BOUND:g}), on {tokens_BS.numel()} tokens"
    )
    return Check(name=name, passed=distance <= LOGITS_BOUND, detail=detail)


def heldout_rows(plan: MergePlan, seed: int) -> tuple[list[Example], int]:
    """The held-out rows of the training (or of the data that was named), and the padding token.

    Raises: LLMCompressError where there are none.
    """
    if plan.data is None:
        raise LLMCompressError("no rows to measure on: the training data is not known or not there", "pass --data")
    tokenizer = load_tokenizer(plan.target.source)
    examples = load_examples(plan.data, tokenizer, seed)
    rows = examples.heldout or examples.train
    return rows, padding_token(tokenizer)


def trained_model(plan: MergePlan) -> Any:
    """The base as it was in training with the adapters on it, computed by PEFT.

    Raises: LLMCompressError for a mix of adapters that PEFT does not hold at once.
    """
    if len({adapter.kind for adapter in plan.adapters}) > 1:
        raise LLMCompressError("LoRA and AdaLoRA together are not held by one PEFT model, so there is no reference")
    base = load_base(plan.target.source, plan.target.plan)
    return lora.load(base, [(adapter.folder, adapter.weight) for adapter in plan.adapters])


def measure_retention(
    source: Checkpoint, merged: Checkpoint, quantized: Path, data: DataSettings | None, quantize: Quantize,
    scratch: Path, seed: int, progress: Progress,
) -> AdapterRetention:  # fmt: skip
    """How much of the adapters that were merged into `source` the checkpoint in `quantized` kept.

    merged: the checkpoint that was quantized, whose report names adapters, weights and data. data: rows to measure on
    in the place of those. quantize: the same quantization, called once for the weights without the adapters, which are
    written below `scratch`; that folder is removed at the end.

    Raises: LLMCompressError for an adapter that is gone, and when that quantization fails.
    """
    part = RunReport.load(merged.folder).merge
    if part is None:
        raise LLMCompressError(f"{merged.name}: its report tells of no merge, so it is not known what to measure")
    references = [AdapterRef(path=adapter.path, weight=adapter.weight) for adapter in part.adapters]
    plan = plan_merge(source, references, part.onto, data)
    base = _base_without_adapter(plan, scratch)
    progress.message("quantizing the weights without the adapter, to see what of it is left")
    quantize(base, scratch / "quantized")
    report, before_report = RunReport.load(quantized), RunReport.load(scratch / "quantized")
    after, before = Checkpoint.open(quantized), Checkpoint.open(scratch / "quantized")
    layouts = [FORMATS.get(made.output.format) for made in (report, before_report) if made.output]
    before_rows = {row.name: row for row in before_report.linears}
    linears: list[LinearRetention] = []
    kept_sum = kept_rtn_sum = size_sum = 0.0
    rounded: dict[str, torch.Tensor] = {}
    for row, delta_OI in _updates(plan, report):
        linear = plan.target.linears[row.name]
        kept_OI = unpack_row(after, row, layouts[0]).dequantize()
        kept_OI -= unpack_row(before, before_rows[row.name], layouts[1]).dequantize()
        with_OI = _rounded(plan.weight(linear, plan.onto), row)
        without_OI = _rounded(plan.target.dense(linear, plan.onto == "dequantized"), row)
        size = float((delta_OI * delta_OI).sum()) or 1.0
        kept = float((kept_OI.double() * delta_OI).sum())
        rest_OI = (kept_OI.double() - kept / size * delta_OI) * delta_OI
        kept_rtn = float(((with_OI - without_OI).double() * delta_OI).sum())
        noise = float(torch.linalg.norm(rest_OI)) / size
        linears.append(
            LinearRetention(name=row.name, kept=kept / size, kept_rtn=kept_rtn / size, noise=noise, size=size)
        )
        kept_sum, kept_rtn_sum, size_sum = kept_sum + kept, kept_rtn_sum + kept_rtn, size_sum + size
        rounded[row.name] = with_OI
    measured = _heldout(plan, merged, quantized, report, rounded, seed)
    shutil.rmtree(scratch, ignore_errors=True)
    linears = [linear.model_copy(update={"size": linear.size / size_sum}) for linear in linears]
    return AdapterRetention(linears=linears, kept=kept_sum / size_sum, kept_rtn=kept_rtn_sum / size_sum, **measured)


def _base_without_adapter(plan: MergePlan, scratch: Path) -> Checkpoint:
    if plan.onto == "original" and not plan.target.plan.stored:
        return plan.target.source
    shutil.rmtree(scratch, ignore_errors=True)
    write_merged(plan, scratch / "base", plan.onto, Silent(), without_updates=True)
    return Checkpoint.open(scratch / "base")


def _updates(plan: MergePlan, report: RunReport) -> Iterator[tuple[LinearRow, torch.Tensor]]:
    """Every quantized linear that an update went into, with W' - W in float64."""
    for row in report.linears:
        if row.outcome == "skipped" or not any(row.name in adapter.parts for adapter in plan.adapters):
            continue
        base_OI = plan.target.dense(plan.target.linears[row.name], plan.onto == "dequantized")
        yield row, merged_weight(base_OI, plan.updates(row.name)) - base_OI.double()


def _rounded(weight_OI: torch.Tensor, row: LinearRow) -> torch.Tensor:
    """The weight by plain rounding on the grid of a row, [O, I] float32."""
    rtn = METHODS.get("rtn")
    return rtn.solve(weight_OI.float().contiguous(), None, row_scheme(row), torch.float32, rtn.settings()).dequantize()


def _heldout(
    plan: MergePlan, merged: Checkpoint, out: Path, report: RunReport, rounded: dict[str, torch.Tensor], seed: int
) -> dict[str, Any]:
    """Of the held-out rows, by the report's names: KL from the trained model to the quantized one and to plain rounding
    of the same linears, and the loss of base, base plus adapter, merged and quantized."""
    try:
        rows, padding = heldout_rows(plan, seed)
        trained = trained_model(plan)
    except LLMCompressError:
        return {"kl": None, "kl_rtn": None, "heldout_tokens": 0}
    model: nn.Module = load_dequantized(out).to(trained.device)
    kl, count = heldout_kl(trained, model, rows, padding, BATCH)
    losses = _losses(trained, merged, model, rows, padding)
    for row in report.linears:
        if row.outcome == "skipped":
            continue
        module = model.get_submodule(row.name)
        if row.name in rounded:
            dense_OI = rounded[row.name]
        else:
            linear = plan.target.linears[row.name]
            value = merged.tensor(linear.tensor)
            dense_OI = _rounded(value.t() if linear.transposed else value, row)
        put_weight_OI(module, dense_OI.to(trained.device))
    kl_rtn, _ = heldout_kl(trained, model, rows, padding, BATCH)
    return {"kl": kl, "kl_rtn": kl_rtn, "heldout_tokens": count} | losses


def _losses(trained: Any, merged: Checkpoint, quantized: Any, rows: list[Example], padding: int) -> dict[str, Any]:
    """The loss of all four models on the same rows, and how much of the adapter's gain the quantized one has."""
    with trained.disable_adapter():
        base_N, counts_N = row_losses(trained, rows, padding, BATCH)
    adapter_N, _ = row_losses(trained, rows, padding, BATCH)
    quantized_N, _ = row_losses(quantized, rows, padding, BATCH)
    plain = load_base(merged, BasePlan(False))
    merged_N, _ = row_losses(plain, rows, padding, BATCH)
    del plain
    count, gain = int(counts_N.sum()), float((base_N - adapter_N).sum())
    if not count:
        return {}
    interval = ratio_interval(base_N - quantized_N, base_N - adapter_N) if gain > 0 else None
    return {
        "num_rows": len(rows),
        "loss_tokens": count,
        "loss_base": float(base_N.sum()) / count,
        "loss_adapter": float(adapter_N.sum()) / count,
        "loss_merged": float(merged_N.sum()) / count,
        "loss_quantized": float(quantized_N.sum()) / count,
        "gain_kept": float((base_N - quantized_N).sum()) / gain if interval else None,
        "gain_kept_interval": interval,
    }
