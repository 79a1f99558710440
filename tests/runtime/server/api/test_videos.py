"""Videos over HTTP: what is answered, what they cost, what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen_onnx.runtime import QwenService
from qwen_onnx.runtime.service.generation import AttachedVideo, ChatPrompt, GenerationConfig
from tests.fixtures.clips import frames
from tests.fixtures.pictures import as_file
from tests.fixtures.servers import ROOMY, Guarded, guarded
from tests.runtime.server.api.test_pictures import first, told, uri


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
