"""The server as its users meet it: a process, a port, and the real `openai` client."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.integration.servers import quantized, start

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

KEY = "sk-only-for-this-test"
MESSAGES = [{"role": "user", "content": "Where does Maro live?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def address(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    key = tmp_path_factory.mktemp("key") / "api_key"
    key.write_text(f"{KEY}\n")
    process, address = start(folder, "--api-key-file", key)
    yield address
    process.kill()
    process.wait()


@pytest.fixture
def client(address: str) -> Any:
    return openai.OpenAI(base_url=address, api_key=KEY, max_retries=0, timeout=60)


def test_chat_uses_the_models_own_template(client: Any, folder: Path) -> None:
    from llmcompress.evaluate.engines import load

    loaded = load(folder)
    inputs = loaded.tokenizer.apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    written = loaded.model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    expected = loaded.tokenizer.decode(written, skip_special_tokens=True)
    answer = client.chat.completions.create(model="tiny-nf4", messages=MESSAGES, max_tokens=12, temperature=0)
    assert answer.choices[0].message.content == expected and expected
    assert answer.usage.prompt_tokens == inputs["input_ids"].shape[1] and answer.model == "tiny-nf4"


def test_completions_streaming_and_stop(client: Any) -> None:
    asked = {"model": "tiny-nf4", "prompt": "3 plus 4 makes", "max_tokens": 16, "temperature": 0}
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True))
    assert {whole.model, *(chunk.model for chunk in chunks)} == {"tiny-nf4"}
    pieces = [chunk.choices[0].text for chunk in chunks]
    assert len(pieces) > 2 and "".join(pieces).strip() == whole.choices[0].text.strip() != ""
    stopped = client.completions.create(**asked, stop=["."])
    assert (
        stopped.choices[0].text.count(".") <= 1 < whole.choices[0].text.count(".")
        or whole.choices[0].text.count(".") <= 1
    )
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.usage.completion_tokens < whole.usage.completion_tokens


def test_chat_streams(client: Any) -> None:
    asked = {"model": "tiny-nf4", "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**asked).choices[0].message.content
    chunks = client.chat.completions.create(**asked, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices).strip() == whole.strip()


def test_chat_stops_where_it_is_told_and_takes_a_system_message(client: Any) -> None:
    asked: dict[str, Any] = {"model": "tiny-nf4", "max_tokens": 24, "temperature": 0}
    whole = client.chat.completions.create(**asked, messages=MESSAGES).choices[0].message.content
    word = whole.split()[2]
    stopped = client.chat.completions.create(**asked, messages=MESSAGES, stop=[word]).choices[0]
    assert stopped.finish_reason == "stop" and len(stopped.message.content) < len(whole)
    assert whole.startswith(stopped.message.content.split(word)[0].strip())
    system = [{"role": "system", "content": "Answer in one word."}, *MESSAGES]
    answer = client.chat.completions.create(**asked, messages=system)
    assert answer.usage.prompt_tokens > 0 and answer.choices[0].message.role == "assistant"


def test_chats_streamed_at_once_are_not_mixed_up(client: Any) -> None:
    names = ["Maro", "Dana", "Hala", "Jarrow"]

    def ask(name: str) -> str:
        asked = [{"role": "user", "content": f"Where does {name} live?"}]
        chunks = client.chat.completions.create(
            model="tiny-nf4", messages=asked, max_tokens=12, temperature=0, stream=True
        )
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)

    alone = [ask(name) for name in names]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, names)) == alone
    assert len(set(alone)) > 1


def test_requests_at_once_get_what_each_asked(client: Any) -> None:
    prompts = [f"{n} plus 2 makes" for n in range(1, 9)]

    def ask(prompt: str) -> str:
        return str(
            client.completions.create(model="tiny-nf4", prompt=prompt, max_tokens=4, temperature=0).choices[0].text
        )

    alone = [ask(prompt) for prompt in prompts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, prompts)) == alone
    assert len(set(alone)) > 1


def test_the_list_of_models_names_the_one(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny-nf4"]


@pytest.mark.parametrize(
    ("change", "error", "code"),
    [
        ({"model": "other"}, "NotFoundError", "model_not_found"),
        ({"prompt": 3}, "BadRequestError", None),
        ({"prompt": "x", "extra_body": {"no_such_field": 1}}, "BadRequestError", None),
        ({"temperature": "hot"}, "BadRequestError", None),
    ],
)
def test_a_bad_request_gets_the_apis_error(change: dict[str, Any], error: str, code: str | None, client: Any) -> None:
    with pytest.raises(getattr(openai, error)) as raised:
        client.completions.create(**{"model": "tiny-nf4", "prompt": "x", "max_tokens": 2, **change})
    body = raised.value.body
    assert body["message"] and body["type"] and body["code"] == code


def test_what_is_no_json_or_lacks_its_messages(address: str) -> None:
    for content in (b'{"mod', b"[]", b'{"model": "tiny-nf4"}'):
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        request = urllib.request.Request(f"{address}/chat/completions", content, headers)
        with pytest.raises(urllib.error.HTTPError) as raised:
            urllib.request.urlopen(request)
        assert raised.value.code == 400 and "message" in json.loads(raised.value.read())["error"]


ROUTES = ("/v1/models", "/v1/chat/completions", "/v1/completions", "/load_model", "/reset", "/docs", "/openapi.json", "/no", "/health/../v1/models", "//health", "/HEALTH")  # fmt: skip


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("route", ROUTES)
def test_without_the_key_every_route_but_health_is_401(method: str, route: str, address: str) -> None:
    import http.client

    host, port = address.removeprefix("http://").removesuffix("/v1").split(":")
    for header in ({}, {"Authorization": "Bearer sk-wrong"}, {"Authorization": KEY}, {"X-Api-Key": KEY}):
        connection = http.client.HTTPConnection(host, int(port), timeout=10)
        connection.request(method, route, headers=header)
        answer = connection.getresponse()
        assert answer.status == 401, (route, header)
        assert json.loads(answer.read())["error"]["code"] == "invalid_api_key"
        connection.close()


def test_the_client_sees_an_authentication_error(address: str) -> None:
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=address, api_key="sk-wrong", max_retries=0).models.list()


def test_sigterm_lets_what_has_begun_finish(folder: Path) -> None:
    process, address = start(folder)
    client = openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=60)
    chunks = client.completions.create(model="tiny-nf4", prompt="The", max_tokens=300, temperature=1, stream=True)
    received = [next(chunks)]
    process.send_signal(signal.SIGTERM)
    received += list(chunks)
    assert received[-1].choices[0].finish_reason in ("stop", "length")
    assert process.wait(timeout=60) == 0
    with pytest.raises(OSError):
        urllib.request.urlopen(address, timeout=2)


def test_a_port_that_is_taken_and_a_host_without_a_key(folder: Path, address: str) -> None:
    port = address.removesuffix("/v1").rpartition(":")[2]
    taken = refused(folder, "--port", port)
    assert f"127.0.0.1:{port}: cannot listen there" in taken and "hint: choose another --port" in taken
    assert "needs an API key" in refused(folder, "--host", "0.0.0.0")
    assert "cannot be read" in refused(folder, "--api-key-file", folder / "nothing")


def refused(*words: object) -> str:
    command = [sys.executable, "-m", "llmcompress", "serve", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=os.environ)
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    return done.stderr
