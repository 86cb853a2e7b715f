"""Whether an output folder may be written: ours or not, finished or not, this recipe's or another's.

    OUT                   a checkpoint, its report in OUT/llmcompress/report.json
    OUT/LAYOUT            one such folder per layout, where a recipe asks for several
    .OUT.stages/STAGE-KEY what the stages before the last one made, kept for the next run
    .OUT.partial .OUT.old what a run under way, or a killed one, has beside it; .OUT.lock: the process that writes

Nothing that we did not write is ever replaced; what another recipe wrote is replaced only when the user says so.
"""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmcompress.checkpoint.writer import refuse_strangers, result_folders, set_aside, unfinished
from llmcompress.config.stage import Step, stage
from llmcompress.errors import LLMCompressError
from llmcompress.report import FOLDER, RunReport, is_ours

MAX_NAME_BYTES = 200
"""Of an output: `.NAME.partial` and the like lie beside it."""


def stage_folder(out: Path, name: str, key: str) -> Path:
    """Where a stage that is not the last one writes; the name holds the key, so other work goes elsewhere."""
    return out.parent / f".{out.name}.stages" / f"{name}-{key[:16]}"


@contextmanager
def claimed(output: str | Path, *, write: bool = True) -> Iterator[Path]:
    """The folder that `output` stands for, held by this process alone until the block ends.

    A link is followed: the result goes where it leads, and the link stays. A result that a killed run had set aside is
    put back, and what killed runs left beside a finished output, and beside the steps before it, goes when the block
    ends without an error. The lock is a file beside the output; the system drops it with the process.

    write: False for a run that only reads the folder, which needs no lock.

    Raises: LLMCompressError when another process holds it, or `output` cannot become a folder of ours.
    """
    out = _real(Path(output))
    if not write:
        yield out
        return
    with _locked(out):
        if set_aside(out).is_dir() and not out.exists():
            os.replace(set_aside(out), out)
        yield out
        if is_ours(out) or any(is_ours(folder) for folder in out.glob("*")):
            name, steps = glob.escape(out.name), out.parent / f".{out.name}.stages"
            for left in (
                set_aside(out),
                unfinished(out),
                *out.parent.glob(f".{name}.distill-*"),
                *(path for ending in ("partial", "old", "distill-*") for path in steps.glob(f".*.{ending}")),
            ):
                shutil.rmtree(left, ignore_errors=True)


def _real(output: Path) -> Path:
    """`output` with its links followed, where it can be made or replaced.

    Raises: LLMCompressError.
    """
    if output.is_symlink() and not output.exists():
        raise LLMCompressError(f"{output}: is a link to nothing", "make the folder that it names, or remove the link")
    out = output.resolve() if output.is_symlink() else output
    here = Path.cwd()
    if out.resolve() == here or out.resolve() in here.parents:
        raise LLMCompressError(f"{output}: is the working directory, or around it", "choose a folder inside it")
    if len(out.name.encode()) > MAX_NAME_BYTES:
        raise LLMCompressError(f"{output}: its name is longer than {MAX_NAME_BYTES} bytes", "choose a shorter one")
    around = next(folder for folder in out.absolute().parents if folder.exists())
    if not around.is_dir():
        raise LLMCompressError(f"{output}: {around} is a file", "choose another output")
    return out


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold `.OUT.lock`, or a file inside where only OUT itself can be written; another holder is named."""
    path = out.with_name(f".{out.name}.lock")
    if out.is_dir() and not os.access(out.parent, os.W_OK):
        path = out / FOLDER / ".lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise LLMCompressError(
            f"{out}: cannot be written ({error.strerror})", "choose an output in a folder of yours"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(20).strip()
            raise LLMCompressError(
                f"another process (pid {holder if holder.isdecimal() else 'unknown'}) is writing {out}",
                "wait for it, or choose another output",
            ) from None
        if not path.exists() or os.fstat(file.fileno()).st_ino != path.stat().st_ino:
            raise LLMCompressError(f"another process has just written {out}", "run the same command again")
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def refuse_foreign(out: Path) -> None:
    """Let only a free name, an empty folder or an output of ours pass, with nothing in it that others put there.

    Raises: LLMCompressError.
    """
    if out.exists() and not out.is_dir():
        raise LLMCompressError(f"{out}: is a file; the output is a folder", "choose another output")
    if out.is_dir() and any(out.iterdir()):
        if not result_folders(out):
            raise LLMCompressError(f"{out}: exists and was not written by llmcompress", "choose another output")
        refuse_strangers(out)


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
