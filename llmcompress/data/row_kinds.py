"""What a row of training data is, by its fields, and the pieces of text it becomes.

    text          {"text": …}                                    all of it is learned
    prompt        {"prompt": …, "completion": …}                 the completion is learned
    instruction   {"instruction": …, "input"?: …, "output": …}   (or "response") the output is learned
    chat          {"messages": [{"role": …, "content": …}, …]}   what the assistant says is learned
                  {"conversations": [{"from": …, "value": …}]}   the same in ShareGPT's spelling

A piece is a text and whether it is learned:

    <|user|>Name a fruit.<|end|><|assistant|> Pear.<|end|>
    └────────────── shown ──────────────────┘└─ learned ─┘

Chat goes through the tokenizer's own template. Where an answer begins and ends is found by rendering the conversation
up to there, so that it works for every template that writes its turns one after the other; a row for which it does not
is refused, never masked wrongly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmcompress.data.documents import is_text
from llmcompress.errors import LLMCompressError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Piece = tuple[str, bool]
"""A text, and whether it is learned."""
Turn = dict[str, str]

ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
ANSWERS = ("output", "response")
FIELDS = {
    "text": "text",
    "prompt": "prompt and completion",
    "instruction": "instruction and output (or response)",
    "chat": "messages (or conversations)",
}
"""Kind -> the fields that make a row one."""


class UnusableRowError(Exception):
    """A row that cannot be used; its text is the reason."""


def kind_of(fields: dict[str, Any]) -> str | None:
    """The kind of a row, by the fields it has.

    >>> kind_of({"instruction": "Add.", "input": "1 2", "output": "3"}), kind_of({"label": 1})
    ('instruction', None)
    """
    if "messages" in fields or "conversations" in fields:
        return "chat"
    if "prompt" in fields and "completion" in fields:
        return "prompt"
    if "instruction" in fields and any(name in fields for name in ANSWERS):
        return "instruction"
    return "text" if "text" in fields else None


def uses_template(kind: str, asked: bool | None, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether rows of this kind are rendered with the chat template.

    Raises: LLMCompressError for chat (or where it was asked for) without a template in the tokenizer.
    """
    if kind not in ("chat", "instruction") or asked is False:
        if kind == "chat":
            raise LLMCompressError("data: chat needs the chat template", "drop chat_template: false")
        return False
    if not tokenizer.chat_template and (kind == "chat" or asked):
        raise LLMCompressError(
            f"data: rows of kind {kind} ask for a chat template, and the tokenizer of this checkpoint has none",
            "use a checkpoint that was trained to chat, or rows of prompt and completion",
        )
    return bool(tokenizer.chat_template)


def pieces(fields: dict[str, Any], kind: str, template: bool, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """The row as pieces of text, in order.

    Raises: UnusableRowError with the reason when a field is missing, empty or of the wrong type, or the chat template
    refuses the row.
    """
    end = str(tokenizer.eos_token or "")
    if kind == "text":
        return [(_text(fields, "text") + end, True)]
    if kind == "prompt":
        return [(_text(fields, "prompt"), False), (_text(fields, "completion") + end, True)]
    if kind == "instruction":
        answer = _text(fields, next((name for name in ANSWERS if name in fields), ANSWERS[0]))
        request, extra = _text(fields, "instruction"), str(fields.get("input") or "").strip()
        if not template:
            return [(_plain_instruction(request, extra), False), (answer + end, True)]
        asked = f"{request}\n\n{extra}" if extra else request
        return _chat([{"role": "user", "content": asked}, {"role": "assistant", "content": answer}], tokenizer)
    return _chat(_turns(fields), tokenizer)


def _plain_instruction(request: str, extra: str) -> str:
    """The prompt of an instruction for a tokenizer without a chat template."""
    given = f"\n\n### Input:\n{extra}" if extra else ""
    return f"### Instruction:\n{request}{given}\n\n### Response:\n"


def _text(fields: dict[str, Any], name: str) -> str:
    if name not in fields:
        raise UnusableRowError(f"no field {name!r}")
    if not is_text(fields[name]):
        raise UnusableRowError(f"field {name!r} is no text")
    if not fields[name].strip():
        raise UnusableRowError(f"field {name!r} is empty")
    return str(fields[name])


def _turns(fields: dict[str, Any]) -> list[Turn]:
    found = fields.get("messages", fields.get("conversations"))
    role, content = ("role", "content") if "messages" in fields else ("from", "value")
    if not isinstance(found, Sequence) or isinstance(found, str) or not len(found):
        raise UnusableRowError("no messages")
    turns = []
    for one in found:
        if not isinstance(one, dict) or not is_text(one.get(content)) or one.get(role) not in ROLES:
            raise UnusableRowError(f"a message without a known {role!r} or a text in {content!r}")
        turns.append({"role": ROLES[one[role]], "content": one[content]})
    if not any(turn["role"] == "assistant" and turn["content"].strip() for turn in turns):
        raise UnusableRowError("no answer of the assistant")
    return turns


def _chat(turns: list[Turn], tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    whole = _render(turns, tokenizer, False)
    found: list[Piece] = []
    at = 0
    for index, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        asked, answered = _render(turns[:index], tokenizer, True), _render(turns[: index + 1], tokenizer, False)
        if not answered.startswith(asked) or not whole.startswith(answered):
            raise UnusableRowError("the chat template does not write its turns one after the other")
        found += [(whole[at : len(asked)], False), (whole[len(asked) : len(answered)], True)]
        at = len(answered)
    return [piece for piece in [*found, (whole[at:], False)] if piece[0]]


def _render(turns: list[Turn], tokenizer: PreTrainedTokenizerBase, prompt: bool) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt))
    except TemplateError as error:
        raise UnusableRowError(f"the chat template refuses it ({error})") from error
