"""The metadata parses, survives huggingface_hub, holds nothing empty, and never claims what is not known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData

from llmcompress.card.build import write_card
from llmcompress.card.metadata import as_text, front_matter, problems
from llmcompress.errors import LLMCompressError
from llmcompress.report import RunReport
from tests.unit.card.sample_report import full_report, minimal_report


def with_source(**changes: Any) -> RunReport:
    report = full_report()
    assert report.source is not None
    return report.model_copy(update={"source": report.source.model_copy(update=changes)})


def test_says_what_the_hub_reads() -> None:
    front = front_matter(full_report("compressed_tensors"))
    assert front["base_model"] == "some-org/base-model"
    assert front["base_model_relation"] == "quantized"
    assert front["library_name"] == "transformers"
    assert front["pipeline_tag"] == "text-generation"
    assert front["license"] == "apache-2.0"
    assert front["language"] == ["en", "no"]
    assert front["tags"] == ["llmcompress", "quantized", "compressed-tensors", "4-bit", "int4", "gptq", "w4a16"]
    assert front_matter(full_report("bitsandbytes"))["tags"][2:] == ["bitsandbytes", "4-bit", "nf4", "gptq"]


@pytest.mark.parametrize("report", [full_report(), full_report(local=True), minimal_report()])
def test_parses_to_itself_and_has_no_problem(report: RunReport) -> None:
    front = front_matter(report)
    head, body, rest = as_text(front).split("---\n")
    assert (head, rest) == ("", "")
    assert yaml.safe_load(body) == front
    assert problems(front) == []


def test_unknown_fields_are_absent() -> None:
    assert set(front_matter(minimal_report())) == {"library_name", "pipeline_tag", "tags"}
    assert not {"base_model", "base_model_relation"} & set(front_matter(full_report(local=True)))
    assert "license" not in front_matter(with_source(license=None))


def test_model_index_round_trips_through_huggingface_hub() -> None:
    front = front_matter(full_report())
    data = ModelCardData(**front)
    assert data.model_name == "base-model W4A16"
    assert [(one.dataset_type, one.metric_type) for one in data.eval_results or []] == [
        ("tiny_agreement", "acc"),
        ("tiny_facts", "acc"),
        ("tiny_sums", "acc"),
        ("openai/gsm8k", "exact_match"),
        ("heldout", "perplexity"),
    ]
    plain = data.to_dict()
    assert plain == front


def test_shots_on_one_split_do_not_collapse() -> None:
    report = full_report()
    first = report.evaluations[0].tasks[0]
    shots = [first, first.model_copy(update={"num_fewshot": 5})]
    report.evaluations[0] = report.evaluations[0].model_copy(update={"tasks": shots})
    front = front_matter(report)
    results = ModelCardData(**front).eval_results or []
    assert [one.metric_args["num_fewshot"] for one in results[:2] if one.metric_args] == [0, 5]
    assert ModelCardData(**front).to_dict() == front


def test_the_written_card_loads_as_a_model_card(tmp_path: Path) -> None:
    report = full_report()
    report.save(tmp_path)
    card = ModelCard.load(write_card(tmp_path))
    assert card.data.base_model == "some-org/base-model"
    assert card.data.model_name == "base-model W4A16"
    assert card.text.lstrip().startswith("# ")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"license": "MIT"}, {"license": "mit"}),
        (
            {"license": "Acme Terms 2", "license_link": "https://example.org/l"},
            {"license": "other", "license_name": "acme-terms-2", "license_link": "https://example.org/l"},
        ),
        (
            {"license": "other", "license_name": "acme", "license_link": "LICENSE.md", "revision": None},
            {
                "license": "other",
                "license_name": "acme",
                "license_link": "https://huggingface.co/some-org/base-model/blob/main/LICENSE.md",
            },
        ),
        (
            {"license": "other", "license_name": "acme", "license_link": "LICENSE", "hub_id": None, "name": "x"},
            {"license": "other", "license_name": "acme"},
        ),
    ],
)
def test_licence_in_the_hubs_spelling(changes: dict[str, Any], expected: dict[str, str]) -> None:
    front = front_matter(with_source(**changes))
    assert {key: value for key, value in front.items() if key.startswith("license")} == expected
    assert problems(front) == []


@pytest.mark.parametrize(
    ("front", "said"),
    [
        ({"language": []}, "language: is empty"),
        ({"tags": ["a", None]}, "tags.1: is empty"),
        ({"base_model": "/home/me/model"}, "base_model: '/home/me/model' is no Hub id"),
        ({"base_model": "../model"}, "is no Hub id"),
        ({"base_model_relation": "child"}, "base_model_relation: must be one of"),
        ({"license": "Apache 2"}, "license: 'Apache 2' is not on the Hub's list"),
        ({"license": "other"}, "license: other needs license_name"),
        ({"license_link": "LICENSE"}, "license_link: must be an address"),
        ({"language": ["English"]}, "language: 'English' is no ISO 639 code"),
        (
            {"model-index": [{"name": "x", "results": [{"task": {"type": "t"}, "dataset": {"type": "d"}}]}]},
            "type and name",
        ),
        (
            {
                "model-index": [
                    {
                        "name": "x",
                        "results": [
                            {
                                "task": {"type": "t"},
                                "dataset": {"type": "d", "name": "d"},
                                "metrics": [{"type": "acc", "value": float("nan")}],
                            }
                        ],
                    }
                ]
            },
            "finite value",
        ),
    ],
)
def test_what_the_hub_refuses_is_found(front: dict[str, Any], said: str) -> None:
    assert any(said in problem for problem in problems(front)), problems(front)


def test_a_language_that_is_no_code_is_left_out() -> None:
    assert "language" not in front_matter(with_source(languages=["English", "zh-CN"]))


def test_bad_metadata_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with_source(hub_id="not a hub id").save(tmp_path)
    with pytest.raises(LLMCompressError, match="is no Hub id"):
        write_card(tmp_path)
    assert not (tmp_path / "README.md").exists()
    assert not (tmp_path / "llmcompress" / "figures").exists()
