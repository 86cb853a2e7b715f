"""Small things to evaluate: random Llamas with a word tokenizer, a suite with a task and a text beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

WORDS = "the a cat dog bird sees hears likes old new red blue small big and but .".split()
HIDDEN = 64


def make_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<unk>", "<eos>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")


def make_model(seed: int, **changes: Any) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {
        "vocab_size": len(WORDS) + 2,
        "hidden_size": HIDDEN,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**(config | changes))).eval()


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that writes a random Llama and its tokenizer; `noise` perturbs the weights of the same seed."""

    def make(seed: int = 0, noise: float = 0.0, **changes: Any) -> Path:
        import torch

        folder = tmp_path_factory.mktemp("checkpoint")
        model = make_model(seed, **changes)
        generator = torch.Generator().manual_seed(99)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def dense(make_checkpoint: Callable[..., Path]) -> Path:
    """The plain checkpoint of seed 0."""
    return make_checkpoint()


@pytest.fixture
def declare(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a suite with one task of 12 items and one text; keywords replace its keys."""

    def write(**changes: Any) -> Path:
        folder = tmp_path / "own"
        (folder / "data").mkdir(parents=True, exist_ok=True)
        items = [
            {"context": f"the {first} {second}", "choices": ["cat", "dog", "bird"], "gold": index % 3}
            for index, (first, second) in enumerate((a, b) for a in ("old", "new", "red", "big") for b in WORDS[2:5])
        ]
        lines = "".join(json.dumps(item) + "\n" for item in items)
        (folder / "data" / "items.jsonl").write_text(lines, encoding="utf-8")
        (folder / "data" / "shots.jsonl").write_text(lines, encoding="utf-8")
        (folder / "choose.yaml").write_text(yaml.safe_dump(task_declaration()), encoding="utf-8")
        words = [WORDS[(index * index + 3 * index) % len(WORDS)] for index in range(400)]
        (folder / "text.txt").write_text(" ".join(words), encoding="utf-8")
        suite = {
            "name": "own",
            "description": "for the tests",
            "tasks": [{"task": "choose", "metric": "acc", "budget": 0.05}],
            "texts": [{"name": "words", "file": "text.txt", "seq_len": 32, "num_tokens": 300, "budget_kl": 0.05}],
        }
        path = folder / "suite.yaml"
        path.write_text(yaml.safe_dump(suite | changes), encoding="utf-8")
        return path

    return write


def task_declaration() -> dict[str, Any]:
    return {
        "task": "choose",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "data/items.jsonl", "train": "data/shots.jsonl"}},
        "output_type": "multiple_choice",
        "training_split": "train",
        "fewshot_split": "train",
        "test_split": "test",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
            {"metric": "mcc", "aggregation": "matthews_corrcoef", "higher_is_better": True},
        ],
        "metadata": {"version": 1.0},
    }
