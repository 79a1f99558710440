"""Videos over HTTP: what is answered, what they cost, what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen_onnx.artifact.video_config import VIDEO_CONFIG
from qwen_onnx.runtime import QwenService
from qwen_onnx.runtime.service.generation import AttachedVideo, ChatPrompt, GenerationConfig
from tests.fixtures.clips import clip_file, frames
from tests.fixtures.pictures import as_file, chart, declared, noise
from tests.fixtures.servers import ROOMY, Guarded, guarded
from tests.fixtures.vision import stacked_artifact
from tests.runtime.server.api.test_pictures import first, item, responded, shown, told, uri

__all__ = ["stacked_artifact"]


@pytest.fixture(scope="module")
def client(seeing_artifact: Path) -> Iterator[Guarded]:
    """Of a server with the tiny Qwen2.5-VL, its engine in a process of its own."""
    with guarded(seeing_artifact, ROOMY) as found:
        yield found


def listed(*pictures: bytes, **more: Any) -> dict[str, Any]:
    return {"type": "video", "video": [uri(picture) for picture in pictures], **more}


def filed(content: bytes, kind: str = "image/gif") -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": uri(content, kind)}}


def asked(*parts: Any) -> list[dict[str, Any]]:
    """One message of the user: texts and other parts."""
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return [{"role": "user", "content": content}]


def test_a_video_is_seen_and_its_tokens_are_counted(client: Guarded, seeing_artifact: Path) -> None:
    """Over HTTP and in Python alike; frames in another order, or slower, get another answer."""
    one = [as_file(frame) for frame in frames(4, 84, 56)]
    answer = told(client, asked("What is ", listed(*one), "?"))
    without = told(client, asked("What is ", "?"))
    # two patches in time, 2 × 3 tokens each, and the markers at both ends
    assert answer["usage"]["prompt_tokens"] == without["usage"]["prompt_tokens"] + 2 * 6 + 2
    turned = told(client, asked("What is ", listed(*reversed(one)), "?"))
    slower = told(client, asked("What is ", listed(*one, fps=0.5), "?"))
    assert abs(first(answer) - first(turned)) > 1e-3
    assert abs(first(answer) - first(slower)) > 1e-3
    assert slower["usage"] == answer["usage"] | {"prompt_tokens_details": slower["usage"]["prompt_tokens_details"]}
    with QwenService(seeing_artifact, threads=1, streams=1) as service:
        content = [{"type": "text", "text": "What is "}, {"type": "video"}, {"type": "text", "text": "?"}]
        prompt = ChatPrompt([{"role": "user", "content": content}], videos=[AttachedVideo(tuple(one), "it")])
        same = service.generate(prompt, GenerationConfig(max_new_tokens=4))
    assert same.text == answer["choices"][0]["message"]["content"]
    assert same.prompt_tokens == answer["usage"]["prompt_tokens"]


def test_an_animated_file_is_its_frames(client: Guarded) -> None:
    """Lossless at two frames a second: the same tokens, and the same answer, as the frames themselves."""
    images = frames(5, 84, 56)
    wanted = told(client, asked(listed(*map(as_file, images), sample_fps=2), "?"))
    for form in ("PNG", "WEBP"):
        more = {"lossless": True} if form == "WEBP" else {}
        found = told(client, asked(filed(clip_file(images, form, **more), f"image/{form.lower()}"), "?"))
        assert found["choices"][0]["message"] == wanted["choices"][0]["message"]
        assert abs(first(found) - first(wanted)) < 1e-4
        assert found["usage"]["prompt_tokens"] == wanted["usage"]["prompt_tokens"]
    assert told(client, asked(filed(clip_file(images)), "?"))["usage"]["completion_tokens"] > 0


def test_a_second_question_finds_the_video_in_the_cache(client: Guarded) -> None:
    video = [as_file(frame) for frame in frames(6, 168, 112)]
    messages = asked(listed(*video, fps=4), "What?")
    answer = told(client, messages)
    said = {"role": "assistant", "content": answer["choices"][0]["message"]["content"]}
    follow = [*messages, said, {"role": "user", "content": "And now?"}]
    again = told(client, follow)
    # three patches in time of 4 × 6 tokens
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= 3 * 24
    # at another speed the same frames stand elsewhere in time, but for the first patch
    slower = told(client, [*asked(listed(*video, fps=0.5), "What?"), *follow[1:]])
    assert slower["usage"]["prompt_tokens_details"]["cached_tokens"] < 2 * 24
    turned = told(client, asked(listed(*reversed(video), fps=4), "What?"))
    assert turned["usage"]["prompt_tokens_details"]["cached_tokens"] < 24


def test_pictures_and_videos_stand_where_they_were_sent(client: Guarded) -> None:
    """Also in an earlier turn."""
    picture = {"type": "image_url", "image_url": {"url": uri(as_file(chart(60, 60)))}}
    film = listed(*(as_file(frame) for frame in frames(4, 56, 56)))
    first_turn = [*asked("first ", picture, film, "?"), {"role": "assistant", "content": "yes"}]
    both = told(client, [*first_turn, *asked("and ", film)])
    turned = told(client, [*asked("first ", film, picture, "?"), first_turn[1], *asked("and ", film)])
    assert both["usage"]["prompt_tokens"] == turned["usage"]["prompt_tokens"]
    assert abs(first(both) - first(turned)) > 1e-3


SMALL, WIDE = as_file(chart(30, 30)), as_file(chart(60, 30))
MP4 = b"\0\0\0\x18ftypmp42" + bytes(200)
FAULTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "no frames": (listed(), "video", "no frames; the fewest are 2"),
    "one frame": (listed(SMALL), "video", "one frame: send it as a picture"),
    "other sizes": (listed(SMALL, WIDE), "video.1", "this frame is 60 × 30, the first is 30 × 30"),
    "too many": (listed(*[SMALL] * 769), "video", "769 frames, the most are 768"),
    "no picture": (listed(SMALL, b"<svg/>"), "video.1", "not a picture of a known format"),
    "remote": ({"type": "video", "video": [uri(SMALL), "https://a/b.png"]}, "video.1", "remote URLs are not fetched"),
    "fps 0": (listed(SMALL, SMALL, fps=0), "video", "fps is 0.0, not from 0.001 to 1000"),
    "negative fps": (listed(SMALL, SMALL, sample_fps=-1.5), "video", "fps is -1.5"),
    "both": (listed(SMALL, SMALL, fps=1, sample_fps=2), "sample_fps", "fps and sample_fps differ"),
    "mp4": (filed(MP4, "video/mp4"), "video_url", "videos in MP4 are not decoded here: send its frames"),
    "mp4 called a gif": (filed(MP4), "video_url", "videos in MP4 are not decoded here"),
    "a picture": (filed(as_file(chart(30, 30), "GIF")), "video_url", "one frame: send it as a picture"),
    "cut": (filed(clip_file(frames(3, 50, 50))[:200]), "video_url", "damaged"),
    "remote file": ({"type": "video_url", "video_url": {"url": "https://a/b.mp4"}}, "video_url", "not fetched"),
    "text": ({"type": "video_url", "video_url": {"url": "data:text/html;base64,AA"}}, "video_url", "not a data URI of"),
    # 2 positions a second and pair, of a context of 1,024
    "slow": (listed(*[SMALL] * 8, fps=0.002), "video", "reach position"),
    # none of these can be decoded, and none is
    "long": (listed(*[declared(220, 220)] * 40), "video", "text and 1 videos exceed the context of"),
    "broken": (listed(*[declared(60, 60)] * 4), "video.0", "damaged"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_no_video_gets_a_400_that_names_the_part(client: Guarded, name: str) -> None:
    part, where, message = FAULTS[name]
    answer = client.ask(messages=[*asked("first"), *asked("then", part)])
    assert answer.status_code == 400, answer.text
    assert message in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == f"messages.1.content.1.{where}"


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "video", "video": uri(SMALL)}, "video.video: Input should be a valid list"),
        ({"type": "video", "video": [uri(SMALL)] * 2, "fps": "2"}, "video.fps: Input should be a valid number"),
        ({"type": "video", "video": [uri(SMALL)] * 2, "raw_fps": 2}, "video.raw_fps: Extra inputs are not permitted"),
        ({"type": "video_url", "video_url": {"url": uri(SMALL), "fps": 2}}, "video_url.video_url.fps: Extra inputs"),
        ({"type": "video_url", "video_url": uri(SMALL)}, "video_url.video_url: Input should be"),
    ],
)
def test_a_part_of_another_form_is_refused(client: Guarded, part: dict[str, Any], message: str) -> None:
    answer = client.ask(messages=asked("so", part))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith("messages.0.user.content")
    assert message in answer.json()["error"]["message"]


def test_numbers_that_are_none_are_refused(client: Guarded) -> None:
    text = '{"model": "tiny", "messages": [{"role": "user", "content": [{"type": "video", "video": [], "fps": NaN}]}]}'
    answer = client.http.post("/v1/chat/completions", content=text, headers={"content-type": "application/json"})
    assert answer.status_code == 400


def test_too_many_videos_are_refused(client: Guarded) -> None:
    answer = client.ask(messages=asked(*[listed(SMALL, SMALL)] * 5))
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "5 videos, the most are 4"


@pytest.mark.parametrize("role", ["system", "developer", "assistant"])
def test_only_users_show_videos(client: Guarded, role: str) -> None:
    answer = client.ask(messages=[{"role": role, "content": [listed(SMALL, SMALL)]}, *shown("so?")])
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith("messages.0")


def test_a_model_of_text_refuses_videos_by_its_name(exact_artifact: Path) -> None:
    with guarded(exact_artifact, ROOMY, options={"isolated": False}) as client:
        answer = client.ask(messages=asked(listed(SMALL, SMALL)))
        assert answer.status_code == 400
        assert answer.json()["error"]["message"] == "the model 'tiny' watches no videos"
        assert answer.json()["error"]["param"] == "messages.0.content.0.video"


def test_an_artifact_from_before_videos_says_what_to_do(seeing_artifact: Path, tmp_path: Path) -> None:
    older = Path(shutil.copytree(seeing_artifact, tmp_path / "older"))
    (older / VIDEO_CONFIG).unlink()
    with guarded(older, ROOMY, options={"isolated": False}) as client:
        told(client, shown("What is ", as_file(noise(60, 60))))
        answer = client.ask(messages=asked(listed(SMALL, SMALL)))
        assert answer.status_code == 400
        assert "it has no video_config.json: build it again with qwen-onnx optimize" in answer.text
        assert answer.json()["error"]["param"] == "messages.0.content.0.video"


def test_a_template_without_a_place_for_videos_says_so(seeing_artifact: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(seeing_artifact, tmp_path / "other"))
    template = other / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|video_pad|>", ""))
    with guarded(other, ROOMY, options={"isolated": False}) as client:
        answer = client.ask(messages=asked(listed(SMALL, SMALL)))
        assert answer.status_code == 400
        assert answer.json()["error"]["message"] == "the chat template has places for 0 videos, 1 were sent"


def test_a_newer_model_reads_when_each_pair_was_taken(stacked_artifact: Path) -> None:
    """The text beside the pairs, to the token; a marker that a user typed stays text."""
    video = tuple(as_file(frame) for frame in frames(5, 64, 64))
    content = [{"type": "text", "text": "<|video_pad|> at "}, {"type": "video"}, {"type": "text", "text": "?"}]
    prompt = ChatPrompt([{"role": "user", "content": content}], videos=[AttachedVideo(video, "it", 3.0)])
    with QwenService(stacked_artifact, threads=1, streams=1) as service:
        ids = service.prepare(prompt, GenerationConfig(max_new_tokens=4))
        tokenizer = service.tokenizer
        special = tokenizer.special_tokens
        start, end = special["<|vision_start|>"], special["<|vision_end|>"]
        tokens = [one.tokens for one in ids.media]
        assert len(tokens) == 3
        wanted = tokenizer.encode("<|im_start|>user\n", allow_special=True) + tokenizer.encode("<|video_pad|>")
        for index, (told_as, count) in enumerate(zip(("0.2", "0.8", "1.3"), tokens, strict=True)):
            wanted += tokenizer.encode(f"{' at ' if index == 0 else ''}<{told_as} seconds>")
            wanted += [start, *[special["<|image_pad|>"]] * count, end]
        wanted += tokenizer.encode("?<|im_end|>\n<|im_start|>assistant\n", allow_special=True)
        assert list(ids) == wanted
        assert service.generate(ids, GenerationConfig(max_new_tokens=4)).completion_tokens > 0


def test_the_responses_api_watches_what_a_chat_watches(client: Guarded) -> None:
    film = listed(*(as_file(frame) for frame in frames(4, 56, 56)), fps=1)
    wanted = told(client, asked("see ", film))
    answer = responded(client, item("see ", film))
    assert answer.status_code == 200, answer.text
    assert answer.json()["output"][0]["content"][0]["text"] == wanted["choices"][0]["message"]["content"]
    assert answer.json()["usage"]["input_tokens"] == wanted["usage"]["prompt_tokens"]
    answer = responded(client, item("so", film, role="system"), item("so?"))
    assert answer.json()["error"]["message"] == "only the user shows videos, this role is system"
    answer = responded(client, item("so", listed(SMALL, WIDE)))
    assert answer.json()["error"]["param"] == "input.0.content.1.video.1"
