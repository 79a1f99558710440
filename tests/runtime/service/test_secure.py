"""The limits around a real service, as Python programs meet them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen_onnx.errors import DeadlineError, OverloadedError, RateLimitError, RequestError
from qwen_onnx.runtime import ChatPrompt, GenerationConfig, Policy, QwenService, SecureQwenService
from qwen_onnx.runtime.service.secure import GuardedService, characters

SHORT = GenerationConfig(max_new_tokens=8)


@pytest.fixture(scope="module")
def secure(tiny_artifact: Path) -> Iterator[SecureQwenService]:
    with SecureQwenService(tiny_artifact, rate_limit=None, threads=1) as running:
        yield running


def test_within_the_limits_it_answers_as_the_plain_service(secure: SecureQwenService, service: QwenService) -> None:
    plain = service.generate("hello", SHORT)
    assert secure.generate("hello", SHORT) == plain
    assert "".join(delta.text for delta in secure.stream("hello", SHORT)) == plain.text

    async def ask() -> str:
        return "".join([delta.text async for delta in secure.generate_async("hello", SHORT)])

    assert asyncio.run(ask()) == plain.text
    assert [measured.completion_tokens for measured in secure.monitor.last(3)] == [plain.completion_tokens] * 3
    assert all(measured.ttft for measured in secure.monitor.last(3))
    assert secure.monitor.health_check().status == "healthy"


def prompts_of(length: int) -> list[Any]:
    half = "x" * (length // 2)
    parts = [{"type": "text", "text": half}, {"type": "text", "text": half}]
    tool = {"type": "function", "function": {"name": "f", "parameters": {"const": half[6:]}}}
    return [
        half * 2,
        [{"role": "user", "content": half * 2}],
        [{"role": "system", "content": half}, {"role": "user", "content": half}],
        [{"role": "user", "content": parts}],
        ChatPrompt([{"role": "user", "content": half}], tools=[tool]),
        [{"role": "user", "content": half}, {"role": "tool", "content": half}],
    ]


def test_all_text_counts_wherever_it_stands() -> None:
    for prompt in prompts_of(100):
        assert characters(prompt) == 100


LONG = "x" * 1000


@pytest.mark.parametrize(
    "hidden", [{"type": {"description": LONG}}, {LONG: {}}, {"type": LONG}, {"role": [LONG]}, {"const": 10**1000}]
)
def test_nothing_hides_in_schemas_and_arguments(hidden: dict[str, Any]) -> None:
    """A property may have any name, those of the API's fields too."""
    user = {"role": "user", "content": "x"}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": hidden}}}
    call = {"type": "function", "function": {"name": "f", "arguments": hidden}}
    assert characters(ChatPrompt([user], tools=[tool])) >= 1000
    assert characters([{"role": "assistant", "content": "", "tool_calls": [call]}, user]) >= 1000


def test_input_beyond_the_limit_is_refused_by_every_form(secure: SecureQwenService) -> None:
    async def drain(prompt: Any) -> None:
        async for _ in secure.generate_async(prompt, SHORT):
            pass

    for prompt in prompts_of(8194):
        for attempt in (
            lambda prompt=prompt: secure.prepare(prompt, SHORT),
            lambda prompt=prompt: secure.generate(prompt, SHORT),
            lambda prompt=prompt: secure.stream(prompt, SHORT),
            lambda prompt=prompt: secure.generate_batch([prompt], SHORT),
            lambda prompt=prompt: asyncio.run(drain(prompt)),
        ):
            with pytest.raises(RequestError, match="8194 characters, the most is 8192"):
                attempt()


def test_token_ids_count_by_the_characters_that_they_spell(tiny_artifact: Path, service: QwenService) -> None:
    guarded = GuardedService(service, Policy(max_input_characters=10))
    ids = service.tokenizer.encode("x" * 11)
    with pytest.raises(RequestError, match="11 characters"):
        guarded.prepare(ids, SHORT)
    assert guarded.prepare(ids[:10], SHORT) == ids[:10]
    with pytest.raises(RequestError, match="outside"):
        guarded.prepare([10**9], SHORT)


def test_the_cap_refuses_what_was_asked_for_and_bounds_the_default(service: QwenService) -> None:
    guarded = GuardedService(service, Policy(max_tokens=5))
    with pytest.raises(RequestError, match="max_tokens is 6, the most is 5"):
        guarded.generate("hello", GenerationConfig(max_new_tokens=6))
    assert guarded.generate("hello").completion_tokens <= 5


def test_no_form_of_generation_goes_round_the_policy(service: QwenService) -> None:
    """The guard wraps a service: what it does not check itself, nobody does."""
    guarded = GuardedService(service, Policy(max_input_characters=10, sanitise=True))
    for attempt in (guarded.generate, guarded.stream, lambda prompt, config: guarded.generate_batch([prompt], config)):
        with pytest.raises(RequestError, match="11 characters"):
            attempt("x" * 11, SHORT)
        with pytest.raises(RequestError, match="role"):
            attempt([{"role": "robot", "content": "x"}], SHORT)
    assert guarded.submit("x", SHORT, lambda _: None)[0]


def test_an_unknown_role_is_refused(secure: SecureQwenService) -> None:
    for role in ("robot", "System", None, 1):
        with pytest.raises(RequestError, match="role"):
            secure.generate([{"role": role, "content": "x"}], SHORT)


def test_the_rate_limit_counts_what_was_sound(tiny_artifact: Path) -> None:
    now = [0.0]
    with SecureQwenService(tiny_artifact, rate_limit=2, clock=lambda: now[0], threads=1) as limited:
        with pytest.raises(RequestError):
            limited.generate("x" * 9000, SHORT)
        for _ in range(2):
            limited.generate("hello", SHORT)
        with pytest.raises(RateLimitError) as caught:
            limited.generate("hello", SHORT)
        assert caught.value.retry_after == 3600
        now[0] += 3600
        limited.generate("hello", SHORT)


def test_an_answer_that_takes_too_long_is_given_up(service: QwenService) -> None:
    ended = []
    guarded = GuardedService(service, Policy(max_tokens=8000, request_seconds=0.05), (ended.append,))
    long = GenerationConfig(max_new_tokens=8000)
    with pytest.raises(DeadlineError):
        guarded.generate("hello", long)

    async def ask() -> None:
        async for _ in guarded.generate_async("hello", long):
            pass

    with pytest.raises(DeadlineError):
        asyncio.run(ask())
    assert [measured.fault for measured in ended] == ["DeadlineError"] * 2
    assert service.generate("hello", GenerationConfig(max_new_tokens=1)).completion_tokens == 1


def test_a_full_queue_is_told_before_a_stream_begins(tiny_artifact: Path) -> None:
    long = GenerationConfig(max_new_tokens=1024)
    with SecureQwenService(tiny_artifact, rate_limit=None, threads=1, streams=1, queue_size=1) as small:
        running, waiting = small.stream("hello", long), small.stream("hello", long)
        next(iter(running))
        with pytest.raises(OverloadedError):
            small.prepare("hello", SHORT)
        running.close()
        waiting.close()
        assert small.monitor.last(1)[0].finish_reason == "cancelled"
        # the engine notices within one step
        for _ in range(1000):
            if small.stats().running + small.stats().waiting == 0:
                break
            time.sleep(0.005)
        small.generate("hello", SHORT)


def test_sanitise_filters_input_and_output(tiny_artifact: Path, service: QwenService) -> None:
    whole = service.generate("hello", GenerationConfig(max_new_tokens=64)).text
    guarded = GuardedService(service, Policy(sanitise=True))
    assert guarded.prepare("a<script>b</script>c", SHORT) == service.prepare("a[removed]c", SHORT)
    messages = [{"role": "user", "content": "<iframe src=x></iframe>"}]
    clean = [{"role": "user", "content": "[removed]"}]
    assert guarded.prepare(messages, SHORT) == service.prepare(clean, SHORT)
    assert guarded.generate("hello", GenerationConfig(max_new_tokens=64)).text == whole
    with pytest.raises(RequestError, match="logprobs"):
        guarded.generate("hello", GenerationConfig(logprobs=1))
    script = "<script>alert(1)</script>"
    config = GenerationConfig(max_new_tokens=64, grammar=f'start: "{script}"')
    assert service.generate("hello", config).text == script
    assert guarded.generate("hello", config).text == "[removed]"
    assert "".join(delta.text for delta in guarded.stream("hello", config)) == "[removed]"
