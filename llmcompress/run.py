"""Run a recipe: its stages in order, each done once, with the evidence written down whatever happens.

    recipe ──> is the output ours, are all names known? ──> quantize ──┬─> OUT          or one folder per layout:
               (before any work)                                       └─> OUT/gptq, OUT/compressed_tensors
                                                             then in each: verify ─> evaluate ─> card

A stage has a key: a hash of what it works on, its settings, the content of the files they name, and our version. A
stage that the folder's report has under the same key is not run again, so a run that was killed continues behind the
last stage that finished (and quantize itself behind the last layer). Evidence follows the checkpoint it is taken of,
not the evidence before it. The card is cheap and says what the report says, so it is always drawn anew.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from llmcompress import __version__, environment
from llmcompress.errors import LLMCompressError
from llmcompress.inputs import input_digests, sha256
from llmcompress.launched import speaks
from llmcompress.output import finished, folders_of, refuse_foreign, refuse_other_recipe, refuse_overlap
from llmcompress.progress import Progress
from llmcompress.recipe import Recipe, as_yaml
from llmcompress.report import FOLDER, RunReport, StageRow
from llmcompress.stages import STAGES, Stage

if TYPE_CHECKING:
    from llmcompress.checkpoint.reader import Checkpoint


def run(
    recipe: Recipe, progress: Progress, *, overwrite: bool = False, fresh: bool = False, record: bool = True
) -> dict[Path, RunReport]:
    """Run every stage of `recipe`; the report of the output folder, or of each where there are several.

    overwrite: replace an output that another recipe made. fresh: take evidence again even where the report has it.
    record: write report, samples and recipe into the folder (False for a checkpoint that is not ours).

    Raises: LLMCompressError for anything a user can mend. A stage that fails is a row of the report where there is one.
    """
    out = Path(recipe.output)
    stage = recipe.stage("quantize")
    if stage is not None:
        refuse_foreign(out)
    elif not out.is_dir():
        raise LLMCompressError(f"{out}: no such folder", "without a quantize stage the output must be a checkpoint")
    job = _Job(recipe, progress, fresh, record)
    if stage is not None:
        refuse_overlap(out, job.source.folder)
    job.inputs = input_digests(recipe)
    folders = job.quantize(stage, out, overwrite) if stage else [out]
    if not speaks():  # evidence is taken by one process
        return {}
    return {folder: job.evidence(folder) for folder in folders}


def stage_key(previous: str, stage: Stage, inputs: str, seed: int) -> str:
    """The hash that names one piece of work.

    previous: identity or key of what it works on. inputs: digest of the files that its settings name.
    """
    parts = [previous, stage.name, stage.settings.model_dump(mode="json"), inputs, seed, __version__]
    return sha256(json.dumps(parts, sort_keys=True))


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

    def quantize(self, stage: Stage, out: Path, overwrite: bool) -> list[Path]:
        """Make the checkpoint, or one per layout, unless it is there already; returns the folders.

        Its row is written before the work: quantize saves the report inside the folder that it renames last of all, so
        a report that can be seen is of a stage that is done.
        """
        from llmcompress.quantize.stage import quantize

        settings: Any = stage.settings
        folders = folders_of(out, settings.formats())
        self.progress.message(f"reading {self.recipe.model}")
        key = stage_key(self.source.identity(), stage, self.inputs[stage.name], self.recipe.seed)
        if not overwrite:
            refuse_other_recipe(out, key, self.recipe.dump())
            if all(finished(folder, stage.name, key) for folder in folders):
                if speaks():
                    self._keep(stage.name, folders)
                return folders
        report = self._new_report()
        clock = _Clock(report, stage.name, key)
        clock.put("done")
        with clock:
            quantize(self.source, out, settings, seed=self.recipe.seed, key=key, report=report, progress=self.progress)
        for folder in folders if speaks() else ():
            made = RunReport.load(folder)
            made.stages = list(report.stages)
            save(made, folder)
        return folders

    def _keep(self, stage: str, folders: list[Path]) -> None:
        self.progress.message(f"{stage}: done before, kept")
        for folder in folders:
            report = RunReport.load(folder)
            for row in report.stages:
                row.status = "reused" if row.name == stage else row.status
            save(report, folder)

    def evidence(self, folder: Path) -> RunReport:
        """Every stage after quantize, on one output folder."""
        report = RunReport.load(folder) if self.record else self._new_report()
        for stage in self.recipe.stages:
            if stage.name == "quantize":
                continue
            key = self._evidence_key(stage, report)
            report.recipe = _with_stage(report.recipe, stage)
            row = _row(report, stage.name)
            if row and row.key == key and row.status != "failed" and stage.name != "card" and not self.fresh:
                row.status = "reused"
                self.progress.message(f"{stage.name}: done before, kept")
            else:
                with _Clock(report, stage.name, key, folder if self.record else None):
                    self._take(stage, folder, report)
            if self.record:
                save(report, folder)
        return report

    def _evidence_key(self, stage: Stage, report: RunReport) -> str:
        made = _row(report, "quantize")
        baseline = getattr(stage.settings, "baseline", None)
        inputs = self.inputs[stage.name] + (self.open(baseline).identity() if baseline else "")
        return stage_key(made.key if made else "", stage, inputs, self.recipe.seed)

    def _take(self, stage: Stage, folder: Path, report: RunReport) -> None:
        settings: Any = stage.settings
        if stage.name == "verify":
            from llmcompress.verify.stage import verify

            report.checks = verify(folder, settings, progress=self.progress)
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
        else:
            from llmcompress.card.build import write_card

            save(report, folder)
            write_card(folder)

    def _new_report(self) -> RunReport:
        return RunReport(
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            recipe=self.recipe.dump(),
            seed=self.recipe.seed,
            environment=environment.describe(),
        )


def save(report: RunReport, folder: Path) -> None:
    """Write the report of an output folder, and beside it the recipe that it holds."""
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    (folder / FOLDER / "recipe.yaml").write_text(as_yaml(report.recipe), encoding="utf-8")
    report.save(folder)


class _Clock:
    """Times a stage and keeps its row, one per stage; on an error the row says so and the report is saved at once."""

    def __init__(self, report: RunReport, stage: str, key: str, folder: Path | None = None) -> None:
        self._report, self._stage, self._key, self._folder = report, stage, key, folder
        self._began = time.monotonic()

    def put(self, status: Literal["done", "failed"], error: str | None = None) -> None:
        """The stage's row, in the place of an earlier one."""
        row = StageRow(
            name=self._stage,
            key=self._key,
            status=status,
            seconds=time.monotonic() - self._began,
            peak_memory_bytes=environment.peak_memory_bytes(),
            error=error,
        )
        rows = {one.name: one for one in self._report.stages} | {row.name: row}
        self._report.stages = [rows[name] for name in STAGES if name in rows]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.put("done")
            return
        self.put(
            "failed", "interrupted" if isinstance(error, KeyboardInterrupt) else f"{error}" or type(error).__name__
        )
        if self._folder is not None:
            save(self._report, self._folder)


def _row(report: RunReport, stage: str) -> StageRow | None:
    return next((row for row in report.stages if row.name == stage), None)


def _with_stage(recipe: dict[str, Any], stage: Stage) -> dict[str, Any]:
    """The recipe that made a folder, with a stage that was run on it since."""
    stages = {name: values for one in recipe["stages"] for name, values in one.items()}
    stages[stage.name] = stage.settings.model_dump(mode="json")
    return recipe | {"stages": [{name: stages[name]} for name in STAGES if name in stages]}
