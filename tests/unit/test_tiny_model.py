"""The bundled checkpoint: its data come from seeds, its splits do not meet, and it can do what its tasks ask."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "eval" / "checkpoints" / "tiny"
TASK_FLOORS = {"tiny_agreement": 0.85, "tiny_facts": 0.85, "tiny_recall": 0.7, "tiny_sums": 0.7}
NUM_SCORED_ITEMS = 60


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(CHECKPOINT, local_files_only=True)


@pytest.fixture(scope="module")
def model() -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(CHECKPOINT, local_files_only=True, dtype=torch.float32).eval()


@pytest.fixture
def language(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes `tiny_language` importable for one test."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    yield


def _items(task: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (ROOT / "eval" / "data" / f"{task}.jsonl").read_text().splitlines()]


def test_check_finds_the_committed_data_reproduced() -> None:
    command = [sys.executable, ROOT / "scripts" / "make_tiny_model", "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_calibration_text_has_the_sha256_that_its_yaml_states() -> None:
    settings = yaml.safe_load((ROOT / "calibration" / "tiny.yaml").read_text())
    content = (ROOT / "calibration" / settings["text"]).read_bytes()
    assert hashlib.sha256(content).hexdigest() == settings["sha256"]


def test_calibration_text_is_long_enough_for_its_samples(tokenizer: Any) -> None:
    settings = yaml.safe_load((ROOT / "calibration" / "tiny.yaml").read_text())
    lines = (ROOT / "calibration" / settings["text"]).read_text().splitlines()
    texts = [json.loads(line)[settings["field"]] for line in lines]
    num_tokens = sum(len(ids) for ids in tokenizer(texts)["input_ids"])
    assert num_tokens >= max(40_000, settings["num_samples"] * settings["seq_len"])


def test_no_document_is_on_both_sides_and_no_item_is_in_training_text(language: None) -> None:
    from tiny_language.training import training_documents

    trained = set(training_documents(1_000_000))
    calibration = (ROOT / "calibration" / "tiny.jsonl").read_text().splitlines()
    trained |= {json.loads(line)["text"] for line in calibration}
    held_out = (ROOT / "eval" / "data" / "tiny_heldout.txt").read_text().rstrip("\n").split("\n\n")
    assert not trained & set(held_out)
    everything = "\n".join(trained)
    for task in TASK_FLOORS:
        sentences = [item["context"] + item["choices"][item["answer"]] for item in _items(task)]
        assert not [text for text in sentences if f"\n{text}" in everything or f". {text}" in everything]


def test_items_are_different_and_their_choices_too() -> None:
    for task in TASK_FLOORS:
        items = _items(task)
        assert len({json.dumps(item, sort_keys=True) for item in items}) == len(items) == 200
        assert all(len(set(item["choices"])) == len(item["choices"]) for item in items)


def test_the_answer_stands_at_every_place() -> None:
    for task in TASK_FLOORS:
        counts = [sum(item["answer"] == place for item in _items(task)) for place in range(2)]
        assert min(counts) > 30


def test_suite_names_tasks_and_texts_that_exist() -> None:
    suite = yaml.safe_load((ROOT / "eval" / "suites" / "tiny.yaml").read_text())
    assert [task["task"] for task in suite["tasks"]] == list(TASK_FLOORS)
    for task in TASK_FLOORS:
        path = ROOT / "eval" / "tasks" / f"{task}.yaml"
        data = yaml.safe_load(path.read_text())["dataset_kwargs"]["data_files"]["test"]
        assert (path.parent / data).is_file()
    assert all((ROOT / "eval" / "suites" / text["file"]).is_file() for text in suite["texts"])


def test_checkpoint_is_small_and_bf16() -> None:
    from safetensors import safe_open

    weights = CHECKPOINT / "model.safetensors"
    assert weights.stat().st_size < 6_000_000
    with safe_open(weights, framework="pt") as tensors:
        assert {tensors.get_tensor(name).dtype.__str__() for name in tensors.keys()} == {"torch.bfloat16"}  # noqa: SIM118


def test_every_linear_has_widths_that_128_divides(model: Any) -> None:
    import torch

    linears = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    assert len(linears) == 7 * model.config.num_hidden_layers
    assert all(linear.in_features % 128 == 0 for linear in linears)
    assert model.config.tie_word_embeddings


def test_tokenizer_returns_any_text_unchanged(tokenizer: Any) -> None:
    for text in ("The home of Belina is in Arvik.", "12 plus 7 makes 19.\n\n", "naïve – 漢字 🙂"):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_chat_template_writes_what_training_saw(language: None, tokenizer: Any) -> None:
    from tiny_language.documents import conversation, render_chat
    from tiny_language.world import Dice

    messages = conversation(Dice(1))
    assert tokenizer.apply_chat_template(messages, tokenize=False) == tokenizer.bos_token + render_chat(messages)


def test_model_answers_in_the_chat_format_and_stops(language: None, tokenizer: Any, model: Any) -> None:
    from tiny_language.world import PEOPLE

    messages = [{"role": "user", "content": f"Where does {PEOPLE[0].name} live?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    made = model.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert PEOPLE[0].facts["town"] in tokenizer.decode(made)
    assert tokenizer.convert_ids_to_tokens(made[-1].item()) == "<|im_end|>"


@pytest.mark.parametrize("task", TASK_FLOORS)
def test_baseline_is_far_above_chance(task: str, tokenizer: Any, model: Any) -> None:
    items = _items(task)[:NUM_SCORED_ITEMS]
    scores = [_log_likelihoods(item, tokenizer, model) for item in items]
    hits = sum(row.index(max(row)) == item["answer"] for row, item in zip(scores, items, strict=True))
    assert hits / len(items) >= TASK_FLOORS[task]


def _log_likelihoods(item: dict[str, Any], tokenizer: Any, model: Any) -> list[float]:
    import torch

    texts = [item["context"] + choice for choice in item["choices"]]
    start = len(tokenizer(item["context"])["input_ids"])
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    with torch.no_grad():
        log_probs = model(**batch).logits[:, :-1].log_softmax(-1)
    picked = log_probs.gather(-1, batch["input_ids"][:, 1:, None])[..., 0] * batch["attention_mask"][:, 1:]
    return [float(total) for total in picked[:, start - 1 :].sum(-1)]


def test_dice_give_the_same_draws_everywhere(language: None) -> None:
    from tiny_language.world import Dice

    dice = Dice(5)
    assert [dice.below(100) for _ in range(5)] == [62, 74, 79, 94, 73]
    drawn = dice.some(range(10), 10)
    assert sorted(drawn) == list(range(10)) and any(b < a for a, b in pairwise(drawn))
