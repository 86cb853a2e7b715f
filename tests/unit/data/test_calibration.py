from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from llmcompress.data.calibration import CalibrationSet, CalibrationSpec, load_calibration
from llmcompress.errors import LLMCompressError
from llmcompress.seed import shuffled

BOS = 1


def _spec(path: Path, **changes: Any) -> CalibrationSpec:
    return CalibrationSpec.model_validate({"name": "mine", "text": str(path), **changes})


def _load(
    path: Path, tokenizer: PreTrainedTokenizerFast, num_samples: int, seq_len: int, seed: int = 0, **changes: Any
) -> CalibrationSet:
    return load_calibration(
        _spec(path, **changes), tokenizer, num_samples=num_samples, seq_len=seq_len, seed=seed, max_positions=None
    )


def _refused(*arguments: Any, **changes: Any) -> str:
    with pytest.raises(LLMCompressError) as caught:
        _load(*arguments, **changes)
    return "\n".join(caught.value.lines())


def _jsonl(path: Path, field: str, values: list[Any]) -> Path:
    path.write_text("".join(json.dumps({field: value}) + "\n" for value in values))
    return path


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """200 documents of 1 to 9 words; document k says w(k) all along."""
    path = tmp_path / "words.txt"
    path.write_text("\n\n".join(" ".join([f"w{number}"] * (1 + number % 9)) for number in range(200)))
    return path


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """Twelve conversations; number k repeats the letter k."""
    talk = [
        [{"role": "user", "content": "?"}, {"role": "assistant", "content": letter * 20}] for letter in "abcdefghijkl"
    ]
    return _jsonl(tmp_path / "chats.jsonl", "messages", talk)


def test_rows_are_the_documents_end_to_end_each_after_bos(texts: Path, words: PreTrainedTokenizerFast) -> None:
    found = _load(texts, words, num_samples=20, seq_len=16)
    assert found.tokens_NS.shape == found.mask_NS.shape == (20, 16)
    assert (found.tokens_NS.dtype, found.mask_NS.dtype) == (torch.int64, torch.bool)
    assert found.mask_NS.all()
    assert found.num_tokens == 320
    seen = []
    for piece in _split(found.tokens_NS.flatten().tolist(), BOS)[:-1]:
        number = piece[0] - 3
        assert piece == [number + 3] * (1 + number % 9)
        seen.append(number)
    assert len(set(seen)) == len(seen)
    assert seen != sorted(seen)


def _split(tokens: list[int], separator: int) -> list[list[int]]:
    assert tokens[0] == separator
    pieces: list[list[int]] = []
    for token in tokens:
        if token == separator:
            pieces.append([])
        else:
            pieces[-1].append(token)
    return pieces


def test_without_bos_each_document_ends_with_eos(texts: Path, letters: PreTrainedTokenizerFast) -> None:
    first = _load(texts, letters, num_samples=1, seq_len=60).tokens_NS[0]
    shown = str(letters.decode(first))
    assert shown.startswith("w") and "</s>w" in shown


def test_without_either_nothing_is_between(tmp_path: Path, words: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "a.txt"
    path.write_text("w1 w2\n\nw3 w4")
    words.bos_token = words.eos_token = None
    assert sorted(_load(path, words, num_samples=1, seq_len=4).tokens_NS[0].tolist()) == [4, 5, 6, 7]


def test_same_inputs_same_bytes_whatever_the_global_state(texts: Path, words: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(1)
    before = (random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state())  # type: ignore[index]
    one = _load(texts, words, num_samples=8, seq_len=16, seed=3)
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all()  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), before[2])
    torch.manual_seed(2)
    two = _load(texts, words, num_samples=8, seq_len=16, seed=3)
    assert torch.equal(one.tokens_NS, two.tokens_NS)
    assert one.provenance == two.provenance
    other = _load(texts, words, num_samples=8, seq_len=16, seed=4)
    assert other.provenance.sha256 != one.provenance.sha256


@pytest.mark.parametrize("chat", [False, True])
def test_more_rows_leave_the_earlier_ones(
    texts: Path, chats: Path, words: PreTrainedTokenizerFast, letters: PreTrainedTokenizerFast, chat: bool
) -> None:
    path, tokenizer, field = (chats, letters, "messages") if chat else (texts, words, "text")
    few = _load(path, tokenizer, num_samples=3, seq_len=24, field=field)
    many = _load(path, tokenizer, num_samples=12, seq_len=24, field=field)
    assert torch.equal(many.tokens_NS[:3], few.tokens_NS)
    assert torch.equal(many.mask_NS[:3], few.mask_NS)


def test_order_is_fixed_for_good() -> None:
    """Pinned: another order here is another calibration for everyone, and needs a line in the changelog."""
    assert shuffled(8, 0) == [3, 2, 1, 6, 0, 7, 4, 5]
    assert sorted(shuffled(1000, 5)) == list(range(1000))


def test_the_bytes_are_fixed_for_good(texts: Path, words: PreTrainedTokenizerFast) -> None:
    found = _load(texts, words, num_samples=4, seq_len=8)
    # Pinned like the order above; what the digest is taken over is spelled out independently.
    expected = b"".join(int(token).to_bytes(8, "little") for token in found.tokens_NS.flatten()) + b"\x01" * 32
    assert found.provenance.sha256 == hashlib.sha256(expected).hexdigest()
    assert found.provenance.sha256 == "962cf509ad3b1347a748868d0a0b4f99289f2adb2a667fb5abee0577cf2b9a0b"


def test_provenance_and_the_sets_own_numbers(texts: Path, words: PreTrainedTokenizerFast) -> None:
    spec = _spec(texts, num_samples=5, seq_len=10, seed=7, licence="CC0-1.0")
    said = load_calibration(spec, words).provenance
    assert (said.name, said.source, said.license) == ("mine", "words.txt", "CC0-1.0")
    assert (said.num_samples, said.seq_len, said.num_tokens, said.seed) == (5, 10, 50, 7)
    assert not said.chat_template


def test_too_little_text_says_how_much_there_is(texts: Path, words: PreTrainedTokenizerFast) -> None:
    total = sum(1 + number % 9 for number in range(200)) + 200
    said = _refused(texts, words, num_samples=100, seq_len=100)
    assert f"text for {total // 100} rows of 100 tokens ({total} tokens in all); 100 rows asked" in said
    assert f"--num-samples {total // 100} or --seq-len {total // 100}" in said
    assert _load(texts, words, num_samples=total // 100, seq_len=100).tokens_NS.shape[0] == total // 100
    assert _load(texts, words, num_samples=100, seq_len=total // 100).tokens_NS.shape[0] == 100


def test_no_row_at_all(texts: Path, words: PreTrainedTokenizerFast) -> None:
    said = _refused(texts, words, num_samples=2, seq_len=5000)
    assert "text for 0 rows" in said and "--num-samples 0" not in said and "(--seq-len " in said


def test_conversations_are_one_to_a_row_and_padding_is_masked(chats: Path, letters: PreTrainedTokenizerFast) -> None:
    found = _load(chats, letters, num_samples=12, seq_len=64, field="messages")
    beginnings = set()
    for tokens, mask in zip(found.tokens_NS, found.mask_NS, strict=True):
        length = int(mask.sum())
        assert mask[:length].all()
        assert not mask[length:].any()
        shown = letters.decode(tokens[mask])
        letter = shown[-5]
        assert shown == f"[user] ?</s>[assistant] {letter * 20}</s>"
        assert (tokens[length:] == letters.eos_token_id).all()
        beginnings.add(letter)
    assert beginnings == set("abcdefghijkl")
    assert found.num_tokens == int(found.mask_NS.sum()) < 12 * 64
    assert found.provenance.chat_template


def test_a_long_conversation_is_cut(chats: Path, letters: PreTrainedTokenizerFast) -> None:
    found = _load(chats, letters, num_samples=2, seq_len=12, field="messages")
    assert found.mask_NS.all()
    assert letters.decode(found.tokens_NS[0]) == "[user] ?</s>[as"


def test_a_text_with_a_chat_template_is_what_a_user_said(tmp_path: Path, letters: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "a.txt"
    path.write_text("hello")
    found = _load(path, letters, num_samples=1, seq_len=16, chat_template=True)
    assert letters.decode(found.tokens_NS[0][found.mask_NS[0]]) == "[user] hello</s>"


def test_too_few_conversations(chats: Path, letters: PreTrainedTokenizerFast) -> None:
    said = _refused(chats, letters, num_samples=13, seq_len=8, field="messages")
    assert "conversations for 12 rows; 13 rows asked" in said and "--num-samples 12" in said


def test_a_tokenizer_without_chat_template(chats: Path, words: PreTrainedTokenizerFast) -> None:
    assert "has none" in _refused(chats, words, num_samples=1, seq_len=8, field="messages")


def test_what_the_template_refuses(tmp_path: Path, letters: PreTrainedTokenizerFast) -> None:
    path = _jsonl(tmp_path / "a.jsonl", "messages", [[{"role": "tool", "content": "x"}]])
    said = _refused(path, letters, num_samples=1, seq_len=8, field="messages")
    assert "a.jsonl:1: " in said and "no tools here" in said


def test_a_template_that_writes_nothing(chats: Path, letters: PreTrainedTokenizerFast) -> None:
    letters.chat_template = "{% for m in messages %}{% endfor %}"
    assert "to no token at all" in _refused(chats, letters, num_samples=1, seq_len=8, field="messages")


def test_malformed_conversations_are_all_named(tmp_path: Path, letters: PreTrainedTokenizerFast) -> None:
    talks = [
        [{"role": "user", "content": "fine"}],
        [],
        {"role": "user"},
        ["hi"],
        [{"role": "user", "content": "x"}, {"speaker": "gpt", "content": "y"}],
        [{"role": "user", "content": None}],
    ]
    path = _jsonl(tmp_path / "a.jsonl", "messages", talks)
    shown = [line for line in _refused(path, letters, 1, 8, field="messages").splitlines() if "hint" not in line]
    assert [line.split(str(path))[1] for line in shown] == [
        ":2: an empty list where a conversation is expected",
        ":3: a dict where a conversation is expected",
        ":4: message 1: a str, not an object",
        ":5: message 2: no 'role'; keys present: content, speaker",
        ":6: message 1: 'content' is not a text",
    ]


def test_conversations_without_the_template_say_how(chats: Path, letters: PreTrainedTokenizerFast) -> None:
    path = chats.parent / "b.jsonl"
    path.write_text(chats.read_text().replace("messages", "turns"))
    assert "chat_template: true" in _refused(path, letters, 1, 8, field="turns")
    assert _load(path, letters, 1, 8, field="turns", chat_template=True).num_tokens == 8


@pytest.mark.parametrize("chat", [False, True])
def test_a_text_in_another_tokenizers_words(tmp_path: Path, words: PreTrainedTokenizerFast, chat: bool) -> None:
    words.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    path = tmp_path / "a.txt"
    path.write_text(" ".join(["w1"] * 94 + ["Fremdwort"] * 6))
    said = _refused(path, words, num_samples=1, seq_len=100, chat_template=chat)
    assert "turns 6.0% of this text into unknown tokens" in said
    path.write_text(" ".join(["w1"] * 95 + ["Fremdwort"] * 5))
    assert _load(path, words, num_samples=1, seq_len=100, chat_template=chat).num_tokens == 100


def test_unknown_text_is_named_before_a_shortage(tmp_path: Path, words: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "a.txt"
    path.write_text("ein kurzer Satz")
    assert "unknown tokens" in _refused(path, words, num_samples=9, seq_len=9)


def test_an_unknown_token_that_is_also_eos_is_none(chats: Path, letters: PreTrainedTokenizerFast) -> None:
    assert letters.unk_token_id == letters.eos_token_id
    path = _jsonl(chats.parent / "short.jsonl", "messages", [[{"role": "u", "content": ""}] * 4])
    assert _load(path, letters, num_samples=1, seq_len=8, field="messages").num_tokens == 8


def test_numbers_out_of_range_are_all_named(texts: Path, words: PreTrainedTokenizerFast) -> None:
    with pytest.raises(LLMCompressError) as caught:
        load_calibration(_spec(texts), words, num_samples=0, seq_len=65, seed=0, max_positions=64)
    said = "\n".join(caught.value.lines())
    assert "num_samples is 0" in said and "seq_len is 65; the model takes at most 64 positions" in said
    assert "seq_len is 1; at least 2" in _refused(texts, words, num_samples=1, seq_len=1)
    assert load_calibration(_spec(texts), words, num_samples=1, seq_len=64, max_positions=64).num_tokens == 64


def test_a_changed_text_is_refused(texts: Path, words: PreTrainedTokenizerFast) -> None:
    true = hashlib.sha256(texts.read_bytes()).hexdigest()
    assert _load(texts, words, 1, 8, sha256=true).num_tokens == 8
    texts.write_text(texts.read_text() + "\n")
    assert "was stated" in _refused(texts, words, 1, 8, sha256=true)


def test_rows_of_training_are_read_as_training_reads_them(tmp_path: Path, letters: PreTrainedTokenizerFast) -> None:
    """A file of which no field is named: chats go through the template, prompts stand before their completions."""
    talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "abc"}]
    rows: dict[str, list[dict[str, Any]]] = {
        "chat": [{"messages": talk}],
        "sharegpt": [{"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "abc"}]}],
        "trl": [{"prompt": talk[:1], "completion": talk[1:]}],
        "instruction": [{"instruction": "?", "output": "abc"}],
    }
    for name, lines in rows.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        found = load_calibration(CalibrationSpec.find(str(path)), letters, num_samples=1, seq_len=40)
        assert letters.decode(found.tokens_NS[0][found.mask_NS[0]]) == "[user] ?</s>[assistant] abc</s>", name
        assert found.provenance.chat_template
    table = tmp_path / "rows.csv"
    table.write_text("prompt,completion\nab,cd\n")
    found = load_calibration(CalibrationSpec.find(str(table)), letters, num_samples=1, seq_len=5)
    assert letters.decode(found.tokens_NS[0]) == "abcd</s>" and not found.provenance.chat_template


def test_a_chat_without_a_template_and_a_broken_row_are_one_line_each(
    tmp_path: Path, words: PreTrainedTokenizerFast, letters: PreTrainedTokenizerFast
) -> None:
    path = _jsonl(tmp_path / "a.jsonl", "messages", [[{"role": "user", "content": "x"}]])
    with pytest.raises(LLMCompressError, match="has none"):
        load_calibration(CalibrationSpec.find(str(path)), words)
    path.write_text('{"messages": [{"role": "user", "content": "x"}]}\n{"messages": [3]}\n{oops\n')
    with pytest.raises(LLMCompressError) as caught:
        load_calibration(CalibrationSpec.find(str(path)), letters)
    assert caught.value.lines()[0] == f"{path}:3: not JSON"
