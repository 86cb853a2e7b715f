"""A card of every kind of checkpoint: valid Markdown and metadata, and what only that kind can say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from llmcompress.card.build import card_text, write_card
from llmcompress.card.metadata import front_matter, problems
from llmcompress.card.public import public
from llmcompress.card.view import kind, title
from llmcompress.publish.gate import card_problems
from llmcompress.report import RunReport
from tests.unit.card.sample_report import adapter, full_report, merged, minimal_report, student

KINDS: dict[str, Callable[[], RunReport]] = {
    "quantized": full_report,
    "adapter": adapter,
    "merged": merged,
    "merged, then quantized": lambda: merged(quantized=True),
    "distilled": student,
}
every_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


@every_kind
def test_the_card_is_markdown_without_a_problem_and_without_a_path(
    make: Callable[[], RunReport], tmp_path: Path
) -> None:
    make().save(tmp_path)
    card = write_card(tmp_path).read_text(encoding="utf-8")
    assert card_problems(card) == [] and "/home/" not in card and "None" not in card
    body = card.split("---\n", 2)[2]
    tokens = MarkdownIt("commonmark").enable("table").parse(body)
    stray = [one.content for one in tokens if one.type == "inline" and one.content.lstrip().startswith("|")]
    assert not stray, "a table that is not read as one"
    assert body.count("<details>") == body.count("</details>") == body.count("<summary>") > 1
    assert "\n\n\n" not in body and "  \n" not in body
    for path in (one for one in body.split("](")[1:] if one.startswith("llmcompress/")):
        assert (tmp_path / path.split(")")[0]).is_file()


def test_kinds_and_titles() -> None:
    assert [kind(make()) for make in KINDS.values()] == ["quantized", "adapter", "merged", "quantized", "distilled"]
    assert kind(minimal_report()) is None
    assert [title(make()) for make in KINDS.values()] == [
        "base-model W4A16",
        "base-model QLoRA adapter",
        "base-model fine-tuned",
        "base-model fine-tuned W4A16",
        "base-model distilled",
    ]
    relations = [front_matter(make())["base_model_relation"] for make in KINDS.values()]
    assert relations == ["quantized", "adapter", "finetune", "quantized", "finetune"]
    assert front_matter(adapter())["library_name"] == "peft"
    assert {"lora", "qlora", "merged-adapter"} <= set(front_matter(merged())["tags"])


def test_the_first_sentence_names_every_step() -> None:
    text = card_text(public(merged(quantized=True)), {})
    first = text.split("\n\n")[1]
    steps = ("some-org/base-model", "fine-tuned on `train.jsonl` (QLoRA, rank 8)", "merged onto", "quantized by `gptq`")
    assert [first.index(step) for step in steps] == sorted(first.index(step) for step in steps)
    assert (
        "with the adapter 2.0000, merged 2.0100, **this file 2.1000** nats per token, all on the same 40 rows" in text
    )
    plain = text.replace(".00 %", " %").replace(".0 %", " %")
    assert "| **of the gain kept** | 80 % [71 %, 88 %] |" in plain
    assert (
        "Of the update D itself 87 % is kept (61 % by plain rounding)" in plain and "over the 1 of 2 linears" in plain
    )
    assert "316" not in text and "217" not in text, "single linears scatter too far to be told"


def test_a_gain_that_is_not_told_from_zero_has_no_share() -> None:
    report = merged(quantized=True)
    kept = report.adapter_retention
    assert kept is not None
    kept.gain_kept = kept.gain_kept_interval = None
    kept.linears = kept.linears[1:]
    text = card_text(public(report), {})
    assert "what the adapter gained is not told from 0 on 40 rows" in text and "this file 2.1000" in text
    assert "How much of the update each linear kept is not shown" in text and "Of the update D itself" not in text


def test_a_report_of_before_the_losses_shows_no_projection() -> None:
    report = merged(quantized=True)
    assert report.adapter_retention is not None
    older = {"linears", "kept", "kept_rtn", "heldout_tokens", "kl", "kl_rtn"}
    values = report.adapter_retention.model_dump(include=older)
    values["linears"] = [{key: row[key] for key in ("name", "kept", "kept_rtn")} for row in values["linears"]]
    report.adapter_retention = type(report.adapter_retention).model_validate(values)
    text = card_text(public(report), {})
    assert (
        "this file" not in text
        and "is not shown" in text
        and "of the adapter before it was merged and quantized" in text
    )


def test_an_adapter_says_how_it_goes_onto_its_base() -> None:
    text = card_text(public(adapter()), {})
    for part in (
        "QLoRA adapter of rank 8 for [some-org/base-model]", "PeftModel.from_pretrained(base,", "load_in_4bit=True",
        'llm_int8_skip_modules=["lm_head", "model.layers.0.mlp.down_proj"]', "## Against its base",
        "PEFT, on its base (loaded and compared)", "too long: 3 rows, first train.jsonl:4", "| 1.2500 |",
        "| with the adapter before the first step | 2.5000 |", "1 linear stayed in full precision",
    ):  # fmt: skip
        assert part in text, part
    assert "## Size" not in text and "Calibration" not in text


def test_everything_measured_is_on_the_card_and_no_path() -> None:
    text = card_text(public(student()), {})
    for part in (
        "## Teacher and student", "| parameters | 4,000 | 2,500 | 2,500 |", "| rows per second | 100 | - | 180 |",
        "| perplexity (lower is better) | 10.000 | 90.250 | 12.500 |", "| KL to the teacher (lower is better) | - |",
        "cut from big: layers 0, 2 of 4", "0:1,1:3", "at temperature 2", "0.5 x squared error of hidden states",
        "7 steps of 8 rows", "321 held-out tokens", "152064 and 151936",
    ):  # fmt: skip
        assert part in text, part
    assert "/home/me" not in text


def test_metadata() -> None:
    report = student()
    front = front_matter(report)
    assert not problems(front) and "distillation" in front["tags"] and "quantized" not in front["tags"]
    if "base_model" in front:
        assert front["base_model_relation"] == "finetune"


def test_a_dataset_of_the_hub_is_named_and_a_file_is_not() -> None:
    report = student()
    report.recipe = {"model": "/home/me/big", "stages": [{"distill": {"data": {"path": "org/texts"}}}]}
    assert report.distillation is not None and "datasets" not in front_matter(public(report))
    report.distillation.data.source = "org/texts at 0123abc"
    seen = public(report)
    assert front_matter(seen)["datasets"] == ["org/texts"] and not problems(front_matter(seen))
    assert seen.recipe["stages"][0]["distill"]["data"]["path"] == "org/texts"


@pytest.mark.parametrize(
    ("kind", "pipeline", "loader"),
    [
        ("masked", "fill-mask", "AutoModelForMaskedLM"),
        ("classification", "text-classification", "AutoModelForSequenceClassification"),
        ("embedding", "sentence-similarity", "AutoModel"),
    ],
)
def test_an_encoder_says_what_it_is_for_and_how_it_is_loaded(kind: Any, pipeline: str, loader: str) -> None:
    report = student()
    assert report.distillation is not None and report.source is not None
    report.distillation.kind, report.source.pipeline_tag = kind, None
    assert front_matter(report)["pipeline_tag"] == pipeline
    card = card_text(public(report), {})
    assert f'model = {loader}.from_pretrained("USER/base-model-distilled")' in card and "vllm serve" not in card


def test_a_student_is_beside_its_teacher_at_once() -> None:
    top = card_text(public(student()), {}).split("## ")[0]
    assert "distilled into a student of 2,500 parameters" in top
    assert "| **parameters** | 2,500; the teacher 4,000 |" in top
    assert "| **perplexity (lower is better)** | 12.500; the teacher 10.000; untrained 90.250 |" in top
