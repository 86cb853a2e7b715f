"""A small checkpoint to serve, and the process that serves it."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

WITH_LIMITS = """
import json, sys
from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.publish import serve
from llmcompress.publish.limits import ServerLimits

port = serve.free_port("127.0.0.1", 0)
print(json.dumps({"address": f"http://127.0.0.1:{port}/v1"}), flush=True)
limits = ServerLimits.model_validate_json(sys.argv[2])
checkpoint = Checkpoint.open(sys.argv[1])
serve.run(checkpoint, "transformers", "tiny", host="127.0.0.1", port=port, key=None, limits=limits)
"""


def quantized(place: Path) -> Path:
    """The bundled model in four bits, as a folder in `place`."""
    from llmcompress.config.recipe import Recipe
    from llmcompress.console import Silent
    from llmcompress.pipeline.run import run

    stages = [{"quantize": {"scheme": "NF4", "method": "rtn"}}]
    run(Recipe.of({"model": "bundled/tiny", "output": str(place / "tiny-nf4"), "stages": stages}), Silent())
    return place / "tiny-nf4"


def start(folder: Path, *words: object) -> tuple[subprocess.Popen[str], str]:
    """A process of `llmcompress serve` that answers, and its address."""
    return wait_for(
        [sys.executable, "-m", "llmcompress", "serve", str(folder), "--port", "0", "--json", *map(str, words)]
    )


def start_bounded(model: str, **limits: Any) -> tuple[subprocess.Popen[str], str]:
    """A server of `model`, called tiny, without a key and with other bounds."""
    return wait_for([sys.executable, "-c", WITH_LIMITS, model, json.dumps(limits)])


def wait_for(command: list[str]) -> tuple[subprocess.Popen[str], str]:
    """A process that prints its address as JSON, once it answers there."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    line = process.stdout.readline()
    assert line, process.stderr.read()
    threading.Thread(target=process.stderr.read, daemon=True).start()
    address = str(json.loads(line)["address"])
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(address.removesuffix("/v1") + "/health", timeout=2).read()
            return process, address
        except OSError:
            assert process.poll() is None, "the server ended before it answered"
            time.sleep(0.2)
    raise AssertionError("the server did not answer in two minutes")


def ask(
    address: str, path: str, body: object = None, method: str | None = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and content of one request over a connection of its own; `body`: bytes, or what becomes JSON."""
    host, port = address.removeprefix("http://").removesuffix("/v1").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=120)
    content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    if content is not None:
        named = {"content-type": "application/json"} | named
    try:
        connection.request(method or ("GET" if content is None else "POST"), path, content, named)
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def resident_bytes(process: subprocess.Popen[str]) -> int:
    """Memory of a process that is resident, in bytes."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) * 1024
