"""Connections that take their time: what no ASGI app sees, since it is called once a request's header is there.

uvicorn waits for a header as long as its sender likes, and for a client to read its answer as long. Its protocols are
given what they lack, in whichever server runs them (transformers', vLLM's): a time and a size for a header, a time in
which a client must go on reading, a number of connections, and JSON for a request that is no HTTP.
"""

from __future__ import annotations

import asyncio
import json
from importlib import import_module
from typing import Any

from llmcompress.publish.asgi import error_body
from llmcompress.publish.limits import ServerLimits

PROTOCOLS = (
    ("uvicorn.protocols.http.h11_impl", "H11Protocol"),
    ("uvicorn.protocols.http.httptools_impl", "HttpToolsProtocol"),
)
REASONS = {
    400: "Bad Request",
    408: "Request Timeout",
    431: "Request Header Fields Too Large",
    503: "Service Unavailable",
}


def bound_connections(limits: ServerLimits) -> None:
    """Bound the connections of every uvicorn server that this process starts from now on."""
    for module, name in PROTOCOLS:
        try:
            protocol = getattr(import_module(module), name)
        except ImportError:
            continue  # httptools is not installed
        _bound(protocol, limits)


def _bound(protocol: Any, limits: ServerLimits) -> None:
    """Wrap what uvicorn calls on a connection: `protocol` is the class of all of them."""
    made, received, paused, resumed = (
        protocol.connection_made,
        protocol.data_received,
        protocol.pause_writing,
        protocol.resume_writing,
    )
    lost = protocol.connection_lost

    def connection_made(self: Any, transport: asyncio.Transport) -> None:
        made(self, transport)
        self.bound_timer, self.bound_writer, self.bound_header_bytes = None, None, 0
        if len(self.connections) > limits.max_connections:
            _refuse(self, 503, "Too many connections.")
        else:
            _start_timer(self)

    def data_received(self: Any, data: bytes) -> None:
        if self.transport.is_closing():
            return
        received(self, data)
        if self.cycle is not None and not self.cycle.response_complete:
            _stop_timer(self)  # the header is there; its body has a time of its own (bounds.py)
            return
        self.bound_header_bytes += len(data)
        if self.bound_header_bytes > limits.max_header_bytes:
            _refuse(self, 431, f"The header is larger than {limits.max_header_bytes} bytes.")
        elif self.bound_timer is None:
            _start_timer(self)

    def connection_lost(self: Any, error: Exception | None) -> None:
        _stop_timer(self)
        resume_writing(self)
        lost(self, error)

    def pause_writing(self: Any) -> None:
        paused(self)
        self.bound_writer = asyncio.get_running_loop().call_later(limits.write_seconds, self.transport.abort)

    def resume_writing(self: Any) -> None:
        if self.bound_writer is not None:
            self.bound_writer.cancel()
            self.bound_writer = None
        resumed(self)

    def send_400_response(self: Any, message: str) -> None:
        _refuse(self, 400, message)

    def _start_timer(self: Any) -> None:
        message = f"The header did not arrive in {limits.header_seconds:g} seconds."
        loop = asyncio.get_running_loop()
        self.bound_timer = loop.call_later(limits.header_seconds, _refuse, self, 408, message)

    def _stop_timer(self: Any) -> None:
        if self.bound_timer is not None:
            self.bound_timer.cancel()
        self.bound_timer, self.bound_header_bytes = None, 0

    for function in (connection_made, data_received, connection_lost, pause_writing, resume_writing, send_400_response):
        setattr(protocol, function.__name__, function)


def _refuse(protocol: Any, status: int, message: str) -> None:
    """Say why and close; a client that reads nothing is not waited for."""
    transport = protocol.transport
    if transport.is_closing():
        return
    if protocol.cycle is None or protocol.cycle.response_complete:
        body = json.dumps(error_body(message, status)).encode()
        head = (
            f"HTTP/1.1 {status} {REASONS[status]}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        )
        transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
    transport.close()
    asyncio.get_running_loop().call_later(1, transport.abort)
