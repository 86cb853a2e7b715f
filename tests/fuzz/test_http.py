"""Bodies that nobody would send: each gets an answer in the API's shape, and no engine sees what was not checked."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import MutableMapping
from typing import Any

import pytest

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from llmcompress.publish.auth import Access  # noqa: E402
from llmcompress.publish.bounds import Bounds, Served  # noqa: E402
from llmcompress.publish.fields import ROUTES, rules  # noqa: E402
from llmcompress.publish.limits import ServerLimits  # noqa: E402
from llmcompress.publish.requests import CheckedRequest  # noqa: E402

LIMITS = ServerLimits(max_body_bytes=4096, max_messages=8, max_tools=4)
EXAMPLES = int(os.environ.get("LLMCOMPRESS_FUZZ_EXAMPLES", "150"))
CONTEXT = 1000


class Characters:
    """A token a character."""

    context = CONTEXT

    def check_tokens(self, request: CheckedRequest) -> None:
        json.dumps(request.body)

    def count(self, request: CheckedRequest) -> int:
        return len(str(request.body.get("prompt", request.body.get("messages"))))


def ask(route: str, content: bytes, engine: Any, headers: list[tuple[bytes, bytes]]) -> tuple[int, bytes, list[Any]]:
    """Status and content of the answer, and the bodies that the engine got."""
    seen: list[Any] = []
    sent: list[MutableMapping[str, Any]] = []
    pieces = [content[:7], content[7:]]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(json.loads((await receive())["body"]))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    async def receive() -> MutableMapping[str, Any]:
        if pieces:
            return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    async def run() -> None:
        bounds = Bounds(app, Served(name="m", engine=engine, limits=LIMITS), Characters())
        scope = {"type": "http", "method": "POST", "path": route, "scheme": "http", "headers": headers}
        await asyncio.wait_for(Access(bounds, None, "127.0.0.1")(scope, receive, send), 10)
        bounds._counting.shutdown()

    asyncio.run(run())
    return sent[0]["status"], sent[1]["body"], seen


def judge(route: str, content: bytes, engine: Any, headers: list[tuple[bytes, bytes]] | None = None) -> None:
    """An answer in the API's shape; what the engine got is within the bounds."""
    ours = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    status, answer, seen = ask(route, content, engine, headers if headers is not None else ours)
    if status == 200:
        assert len(seen) == 1
        assert seen[0].keys() <= {"model", "messages", "prompt", *rules(route, engine)}  # type: ignore[arg-type]
        most = seen[0].get("max_completion_tokens", seen[0].get("max_tokens"))
        assert 1 <= most <= CONTEXT and seen[0]["model"] == "m"
        assert "chat_template" not in seen[0] and 0 <= seen[0].get("temperature", 1) <= 2
    else:
        assert 400 <= status < 500 and not seen
        error = json.loads(answer)["error"]
        assert error.keys() == {"message", "type", "param", "code"} and len(error["message"]) < 1000


NUMBERS = st.integers() | st.floats(allow_nan=True) | st.sampled_from([0, 1, -1, 1e9, 1 << 70, 0.5, True])
PLAIN = st.none() | st.booleans() | NUMBERS | st.text(max_size=20)
JSON = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=12)  # fmt: skip
NAMES = sorted({name for route in ROUTES for engine in ("vllm", "transformers") for name in rules(route, engine)})  # type: ignore[arg-type]
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "root"]) | JSON, "content": st.text(max_size=30) | JSON},
    optional={"name": JSON, "tool_calls": JSON, "tool_call_id": JSON, "x": JSON},
)
BODY = st.fixed_dictionaries(
    {"messages": st.lists(MESSAGE | JSON, max_size=4) | JSON, "prompt": st.text(max_size=40) | JSON},
    optional=dict.fromkeys([*NAMES, "model", "chat_template"], PLAIN | JSON),
)
ONE_ROUTE = st.sampled_from(ROUTES)
ENGINES = st.sampled_from(["transformers", "vllm"])


@settings(max_examples=EXAMPLES, deadline=None)
@given(route=ONE_ROUTE, engine=ENGINES, content=st.binary(max_size=200))
def test_bytes(route: str, engine: str, content: bytes) -> None:
    judge(route, content, engine)


@settings(max_examples=EXAMPLES, deadline=None)
@given(route=ONE_ROUTE, engine=ENGINES, body=BODY, drop=st.booleans())
def test_fields_with_any_value(route: str, engine: str, body: dict[str, Any], drop: bool) -> None:
    if drop:
        body.pop("prompt" if route == ROUTES[0] else "messages")
    judge(route, json.dumps(body).encode(), engine)


@settings(max_examples=EXAMPLES, deadline=None)
@given(route=ONE_ROUTE, engine=ENGINES, body=BODY, data=st.data())
def test_a_body_that_was_cut_or_changed(route: str, engine: str, body: dict[str, Any], data: st.DataObject) -> None:
    content = bytearray(json.dumps(body).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    judge(route, bytes(content), engine)


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    headers=st.lists(
        st.tuples(
            st.sampled_from(
                [b"host", b"origin", b"content-type", b"content-encoding", b"sec-fetch-site", b"authorization"]
            ),
            st.sampled_from([b"localhost", b"application/json", b"gzip", b"null", b"[::1", b"[", b":", b"identity"])
            | st.binary(max_size=20),
        ),
        max_size=6,
    )
)
def test_headers(headers: list[tuple[bytes, bytes]]) -> None:
    judge(ROUTES[1], b'{"prompt": "x"}', "transformers", headers)
