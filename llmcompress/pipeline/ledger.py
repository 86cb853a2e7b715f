"""What a run writes down: a row per stage with its time and outcome, and the report of each folder."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from llmcompress import __version__
from llmcompress.config.recipe import Recipe, as_yaml
from llmcompress.config.stages import EVIDENCE, MAKERS, Stage
from llmcompress.pipeline.inputs import sha256
from llmcompress.report import FOLDER, RunReport, StageRow, environment


def stage_key(previous: str, stage: Stage, inputs: str, seed: int) -> str:
    """The hash that names one piece of work.

    previous: identity or key of what it works on. inputs: digest of the files that its settings name.
    """
    parts = [previous, stage.name, stage.settings.model_dump(mode="json"), inputs, seed, __version__]
    return sha256(json.dumps(parts, sort_keys=True))


def new_report(recipe: Recipe) -> RunReport:
    """An empty report on a run of `recipe`, here and now."""
    return RunReport(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        recipe=recipe.dump(),
        seed=recipe.seed,
        environment=environment.describe(),
    )


def save(report: RunReport, folder: Path) -> None:
    """Write the report of an output folder, and beside it the recipe that it holds."""
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    (folder / FOLDER / "recipe.yaml").write_text(as_yaml(report.recipe), encoding="utf-8")
    report.save(folder)


def row_of(report: RunReport, stage: str) -> StageRow | None:
    """The row of a stage, or None where it has not run."""
    return next((row for row in report.stages if row.name == stage), None)


def made_by(report: RunReport) -> StageRow | None:
    """The row of the last stage that made a checkpoint, which is what evidence is taken of."""
    return next((row for row in reversed(report.stages) if row.name in MAKERS), None)


def with_stage(recipe: dict[str, Any], stage: Stage) -> dict[str, Any]:
    """The recipe that made a folder, with a stage that was run on it since."""
    stages = {name: values for one in recipe["stages"] for name, values in one.items()}
    stages[stage.name] = stage.settings.model_dump(mode="json")
    return recipe | {"stages": [{name: stages[name]} for name in sorted(stages, key=rank)]}


def rank(stage: str) -> int:
    """Where a stage stands: makers first, in the order they came in, then evidence in its own order."""
    return list(EVIDENCE).index(stage) + 1 if stage in EVIDENCE else 0


class Clock:
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
        self._report.stages = sorted(rows.values(), key=lambda one: rank(one.name))

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
