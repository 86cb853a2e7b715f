"""The card of a student: teacher and student side by side, out of the report and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from llmcompress.card.build import card_text
from llmcompress.card.frontmatter import front_matter, problems
from llmcompress.card.kinds.distilled import ENTRY
from llmcompress.card.public import public
from llmcompress.report import Distillation, DistillScore, DistillTeacher, RunReport, Training, TrainingData
from tests.unit.card.sample_report import full_report


def student() -> RunReport:
    report = full_report()
    assert report.output is not None
    data = TrainingData(
        source="train.jsonl", sha256="0" * 64, kind="text", chat_template=False, loss_on="all", seq_len=128,
        packing=False, num_examples=10, num_rows=10, num_heldout=2, num_tokens=900, num_learned=890,
        heldout_also_trained=0,
    )  # fmt: skip
    report.distillation = Distillation(
        kind="causal",
        teachers=[DistillTeacher(name="/home/me/big", identity="1" * 64, num_parameters=4000, share=1.0)],
        combine="probabilities",
        student="cut from big: layers 0, 2 of 4",
        student_parameters=2500,
        losses={"forward_kl": 1.0, "hidden_mse": 0.5},
        temperature=2.0,
        layer_maps=["0:1,1:3"],
        num_heldout=321,
        scores=[
            DistillScore(metric="perplexity", higher_is_better=False, teacher=10.0, before=90.25, after=12.5),
            DistillScore(metric="KL to the teacher", higher_is_better=False, teacher=None, before=2.0, after=0.25),
        ],
        teacher_rows_per_s=100.0,
        student_rows_per_s=180.0,
        data=data,
        training=Training(steps=7, epochs=1, effective_batch=8, trained_parameters=2500, seconds=1.0),
        notes=["teacher and student have 152064 and 151936 rows of logits"],
    )
    report.linears = []
    report.output = report.output.model_copy(update={"format": "plain", "quantized_parameters": 0})
    return report


def test_everything_measured_is_on_the_card_and_no_path() -> None:
    text = card_text(public(student()), "small", None, None)
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
    front = front_matter(report, "small")
    assert not problems(front) and "distillation" in front["tags"] and "quantized" not in front["tags"]
    if "base_model" in front:
        assert front["base_model_relation"] == "finetune"


def test_a_dataset_of_the_hub_is_named_and_a_file_is_not() -> None:
    report = student()
    report.recipe = {"model": "/home/me/big", "stages": [{"distill": {"data": {"path": "org/texts"}}}]}
    assert report.distillation is not None and "datasets" not in front_matter(public(report), "small")
    report.distillation.data.source = "org/texts at 0123abc"
    seen = public(report)
    assert front_matter(seen, "small")["datasets"] == ["org/texts"] and not problems(front_matter(seen, "small"))
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
    assert front_matter(report, "small")["pipeline_tag"] == pipeline
    card = card_text(public(report), "small", None, None)
    assert f'model = {loader}.from_pretrained("USER/small")' in card and "vllm serve" not in card


def test_facts_for_the_top_of_the_card() -> None:
    facts = dict(ENTRY.facts(student()))
    assert facts["parameters"].startswith("2,500, 62.5") and facts["forward passes"].startswith("1.80 x")
    assert facts["perplexity"] == "12.500; the teacher 10.000; untrained 90.250"
    assert not ENTRY.facts(full_report()) and not ENTRY.sections(full_report()) and not ENTRY.owns(full_report())
