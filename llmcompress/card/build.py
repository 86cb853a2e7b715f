"""The model card: `report.json` in, `README.md` and its figures out.

    report.json ─> public ─┬─> metadata ───────────> front matter ─┐
                           ├─> view ─> card.md.j2 ─> body ─────────┼─> README.md
                           └─> figures ────────────────────────────┘   llmcompress/figures/*.png

Nothing else is read and nothing is measured here, so the same report gives the same bytes on any machine.
"""

from __future__ import annotations

import json
import re
import shlex
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from llmcompress.card import markdown, view
from llmcompress.card.figures import draw_errors, draw_scores, draw_training
from llmcompress.card.metadata import as_text, front_matter, problems
from llmcompress.card.public import last_part, public
from llmcompress.errors import LLMCompressError, raise_all, third_party
from llmcompress.files import write_atomic
from llmcompress.report import FOLDER, RunReport, numerals

if TYPE_CHECKING:
    import jinja2

CARD = "README.md"
FIGURES = {name: f"{FOLDER}/figures/{name}.png" for name in ("scores", "errors", "training")}
_FENCE = re.compile(r"(^(`{3,})[^\n]*\n.*?^\2$)", flags=re.M | re.S)


def write_card(folder: Path) -> Path:
    """Draw `folder`/README.md and its figures from the report in `folder`; returns the card's path.

    Raises: LLMCompressError when there is no report of this version, or it holds metadata that the Hub refuses.
    """
    report = RunReport.load(folder)
    with third_party(f"{folder}: no card can be drawn from its report"):
        return _written(folder, public(report))


def _written(folder: Path, report: RunReport) -> Path:
    front = front_matter(report)
    raise_all([LLMCompressError(f"{folder}: front matter of its card: {problem}") for problem in problems(front)])
    trained = report.distillation or report.finetune
    drawn = {
        "scores": draw_scores(report.evaluations, folder / FIGURES["scores"]),
        "errors": draw_errors(report.linears, folder / FIGURES["errors"]),
        "training": draw_training(trained, folder / FIGURES["training"]) if trained else None,
    }
    for name, path in drawn.items():
        if path is None:
            (folder / FIGURES[name]).unlink(missing_ok=True)
    body = card_text(report, {name: FIGURES[name] for name, path in drawn.items() if path})
    return write_atomic(folder / CARD, f"{as_text(front)}\n{body}")


def card_text(report: RunReport, figures: dict[str, str]) -> str:
    """The card below its front matter; figures: name -> path, those that were drawn."""
    rendered = _environment().get_template("card.md.j2").render(view.view(report, figures))
    outside, fence = 0, 1  # of each match: text before it, then the fence and its ticks
    parts = _FENCE.split(rendered)
    thinned = [re.sub(r"\n{3,}", "\n\n", part) for part in parts[outside::3]]
    fences = [*parts[fence::3], ""]
    return "".join(part for pair in zip(thinned, fences, strict=True) for part in pair).strip() + "\n"


@cache
def _environment() -> jinja2.Environment:
    """Markdown's environment: nothing is escaped but by the filters `text` and `code`; an unknown name is an error."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )
    environment.filters |= {name: getattr(markdown, name) for name in ("text", "code")}
    environment.filters |= {
        name: getattr(numerals, name) for name in ("count", "fixed", "percent", "significant", "size")
    }
    environment.filters |= {
        "fenced": lambda content, language: markdown.fenced(language, content),
        "last_part": last_part,
        "quoted": partial(json.dumps, ensure_ascii=False),
        "shell": shlex.quote,
        "yaml": partial(yaml.safe_dump, sort_keys=False, allow_unicode=True, width=120),
    }
    environment.globals |= {
        name: getattr(view, name) for name in ("ADAPTERS", "CLASSES", "LOSSES", "MAX_NOISE", "RUNNABLE")
    }
    environment.globals["table"] = markdown.table
    return environment
