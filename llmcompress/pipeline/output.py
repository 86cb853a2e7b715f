"""Whether an output folder may be written: ours or not, finished or not, this recipe's or another's.

    OUT                   a checkpoint, its report in OUT/llmcompress/report.json
    OUT/LAYOUT            one such folder per layout, where a recipe asks for several
    .OUT.stages/STAGE-KEY what the stages before the last one made, kept for the next run

Nothing that we did not write is ever replaced; what another recipe wrote is replaced only when the user says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmcompress.config.stage import Step, stage
from llmcompress.errors import LLMCompressError
from llmcompress.report import RunReport, is_ours


def stage_folder(out: Path, name: str, key: str) -> Path:
    """Where a stage that is not the last one writes; the name holds the key, so other work goes elsewhere."""
    return out.parent / f".{out.name}.stages" / f"{name}-{key[:16]}"


def refuse_foreign(out: Path) -> None:
    """Let only a free name, an empty folder or an output of ours pass.

    Raises: LLMCompressError.
    """
    if out.exists() and not out.is_dir():
        raise LLMCompressError(f"{out}: is a file; the output is a folder", "choose another output")
    if out.is_dir() and not is_ours(out) and not all(is_ours(entry) for entry in out.iterdir()):
        raise LLMCompressError(f"{out}: exists and was not written by llmcompress", "choose another output")


def refuse_overlap(out: Path, source: Path) -> None:
    """Keep a run from replacing what it reads.

    Raises: LLMCompressError when the output is the source, around it or inside it.
    """
    there, here = out.resolve(), source.resolve()
    if there == here or there in here.parents or here in there.parents:
        raise LLMCompressError(f"{out}: overlaps the source {source}", "choose another output")


def refuse_other_recipe(out: Path, step: Step, key: str, recipe: dict[str, Any]) -> None:
    """Let pass what the same work (`key` of `step`, the last that makes a checkpoint) wrote, or nothing at all.

    Raises: LLMCompressError that says what differs.
    """
    for folder in [out, *(sorted(out.iterdir()) if out.is_dir() else [])]:
        if not is_ours(folder):
            continue
        report = RunReport.load(folder)
        if not any((row.name, row.key) == (step.name, key) for row in report.stages):
            text = "training data" if step.stage.trains else "calibration text"
            changed = ", ".join(_differences(report.recipe, recipe)) or f"the source, the {text} or our version"
            raise LLMCompressError(
                f"{folder}: holds the result of another recipe (different: {changed})",
                "choose another output, or pass --overwrite to replace it",
            )


def finished(folder: Path, name: str, key: str) -> bool:
    """Whether `folder` holds the work `key` of the stage `name`, with every file of the checkpoint in its size."""
    if not is_ours(folder):
        return False
    report = RunReport.load(folder)
    if not any((row.name, row.key) == (name, key) and row.status != "failed" for row in report.stages):
        return False
    files = report.output.files if report.output else {}
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in files.items())


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The keys in which two recipes ask for different checkpoints."""
    old, new = _flat(before), _flat(now)
    return sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))


def _flat(recipe: dict[str, Any]) -> dict[str, Any]:
    head = {key: value for key, value in recipe.items() if key not in ("stages", "output")}
    steps = [item for entry in recipe.get("stages", []) for item in entry.items()]
    made = {name: values for name, values in steps if stage(name).kind == "transform"}
    return head | {f"{name}.{key}": value for name, values in made.items() for key, value in values.items()}
