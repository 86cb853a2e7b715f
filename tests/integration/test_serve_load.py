"""A server under load, a tenth of it hostile: those who ask for what it can give get it, and /health answers at once."""

from __future__ import annotations

import json
import random
import socket
import statistics
import subprocess
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.integration.servers import ask, resident_bytes, start_bounded

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "Where does Maro live?"}]
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{{ a * b }}{% endfor %}{% endfor %}"
HOSTILE: list[tuple[str, object, int]] = [
    (CHAT, {"messages": USER, "chat_template_kwargs": {"chat_template": LOOPS}}, 400),
    (CHAT, {"messages": [{"role": "user", "content": "word " * 200_000}]}, 400),
    (COMPLETIONS, {"prompt": "word " * 1_000_000}, 413),
    (COMPLETIONS, {"prompt": "x", "max_tokens": 1_000_000_000}, 400),
    (COMPLETIONS, {"prompt": "x", "stop": ["stop"] * 10_000}, 400),
    (CHAT, {"messages": USER * 5000}, 400),
    (COMPLETIONS, {"prompt": "x", "n": 1000, "temperature": -1}, 400),
    (COMPLETIONS, b'{"prompt": ' + b"[" * 50_000, 400),
    ("/load_model", {"model": "/etc"}, 404),
    ("/reset", {}, 404),
]


@pytest.mark.slow
def test_two_thousand_requests_a_tenth_of_them_hostile() -> None:
    process, address = start_bounded("bundled/tiny")
    try:
        load(process, address)
    finally:
        process.kill()
        process.wait()


def load(process: subprocess.Popen[str], address: str) -> None:
    draw = random.Random(0)
    number_of_hostile = 200
    orders = [*[None] * 1800, *[HOSTILE[n % len(HOSTILE)] for n in range(number_of_hostile)]]
    draw.shuffle(orders)
    healthy: list[float] = []
    resident = [resident_bytes(process)]
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):
            asked = time.monotonic()
            assert ask(address, "/health")[0] == 200
            healthy.append(time.monotonic() - asked)
            resident.append(resident_bytes(process))

    def order(hostile: tuple[str, object, int] | None) -> tuple[bool, int]:
        if hostile is not None:
            status = ask(address, *hostile[:2])[0]
            assert status == hostile[2], (hostile[0], status)
            return True, status
        body = {"messages": USER, "max_tokens": 4, "temperature": 0, "stream": len(healthy) % 2 == 0}
        status, _, content = ask(address, CHAT, body)
        assert status != 200 or b"chat.completion" in content
        return False, status

    host, port = address.removeprefix("http://").removesuffix("/v1").split(":")
    slow = [socket.create_connection((host, int(port))) for _ in range(60)]
    for client in slow:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n")
    watcher = ThreadPoolExecutor(1)
    watching = watcher.submit(watch)
    began = time.monotonic()
    with ThreadPoolExecutor(32) as pool:
        statuses = Counter(pool.map(order, orders))
    seconds = time.monotonic() - began
    ended.set()
    watching.result()
    for client in slow:
        client.close()
    p99 = statistics.quantiles(healthy, n=100)[98]
    figures = {
        "requests_per_second": round(len(orders) / seconds, 1),
        "health_p50_ms": round(1000 * statistics.median(healthy), 1),
        "health_p99_ms": round(1000 * p99, 1),
        "health_max_ms": round(1000 * max(healthy), 1),
        "resident_mb": [round(resident[0] / 1e6), round(max(resident) / 1e6)],
        "statuses": {f"{'hostile' if hostile else 'good'} {status}": n for (hostile, status), n in statuses.items()},
    }
    print(json.dumps(figures))  # noqa: T201 - the figures are what it is run for, with -s
    assert p99 < 1
    assert max(resident) - resident[0] < 500_000_000
    assert statuses[False, 200] == 1800, "errors are for the hostile ones alone"
