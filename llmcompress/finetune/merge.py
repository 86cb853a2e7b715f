"""The merge stage: adapters into weights, compared with base plus adapter before the folder gets its name.

Merging onto the weights that the adapter was trained on matters for QLoRA: it learned to make up for what NF4 lost, and
on the original weights that correction is an error. Which of the two is closer to the trained model is measured.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.checkpoint.writer import file_digests, give_name, plain_output
from llmcompress.compress.assemble import describe_source
from llmcompress.compress.workspace import Workspace
from llmcompress.console import Progress
from llmcompress.errors import LLMCompressError
from llmcompress.finetune.adapter import CONFIG, WEIGHTS, Adapter
from llmcompress.finetune.merge_target import plan_merge, trained_on
from llmcompress.finetune.merge_writer import check_linears, write_merged
from llmcompress.finetune.retention import measure_merge, peft_check
from llmcompress.finetune.settings import AdapterRef, MergeSettings
from llmcompress.models import meta as skeleton
from llmcompress.report import Check, Merge, MergedAdapter, MergedLinear, RunReport


def merge(
    source: Checkpoint, adapter: Path | None, out: Path, settings: MergeSettings, *, seed: int, key: str,
    report: RunReport, progress: Progress,
) -> RunReport:  # fmt: skip
    """Merge adapters (those of the settings, or the one that the stage before trained) into `source`, as `out`.

    Raises: LLMCompressError for anything a user can mend, and when a linear on disk is not base plus adapter.
    """
    references = settings.adapters or ([AdapterRef(path=str(adapter))] if adapter else [])
    plan = plan_merge(source, references, settings.onto, settings.data)
    source.require_finite()
    report.source = report.source or describe_source(source, skeleton.build(source, quantized=plan.target.plan.stored))
    report.finetune = report.finetune or plan.trained
    workspace = Workspace.open(out, key)
    folder = workspace.final
    try:
        written, digests = write_merged(plan, folder, plan.onto, progress)
        rows = check_linears(plan, folder, progress)
    except LLMCompressError:
        workspace.discard()
        raise
    report.output = plain_output(folder, digests, written)
    report.checks = [_linear_check(rows)]
    report.merge = Merge(
        onto=plan.onto,
        adapters=[_described(adapter, source) for adapter in plan.adapters],
        linears=rows,
        num_nf4_linears=len(plan.target.plan.linears) if plan.onto == "dequantized" else 0,
        replaced_parameters=sorted(name for adapter in plan.adapters for name in adapter.whole),
        data=plan.data.model_dump(mode="json") if plan.data else None,
    )
    if settings.measure:
        report.checks.append(peft_check(plan, folder, seed))
        measure_merge(plan, folder, workspace.folder / "other", report.merge, seed, progress)
    report.save(folder)
    give_name(folder, out)
    workspace.discard()
    return report


def _linear_check(rows: Sequence[MergedLinear]) -> Check:
    worst = max((row.error_over_rounding for row in rows), default=0.0)
    detail = (
        f"outputs of all {len(rows)} merged linears, reopened, equal base plus adapter: the largest difference is "
        f"{worst:.2g} of what rounding to the dtype of the file allows"
    )
    return Check(name="merged linears", passed=worst <= 1, detail=detail)


def _described(adapter: Adapter, source: Checkpoint) -> MergedAdapter:
    trained = trained_on(adapter.folder)
    return MergedAdapter(
        path=str(adapter.folder),
        weight=adapter.weight,
        kind=adapter.kind,
        dora=adapter.dora,
        sha256=file_digests(adapter.folder, [WEIGHTS])[WEIGHTS],
        base_matches=trained.base_identity == source.identity() if trained else None,
    )


def adapter_digest(path: str) -> str:
    """sha256 over an adapter's config and weights, for the key of a stage.

    Raises: LLMCompressError where no adapter lies.
    """
    folder = Adapter.open(path).folder
    return json.dumps(file_digests(folder, [CONFIG, WEIGHTS]), sort_keys=True)
