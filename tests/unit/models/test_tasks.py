"""Tasks: which model is of which, and what each does with a batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.errors import LLMCompressError
from llmcompress.models.loading import load_model, random_model
from llmcompress.models.tasks import IGNORED, TASKS, Task, pooling_of, task, task_of, task_of_architectures
from tests import tiny_models

BERT = {
    "masked": "AutoModelForMaskedLM",
    "classification": "AutoModelForSequenceClassification",
    "embedding": "AutoModel",
}


def checkpoint_of(name: str, folder: Path) -> Path:
    if name == "causal":
        return tiny_models.save(folder, tiny_models.configs()["llama"])
    tiny_models.save_encoder(folder, BERT[name], layers=2)
    return folder


@pytest.mark.parametrize("each", TASKS, ids=lambda each: each.name)
def test_every_task_loads_runs_and_knows_its_model(each: Task, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(checkpoint_of(each.name, tmp_path / "model"))
    assert task_of(checkpoint) is each
    model = load_model(checkpoint.folder, each)
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 8]] * 2),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
    }
    output = each.run(model, batch, hidden=True)
    assert len(output.hidden_states) == 3 and len(each.blocks(model).layers) == 2
    labels = {"labels": torch.tensor([0, 1]) if each.name == "classification" else batch["input_ids"]}
    counts, aligned = each.targets(batch | labels)
    predicted = each.predictions(output)
    if predicted is None:
        assert each.num_predicted(model) == 0 and not counts.any()
    else:
        assert predicted.shape[-1] == each.num_predicted(model)
        assert counts.shape == aligned.shape == predicted.shape[:2]
    assert each.tokens_that_count(batch | labels).shape == batch["input_ids"].shape


def test_a_causal_label_stands_beside_the_logits_that_predict_it() -> None:
    labels = torch.tensor([[IGNORED, 11, 12]])
    counts, moved = task("causal").targets({"labels": labels})
    assert moved.tolist() == [[11, 12, IGNORED]] and counts.tolist() == [[True, True, False]]


def test_the_architectures_of_no_task_are_refused_by_name(tmp_path: Path) -> None:
    folder = checkpoint_of("causal", tmp_path / "model")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["ViTForImageClassification"]}))
    with pytest.raises(LLMCompressError, match=r"architectures in config\.json is ViTForImageClassification"):
        task_of(Checkpoint.open(folder))
    with pytest.raises(LLMCompressError, match="unknown task 'causall'"):
        task("causall")


def test_an_ending_belongs_to_one_task() -> None:
    names = ["GPT2LMHeadModel", "LlamaForCausalLM", "BertForMaskedLM", "BertForSequenceClassification", "BertModel"]
    found = [task_of_architectures([name]) for name in names]
    assert [each.name for each in found if each] == ["causal", "causal", "masked", "classification", "embedding"]


@pytest.mark.parametrize(
    ("name", "fields", "reason"),
    [
        ("masked", {"text": "a"}, None),
        ("masked", {"sentence1": "a", "sentence2": "b"}, None),
        ("masked", {"body": "a"}, "no field 'sentence' or 'text'"),
        ("embedding", {"sentence": " "}, "field 'sentence' is no text"),
        ("classification", {"text": "a"}, "no class in field 'label' (0, 1, …)"),
        ("classification", {"text": "a", "label": -1}, "no class in field 'label' (0, 1, …)"),
        ("classification", {"text": "a", "label": 1}, None),
    ],
)
def test_which_rows_a_task_can_read(name: str, fields: dict[str, object], reason: str | None) -> None:
    assert task(name).unusable(fields) == reason
    if reason is None:
        assert task(name).texts(fields)


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "not valid JSON"), ("[1]", "holds a list"), ('{"pooling_mode_max_tokens": true}', "pooling by")],
)
def test_a_pooling_that_cannot_be_read_is_one_line(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(text)
    with pytest.raises(LLMCompressError, match=said):
        pooling_of(tmp_path)


def test_random_weights_of_a_config(tmp_path: Path) -> None:
    folder = checkpoint_of("causal", tmp_path / "model")
    model = random_model(folder / "config.json", task("causal"), False)
    assert next(model.parameters()).dtype == torch.float32
    (folder / "config.json").write_text('{"model_type": "nobody"}')
    with pytest.raises(LLMCompressError, match="not a config that transformers can read"):
        random_model(folder / "config.json", task("causal"), False)
