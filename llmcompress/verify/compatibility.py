"""Which engine loads a checkpoint: rules that are data, one table per engine and version, asked of facts.

    config.json ─────────────┐                             engines/vllm.yaml
    safetensors headers ─────┼──> facts                      layouts: gptq: {reads: true, source: …}
    quantize_config.json ────┘    quant_method: gptq ───────> reads, or why not
                                  group_size: [256]          rules: {fact: group_size, in: [-1, 32, 64, 128]}
                                          └────────────────> Finding("gptq-group-size", "refuses", …)

A fact is what a checkpoint says of itself. No weight is read; the one exception are the few bytes of JSON in which
bitsandbytes keeps a linear's shape, since its packed tensor is flat. A rule says what must hold of a fact (`in`, `has`,
`multiple_of` or `empty`), `when` and `unless` it applies, whether its breach means that the engine `refuses` the
checkpoint or is worth a line (`warns`), and where that was read. A new version of an engine is a new table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from llmcompress.checkpoint.files import read_json
from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.checkpoint.safetensors import StoredTensor
from llmcompress.errors import LLMCompressError, unknown
from llmcompress.formats.base import EXPERT, FORMATS, DeclaredGrid, Format, by_quant_method, declared_grids
from llmcompress.models.config import is_tied
from llmcompress.report import EngineVerdict, Finding

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Linears of one parent that engines fuse into one."""
NONE = "none"
_ENCODER = re.compile(r"Model$|For(MaskedLM|SequenceClassification|TokenClassification|QuestionAnswering)$")
"""Architectures that write no text, by transformers' naming."""
_COMPARED = ("bits", "group_size", "sym", "desc_act")


@dataclass(frozen=True, slots=True)
class Facts:
    """Fact name -> value. A list or mapping stands for several values that a rule asks one by one."""

    values: Mapping[str, Any]

    @property
    def quant_method(self) -> str:
        """The layout that config.json declares; `none` for plain weights."""
        return str(self.values["quant_method"])


def facts(checkpoint: Checkpoint) -> Facts:
    """The facts of a checkpoint."""
    declared = checkpoint.config.get("quantization_config") or {}
    layout = by_quant_method(str(declared.get("quant_method")))
    grids = layout.declared(declared) if layout else declared_grids(declared)
    packed = _packed(checkpoint.stored)
    shapes = {
        linear: shape
        for linear, format in packed.items()
        if (shape := format.packed_shape(checkpoint.stored[f"{linear}.{format.marker}"], grids))
    }
    plain = {name.removesuffix(".weight") for name in checkpoint.stored if name.endswith(".weight")}
    dense = {name for name in plain - packed.keys() if len(checkpoint.stored[f"{name}.weight"].shape) == 2}
    tied = is_tied(checkpoint.config)
    return Facts(
        _declared_facts(declared, grids, checkpoint.folder)
        | {
            "decoder": not any(_ENCODER.search(str(name)) for name in checkpoint.config.get("architectures") or []),
            "packed": sorted(packed),
            "doubled": sorted(
                name for name, format in packed.items() if name in plain and not format.marker.startswith("weight.")
            ),
            "in_features": {linear: shape[1] for linear, shape in shapes.items()},
            "out_features": {linear: shape[0] for linear, shape in shapes.items()},
            "ragged": _ragged(shapes, grids),
            "groups_differ": _groups_differ(checkpoint.stored, packed, shapes, grids),
            "missing_g_idx": sorted(name for name in packed if f"{name}.g_idx" not in checkpoint.stored),
            "fused_mixed": _fused_mixed(packed, dense),
            "experts_mixed": _experts_mixed(packed, dense),
            "experts_unread": _experts_unread(checkpoint, packed),
            "tied": tied,
            "tied_head_stored": [name for name in checkpoint.stored if tied and name.startswith("lm_head.")],
        }
    )


def _declared_facts(declared: Mapping[str, Any], grids: list[DeclaredGrid], folder: Path) -> dict[str, Any]:
    damp = declared.get("damp_percent")
    return {
        "quant_method": declared.get("quant_method") or NONE if declared else NONE,
        "keys": sorted(declared),
        "checkpoint_format": declared.get("checkpoint_format"),
        "format": declared.get("format"),
        "bits": [grid.num_bits for grid in grids],
        "sym": [grid.symmetric for grid in grids],
        "bits_sym": {f"{grid.num_bits} bits, sym {grid.symmetric}": [grid.num_bits, grid.symmetric] for grid in grids},
        "group_size": [grid.group_size for grid in grids],
        "actorder": [grid.actorder for grid in grids],
        "desc_act": bool(declared.get("desc_act")),
        "lm_head": declared.get("lm_head"),
        "dynamic": bool(declared.get("dynamic")),
        "damp_in_range": damp is None or 0 < damp < 1,
        "config_differs": _config_differs(declared, folder),
    }


def _config_differs(declared: Mapping[str, Any], folder: Path) -> list[str]:
    """The keys in which quantize_config.json, where there is one, says something else than config.json."""
    beside = folder / "quantize_config.json"
    if declared.get("quant_method") != "gptq" or not beside.is_file():
        return []
    try:
        other = read_json(beside)
    except LLMCompressError:
        return ["it is not JSON"]
    return [key for key in _COMPARED if key in other and other[key] != declared.get(key)]


def _packed(stored: Iterable[str]) -> dict[str, Format]:
    """Packed linear -> the layout whose marker it has."""
    return {
        name.removesuffix(f".{format.marker}"): format
        for name in stored
        for format in FORMATS
        if name.endswith(f".{format.marker}")
    }


def _group_size(grids: list[DeclaredGrid]) -> int | None:
    size = grids[0].group_size if len(grids) == 1 else None
    return size if isinstance(size, int) and size > 0 else None


def _ragged(shapes: Mapping[str, tuple[int, int]], grids: list[DeclaredGrid]) -> list[str]:
    size = _group_size(grids)
    return [f"{name} ({width} inputs)" for name, (_, width) in shapes.items() if size and width % size]


def _groups_differ(
    stored: Mapping[str, StoredTensor], packed: Mapping[str, Format], shapes: Mapping[str, tuple[int, int]],
    grids: list[DeclaredGrid],
) -> list[str]:  # fmt: skip
    """Linears whose scales are not as many as the declared group size makes."""
    size = _group_size(grids)
    wrong = []
    for name, (_, width) in shapes.items():
        suffix, axis = packed[name].groups or ("", 0)
        scale = stored.get(f"{name}.{suffix}")
        if scale is not None and size and len(scale.shape) == 2 and scale.shape[axis] != -(-width // size):
            wrong.append(f"{name} ({scale.shape[axis]} groups for {width} inputs)")
    return wrong


def _fused_mixed(packed: Mapping[str, Format], dense: Iterable[str]) -> list[str]:
    """Plain linears whose engine-side fusion has a packed sibling."""
    mixed = []
    for name in sorted(dense):
        parent, _, leaf = name.rpartition(".")
        siblings = next((group for group in FUSED if leaf in group), ())
        mixed += [f"{name} beside {parent}.{sibling}" for sibling in siblings if f"{parent}.{sibling}" in packed][:1]
    return mixed


def _experts_unread(checkpoint: Checkpoint, packed: Iterable[str]) -> list[str]:
    """Why transformers does not load the packed experts; asked of its own rules, where there are any."""
    if not any(EXPERT.fullmatch(name) for name in packed):
        return []
    from llmcompress.models.experts import unread

    try:
        reason = unread(checkpoint)
    except LLMCompressError as error:  # a config that transformers cannot build is said elsewhere
        reason = error.message
    return [reason] if reason else []


def _experts_mixed(packed: Mapping[str, Format], dense: Iterable[str]) -> list[str]:
    """Experts that are plain while others of their layer are packed."""
    blocks = {match["block"] for name in packed if (match := EXPERT.fullmatch(name))}
    return sorted(name for name in dense if (match := EXPERT.fullmatch(name)) and match["block"] in blocks)


TABLES = Path(__file__).with_name("engines")
EVERY = "every"
MOST_SHOWN = 3


class _Declared(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LayoutEntry(_Declared):
    """Whether an engine reads a layout at all; None: nobody looked, so nothing is claimed."""

    reads: bool | None
    needs: tuple[str, ...] = Field(default=(), description="packages beside the engine itself")
    why: str | None = None
    source: str | None = None


class Rule(_Declared):
    """One thing that must hold of a fact; see the module's docstring."""

    rule: str
    when: dict[str, list[Any]] = {}
    unless: dict[str, list[Any]] = {}
    fact: str
    isin: list[Any] | None = Field(default=None, alias="in")
    has: list[Any] | None = None
    multiple_of: int | None = None
    empty: bool | None = None
    otherwise: Literal["refuses", "warns"] = "refuses"
    why: str
    source: str

    @model_validator(mode="after")
    def _one_demand(self) -> Rule:
        demands = [demand for demand in (self.isin, self.has, self.multiple_of, self.empty) if demand is not None]
        if len(demands) != 1:
            raise ValueError(f"rule {self.rule}: one of in, has, multiple_of and empty")
        return self

    def applies(self, values: Mapping[str, Any]) -> bool:
        """Whether its conditions hold; a fact that is a list meets one when all of its entries do."""
        met = all(_all_in(values[fact], wanted) for fact, wanted in self.when.items())
        return met and not any(_all_in(values[fact], spared) for fact, spared in self.unless.items())

    def breaches(self, values: Mapping[str, Any]) -> list[str]:
        """What breaks it, each in a few words; empty when it holds."""
        value = values[self.fact]
        if self.empty is not None:
            return list(map(str, value)) if self.empty else [] if value else [f"no {self.fact}"]
        if self.has is not None:
            return [f"no {key}" for key in self.has if key not in value]
        named = value.items() if isinstance(value, dict) else [("", entry) for entry in _listed(value)]
        breaches: dict[str, list[str]] = {}
        for name, entry in named:
            holds = entry in self.isin if self.isin is not None else _is_multiple(entry, self.multiple_of)
            if not holds:
                stated = "" if name and isinstance(entry, list) else str(entry) if name else f"{self.fact} {entry}"
                breaches.setdefault(stated, []).append(name)
        return [text for stated, names in breaches.items() for text in _stated(stated, names)]


class Table(_Declared):
    """What is known of an engine in the given versions."""

    engine: str
    versions: tuple[str, ...]
    encoders: bool = Field(default=False, description="whether it speaks of encoders too, not of decoders alone")
    layouts: dict[str, LayoutEntry]
    rules: tuple[Rule, ...]


@cache
def tables() -> dict[str, Table]:
    """Engine -> its table, `every` (rules that hold for all of them) left out."""
    return {name: table for name, table in _all_tables().items() if name != EVERY}


@cache
def _all_tables() -> dict[str, Table]:
    read = (
        Table.model_validate(yaml.safe_load(path.read_text(encoding="utf-8"))) for path in sorted(TABLES.glob("*.yaml"))
    )
    return {table.engine: table for table in read}


def judge(facts: Facts, engine: str) -> EngineVerdict:
    """What the table of `engine` says of a checkpoint.

    Raises: LLMCompressError for an engine without a table.
    """
    if engine not in tables():
        raise unknown("engine", engine, tables())
    table = tables()[engine]
    layout = table.layouts.get(facts.quant_method)
    findings = list(_findings((*_all_tables()[EVERY].rules, *table.rules), facts.values))
    decoder = facts.values["decoder"] or table.encoders
    if not decoder:
        why = "it is no decoder, and which encoders this engine has was not looked into"
        findings.insert(
            0, Finding(rule="encoder", level="unknown", detail=why, source=f"{engine} {table.versions[-1]}")
        )
    if layout is None or layout.reads is None:
        why = layout.why if layout and layout.why else f"its table has no entry for the layout {facts.quant_method}"
        findings.insert(0, Finding(rule="layout", level="unknown", detail=why, source=f"{engine} {table.versions[-1]}"))
    elif not layout.reads:
        findings.insert(0, Finding(rule="layout", level="refuses", detail=str(layout.why), source=str(layout.source)))
    refused = any(finding.level == "refuses" for finding in findings)
    judged = decoder and layout is not None and layout.reads is not None
    return EngineVerdict(
        engine=engine,
        version=table.versions[-1],
        loads=False if refused else True if judged else None,
        needs=list(layout.needs) if layout else [],
        findings=findings,
    )


def _findings(rules: tuple[Rule, ...], values: Mapping[str, Any]) -> Iterator[Finding]:
    for rule in rules:
        breaches = rule.breaches(values) if rule.applies(values) else []
        if breaches:
            more = f" and {len(breaches) - MOST_SHOWN} more" if len(breaches) > MOST_SHOWN else ""
            detail = f"{'; '.join(breaches[:MOST_SHOWN])}{more}: {rule.why}"
            yield Finding(rule=rule.rule, level=rule.otherwise, detail=detail, source=rule.source)


def _is_multiple(value: Any, of: int | None) -> bool:
    return isinstance(value, int) and value % (of or 1) == 0


def _stated(value: str, names: list[str]) -> list[str]:
    """A value that breaks a rule, once however many linears have it."""
    if not value or not any(names):
        return names if not value else [value]
    return [f"{names[0]}: {value}"] if len(names) == 1 else [f"{value} in {len(names)} linears ({names[0]} first)"]


def _listed(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]


def _all_in(value: Any, wanted: list[Any]) -> bool:
    listed = _listed(value)
    return bool(listed) and all(entry in wanted for entry in listed)
