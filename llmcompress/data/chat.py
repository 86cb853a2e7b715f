"""Conversations, as the model was trained to read them.

A chat model sees its turns wrapped in markers that the checkpoint's own template writes; calibrated on bare text, it is
measured on inputs it rarely gets. So a conversation goes through the tokenizer's template, whole: the template writes
every special token itself and no prompt for another answer is added.

    [{"role": "user", "content": "Hi"}, …]  ──template──>  <s><|user|>Hi</s>…  ──>  token ids

A bare text counts as what a user said: one message.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmcompress.data.documents import Document, is_text, raise_some
from llmcompress.errors import LLMCompressError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Conversation = list[dict[str, str]]
KEYS = ("role", "content")


def conversations(documents: Sequence[Document]) -> list[tuple[str, Conversation]]:
    """Each document's place and its messages; a text becomes one user message, a blank text is left out.

    Raises: LLMCompressError for each document that is neither, and when nothing but blanks is left.
    """
    found: list[tuple[str, Conversation]] = []
    problems: list[LLMCompressError] = []
    for document in documents:
        try:
            conversation = _conversation(document)
        except LLMCompressError as problem:
            problems.append(problem)
        else:
            found += [(document.where, conversation)] if conversation else []
    raise_some(problems)
    if not found:
        raise LLMCompressError(f"{documents[0].where}: this document and all after it are blank", "give some text")
    return found


def render(tokenizer: PreTrainedTokenizerBase, where: str, conversation: Conversation) -> list[int]:
    """The token ids of a conversation in the tokenizer's chat template.

    Raises: LLMCompressError when the template refuses it (many allow user and assistant in turn only) or renders it
    to nothing.
    """
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=False)
    except TemplateError as error:
        raise LLMCompressError(
            f"{where}: the chat template of the tokenizer refuses this conversation ({error})",
            "leave the conversation out, or set `chat_template: false` for plain text",
        ) from error
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise LLMCompressError(f"{where}: the chat template renders this conversation to no token at all")
    return list(ids)


def need_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise unless the tokenizer has a chat template; `name` is the calibration set that asks for one.

    Raises: LLMCompressError.
    """
    if not tokenizer.chat_template:
        raise LLMCompressError(
            f"calibration set {name!r}: asks for a chat template, and the tokenizer of this checkpoint has none",
            "choose a set of plain text, or a checkpoint that was trained to chat",
        )


def _conversation(document: Document) -> Conversation:
    """The messages of one document; empty for a blank text."""
    content = document.content
    if is_text(content):
        return [{"role": "user", "content": str(content)}] if str(content).strip() else []
    if not isinstance(content, list) or not content:
        shown = "an empty list" if content == [] else f"a {type(content).__name__}"
        raise LLMCompressError(f"{document.where}: {shown} where a conversation is expected", _SHAPE)
    for number, message in enumerate(content, start=1):
        _need_message(f"{document.where}: message {number}", message)
    return [{key: message[key] for key in KEYS} for message in content]


def _need_message(where: str, message: object) -> None:
    if not isinstance(message, dict):
        raise LLMCompressError(f"{where}: a {type(message).__name__}, not an object", _SHAPE)
    for key in KEYS:
        if key not in message:
            present = ", ".join(sorted(map(str, message))) or "none"
            raise LLMCompressError(f"{where}: no {key!r}; keys present: {present}", _SHAPE)
        if not is_text(message[key]):
            raise LLMCompressError(f"{where}: {key!r} is not a text", _SHAPE)


_SHAPE = 'a conversation is [{"role": "user", "content": "…"}, …]'
