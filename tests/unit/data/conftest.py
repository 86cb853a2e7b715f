"""Small tokenizers, made here: one knows a few words only, one knows every byte."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = [f"w{number}" for number in range(200)]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "[{{ m.role }}] {{ m.content }}</s>{% endfor %}"
)


@pytest.fixture
def words() -> PreTrainedTokenizerFast:
    """WordLevel: w0 … w199 are ids 3 … 202; <unk> 0, <s> 1, </s> 2."""
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture
def letters() -> PreTrainedTokenizerFast:
    """ByteLevel BPE without merges: one id per byte; </s> (256) is named eos and, as GPT-2 has it, unknown too."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="</s>", eos_token="</s>")
    made.chat_template = TEMPLATE
    return made
