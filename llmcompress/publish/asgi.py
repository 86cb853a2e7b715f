"""ASGI's types, and an answer in the shape of the OpenAI API."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

TYPES = {404: "not_found_error", 429: "rate_limit_error"}
"""The error types of the API by status; any other 4xx is an invalid request, any 5xx the server's."""


class RefusedRequestError(Exception):
    """A request that is answered with an error: status, message, and the field that is wrong."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Iterable[tuple[bytes, bytes]] = (),
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code, self.headers = message, status, param, code, list(headers)

    async def answer(self, send: Send) -> None:
        """Send it, and end the connection: what is left of the request is not read."""
        body = error_body(self.message, self.status, self.param, self.code)
        await send_json(send, self.status, body, [*self.headers, (b"connection", b"close")])


def error_body(message: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error as the OpenAI API says it."""
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


async def send_json(send: Send, status: int, body: Any, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
    """A whole response with a JSON body."""
    content = json.dumps(body).encode()
    head = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode()), *headers]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": content})


def header(scope: Scope, name: bytes) -> bytes | None:
    """The first value of a request header, or None."""
    return next((value for key, value in scope["headers"] if key.lower() == name), None)
