"""What every verb does alike: run a recipe, print what came of it, and leave with an exit code.

Exit codes: 0 fine, 1 a check or a budget failed, 2 bad input, 130 interrupted. Data goes to stdout, the rest to stderr.
"""

from __future__ import annotations

import errno
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from llmcompress.distributed import leave, speaks
from llmcompress.errors import LLMCompressError

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130


def guarded(verb: Callable[..., int]) -> Callable[..., None]:
    """The verb, leaving with its exit code; a user's mistake is said on stderr, without a traceback."""

    @functools.wraps(verb)
    def run_verb(*args: Any, **kwargs: Any) -> None:
        try:
            code = verb(*args, **kwargs)
            leave()
        except LLMCompressError as error:
            for line in error.lines() if speaks() or error.of_this_process else ():
                print(line if line.startswith("hint: ") else f"error: {line}", file=sys.stderr)
            code = BAD_INPUT
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            print(f"error: {error.filename or 'the output'}: no space left on the disk", file=sys.stderr)
            print("hint: free some; the same command goes on from what was finished", file=sys.stderr)
            code = BAD_INPUT
        except KeyboardInterrupt:
            print(
                "interrupted; the same command goes on from the last layer or stage that was finished", file=sys.stderr
            )
            code = INTERRUPTED
        raise typer.Exit(code)

    return run_verb


def given(settings: dict[str, Any]) -> dict[str, Any]:
    """Without what was not said, so that defaults have one place: the settings' own."""
    return {key: value for key, value in settings.items() if value is not None and value != []}


def local_folder(model: str, trust_remote_code: bool) -> Path:
    """The folder of a checkpoint, fetched from the Hub where it is one of the Hub."""
    from llmcompress.checkpoint.reader import Checkpoint

    return Path(model) if Path(model).is_dir() else Checkpoint.open(model, trust_remote_code=trust_remote_code).folder


def head_of(folder: Path, trust_remote_code: bool = False) -> dict[str, Any]:
    """What a recipe that goes on with a finished folder says beside its stages; consent is the caller's."""
    from llmcompress.config.recipe import HEAD
    from llmcompress.pipeline.run import resumed_recipe

    recipe = resumed_recipe(folder, [{"card": {}}], trust_remote_code=trust_remote_code)
    return {key: value for key, value in recipe.dump().items() if key in HEAD}


def run_stages(recipe: Any, overrides: list[str] | None, as_json: bool, *, judge: bool = True, **how: bool) -> int:
    """Run a recipe (or what one is built from), print what came of it, and give the exit code."""
    from llmcompress.config.recipe import Recipe
    from llmcompress.console import Silent, console
    from llmcompress.pipeline.run import run as run_recipe
    from llmcompress.pipeline.summary import failures, summary

    built = recipe if isinstance(recipe, Recipe) else Recipe.of(recipe, overrides or ())
    reports = run_recipe(built, console() if speaks() else Silent(), **how)
    if not speaks():
        return 0
    if as_json:
        found = [json.loads(report.model_dump_json()) | {"folder": str(folder)} for folder, report in reports.items()]
        print(json.dumps(found[0] if len(found) == 1 else found, indent=1))
    else:
        print("\n\n".join(summary(folder, report) for folder, report in reports.items()))
    return FAILED if judge and any(failures(report) for report in reports.values()) else 0
