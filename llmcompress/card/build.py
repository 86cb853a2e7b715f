"""The model card: `report.json` in, `README.md` and its figures out.

    report.json ─> public ─┬─> front matter ─┐
                           ├─> sections ─────┼─> README.md
                           └─> figures ──────┘   llmcompress/figures/*.png

Nothing else is read and nothing is measured here, so the same report gives the same bytes on any machine.
"""

from __future__ import annotations

import os
from pathlib import Path

from llmcompress.card import evidence, sections, speed
from llmcompress.card.figures import draw_errors, draw_scores, draw_training
from llmcompress.card.frontmatter import as_text, front_matter, problems
from llmcompress.card.glance import glance
from llmcompress.card.kind import KINDS, kind_of_card
from llmcompress.card.limitations import limits
from llmcompress.card.public import public
from llmcompress.card.running import how_to_run
from llmcompress.errors import LLMCompressError, raise_all
from llmcompress.report import FOLDER, RunReport

CARD = "README.md"
FIGURES = f"{FOLDER}/figures"
SCORES, ERRORS = f"{FIGURES}/scores.png", f"{FIGURES}/errors.png"

TRAINING = f"{FIGURES}/training.png"


def write_card(folder: Path) -> Path:
    """Draw `folder`/README.md and its figures from the report in `folder`; returns the card's path.

    Raises: LLMCompressError when there is no report of this version, or it holds metadata that the Hub refuses.
    """
    report = public(RunReport.load(folder))
    name = model_name(folder, report)
    front = front_matter(report, name)
    raise_all([LLMCompressError(f"{folder}: front matter of its card: {problem}") for problem in problems(front)])
    scores = draw_scores(report.evaluations, folder / SCORES)
    errors = draw_errors(report.linears, folder / ERRORS)
    trained = report.distillation or report.finetune
    training = draw_training(trained, folder / TRAINING) if trained else None
    if training is None:
        (folder / TRAINING).unlink(missing_ok=True)
    for path in {folder / SCORES, folder / ERRORS} - {scores, errors}:
        path.unlink(missing_ok=True)
    body = card_text(report, name, SCORES if scores else None, ERRORS if errors else None)
    scratch = folder / f".{CARD}.tmp"
    scratch.write_text(as_text(front) + "\n" + body, encoding="utf-8", newline="\n")
    os.replace(scratch, folder / CARD)
    return folder / CARD


def model_name(folder: Path, report: RunReport) -> str:
    """What the card calls the checkpoint: its folder, with the run's name before that of a layout (OUT/gptq)."""
    whole = folder.resolve()
    if report.output and whole.name == report.output.format and whole.parent.name:
        return f"{whole.parent.name}-{whole.name}"
    return whole.name or "model"


def card_text(report: RunReport, name: str, scores: str | None, errors: str | None) -> str:
    """The card below its front matter; `scores` and `errors` are the figures' paths, None for one not drawn."""
    kind = kind_of_card(report)
    parts = [
        sections.headline(report, name, kind.sentence(report) if kind else ""),
        glance(report),
        how_to_run(report, name),
        sections.how_much_smaller(report),
        speed.speed(report),
        sections.what_it_lost(report, scores),
        *(part for one in KINDS for part in one.sections(report)),
        evidence.calibration(report),
        evidence.linears(report, errors),
        evidence.checks(report),
        evidence.recipe(report),
        evidence.environment(report),
        limits(report),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"
