"""The door in front of a server: no key, no entry, on every route but health.

    request ──> Door ── /health ───────────────> the engine's own app
                  ├──── right key ─────────────> the engine's own app
                  └──── none, or another ──────> 401 in the API's error shape

A plain ASGI middleware without dependencies, so that any engine can put it in front of its app: transformers' server
gets it in process, vLLM takes it by name (`--middleware llmcompress.publish.auth.Door`) with the key in the
environment.
"""

from __future__ import annotations

import hmac
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

VARIABLE = "LLMCOMPRESS_API_KEY"
OPEN = ("/health",)
"""Routes that need no key: what a load balancer or a container's health check asks."""

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Door:
    """ASGI middleware; `key` None: the environment's, and where that has none, every request passes."""

    def __init__(self, app: App, key: str | None = None) -> None:
        self._app = app
        self._key = (key or os.environ.get(VARIABLE) or "").encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request pass, or answer it with 401."""
        if scope["type"] == "lifespan" or not self._key or self._opens(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await _refuse(send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _opens(self, scope: Scope) -> bool:
        if scope["type"] == "http" and scope["path"] in OPEN and scope["method"] in ("GET", "HEAD"):
            return True
        given = next((value for name, value in scope["headers"] if name.lower() == b"authorization"), b"")
        kind, _, key = given.partition(b" ")
        return kind.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._key)


async def _refuse(send: Send) -> None:
    body = json.dumps(error_body("Incorrect API key provided.", "invalid_request_error", "invalid_api_key")).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": 401, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def error_body(message: str, kind: str, code: str | None = None) -> dict[str, Any]:
    """An error as the OpenAI API says it."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
