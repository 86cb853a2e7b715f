"""The bounds of a server, as data: how much one request, one connection and all of them together may ask for."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class ServerLimits(BaseModel):
    """What a server takes before it says no: 400 and 413 for a request, 429 where there are too many."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # one request
    max_body_bytes: int = Field(1 << 20, ge=1024, description="Largest request body, in bytes.")
    max_output_tokens: int = Field(8192, ge=1, description="Most tokens that one answer may have.")
    default_output_tokens: int = Field(1024, ge=1, description="Most tokens of an answer where a request sets none.")
    max_choices: int = Field(8, ge=1, description="Most answers to one request (`n`), and most prompts in it.")
    max_messages: int = Field(512, ge=1, description="Most messages of a chat.")
    max_tools: int = Field(128, ge=0, description="Most tools of a chat.")
    max_stop: int = Field(4, ge=0, description="Most stop strings.")
    max_stop_chars: int = Field(256, ge=1, description="Longest stop string, in characters.")
    max_logit_bias: int = Field(300, ge=0, description="Most tokens with a bias.")
    max_top_logprobs: int = Field(20, ge=0, description="Most log-probabilities per token.")

    # one connection
    max_header_bytes: int = Field(1 << 16, ge=1024, description="Largest header of a request, in bytes.")
    header_seconds: float = Field(10, gt=0, description="Longest time to send a request's header.")
    body_seconds: float = Field(30, gt=0, description="Longest time to send a request's body.")
    write_seconds: float = Field(30, gt=0, description="Longest time that a client may not read its answer.")

    # all of them
    max_connections: int = Field(1024, ge=1, description="Most open connections.")
    max_pending_bytes: int = Field(64 << 20, ge=1024, description="Most bytes of request bodies held at once.")
    max_running: int | None = Field(
        None, ge=1, description="Most requests in the engine at once; default: what it runs together."
    )
    max_waiting: int = Field(128, ge=0, description="Most requests that wait for the engine.")
    queue_seconds: float = Field(300, gt=0, description="Longest time that a request waits for the engine.")
    count_seconds: float = Field(10, gt=0, description="Longest time to count a prompt's tokens.")
    retry_after_seconds: int = Field(2, ge=1, description="What Retry-After says where there are too many requests.")
