"""Which engine is chosen and why, keys, and how each engine is started."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.errors import LLMCompressError
from llmcompress.publish import serve as serving


def machine(monkeypatch: pytest.MonkeyPatch, *, gpu: bool, vllm: bool) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr(serving, "find_spec", lambda name: object() if vllm else None)


def test_transformers_is_the_default_and_says_why(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(finished)
    machine(monkeypatch, gpu=False, vllm=False)
    assert serving.choose(checkpoint).why.endswith("vLLM is not used: it is not installed")
    machine(monkeypatch, gpu=False, vllm=True)
    assert serving.choose(checkpoint).why.endswith("vLLM is not used: there is no GPU")
    assert serving.choose(checkpoint, "transformers").engine == "transformers"


def test_vllm_where_it_can(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, gpu=True, vllm=True)
    assert serving.choose(Checkpoint.open(finished)).engine == "vllm"
    command = serving.vllm_command(Checkpoint.open(finished), "small", "127.0.0.1", 8000)
    assert command[:2] == ["vllm", "serve"] and "llmcompress.publish.front.Front" in command
    assert not any("key" in word for word in command), "a key in the command line is for everyone to see"


def test_vllm_asked_for_where_it_cannot(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, gpu=False, vllm=False)
    with pytest.raises(LLMCompressError, match="vLLM cannot serve it here: it is not installed"):
        serving.choose(Checkpoint.open(finished), "vllm")
    with pytest.raises(LLMCompressError, match="must be auto, vllm or transformers"):
        serving.choose(Checkpoint.open(finished), "tgi")


def test_a_layout_whose_packages_are_missing_is_refused_with_both_reasons(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "unavailable", lambda folder: "optimum and GPTQModel are not installed")
    machine(monkeypatch, gpu=False, vllm=False)
    with pytest.raises(LLMCompressError, match=r"optimum and GPTQModel are not installed; vLLM: it is not installed"):
        serving.choose(Checkpoint.open(finished))


def test_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLMCOMPRESS_API_KEY", raising=False)
    file = tmp_path / "key"
    file.write_text("sk-1\n")
    assert serving.api_key(file, False) == "sk-1" == serving.api_key(file, True)
    assert serving.api_key(None, False) is None
    made = serving.api_key(tmp_path / "none", True)
    assert made and made != serving.api_key(None, True) and len(made) > 30
    monkeypatch.setenv("LLMCOMPRESS_API_KEY", "sk-2")
    assert serving.api_key(None, False) == "sk-2" == serving.api_key(None, True)
    for content in ("", "  \n", "two words", "sk-\u00e9"):
        file.write_text(content)
        with pytest.raises(LLMCompressError, match="must hold one key"):
            serving.api_key(file, False)
    with pytest.raises(LLMCompressError, match="cannot be read"):
        serving.api_key(tmp_path / "none", False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", "127.0.0.1.example.org"])
def test_another_address_needs_a_key(host: str) -> None:
    with pytest.raises(LLMCompressError, match="needs an API key"):
        serving.require_key(host, None)
    serving.require_key(host, "sk-1")
    serving.require_key("127.0.0.1", None)


WHERE_ONLY_VLLM_IS = """
import sys
for name in ("accelerate", "bitsandbytes", "compressed_tensors", "datasets", "greenlet", "lm_eval", "matplotlib", "numba",
             "openai", "peft", "scipy", "trl"):
    sys.modules[name] = None
import torch
import llmcompress.publish.serve as serving
from llmcompress.cli.main import main
from llmcompress.publish.front import Front, FrontSettings

def become(program, command, environment):
    serving.os.environ.update(environment)
    settings = FrontSettings.model_validate_json(environment["LLMCOMPRESS_SERVE"])
    Front(None)  # as vLLM does with the class it is given
    print("became", *command, environment["LLMCOMPRESS_API_KEY"] == "sk-1", environment["LLMCOMPRESS_API_KEY"] in command)
    print(settings.served.engine, settings.served.name, settings.host)
    raise SystemExit(7)

torch.cuda.is_available = lambda: True
serving.find_spec = lambda name: object() if name == "vllm" else None
serving.os.execvpe = become
main()
"""


def test_the_cuda_image_needs_no_package_that_vllm_does_not_bring(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sk-1\n")
    words = [
        "serve",
        finished,
        "--engine",
        "vllm",
        "--host",
        "0.0.0.0",
        "--port",
        "0",
        "--api-key-file",
        tmp_path / "key",
    ]
    command = [sys.executable, "-c", WHERE_ONLY_VLLM_IS, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 7, done.stderr
    became, front = done.stdout.splitlines()[-2:]
    assert front == "vllm small-llama 0.0.0.0"
    assert became.startswith(f"became vllm serve {finished} --served-model-name small-llama --host 0.0.0.0 --port ")
    assert became.endswith("--middleware llmcompress.publish.front.Front True False"), "the key is no argument"
