"""Run a recipe: its stages in order, each done once, with the evidence written down whatever happens.

    recipe ──> is the output ours, are all names known? ──> makers ────┬─> OUT          or one folder per layout:
               (before any work)                          (makers.py)  └─> OUT/gptq, OUT/compressed_tensors
                                                             then in each: verify ─> evaluate ─> card

A stage has a key: a hash of what it works on, its settings, the content of the files they name, and our version. A
stage that the folder's report has under the same key is not run again, so a run that was killed continues behind the
last stage that finished (and quantize itself behind the last layer). Evidence follows the checkpoint it is taken of,
not the evidence before it. The card is cheap and says what the report says, so it is always drawn anew.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcompress.config.recipe import Recipe
from llmcompress.config.stages import EVIDENCE, Stage
from llmcompress.console import Progress
from llmcompress.distributed import num_processes, speaks
from llmcompress.errors import LLMCompressError
from llmcompress.memory import large_blocks_kept
from llmcompress.pipeline.inputs import input_digests
from llmcompress.pipeline.ledger import Clock, made_by, new_report, row_of, save, stage_key, with_stage
from llmcompress.pipeline.output import refuse_foreign, refuse_overlap
from llmcompress.pipeline.transforms import Chain, refuse_several_makers
from llmcompress.report import FOLDER, RunReport

if TYPE_CHECKING:
    from llmcompress.checkpoint.reader import Checkpoint


def run(
    recipe: Recipe, progress: Progress, *, overwrite: bool = False, fresh: bool = False, record: bool = True
) -> dict[Path, RunReport]:
    """Run every stage of `recipe`; the report of the output folder, or of each where there are several.

    Of several processes that work together only the first writes; the others give nothing back.

    overwrite: replace an output that another recipe made. fresh: take evidence again even where the report has it.
    record: write report, samples and recipe into the folder (False for a checkpoint that is not ours).

    Raises: LLMCompressError for anything a user can mend. A stage that fails is a row of the report where there is one.
    """
    out = Path(recipe.output)
    makes = bool(recipe.makers())
    if makes:
        refuse_foreign(out)
    elif not out.is_dir():
        raise LLMCompressError(f"{out}: no such folder", "without a quantize stage the output must be a checkpoint")
    job = _Job(recipe, progress, fresh, record)
    if makes:
        refuse_overlap(out, job.source.folder)
    job.inputs = input_digests(recipe)
    chain = Chain(recipe, out, progress, job.inputs, job.open)
    if num_processes() > 1:
        refuse_several_makers(recipe.makers())
    if not speaks():  # evidence is taken by one process
        chain.help(overwrite)
        return {}
    folders = chain.run(overwrite) if makes else [out]
    return {folder: job.evidence(folder) for folder in folders}


@dataclass
class _Job:
    """What the stages of one run share."""

    recipe: Recipe
    progress: Progress
    fresh: bool
    record: bool
    inputs: dict[str, str] = field(default_factory=dict)
    opened: dict[str, Checkpoint] = field(default_factory=dict)

    @property
    def source(self) -> Checkpoint:
        """The recipe's model."""
        return self.open(self.recipe.model)

    def open(self, name: str) -> Checkpoint:
        """A checkpoint, with what the recipe allows; opened once, so that its identity is taken once."""
        from llmcompress.checkpoint.reader import Checkpoint

        if name not in self.opened:
            self.opened[name] = Checkpoint.open(
                name,
                revision=self.recipe.revision if name == self.recipe.model else None,
                trust_remote_code=self.recipe.trust_remote_code,
                allow_pickle=self.recipe.allow_pickle,
            )
        return self.opened[name]

    @large_blocks_kept()
    def evidence(self, folder: Path) -> RunReport:
        """Every stage after those that make the checkpoint, on one output folder."""
        report = RunReport.load(folder) if self.record else new_report(self.recipe)
        for stage in self.recipe.stages:
            if stage.name not in EVIDENCE:
                continue
            key = self._evidence_key(stage, report)
            report.recipe = with_stage(report.recipe, stage)
            row = row_of(report, stage.name)
            if row and row.key == key and row.status != "failed" and stage.name != "card" and not self.fresh:
                row.status = "reused"
                self.progress.message(f"{stage.name}: done before, kept")
            else:
                with Clock(report, stage.name, key, folder if self.record else None):
                    self._take(stage, folder, report)
            if self.record:
                save(report, folder)
        return report

    def _evidence_key(self, stage: Stage, report: RunReport) -> str:
        made = made_by(report)
        baseline = getattr(stage.settings, "baseline", None)
        inputs = self.inputs[stage.name] + (self.open(baseline).identity() if baseline else "")
        return stage_key(made.key if made else "", stage, inputs, self.recipe.seed)

    def _take(self, stage: Stage, folder: Path, report: RunReport) -> None:
        settings: Any = stage.settings
        if stage.name == "verify":
            from llmcompress.verify.stage import verify

            report.checks = verify(folder, settings, progress=self.progress)
        elif stage.name == "check":
            from llmcompress.verify.check import check

            found = {one.engine: one for one in [*report.engines, *check(self.open(str(folder)), settings)]}
            report.engines = [found[name] for name in sorted(found)]
        elif stage.name == "evaluate":
            from llmcompress.evaluate.stage import evaluate

            evaluation = evaluate(
                folder,
                self.open(settings.baseline or self.recipe.model),
                settings,
                seed=self.recipe.seed,
                progress=self.progress,
                samples_dir=folder / FOLDER / "samples" if self.record else None,
            )
            others = [one for one in report.evaluations if one.suite != evaluation.suite]
            report.evaluations = [*others, evaluation]
        elif stage.name == "measure":
            from llmcompress.evaluate.speed import measure

            baseline = self.open(settings.baseline or self.recipe.model)
            report.speed = measure(folder, baseline, settings, progress=self.progress)
        else:
            from llmcompress.card.build import write_card

            save(report, folder)
            write_card(folder)
