"""Who may ask: with a key whoever sends it, without one only a program on this machine.

    request ──> Access ── GET /health ─────────────────────> app
                  ├──── key set:  Authorization: Bearer KEY ─> app, else 401
                  └──── no key:   Host and Origin are ours ──> app, else 403

Without a key a server listens on loopback alone, and the one stranger who can still reach it is a web page in a browser
on this machine. It comes under a foreign name that was made to resolve to 127.0.0.1 (DNS rebinding: the Host header
keeps that name), or across sites (the browser says so in Origin and Sec-Fetch-Site). Both are refused.
"""

from __future__ import annotations

import hmac
import ipaddress

from llmcompress.publish.asgi import App, Receive, RefusedRequestError, Scope, Send, header

VARIABLE = "LLMCOMPRESS_API_KEY"
HEALTH = "/health"
"""The route that needs no key: what a load balancer or a container's health check asks."""


class Access:
    """ASGI middleware; `key` None: no key is asked for, and only this machine's own programs may ask.

    `host`: the address that the server listens on, which clients without a key may name in their Host header too.
    """

    def __init__(self, app: App, key: str | None, host: str) -> None:
        self._app = app
        self._key = key.encode() if key else None
        self._host = host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request pass, or answer it with 401 or 403."""
        if scope["type"] == "http":
            try:
                self._check(scope)
            except RefusedRequestError as refused:
                await refused.answer(send)
                return
        elif scope["type"] != "lifespan":
            await send({"type": "websocket.close", "code": 1008})
            return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        if self._key is None:
            self._check_local(scope)
        elif scope["path"] != HEALTH or scope["method"] not in ("GET", "HEAD"):
            kind, _, key = (header(scope, b"authorization") or b"").partition(b" ")
            if kind.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self._key):
                raise RefusedRequestError(
                    "Incorrect API key provided.",
                    status=401,
                    code="invalid_api_key",
                    headers=[(b"www-authenticate", b"Bearer")],
                )

    def _check_local(self, scope: Scope) -> None:
        host = (header(scope, b"host") or b"").decode("latin-1")
        name = host_name(host)
        if not (is_loopback(name) or name == self._host.lower()):
            raise RefusedRequestError(f"Host {host!r} is not this server's.", status=403, code="host_not_allowed")
        origin = header(scope, b"origin")
        same = origin is None or origin.decode("latin-1").lower() == f"{scope.get('scheme', 'http')}://{host}".lower()
        if not same or header(scope, b"sec-fetch-site") not in (None, b"same-origin", b"none"):
            raise RefusedRequestError(
                "A server without an API key takes no requests of web pages.", status=403, code="origin_not_allowed"
            )


def host_name(host: str) -> str:
    """The name in a Host header, without its port.

    >>> host_name("localhost:8000"), host_name("[::1]:8000"), host_name("127.0.0.1"), host_name("a.example:80")
    ('localhost', '::1', '127.0.0.1', 'a.example')
    """
    name = host.partition("]")[0].removeprefix("[") if host.startswith("[") else host.rpartition(":")[0] or host
    return name.lower()


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`.

    >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("0.0.0.0"), is_loopback("example.org")
    (True, True, False, False)
    """
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
