"""The bounds with an engine that counts: queue, memory, time, and what each engine takes."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Coroutine, MutableMapping
from typing import Any

import pytest

from llmcompress.publish.asgi import RefusedRequestError
from llmcompress.publish.bounds import Bounds, Served
from llmcompress.publish.fields import CHAT, COMPLETIONS, ROUTES, Engine, rules
from llmcompress.publish.limits import ServerLimits
from llmcompress.publish.requests import CheckedRequest, check, parse

Message = MutableMapping[str, Any]


class Words:
    """Counts words; `hold` makes it slow."""

    def __init__(self, context: int | None = 100, seconds: float = 0.0) -> None:
        self.context, self._seconds = context, seconds

    def check_tokens(self, request: CheckedRequest) -> None:
        pass

    def count(self, request: CheckedRequest) -> int:
        time.sleep(self._seconds)
        return len(str(request.body["prompt"]).split())


class Engineered:
    """An engine that notes what it gets and answers when it is let."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.go = asyncio.Event()
        self.most, self._running = 0, 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        self.bodies.append(json.loads(message["body"]))
        assert dict(scope["headers"])[b"content-length"] == str(len(message["body"])).encode()
        self._running += 1
        self.most = max(self.most, self._running)
        await self.go.wait()
        self._running -= 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


class Client:
    """One request; `left` ends its connection."""

    def __init__(self, prompt: str = "a b", pieces: list[bytes] | None = None, **more: Any) -> None:
        self.pieces = pieces if pieces is not None else [json.dumps({"prompt": prompt} | more).encode()]
        self.sent: list[Message] = []
        self.left = asyncio.Event()

    async def receive(self) -> Message:
        if self.pieces:
            piece = self.pieces.pop(0)
            return {"type": "http.request", "body": piece, "more_body": bool(self.pieces)}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    @property
    def status(self) -> int | None:
        return self.sent[0]["status"] if self.sent else None

    def scope(self, **headers: str) -> dict[str, Any]:
        named = {"content-type": "application/json"} | headers
        pairs = [(name.encode(), value.encode()) for name, value in named.items()]
        return {"type": "http", "method": "POST", "path": COMPLETIONS, "headers": pairs}


def bounded(engine: Engineered, counter: Words | None = None, **limits: Any) -> Bounds:
    served = Served(name="m", engine="transformers", limits=ServerLimits(**limits))
    return Bounds(engine, served, counter or Words())


def in_a_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run() -> None:
        asyncio.run(asyncio.wait_for(test(), 20))

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


def begin(bounds: Bounds, client: Client) -> asyncio.Task[None]:
    return asyncio.create_task(bounds(client.scope(), client.receive, client.send))


@in_a_loop
async def test_so_many_run_so_many_wait_and_the_rest_is_429() -> None:
    engine = Engineered()
    bounds = bounded(engine, max_running=2, max_waiting=3)
    clients = [Client() for _ in range(9)]
    tasks = [begin(bounds, client) for client in clients]
    await asyncio.sleep(0.3)
    refused = [client for client in clients if client.status == 429]
    assert len(refused) >= 4 and all(dict(client.sent[0]["headers"])[b"retry-after"] for client in refused)
    engine.go.set()
    await asyncio.gather(*tasks)
    assert engine.most <= 2 and len(engine.bodies) + len(refused) == 9
    assert all(client.status == 200 for client in clients if client not in refused)


@in_a_loop
async def test_who_leaves_while_waiting_is_not_run_and_holds_no_place() -> None:
    engine = Engineered()
    bounds = bounded(engine, max_running=1)
    clients = [Client(prompt=f"p{n}") for n in range(4)]
    tasks = [begin(bounds, client) for client in clients]
    await asyncio.sleep(0.2)
    for client in clients[1:3]:
        client.left.set()
    await asyncio.sleep(0.1)
    assert tasks[1].done() and tasks[2].done()
    engine.go.set()
    await asyncio.gather(*tasks)
    assert [body["prompt"] for body in engine.bodies] == ["p0", "p3"]
    assert bounds._num_waiting == bounds._pending_bytes == 0 and bounds._running._value == 1


@in_a_loop
async def test_waiting_counting_and_sending_have_an_end() -> None:
    engine = Engineered()
    bounds = bounded(engine, max_running=1, queue_seconds=0.1)
    first, second = Client(), Client()
    tasks = [begin(bounds, first)]
    await asyncio.sleep(0.1)
    await begin(bounds, second)
    assert second.status == 429 and first.status is None
    engine.go.set()
    await tasks[0]
    assert first.status == 200
    slow = Client()
    await begin(bounded(engine, Words(seconds=0.4), count_seconds=0.1), slow)
    assert slow.status == 429
    halting = Client(pieces=[b"{", b"never"])
    halting.pieces.pop()
    halting.pieces = [b"{"]

    async def never() -> Message:
        if halting.pieces:
            return {"type": "http.request", "body": halting.pieces.pop(), "more_body": True}
        await asyncio.sleep(60)
        raise AssertionError

    await bounded(engine, body_seconds=0.1)(halting.scope(), never, halting.send)
    assert halting.status == 408


@in_a_loop
async def test_all_bodies_together_have_a_bound() -> None:
    engine = Engineered()
    bounds = bounded(engine, max_pending_bytes=1024, max_running=1)
    big = "x" * 700
    first, second = Client(prompt=big), Client(prompt=big)
    task = begin(bounds, first)
    await asyncio.sleep(0.1)
    await begin(bounds, second)
    assert second.status == 429
    engine.go.set()
    await task
    third = Client(prompt=big)
    await begin(bounds, third)
    assert first.status == third.status == 200 and bounds._pending_bytes == 0


@in_a_loop
async def test_a_body_too_large_is_413_whether_it_says_so_or_not() -> None:
    engine = Engineered()
    for headers in ({"content-length": "3000"}, {}, {"content-length": "3000", "expect": "100-continue"}):
        client = Client(pieces=[b"x" * 1000] * 3)
        bounds = bounded(engine, max_body_bytes=2000)
        await bounds(client.scope(**headers), client.receive, client.send)
        assert client.status == 413 and bounds._pending_bytes == 0
        assert len(client.pieces) == (3 if "expect" in headers else 0), "read to its end, but for who asks first"
    endless = Client(pieces=[b"x" * 1000] * 1000)
    await bounded(engine, max_body_bytes=1024)(endless.scope(), endless.receive, endless.send)
    assert endless.status == 413 and len(endless.pieces) > 900


@in_a_loop
async def test_how_many_tokens_the_engine_may_write() -> None:
    engine = Engineered()
    engine.go.set()
    for prompt, more, limits, expected in [
        ("a b", {}, {}, 98),
        ("a b", {}, {"default_output_tokens": 7}, 7),
        ("a b", {}, {"max_output_tokens": 5}, 5),
        ("a b", {"max_tokens": 98}, {}, 98),
        ("a b", {"max_tokens": 99}, {}, None),
        ("a " * 100, {}, {}, None),
        ("a " * 99, {}, {}, 1),
    ]:
        client = Client(prompt, **more)
        await begin(bounded(engine, **limits), client)
        assert client.status == (200 if expected else 400)
        if expected:
            assert engine.bodies.pop()["max_tokens"] == expected
    unbounded = Client()
    await begin(bounded(engine, Words(context=None)), unbounded)
    assert engine.bodies.pop()["max_tokens"] == 1024


LIMITS = ServerLimits()
ASKED = {CHAT: {"messages": [{"role": "user", "content": "x"}]}, COMPLETIONS: {"prompt": "x"}}


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("value", [1 << 80, 1e300, "x" * 10_000, [[]], {"": {}}], ids=str)
def test_no_field_takes_anything_at_all(engine: Engine, route: Any, value: Any) -> None:
    for name in rules(route, engine):
        if name in ("tool_choice", "response_format") and engine == "vllm":
            continue  # vLLM reads these itself
        with pytest.raises(RefusedRequestError) as refused:
            check(ASKED[route] | {name: value}, route, "m", engine, LIMITS)
        assert refused.value.param == name and refused.value.status == 400


@pytest.mark.parametrize(
    ("route", "more"),
    [
        (CHAT, {"n": 4, "logprobs": True, "top_logprobs": 5, "response_format": {"type": "json_object"}, "top_k": 40}),
        (CHAT, {"messages": [{"role": "user", "name": "a", "content": "x"}], "tool_choice": "none", "min_p": 0.1}),
        (COMPLETIONS, {"prompt": ["a", "b"], "echo": True, "logprobs": 2, "presence_penalty": -1, "min_tokens": 3}),
        (COMPLETIONS, {"prompt": [1, 2, 3], "ignore_eos": True, "stop_token_ids": [2], "repetition_penalty": 1.1}),
        (COMPLETIONS, {"prompt": [[1, 2], [3]], "stream": True, "stream_options": {"include_usage": True}}),
    ],
)
def test_vllm_takes_more_and_gets_it(route: Any, more: dict[str, Any]) -> None:
    body = ASKED[route] | more
    assert check(body, route, "m", "vllm", LIMITS).body == body | {"model": "m"}
    with pytest.raises(RefusedRequestError):
        check(body, route, "m", "transformers", LIMITS)


@pytest.mark.parametrize(
    "prompt", [[], [[]], [["a"]], ["a"] * 9, [1, "a"], ["a", 1], [-1], [True], [1 << 40], {}, None, 1]
)
def test_a_prompt_that_is_none(prompt: Any) -> None:
    with pytest.raises(RefusedRequestError, match="prompt"):
        check({"prompt": prompt}, COMPLETIONS, "m", "vllm", LIMITS)


def test_nulls_are_absent_and_numbers_that_json_lacks_are_refused() -> None:
    assert parse(b'{"a": null, "b": 0}') == {"b": 0}
    for content in (b'{"a": Infinity}', b'{"a": -Infinity}', b'{"a": NaN}'):
        with pytest.raises(RefusedRequestError, match="no JSON number"):
            parse(content)
