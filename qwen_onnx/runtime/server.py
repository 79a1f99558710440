"""The HTTP API: one model, one answer at a time, an event loop that stays free."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response

from qwen_onnx import __version__
from qwen_onnx.errors import PromptTooLongError, QwenOnnxError, RequestError
from qwen_onnx.runtime.protocol import Answer, ChatRequest, error_body
from qwen_onnx.runtime.service import Delta, GenerationConfig, QwenService

# a request larger than this is refused before it is read as JSON
MOST_BODY_BYTES = 4 << 20


def create_app(service: QwenService, model_name: str) -> FastAPI:
    """The application around a running service."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(title="qwen-onnx", version=__version__, lifespan=lifespan)
    started = int(time.time())
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

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        model = {"id": model_name, "object": "model", "created": started, "owned_by": "qwen-onnx"}
        return {"object": "list", "data": [model]}

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest) -> Response:
        if body.model != model_name:
            error = error_body(
                f"the model {body.model!r} does not exist; this server has {model_name!r}",
                kind="invalid_request_error",
                param="model",
                code="model_not_found",
            )
            return JSONResponse(error, 404)
        config = body.config()
        messages = [message.plain() for message in body.messages]
        # faulty input is a 400, so it must be found before a stream has begun; long texts take a while to encode
        await asyncio.to_thread(service.prepare, messages, config)
        deltas = service.generate_async(messages, config)
        answer = Answer(model_name)
        if body.stream:
            with_usage = bool(body.stream_options and body.stream_options.include_usage)
            return StreamingResponse(_events(deltas, answer, with_usage), media_type="text/event-stream")
        return JSONResponse(answer.whole([delta async for delta in deltas]))

    return app


async def _events(deltas: AsyncIterator[Delta], answer: Answer, with_usage: bool) -> AsyncIterator[str]:
    """Server-sent events. Starlette closes this iterator when the client goes away, which stops the engine."""
    yield _event(answer.chunk({"role": "assistant", "content": ""}))
    try:
        async for delta in deltas:
            if delta.text:
                yield _event(answer.chunk({"content": delta.text}))
            if delta.finish_reason:
                yield _event(answer.chunk({}, delta.finish_reason))
                if with_usage:
                    yield _event(answer.last(delta))
        yield "data: [DONE]\n\n"
    except QwenOnnxError as error:
        # the status line is long gone: an error event is what the openai client raises from
        yield _event(error_body(error.what, kind="server_error"))
    finally:
        await deltas.aclose()  # type: ignore[attr-defined]


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


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
