"""The stages that make checkpoints, one after the other, each into a folder of its own.

    source ──finetune──> .OUT.stages/finetune-KEY ──merge──> .OUT.stages/merge-KEY ──quantize──> OUT
             key 1 = hash(source, settings, data)   key 2 = hash(key 1, settings)    key 3 = hash(key 2, settings)

A key stands for all that lies before it. So a run that was stopped goes on behind the last stage that finished, one
with another last stage works on what is there already, and a finished output needs none of the folders before it.
What earlier stages reported travels along, so that the last report tells the whole story.

fine-tuning makes an adapter, which is no checkpoint; it goes to merge together with the checkpoint it was trained on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcompress.config.recipe import Recipe
from llmcompress.config.stages import MAKERS, Stage
from llmcompress.console import Progress
from llmcompress.distributed import sharded
from llmcompress.errors import LLMCompressError
from llmcompress.pipeline.ledger import Clock, new_report, save, stage_key
from llmcompress.pipeline.output import finished, folders_of, refuse_other_recipe, stage_folder
from llmcompress.report import OF_THE_OUTPUT, RunReport

if TYPE_CHECKING:
    from llmcompress.checkpoint.reader import Checkpoint
    from llmcompress.data.calibration import CalibrationSet


@dataclass(frozen=True)
class Made:
    """What a stage works on: a checkpoint, and the folder of an adapter trained on it that is still to be merged."""

    checkpoint: Checkpoint
    adapter: Path | None = None
    report: RunReport | None = None


@dataclass
class Chain:
    """The makers of one recipe; `open` gives a checkpoint by name, with what the recipe allows."""

    recipe: Recipe
    out: Path
    progress: Progress
    inputs: dict[str, str]
    open: Callable[[str], Checkpoint]

    def run(self, overwrite: bool) -> list[Path]:
        """Make the checkpoint, or one per layout, unless it is there already; returns the folders.

        Raises: LLMCompressError for an output of another recipe, unless `overwrite`, and for what a stage refuses.
        """
        stages = self.recipe.makers()
        self.progress.message(f"reading {self.recipe.model}")
        keys = self._keys(stages)
        last, key = stages[-1], keys[-1]
        folders = _folders(self.out, last)
        if not overwrite:
            refuse_other_recipe(self.out, last.name, key, self.recipe.dump())
            if all(finished(folder, last.name, key) for folder in folders):
                for folder in folders:
                    save(self._kept(last.name, folder), folder)
                self._survival(folders, keys)
                return folders
        made = Made(self.open(self.recipe.model))
        for stage, own in zip(stages, keys, strict=True):
            target = self.out if stage is last else stage_folder(self.out, stage.name, own)
            if stage is last or not finished(target, stage.name, own):
                report = self._make(stage, own, made, target)
            else:
                report = self._kept(stage.name, target)
            made = self._next(made, stage, target, report)
        self._survival(folders, keys)
        return folders

    def help(self, overwrite: bool) -> None:
        """Work along with the process that writes (several of them: torchrun, accelerate launch), and write nothing.

        Raises: LLMCompressError for what the writing process refuses too.
        """
        stages = self.recipe.makers()
        if not stages:
            return
        (stage,), (key,) = stages, self._keys(stages)
        if not overwrite:
            refuse_other_recipe(self.out, stage.name, key, self.recipe.dump())
            if all(finished(folder, stage.name, key) for folder in _folders(self.out, stage)):
                return
        self._call(stage, key, Made(self.open(self.recipe.model)), self.out, new_report(self.recipe))

    def _keys(self, stages: tuple[Stage, ...]) -> list[str]:
        keys, previous = [], self.open(self.recipe.model).identity()
        for stage in stages:
            previous = stage_key(previous, stage, self.inputs[stage.name], self.recipe.seed)
            keys.append(previous)
        return keys

    def _make(self, stage: Stage, key: str, made: Made, target: Path) -> RunReport:
        """Run one stage.

        Its row is written before the work: a stage saves the report inside the folder that it renames last of all, so
        a report that can be seen is of a stage that is done.
        """
        report = _carried(new_report(self.recipe), made.report)
        clock = Clock(report, stage.name, key)
        clock.put("done")
        with clock:
            self._call(stage, key, made, target, report)
        for folder in _folders(target, stage):
            written = RunReport.load(folder)
            written.stages = list(report.stages)
            save(written, folder)
        return RunReport.load(_folders(target, stage)[0])

    def _call(self, stage: Stage, key: str, made: Made, target: Path, report: RunReport) -> None:
        settings: Any = stage.settings
        how: Any = {"seed": self.recipe.seed, "key": key, "report": report, "progress": self.progress}
        if stage.name == "finetune":
            from llmcompress.finetune.stage import finetune

            finetune(made.checkpoint, target, settings, **how)
        elif stage.name == "merge":
            from llmcompress.finetune.merge import merge

            merge(made.checkpoint, made.adapter, target, settings, **how)
        elif stage.name == "distill":
            from llmcompress.distill.stage import distill

            distill(made.checkpoint, target, settings, open=self.open, **how)
        else:
            from llmcompress.compress.layerwise import quantize

            text = self._own_text(settings, made)
            quantize(made.checkpoint, target, settings, calibration=text, **how)

    def _own_text(self, settings: Any, made: Made) -> CalibrationSet | None:
        """What a model was trained on in this run, for a quantization that names no other text."""
        from llmcompress.checkpoint.tokenizer import load_tokenizer
        from llmcompress.compress.methods.base import METHODS
        from llmcompress.data.settings import DataSettings
        from llmcompress.data.training_text import training_calibration

        if settings.calibration is not None or not METHODS.get(settings.method).needs_hessian:
            return None
        found = next((one.settings for one in self.recipe.makers() if hasattr(one.settings, "training")), None)
        data = getattr(found, "data", None)
        if data is None and made.report and made.report.merge and made.report.merge.data:
            data = DataSettings.model_validate(made.report.merge.data)
        if data is None:
            return None
        tokenizer = load_tokenizer(made.checkpoint)
        return training_calibration(data, tokenizer, self.recipe.seed, settings.num_samples, settings.seq_len)

    def _survival(self, folders: list[Path], keys: list[str]) -> None:
        """What quantizing left of a merged adapter: taken once, for the first layout, and put into every report."""
        stages = self.recipe.makers()
        settings = {stage.name: stage.settings for stage in stages}
        names = [stage.name for stage in stages]
        if names[-2:] != ["merge", "quantize"] or not getattr(settings["merge"], "survival", False):
            return
        merged_key, key = keys[-2:]
        merged = stage_folder(self.out, "merge", merged_key)
        if RunReport.load(folders[0]).survival is not None or not merged.is_dir():
            return
        survival = self._measured(settings, merged, folders[0], key)
        for folder in folders:
            report = RunReport.load(folder)
            report.survival = survival
            save(report, folder)

    def _measured(self, settings: dict[str, Any], merged: Path, out: Path, key: str) -> Any:
        from llmcompress.compress.layerwise import quantize
        from llmcompress.console import Silent
        from llmcompress.finetune.measure import measure_survival
        from llmcompress.finetune.merge import plan_merge
        from llmcompress.finetune.settings import AdapterRef

        part = RunReport.load(merged).merge
        assert part is not None, "a merged checkpoint without its part of the report"
        before = self.recipe.makers()[:-2]
        source = self.recipe.model
        if [stage.name for stage in before] not in ([], ["finetune"]):
            index = max(i for i, stage in enumerate(before) if stage.name != "finetune")
            source = str(stage_folder(self.out, before[index].name, self._keys(self.recipe.makers())[index]))
        references = [AdapterRef(path=one.path, weight=one.weight) for one in part.adapters]
        plan = plan_merge(self.open(source), references, part.onto, settings["merge"].data)
        alone = settings["quantize"].model_copy(update={"format": settings["quantize"].formats()[:1]})
        made = Made(self.open(str(merged)), None, RunReport.load(merged))
        text = self._own_text(alone, made)

        def again(checkpoint: Checkpoint, folder: Path) -> None:
            report, seed = new_report(self.recipe), self.recipe.seed
            quantize(checkpoint, folder, alone, calibration=text, seed=seed, key=key, report=report, progress=Silent())

        scratch = stage_folder(self.out, "survival", key)
        return measure_survival(plan, made.checkpoint, out, scratch, again, self.recipe.seed, self.progress)

    def _next(self, made: Made, stage: Stage, target: Path, report: RunReport) -> Made:
        if stage.name == "finetune":
            return Made(made.checkpoint, target, report)
        return Made(self.open(str(target)), None, report) if target != self.out else made

    def _kept(self, stage: str, folder: Path) -> RunReport:
        """The report of work that an earlier run did, with its stages marked so."""
        self.progress.message(f"{stage}: done before, kept")
        report = RunReport.load(folder)
        for row in report.stages:
            row.status = "reused" if row.name in MAKERS else row.status
        return report


def refuse_several_makers(stages: tuple[Stage, ...]) -> None:
    """With several processes a recipe makes one checkpoint: the stages after it would read what one of them writes.

    Raises: LLMCompressError; for distillation spread by FSDP too, where teachers and projections stay whole.
    """
    if sharded() and any(stage.name == "distill" for stage in stages):
        raise LLMCompressError(
            "distill: is not spread over processes by FSDP", "use data parallelism (accelerate launch --multi_gpu)"
        )
    if len(stages) > 1:
        names = ", ".join(stage.name for stage in stages)
        raise LLMCompressError(
            f"{names}: {len(stages)} stages that make a checkpoint, in several processes",
            "run each as a recipe of its own; only one of them at a time runs in several processes",
        )


def _folders(target: Path, stage: Stage) -> list[Path]:
    """Where a stage puts its checkpoints: quantize may write several layouts."""
    formats = getattr(stage.settings, "formats", None)
    return folders_of(target, formats() if formats else [""])


def _carried(report: RunReport, before: RunReport | None) -> RunReport:
    """`report` with everything that the stages before have said, except of the checkpoint that they wrote."""
    if before is None:
        return report
    said = {name: getattr(before, name) for name in RunReport.model_fields if name not in OF_THE_OUTPUT}
    return report.model_copy(update=said | {"stages": [row for row in before.stages if row.name in MAKERS]})
