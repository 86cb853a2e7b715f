"""Every kind of card: what it gives can stand in a card, whatever the report holds."""

from __future__ import annotations

import pytest

from llmcompress.card.frontmatter import RELATIONS, front_matter
from llmcompress.card.kind import KINDS, Kind, kind_of_card
from tests.unit.card.sample_report import full_report, minimal_report

every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


@every_kind
def test_a_report_without_its_part_gives_nothing(kind: Kind) -> None:
    empty = minimal_report()
    assert not kind.owns(empty)
    assert not kind.facts(empty) and not kind.sections(empty) and not kind.tags(empty)


@every_kind
def test_metadata_is_the_hubs(kind: Kind) -> None:
    assert kind.relation in RELATIONS and kind.library
    assert len({one.rank for one in KINDS}) == len(KINDS.names())


@every_kind
def test_sections_are_sections_and_facts_are_rows(kind: Kind) -> None:
    report = full_report()
    assert all(part.startswith("## ") for part in kind.sections(report))
    assert all(name and value and "\n" not in name + value for name, value in kind.facts(report))


def test_a_quantized_report_is_of_the_kind_quantized() -> None:
    found = kind_of_card(full_report("gptq"))
    assert found is not None and found.name == "quantized"
    assert front_matter(full_report("gptq"), "m")["base_model_relation"] == "quantized"
    assert kind_of_card(minimal_report()) is None
