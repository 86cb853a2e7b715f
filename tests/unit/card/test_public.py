"""What a stranger may see: names yes, ways there no."""

from __future__ import annotations

import pytest

from llmcompress.card.public import public
from tests.unit.card.sample_report import full_report


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("../models/tinylm", "tinylm"),
        ("models/tinylm/", "tinylm"),
        ("~/m/tinylm", "tinylm"),
        (".", "a local folder"),
        ("bundled/tiny", "bundled/tiny"),
        ("tinylm", "tinylm"),
    ],
)
def test_name_of_a_local_source(name: str, shown: str) -> None:
    report = full_report(local=True)
    assert report.source is not None
    report = report.model_copy(update={"source": report.source.model_copy(update={"name": name})})
    report.recipe["model"] = name
    report.notes.append(f"{name}: odd. 1/2 of https://example.org/a/b and int4/int8")
    seen = public(report)
    assert seen.source is not None
    assert seen.source.name == seen.recipe["model"] == shown
    assert seen.notes[-1].endswith(" odd. 1/2 of https://example.org/a/b and int4/int8")


def test_a_hub_id_stays_even_where_a_folder_has_its_name() -> None:
    report = full_report()
    report.recipe["output"] = "some-org/base-model"
    seen = public(report)
    assert seen.source is not None
    assert (seen.source.name, seen.source.hub_id) == ("some-org/base-model", "some-org/base-model")
    assert (seen.recipe["model"], seen.recipe["output"]) == ("some-org/base-model", "base-model")


def test_what_holds_no_path_is_untouched() -> None:
    report = full_report()
    report.recipe = {"model": "some-org/base-model", "output": "out"}
    assert public(report) == report
