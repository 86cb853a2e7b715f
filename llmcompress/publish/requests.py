"""What a request may say: every field that a route and an engine take, and the values it may have.

    body ──> one JSON object? ──> every field known, in range? ──> messages, prompt ──> the same request, plain

A field that the engine would ignore or misread is refused, with its name; a value out of range is refused, with the
range. What goes on to the engine is written anew from what was checked, so that the two never read a body differently
(doubled keys, nulls, texts in parts).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llmcompress.publish.asgi import RefusedRequestError
from llmcompress.publish.fields import CHAT, NOT_SENT, Engine, Route, is_integer, is_token, rules
from llmcompress.publish.limits import ServerLimits

MAX_DEPTH = 64
"""How deep a body may nest; a schema of a tool is the deepest thing that people send."""
ROLES = ("system", "developer", "user", "assistant", "tool")
MESSAGE_FIELDS = {
    "transformers": ("role", "content", "tool_calls", "tool_call_id"),
    "vllm": ("role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content"),
}


@dataclass(frozen=True, slots=True)
class CheckedRequest:
    """A request as the engine gets it, and how many tokens it asks for. `texts`: prompts to be counted."""

    route: Route
    body: dict[str, Any]
    max_tokens: int | None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts of a completion, each a text or token ids."""
        prompt = self.body["prompt"]
        return prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]

    def with_max_tokens(self, max_tokens: int) -> bytes:
        """The body as JSON, with how many tokens its answer may have."""
        name = "max_completion_tokens" if "max_completion_tokens" in self.body else "max_tokens"
        return json.dumps(self.body | {name: max_tokens}).encode()


def parse(content: bytes) -> dict[str, Any]:
    """The JSON object of a body, without its nulls, which say no more than an absent field.

    Raises: RefusedRequestError for anything else, what Python's reader takes beyond JSON (NaN) and surrogates included.
    """
    try:
        body = json.loads(content.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise RefusedRequestError(f"The body is not JSON ({_first_line(error)}).") from error
    if not isinstance(body, dict):
        raise RefusedRequestError(f"The body is a JSON {_kind(body)}; it must be an object.")
    level: list[Any] = [body]
    for _ in range(MAX_DEPTH):
        level = [child for node in level for child in (node.values() if isinstance(node, dict) else node)]
        level = [child for child in level if isinstance(child, dict | list)]
    if level:
        raise RefusedRequestError(f"The body nests deeper than {MAX_DEPTH} levels.")
    try:
        json.dumps(body, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise RefusedRequestError("The body holds half of a surrogate pair, which is no character.") from error
    return {name: value for name, value in body.items() if value is not None}


def check(body: dict[str, Any], route: Route, model: str, engine: Engine, limits: ServerLimits) -> CheckedRequest:
    """The request that a body makes of a route.

    Raises: RefusedRequestError for another model (404), and for the first field that is unknown or has a value that
    the engine does not take (400).
    """
    if "chat_template" in body or "chat_template" in _as_dict(body.get("chat_template_kwargs")):
        raise RefusedRequestError("A request cannot bring a chat template.", param="chat_template")
    if body.get("model", model) != model:
        named = str(body["model"])[:100]
        raise RefusedRequestError(
            f"The model {named!r} does not exist here; this server has {model!r}.",
            status=404,
            param="model",
            code="model_not_found",
        )
    asked = "messages" if route == CHAT else "prompt"
    known = rules(route, engine)
    for name, value in body.items():
        if name not in known and name not in ("model", asked):
            raise RefusedRequestError(f"{name[:100]!r} is not supported on this route.", param=name[:100])
        wrong = known[name](value, limits) if name in known else None
        if wrong is not None:
            raise RefusedRequestError(f"{name}: {wrong}.", param=name)
    if asked not in body:
        raise RefusedRequestError(f"{asked}: is missing.", param=asked)
    if "stream_options" in body and not body.get("stream"):
        raise RefusedRequestError("stream_options: needs stream.", param="stream_options")
    if {"max_tokens", "max_completion_tokens"} <= body.keys():
        raise RefusedRequestError(
            "max_tokens: is an older name of max_completion_tokens; send one.", param="max_tokens"
        )
    sent = body | {"model": model}
    if engine == "transformers":
        sent = {name: value for name, value in sent.items() if name not in NOT_SENT}
    sent[asked] = _messages(body[asked], engine, limits) if route == CHAT else _prompt(body[asked], engine, limits)
    return CheckedRequest(route, sent, body.get("max_completion_tokens", body.get("max_tokens")))


def _prompt(prompt: Any, engine: Engine, limits: ServerLimits) -> Any:
    """A text; for vLLM token ids or several of either as well."""
    if isinstance(prompt, str):
        return prompt
    if engine == "vllm" and isinstance(prompt, list) and prompt:
        many = prompt if not is_integer(prompt[0]) else [prompt]
        holds = all(isinstance(one, str) or (isinstance(one, list) and one and all(map(is_token, one))) for one in many)
        if holds and len({type(one) for one in many}) == 1 and len(many) <= limits.max_choices:
            return prompt
        raise RefusedRequestError(
            f"prompt: must be a text, token ids, or at most {limits.max_choices} of either.", param="prompt"
        )
    raise RefusedRequestError("prompt: must be a string.", param="prompt")


def _messages(messages: Any, engine: Engine, limits: ServerLimits) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not 1 <= len(messages) <= limits.max_messages:
        sent = f" ({len(messages)} were sent)" if isinstance(messages, list) else ""
        raise RefusedRequestError(f"messages: must be a list of 1 to {limits.max_messages}{sent}.", param="messages")
    return [_message(message, f"messages[{index}]", engine, limits) for index, message in enumerate(messages)]


def _message(message: Any, place: str, engine: Engine, limits: ServerLimits) -> dict[str, Any]:
    def refuse(what: str) -> RefusedRequestError:
        return RefusedRequestError(f"{place}{what}.", param=place)

    if not isinstance(message, dict):
        raise refuse(": must be an object")
    plain = {name: value for name, value in message.items() if value not in (None, [])}
    unknown = next((name for name in plain if name not in MESSAGE_FIELDS[engine]), None)
    if unknown is not None:
        raise refuse(f": {unknown[:100]!r} is not supported")
    if plain.get("role") not in ROLES:
        raise refuse(f".role: must be one of {', '.join(ROLES)}")
    if "tool_calls" in plain:
        if plain["role"] != "assistant":
            raise refuse(".tool_calls: are an assistant's")
        _check_tool_calls(plain["tool_calls"], refuse, limits)
    elif "content" not in plain:
        if message.get("content") != []:
            raise refuse(".content: is missing")
        plain["content"] = ""
    if "content" in plain:
        plain["content"] = _content(plain["content"], refuse)
    if not all(isinstance(plain.get(name, ""), str) for name in ("name", "tool_call_id", "reasoning_content")):
        raise refuse(": name and tool_call_id must be strings")
    return plain


def _content(content: Any, refuse: Callable[[str], RefusedRequestError]) -> str:
    """A text, or the texts of parts, a line each."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise refuse(".content: must be a string, or parts of type text")
    if any(part.get("type") != "text" or not isinstance(part.get("text"), str) for part in content):
        raise refuse(".content: has a part that is no text; the model takes text alone")
    return "\n".join(part["text"] for part in content)


def _check_tool_calls(calls: Any, refuse: Callable[[str], RefusedRequestError], limits: ServerLimits) -> None:
    if not isinstance(calls, list) or len(calls) > limits.max_tools:
        raise refuse(f".tool_calls: must be a list of at most {limits.max_tools}")
    for call in calls:
        function = _as_dict(_as_dict(call).get("function"))
        arguments = function.get("arguments")
        try:
            parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
        except (ValueError, RecursionError):
            parsed = None
        if not isinstance(function.get("name"), str) or not isinstance(parsed, dict):
            raise refuse(".tool_calls: each needs a function with a name, and arguments that are a JSON object")


def _as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _kind(value: Any) -> str:
    return {list: "array", str: "string", bool: "boolean", type(None): "null"}.get(type(value), "number")
