"""Errors as HTTP answers, in the shape that OpenAI's clients understand."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from qwen_onnx.errors import (
    ConflictError,
    DeadlineError,
    OverloadedError,
    PromptTooLongError,
    QwenOnnxError,
    RateLimitError,
    RequestError,
    ServiceError,
    WorkerDiedError,
)
from qwen_onnx.runtime.server.admission import printable
from qwen_onnx.runtime.server.api.protocol import error_body, shortened
from qwen_onnx.runtime.service.told import current

# status, kind in OpenAI's words, reason in the metrics
ANSWERS: dict[type[ServiceError], tuple[int, str, str]] = {
    OverloadedError: (503, "overloaded_error", "overloaded"),
    RateLimitError: (429, "rate_limit_error", "rate_limit"),
    WorkerDiedError: (503, "server_error", "worker_died"),
    DeadlineError: (504, "timeout_error", "deadline"),
    ServiceError: (503, "server_error", "unavailable"),
}

# of what is told about a request with many faults, or with long names
MOST_FAULTS, MOST_WORDS, MOST_NAME = 10, 300, 60


def _note(reason: str) -> None:
    record = current.get()
    if record is not None:
        record.reason = reason


def _place(loc: Sequence[str | int]) -> str:
    """Where in the body, in dots; the names of fields are the client's, and as long as it likes."""
    return shortened(".".join(shortened(str(part), MOST_NAME) for part in loc[1:]), MOST_WORDS)


def handle_errors(app: FastAPI) -> None:
    """Register a handler for each kind of error; what none of them knows is the gate's."""

    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> JSONResponse:
        _note("invalid")
        code = "context_length_exceeded" if isinstance(error, PromptTooLongError) else None
        body = error_body(printable(error.what), kind="invalid_request_error", param=error.where, code=code)
        return JSONResponse(body, 409 if isinstance(error, ConflictError) else 400)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        _note("invalid")
        found = error.errors()
        faults = [(_place(item["loc"]), shortened(item["msg"], MOST_WORDS)) for item in found[:MOST_FAULTS]]
        text = "; ".join(f"{place}: {message}" if place else message for place, message in faults)
        more = len(found) - len(faults)
        text += f"; and {more} more faults" if more else ""
        body = error_body(printable(text), kind="invalid_request_error", param=printable(faults[0][0]) or None)
        return JSONResponse(body, 400)

    @app.exception_handler(ServiceError)
    async def unavailable(_: Request, error: ServiceError) -> JSONResponse:
        kinds = (ANSWERS[kind] for kind in type(error).__mro__ if kind in ANSWERS)
        status, kind, reason = next(kinds)
        _note(reason)
        return JSONResponse(error_body(error.what, kind=kind), status, headers={"Retry-After": str(error.retry_after)})

    @app.exception_handler(QwenOnnxError)
    async def failed(_: Request, error: QwenOnnxError) -> JSONResponse:
        _note(type(error).__name__)
        return JSONResponse(error_body(error.what, kind="server_error"), 500)

    @app.exception_handler(HTTPException)
    async def other(_: Request, error: HTTPException) -> JSONResponse:
        _note("not_found" if error.status_code == 404 else "invalid")
        body = error_body(printable(str(error.detail)), kind="invalid_request_error")
        return JSONResponse(body, error.status_code, headers=dict(error.headers or {}))
