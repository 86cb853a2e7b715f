"""transformers' own OpenAI-compatible server, with the front before it and the API's error shape.

The app, its routes and its generation are transformers'; its `build_server` is wrapped on the way in, and what it gives
gets three things more: the front (front.py), errors as OpenAI's clients expect them, and sampling where a request asks
for it (the engine sets the temperature and leaves the model's own greedy decoding on). uvicorn drains on SIGTERM: it
stops listening, finishes what it has begun, and ends.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmcompress.errors import LLMCompressError
from llmcompress.publish.asgi import error_body
from llmcompress.publish.front import Front, FrontSettings


def serve(settings: FrontSettings, *, port: int, key: str | None) -> None:
    """Serve the checkpoint in `settings.folder` under its name until a signal ends it.

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
    server.build_server = _with_front(server.build_server, settings, key)
    name, trust = settings.served.name, settings.trust_remote_code
    with tempfile.TemporaryDirectory(prefix="llmcompress-serve-") as place:
        # The engine calls a model by the path that it was loaded from; this one is the name that clients use.
        link = Path(place) / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(settings.folder.resolve())
        os.chdir(place)
        try:
            Serve(force_model=name, host=settings.host, port=port, device="auto", trust_remote_code=trust)
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise LLMCompressError(
                f"{settings.folder}: transformers' server could not load it ({first[:300]})"
            ) from error


def _with_front(build: Callable[..., Any], settings: FrontSettings, key: str | None) -> Callable[..., Any]:
    """transformers' `build_server`, whose app then stands behind the front."""

    def build_server(model_manager: Any, *args: Any, **kwargs: Any) -> Any:
        for handler in (*args, *kwargs.values()):
            if hasattr(handler, "_resolve_model"):
                handler._resolve_model = _named(handler._resolve_model, settings.served.name)
                handler._build_generation_config = _sampling(handler._build_generation_config)
        app = build(model_manager, *args, **kwargs)
        _shape_errors(app)
        return Front(app, settings, key)

    return build_server


def _named(resolve: Callable[[Any], tuple[Any, ...]], name: str) -> Callable[[Any], tuple[Any, ...]]:
    """The engine's way from a request to (id, model, processor), with the name that was asked for as the id."""
    return lambda body: (name, *resolve(body)[1:])


def _sampling(build: Callable[..., Any]) -> Callable[..., Any]:
    """The engine's way from a request to a generation config, sampling where temperature or top_p asks for it."""

    def build_generation_config(body: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        config = build(body, *args, **kwargs)
        if body.get("temperature") or (body.get("top_p", 1) < 1 and body.get("temperature") is None):
            config.do_sample = True
        return config

    return build_generation_config


def _shape_errors(app: Any) -> None:
    """What the engine still refuses, or fails at, in the API's shape."""
    from fastapi import HTTPException
    from starlette.responses import JSONResponse

    async def refused(_: Any, error: HTTPException) -> Any:
        status = 400 if error.status_code == 422 else error.status_code
        return JSONResponse(error_body(str(error.detail), status), status_code=status)

    async def unfit(_: Any, error: Exception) -> Any:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        message = f"The request has a value that the engine does not take: {first[:300]}"
        return JSONResponse(error_body(message, 400), status_code=400)

    async def failed(_: Any, error: Exception) -> Any:
        body = error_body(f"The server failed on this request ({type(error).__name__}).", 500)
        return JSONResponse(body, status_code=500)

    app.add_exception_handler(HTTPException, refused)
    app.add_exception_handler(TypeError, unfit)
    app.add_exception_handler(ValueError, unfit)
    app.add_exception_handler(Exception, failed)
