"""Pictures in Foundry Local: through a session, the Responses API and chat completions. Runs inside its environment."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

from qwen_onnx.package.sdk.job import Job, Limit, StepError


def judge(seeing: dict[str, Any], name: str, tokens: int, answer: str) -> str:
    """The answer, when the picture took its tokens and the answer names its colour and no other picture's.

    Raises:
        StepError: it does not.
    """
    if tokens != seeing["tokens"]:
        raise StepError(f"{name}: the prompt has {tokens} tokens, expected {seeing['tokens']}")
    told = answer.lower()
    for picture in seeing["pictures"]:
        if any(word in told for word in picture["words"]) != (picture["name"] == name):
            raise StepError(f"{seeing['question']!r} about {name}: the answer is {answer!r}")
    return answer.strip()


def in_session(model: Any, job: Job, step: Callable[[str], Any]) -> None:
    """Each picture in a session of its own: Foundry Local takes media in a conversation's first turn alone."""
    from foundry_local_sdk import ChatSession, ImageItem, MessageItem, Request, RequestOptions, SearchOptions, TextItem

    def ask(png: bytes) -> tuple[int, str]:
        parts = [ImageItem("png", png), TextItem(job.seeing["question"])]
        with ChatSession(model) as session, Request().add_item(MessageItem.user(parts)) as request:
            session.set_options(
                RequestOptions(search=SearchOptions(temperature=0.0, max_output_tokens=job.seeing["most"]))
            )
            with session.process_request(request) as answer:
                texts = [part.text for item in answer for part in getattr(item, "parts", [item]) if _has_text(part)]
                return answer.get_usage().prompt_tokens, "".join(texts)

    with step("pictures, session") as notes:
        _ask_all(job, notes, lambda picture: ask(base64.b64decode(picture["png"])))


def over_http(client: Any, job: Job, step: Callable[[str], Any]) -> None:
    """The Responses API answers as a session does; chat completions of 2.2.1 drop the picture without a word."""

    def respond(picture: dict[str, Any]) -> tuple[int, str]:
        content = [
            {"type": "input_image", "image_url": _uri(picture)},
            {"type": "input_text", "text": job.seeing["question"]},
        ]
        message = {"type": "message", "role": "user", "content": content}
        answer = client.responses.create(
            model=job.model_id, input=[message], max_output_tokens=job.seeing["most"], temperature=0
        )
        texts = [part.text for item in answer.output for part in _parts(item) if _has_text(part)]
        return answer.usage.input_tokens, "".join(texts)

    def complete(picture: dict[str, Any]) -> tuple[int, str]:
        content = [
            {"type": "image_url", "image_url": {"url": _uri(picture)}},
            {"type": "text", "text": job.seeing["question"]},
        ]
        answer = client.chat.completions.create(
            model=job.model_id,
            messages=[{"role": "user", "content": content}],
            max_tokens=job.seeing["most"],
            temperature=0,
        )
        tokens = answer.usage.prompt_tokens
        if tokens == job.seeing["blind"]:
            sdk = f"foundry-local-sdk {metadata.version('foundry-local-sdk')}"
            raise Limit(f"{sdk} drops image_url: {tokens} tokens with a picture and without")
        return tokens, answer.choices[0].message.content or ""

    with step("pictures, Responses API") as notes:
        _ask_all(job, notes, respond)
    with step("pictures, chat completions") as notes:
        _ask_all(job, notes, complete)


def _ask_all(job: Job, notes: list[str], ask: Callable[[dict[str, Any]], tuple[int, str]]) -> None:
    answers = [judge(job.seeing, picture["name"], *ask(picture)) for picture in job.seeing["pictures"]]
    notes.append(f"{job.seeing['tokens']} tokens each: {' / '.join(answers)}")


def _uri(picture: dict[str, Any]) -> str:
    return f"data:image/png;base64,{picture['png']}"


def _parts(item: Any) -> Sequence[Any]:
    """Parts of a message, of what was thought and of its summary."""
    return [*(getattr(item, "content", None) or []), *(getattr(item, "summary", None) or [])]


def _has_text(part: Any) -> bool:
    return isinstance(getattr(part, "text", None), str)
