"""Rows of every task from every kind of file, the batches they make, and why a row is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llmcompress.data.collate import IGNORED
from llmcompress.data.settings import DataSettings
from llmcompress.distill.rows import Rows, load_rows
from llmcompress.errors import LLMCompressError
from llmcompress.models.tasks import task
from tests import tiny_models


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_models.save_encoder(tmp_path / "encoder", "AutoModelForMaskedLM"))


def write(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(path: str, tokenizer: Any, name: str, seed: int = 0, **changes: Any) -> Rows:
    settings = DataSettings(path=path, **({"seq_len": 16, "heldout_frac": 0.25} | changes))
    return load_rows(settings, tokenizer, task(name), 0.15, seed)


def test_a_table_gives_the_same_classes_as_json(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"text": tiny_models.words(6, seed), "label": seed % 3} for seed in range(8)]
    table = tmp_path / "rows.csv"
    table.write_text("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in rows))
    first, second = (load(path, tokenizer, "classification") for path in (write(tmp_path, rows), str(table)))
    assert first.train == second.train and first.heldout == second.heldout and len(first.heldout) == 2
    batch = first.batch(first.train[:3])
    assert batch["labels"].tolist() == [row.labels for row in first.train[:3]]
    assert batch["row"].tolist() == [0, 1, 2]


def test_rows_that_cannot_be_used_are_counted_by_reason(tokenizer: Any, tmp_path: Path) -> None:
    good = {"sentence": tiny_models.words(5), "label": 1}
    rows = [good, {"label": 1}, {"text": "", "label": 1}, {"text": "w3 w4"}, {"text": "w3 " * 40, "label": 0}, good]
    loaded = load(write(tmp_path, rows), tokenizer, "classification", heldout_frac=0.0)
    counted = {row.reason: [place.rpartition(":")[2] for place in row.locations] for row in loaded.summary.rejected}
    assert counted == {
        "no field 'sentence' or 'text'": ["2"], "field 'text' is no text": ["3"],
        "no class in field 'label' (0, 1, …)": ["4"], "longer than seq_len 16": ["5"],
    }  # fmt: skip
    assert len(loaded.train) == loaded.summary.num_examples == 2
    with pytest.raises(LLMCompressError, match=r"no usable row \(1 no field 'sentence' or 'text'"):
        load(write(tmp_path, [{"label": 1}]), tokenizer, "embedding")


def test_masking_depends_on_the_seed_alone_and_never_touches_special_tokens(tokenizer: Any, tmp_path: Path) -> None:
    path = write(tmp_path, [{"text": tiny_models.words(12, seed)} for seed in range(60)])
    first, again, other = (load(path, tokenizer, "masked", seed) for seed in (0, 0, 1))
    assert first.train == again.train and first.train != other.train
    special = set(tokenizer.all_special_ids)
    masked = total = 0
    for row in first.train:
        assert isinstance(row.labels, list)
        chosen = [place for place, label in enumerate(row.labels) if label != IGNORED]
        free = sum(label not in special for label in row.labels if label != IGNORED)
        assert chosen and free == len(chosen)
        masked += sum(row.ids[place] == tokenizer.mask_token_id for place in chosen)
        total += len(chosen)
    assert 0.7 < masked / total < 0.9  # BERT: 80 %
    tokenizer.mask_token = None
    with pytest.raises(LLMCompressError, match="has no mask token"):
        load(path, tokenizer, "masked")


def test_the_digest_knows_tokens_and_labels_and_nothing_else(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"text": tiny_models.words(6, seed), "label": 0} for seed in range(4)]
    first = load(write(tmp_path, rows), tokenizer, "classification", heldout_frac=0.0)
    moved = load(write(tmp_path, [row | {"id": 7} for row in rows]), tokenizer, "classification", heldout_frac=0.0)
    relabelled = [rows[0] | {"label": 1}, *rows[1:]]
    other = load(write(tmp_path, relabelled), tokenizer, "classification", heldout_frac=0.0)
    assert first.digest(first.train) == moved.digest(moved.train) != other.digest(other.train)


def test_a_pair_of_texts_has_types_and_padding_is_masked(tokenizer: Any, tmp_path: Path) -> None:
    rows = [
        {"sentence1": "w3", "sentence2": "w5 w6", "label": 0},
        {"sentence1": "w3 w7", "sentence2": "w5 w6", "label": 1},
    ]
    loaded = load(write(tmp_path, rows), tokenizer, "classification", heldout_frac=0.0)
    batch = loaded.batch(loaded.train)
    lengths = [len(row.ids) for row in loaded.train]
    assert batch["attention_mask"].sum(1).tolist() == lengths and batch["input_ids"].shape == (2, max(lengths))
    assert torch.equal(
        batch["attention_mask"].bool(), torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    )
