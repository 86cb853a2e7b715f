"""Training data: what is trained is marked, what is bad is counted and named, and packing changes no loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llmcompress.data.collate import IGNORED, Example, collate, pack_examples
from llmcompress.data.examples import data_digest, load_examples
from llmcompress.data.preview import as_text, preview
from llmcompress.data.settings import DataSettings
from llmcompress.errors import LLMCompressError
from tests import tiny_models

TEMPLATE = (
    "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)
CHAT = [{"role": "user", "content": "w3 w4"}, {"role": "assistant", "content": "w5"}]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    from transformers import AutoTokenizer

    tiny_models.save_tokenizer(tmp_path / "tokenizer")
    return AutoTokenizer.from_pretrained(tmp_path / "tokenizer")


def write(tmp_path: Path, rows: list[Any], name: str = "rows.jsonl") -> str:
    path = tmp_path / name
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text(json.dumps(rows) if name.endswith(".json") else text + "\n")
    return str(path)


def load(path: str, tokenizer: Any, seed: int = 0, **settings: Any) -> Any:
    return load_examples(DataSettings(path=path, **({"heldout_frac": 0.0, "seq_len": 32} | settings)), tokenizer, seed)


def trained(tokenizer: Any, example: Example) -> str:
    ids = [token for token, counts in zip(example.ids, example.loss_mask, strict=True) if counts]
    return str(tokenizer.decode(ids))


@pytest.mark.parametrize(
    ("row", "kind", "said"),
    [
        ({"text": "w3 w4 w5"}, "text", "w4 w5 </s>"),
        ({"prompt": "w3 w4", "completion": " w5"}, "prompt", "w5 </s>"),
        ({"instruction": "w3", "input": "w4", "output": "w5 w6"}, "instruction", "w5 w6 </s>"),
        ({"instruction": "w3", "response": "w7"}, "instruction", "w7 </s>"),
        ({"messages": CHAT}, "chat", "w5 </s>"),
        ({"messages": [*CHAT, *CHAT]}, "chat", "w5 </s> w5 </s>"),
        ({"conversations": [{"from": "human", "value": "w3"}, {"from": "gpt", "value": "w8"}]}, "chat", "w8 </s>"),
    ],
)
def test_what_is_trained_is_the_answer(
    row: dict[str, Any], kind: str, said: str, tokenizer: Any, tmp_path: Path
) -> None:
    if kind == "chat":
        tokenizer.chat_template = TEMPLATE
    found = load(write(tmp_path, [row.copy() | {"text": row["text"] + " "} if kind == "text" else row]), tokenizer)
    assert found.summary.kind == kind and found.summary.chat_template == (kind == "chat")
    assert trained(tokenizer, found.train[0]).replace("<unk>", "").split() == said.split()
    whole = load(write(tmp_path, [row]), tokenizer, loss_on="all").train[0]
    assert sum(whole.loss_mask) == len(whole.ids) - 1  # nothing precedes the first


def test_an_instruction_goes_through_the_template_where_there_is_one(tokenizer: Any, tmp_path: Path) -> None:
    path = write(tmp_path, [{"instruction": "w3", "output": "w4"}])
    assert not load(path, tokenizer).summary.chat_template
    tokenizer.chat_template = TEMPLATE
    with_template, without = load(path, tokenizer), load(path, tokenizer, chat_template=False)
    assert with_template.summary.chat_template and not without.summary.chat_template
    assert with_template.train[0].ids != without.train[0].ids


def test_bad_rows_are_counted_and_named_by_line(tokenizer: Any, tmp_path: Path) -> None:
    good = {"prompt": "w3", "completion": " w4"}
    rows = [
        good, "{not json", "[1]", {"prompt": "w3"}, {"prompt": "", "completion": "w4"},
        {"prompt": "w3", "completion": 7}, {"prompt": "w3", "completion": "w4 " * 40}, "", good,
    ]  # fmt: skip
    found = load(write(tmp_path, rows), tokenizer)
    named = {one.reason: [place.rpartition(":")[2] for place in one.locations] for one in found.summary.rejected}
    assert named == {
        "not JSON": ["2"], "not an object": ["3"], "no field 'completion'": ["4"], "field 'prompt' is empty": ["5"],
        "field 'completion' is no text": ["6"], "longer than seq_len 32": ["7"],
    }  # fmt: skip
    assert [one.where.rpartition(":")[2] for one in found.train] == ["1", "9"]
    cut = load(write(tmp_path, rows), tokenizer, on_too_long="cut")
    assert len(cut.train[1].ids) == 32 and cut.summary.num_examples == 3


@pytest.mark.parametrize(
    ("rows", "settings", "said"),
    [
        ([{"label": 1}], {}, "no usable row (fields: label)"),
        ([], {}, "no usable row"),
        (["{oops"], {}, "1 not JSON, first"),
        ([{"prompt": "w3", "completion": "w4 " * 99}], {}, "1 longer than seq_len 32"),
        ([{"prompt": "w3 " * 40, "completion": "w4"}], {"on_too_long": "cut"}, "nothing to learn within seq_len"),
        ([{"messages": CHAT}], {}, "has none"),
    ],
)
def test_no_usable_row_is_an_error_that_says_why(
    rows: list[Any], settings: dict[str, Any], said: str, tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(LLMCompressError) as caught:
        load(write(tmp_path, rows), tokenizer, **settings)
    assert said in "\n".join(caught.value.lines())


def test_a_template_that_rewrites_earlier_turns_is_refused_not_masked_wrongly(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = "{{ messages | length }} {% for m in messages %}{{ m['content'] }} {% endfor %}"
    with pytest.raises(LLMCompressError, match="does not write its turns one after the other"):
        load(write(tmp_path, [{"messages": [*CHAT, *CHAT]}]), tokenizer)


def test_parquet_and_json_give_the_same_rows(tokenizer: Any, tmp_path: Path) -> None:
    from datasets import Dataset

    rows = [{"prompt": f"w{i}", "completion": f" w{i + 1}"} for i in range(3, 20)]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    paths = [str(tmp_path / "rows.parquet"), write(tmp_path, rows), write(tmp_path, rows, "rows.json")]
    ids = [[one.ids for one in load(path, tokenizer).train] for path in paths]
    assert ids[0] == ids[1] == ids[2]
    (tmp_path / "broken.parquet").write_text("no")
    with pytest.raises(LLMCompressError, match="cannot be read as Parquet"):
        load(str(tmp_path / "broken.parquet"), tokenizer)


def test_the_split_depends_on_the_seed_alone_and_shares_no_row(tokenizer: Any, tmp_path: Path) -> None:
    path = write(tmp_path, [{"prompt": "w3", "completion": f" w{i}"} for i in range(3, 43)])
    first, again, other = (load(path, tokenizer, seed, heldout_frac=0.2) for seed in (0, 0, 1))
    places = [{one.where for one in found.heldout} for found in (first, again, other)]
    assert places[0] == places[1] != places[2] and len(places[0]) == 8
    assert not places[0] & {one.where for one in first.train} and len(first.train) == 32
    assert load(path, tokenizer, heldout=path).summary.num_heldout_in_training == 40


def test_running_text_is_split_not_dropped(tokenizer: Any, tmp_path: Path) -> None:
    found = load(write(tmp_path, [{"text": tiny_models.words(100)}]), tokenizer)
    assert [len(one.ids) for one in found.train] == [32, 32, 32, 4 + 1] and not found.summary.rejected


def test_packed_rows_give_the_loss_of_the_examples_alone(tmp_path: Path) -> None:
    """Each example sees itself only, also beside padding: position ids tell transformers where one begins."""
    from transformers import AutoModelForCausalLM

    from llmcompress.training.heldout import heldout_loss

    model = AutoModelForCausalLM.from_pretrained(tiny_models.save(tmp_path / "model", tiny_models.configs()["llama"]))
    generator = torch.Generator().manual_seed(0)
    sizes = (5, 9, 3, 12, 7, 6)
    alone = [
        Example("", torch.randint(3, 96, (size,), generator=generator).tolist(), [False] + [True] * (size - 1))
        for size in sizes
    ]
    packed = pack_examples(alone, 16)
    assert len(packed) < len(alone) and sorted(size for row in packed for size in row.lengths) == sorted(sizes)
    expected, count = heldout_loss(model, alone, 0, 1)
    for batch in (1, len(packed)):
        assert heldout_loss(model, packed, 0, batch) == (pytest.approx(expected, abs=1e-6), count)


def test_a_batch_marks_padding_and_what_is_not_trained() -> None:
    batch = collate([Example("", [5, 6, 7], [False, False, True]), Example("", [8], [False])], padding=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, 7], [IGNORED] * 3]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_the_preview_shows_both_parts(tokenizer: Any, tmp_path: Path) -> None:
    found = load(write(tmp_path, [{"prompt": "w3 w4", "completion": " w5"}]), tokenizer)
    (row,) = preview(found.train, tokenizer)
    assert row["num_trained"] == 2 and str(row["where"]).endswith("rows.jsonl:1")
    assert row["spans"] == [{"trained": False, "text": "w3 w4"}, {"trained": True, "text": "w5 </s>"}]
    assert "--- context, not trained\nw3 w4\n+++ trained\nw5 </s>" in as_text([row])


TOOLS = [{"type": "function", "function": {"name": "w20", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"id": "1", "type": "function", "function": {"name": "w20", "arguments": '{"of": "w21"}'}}
TOOL_TEMPLATE = (
    "{% if tools %}tools {% for t in tools %}{{ t['function']['name'] }} {% endfor %}{% endif %}"
    "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} {% for c in m['tool_calls'] or [] %}call "
    "{{ c['function']['name'] }} {{ c['function']['arguments']['of'] }} {% endfor %}</s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)


def test_a_prompt_of_messages_is_a_chat_of_which_the_completion_is_trained(tokenizer: Any, tmp_path: Path) -> None:
    """TRL's conversational prompt-completion rows; an answer inside the prompt is context."""
    tokenizer.chat_template = TEMPLATE
    answer = {"role": "assistant", "content": "w9"}
    rows: list[Any] = [
        {"prompt": [*CHAT, {"role": "user", "content": "w6"}], "completion": [answer]},
        {"prompt": [*CHAT, {"role": "user", "content": "w6"}], "completion": "w9"},
        {"messages": [*CHAT, {"role": "user", "content": "w6"}, answer]},
    ]
    found = load(write(tmp_path, rows), tokenizer)
    assert found.summary.kind == "chat" and found.summary.chat_template and not found.summary.rejected
    first, text, whole = found.train
    assert first.ids == text.ids == whole.ids and first.loss_mask == text.loss_mask
    assert trained(tokenizer, first).split() == ["w9", "</s>"]
    assert trained(tokenizer, whole).split() == ["w5", "</s>", "w9", "</s>"]
    explicit = load(write(tmp_path, rows[:1]), tokenizer, kind="prompt")
    assert explicit.train == found.train[:1] and explicit.summary.chat_template


def test_tool_calls_are_answers_and_tools_reach_the_template(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = TOOL_TEMPLATE
    messages = [
        CHAT[0], {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "w22", "tool_calls": None}, {"role": "assistant", "content": "w23"},
    ]  # fmt: skip
    rows = [{"messages": messages, "tools": TOOLS}, {"messages": messages, "tools": json.dumps(TOOLS)}]
    found = load(write(tmp_path, rows), tokenizer)
    assert not found.summary.rejected and found.train[0].ids == found.train[1].ids
    assert trained(tokenizer, found.train[0]).replace("<unk>", "").split() == ["w20", "w21", "</s>", "w23", "</s>"]
    assert "w20" in str(tokenizer.decode(found.train[0].ids)).split()[:2]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([*CHAT, {"role": "asistant", "content": "w6"}], "role 'asistant' is none of"),
        ([CHAT[0], {"role": "assistant", "tool_calls": [{"function": {}}]}], "message 2: a tool call without function"),
        ([CHAT[0], {"role": "assistant", "tool_calls": [CALL | {"function": {"name": "w3", "arguments": "{"}}]}],
         "arguments of a tool call are not JSON"),
        ([CHAT[0]], "no answer of the assistant"),
        ([CHAT[0], {"role": "assistant"}], "message 2: no 'content'; keys present: role"),
    ],
)  # fmt: skip
def test_a_conversation_that_cannot_be_trained_says_why(
    messages: list[Any], reason: str, tokenizer: Any, tmp_path: Path
) -> None:
    tokenizer.chat_template = TOOL_TEMPLATE
    found = load(write(tmp_path, [{"messages": CHAT}, {"messages": messages}]), tokenizer)
    (rejected,) = found.summary.rejected
    assert reason in rejected.reason and rejected.locations[0].endswith(":2") and len(found.train) == 1


def test_content_in_parts_is_one_text(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = TEMPLATE
    parts = [{"type": "text", "text": "w3 "}, {"type": "text", "text": "w4"}]
    found = load(
        write(tmp_path, [{"messages": [{"role": "user", "content": parts}, CHAT[1]]}, {"messages": CHAT}]), tokenizer
    )
    assert found.train[0].ids == found.train[1].ids


def test_a_table_and_plain_text_are_trained_on(tokenizer: Any, tmp_path: Path) -> None:
    lines = [{"prompt": f"w{i}", "completion": f" w{i + 1}"} for i in range(3, 9)]
    table = tmp_path / "rows.csv"
    table.write_text("prompt,completion\n" + "".join(f'w{i}," w{i + 1}"\n' for i in range(3, 9)))
    ids = [[example.ids for example in load(path, tokenizer).train] for path in (str(table), write(tmp_path, lines))]
    assert ids[0] == ids[1]
    plain = tmp_path / "rows.txt"
    plain.write_text("w3 w4 w5\n\nw6 w7\nw8\n")
    found = load(str(plain), tokenizer)
    same = load(write(tmp_path, [{"text": "w3 w4 w5"}, {"text": "w6 w7\nw8"}]), tokenizer)
    assert found.summary.kind == "text" and [e.ids for e in found.train] == [e.ids for e in same.train]


def test_a_folder_of_data_files_is_a_dataset_with_a_digest(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "folder"
    folder.mkdir()
    rows = [{"prompt": "w3", "completion": f" w{i}"} for i in range(3, 9)]
    path = write(folder, rows, "train.jsonl")
    found, before = load(str(folder), tokenizer), data_digest(DataSettings(path=str(folder)))
    assert [e.ids for e in found.train] == [e.ids for e in load(path, tokenizer).train]
    assert found.summary.source == "folder" and found.summary.sha256 == before
    write(folder, rows[1:], "train.jsonl")
    assert data_digest(DataSettings(path=str(folder))) != before
