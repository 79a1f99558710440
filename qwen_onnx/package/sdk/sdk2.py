"""foundry-local-sdk 2: register, load, chat, serve, find it again, unregister. Runs inside its environment."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from qwen_onnx.package.sdk import seeing
from qwen_onnx.package.sdk.job import Job, Phase, StepError, compared

PHASE_NAMES = ("use", "again", "gone")
APPLICATION = "qwen-onnx-foundry-check"
ANSWER = 8
REQUEST_SECONDS = 120
VERSIONS = ("foundry-local-sdk", "onnxruntime", "onnxruntime-genai-core")


@contextmanager
def _manager(job: Job) -> Iterator[Any]:
    from foundry_local_sdk import Configuration, FoundryLocalManager, LogLevel

    configuration = Configuration(
        app_name=APPLICATION,
        app_data_dir=f"{job.state}/app",
        model_cache_dir=f"{job.state}/models",
        logs_dir=f"{job.state}/logs",
        log_level=LogLevel.ERROR,
        disable_nonessential_telemetry=True,
    )
    FoundryLocalManager.initialize(configuration)
    manager = FoundryLocalManager.instance
    try:
        yield manager
    finally:
        manager.close()


def _local(manager: Any) -> Any:
    from foundry_local_sdk import CatalogType

    return manager.get_catalog(CatalogType.LOCAL)


def use(job: Job, step: Callable[[str], Any]) -> None:
    """Everything that a program does with a package, but for unregistering it."""
    with step("start") as notes:
        notes += [f"{name} {metadata.version(name)}" for name in VERSIONS]
    with _manager(job) as manager:
        local = _local(manager)
        with step("register") as notes:
            model = _register(local, job)
            _check_properties(model.info, job)
            notes.append(f"alias {model.alias}, context {model.context_length}")
        with step("list"):
            for place, models in (("list", local.list_models()), ("cached", local.get_cached_models())):
                _expect_among(job.model_id, _ids(models), place)
        with step("load"):
            model.load()
            if not model.is_loaded:
                raise StepError("it says that it is not loaded")
        _chat(model, job, step)
        if job.seeing:
            seeing.in_session(model, job, step)
        _serve(manager, job, step)
        with step("unload"):
            model.unload()
            if model.is_loaded:
                raise StepError("it says that it is still loaded")


def _register(local: Any, job: Job) -> Any:
    from foundry_local_sdk import ModelInfoBuilder

    with ModelInfoBuilder() as builder:
        for key, text in job.strings.items():
            builder.set_string_property(key, text)
        for key, number in job.ints.items():
            builder.set_int_property(key, number)
        return local.register_model(job.folder, job.model_id, builder)


def _check_properties(info: Any, job: Job) -> None:
    """Foundry keeps what was registered; the device is a field of its own."""
    found: dict[str, Any] = {key: info.get_string_property(key) for key in job.strings}
    found |= {key: info.get_int_property(key, -1) for key in job.ints}
    if info.runtime is not None:
        found |= {"execution_provider": info.runtime.execution_provider, "device_type": info.runtime.device_type}
    wrong = [f"{key} {found[key]!r}" for key, value in {**job.strings, **job.ints}.items() if found[key] != value]
    if wrong:
        raise StepError(f"Foundry Local keeps other properties: {', '.join(wrong)}")


def _ids(models: Any) -> list[str]:
    """Ids of models and of their variants."""
    return [found.id for model in models for found in (model, *model.variants)]


def _expect_among(wanted: str, found: list[str], place: str) -> None:
    if wanted not in found:
        raise StepError(f"{place}: {wanted} is not among {found}")


def _chat(model: Any, job: Job, step: Callable[[str], Any]) -> None:
    from foundry_local_sdk import ChatSession, MessageItem, Request, RequestOptions, SearchOptions

    def request(messages: list[dict[str, str]]) -> Any:
        made = Request()
        for message in messages:
            made.add_item(getattr(MessageItem, message["role"])(message["content"]))
        return made

    with step("chat session") as notes, ChatSession(model) as session:
        session.set_options(RequestOptions(search=SearchOptions(temperature=0.0, max_output_tokens=ANSWER)))
        with request(job.prompts[0]["messages"]) as asked, session.process_request(asked) as answer:
            usage = answer.get_usage()
            _expect_answer(usage.completion_tokens)
            notes.append(f"{usage.prompt_tokens} + {usage.completion_tokens} tokens")
    with step("count tokens, session") as notes:
        counts = []
        for prompt in job.prompts:
            with ChatSession(model) as session, request(prompt["messages"]) as asked:
                counts.append(session.preflight_request(asked).prompt_tokens)
        notes.append(compared(job, counts))


def _expect_answer(tokens: int) -> None:
    if not 0 < tokens <= ANSWER:
        raise StepError(f"the answer has {tokens} tokens, 1 to {ANSWER} were asked for")


def _serve(manager: Any, job: Job, step: Callable[[str], Any]) -> None:
    from openai import OpenAI

    with step("web service") as notes:
        manager.start_web_service()
        client = OpenAI(
            base_url=f"{manager.urls[0].rstrip('/')}/catalogs/local/v1",
            api_key="unused",
            max_retries=0,
            timeout=REQUEST_SECONDS,
        )
        _expect_among(job.model_id, [found.id for found in client.models.list().data], "models")
        notes.append(manager.urls[0])

    def ask(prompt: dict[str, Any], tokens: int, **options: Any) -> Any:
        return client.chat.completions.create(
            model=job.model_id, messages=prompt["messages"], max_tokens=tokens, temperature=0, **options
        )

    with step("chat, web") as notes:
        answer = ask(job.prompts[0], ANSWER)
        _expect_answer(answer.usage.completion_tokens)
        whole = answer.choices[0].message.content or ""
        notes.append(f"{answer.usage.completion_tokens} tokens, {answer.choices[0].finish_reason}")
    with step("stream, web") as notes:
        stream = ask(job.prompts[0], ANSWER, stream=True)
        pieces = [piece.choices[0].delta.content or "" for piece in stream if piece.choices]
        # a cut character at the very end may be told or dropped
        if "".join(pieces).rstrip("\ufffd") != whole.rstrip("\ufffd"):
            raise StepError(f"streamed {''.join(pieces)!r}, whole {whole!r}")
        notes.append(f"{len(pieces)} pieces, the same text")
    with step("count tokens, web") as notes:
        notes.append(compared(job, [ask(prompt, 1).usage.prompt_tokens for prompt in job.prompts]))
    if job.seeing:
        seeing.over_http(client, job, step)
    with step("stop web service"):
        client.close()
        manager.stop_web_service()


def again(job: Job, step: Callable[[str], Any]) -> None:
    """Another process finds the registration, and takes it back."""
    with _manager(job) as manager:
        local = _local(manager)
        with step("found by a second process"):
            model = local.get_model_variant(job.model_id)
            if model is None or not model.is_cached:
                raise StepError("the registration was not kept")
            _check_properties(model.info, job)
        with step("unregister"):
            local.unregister_model(job.model_id)
            if local.get_model_variant(job.model_id) is not None:
                raise StepError("it is still there")


def gone(job: Job, step: Callable[[str], Any]) -> None:
    """A third one does not find it any more, but the package's files are there."""
    with _manager(job) as manager, step("gone for a third process") as notes:
        if _local(manager).get_model_variant(job.model_id) is not None:
            raise StepError("the registration is still there")
        notes.append(f"{len(list(Path(job.folder).iterdir()))} files kept")


PHASES: dict[str, Phase] = {"use": use, "again": again, "gone": gone}
