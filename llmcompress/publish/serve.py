"""Serve: which engine can run this checkpoint here, and why; then that engine, with a key and bounds in front of it.

    facts of the checkpoint ─┐
    GPU? vLLM installed? ────┼──> vllm            its own OpenAI server, in place of this process
    packages installed? ─────┘──> transformers    its own OpenAI server, the embedded default

No server is written here. Loopback is the default; any other address needs an API key.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import NoReturn

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.errors import LLMCompressError
from llmcompress.evaluate.engines import unavailable
from llmcompress.publish.auth import VARIABLE, is_loopback
from llmcompress.publish.bounds import Served
from llmcompress.publish.fields import Engine
from llmcompress.publish.front import SETTINGS, FrontSettings
from llmcompress.publish.limits import ServerLimits
from llmcompress.verify.compatibility import facts, judge


@dataclass(frozen=True, slots=True)
class Choice:
    """The engine, and why it is the one."""

    engine: Engine
    why: str


def choose(checkpoint: Checkpoint, asked: str = "auto") -> Choice:
    """The engine that serves a checkpoint here.

    Raises: LLMCompressError for an unknown engine, for one that was asked for and cannot, and when none can.
    """
    if asked not in ("auto", "vllm", "transformers"):
        raise LLMCompressError(f"--engine {asked}: must be auto, vllm or transformers")
    against = {"vllm": _not_vllm(checkpoint), "transformers": _not_transformers(checkpoint)}
    if asked == "vllm" or (asked == "auto" and against["vllm"] is None):
        if against["vllm"] is not None:
            raise LLMCompressError(f"{checkpoint.name}: vLLM cannot serve it here: {against['vllm']}")
        return Choice("vllm", "there is a GPU, vLLM is installed, and its loader takes this checkpoint")
    if against["transformers"] is not None:
        raise LLMCompressError(
            f"{checkpoint.name}: no engine can serve it here: transformers: {against['transformers']}; "
            f"vLLM: {against['vllm']}",
            "install what is missing, or quantize with another --format (`llmcompress check` says who reads it)",
        )
    asked_for = "asked for" if asked == "transformers" else f"vLLM is not used: {against['vllm']}"
    return Choice("transformers", f"its loader takes this checkpoint; {asked_for}")


def _not_vllm(checkpoint: Checkpoint) -> str | None:
    """Why vLLM does not serve it here, or None."""
    if find_spec("vllm") is None:
        return "it is not installed"
    import torch

    return _refusal(checkpoint, "vllm") if torch.cuda.is_available() else "there is no GPU"


def _not_transformers(checkpoint: Checkpoint) -> str | None:
    return _refusal(checkpoint, "transformers") or unavailable(checkpoint.folder)


def _refusal(checkpoint: Checkpoint, engine: str) -> str | None:
    verdict = judge(facts(checkpoint), engine)
    return None if verdict.loads else "; ".join(one.detail for one in verdict.findings if one.level != "warns")


def api_key(file: Path | None, make: bool) -> str | None:
    """The key of a file, or of the environment; a new one when there is none and `make` says so.

    Raises: LLMCompressError for a file that is missing (unless one may be made) or holds no key.
    """
    if file is not None and (file.is_file() or not make):
        try:
            key = file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise LLMCompressError(f"{file}: the API key cannot be read ({error})") from error
        if not key or any(not 32 < ord(letter) < 127 for letter in key):
            raise LLMCompressError(f"{file}: must hold one key of printable ASCII letters without spaces")
        return key
    return os.environ.get(VARIABLE) or (f"sk-{secrets.token_urlsafe(32)}" if make else None)


def require_key(host: str, key: str | None) -> None:
    """Raise LLMCompressError when others could reach the server and there is no key."""
    if key is None and not is_loopback(host):
        raise LLMCompressError(
            f"--host {host}: can be reached by others, which needs an API key",
            f"pass --api-key-file FILE, set {VARIABLE}, or pass --make-api-key",
        )


def free_port(host: str, port: int) -> int:
    """`port`, or one that is free where it is 0.

    Raises: LLMCompressError when nothing can listen there.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    except OSError as error:
        raise LLMCompressError(f"{host}:{port}: cannot listen there ({error})", "choose another --port") from error


def vllm_command(checkpoint: Checkpoint, name: str, host: str, port: int) -> list[str]:
    """How vLLM's own server is started; the key is in the environment, where a list of processes does not show it."""
    command = ["vllm", "serve", str(checkpoint.folder.resolve()), "--served-model-name", name]
    command += ["--host", host, "--port", str(port), "--middleware", "llmcompress.publish.front.Front"]
    return command + (["--trust-remote-code"] if checkpoint.trust_remote_code else [])


def run(
    checkpoint: Checkpoint,
    engine: Engine,
    name: str,
    *,
    host: str,
    port: int,
    key: str | None,
    limits: ServerLimits = ServerLimits(),  # noqa: B008 - frozen
) -> None:
    """Serve until a signal ends it; SIGTERM lets what has begun finish.

    Raises: LLMCompressError when the engine does not start.
    """
    settings = FrontSettings(
        folder=checkpoint.folder.resolve(),
        trust_remote_code=checkpoint.trust_remote_code,
        host=host,
        served=Served(name=name, engine=engine, limits=limits),
    )
    if engine == "vllm":
        environment = os.environ | {SETTINGS: settings.model_dump_json()} | ({VARIABLE: key} if key else {})
        _become(vllm_command(checkpoint, name, host, port), environment)
    from llmcompress.publish.transformers_server import serve

    signal.signal(signal.SIGTERM, _leave)
    serve(settings, port=port, key=key)


def _become(command: list[str], environment: dict[str, str]) -> NoReturn:
    """This process becomes the engine's, so that signals reach it."""
    sys.stdout.flush()
    os.execvpe(command[0], command, environment)


def _leave(number: int, frame: FrameType | None) -> None:
    """uvicorn has drained and hands the signal back; that is a normal end."""
    raise SystemExit(0)
