"""The verbs that are stages: each is made from the stage's settings, and calls the verb of Python.

    transform    llmcompress NAME MODEL -o OUT --option …        check    llmcompress NAME MODEL --option …

A stage that is added is a verb at once; what a verb has beside its settings is said here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmcompress.api import verbs
from llmcompress.cli.options import COMMON, Argument, Option, Verb, given, settings_options
from llmcompress.config.options import leaves, nested
from llmcompress.config.stage import Stage, stage
from llmcompress.console import console
from llmcompress.distributed import speaks
from llmcompress.errors import LLMCompressError

if TYPE_CHECKING:
    from llmcompress.api.results import Artifact, Rows
    from llmcompress.report import EngineVerdict, RunReport

FAILED = 1
EXAMPLES = {
    "quantize": "llmcompress quantize bundled/tiny -o out/w4 --scheme W4A16 --method gptq",
    "finetune": "llmcompress finetune MODEL -o out/adapter --data rows.jsonl --adapter qlora --rank 16 --epochs 1",
    "merge": "llmcompress merge MODEL out/adapter -o out/merged\n"
    "llmcompress merge MODEL out/a:0.7 out/b:0.3 -o out/small --then quantize --scheme W4A16",
    "distill": "llmcompress distill --teacher MODEL --keep 0.5 -o out/half --data rows.jsonl --loss forward_kl=1",
    "verify": "llmcompress verify out/w4",
    "check": "llmcompress check out/w4 --engine vllm",
    "evaluate": "llmcompress evaluate out/w4 --suite tiny",
    "measure": "llmcompress measure out/w4 --rounds 5",
    "card": "llmcompress card out/w4",
}
MODEL = "Folder, Hub id or bundled/NAME."
OUT = "Folder that llmcompress wrote."


def as_json() -> Option:
    """`--json`."""
    return Option(["as_json", "--json"], is_flag=True, help="The result as JSON on stdout.", group=COMMON)


def common(*names: str, **texts: str) -> list[click.Parameter]:
    """Options that verbs share, by their keywords in Python."""
    described = verbs.HEAD | verbs.HOW | texts
    made: list[click.Parameter] = []
    for name in names:
        flag, text = "--" + name.replace("_", "-"), described[name]
        if name == "seed":
            made.append(Option([name, flag], help=text, group=COMMON, metavar="N", shown=0))
        elif name == "revision":
            made.append(Option([name, flag], help=text, group=COMMON, metavar="REVISION"))
        else:
            made.append(Option([name, flag], is_flag=True, default=None, help=text, group=COMMON))
    return [*made, as_json()]


def verb(name: str) -> Verb:
    """The command of the stage called `name`."""
    kind = stage(name)
    return _transform(kind) if kind.kind == "transform" else _check(kind)


def _transform(kind: Stage) -> Verb:
    """Arguments and options of its own first, where it has some, then the output, the settings, and what all share."""
    own, run = SPECIAL[kind.name](kind) if kind.name in SPECIAL else ([_model()], _make)
    params = [
        *own,
        Option(["out", "-o", "--output"], metavar="OUT", required=True, help="Folder of the result."),
        *settings_options(kind.Settings),
        Option(["overrides", "--set"], metavar="KEY=VALUE", multiple=True, group=COMMON,
               help="Any value of the recipe; repeatable."),
        *common("seed", "revision", "trust_remote_code", "allow_pickle", "overwrite"),
    ]  # fmt: skip

    def callback(as_json: bool, **values: Any) -> int:
        return run(kind, as_json, **given(values))

    example = EXAMPLES.get(kind.name, f"llmcompress {kind.name} MODEL -o OUT")
    return Verb(kind.name, params=params, callback=callback, help=kind.help, example=example)


def _model(text: str = MODEL) -> Argument:
    return Argument(["model"], metavar="MODEL", type=click.Path(), help=text)


def _make(
    kind: Stage,
    as_json: bool,
    model: str,
    out: str,
    overrides: tuple[str, ...] = (),
    then: Sequence[dict[str, Any]] = (),
    **options: Any,
) -> int:
    options["progress"] = console()
    made = verbs.make(kind, model, Path(out), options, then=then, overrides=overrides)
    return show(made if speaks() else None, as_json)


def _finetune(kind: Stage) -> tuple[list[click.Parameter], Callable[..., int]]:
    """`--show-examples N`, which prints what the model would see and trains nothing."""

    def run(kind: Stage, as_json: bool, show_examples: int | None = None, **values: Any) -> int:
        if show_examples is None:
            return _make(kind, as_json, **values)
        return _show_examples(kind, as_json, show_examples, **values)

    shown = "First N examples as the model will see them; nothing is trained."
    examples = Option(
        ["show_examples", "--show-examples"], metavar="N", type=click.IntRange(1), group="Data", help=shown
    )
    return [_model(), examples], run


def _merge(kind: Stage) -> tuple[list[click.Parameter], Callable[..., int]]:
    """`merge MODEL ADAPTER[:WEIGHT]…`, and the options of quantize with `--then quantize`."""
    quantize = stage("quantize")
    later = settings_options(quantize.Settings, leave_out=[leaf.name for leaf in leaves(kind.Settings)])
    for option in later:
        option.group = f"{option.group or 'Layout'}, with --then quantize"

    def run(kind: Stage, as_json: bool, then: str | None = None, **options: Any) -> int:
        asked = {str(option.name): options.pop(str(option.name)) for option in later if option.name in options}
        if then not in (None, "quantize"):
            raise LLMCompressError(f"--then: only quantize can follow, not {then!r}")
        if asked and then is None:
            raise LLMCompressError(f"--{next(iter(asked)).replace('_', '-')}: needs --then quantize")
        steps = [{"quantize": nested(quantize.Settings, asked, "quantize")}] if then else []
        return _make(kind, as_json, then=steps, **options)

    adapters = Argument(["adapters"], metavar="ADAPTER[:WEIGHT]…", nargs=-1, required=True, type=click.Path(),
                        help="Folders of PEFT adapters.")  # fmt: skip
    follow = Option(["then", "--then"], metavar="quantize", help="Quantization of the merged weights.")
    return [_model(), adapters, follow, *later], run


def _distill(kind: Stage) -> tuple[list[click.Parameter], Callable[..., int]]:
    """`distill --teacher MODEL …`: the first is the recipe's model."""

    def run(
        kind: Stage, as_json: bool, teacher: tuple[str, ...], teacher_weight: tuple[float, ...] = (), **options: Any
    ) -> int:
        weights = teacher_weight or (1.0,) * len(teacher)
        if len(weights) != len(teacher):
            raise LLMCompressError(
                f"--teacher-weight: {len(weights)} weights for {len(teacher)} teachers",
                "give one per --teacher, in order",
            )
        others = [{"model": name, "weight": weight} for name, weight in zip(teacher[1:], weights[1:], strict=True)]
        return _make(kind, as_json, teacher[0], weight=weights[0], teachers=others, **options)

    params: list[click.Parameter] = [
        Option(["teacher", "--teacher"], metavar="MODEL", multiple=True, required=True, group="Teachers",
               type=click.Path(), help=f"{MODEL[:-1]}; several are averaged."),
        Option(["teacher_weight", "--teacher-weight"], metavar="W", multiple=True, type=float, group="Teachers",
               help="Weight of each teacher, in their order. [default: 1 each]"),
    ]  # fmt: skip
    return params, run


SPECIAL = {"finetune": _finetune, "merge": _merge, "distill": _distill}
"""Stages whose verbs take more than a model and the settings."""


def _check(kind: Stage) -> Verb:
    keeps = kind.name in verbs.KEPT
    params = [
        _model(text=f"{MODEL[:-1]}; the baseline is known of what llmcompress wrote."),
        *settings_options(kind.Settings),
        *common(*(("seed", "fresh") if keeps else ()), "trust_remote_code", "allow_pickle"),
    ]

    def callback(model: str, as_json: bool, **values: Any) -> int:
        made = verbs.examine(kind, model, given(values) | {"progress": console()})
        if not speaks():
            return 0
        if kind.name == "check":
            print(json.dumps([row.model_dump() for row in made], indent=1) if as_json else verdicts(made))  # type: ignore[union-attr, arg-type]
        else:
            _print_reports([(made.folder, made.report)], as_json)  # type: ignore[list-item]
        return FAILED if kind.failures(made.report) else 0  # type: ignore[arg-type]

    return Verb(kind.name, params=params, callback=callback, help=kind.help, example=EXAMPLES.get(kind.name, ""))


def verdicts(rows: Rows | list[EngineVerdict]) -> str:
    """Each engine's verdict and, below it, what speaks against it."""
    lines = []
    for verdict in rows:
        loads = {True: "loads it", False: "does not load it", None: "not judged"}[verdict.loads]
        needs = f", with {' and '.join(verdict.needs)}" if verdict.needs and verdict.loads else ""
        lines.append(f"{verdict.engine} {verdict.version}: {loads}{needs}")
        lines += [f"  {row.level:<8}{row.rule}: {row.detail}  [{row.source}]" for row in verdict.findings]
    return "\n".join(lines)


def show(artifact: Artifact | None, as_json: bool) -> int:
    """Print what a run made, each layout, and give the exit code."""
    if artifact is None:
        return 0
    made = list(artifact.layouts.values()) or [artifact]
    _print_reports([(layout.folder, layout.report) for layout in made], as_json)
    return FAILED if any(layout.failures for layout in made) else 0


def _print_reports(made: list[tuple[Path, RunReport]], as_json: bool) -> None:
    from llmcompress.pipeline.summary import summary

    if as_json:
        reports = [json.loads(report.model_dump_json()) | {"folder": str(folder)} for folder, report in made]
        print(json.dumps(reports[0] if len(reports) == 1 else reports, indent=1))
    else:
        print("\n\n".join(summary(folder, report) for folder, report in made))


def _show_examples(
    kind: Stage, as_json: bool, count: int, model: str, out: str, overrides: tuple[str, ...] = (), **options: Any
) -> int:
    """Print what the first examples become, without training."""
    from llmcompress.api.models import Named
    from llmcompress.checkpoint.reader import Checkpoint
    from llmcompress.checkpoint.source import load_tokenizer
    from llmcompress.data.examples import load_examples
    from llmcompress.data.preview import as_text, preview

    recipe, _ = verbs.recipe_of(kind, Named(model), Path(out), options, overrides=overrides)
    settings: Any = recipe.stages[0].settings
    checkpoint = Checkpoint.open(
        model, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code, allow_pickle=recipe.allow_pickle
    )
    tokenizer = load_tokenizer(checkpoint)
    rows = load_examples(settings.data, tokenizer, recipe.seed)
    shown = preview(rows.train[:count], tokenizer)
    result = {"examples": shown, "data": json.loads(rows.summary.model_dump_json())}
    print(json.dumps(result, indent=1, ensure_ascii=False) if as_json else as_text(shown))
    return 0
