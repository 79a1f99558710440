"""The routes below /v1."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from qwen_onnx.errors import QwenOnnxError, RequestError
from qwen_onnx.runtime.engines.media import Sound
from qwen_onnx.runtime.server.adapter_folder import AdapterFolder
from qwen_onnx.runtime.server.api.adapters import add_adapters
from qwen_onnx.runtime.server.api.asked import Asked, understood
from qwen_onnx.runtime.server.api.chat_request import ChatRequest
from qwen_onnx.runtime.server.api.chat_response import DONE, ChatAnswers, ChatCompletion
from qwen_onnx.runtime.server.api.completions import CompletionRequest, TextAnswers, TextCompletion
from qwen_onnx.runtime.server.api.events import Answer, End, Reader, Reading, Step
from qwen_onnx.runtime.server.api.parsed import ParsedRoute
from qwen_onnx.runtime.server.api.protocol import REFUSALS, Model, ModelList, configs
from qwen_onnx.runtime.server.api.responses import ResponseAnswers, ResponseBody
from qwen_onnx.runtime.server.api.responses_request import ResponseRequest
from qwen_onnx.runtime.server.api.running import answered, documented
from qwen_onnx.runtime.server.api.served import Served
from qwen_onnx.runtime.server.api.transcriptions import add_transcriptions
from qwen_onnx.runtime.server.fetching import Fetcher
from qwen_onnx.runtime.service.generation import Delta
from qwen_onnx.runtime.service.generations import Generations, Job
from qwen_onnx.runtime.service.text import Prepared, TextService

# says, in a header, to how many tokens what was asked for was lowered: the context holds no more
CLAMPED = "X-Max-Tokens-Clamped"


def make_router(
    service: TextService, model_name: str, fetcher: Fetcher | None = None, folder: AdapterFolder | None = None
) -> APIRouter:
    """Models, chat completions, completions, responses and transcriptions of one model, and of its adapters.

    Args:
        fetcher: gets pictures by their URL; None refuses URLs.
        folder: of adapters that clients may load; None: there are no such routes.
    """
    router, served = APIRouter(prefix="/v1", route_class=ParsedRoute), Served(service, model_name, folder)
    _add_models(router, served)
    _add_chat(router, service, served, fetcher)
    _add_completions(router, service, served)
    _add_responses(router, service, served, fetcher)
    add_transcriptions(router, service, served)
    if folder is not None:
        add_adapters(router, service, served, folder)
    return router


def _add_models(router: APIRouter, served: Served) -> None:
    @router.get("/models", responses={"4XX": REFUSALS["4XX"]})
    async def models() -> ModelList:
        """The model of this server, then with each of its adapters."""
        return served.models()

    @router.get("/models/{model_id:path}", response_model=Model, responses={404: REFUSALS[404], "4XX": REFUSALS["4XX"]})
    async def one(model_id: str) -> Model | JSONResponse:
        """One model."""
        return served.unknown(model_id) or served.one(model_id)


def _readable(asked: Asked, service: TextService, model_name: str) -> Asked:
    """RequestError when there are pictures, sounds or videos that the model does not take."""
    if asked.pictures and not service.sees:
        raise RequestError(f"the model {model_name!r} reads no pictures", where=asked.pictures[0].where)
    if asked.sounds and not service.hears:
        raise RequestError(f"the model {model_name!r} hears no sounds", where=asked.sounds[0].where)
    if asked.videos and not service.sees:
        raise RequestError(f"the model {model_name!r} watches no videos", where=asked.videos[0].where)
    return asked


def _clamped(service: TextService, asked: int | None, prompts: Sequence[Prepared]) -> dict[str, str]:
    """The header that tells of it when an answer may have fewer tokens than were asked for."""
    room = min(map(service.room, prompts))
    return {CLAMPED: str(room)} if asked is not None and asked > room else {}


def _add_chat(router: APIRouter, service: TextService, served: Served, fetcher: Fetcher | None) -> None:
    @router.post("/chat/completions", response_model=ChatCompletion, responses=documented("chat.completion.chunk"))
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        unknown = served.unknown(body.model)
        if unknown:
            return unknown
        options = {**body.options(), **served.options(body.model)}
        asked = _readable(body.asked(), service, served.model)
        ids, options["grammar"], reading = await asyncio.to_thread(understood, service, asked, fetcher)
        jobs: list[Job] = [(ids, config) for config in configs(options, body.choices, service.engine.features)]
        running = await Generations.begin(service, jobs)
        bodies = ChatAnswers(
            body.model,
            service.fingerprint,
            len(jobs),
            with_logprobs=bool(body.logprobs),
            with_usage=body.with_usage,
            audio=sum(medium.tokens for medium in ids.media if isinstance(medium, Sound)),
        )
        return await answered(
            request,
            running,
            body.stream,
            _clamped(service, options.get("max_new_tokens"), [ids]),
            lambda: _chat_events(running, len(jobs), reading, bodies),
            lambda: _chat_whole(running, len(jobs), reading, bodies),
        )


async def steps(running: Generations, count: int, reading: Reading) -> AsyncIterator[tuple[int, Step]]:
    """(index of the answer, step of it) until all have ended."""
    readers = [Reader(reading) for _ in range(count)]
    async for index, delta in running:
        for step in readers[index].feed(delta):
            yield index, step


async def _chat_whole(running: Generations, count: int, reading: Reading, bodies: ChatAnswers) -> bytes:
    answers = [Answer() for _ in range(count)]
    async for index, step in steps(running, count, reading):
        answers[index].add(step)
    return bodies.whole(answers)


async def _chat_events(running: Generations, count: int, reading: Reading, bodies: ChatAnswers) -> AsyncIterator[str]:
    ends: dict[int, End] = {}
    for role in bodies.roles():
        yield role
    async for index, step in steps(running, count, reading):
        if isinstance(step.event, End):
            ends[index] = step.event
        yield bodies.chunk(index, step)
    for chunk in bodies.usage_chunks(ends):
        yield chunk
    yield DONE


def _add_completions(router: APIRouter, service: TextService, served: Served) -> None:
    @router.post("/completions", response_model=TextCompletion, responses=documented("text_completion objects"))
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue texts."""
        unknown = served.unknown(body.model)
        if unknown:
            return unknown
        options = {**body.options(), **served.options(body.model)}
        each = configs(options, body.choices, service.engine.features)
        prompts = await asyncio.to_thread(lambda: [service.prepare(prompt, each[0]) for prompt in body.prompts()])
        body.check_told(sum(map(len, prompts)))
        jobs: list[Job] = [(ids, config) for ids in prompts for config in each]
        running = await Generations.begin(service, jobs)
        bodies = TextAnswers(
            body.model, service.fingerprint, len(each), logprobs=body.logprobs, with_usage=body.with_usage
        )
        return await answered(
            request,
            running,
            body.stream,
            _clamped(service, options.get("max_new_tokens"), prompts),
            lambda: _text_events(running, bodies),
            lambda: _text_whole(running, len(jobs), bodies),
        )


async def _text_whole(running: Generations, count: int, bodies: TextAnswers) -> bytes:
    answers: list[list[Delta]] = [[] for _ in range(count)]
    async for index, delta in running:
        answers[index].append(delta)
    return bodies.whole(answers)


async def _text_events(running: Generations, bodies: TextAnswers) -> AsyncIterator[str]:
    last: dict[int, Delta] = {}
    async for index, delta in running:
        last[index] = delta
        yield bodies.chunk(index, delta)
    for chunk in bodies.usage_chunks(last):
        yield chunk
    yield DONE


def _add_responses(router: APIRouter, service: TextService, served: Served, fetcher: Fetcher | None) -> None:
    @router.post("/responses", response_model=ResponseBody, responses=documented("response.* events"))
    async def responses(body: ResponseRequest, request: Request) -> Response:
        """Answer a conversation, in the form of OpenAI's Responses API. Nothing is kept."""
        unknown = served.unknown(body.model)
        if unknown:
            return unknown
        options = {**body.options(), **served.options(body.model)}
        asked = _readable(body.asked(), service, served.model)
        ids, options["grammar"], reading = await asyncio.to_thread(understood, service, asked, fetcher)
        running = await Generations.begin(service, [(ids, configs(options, 1, service.engine.features)[0])])
        bodies = ResponseAnswers(body)
        return await answered(
            request,
            running,
            body.stream,
            _clamped(service, options.get("max_new_tokens"), [ids]),
            lambda: _response_events(running, reading, bodies),
            lambda: _response_whole(running, reading, bodies),
        )


async def _response_whole(running: Generations, reading: Reading, bodies: ResponseAnswers) -> bytes:
    async for _, step in steps(running, 1, reading):
        bodies.add(step)
    return bodies.body().model_dump_json(exclude_unset=True).encode()


async def _response_events(running: Generations, reading: Reading, bodies: ResponseAnswers) -> AsyncIterator[str]:
    for event in bodies.begin():
        yield event
    try:
        async for _, step in steps(running, 1, reading):
            for event in bodies.add(step):
                yield event
    except QwenOnnxError as error:
        for event in bodies.failed(error):
            yield event
