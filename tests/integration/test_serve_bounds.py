"""What a hostile client tries on a real server: each is refused by name, and the others are answered all the while."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.integration.servers import ask, resident_bytes, start_bounded

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{{ a * b }}{% endfor %}{% endfor %}"
LIMITS = {
    "header_seconds": 1.5,
    "body_seconds": 1.5,
    "max_header_bytes": 16384,
    "max_running": 1,
    "max_waiting": 3,
    "max_connections": 200,
}
CONTEXT = 1024
HUNDRED_MB = 100_000_000


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[subprocess.Popen[str], str]]:
    process, address = start_bounded("bundled/tiny", **LIMITS)
    yield process, address
    process.kill()
    process.wait()


@pytest.fixture
def address(served: tuple[subprocess.Popen[str], str]) -> Iterator[str]:
    """After each abuse the server answers, and what it answers is right."""
    yield served[1]
    assert served[0].poll() is None
    status, _, content = ask(served[1], CHAT, chat(max_tokens=3))
    assert status == 200, content


def chat(text: str = "Where does Maro live?", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]} | more


def completion(prompt: str = "3 plus 4 makes", **more: Any) -> dict[str, Any]:
    return {"prompt": prompt} | more


def refusal(answer: tuple[int, dict[str, str], bytes], status: int = 400) -> dict[str, Any]:
    """The error of an answer, in the API's shape."""
    assert answer[0] == status, answer
    assert answer[1]["content-type"] == "application/json"
    body = json.loads(answer[2])
    assert body.keys() == {"error"} and body["error"].keys() == {"message", "type", "param", "code"}
    return dict(body["error"])


@pytest.mark.parametrize(
    "more",
    [
        {"chat_template_kwargs": {"chat_template": LOOPS}},
        {"chat_template": LOOPS},
        {"chat_template_kwargs": {"chat_template": None}},
    ],
)
def test_a_request_brings_no_template(more: dict[str, Any], address: str) -> None:
    began = time.monotonic()
    assert "chat template" in refusal(ask(address, CHAT, chat(**more)))["message"]
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    "name", ["tokenize", "conversation", "tools", "documents", "return_tensors", "max_length", "x"]
)
def test_what_is_no_variable_of_the_template_is_refused(name: str, address: str) -> None:
    assert refusal(ask(address, CHAT, chat(chat_template_kwargs={name: 1})))["param"] == "chat_template_kwargs"


def test_a_body_of_30_mb_is_refused_and_not_kept(served: tuple[subprocess.Popen[str], str], address: str) -> None:
    before = resident_bytes(served[0])
    body = json.dumps(chat("word " * 6_000_000)).encode()
    assert "1048576 bytes" in refusal(ask(address, CHAT, body), 413)["message"]
    pieces = (body[start : start + 65536] for start in range(0, len(body), 65536))
    status = chunked(address, CHAT, pieces)
    assert status == 413
    assert resident_bytes(served[0]) - before < HUNDRED_MB


def chunked(address: str, path: str, pieces: Iterator[bytes]) -> int:
    import http.client

    connection = http.client.HTTPConnection(address.removeprefix("http://").removesuffix("/v1"), timeout=60)
    connection.request("POST", path, pieces, {"content-type": "application/json"}, encode_chunked=True)
    status = connection.getresponse().status
    connection.close()
    return status


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(path: str, address: str, served: Any) -> None:
    from llmcompress.checkpoint.reader import Checkpoint
    from llmcompress.checkpoint.source import load_tokenizer

    text = "Maro lives in Jarrow. " * 5000
    tokens = len(load_tokenizer(Checkpoint.open("bundled/tiny"))(text)["input_ids"])
    assert tokens > 20 * CONTEXT
    error = refusal(ask(address, path, chat(text) if path == CHAT else completion(text)))
    numbers = [int(word) for word in error["message"].replace(";", "").split() if word.isdigit()]
    assert numbers[0] == CONTEXT and tokens <= numbers[1] < tokens + 20, error
    assert error["code"] == "context_length_exceeded"


def test_a_prompt_and_its_answer_have_to_fit_together(address: str) -> None:
    error = refusal(ask(address, COMPLETIONS, completion(max_tokens=CONTEXT)))
    assert f"context is {CONTEXT} tokens" in error["message"] and f"{CONTEXT} tokens to write" in error["message"]
    status, _, content = ask(address, COMPLETIONS, completion("Maro lives in Jarrow. " * 190, temperature=0))
    usage = json.loads(content)["usage"]
    assert status == 200 and usage["total_tokens"] <= CONTEXT


OUT_OF_RANGE: list[tuple[str, Any]] = [
    ("max_tokens", 1_000_000_000), ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", 1.5), ("max_tokens", True),
    ("max_tokens", "9"), ("n", 1000), ("n", 0), ("n", 2), ("temperature", -1), ("temperature", 2.1), ("temperature", 1e-30),
    ("temperature", "hot"), ("top_p", 5), ("top_p", 0), ("top_p", -0.1), ("top_p", True), ("stop", ["x"] * 10_000), ("stop", "x" * 10_000),
    ("stop", [""]), ("stop", [1]), ("seed", 1 << 70), ("seed", "x"), ("stream", "yes"), ("frequency_penalty", -1),
    ("presence_penalty", 1), ("user", 3), ("no_such_field", 1), ("top_k", 3), ("generation_config", "{}"),
    ("stream_options", {"include_usage": True}), ("model", 3),
]  # fmt: skip
OF_CHAT: list[tuple[str, Any]] = [
    ("max_completion_tokens", 1_000_000_000), ("logprobs", True), ("top_logprobs", 5), ("response_format", {"type": "json_object"}),
    ("tools", [{"type": "function"}]), ("tools", [{"type": "function", "function": {"name": "f"}}] * 1000), ("tool_choice", "required"),
    ("logit_bias", {"1": 1000}), ("logit_bias", {"x": 1}), ("logit_bias", {"1000000": 1}), ("logit_bias", {str(n): 1 for n in range(1000)}),
    ("functions", []), ("audio", {}), ("modalities", ["audio"]), ("store", True), ("chat_template_kwargs", 3),
    ("messages", []), ("messages", "x"), ("messages", [{"role": "user", "content": "x"}] * 10_000), ("messages", [3]),
    ("messages", [{"role": "root", "content": "x"}]), ("messages", [{"role": "user"}]), ("messages", [{"content": "x"}]),
    ("messages", [{"role": "user", "content": 3}]), ("messages", [{"role": "user", "content": [3]}]),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]),
    ("messages", [{"role": "user", "content": "x", "extra": 1}]), ("messages", [{"role": "user", "content": "x", "tool_calls": [1]}]),
    ("messages", [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]),
]  # fmt: skip
OF_COMPLETIONS: list[tuple[str, Any]] = [("best_of", 2), ("echo", True), ("logprobs", 3), ("suffix", "x"), ("prompt", 3), ("prompt", ["x", "y"]), ("prompt", [1, 2])]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "name", "value"),
    [(COMPLETIONS, *case) for case in [*OUT_OF_RANGE, *OF_COMPLETIONS]] + [(CHAT, *case) for case in OF_CHAT],
    ids=lambda value: str(value)[:24],
)
def test_what_is_out_of_range_or_not_supported_is_refused_by_name(
    path: str, name: str, value: Any, served: tuple[subprocess.Popen[str], str]
) -> None:
    began = time.monotonic()
    body = (chat() if path == CHAT else completion()) | {name: value}
    error = refusal(ask(served[1], path, body), 404 if name == "model" else 400)
    assert str(error["param"]).startswith(name) and name in error["message"]
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    "content",
    [b'{"mod', b"", b"[]", b"3", b"null", b'"x"', b"\xff\xfe", b'{"prompt": NaN}', b"[" * 100_000, b'{"a":' * 900 + b"1" + b"}" * 900,
     b'{"seed": ' + b"9" * 5000 + b"}", b'{"prompt": "\\ud800"}', b"{}", '{"prompt": "x"}'.encode("utf-16")],
    ids=range(14),
)  # fmt: skip
def test_a_malformed_body_gets_the_apis_error(content: bytes, served: tuple[subprocess.Popen[str], str]) -> None:
    for path in (CHAT, COMPLETIONS):
        assert refusal(ask(served[1], path, content))["type"] == "invalid_request_error"


def test_a_body_that_is_no_json_by_its_header_is_refused(address: str) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        refusal(ask(address, CHAT, chat(), content_type=kind), 415)
    refusal(ask(address, CHAT, chat(), content_encoding="gzip"), 415)


def test_of_doubled_keys_the_engine_sees_what_was_checked(address: str) -> None:
    content = b'{"prompt": "x", "max_tokens": 1000000000, "max_tokens": 2, "temperature": 0}'
    status, _, answer = ask(address, COMPLETIONS, content)
    assert status == 200 and json.loads(answer)["usage"]["completion_tokens"] <= 2


def test_neutral_values_and_parts_of_text_are_taken(address: str) -> None:
    neutral = {"n": 1, "presence_penalty": 0, "user": "u", "stream": False, "stop": None, "logprobs": None}
    messages = [{"role": "user", "content": [{"type": "text", "text": "Where does Maro live?"}], "name": None}]
    more = {"tool_choice": "auto", "response_format": {"type": "text"}, "parallel_tool_calls": True}
    parts = ask(address, CHAT, {"messages": messages, "max_tokens": 8, "temperature": 0} | neutral | more)
    plain = ask(address, CHAT, chat(max_tokens=8, temperature=0))
    assert parts[0] == plain[0] == 200, parts
    assert json.loads(parts[2])["choices"] == json.loads(plain[2])["choices"]


def test_a_temperature_is_followed(address: str) -> None:
    texts = {ask(address, COMPLETIONS, completion(max_tokens=12, temperature=2, seed=seed))[2] for seed in range(4)}
    assert len({json.loads(text)["choices"][0]["text"] for text in texts}) > 1


ROUTES = ("/load_model", "/reset", "/docs", "/redoc", "/openapi.json", "/v1/responses", "/v1/systemone",
          "/v1/audio/transcriptions", "/v1/models/other", "/", "//v1/models", "/v1/models/", "/V1/models", "/metrics")  # fmt: skip


@pytest.mark.parametrize("route", ROUTES)
def test_a_route_that_no_client_needs_does_not_exist(route: str, served: tuple[subprocess.Popen[str], str]) -> None:
    for body, method in ((None, "GET"), ({"model": "bundled/tiny"}, "POST"), ({}, "DELETE")):
        assert "no route" in refusal(ask(served[1], route, body, method), 404)["message"]


def test_existing_and_missing_paths_as_a_model_are_told_apart_by_nothing(address: str) -> None:
    said = [refusal(ask(address, CHAT, chat(model=name)), 404) for name in ("/etc/passwd", "/etc/no_such_file")]
    assert [error["message"].replace("no_such_file", "passwd") for error in said] == [said[0]["message"]] * 2
    assert {error["code"] for error in said} == {"model_not_found"}


def test_methods_and_head(address: str) -> None:
    assert ask(address, "/health", method="HEAD")[::2] == (200, b"") and ask(address, "/health")[0] == 200
    for path, method in (("/health", "POST"), (CHAT, "GET"), ("/v1/models", "DELETE"), (CHAT, "OPTIONS")):
        answer = ask(address, path, {} if method == "POST" else None, method)
        assert refusal(answer, 405)["message"].startswith(path) and answer[1]["allow"]
    model = json.loads(ask(address, "/v1/models/tiny")[2])
    assert json.loads(ask(address, "/v1/models")[2])["data"] == [model] and model["id"] == "tiny"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 403),
        ({"host": "evil.example:8000"}, 403),
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"host": ""}, 403),
        ({"host": "192.0.2.7:80"}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://localhost:3000"}, 403),
        ({"sec_fetch_site": "cross-site"}, 403),
        ({"sec_fetch_site": "same-site"}, 403),
        ({"host": "localhost:1"}, 200),
        ({"host": "[::1]:80"}, 200),
        ({"host": "LOCALHOST"}, 200),
        ({"host": "localhost:1", "origin": "http://localhost:1", "sec_fetch_site": "same-origin"}, 200),
    ],
    ids=str,
)
def test_without_a_key_web_pages_are_refused(
    headers: dict[str, str], status: int, served: tuple[subprocess.Popen[str], str]
) -> None:
    answers = [ask(served[1], "/v1/models", **headers), ask(served[1], CHAT, chat(max_tokens=1), **headers)]
    for answer in answers:
        assert answer[0] == status, answer
        if status == 403:
            refusal(answer, 403)


def connected(address: str) -> socket.socket:
    host, port = address.removeprefix("http://").removesuffix("/v1").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


SLOW = {
    "nothing": b"",
    "a header that does not end": b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n",
    "a body that does not end": b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n{",
}


@pytest.mark.parametrize("sent", SLOW.values(), ids=SLOW.keys())
def test_slow_clients_are_dropped_and_health_answers(sent: bytes, address: str) -> None:
    clients = [connected(address) for _ in range(120)]
    began = time.monotonic()
    for client in clients:
        client.sendall(sent)
    latencies = []
    while time.monotonic() - began < 1:
        asked = time.monotonic()
        assert ask(address, "/health")[0] == 200
        latencies.append(time.monotonic() - asked)
    assert max(latencies) < 1
    for client in clients:
        content = b""
        while piece := client.recv(4096):
            content += piece
        assert content.startswith(b"HTTP/1.1 408"), content
        client.close()
    assert time.monotonic() - began < 8


def test_a_header_that_drips_is_dropped(address: str) -> None:
    client = connected(address)
    began = time.monotonic()
    with pytest.raises(OSError):
        for letter in b"GET /health HTTP/1.1\r\nx: " + b"y" * 100:
            client.sendall(bytes([letter]))
            time.sleep(0.1)
    assert time.monotonic() - began < 6
    client.close()


def test_a_header_that_is_too_large_and_what_is_no_http(address: str) -> None:
    for sent in (b"GET /health HTTP/1.1\r\nx: " + b"y" * 40_000, b"\x16\x03\x01\x02\r\n\r\n"):
        client = connected(address)
        client.sendall(sent)
        content = b""
        while piece := client.recv(4096):
            content += piece
        assert content.startswith((b"HTTP/1.1 400", b"HTTP/1.1 431")) and b'"error"' in content
        client.close()


def test_a_full_queue_is_429_with_retry_after_and_health_answers(address: str) -> None:
    with ThreadPoolExecutor(12) as pool:
        answers = [
            pool.submit(ask, address, COMPLETIONS, completion(max_tokens=200, temperature=1.5)) for _ in range(12)
        ]
        time.sleep(0.3)
        asked = time.monotonic()
        assert ask(address, "/health")[0] == 200 and time.monotonic() - asked < 1
    statuses = [answer.result()[0] for answer in answers]
    assert set(statuses) == {200, 429} and statuses.count(200) >= 4, statuses
    refused = next(answer.result() for answer in answers if answer.result()[0] == 429)
    assert int(refused[1]["retry-after"]) >= 1 and refusal(refused, 429)["type"] == "rate_limit_error"


def test_connections_have_a_bound(address: str) -> None:
    clients = [connected(address) for _ in range(260)]
    time.sleep(0.3)
    clients[-1].settimeout(5)
    assert clients[-1].recv(4096).startswith(b"HTTP/1.1 503")
    for client in clients:
        client.close()
    time.sleep(0.3)
