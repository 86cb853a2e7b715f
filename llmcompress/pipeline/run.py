"""Run a recipe: its steps in order, each done once, and the report written down whatever happens.

    source ──finetune──> .OUT.stages/finetune-KEY ──merge──> .OUT.stages/merge-KEY ──quantize──> OUT
             key 1 = hash(source, settings, data)   key 2 = hash(key 1, settings)    key 3 = hash(key 2, settings)
                                                                          then in OUT: verify, check, evaluate, card

A key names one piece of work: a hash of what it works on, its settings, the content of the files they name, and our
version. So a run that was stopped goes on behind the last step that finished (and quantize itself behind the last
layer), one with another last step works on what is there already, and a finished output needs none of the folders
before it. What earlier transforms reported travels along, so that the last report tells the whole story. Checks follow
the checkpoint they report on, not the checks before them.

A transform that makes an adapter (finetune) makes no checkpoint; the adapter goes to the next one together with the
checkpoint it was trained on. Where a transform writes several layouts, each has a folder, OUT/gptq and so on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from llmcompress.config.recipe import Recipe
from llmcompress.config.stage import Context, Finished, FollowUp, Step, Work, stage
from llmcompress.console import Progress, Silent
from llmcompress.distributed import num_processes, sharded, speaks
from llmcompress.errors import LLMCompressError, collected, raise_all
from llmcompress.memory import large_blocks_kept
from llmcompress.pipeline.ledger import Clock, made_by, new_report, row_of, save, stage_key, with_step
from llmcompress.pipeline.output import (
    claimed,
    finished,
    refuse_foreign,
    refuse_other_recipe,
    refuse_overlap,
    stage_folder,
)
from llmcompress.report import OF_THE_OUTPUT, RunReport

if TYPE_CHECKING:
    from llmcompress.checkpoint.reader import Checkpoint


def run(
    recipe: Recipe, progress: Progress, *, overwrite: bool = False, fresh: bool = False, record: bool = True
) -> dict[Path, RunReport]:
    """Run every step of `recipe`; the report of the output folder, or of each where there are several.

    Of several processes that work together only the first writes; the others give nothing back.

    overwrite: replace an output that another recipe made. fresh: run checks again even where the report has them.
    record: write report, samples and recipe into the folder (False for a checkpoint that is not ours).

    Raises: LLMCompressError for anything a user can mend. A step that fails is a row of the report where there is one.
    """
    if not speaks():
        return _run(recipe, Path(recipe.output), progress, overwrite, fresh, record)
    with claimed(recipe.output, write=record) as out:
        return _run(recipe, out, progress, overwrite, fresh, record)


def _run(
    recipe: Recipe, out: Path, progress: Progress, overwrite: bool, fresh: bool, record: bool
) -> dict[Path, RunReport]:
    """`run` on the folder that the output stands for."""
    if recipe.transforms():
        refuse_foreign(out)
    elif not out.is_dir():
        raise LLMCompressError(f"{out}: no such folder", "without a step that makes it, it must be a checkpoint")
    pipeline = Pipeline(recipe, out, progress)
    if recipe.transforms():
        refuse_overlap(out, pipeline.open(recipe.model).folder)
    pipeline.look_up_names()
    if num_processes() > 1:
        refuse_several_transforms(recipe.transforms())
    if not speaks():  # checks are run by one process
        pipeline.assist(overwrite)
        return {}
    folders = pipeline.transform(overwrite) if recipe.transforms() else [out]
    return {folder: pipeline.check(folder, fresh=fresh, record=record) for folder in folders}


@dataclass
class Pipeline:
    """One run of a recipe into `out`.

    fingerprints: of each step, by its name. opened: checkpoints by name, so that an identity is taken once.
    """

    recipe: Recipe
    out: Path
    progress: Progress
    fingerprints: dict[str, str] = field(default_factory=dict)
    opened: dict[str, Checkpoint] = field(default_factory=dict)

    def open(self, name: str) -> Checkpoint:
        """A checkpoint by name, with what the recipe consents to."""
        from llmcompress.checkpoint.reader import Checkpoint

        if name not in self.opened:
            self.opened[name] = Checkpoint.open(
                name,
                revision=self.recipe.revision if name == self.recipe.model else None,
                trust_remote_code=self.recipe.trust_remote_code,
                allow_pickle=self.recipe.allow_pickle,
            )
            for note in self.opened[name].notes:
                self.progress.message(note)
        return self.opened[name]

    def look_up_names(self) -> None:
        """Look up every name in the settings before any work.

        Raises: LLMCompressError, one for each method, layout, calibration set, text or suite that is unknown or broken.
        """
        problems: list[LLMCompressError] = []
        for index, step in enumerate(self.recipe.stages):
            with collected(problems):
                context = Context(self.recipe.model, self.open, self.recipe.stages[:index])
                self.fingerprints[step.name] = step.stage.fingerprint(step.settings, context)
        raise_all(problems)

    def transform(self, overwrite: bool) -> list[Path]:
        """Make the checkpoint, or one per layout, unless it is there already; returns the folders.

        Raises: LLMCompressError for an output of another recipe, unless `overwrite`, and for what a step refuses.
        """
        steps = self.recipe.transforms()
        self.progress.message(f"reading {self.recipe.model}")
        keys = self._keys(steps)
        last, key = steps[-1], keys[-1]
        folders = last.stage.outputs(last.settings, self.out)
        if not overwrite:
            refuse_other_recipe(self.out, last, key, self.recipe.dump())
            if all(finished(folder, last.name, key) for folder in folders):
                for folder in folders:
                    save(self._reused(last, folder), folder)
                done = [self._finished(step, key) for step, key in zip(steps, keys, strict=True)]
                self._follow_up(done)
                return folders
        done = []
        source, adapter = self.open(self.recipe.model), None
        for step, key in zip(steps, keys, strict=True):
            target = self._folder(step, key)
            if step is last or not finished(target, step.name, key):
                self._make(step, key, self._work(step, key, source, adapter, target, done))
                done.append(self._finished(step, key))
            else:
                done.append(Finished(step, key, (target,), self._reused(step, target)))
            if step.stage.makes_adapter:
                adapter = target
            elif step is not last:
                source, adapter = self.open(str(target)), None
        self._follow_up(done)
        return folders

    def assist(self, overwrite: bool) -> None:
        """Work along with the process that writes (several of them: torchrun, accelerate launch), and write nothing.

        Raises: LLMCompressError for what the writing process refuses too.
        """
        if not self.recipe.transforms():
            return
        (step,) = self.recipe.transforms()
        (key,) = self._keys((step,))
        if not overwrite:
            refuse_other_recipe(self.out, step, key, self.recipe.dump())
            if all(finished(folder, step.name, key) for folder in step.stage.outputs(step.settings, self.out)):
                return
        step.stage.run(step.settings, self._work(step, key, self.open(self.recipe.model), None, self.out, []))

    @large_blocks_kept()
    def check(self, folder: Path, *, fresh: bool, record: bool) -> RunReport:
        """Every check of the recipe, on one output folder."""
        report = RunReport.load(folder) if record else new_report(self.recipe)
        for step in self.recipe.checks():
            made = made_by(report)
            key = stage_key(made.key if made else "", step, self.fingerprints[step.name], self.recipe.seed)
            report.recipe = with_step(report.recipe, step)
            row = row_of(report, step.name)
            if row and row.key == key and row.status != "failed" and not step.stage.always and not fresh:
                row.status = "reused"
                self.progress.message(f"{step.name}: done before, kept")
            else:
                with Clock(report, step.name, key, folder if record else None):
                    work = self._work(step, key, self.open(self.recipe.model), None, folder, [])
                    work.report, work.record = report, record
                    step.stage.run(step.settings, work)
            if record:
                save(report, folder)
        return report

    def _keys(self, steps: Sequence[Step]) -> list[str]:
        keys, previous = [], self.open(self.recipe.model).identity()
        for step in steps:
            previous = stage_key(previous, step, self.fingerprints[step.name], self.recipe.seed)
            keys.append(previous)
        return keys

    def _folder(self, step: Step, key: str) -> Path:
        return self.out if step is self.recipe.transforms()[-1] else stage_folder(self.out, step.name, key)

    def _finished(self, step: Step, key: str) -> Finished:
        """A transform whose output is there, or was: an earlier folder may be gone once the last one is finished."""
        folders = step.stage.outputs(step.settings, self._folder(step, key))
        report = RunReport.load(folders[0]) if folders[0].is_dir() else new_report(self.recipe)
        return Finished(step, key, tuple(folders), report)

    def _work(
        self, step: Step, key: str, checkpoint: Checkpoint, adapter: Path | None, out: Path, before: list[Finished]
    ) -> Work:
        report = new_report(self.recipe)
        if before:  # all that the transforms before have reported, except of the checkpoint that they wrote
            last = before[-1].report
            report = report.model_copy(
                update={name: getattr(last, name) for name in RunReport.model_fields if name not in OF_THE_OUTPUT}
                | {"stages": [row for row in last.stages if stage(row.name).kind == "transform"]}
            )
        report.notes = list(dict.fromkeys([*report.notes, *checkpoint.notes]))
        return Work(
            checkpoint, out, report, key, self.recipe.seed, self.progress, self.open, adapter, tuple(before),
            trust_remote_code=self.recipe.trust_remote_code, allow_pickle=self.recipe.allow_pickle,
        )  # fmt: skip

    def _make(self, step: Step, key: str, work: Work) -> None:
        """Run one transform.

        Its row is written before the work: a stage saves the report inside the folder that it renames last of all, so
        a report that can be seen is of a step that is done.
        """
        clock = Clock(work.report, step.name, key)
        clock.put("done")
        with clock:
            step.stage.run(step.settings, work)
        for folder in step.stage.outputs(step.settings, work.out):
            written = RunReport.load(folder)
            written.stages = list(work.report.stages)
            save(written, folder)

    def _follow_up(self, done: list[Finished]) -> None:
        """Let the last transform but one look at what the last made of its checkpoint; see `Stage.follow_up`."""
        if len(done) < 2:
            return
        *before, mine, later = done
        checkpoints = [earlier for earlier in before if not earlier.step.stage.makes_adapter]
        source = str(checkpoints[-1].folders[0]) if checkpoints else self.recipe.model

        def again(checkpoint: Checkpoint, folder: Path) -> None:
            step = Step(later.step.stage, later.step.stage.one_output(later.step.settings))
            work = self._work(step, later.key, checkpoint, None, folder, [*before, mine])
            work.report, work.progress = new_report(self.recipe), Silent()
            step.stage.run(step.settings, work)

        scratch = stage_folder(self.out, "follow-up", later.key)
        mine.step.stage.follow_up(
            mine.step.settings,
            FollowUp(source, mine, later, again, scratch, self.recipe.seed, self.progress, self.open, save),
        )

    def _reused(self, step: Step, folder: Path) -> RunReport:
        """The report of work that an earlier run did, with its transforms marked so."""
        self.progress.message(f"{step.name}: done before, kept")
        report = RunReport.load(folder)
        for row in report.stages:
            row.status = "reused" if stage(row.name).kind == "transform" else row.status
        return report


def refuse_several_transforms(steps: Sequence[Step]) -> None:
    """With several processes a recipe makes one checkpoint: the steps after it would read what one of them writes.

    Raises: LLMCompressError; for distillation sharded by FSDP too, where teachers and projections stay whole.
    """
    if sharded() and any(step.name == "distill" for step in steps):
        raise LLMCompressError(
            "distill: is not spread over processes by FSDP", "use data parallelism (accelerate launch --multi_gpu)"
        )
    if len(steps) > 1:
        names = ", ".join(step.name for step in steps)
        raise LLMCompressError(
            f"{names}: {len(steps)} stages that make a checkpoint, in several processes",
            "run each as a recipe of its own; only one of them at a time runs in several processes",
        )


def resumed_recipe(
    folder: Path, steps: Sequence[dict[str, object]], *, trust_remote_code: bool = False, allow_pickle: bool = False
) -> Recipe:
    """The recipe of further steps on a folder of ours: model, revision and seed are those that its report records.

    Consent is the caller's: a report that was made with `trust_remote_code` is refused without it.
    """
    from llmcompress.config.recipe import HEAD, consent_missing

    recorded = RunReport.load(folder).recipe
    given = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
    raise_all(consent_missing(recorded, given, f"{folder}: the recipe in its report"))
    head = {key: value for key, value in recorded.items() if key in HEAD} | given | {"output": str(folder)}
    return Recipe.of(head | {"stages": list(steps)})
