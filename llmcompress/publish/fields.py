"""The fields of a request: which a route and an engine take, and the values that each may have.

A field that an engine would ignore is here with the one value that changes nothing, or not at all: what is not here is
refused by its name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Literal

from llmcompress.publish.limits import ServerLimits

Engine = Literal["vllm", "transformers"]
Route = Literal["/v1/chat/completions", "/v1/completions"]
CHAT: Route = "/v1/chat/completions"
COMPLETIONS: Route = "/v1/completions"
ROUTES: tuple[Route, ...] = (CHAT, COMPLETIONS)

LOWEST_TEMPERATURE = 1e-4
"""Logits are divided by it, and an engine's numbers end somewhere; 0 is greedy and divides nothing."""

Rule = Callable[[Any, ServerLimits], str | None]
"""What a value must be, or None where it is."""


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number; a bool is none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_integer(value: Any) -> bool:
    """Whether a JSON value is a whole number; a bool is none."""
    return isinstance(value, int) and not isinstance(value, bool)


def _number(low: float, high: float, above: bool = False) -> Rule:
    said = f"must be a number {'above' if above else 'from'} {low:g} {'up ' if above else ''}to {high:g}"
    return lambda value, _: (
        None if is_number(value) and (low < value if above else low <= value) and value <= high else said
    )


def _integer(low: int, high: int) -> Rule:
    said = f"must be an integer from {low} to {high}"
    return lambda value, _: None if is_integer(value) and low <= value <= high else said


def _only(*values: Any) -> Rule:
    said = f"must be {' or '.join(json.dumps(value) for value in values)}: the engine has nothing else"
    return lambda value, _: (
        None if any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in values) else said
    )


def _boolean(value: Any, _: ServerLimits) -> str | None:
    return None if isinstance(value, bool) else "must be true or false"


def _text(value: Any, _: ServerLimits) -> str | None:
    return None if isinstance(value, str) and len(value) <= 512 else "must be a string of at most 512 characters"


def _object(value: Any, _: ServerLimits) -> str | None:
    return None if isinstance(value, dict) else "must be an object"


def _temperature(value: Any, _: ServerLimits) -> str | None:
    holds = is_number(value) and (value == 0 or LOWEST_TEMPERATURE <= value <= 2)
    return None if holds else f"must be 0, or a number from {LOWEST_TEMPERATURE} to 2"


def _max_tokens(value: Any, limits: ServerLimits) -> str | None:
    holds = is_integer(value) and 1 <= value <= limits.max_output_tokens
    return None if holds else f"must be an integer from 1 to {limits.max_output_tokens}"


def _choices(value: Any, limits: ServerLimits) -> str | None:
    holds = is_integer(value) and 1 <= value <= limits.max_choices
    return None if holds else f"must be an integer from 1 to {limits.max_choices}"


def _logprobs(value: Any, limits: ServerLimits) -> str | None:
    holds = is_integer(value) and 0 <= value <= limits.max_top_logprobs
    return None if holds else f"must be an integer from 0 to {limits.max_top_logprobs}"


def _stop(value: Any, limits: ServerLimits) -> str | None:
    texts = [value] if isinstance(value, str) else value
    holds = isinstance(texts, list) and len(texts) <= limits.max_stop
    holds = holds and all(isinstance(text, str) and 1 <= len(text) <= limits.max_stop_chars for text in texts)
    most = f"at most {limits.max_stop} strings of 1 to {limits.max_stop_chars} characters each"
    return None if holds else f"must be {most}"


def _stop_token_ids(value: Any, limits: ServerLimits) -> str | None:
    holds = isinstance(value, list) and len(value) <= limits.max_stop and all(map(is_token, value))
    return None if holds else f"must be at most {limits.max_stop} token ids"


def _logit_bias(value: Any, limits: ServerLimits) -> str | None:
    holds = isinstance(value, dict) and len(value) <= limits.max_logit_bias
    holds = holds and all(
        token.isascii() and token.isdecimal() and len(token) < 10 and is_number(bias) and -100 <= bias <= 100
        for token, bias in value.items()
    )
    return None if holds else f"must give at most {limits.max_logit_bias} token ids a number from -100 to 100 each"


def _tools(value: Any, limits: ServerLimits) -> str | None:
    holds = isinstance(value, list) and len(value) <= limits.max_tools
    holds = holds and all(
        isinstance(tool, dict)
        and tool.get("type") == "function"
        and isinstance(tool.get("function"), dict)
        and isinstance(tool["function"].get("name"), str)
        for tool in value
    )
    return None if holds else f'must be at most {limits.max_tools} tools of type "function", each with a name'


def _stream_options(value: Any, _: ServerLimits) -> str | None:
    holds = isinstance(value, dict) and value.keys() <= {"include_usage"} and all(map(_is_bool, value.values()))
    return None if holds else 'may hold "include_usage" alone'


def _template_kwargs(value: Any, _: ServerLimits) -> str | None:
    """The names are the template's own affair (tokens.py); the values are plain."""
    holds = isinstance(value, dict) and len(value) <= 32
    holds = holds and all(
        isinstance(item, bool | int | float) or (isinstance(item, str) and len(item) <= 512) for item in value.values()
    )
    return None if holds else "must be an object of at most 32 numbers, booleans and short strings"


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def is_token(value: Any) -> bool:
    """Whether a JSON value can be a token id."""
    return is_integer(value) and 0 <= value < 1 << 31


def _response_format(value: Any, _: ServerLimits) -> str | None:
    kinds = ("text", "json_object", "json_schema")
    holds = isinstance(value, dict) and value.get("type") in kinds
    return None if holds else f"must have a type of {', '.join(kinds)}"


SHARED: Mapping[str, Rule] = {
    "stream": _boolean,
    "stream_options": _stream_options,
    "temperature": _temperature,
    "top_p": _number(0, 1, above=True),
    "max_tokens": _max_tokens,
    "seed": _integer(-(1 << 63), (1 << 63) - 1),
    "stop": _stop,
    "user": _text,
}
CHAT_ONLY: Mapping[str, Rule] = {
    "max_completion_tokens": _max_tokens,
    "tools": _tools,
    "logit_bias": _logit_bias,
    "chat_template_kwargs": _template_kwargs,
    "store": _only(False),
    "modalities": _only(["text"]),
}
# transformers' server ignores these, and turns frequency_penalty into a repetition penalty, which must stay above 0.
TRANSFORMERS: Mapping[str, Rule] = {
    "n": _only(1),
    "presence_penalty": _only(0),
    "frequency_penalty": _number(0, 2),
}
TRANSFORMERS_ROUTE: Mapping[Route, Mapping[str, Rule]] = {
    CHAT: {
        "logprobs": _only(False),
        "top_logprobs": _only(0),
        "parallel_tool_calls": _only(True),
        "tool_choice": _only("auto"),
        "response_format": _only({"type": "text"}),
    },
    COMPLETIONS: {"best_of": _only(1), "echo": _only(False)},
}
VLLM: Mapping[str, Rule] = {
    "n": _choices,
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "repetition_penalty": _number(0, 10, above=True),
    "top_k": _integer(-1, 1 << 20),
    "min_p": _number(0, 1),
    "min_tokens": _integer(0, 1 << 20),
    "ignore_eos": _boolean,
    "skip_special_tokens": _boolean,
    "stop_token_ids": _stop_token_ids,
    "response_format": _response_format,
    "logit_bias": _logit_bias,
}
VLLM_ROUTE: Mapping[Route, Mapping[str, Rule]] = {
    CHAT: {
        "logprobs": _boolean,
        "top_logprobs": _logprobs,
        "parallel_tool_calls": _boolean,
        "tool_choice": lambda value, _: None if isinstance(value, str | dict) else "must be a string or an object",
        "reasoning_effort": _text,
    },
    COMPLETIONS: {"logprobs": _logprobs, "echo": _boolean},
}
NOT_SENT = frozenset({"user", "store", "modalities", "stream_options", "n", "presence_penalty", "best_of", "echo"}) | (
    TRANSFORMERS_ROUTE[CHAT].keys()
)
"""Fields whose one allowed value is what transformers' server does without them."""


def rules(route: Route, engine: Engine) -> dict[str, Rule]:
    """The fields that a route takes, besides the model and what is asked."""
    chat = CHAT_ONLY if route == CHAT else {}
    if engine == "vllm":
        return {**SHARED, **chat, **VLLM, **VLLM_ROUTE[route]}
    return {**SHARED, **chat, **TRANSFORMERS, **TRANSFORMERS_ROUTE[route]}
