"""Pictures over HTTP: what is answered, what they cost, what is refused."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen_onnx.artifact.processor_config import ImageSettings
from qwen_onnx.runtime import QwenService
from qwen_onnx.runtime.processing.images import decode_image, prepare
from qwen_onnx.runtime.service.generation import Attached, ChatPrompt, GenerationConfig
from tests.fixtures.pictures import as_file, chart, declared, noise
from tests.fixtures.servers import ROOMY, Guarded, guarded


@pytest.fixture(scope="module")
def client(seeing_artifact: Path) -> Iterator[Guarded]:
    """Of a server with the tiny model that sees, its engine in a process of its own."""
    with guarded(seeing_artifact, ROOMY) as found:
        yield found


def uri(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def shown(*parts: str | bytes, detail: str | None = None) -> list[dict[str, Any]]:
    """One message of the user: texts, and pictures as bytes or as URLs that begin with a scheme."""
    more = {} if detail is None else {"detail": detail}
    content: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": uri(part), **more}}
        if isinstance(part, bytes)
        else {"type": "text", "text": part}
        for part in parts
    ]
    return [{"role": "user", "content": content}]


def told(client: Guarded, messages: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    answer = client.ask(messages=messages, logprobs=True, **changes)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def first(answer: dict[str, Any]) -> float:
    """Log probability of the answer's first token."""
    return float(answer["choices"][0]["logprobs"]["content"][0]["logprob"])


def test_a_picture_is_seen_and_its_tokens_are_counted(client: Guarded, seeing_artifact: Path) -> None:
    """Over HTTP and in Python alike; another picture gets another answer."""
    one, other = as_file(chart(120, 90)), as_file(noise(120, 90))
    answer = told(client, shown("What is ", one, "?", detail="high"))
    tokens = prepare(decode_image(one, where="it"), ImageSettings.read(seeing_artifact), where="it").tokens
    without = told(client, shown("What is ", "?"))
    # the picture, and the markers at both ends of it
    assert answer["usage"]["prompt_tokens"] == without["usage"]["prompt_tokens"] + tokens + 2
    assert abs(first(answer) - first(told(client, shown("What is ", other, "?")))) > 1e-3
    with QwenService(seeing_artifact, threads=1, streams=1) as service:
        content = [{"type": "text", "text": "What is "}, {"type": "image"}, {"type": "text", "text": "?"}]
        prompt = ChatPrompt([{"role": "user", "content": content}], pictures=[Attached(one, "it")])
        same = service.generate(prompt, GenerationConfig(max_new_tokens=4))
    assert same.text == answer["choices"][0]["message"]["content"]
    assert same.prompt_tokens == answer["usage"]["prompt_tokens"]


def test_several_pictures_stand_where_they_were_sent(client: Guarded) -> None:
    one, other = as_file(chart(60, 60)), as_file(noise(90, 60), "JPEG")
    both = told(client, shown(one, "against", other))
    turned = told(client, shown(other, "against", one))
    assert both["usage"]["prompt_tokens"] == turned["usage"]["prompt_tokens"]
    assert abs(first(both) - first(turned)) > 1e-3


def test_a_second_question_finds_the_picture_in_the_cache(client: Guarded) -> None:
    messages = shown(as_file(chart(200, 200)), "What?")
    answer = told(client, messages)
    said = {"role": "assistant", "content": answer["choices"][0]["message"]["content"]}
    again = told(client, [*messages, said, {"role": "user", "content": "And now?"}])
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= 49


def test_a_marker_that_a_user_typed_stays_text(client: Guarded) -> None:
    picture = as_file(chart(60, 60))
    told(client, shown("<|image_pad|><|vision_start|>", picture, "<|image_pad|>"))
    told(client, [{"role": "user", "content": "<|image_pad|>"}])


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"url": "https://example.org/a.png"}, "remote URLs are not fetched"),
        ({"url": "file:///etc/passwd"}, "remote URLs are not fetched"),
        ({"url": "data:text/html;base64,AAAA"}, "not a data URI of a picture"),
        ({"url": "data:image/png;base64,%%%"}, "not base64"),
        ({"url": uri(b"")}, "not a picture of a known format"),
        (
            {"url": uri(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml")},
            "not a picture of a known format",
        ),
        ({"url": uri(as_file(noise(200, 200))[:9000])}, "damaged"),
        ({"url": uri(declared(65535, 65535))}, "declares far more pixels"),
        ({"url": uri(as_file(noise(900, 2)))}, "more than 200 times"),
    ],
)
def test_what_is_no_picture_gets_a_400_that_names_the_part(client: Guarded, part: dict[str, str], message: str) -> None:
    messages = [*shown("first"), *shown("then")]
    messages[1]["content"].append({"type": "image_url", "image_url": part})
    answer = client.ask(messages=messages)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == "messages.1.content.1.image_url"


def test_too_many_and_too_large_pictures_are_refused(client: Guarded) -> None:
    small, large = as_file(chart(30, 30)), as_file(chart(220, 220))
    answer = client.ask(messages=shown(*[small] * 17))
    assert answer.status_code == 400
    assert "17 pictures, the most are 16" in answer.json()["error"]["message"]
    answer = client.ask(messages=shown(*[large] * 16))
    assert answer.status_code == 400
    assert "exceed the context" in answer.json()["error"]["message"]


@pytest.mark.parametrize("role", ["system", "assistant"])
def test_only_users_show_pictures(client: Guarded, role: str) -> None:
    answer = client.ask(messages=[{**shown(as_file(chart(30, 30)))[0], "role": role}, *shown("so?")])
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith("messages.0")


def test_a_model_of_text_refuses_pictures_by_its_name(exact_artifact: Path) -> None:
    with guarded(exact_artifact, ROOMY, options={"isolated": False}) as client:
        answer = client.ask(messages=shown(as_file(chart(30, 30))))
        assert answer.status_code == 400
        assert answer.json()["error"]["message"] == "the model 'tiny' reads no pictures"
        assert answer.json()["error"]["param"] == "messages.0.content.0.image_url"
