"""Sounds over HTTP: what is answered, what they cost, what is refused."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen_onnx.artifact.audio_config import AudioSettings
from qwen_onnx.runtime import QwenService
from qwen_onnx.runtime.processing.audio import decode_sound, prepare_sound
from qwen_onnx.runtime.service.generation import Attached, ChatPrompt, GenerationConfig
from tests.fixtures.pictures import as_file, chart
from tests.fixtures.servers import ROOMY, Guarded, guarded
from tests.fixtures.sounds import as_sound, hiss, sweep, tone
from tests.runtime.server.api.test_pictures import item, responded, shown, told


@pytest.fixture(scope="module")
def client(hearing_artifact: Path) -> Iterator[Guarded]:
    """Of a server with the tiny model that hears, its engine in a process of its own."""
    with guarded(hearing_artifact, ROOMY) as found:
        yield found


def sound(content: bytes | str, form: str = "wav") -> dict[str, Any]:
    data = content if isinstance(content, str) else base64.b64encode(content).decode()
    return {"type": "input_audio", "input_audio": {"data": data, "format": form}}


def played(*parts: str | bytes | dict[str, Any]) -> list[dict[str, Any]]:
    """One message of the user: texts, sounds as bytes of a WAV, or parts as they are."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else part if isinstance(part, dict) else sound(part)
        for part in parts
    ]
    return [{"role": "user", "content": content}]


def tokens(client: Guarded, *parts: Any) -> int:
    found: int = told(client, played(*parts))["usage"]["prompt_tokens"]
    return found


def test_an_answer_is_that_of_the_service(client: Guarded, hearing_artifact: Path) -> None:
    one, other = as_sound(tone(440, 0.5)), as_sound(hiss(1), form="FLAC")
    messages = [
        *played(one, "What is it?"),
        {"role": "assistant", "content": "A tone."},
        *played("And", sound(other, "flac"), "this?"),
    ]
    with QwenService(hearing_artifact, threads=1, streams=1) as service:
        place = {"type": "audio", "audio_url": ""}
        plain = [
            {"role": "user", "content": [place, {"type": "text", "text": "What is it?"}]},
            {"role": "assistant", "content": "A tone."},
            {"role": "user", "content": [{"type": "text", "text": "And"}, place, {"type": "text", "text": "this?"}]},
        ]
        prompt = ChatPrompt(plain, sounds=[Attached(one, "it"), Attached(other, "it")])
        wanted = service.generate(prompt, GenerationConfig(max_new_tokens=4, temperature=0))
    found = told(client, messages, max_tokens=4, temperature=0)
    assert found["choices"][0]["message"]["content"] == wanted.text
    assert found["usage"]["prompt_tokens"] == wanted.prompt_tokens
    # half a second and a second: 25 steps and 50, of which two become a token
    assert found["usage"]["prompt_tokens_details"]["audio_tokens"] == 12 + 25


def test_the_answer_depends_on_the_sound(client: Guarded) -> None:
    answers = [
        told(client, played(as_sound(samples), "?"), top_logprobs=5)["choices"][0]["logprobs"]["content"]
        for samples in (tone(440, 1), hiss(1))
    ]
    assert answers[0] != answers[1]


def test_every_format_and_rate_is_heard(client: Guarded, hearing_artifact: Path) -> None:
    """Of a second each: as many tokens whatever the file."""
    settings = AudioSettings.read(hearing_artifact)
    content = as_sound(sweep(1))
    wanted = prepare_sound(decode_sound(content, settings, where="it"), settings).tokens
    assert tokens(client, content) - tokens(client, as_sound(tone(440, 0.045))) == wanted - 1
    for form, rate in (("flac", 16_000), ("mp3", 16_000), ("wav", 44_100), ("wav", 8_000)):
        file = as_sound(sweep(1, rate), rate, form.upper())
        assert tokens(client, sound(file, form)) == tokens(client, content), (form, rate)


def test_a_stream_tells_the_usage_too(client: Guarded) -> None:
    answer = client.ask(messages=played(as_sound(hiss(1))), stream=True, stream_options={"include_usage": True})
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n") if line.startswith("data: {")]
    usage = json.loads(lines[-1])["usage"]
    assert usage["prompt_tokens_details"]["audio_tokens"] == 25


def test_text_alone_tells_of_no_sounds(client: Guarded) -> None:
    assert "audio_tokens" not in told(client, played("Hello"))["usage"]["prompt_tokens_details"]


WAV = as_sound(hiss(0.1))


@pytest.mark.parametrize(
    ("part", "message", "place"),
    [
        (sound(""), "not a sound of a known format", "input_audio"),
        (sound("not base64!"), "the sound is not base64", "input_audio"),
        (sound(b"<html>"), "not a sound of a known format", "input_audio"),
        (sound(WAV, "mp3"), "the request says mp3, the sound is wav", "input_audio"),
        (sound(WAV[:-50]), "damaged: it declares", "input_audio"),
        (sound(as_sound(hiss(6.1))), "lasts 6.1 s, the model hears 6 s", "input_audio"),
        (sound(WAV, "ogg"), "the request says ogg, the sound is wav", "input_audio"),
    ],
)
def test_what_cannot_be_heard_is_a_400_that_names_the_part(
    client: Guarded, part: dict[str, Any], message: str, place: str
) -> None:
    answer = client.ask(messages=played("Listen:", part))
    assert answer.status_code == 400, answer.text
    assert message in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == f"messages.0.content.1.{place}"


def test_a_part_that_lacks_something_is_refused(client: Guarded) -> None:
    for part in ({"type": "input_audio"}, {"type": "input_audio", "input_audio": {"format": "wav"}}):
        answer = client.ask(messages=played(part))
        assert answer.status_code == 400
        assert answer.json()["error"]["param"].startswith("messages.0")


def test_limits_of_a_request(client: Guarded) -> None:
    answer = client.ask(messages=played(*[WAV] * 9))
    assert answer.status_code == 400
    assert "9 sounds, the most are 8" in answer.json()["error"]["message"]


def test_only_the_user_plays_sounds(client: Guarded) -> None:
    for role in ("system", "assistant"):
        answer = client.ask(messages=[{"role": role, "content": [sound(WAV)]}, *played("?")])
        assert answer.status_code == 400


def test_a_picture_for_a_model_that_hears_is_refused(client: Guarded) -> None:
    answer = client.ask(messages=shown(as_file(chart(30, 30)), "?"))
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("the model 'tiny' reads no pictures")


def test_a_sound_for_a_model_of_text_names_the_model(exact_artifact: Path) -> None:
    with guarded(exact_artifact, ROOMY, options={"isolated": False}) as text:
        answer = text.ask(messages=played(WAV, "?"))
        assert answer.status_code == 400
        assert answer.json()["error"]["message"].startswith("the model 'tiny' hears no sounds")
        assert answer.json()["error"]["param"] == "messages.0.content.0.input_audio"


def test_the_responses_api_hears_what_a_chat_hears(client: Guarded) -> None:
    """Several, behind and between text, and in an earlier turn."""
    one, other = sound(as_sound(tone(440, 0.5))), sound(as_sound(hiss(1), form="FLAC"), "flac")
    wanted = told(
        client,
        [*played(one, "or", other), {"role": "assistant", "content": "yes"}, *played("and", one)],
        max_tokens=4,
        temperature=0,
    )
    items = [item(one, "or", other), {"role": "assistant", "content": "yes"}, item("and", one)]
    answer = responded(client, *items, temperature=0)
    assert answer.status_code == 200, answer.text
    assert answer.json()["output"][0]["content"][0]["text"] == wanted["choices"][0]["message"]["content"]
    assert answer.json()["usage"]["input_tokens"] == wanted["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("items", "message", "param"),
    [
        ([item("?", sound(WAV, "mp3"))], "the request says mp3, the sound is wav", "input.0.content.1.input_audio"),
        ([item(*[sound(WAV)] * 5), item(*[sound(WAV)] * 4)], "9 sounds, the most are 8", "input"),
        (
            [item("?"), item(sound(WAV), role="assistant")],
            "only the user plays sounds, this role is assistant",
            "input.1.content.0.input_audio",
        ),
        (
            [item({"type": "input_audio", "data": "", "format": "wav"})],
            ".0.input_audio.input_audio: Field required",
            "input",
        ),
    ],
)
def test_what_a_response_cannot_hear_is_a_400(
    client: Guarded, items: list[dict[str, Any]], message: str, param: str
) -> None:
    answer = responded(client, *items)
    assert answer.status_code == 400, answer.text
    assert message in answer.json()["error"]["message"]
    assert param in answer.json()["error"]["param"]
