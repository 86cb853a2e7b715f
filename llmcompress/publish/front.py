"""All that stands in front of an engine's app, put together: who may ask (auth), what may be asked (bounds).

request ──> Access ──> Bounds ──> transformers' app, in this process
                             ──> vLLM's app, in its own: `vllm serve --middleware llmcompress.publish.front.Front`
"""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.publish.asgi import App, Receive, Scope, Send
from llmcompress.publish.auth import VARIABLE, Access
from llmcompress.publish.bounds import Bounds, Served
from llmcompress.publish.connections import bound_connections
from llmcompress.publish.tokens import PromptCounter

SETTINGS = "LLMCOMPRESS_SERVE"
"""The environment variable that tells a process of vLLM what to put in front of its app; the key has its own."""


class FrontSettings(BaseModel):
    """What the front is built from: the checkpoint, what is served of it, the address that is listened on."""

    model_config = ConfigDict(frozen=True)

    folder: Path
    trust_remote_code: bool
    host: str
    served: Served


class Front:
    """ASGI middleware: `settings` and `key` are the environment's where they are not given.

    Raises: LLMCompressError when the checkpoint's tokenizer does not load; KeyError without settings.
    """

    def __init__(self, app: App, settings: FrontSettings | None = None, key: str | None = None) -> None:
        if settings is None:
            settings = FrontSettings.model_validate_json(os.environ[SETTINGS])
            key = os.environ.get(VARIABLE)
        checkpoint = Checkpoint.open(settings.folder, trust_remote_code=settings.trust_remote_code)
        bound_connections(settings.served.limits)
        self._app = Access(Bounds(app, settings.served, PromptCounter(checkpoint)), key, settings.host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or refuse it."""
        await self._app(scope, receive, send)
