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
from llmcompress.config.stage import Step, rank, sha256, stage
from llmcompress.files import write_atomic
from llmcompress.report import FOLDER, RunReport, StageRow, environment


def stage_key(previous: str, step: Step, fingerprint: str, seed: int) -> str:
    """The hash that names one piece of work.

    previous: identity or key of what it works on. fingerprint: what the names in its settings stand for.
    """
    parts = [previous, step.name, step.settings.model_dump(mode="json"), sha256(fingerprint), seed, __version__]
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
    write_atomic(folder / FOLDER / "recipe.yaml", as_yaml(report.recipe))
    report.save(folder)


def row_of(report: RunReport, name: str) -> StageRow | None:
    """The row of a stage, or None where it has not run."""
    return next((row for row in report.stages if row.name == name), None)


def made_by(report: RunReport) -> StageRow | None:
    """The row of the last transform: its checkpoint is what checks report on."""
    return next((row for row in reversed(report.stages) if stage(row.name).kind == "transform"), None)


def with_step(recipe: dict[str, Any], step: Step) -> dict[str, Any]:
    """The recipe that made a folder, with a step that was run on it since."""
    settings = {name: values for entry in recipe["stages"] for name, values in entry.items()}
    settings[step.name] = step.settings.model_dump(mode="json")
    return recipe | {"stages": [{name: settings[name]} for name in sorted(settings, key=rank)]}


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
        rows = {earlier.name: earlier for earlier in self._report.stages} | {row.name: row}
        self._report.stages = sorted(rows.values(), key=lambda row: rank(row.name))

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
