"""The overlap gate: what a checkpoint was made with, against what it is about to be asked.

    report.recipe ──> calibration rows, training rows ──> RunIndex ─┐
    suite ──> items of every task, 13-word runs of every text ──────┴──> Overlap rows ──> above the bound: refused

A score on items that the calibration or training text holds says little about new ones. The gate comes before any model
is loaded. Text that cannot be read again (its file is gone, or it is a Hub dataset and there is no network) gives a row
that says so.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.checkpoint.tokenizer import load_tokenizer
from llmcompress.data.calibration import CalibrationSpec, load_calibration
from llmcompress.data.documents import SUFFIXES
from llmcompress.data.overlap import LONGEST, RunIndex, words
from llmcompress.errors import LLMCompressError, raise_all
from llmcompress.report import Overlap, RunReport

TRAINING_STAGES = ("finetune", "distill")
"""Stages whose `data` a model was trained on."""


def overlaps(report: RunReport, parts: Mapping[str, list[str]]) -> list[Overlap]:
    """What each text that made the checkpoint shares with each part of a suite (task or text name -> its items)."""
    found: list[Overlap] = []
    for kind, name, texts in _sources(report):
        if isinstance(texts, str):
            found.append(Overlap(text=f"{kind} {name}", part="*", note=texts))
            continue
        index = RunIndex(texts)
        for part, items in parts.items():
            seen = index.look_up(items)
            found.append(
                Overlap(
                    text=f"{kind} {name}",
                    part=part,
                    num_items=seen.num_items,
                    num_short=seen.num_short,
                    num_found=seen.num_found,
                    share=seen.share,
                    example=seen.example,
                )
            )
    return found


def refuse(found: Iterable[Overlap], bound: float, suite: str) -> None:
    """Raise LLMCompressError, a line for each part of the suite that shares more than `bound` with a text."""
    raise_all(
        [
            LLMCompressError(
                f"suite {suite}: {one.part}: {one.num_found} of {one.num_items - one.num_short} items share {LONGEST} "
                f"words in a row with the {one.text} ({one.share:.1%}; at most {bound:.1%}), e.g. {one.example!r}",
                "its score would say little: choose other text or another suite, or pass --allow-overlap, which the "
                "card will show",
            )
            for one in found
            if one.share is not None and one.share > bound
        ]
    )


def text_items(content: str) -> list[str]:
    """A held-out text as items: its consecutive runs of 13 words."""
    spoken = words(content)
    return [" ".join(spoken[start : start + LONGEST]) for start in range(0, len(spoken) - LONGEST + 1, LONGEST)]


def _sources(report: RunReport) -> Iterator[tuple[str, str, list[str] | str]]:
    """(kind, name, texts) of everything that made the checkpoint; for text that is not to be had, why."""
    stages: dict[str, Any] = {name: values for one in report.recipe.get("stages", []) for name, values in one.items()}
    if report.calibration is not None:
        yield "calibration set", report.calibration.name, _tried(lambda: _calibration_rows(report, stages["quantize"]))
    for stage in TRAINING_STAGES:
        given = (stages.get(stage) or {}).get("data")
        for name in given if isinstance(given, list) else [given] if given else []:
            yield f"{stage} data", Path(str(name)).name, _tried(lambda name=name: _training_rows(Path(str(name))))


def _tried(action: Any) -> list[str] | str:
    try:
        found: list[str] = action()
    except LLMCompressError as error:
        return f"not looked into: {error.message}"
    return found


def _calibration_rows(report: RunReport, settings: dict[str, Any]) -> list[str]:
    """The very rows of the run, decoded; they are drawn again and must have the digest of the report."""
    assert report.calibration is not None and report.source is not None
    source = Checkpoint.open(
        report.source.name,
        revision=report.source.revision,
        trust_remote_code=bool(report.recipe.get("trust_remote_code")),
        allow_pickle=bool(report.recipe.get("allow_pickle")),
    )
    tokenizer = load_tokenizer(source)
    rows = load_calibration(
        CalibrationSpec.choose(settings.get("calibration"), source.name),
        tokenizer,
        num_samples=report.calibration.num_samples,
        seq_len=report.calibration.seq_len,
        seed=report.seed,
    )
    if rows.provenance.sha256 != report.calibration.sha256:
        raise LLMCompressError("the text of that name is no longer the one that was calibrated on")
    decode = tokenizer.decode
    return [
        str(decode(row_S[mask_S], skip_special_tokens=True))
        for row_S, mask_S in zip(rows.tokens_NS, rows.mask_NS, strict=True)
    ]


def _training_rows(path: Path) -> list[str]:
    """Every text of a local .jsonl or .txt file, whatever its fields are called."""
    if path.suffix not in SUFFIXES or not path.is_file():
        raise LLMCompressError(f"{path.name} is no text file that is at hand here")
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix == ".txt":
        return text.split("\n\n")
    return [" ".join(_strings(_parsed(line))) for line in text.splitlines() if line.strip()]


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return line


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _strings(one)
