"""Provenance: every text that made a checkpoint, by calibration and by training, of it and all it was made from.

    OUT's report ── recipe ──> calibration, finetune.data, distill.data
        └─ model, merge.adapters, distill.student, distill.teachers ──> ours, too? ──> their reports, and so on

A recipe with several stages names all of their data; a checkpoint that was made in several commands is followed from
folder to folder. Training data is read as it lies in its file, the rows that were held out or left out with the others,
so an item counts as seen a little too often rather than too seldom. Text that cannot be had again (its file is gone or
has changed, or an adapter came without its report) is named, with the reason in place of the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.checkpoint.source import load_tokenizer
from llmcompress.data.calibration import (
    TRAINING_DATA,
    CalibrationSet,
    CalibrationSpec,
    load_calibration,
    training_calibration,
)
from llmcompress.data.examples import data_digest
from llmcompress.data.settings import DataSettings
from llmcompress.data.sources import read_rows
from llmcompress.errors import LLMCompressError, third_party
from llmcompress.report import RunReport, TrainingData, is_ours

TRAINING = ("finetune", "distill")
"""Stages whose `data` a model was trained on."""


@dataclass(frozen=True, slots=True)
class Consent:
    """What the caller allows when a source is opened to draw its calibration text again; no report is asked."""

    trust_remote_code: bool = False
    allow_pickle: bool = False


NO_CONSENT = Consent()


@dataclass(frozen=True, slots=True)
class Text:
    """A text that had a part in a checkpoint, e.g. `calibration set tiny`; without its rows, the reason."""

    name: str
    rows: list[str]
    missing: str | None = None


def texts_of(report: RunReport, consent: Consent = NO_CONSENT) -> list[Text]:
    """Each text once, in the order in which they are met going back from the checkpoint to what it was made from.

    Raises: LLMCompressError for a report whose recipe is none.
    """
    texts: dict[str, Text] = {}
    with third_party("the report's recipe cannot be followed to what the checkpoint was made from"):
        for text in _texts(report, consent, set()):
            texts.setdefault(f"{text.name} {hash(tuple(text.rows))}", text)
    return list(texts.values())


def _texts(report: RunReport, consent: Consent, seen: set[Path]) -> Iterator[Text]:
    stages: dict[str, Any] = {
        name: values or {} for stage in report.recipe.get("stages", []) for name, values in stage.items()
    }
    if report.calibration is not None and "quantize" in stages:
        read = partial(_calibrated, report, stages["quantize"], consent)
        yield _text(f"calibration set {report.calibration.name}", read)
    for stage, part in zip(TRAINING, (report.finetune, report.distillation), strict=True):
        if part is not None and stage in stages:
            settings = DataSettings.model_validate(stages[stage]["data"])
            yield _text(f"{stage} data {part.data.source}", partial(_trained, settings, part.data))
    for name in [str(adapter["path"]) for adapter in (stages.get("merge") or {}).get("adapters") or []]:
        yield from _behind(name, f"data of adapter {Path(name).name}", consent, seen)
    distilled = stages.get("distill") or {}
    models = [report.recipe.get("model"), distilled.get("student")]
    models += [teacher["model"] for teacher in distilled.get("teachers") or []]
    for name in filter(None, models):
        yield from _behind(str(name), None, consent, seen)


def _behind(name: str, kind: str | None, consent: Consent, seen: set[Path]) -> Iterator[Text]:
    """The texts that `name` was made with; `kind` says what is missing where that should be known and is not."""
    folder = Path(name).expanduser()
    if is_ours(folder):
        if folder.resolve() not in seen:
            seen.add(folder.resolve())
            yield from _texts(RunReport.load(folder), consent, seen)
    elif kind is not None:
        yield Text(kind, [], "llmcompress did not train it, or it is gone: what it was trained on is not known")


def _text(name: str, read: Callable[[], list[str]]) -> Text:
    try:
        return Text(name, read())
    except LLMCompressError as error:
        return Text(name, [], error.message)


def _calibrated(report: RunReport, settings: dict[str, Any], consent: Consent) -> list[str]:
    """The very rows of the run, decoded; they are drawn again and must have the digest of the report."""
    assert report.calibration is not None and report.source is not None
    source = Checkpoint.open(
        report.source.name,
        revision=report.source.revision,
        trust_remote_code=consent.trust_remote_code,
        allow_pickle=consent.allow_pickle,
    )
    tokenizer = load_tokenizer(source)
    rows = _drawn(report, settings, source.name, tokenizer)
    if rows.provenance.sha256 != report.calibration.sha256:
        raise LLMCompressError("the text of that name is no longer the one that was calibrated on")
    decode = tokenizer.decode
    return [
        str(decode(row_S[mask_S], skip_special_tokens=True))
        for row_S, mask_S in zip(rows.tokens_NS, rows.mask_NS, strict=True)
    ]


def _drawn(report: RunReport, settings: dict[str, Any], source: str, tokenizer: Any) -> CalibrationSet:
    given = report.calibration
    assert given is not None
    if given.name == TRAINING_DATA:
        data = next(
            (step[stage].get("data") for step in report.recipe["stages"] for stage in TRAINING if step.get(stage)),
            None,
        )
        data = data or (report.merge.data if report.merge else None)
        wanted = settings.get("num_samples"), settings.get("seq_len")
        return training_calibration(DataSettings.model_validate(data), tokenizer, report.seed, *wanted)
    spec = CalibrationSpec.choose(settings.get("calibration"), source)
    sizes = {"num_samples": given.num_samples, "seq_len": given.seq_len, "seed": report.seed}
    return load_calibration(spec, tokenizer, **sizes)


def _trained(settings: DataSettings, known: TrainingData) -> list[str]:
    """Every text of the rows, whatever their fields are called; the file must be the one of the training."""
    if known.sha256 and data_digest(settings) != known.sha256:
        raise LLMCompressError("the file of that name is no longer the one that was trained on")
    records, _ = read_rows(settings.path, settings.config, settings.split, settings.revision)
    return [" ".join(_strings(record.fields)) for record in records[: settings.max_rows]]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)
