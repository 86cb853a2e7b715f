"""transformers' own OpenAI-compatible server, with a door in front of it and the API's error shape.

The app, its routes and its generation are transformers'; its `build_server` is wrapped on the way in, and what it gives
is given three things more: the door (door.py), errors as OpenAI's clients expect them, and the served name alone in the
list of models and in every answer (the engine adds a revision to it). uvicorn drains on SIGTERM: it stops listening,
finishes what it has begun, and ends.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmcompress.errors import LLMCompressError
from llmcompress.publish.auth import Door, error_body

KINDS = {400: "invalid_request_error", 404: "not_found_error"}
FIELDS = ("content", "input", "messages", "prompt", "role", "text", "type")
"""What a request may lack that the engine reads without looking first."""


def serve(folder: Path, name: str, *, host: str, port: int, key: str | None, trust_remote_code: bool) -> None:
    """Serve the checkpoint in `folder` under `name` until a signal ends it.

    Raises: LLMCompressError when what transformers' server needs is not installed, or the model does not load.
    """
    try:
        import uvicorn.config
        from transformers.cli.serve import Serve
        from transformers.cli.serving import server
    except ImportError as error:
        raise LLMCompressError(
            f"transformers' server cannot be used here ({error})", "pip install 'llmcompress[serve]'"
        ) from error
    for handler in uvicorn.config.LOGGING_CONFIG["handlers"].values():
        handler["stream"] = "ext://sys.stderr"
    server.build_server = _with_door(server.build_server, name, key)
    with tempfile.TemporaryDirectory(prefix="llmcompress-serve-") as place:
        # The engine calls a model by the path that it was loaded from; this one is the name that clients use.
        link = Path(place) / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(folder.resolve())
        os.chdir(place)
        try:
            Serve(force_model=name, host=host, port=port, device="auto", trust_remote_code=trust_remote_code)
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise LLMCompressError(f"{folder}: transformers' server could not load it ({first[:300]})") from error


def _with_door(build: Callable[..., Any], name: str, key: str | None) -> Callable[..., Any]:
    """transformers' `build_server`, whose app then has the door, the error shape and the list of models."""

    def build_server(model_manager: Any, *args: Any, **kwargs: Any) -> Any:
        served = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "llmcompress"}
        model_manager.get_gen_models = lambda *_: [served]
        for handler in (*args, *kwargs.values()):
            if hasattr(handler, "_resolve_model"):
                handler._resolve_model = _named(handler._resolve_model, name)
        app = build(model_manager, *args, **kwargs)
        _say_errors_as_the_api_does(app)
        app.add_middleware(Door, key=key)
        return app

    return build_server


def _named(resolve: Callable[[Any], tuple[Any, ...]], name: str) -> Callable[[Any], tuple[Any, ...]]:
    """The engine's way from a request to (id, model, processor), with the name that was asked for as the id."""
    return lambda body: (name, *resolve(body)[1:])


def _say_errors_as_the_api_does(app: Any) -> None:
    from fastapi import HTTPException
    from fastapi.exceptions import RequestValidationError
    from starlette.responses import JSONResponse

    def said(status: int, message: str, code: str | None = None) -> Any:
        body = error_body(message, KINDS.get(status, "server_error"), code)
        return JSONResponse(body, status_code=status)

    async def refused(_: Any, error: HTTPException) -> Any:
        detail = str(error.detail)
        pinned = error.status_code == 400 and detail.startswith("Server is pinned")
        if pinned:
            return said(404, f"The model does not exist here. {detail}", "model_not_found")
        return said(400 if error.status_code == 422 else error.status_code, detail)

    async def malformed(_: Any, error: RequestValidationError) -> Any:
        first = error.errors()[0] if error.errors() else {}
        return said(400, f"The body is not a JSON object as this route takes it: {first.get('msg', 'invalid')}")

    async def lacking(request: Any, error: KeyError) -> Any:
        field = error.args[0] if error.args else ""
        return said(400, f"The request lacks {field!r}.") if field in FIELDS else await failed(request, error)

    async def unfit(_: Any, error: Exception) -> Any:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        return said(400, f"The request has a value that the engine does not take: {first[:300]}")

    async def failed(_: Any, error: Exception) -> Any:
        return said(500, f"The server failed on this request ({type(error).__name__}).")

    app.add_exception_handler(HTTPException, refused)
    app.add_exception_handler(RequestValidationError, malformed)
    app.add_exception_handler(KeyError, lacking)
    app.add_exception_handler(TypeError, unfit)
    app.add_exception_handler(ValueError, unfit)
    app.add_exception_handler(Exception, failed)
