"""How many tokens a prompt has, by the model's own tokenizer and chat template: what decides whether it fits."""

from __future__ import annotations

import inspect
import json
from typing import Any

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.checkpoint.source import load_tokenizer
from llmcompress.errors import first_line
from llmcompress.publish.asgi import RefusedRequestError
from llmcompress.publish.fields import CHAT
from llmcompress.publish.requests import CheckedRequest
from llmcompress.templates import TemplateRefusalError, render_chat

CONTEXT_KEYS = ("max_position_embeddings", "n_positions")


class PromptCounter:
    """A checkpoint's tokenizer, its context in tokens (None where config.json does not say), its vocabulary."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Raises: LLMCompressError when the tokenizer does not load."""
        self._tokenizer = load_tokenizer(checkpoint)
        config = checkpoint.config
        self.context = next((config[key] for key in CONTEXT_KEYS if isinstance(config.get(key), int)), None)
        size = config.get("vocab_size")
        self.vocab_size = size if isinstance(size, int) else len(self._tokenizer)
        self.template_variables = _variables(self._tokenizer)

    def check_tokens(self, request: CheckedRequest) -> None:
        """Raise RefusedRequestError for a token that the model does not have or a variable its template does not."""
        prompts = request.prompts if request.route != CHAT else []
        tokens = [token for prompt in prompts if isinstance(prompt, list) for token in prompt]
        tokens += [int(token) for token in request.body.get("logit_bias", {})]
        if any(token >= self.vocab_size for token in tokens):
            param = "prompt" if request.route != CHAT else "logit_bias"
            raise RefusedRequestError(f"{param}: the model has tokens 0 to {self.vocab_size - 1}.", param=param)
        given = request.body.get("chat_template_kwargs", {})
        unknown = next((name for name in given if name not in self.template_variables), None)
        if unknown is not None:
            known = f"takes {', '.join(sorted(self.template_variables))}" if self.template_variables else "takes none"
            raise RefusedRequestError(
                f"chat_template_kwargs: {unknown[:100]!r} is no variable of the model's template, which {known}.",
                param="chat_template_kwargs",
            )

    def count(self, request: CheckedRequest) -> int:
        """Tokens of the longest prompt of a request. Slow for a long one: not for an event loop.

        Raises: RefusedRequestError where the template refuses the messages.
        """
        if request.route != CHAT:
            return max(
                len(prompt) if isinstance(prompt, list) else len(self._tokenizer(prompt)["input_ids"])
                for prompt in request.prompts
            )
        try:
            text = render_chat(
                self._tokenizer,
                [_with_parsed_arguments(message) for message in request.body["messages"]],
                request.body.get("tools"),
                add_generation_prompt=True,
                **request.body.get("chat_template_kwargs", {}),
            )
        except Exception as error:
            first = error.reason if isinstance(error, TemplateRefusalError) else first_line(error)
            raise RefusedRequestError(
                f"The model's chat template does not take these messages ({first}).", param="messages"
            ) from error
        return len(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def _variables(tokenizer: Any) -> frozenset[str]:
    """What a chat template can be told besides the messages: its free variables that no argument of the call sets."""
    from jinja2 import TemplateError, meta
    from transformers.utils.chat_template_utils import _compile_jinja_template

    templates = tokenizer.chat_template or {}
    free: set[str] = set()
    try:
        for template in [templates] if isinstance(templates, str) else templates.values():
            environment = _compile_jinja_template(template).environment
            free |= meta.find_undeclared_variables(environment.parse(template)) - environment.globals.keys()
    except TemplateError:
        return frozenset()  # each chat is then refused with what is wrong with the template
    arguments = inspect.signature(tokenizer.apply_chat_template).parameters.keys()
    return frozenset(free - arguments - {"messages", *tokenizer.SPECIAL_TOKENS_ATTRIBUTES})


def _with_parsed_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """A message as templates read it: the arguments of its tool calls as an object."""
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        given = call["function"]["arguments"]
        arguments = json.loads(given) if isinstance(given, str) else given
        calls.append(call | {"function": call["function"] | {"arguments": arguments}})
    return message | {"tool_calls": calls}
