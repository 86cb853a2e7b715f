"""The verbs that are stages, for Python: one recipe built and run for each, as on the command line.

    quantize(model, "OUT", scheme="W4A16")     [quantize, verify, check, card]   ──> Artifact
    verify("OUT"), evaluate("OUT", suite=…)    [verify, card], [evaluate, card]  ──> Rows

A verb's keywords are those of its settings, and so are its signature and its help: a stage that is added is a verb here
at once. A call changes nothing in the process: random states, logging and the allocator are as before.
"""

from __future__ import annotations

import inspect
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcompress.api.models import Named, named, text
from llmcompress.api.results import Artifact, Rows
from llmcompress.config.options import leaves, nested
from llmcompress.config.recipe import Recipe
from llmcompress.config.stage import Stage, stage
from llmcompress.console import Progress, watched
from llmcompress.errors import LLMCompressError, unknown

if TYPE_CHECKING:
    from llmcompress.api.models import Model
    from llmcompress.report import RunReport

HEAD = {
    "seed": "Random seed.",
    "revision": "Commit, tag or branch of a Hub id.",
    "trust_remote_code": "Consent to run code that comes with the checkpoint.",
    "allow_pickle": "Consent to read pickle weights, which can run code.",
}
"""Keywords of every verb that are keys of its recipe."""
HOW = {
    "overwrite": "Replace what another recipe wrote to the output.",
    "fresh": "Run checks again that the report has already.",
    "progress": "True, False or a `Progress`. [default: where a person watches]",
    "tokenizer": "Tokenizer of a loaded model. [default: the one at its name_or_path]",
}


KEPT = ("evaluate",)
"""Checks that are not run again where the report has their rows, unless `fresh` says so: they take long."""


@cache
def verb(name: str) -> Callable[..., Any]:
    """The Python verb of the stage called `name`."""
    kind = stage(name)

    def transform(model: Model, out: str | Path, **options: Any) -> Artifact:
        return make(kind, model, Path(out), options)

    def check(model: Model, **options: Any) -> Rows | Artifact:
        return examine(kind, model, options)

    function: Callable[..., Any] = transform if kind.kind == "transform" else check
    positional = list(inspect.signature(function).parameters.values())[:-1]
    options = {leaf.name: leaf.field.get_default(call_default_factory=True) for leaf in leaves(kind.Settings)}
    keywords = [
        inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, default=default)
        for option, default in {**options, **dict.fromkeys(HEAD | HOW)}.items()
    ]
    function.__signature__ = inspect.Signature([*positional, *keywords])  # type: ignore[attr-defined]
    function.__name__ = function.__qualname__ = name
    described = {leaf.name: leaf.field.description for leaf in leaves(kind.Settings)} | HEAD | HOW
    lines = [f"    {option}: {said}" for option, said in described.items()]
    gives = "an `Artifact`" if kind.kind == "transform" or kind.always else "`Rows` of the report"
    function.__doc__ = f"{kind.help}\n\nReturns {gives}. Raises: LLMCompressError.\n\nKeywords:\n" + "\n".join(lines)
    return function


def make(
    kind: Stage,
    model: Model,
    out: Path,
    options: Mapping[str, Any],
    *,
    then: Sequence[Mapping[str, Any]] = (),
    overrides: Sequence[str] = (),
) -> Artifact:
    """Run a transform on `model`, and the checks that follow it.

    then: further transforms, as a recipe has them. overrides: `key=value` on the recipe. A process that only helps
    another comes back with what that one wrote.
    """
    with named(model, options.get("tokenizer")) as source:
        recipe, how = recipe_of(kind, source, out, options, then=then, overrides=overrides)
        reports = execute(recipe, **how)
        return Artifact.of({folder: _renamed(source, folder, report) for folder, report in reports.items()}, out)


def recipe_of(
    kind: Stage,
    source: Named,
    out: Path,
    options: Mapping[str, Any],
    *,
    then: Sequence[Mapping[str, Any]] = (),
    overrides: Sequence[str] = (),
) -> tuple[Recipe, dict[str, Any]]:
    """The recipe that a transform's verb stands for, and how it is to be run.

    Raises: LLMCompressError, all problems together.
    """
    head, how, settings = _sorted(kind, options)
    head = ({"revision": source.revision} if source.revision else {}) | head
    follow = ["verify", "card"] if kind.makes_adapter and not then else ["verify", "check", "card"]
    stages: list[Mapping[str, Any]] = [{kind.name: settings}, *then, *({name: {}} for name in follow)]
    return Recipe.of({"model": source.name, "output": str(out), **head, "stages": stages}, overrides), how


def examine(kind: Stage, model: Model, options: Mapping[str, Any]) -> Rows | Artifact:
    """Run a check on a checkpoint: rows of its part of the report, or the artifact where it has none (the card).

    On a folder of ours the report and the card are brought up to date; of another checkpoint nothing is written.
    """
    from llmcompress.checkpoint.reader import Checkpoint
    from llmcompress.pipeline.run import resumed_recipe
    from llmcompress.report import is_ours

    head, how, settings = _sorted(kind, options)
    consents = {key: head[key] for key in ("trust_remote_code", "allow_pickle") if key in head}
    with named(model, options.get("tokenizer")) as source:
        folder = Path(source.name)
        if is_ours(folder):
            steps: list[dict[str, Any]] = [{kind.name: settings}] + ([] if kind.always else [{"card": {}}])
            recipe = resumed_recipe(folder, steps, **consents)
            recipe = Recipe.of(recipe.dump() | {key: head[key] for key in ("seed",) if key in head})
        else:
            baseline = settings.get("baseline")
            if "baseline" in kind.Settings.model_fields and baseline is None:
                raise LLMCompressError(
                    f"{source.name}: was not made by llmcompress, so its source is not known",
                    "pass --baseline (baseline= in Python)",
                )
            if not folder.is_dir():
                revision = head.pop("revision", source.revision)
                folder = Checkpoint.open(source.name, revision=revision, **consents).folder
            place = {"model": baseline or str(folder), "output": str(folder)}
            recipe, how = Recipe.of(place | head | {"stages": [{kind.name: settings}]}), how | {"record": False}
        how = {"fresh": kind.name not in KEPT} | how
        report = execute(recipe, **how).get(Path(recipe.output))
    if report is None:
        return Rows([], folder=folder)
    rows = kind.rows(recipe.stages[0].settings, report)
    if rows is None:
        return Artifact(folder, report, {})
    return Rows(rows, folder=folder, report=report, failures=kind.failures(report))


def execute(recipe: Recipe, *, progress: Progress | bool | None = None, **how: bool) -> dict[Path, RunReport]:
    """Run a recipe: the report of each output folder, none in a process that only helps."""
    from llmcompress.pipeline.run import run

    with random_states_kept():
        return run(recipe, watched(progress), **how)


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Python's, NumPy's and torch's global generators as they were, after the with block: trainers seed them."""
    state = random.getstate()
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    numpy_state = numpy.random.get_state() if numpy else None
    torch_state = torch.random.get_rng_state() if torch else None
    cuda_states = torch.cuda.get_rng_state_all() if torch and torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(state)
        if numpy:
            numpy.random.set_state(numpy_state)
        if torch:
            torch.random.set_rng_state(torch_state)
            if cuda_states is not None:
                torch.cuda.set_rng_state_all(cuda_states)


def _sorted(kind: Stage, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Options as keys of the recipe, ways of running it, and settings of the stage.

    Raises: LLMCompressError, all problems together, for an option that does not exist.
    """
    known = {leaf.name for leaf in leaves(kind.Settings)} | kind.Settings.model_fields.keys()
    rest = {key: value for key, value in options.items() if key in HEAD | HOW and key not in known}
    own = {key: text(value) for key, value in options.items() if key not in rest}
    for key in own:
        if key not in known:
            raise unknown("option", key, {*known, *HEAD, *HOW}, kind.name)
    head = {key: value for key, value in rest.items() if key in HEAD and value is not None}
    how = {key: value for key, value in rest.items() if key in HOW and key != "tokenizer" and value is not None}
    return head, how, nested(kind.Settings, own, kind.name)


def _renamed(source: Named, folder: Path, report: RunReport) -> RunReport:
    """The report, and what lies in the folder, naming a loaded model by its own name, not by the folder it was in."""
    if source.alias is None or report.source is None:
        return report
    from llmcompress.card.build import write_card
    from llmcompress.pipeline.ledger import save

    report.source.name = report.recipe["model"] = source.alias
    save(report, folder)
    write_card(folder)
    return report
