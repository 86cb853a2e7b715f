"""Who may ask, as an ASGI app meets it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import MutableMapping
from typing import Any

import pytest

from llmcompress.publish.auth import Access

KEY = (b"authorization", b"Bearer sk-1")


def through(access: Access, scope: dict[str, Any]) -> list[MutableMapping[str, Any]]:
    sent: list[MutableMapping[str, Any]] = []

    async def receive() -> MutableMapping[str, Any]:
        return {"type": "http.disconnect"}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    asyncio.run(access({"headers": [], "method": "GET", "path": "/", "scheme": "http", **scope}, receive, send))
    return sent


async def app(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "passed"})


@pytest.mark.parametrize(
    ("scope", "passes"),
    [
        ({"type": "http", "path": "/health"}, True),
        ({"type": "http", "path": "/health", "method": "HEAD"}, True),
        ({"type": "http", "path": "/health", "method": "POST"}, False),
        ({"type": "http", "path": "/health/"}, False),
        ({"type": "http", "path": "/v1/models"}, False),
        ({"type": "http", "path": "/v1/models", "headers": [KEY]}, True),
        ({"type": "http", "path": "/v1/models", "headers": [KEY, (b"origin", b"http://a.example")]}, True),
        ({"type": "http", "path": "/v1/models", "headers": [(b"Authorization", b"bearer sk-1")]}, True),
        ({"type": "http", "path": "/v1/models", "headers": [(b"authorization", b"Bearer sk-12")]}, False),
        ({"type": "http", "path": "/v1/models", "headers": [(b"authorization", b"Basic sk-1")]}, False),
        ({"type": "http", "path": "/v1/models", "headers": [(b"authorization", b"Bearer ")]}, False),
        ({"type": "websocket", "path": "/v1/realtime", "headers": [KEY]}, False),
        ({"type": "lifespan"}, True),
    ],
)
def test_with_a_key(scope: dict[str, Any], passes: bool) -> None:
    sent = through(Access(app, "sk-1", "0.0.0.0"), scope)
    assert (sent == [{"type": "passed"}]) is passes
    if not passes and scope["type"] == "http":
        assert sent[0]["status"] == 401 and json.loads(sent[1]["body"])["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    ("headers", "passes"),
    [
        ({"host": "127.0.0.1:80"}, True),
        ({"host": "127.0.0.2"}, True),
        ({"host": "box.example:80"}, True),
        ({"host": "other.example:80"}, False),
        ({}, False),
        ({"host": "localhost", "origin": "http://localhost"}, True),
        ({"host": "localhost", "origin": "https://localhost"}, False),
        ({"host": "localhost", "origin": "http://localhost:81"}, False),
    ],
)
def test_without_a_key(headers: dict[str, str], passes: bool) -> None:
    scope = {"type": "http", "headers": [(name.encode(), value.encode()) for name, value in headers.items()]}
    sent = through(Access(app, None, "Box.example"), scope)
    assert (sent == [{"type": "passed"}]) is passes
    assert passes or sent[0]["status"] == 403
