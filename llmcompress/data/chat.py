"""Conversations, as the model was trained to read them.

A chat model sees its turns wrapped in markers that the checkpoint's own template writes; calibrated or trained on bare
text, it is fitted to inputs it rarely gets. So a conversation goes through the tokenizer's template: the template
writes every special token itself.

    [{"role": "user", "content": "Hi"}, …]  ──template──>  <s><|user|>Hi</s>…

Read are OpenAI's spelling (`role`, `content`, `tool_calls`, content in parts) and ShareGPT's (`from`, `value`). Columns
that a table fills with nulls are dropped, and the arguments of a tool call become an object where they are spelled as
JSON, which is what templates expect.

For training, the answers must be told from the rest. Where an answer begins and ends is found by rendering the
conversation up to there, so that it works for every template that writes its turns one after the other; a row for which
it does not is refused, never masked wrongly.

    <|user|>Name a fruit.<|end|><|assistant|> Pear.<|end|>
    └──────────── context ──────────────────┘└── trained ─┘
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from llmcompress.data.sources import is_text
from llmcompress.errors import LLMCompressError, first_line
from llmcompress.templates import TemplateRefusalError, render_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Span = tuple[str, bool]
"""A text, and whether it is trained on."""

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
"""Roles of a conversation to train on: a misspelled `assistant` would silently not be trained."""
SHAPE = 'a conversation is [{"role": "user", "content": "…"}, …]'


class UnusableRowError(Exception):
    """A row that cannot be used; its text is the reason."""


def parse_messages(value: object) -> list[Message]:
    """The messages of a conversation, checked and in one spelling; a text is what a user said, a blank one nothing.

    Raises: UnusableRowError with the reason.

    >>> parse_messages([{"from": "human", "value": "Hi"}])
    [{'role': 'user', 'content': 'Hi'}]
    """
    if is_text(value):
        return [{"role": "user", "content": str(value)}] if str(value).strip() else []
    if not isinstance(value, list) or not value:
        shown = "an empty list" if value == [] else f"a {type(value).__name__}"
        raise UnusableRowError(f"{shown} where a conversation is expected")
    return [_parse_message(number, message) for number, message in enumerate(value, start=1)]


def _parse_message(number: int, message: object) -> Message:
    where = f"message {number}"
    if not isinstance(message, dict):
        raise UnusableRowError(f"{where}: a {type(message).__name__}, not an object")
    sharegpt = "from" in message and "role" not in message
    role_key, content_key = ("from", "value") if sharegpt else ("role", "content")
    parsed = {key: value for key, value in message.items() if value is not None and key not in ("from", "value")}
    if parsed.get("tool_calls"):
        parsed["tool_calls"] = [_parse_call(where, call) for call in parsed["tool_calls"]]
    content = message.get(content_key)
    if isinstance(content, list) and all(isinstance(part, dict) and is_text(part.get("text")) for part in content):
        content = "".join(part["text"] for part in content)
    content = "" if content is None and parsed.get("tool_calls") else content
    for key, value in ((role_key, message.get(role_key)), (content_key, content)):
        if key not in message and value is None:
            present = ", ".join(sorted(map(str, message))) or "none"
            raise UnusableRowError(f"{where}: no {key!r}; keys present: {present}")
        if not is_text(value):
            raise UnusableRowError(f"{where}: {key!r} is not a text")
    role = str(message[role_key])
    return parsed | {"role": SHAREGPT_ROLES.get(role, role) if sharegpt else role, "content": content}


def _parse_call(where: str, call: object) -> Message:
    """A tool call, its arguments as an object."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict) or not is_text(function.get("name")):
        raise UnusableRowError(f"{where}: a tool call without function and name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError as error:
            raise UnusableRowError(f"{where}: arguments of a tool call are not JSON ({error})") from error
    if isinstance(arguments, dict):  # a table gives every call the arguments of all of them, the others' as null
        arguments = {key: value for key, value in arguments.items() if value is not None}
    kept = {key: value for key, value in call.items() if value is not None}
    return kept | {"function": function | {"arguments": arguments}}


def parse_tools(value: object) -> list[dict[str, Any]] | None:
    """The JSON schemas of the tools that a row offers: a list, or the JSON of one; None where it offers none.

    Raises: UnusableRowError.
    """
    try:
        tools = json.loads(value) if isinstance(value, str) and value.strip() else value
    except ValueError as error:
        raise UnusableRowError(f"field 'tools' is not JSON ({error})") from error
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UnusableRowError("field 'tools' is no list of JSON schemas")
    return tools


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    tools: list[dict[str, Any]] | None = None,
    prompt: bool = False,
) -> str:
    """A conversation in the tokenizer's chat template. prompt: with the beginning of the answer that comes next.

    Raises: UnusableRowError when the template refuses it (many allow user and assistant in turn only);
    LLMCompressError when the template takes too long, or too much memory.
    """
    from jinja2 import TemplateError

    try:
        return render_chat(tokenizer, messages, tools, add_generation_prompt=prompt)
    except (TemplateRefusalError, TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        reason = error.reason if isinstance(error, TemplateRefusalError) else first_line(error)
        raise UnusableRowError(f"the chat template of the tokenizer refuses it ({reason})") from error


def trained_spans(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    tools: list[dict[str, Any]] | None = None,
    num_context: int = 0,
) -> list[Span]:
    """The rendered conversation in spans: what the assistant says after the first `num_context` messages is trained.

    Raises: UnusableRowError for an unknown role, nothing to train, and a template that refuses the conversation or does
    not write its turns one after the other.
    """
    unknown = next((message["role"] for message in messages if message["role"] not in ROLES), None)
    if unknown is not None:
        raise UnusableRowError(f"role {unknown!r} is none of {', '.join(ROLES)}")
    answers = [
        index for index, message in enumerate(messages) if message["role"] == "assistant" and index >= num_context
    ]
    if not any(messages[index]["content"].strip() or messages[index].get("tool_calls") for index in answers):
        raise UnusableRowError("no answer of the assistant")
    whole = render(tokenizer, messages, tools)
    spans: list[Span] = []
    end = 0
    for index in answers:
        context = render(tokenizer, messages[:index], tools, prompt=True)
        answered = render(tokenizer, messages[: index + 1], tools)
        if not answered.startswith(context) or not whole.startswith(answered):
            raise UnusableRowError("the chat template does not write its turns one after the other")
        spans += [(whole[end : len(context)], False), (whole[len(context) : len(answered)], True)]
        end = len(answered)
    return [span for span in [*spans, (whole[end:], False)] if span[0]]


def require_template(tokenizer: PreTrainedTokenizerBase, what: str) -> None:
    """Raise unless the tokenizer has a chat template; `what` asks for one.

    Raises: LLMCompressError.
    """
    if not tokenizer.chat_template:
        raise LLMCompressError(
            f"{what}: asks for a chat template, and the tokenizer of this checkpoint has none",
            "use a checkpoint that was trained to chat, or plain text",
        )
