"""Which engine loads a checkpoint: rules that are data, one table per engine and version, asked of facts.

    engines/vllm.yaml                           Facts (facts.py)
      layouts: gptq: {reads: true, source: …}     quant_method: gptq ──> reads, or why not
      rules:                                      group_size: [256]
        - fact: group_size                                 │
          in: [-1, 32, 64, 128]     ──────────────────────>┴──> Finding("gptq-group-size", "refuses", …)
          why: …   source: …

A rule says what must hold (`in`, `has`, `multiple_of` or `empty`), `when` and `unless` it applies, whether its breach
means that the engine `refuses` the checkpoint or is worth a line (`warns`), and where that was read. A new version of
an engine is a new table beside the old one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from llmcompress.errors import unknown
from llmcompress.report import EngineVerdict, Finding
from llmcompress.verify.facts import Facts

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
        given = [one for one in (self.isin, self.has, self.multiple_of, self.empty) if one is not None]
        if len(given) != 1:
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
        named = value.items() if isinstance(value, dict) else [(None, one) for one in _listed(value)]
        broken: dict[str, list[str]] = {}
        for name, one in named:
            if not self._holds(one):
                stated = "" if name and isinstance(one, list) else str(one) if name else f"{self.fact} {one}"
                broken.setdefault(stated, []).append(str(name or ""))
        return [part for stated, names in broken.items() for part in _stated(stated, names)]

    def _holds(self, one: Any) -> bool:
        return (
            one in self.isin if self.isin is not None else isinstance(one, int) and one % (self.multiple_of or 1) == 0
        )


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
    found = {}
    for path in sorted(TABLES.glob("*.yaml")):
        table = Table.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
        found[table.engine] = table
    return found


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
    refused = any(one.level == "refuses" for one in findings)
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


def _stated(value: str, names: list[str]) -> list[str]:
    """A value that breaks a rule, said once however many linears have it."""
    if not value or not any(names):
        return names if not value else [value]
    return [f"{names[0]}: {value}"] if len(names) == 1 else [f"{value} in {len(names)} linears ({names[0]} first)"]


def _listed(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]


def _all_in(value: Any, wanted: list[Any]) -> bool:
    listed = _listed(value)
    return bool(listed) and all(one in wanted for one in listed)
