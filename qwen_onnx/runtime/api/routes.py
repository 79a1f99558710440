"""The routes below /v1."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.responses import Response

from qwen_onnx.errors import QwenOnnxError
from qwen_onnx.runtime.api.protocol import Answer, ChatRequest, error_body
from qwen_onnx.runtime.generation import Delta
from qwen_onnx.runtime.service import QwenService


def make_router(service: QwenService, model_name: str) -> APIRouter:
    """Models, chat completions, completions and responses of one model."""
    router = APIRouter(prefix="/v1")
    started = int(time.time())

    @router.get("/models")
    async def models() -> dict[str, Any]:
        model = {"id": model_name, "object": "model", "created": started, "owned_by": "qwen-onnx"}
        return {"object": "list", "data": [model]}

    @router.post("/chat/completions")
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

    return router


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
