"""Transcriptions over HTTP: by OpenAI's own client, what they cost, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from qwen_onnx.errors import RequestError
from qwen_onnx.runtime import QwenService
from qwen_onnx.runtime.processing.transcripts import Transcript
from qwen_onnx.runtime.server.keys import KeyRing, digest_of
from qwen_onnx.runtime.service.generation import Attached, GenerationConfig
from qwen_onnx.runtime.service.transcription import transcribing
from tests.fixtures.servers import ROOMY, Guarded, guarded
from tests.fixtures.sounds import RATE, as_sound, hiss, sweep, tone
from tests.runtime.server.api.test_pictures import told
from tests.runtime.server.api.test_sounds import played

ROUTE = "/v1/audio/transcriptions"
WAV = as_sound(sweep(1))


@pytest.fixture(scope="module")
def client(speech_artifact: Path) -> Iterator[Guarded]:
    """Of a server with the tiny model that transcribes, its engine in a process of its own."""
    with guarded(speech_artifact, ROOMY) as found:
        yield found


@pytest.fixture
def official(client: Guarded) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{client.port}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def service(speech_artifact: Path) -> Iterator[QwenService]:
    with QwenService(speech_artifact, threads=1, streams=1) as found:
        yield found


def asked(client: Guarded, file: Any = WAV, **fields: Any) -> httpx.Response:
    told = {"model": "tiny", **fields}
    parts: dict[str, Any] = {name: (None, str(value)) for name, value in told.items() if value is not None}
    if file is not None:
        parts["file"] = ("it.wav", file, "audio/wav")
    return client.http.post(ROUTE, files=parts)


def raw(service: QwenService, content: bytes, **more: Any) -> str:
    """The model's own words."""
    work = transcribing(service, Attached(content, "it"), **more)
    return service.generate(work.prompt, GenerationConfig(temperature=0, **work.options)).text


def test_prompts_are_those_of_transformers(service: QwenService) -> None:
    """Context as the system's message, and a language as the beginning of the answer."""
    import transformers as tf

    from tests.fixtures.speech import MARKERS, speech_tokenizer

    tokenizer = speech_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.audio_bos_token, tokenizer.audio_eos_token, tokenizer.audio_token = MARKERS
    template = tokenizer.chat_template
    processor = tf.Qwen3ASRProcessor(tf.Qwen3ASRFeatureExtractor(), tokenizer, chat_template=template)
    samples = hiss(1.3)
    content = as_sound(samples, subtype="FLOAT")
    for given in ({}, {"language": "en"}, {"prompt": "Ada, Zuse"}, {"language": "German", "prompt": "Ada"}):
        wanted = processor.apply_transcription_request(audio=samples, **given)
        found = transcribing(service, Attached(content, "it"), **given)
        assert list(found.prompt) == wanted["input_ids"][0].tolist(), given
        assert found.audio_tokens == 17


@pytest.mark.parametrize("form", ["WAV", "FLAC", "MP3"])
def test_the_official_client_gets_a_transcript(official: openai.OpenAI, service: QwenService, form: str) -> None:
    content = as_sound(tone(440, 1.2), form=form)
    found: Any = official.audio.transcriptions.create(
        model="tiny", file=(f"a.{form.lower()}", content), language="en", prompt="Ada", temperature=0
    )
    assert found.text == raw(service, content, language="en", prompt="Ada").strip()
    assert found.to_dict()["language"] == "English"
    details = found.to_dict()["usage"]
    assert details["input_token_details"]["audio_tokens"] == 16
    assert details["total_tokens"] == details["input_tokens"] + details["output_tokens"]


def test_without_a_language_the_answer_is_read_by_its_form(client: Guarded, service: QwenService) -> None:
    wanted = Transcript(None)
    wanted.push(raw(service, WAV))
    wanted.flush()
    found = asked(client).json()
    assert (found["text"], found["language"]) == (wanted.text, wanted.language)
    plain = asked(client, response_format="text")
    assert plain.headers["content-type"] == "text/plain; charset=utf-8"
    assert plain.text == f"{wanted.text}\n"


def test_a_stream_is_the_whole_in_pieces(official: openai.OpenAI, client: Guarded) -> None:
    whole = asked(client, language="de").json()
    with open_stream(official) as stream:
        events = list(stream)
    assert [event.type for event in events[:-1]] == ["transcript.text.delta"] * (len(events) - 1)
    assert "".join(event.delta for event in events[:-1]).strip() == whole["text"]
    assert events[-1].type == "transcript.text.done"
    assert events[-1].text == whole["text"]
    assert events[-1].usage.input_token_details.audio_tokens == 13


def open_stream(official: openai.OpenAI) -> Any:
    return official.audio.transcriptions.create(model="tiny", file=("a.wav", WAV), language="de", stream=True)


def test_answers_depend_on_sound_language_and_context(service: QwenService) -> None:
    texts = {
        raw(service, WAV, language="en"),
        raw(service, as_sound(hiss(1)), language="en"),
        raw(service, WAV, language="de"),
        raw(service, WAV, language="en", prompt="Ada"),
    }
    assert len(texts) == 4


def test_a_sound_of_any_length_is_heard_and_a_long_one_costs_its_tokens(client: Guarded) -> None:
    for seconds, tokens in ((0.1, 7), (0.505, 7), (9.37, 122), (33.3, 433)):
        found = told(client, played(as_sound(hiss(seconds))))
        assert found["usage"]["prompt_tokens_details"]["audio_tokens"] == tokens


def test_chat_completions_hear_what_they_heard(client: Guarded) -> None:
    """Two sounds, and words of the user, for which the model's template has no place."""
    one, two = (told(client, played(*parts), max_tokens=4, temperature=0) for parts in ((WAV,), (WAV, WAV, "what?")))
    assert two["usage"]["prompt_tokens"] - one["usage"]["prompt_tokens"] == 13 + 2
    assert two["usage"]["prompt_tokens_details"]["audio_tokens"] == 26


def test_an_answer_that_is_cut_is_an_error(client: Guarded, service: QwenService, speech_artifact: Path) -> None:
    """A text that merely ends would be taken for the whole."""
    settings = ROOMY.model_copy(update={"max_tokens": 3})
    with guarded(speech_artifact, settings, options={"isolated": False}) as small:
        found = asked(small, language="en")
        assert found.status_code == 400
        assert "the transcript is not finished after 3 tokens" in found.json()["error"]["message"]
        assert found.json()["error"]["param"] == "file"
        streamed = asked(small, language="en", stream="true")
        assert "not finished after 3 tokens" in streamed.text.splitlines()[-2]
        assert "transcript.text.done" not in streamed.text


@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        ({"file": b""}, "not a sound of a known format", "file"),
        ({"file": b"Dear Sir or Madam, " * 9}, "not a sound of a known format: wav, flac, mp3", "file"),
        ({"file": WAV[:-500]}, "damaged: it declares", "file"),
        ({"file": as_sound(np.zeros(0, np.float32))}, "too few for a token", "file"),
        ({"file": as_sound(np.zeros(1201 * 4000, np.float32), 4000, form="FLAC")}, "the model hears 1200 s", "file"),
        ({"file": None}, "file: Field required", "file"),
        ({"model": None}, "model: Field required", "model"),
        ({"language": "xx"}, "'xx' is not one of ar (Arabic)", "language"),
        ({"temperature": "warm"}, "temperature is 'warm', not a number", "temperature"),
        ({"temperature": "nan"}, "temperature", "temperature"),
        ({"temperature": "-1"}, "temperature", "temperature"),
        ({"response_format": "srt"}, "'srt' is not supported: the model gives no times", "response_format"),
        ({"response_format": "verbose_json"}, "the model gives no times", "response_format"),
        ({"response_format": "xml"}, "there are json and text", "response_format"),
        ({"timestamp_granularities[]": "word"}, "the model gives no times", "timestamp_granularities[]"),
        ({"chunking_strategy": "auto"}, "heard as a whole", "chunking_strategy"),
        ({"stream": "maybe"}, "stream is 'maybe', not true or false", "stream"),
        ({"colour": "red"}, "colour: there is no such field", "colour"),
    ],
)
def test_what_is_refused_is_a_400_that_names_the_field(
    client: Guarded, fields: dict[str, Any], message: str, param: str
) -> None:
    answer = asked(client, **fields)
    assert answer.status_code == 400, answer.text
    assert message in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == param


def test_other_bodies_are_refused(client: Guarded) -> None:
    assert "not multipart/form-data" in client.http.post(ROUTE, json={"model": "tiny"}).json()["error"]["message"]
    assert client.http.post(ROUTE, content=WAV).status_code == 400
    # a text in place of a file
    answer = client.http.post(ROUTE, files={"file": (None, "abc"), "model": (None, "tiny")})
    assert answer.json()["error"]["message"] == "file is a text, not a file"
    assert client.http.get(ROUTE).status_code == 405


def test_a_context_that_is_full_names_the_limit(speech_artifact: Path) -> None:
    with guarded(speech_artifact, ROOMY, options={"isolated": False, "context": 128}) as small:
        answer = asked(small, as_sound(hiss(20)))
        assert answer.status_code == 400
        assert "exceed the context of 128 tokens" in answer.json()["error"]["message"]


def test_another_model_is_a_404_and_one_that_makes_no_transcripts_says_why(
    client: Guarded, hearing_artifact: Path, exact_artifact: Path
) -> None:
    answer = asked(client, model="whisper-1")
    assert answer.status_code == 404
    assert "'whisper-1' does not exist; this server has 'tiny'" in answer.json()["error"]["message"]
    for artifact, why in ((hearing_artifact, "POST /v1/chat/completions"), (exact_artifact, "it hears no sounds")):
        with guarded(artifact, ROOMY, options={"isolated": False}) as other:
            answer = asked(other)
            assert answer.status_code == 400
            assert answer.json()["error"]["message"].startswith("the model 'tiny' makes no transcripts")
            assert why in answer.json()["error"]["message"]
            assert answer.json()["error"]["param"] == "model"


def test_keys_limits_and_metrics_are_those_of_other_routes(speech_artifact: Path) -> None:
    key = "a key that is long enough"
    settings = ROOMY.model_copy(update={"max_body_bytes": 20_000, "max_input_characters": 20})
    ring = KeyRing({digest_of(key): "ada"})
    with guarded(speech_artifact, settings, options={"isolated": False}, keys=ring) as small:
        assert asked(small).status_code == 401
        small.http.headers["authorization"] = f"Bearer {key}"
        assert asked(small, as_sound(hiss(0.5)), language="en", prompt="a" * 21).json()["error"]["param"] == "input"
        assert asked(small, WAV).status_code == 413
        metrics = small.http.get("/metrics").text
        assert f'route="{ROUTE}"' in metrics
        assert json.loads(small.http.get("/openapi.json").text)["paths"][ROUTE]["post"]["requestBody"]


def test_in_python_a_sound_for_another_model_is_refused(exact_artifact: Path) -> None:
    with (
        QwenService(exact_artifact, threads=1, streams=1) as service,
        pytest.raises(RequestError, match="makes no transcripts"),
    ):
        transcribing(service, Attached(WAV, "it"))


def test_rates_of_files_do_not_matter(client: Guarded) -> None:
    counts = {
        rate: asked(client, as_sound(sweep(1, rate), rate), language="en").json()["usage"]["input_tokens"]
        for rate in (8000, RATE, 44_100)
    }
    assert len(set(counts.values())) == 1
