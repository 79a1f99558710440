"""The HTTP API: one model, one answer at a time, an event loop that stays free."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response

from qwen_onnx import __version__
from qwen_onnx.errors import PromptTooLongError, QwenOnnxError, RequestError
from qwen_onnx.runtime.api import make_router
from qwen_onnx.runtime.api.protocol import error_body
from qwen_onnx.runtime.generation import GenerationConfig
from qwen_onnx.runtime.service import QwenService
from qwen_onnx.runtime.web import make_web_router

# a request larger than this is refused before it is read as JSON
MOST_BODY_BYTES = 4 << 20


def create_app(service: QwenService, model_name: str) -> FastAPI:
    """The application around a running service."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(title="qwen-onnx", version=__version__, lifespan=lifespan)
    _handle_errors(app)

    @app.middleware("http")
    async def limit_body(request: Request, call_next: Any) -> Response:
        length = request.headers.get("content-length", "0")
        if length.isdigit() and int(length) > MOST_BODY_BYTES:
            body = error_body(f"the body exceeds {MOST_BODY_BYTES} bytes", kind="invalid_request_error")
            return JSONResponse(body, 413)
        response: Response = await call_next(request)
        return response

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok", "model": model_name}

    app.include_router(make_router(service, model_name))
    app.include_router(make_web_router(model_name))
    return app


def _handle_errors(app: FastAPI) -> None:
    """Every error in the shape that OpenAI's clients understand."""

    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> JSONResponse:
        code = "context_length_exceeded" if isinstance(error, PromptTooLongError) else None
        body = error_body(error.what, kind="invalid_request_error", param=error.where, code=code)
        return JSONResponse(body, 400)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        faults = [(".".join(str(part) for part in item["loc"][1:]), item["msg"]) for item in error.errors()]
        text = "; ".join(f"{place}: {message}" if place else message for place, message in faults)
        body = error_body(_printable(text), kind="invalid_request_error", param=_printable(faults[0][0]) or None)
        return JSONResponse(body, 400)

    @app.exception_handler(QwenOnnxError)
    async def failed(_: Request, error: QwenOnnxError) -> JSONResponse:
        return JSONResponse(error_body(error.what, kind="server_error"), 500)

    @app.exception_handler(HTTPException)
    async def other(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(error_body(str(error.detail), kind="invalid_request_error"), error.status_code)


def _printable(text: str) -> str:
    """An error that quotes lone surrogates could not be sent itself."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def serve(folder: Path, *, host: str, port: int, model_name: str, threads: int | None = None) -> None:
    """Load the model in a child process and serve until interrupted.

    Raises:
        ArtifactError: the folder holds no model that loads.
    """
    service = QwenService(folder, threads=threads, isolated=True)
    service.generate("Hello", GenerationConfig(max_new_tokens=1))
    uvicorn.run(create_app(service, model_name), host=host, port=port, log_level="info")
