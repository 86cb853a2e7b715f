"""Reports that the first version wrote are read, whole, and a card can be drawn from each."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmcompress.card.build import write_card
from llmcompress.errors import LLMCompressError
from llmcompress.report import FILE, FOLDER, VERSION, RunReport
from llmcompress.report.upgrade import RENAMED, upgrade
from tests.unit.card.sample_report import full_report

STORED = sorted((Path(__file__).parent / "data").glob("*.json"))
every_report = pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)


def stored(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


def leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from leaves(one)
    else:
        yield repr(value)


def put(folder: Path, data: Any) -> Path:
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    (folder / FOLDER / FILE).write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return folder


def test_there_is_one_of_every_kind() -> None:
    assert [path.stem for path in STORED] == ["adapter", "distilled", "merged", "quantized"]
    assert all(stored(path)["version"] == 1 for path in STORED)


@every_report
def test_nothing_is_lost_and_the_old_dictionary_is_left_alone(path: Path) -> None:
    data = stored(path)
    before = copy.deepcopy(data)
    after = list(leaves(upgrade(data)))
    missing = {leaf for leaf in leaves(data) if leaf not in after} - {"1", "'aimed'"}
    assert not missing and data == before


@every_report
def test_it_loads_is_saved_as_the_new_version_and_has_a_card(path: Path, tmp_path: Path) -> None:
    report = RunReport.load(put(tmp_path, stored(path)))
    assert report.version == VERSION
    report.save(tmp_path)
    assert RunReport.load(tmp_path) == report and stored(tmp_path / FOLDER / FILE)["version"] == VERSION
    assert write_card(tmp_path).read_text(encoding="utf-8").count("<details>") > 1


def test_every_renamed_part_and_key_was_there() -> None:
    """Names in the table that no report ever had would hide a mistake; these parts no small report has."""
    rare = {"distillation.on_policy", "distillation.data.rejected", "finetune.data.rejected", "evaluations.overlaps"}
    for part, names in RENAMED.items():
        rows: list[Any] = [stored(path) for path in STORED]
        for key in filter(None, part.split(".")):
            rows = [row.get(key) for row in rows]
            rows = [one for row in rows if row for one in (row if isinstance(row, list) else [row])]
        assert part in rare or all(any(key in row for row in rows) for key in names), part


def test_kernels_are_told_from_the_old_note() -> None:
    row = {"engine_note": "our dequantized weights: GPTQModel is not installed"}
    native = {"engine_note": "the engine's own kernels on the packed weights"}
    upgraded = upgrade({"version": 1, "evaluations": [row, native], "speed": {"rows": [row]}})
    assert [one["kernels"] for one in upgraded["evaluations"]] == ["dequantized", "native"]
    assert upgraded["speed"]["rows"][0]["kernels"] == "dequantized"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not a report"),
        ("[1]", "no version number"),
        ('{"version": 99}', "reads up to"),
        (json.dumps({"version": VERSION}), f"not a report of version {VERSION}"),
        (json.dumps(json.loads(full_report().model_dump_json()) | {"unknown": 1}), "not a report of version"),
    ],
)
def test_what_is_no_report_is_refused(tmp_path: Path, content: str, said: str) -> None:
    with pytest.raises(LLMCompressError, match=said):
        RunReport.load(put(tmp_path, content))
