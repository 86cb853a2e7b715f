"""The bounds of a server, as data: how much one request, one connection and all of them together may ask for."""

from __future__ import annotations

from functools import partial

from pydantic import BaseModel, ConfigDict

from llmcompress.config.options import option

limit = partial(option, group="Limits")


class ServerLimits(BaseModel):
    """What a server takes before it says no: 400 and 413 for a request, 429 where there are too many."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # one request
    max_body_bytes: int = limit(1 << 20, "Largest request body, in bytes.", ge=1024)
    max_output_tokens: int = limit(8192, "Most tokens that one answer may have.", ge=1)
    default_output_tokens: int = limit(1024, "Most tokens of an answer where a request sets none.", ge=1)
    max_choices: int = limit(8, "Most answers to one request (`n`), and most prompts in it.", ge=1)
    max_messages: int = limit(512, "Most messages of a chat.", ge=1)
    max_tools: int = limit(128, "Most tools of a chat.", ge=0)
    max_stop: int = limit(4, "Most stop strings.", ge=0)
    max_stop_chars: int = limit(256, "Longest stop string, in characters.", ge=1)
    max_logit_bias: int = limit(300, "Most tokens with a bias.", ge=0)
    max_top_logprobs: int = limit(20, "Most log-probabilities per token.", ge=0)

    # one connection
    max_header_bytes: int = limit(1 << 16, "Largest header of a request, in bytes.", ge=1024)
    header_seconds: float = limit(10, "Longest time to send a request's header.", gt=0)
    body_seconds: float = limit(30, "Longest time to send a request's body.", gt=0)
    write_seconds: float = limit(30, "Longest time that a client may not read its answer.", gt=0)

    # all of them
    max_connections: int = limit(1024, "Most open connections.", ge=1)
    max_pending_bytes: int = limit(64 << 20, "Most bytes of request bodies held at once.", ge=1024)
    max_running: int | None = limit(None, "Most requests in the engine at once; default: as many as it batches.", ge=1)
    max_waiting: int = limit(128, "Most requests that wait for the engine.", ge=0)
    queue_seconds: float = limit(300, "Longest time that a request waits for the engine.", gt=0)
    count_seconds: float = limit(10, "Longest time to count a prompt's tokens.", gt=0)
    retry_after_seconds: int = limit(2, "What Retry-After says where there are too many requests.", ge=1)
