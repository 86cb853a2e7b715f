"""The front before another engine's app, as vLLM loads it: by its import path, with its settings in the environment."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmcompress.publish.auth import VARIABLE
from llmcompress.publish.bounds import Served
from llmcompress.publish.front import SETTINGS, FrontSettings
from llmcompress.publish.limits import ServerLimits
from tests.integration.servers import ask, wait_for

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

LIKE_VLLM = """
import importlib, json, os, sys
import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

async def health(request):
    return JSONResponse({})

async def completions(request):
    body = await request.json()
    async def pieces():
        for _ in range(body["max_tokens"]):
            yield b"x" * 262144
    return StreamingResponse(pieces())

app = Starlette(routes=[Route("/health", health, methods=["GET"]), Route("/v1/completions", completions, methods=["POST"]),
                        Route("/tokenize", health)])
module, _, name = sys.argv[1].rpartition(".")
app.add_middleware(getattr(importlib.import_module(module), name))
port = int(sys.argv[2])
print(json.dumps({"address": f"http://127.0.0.1:{port}/v1"}), flush=True)
uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")
"""


@pytest.fixture
def like_vllm(finished: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[subprocess.Popen[str], str]]:
    from llmcompress.publish.serve import free_port

    limits = ServerLimits(write_seconds=1, header_seconds=1)
    served = Served(name="small", engine="vllm", limits=limits)
    settings = FrontSettings(folder=finished, trust_remote_code=False, host="127.0.0.1", served=served)
    monkeypatch.setenv(SETTINGS, settings.model_dump_json())
    monkeypatch.setenv(VARIABLE, "sk-1")
    front = "llmcompress.publish.front.Front"
    process, address = wait_for([sys.executable, "-c", LIKE_VLLM, front, str(free_port("127.0.0.1", 0))])
    yield process, address
    process.kill()
    process.wait()


def test_another_engines_app_behind_the_front(like_vllm: tuple[subprocess.Popen[str], str]) -> None:
    address = like_vllm[1]
    key = {"authorization": "Bearer sk-1"}
    assert ask(address, "/v1/models")[0] == 401 and ask(address, "/v1/models", **key)[0] == 200
    assert ask(address, "/tokenize", **key)[0] == 404
    assert ask(address, "/health", method="HEAD")[::2] == (200, b"")
    assert ask(address, "/v1/completions", {"prompt": "w1 w2", "max_tokens": 3}, **key)[2] == b"x" * 262144 * 3
    assert ask(address, "/v1/completions", {"prompt": "w1", "max_tokens": 1 << 40}, **key)[0] == 400
    reader_that_stops(address)
    assert ask(address, "/health")[0] == 200


def reader_that_stops(address: str) -> None:
    """Who asks for much and reads nothing is dropped."""
    host, port = address.removeprefix("http://").removesuffix("/v1").split(":")
    client = socket.create_connection((host, int(port)), timeout=10)
    body = b'{"prompt": "w1", "max_tokens": 120}'
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer sk-1\r\ncontent-type: application/json\r\n"
    )
    client.sendall(head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body)
    time.sleep(2.5)
    received = 0
    try:
        while piece := client.recv(1 << 20):
            received += len(piece)
    except ConnectionResetError:
        pass
    assert received < 100 * 262144, "what the kernel held, and no more"
    client.close()
