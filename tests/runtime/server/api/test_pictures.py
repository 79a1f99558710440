"""Pictures over HTTP: what is answered, what they cost, what is refused."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from qwen_onnx.artifact.processor_config import ImageSettings
from qwen_onnx.runtime import QwenService
from qwen_onnx.runtime.processing.images import decode_image, prepare
from qwen_onnx.runtime.server.fetching import Fetcher
from qwen_onnx.runtime.service.generation import Attached, ChatPrompt, GenerationConfig
from tests.fixtures.pictures import as_file, chart, declared, noise
from tests.fixtures.servers import ROOMY, Guarded, guarded
from tests.runtime.server.test_fetching import host, said, whole


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


def responded(client: Guarded, *items: Any, **changes: Any) -> httpx.Response:
    """Of the Responses API."""
    return client.http.post("/v1/responses", json={"model": "tiny", "input": items, "max_output_tokens": 4, **changes})


def item(*parts: str | bytes | dict[str, Any], role: str = "user") -> dict[str, Any]:
    """A message of the Responses API: texts, pictures as bytes, or parts as they are."""
    content = [
        {"type": "input_image", "image_url": uri(part)}
        if isinstance(part, bytes)
        else {"type": "input_text", "text": part}
        if isinstance(part, str)
        else part
        for part in parts
    ]
    return {"role": role, "content": content}


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


FAULTS = [
    ("https://example.org/a.png", "remote URLs are not fetched"),
    ("file:///etc/passwd", "remote URLs are not fetched"),
    ("data:text/html;base64,AAAA", "not a data URI of a picture"),
    ("data:image/png;base64,%%%", "not base64"),
    (uri(b""), "not a picture of a known format"),
    (uri(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"), "not a picture of a known format"),
    (uri(b"<!doctype html><title>a.png</title>"), "not a picture of a known format"),
    (uri(as_file(noise(200, 200))[:9000]), "damaged"),
    (uri(declared(65535, 65535)), "declares far more pixels"),
    (uri(as_file(noise(900, 2))), "more than 200 times"),
]


@pytest.mark.parametrize(("url", "message"), FAULTS)
def test_what_is_no_picture_gets_a_400_that_names_the_part(client: Guarded, url: str, message: str) -> None:
    messages = [*shown("first"), *shown("then")]
    messages[1]["content"].append({"type": "image_url", "image_url": {"url": url}})
    answer = client.ask(messages=messages)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == "messages.1.content.1.image_url"
    answer = responded(client, item("first"), item("then", {"type": "input_image", "image_url": url}))
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == "input.1.content.1.image_url"


def test_too_many_and_too_large_pictures_are_refused(client: Guarded) -> None:
    small, large = as_file(chart(30, 30)), as_file(chart(220, 220))
    answer = client.ask(messages=shown(*[small] * 17))
    assert answer.status_code == 400
    assert "17 pictures, the most are 16" in answer.json()["error"]["message"]
    answer = client.ask(messages=shown(*[large] * 16))
    assert answer.status_code == 400
    assert "exceed the context" in answer.json()["error"]["message"]


def test_the_responses_api_sees_what_a_chat_sees(client: Guarded) -> None:
    """Several, with a detail, before and behind text, and in an earlier turn."""
    one, other = as_file(chart(60, 60)), as_file(noise(90, 60), "JPEG")
    before = [*shown(one, "against", other, detail="low"), {"role": "assistant", "content": "yes"}]
    wanted = told(client, [*before, *shown("and", one)])
    detailed = {"type": "input_image", "image_url": uri(other), "detail": "low", "file_id": None}
    items = [item(one, "against", detailed), {"role": "assistant", "content": "yes"}, item("and", one)]
    answer = responded(client, *items)
    assert answer.status_code == 200, answer.text
    assert answer.json()["output"][0]["content"][0]["text"] == wanted["choices"][0]["message"]["content"]
    assert answer.json()["usage"]["input_tokens"] == wanted["usage"]["prompt_tokens"]
    turned = responded(client, item(detailed, "against", one), *items[1:]).json()
    assert turned["output"][0]["content"] != answer.json()["output"][0]["content"]


def test_too_many_pictures_of_a_response_are_refused(client: Guarded) -> None:
    small = as_file(chart(30, 30))
    answer = responded(client, item(*[small] * 9), item(*[small] * 8))
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "17 pictures, the most are 16"
    assert answer.json()["error"]["param"] == "input"


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "input_image"}, ".1.input_image.image_url: Field required"),
        ({"type": "input_image", "file_id": "file-1", "image_url": "data:image/png;base64,"}, "file_id"),
        ({"type": "input_image", "image_url": {"url": "data:image/png;base64,AAAA"}}, "image_url"),
        ({"type": "input_image", "image_url": "data:image/png;base64,AAAA", "detail": "most"}, "detail"),
        ({"type": "input_file", "file_data": "AAAA"}, "'input_file'"),
    ],
)
def test_a_part_of_another_form_is_told(client: Guarded, part: dict[str, Any], message: str) -> None:
    answer = responded(client, item("so", part))
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


@pytest.mark.parametrize("role", ["system", "developer", "assistant"])
def test_only_users_show_pictures(client: Guarded, role: str) -> None:
    answer = responded(client, item("be brief", as_file(chart(30, 30)), role=role), item("so?"))
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == f"only the user shows pictures, this role is {role}"
    assert answer.json()["error"]["param"] == "input.0.content.1.image_url"
    answer = client.ask(messages=[{**shown(as_file(chart(30, 30)))[0], "role": role}, *shown("so?")])
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith("messages.0")


def test_a_model_of_text_refuses_pictures_by_its_name(exact_artifact: Path) -> None:
    with guarded(exact_artifact, ROOMY, options={"isolated": False}) as client:
        answer = client.ask(messages=shown(as_file(chart(30, 30))))
        assert answer.status_code == 400
        assert answer.json()["error"]["message"] == "the model 'tiny' reads no pictures"
        assert answer.json()["error"]["param"] == "messages.0.content.0.image_url"
        answer = responded(client, item("so", as_file(chart(30, 30))))
        assert answer.status_code == 400
        assert answer.json()["error"]["message"] == "the model 'tiny' reads no pictures"
        assert answer.json()["error"]["param"] == "input.0.content.1.image_url"


def test_a_named_host_is_asked_and_its_picture_seen(
    seeing_artifact: Path, client: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the whole server; without ``fetch_images`` see above."""
    picture = as_file(chart(60, 60))
    with host(said(whole(picture))) as (connect, asked):
        monkeypatch.setattr("qwen_onnx.runtime.server.app.Fetcher", partial(Fetcher, connect=connect))
        settings = ROOMY.model_copy(update={"fetch_images": ("pictures.example",)})
        with guarded(seeing_artifact, settings, options={"isolated": False}) as fetching:
            url = "http://pictures.example/a.png"
            part = {"type": "image_url", "image_url": {"url": url}}
            found = told(fetching, [{"role": "user", "content": [part]}])
            assert found["usage"]["prompt_tokens"] == told(client, shown(picture))["usage"]["prompt_tokens"]
            assert len(asked) == 1
            answer = responded(fetching, item({"type": "input_image", "image_url": "http://10.0.0.1/"}))
            assert answer.status_code == 400
            assert answer.json()["error"]["message"].startswith("pictures are not fetched from '10.0.0.1': send the")
            assert answer.json()["error"]["param"] == "input.0.content.0.image_url"
