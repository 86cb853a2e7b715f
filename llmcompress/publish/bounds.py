"""Bounds in front of an engine: what is asked of it is small enough, known, and not too much at once.

    request ─> route? ─> body, bounded in bytes and time ─> fields ─> place in the queue ─> prompt fits? ─> engine
                404        413 · 408 · 415                   400         429, Retry-After      400

One ASGI middleware for every engine: transformers' app gets it in process, vLLM takes it by its import path. It answers
`/v1/models` itself, with the one model that is served; everything else that is not in `ROUTES` does not exist. Prompts
are counted in a thread of their own, so that `/health` answers while a long one is counted. An answer is passed on
piece by piece as the engine gives it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict

from llmcompress.publish.asgi import App, Message, Receive, RefusedRequestError, Scope, Send, header, send_json
from llmcompress.publish.auth import HEALTH
from llmcompress.publish.fields import ROUTES, Engine, Route
from llmcompress.publish.limits import ServerLimits
from llmcompress.publish.requests import CheckedRequest, check, parse

MODELS = "/v1/models"
RUNS_TOGETHER: dict[Engine, int] = {"transformers": 2, "vllm": 256}
"""Requests that an engine works on at once: transformers' one after the other, with the next one ready."""
ENGINE_ROUTES: dict[Engine, tuple[str, ...]] = {"transformers": (), "vllm": ("/metrics", "/version")}
"""What an engine answers to GET besides."""
DRAINED_BODIES = 64
"""Of a body that is too large so many times the allowed bytes are read and dropped, so that its sender sees why."""


class Served(BaseModel):
    """What is served: the name that clients call it by, the engine, the bounds."""

    model_config = ConfigDict(frozen=True)

    name: str
    engine: Engine
    limits: ServerLimits = ServerLimits()


class Counter(Protocol):
    """What counts prompts (tokens.PromptCounter)."""

    context: int | None

    def check_tokens(self, request: CheckedRequest) -> None:
        """Raise RefusedRequestError for tokens and template variables that the model does not have."""

    def count(self, request: CheckedRequest) -> int:
        """Tokens of the longest prompt."""


class Bounds:
    """ASGI middleware that lets through what an engine can answer, within `served.limits`."""

    def __init__(self, app: App, served: Served, counter: Counter) -> None:
        self._app, self._served, self._limits, self._counter = app, served, served.limits, counter
        self._running = asyncio.Semaphore(self._limits.max_running or RUNS_TOGETHER[served.engine])
        self._num_waiting = 0
        self._pending_bytes = 0
        self._counting = ThreadPoolExecutor(1, thread_name_prefix="count-tokens")
        self._created = int(time.time())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request or pass it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            await self._respond(scope, receive, send)
        except RefusedRequestError as refused:
            await refused.answer(send)

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        method, path = scope["method"], scope["path"]
        route = next((known for known in ROUTES if known == path), None)
        readable = (HEALTH, MODELS, f"{MODELS}/{self._served.name}", *ENGINE_ROUTES[self._served.engine])
        allowed = ("POST",) if route else ("GET", "HEAD") if path in readable else ()
        if not allowed:
            raise RefusedRequestError(f"There is no route {path[:100]!r} here.", status=404)
        if method not in allowed:
            allow = (b"allow", ", ".join(allowed).encode())
            raise RefusedRequestError(f"{path} takes {' and '.join(allowed)}.", status=405, headers=[allow])
        if route:
            await self._generate(route, scope, receive, send)
        elif path.startswith(MODELS):
            model = {"id": self._served.name, "object": "model", "created": self._created, "owned_by": "llmcompress"}
            await send_json(send, 200, {"object": "list", "data": [model]} if path == MODELS else model)
        else:
            # An engine that knows no HEAD is asked with GET; the HTTP server leaves the body of an answer to HEAD out.
            await self._app({**scope, "method": "GET"}, receive, send)

    async def _generate(self, route: Route, scope: Scope, receive: Receive, send: Send) -> None:
        incoming = _Body(self, scope, receive)
        try:
            request = check(parse(await incoming.read()), route, self._served.name, self._served.engine, self._limits)
            self._counter.check_tokens(request)
            gone = asyncio.create_task(_next(receive))  # after the body nothing but the end of the connection can come
            try:
                async with self._turn(request, gone) as body:
                    if body is not None:
                        await self._app(_json_scope(scope, body), _replayed(body, gone), send)
            finally:
                gone.cancel()
        finally:
            self._pending_bytes -= incoming.num_bytes

    @asynccontextmanager
    async def _turn(self, request: CheckedRequest, gone: asyncio.Task[Message]) -> AsyncIterator[bytes | None]:
        """The body for the engine once it is this request's turn; None where its client has left."""
        if self._num_waiting >= self._limits.max_waiting:
            raise self._too_many("Too many requests are waiting.")
        self._num_waiting += 1
        turn: asyncio.Task[Any] | None = None
        try:
            try:
                body = await self._fitted(request)
                turn = asyncio.create_task(self._running.acquire())
                await asyncio.wait(
                    {turn, gone}, timeout=self._limits.queue_seconds, return_when=asyncio.FIRST_COMPLETED
                )
            finally:
                self._num_waiting -= 1
            if not turn.done() and not gone.done():
                raise self._too_many(f"The engine had no time in {self._limits.queue_seconds:g} seconds.")
            yield None if gone.done() else body
        finally:
            if turn is not None and not turn.cancel():
                self._running.release()

    async def _fitted(self, request: CheckedRequest) -> bytes:
        """The body for the engine, with as many tokens to write as the context has room for."""
        loop = asyncio.get_running_loop()
        counting = loop.run_in_executor(self._counting, self._counter.count, request)
        try:
            tokens = await asyncio.wait_for(counting, self._limits.count_seconds)
        except TimeoutError:
            raise self._too_many("The tokens of the prompt were not counted in time.") from None
        room = self._limits.max_output_tokens
        if self._counter.context is not None:
            room = min(room, self._counter.context - tokens)
            asked = request.max_tokens or 1
            if asked > self._counter.context - tokens:
                wanted = f" and {request.max_tokens} tokens to write" if request.max_tokens else ""
                raise RefusedRequestError(
                    f"The model's context is {self._counter.context} tokens; this request has {tokens} tokens in its "
                    f"prompt{wanted}.",
                    param="messages" if "messages" in request.body else "prompt",
                    code="context_length_exceeded",
                )
        return request.with_max_tokens(request.max_tokens or min(room, self._limits.default_output_tokens))

    def hold(self, num_bytes: int) -> None:
        """Count bytes of a body that is being read.

        Raises: RefusedRequestError (429) where all bodies together hold too many.
        """
        if self._pending_bytes + num_bytes > self._limits.max_pending_bytes:
            raise self._too_many("Too many request bodies are being read.")
        self._pending_bytes += num_bytes

    def _too_many(self, message: str) -> RefusedRequestError:
        wait = (b"retry-after", str(self._limits.retry_after_seconds).encode())
        return RefusedRequestError(message, status=429, code="rate_limit_exceeded", headers=[wait])


class _Body:
    """The body of one request, read within the bounds; `num_bytes` are counted among all that are held."""

    def __init__(self, bounds: Bounds, scope: Scope, receive: Receive) -> None:
        self._bounds, self._scope, self._receive = bounds, scope, receive
        self._limits = bounds._limits
        self.num_bytes = 0

    async def read(self) -> bytes:
        """All of it.

        Raises: RefusedRequestError: 415 for what is no JSON, 413, 408, 429.
        """
        kind = (header(self._scope, b"content-type") or b"").partition(b";")[0].strip().lower()
        if kind != b"application/json":
            raise RefusedRequestError("The body must be sent with Content-Type: application/json.", status=415)
        if (header(self._scope, b"content-encoding") or b"identity").lower() != b"identity":
            raise RefusedRequestError("A compressed body is not taken.", status=415)
        try:
            return await asyncio.wait_for(self._read(), self._limits.body_seconds)
        except TimeoutError:
            raise RefusedRequestError(
                f"The body did not arrive in {self._limits.body_seconds:g} seconds.", status=408
            ) from None

    async def _read(self) -> bytes:
        most = self._limits.max_body_bytes
        declared = int(header(self._scope, b"content-length") or 0)
        if declared > most and header(self._scope, b"expect") is not None:
            raise self._too_large()
        pieces: list[bytes] = []
        more, seen = True, 0
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise RefusedRequestError("The client left.", status=408)
            piece, more = message.get("body", b""), message.get("more_body", False)
            seen += len(piece)
            if max(seen, declared) > most:
                pieces.clear()
                if seen > most * DRAINED_BODIES:
                    break
            else:
                self._bounds.hold(len(piece))
                self.num_bytes += len(piece)
                pieces.append(piece)
        if max(seen, declared) > most:
            raise self._too_large()
        return b"".join(pieces)

    def _too_large(self) -> RefusedRequestError:
        return RefusedRequestError(f"The body is larger than {self._limits.max_body_bytes} bytes.", status=413)


async def _next(receive: Receive) -> Message:
    return await receive()


def _json_scope(scope: Scope, body: bytes) -> Scope:
    """The scope with the headers of another body."""
    ours = (b"content-length", b"content-type", b"transfer-encoding")
    headers = [(name, value) for name, value in scope["headers"] if name.lower() not in ours]
    headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    return {**scope, "headers": headers}


def _replayed(body: bytes, gone: asyncio.Task[Message]) -> Receive:
    """`receive` of a request whose body was read: that body, then the end of the connection when it comes."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        return messages.pop() if messages else await asyncio.shield(gone)

    return receive
