"""The chat page: its headers and files always, its behaviour in headless Chromium where there is one."""

from __future__ import annotations

import asyncio
import html
import json
import re
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx
import pytest
from openai import OpenAI

from qwen_onnx.runtime.server.web import TYPES, MediaLimits, make_web_router
from tests.conftest import REPOSITORY
from tests.fixtures.browser import NAMES, Page, executable
from tests.fixtures.servers import served

ATTACK = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
STATIC = REPOSITORY / "qwen_onnx/runtime/server/web/static"
REFUSED = {"message": "This server needs an API key.", "type": "invalid_request_error", "param": None, "code": None}


def root(client: OpenAI) -> str:
    return str(client.base_url).removesuffix("/v1/")


@pytest.mark.parametrize("path", ["/", *(f"/static/{name}" for name in TYPES)])
def test_every_file_is_served_under_a_strict_policy(client: OpenAI, path: str) -> None:
    answer = httpx.get(root(client) + path)
    assert answer.status_code == 200
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert {policy[name] for name in ("script-src", "style-src", "connect-src", "img-src")} == {"'self'"}
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["content-type"].startswith(TYPES.get(path.rpartition("/")[2], "text/html"))


@pytest.mark.parametrize("path", ["/static/none.js", "/static/index.html", "/static/..%2f__init__.py", "/static/"])
def test_nothing_else_is_served(client: OpenAI, path: str) -> None:
    assert httpx.get(root(client) + path).status_code == 404


def test_the_folder_holds_what_is_served() -> None:
    assert {path.name for path in STATIC.iterdir()} == {*TYPES, "index.html"}


@pytest.mark.parametrize(
    ("kind", "source"), [("picture", "img-src 'self' blob:;"), ("sound", "img-src 'self'; media-src blob:;")]
)
def test_only_a_page_that_offers_media_may_show_or_play_them(kind: Literal["picture", "sound"], source: str) -> None:
    limits = MediaLimits(kind, 3, 100, 1000, {"image/png": "png"})
    index = next(route for route in make_web_router("{{media}}", limits).routes if getattr(route, "path", "") == "/")
    answer = asyncio.run(index.endpoint())  # type: ignore[attr-defined]
    policy = answer.headers["content-security-policy"]
    assert source in policy
    assert policy.count("blob:") == 1
    told = re.search('<meta name="media" content="(.*)">', bytes(answer.body).decode())
    assert told
    assert json.loads(html.unescape(told[1])) == asdict(limits)
    assert '<meta name="model" content="{{media}}">' in bytes(answer.body).decode()


def test_the_files_refer_to_no_other_place_and_hold_nothing_inline() -> None:
    for path in STATIC.iterdir():
        text = path.read_text(encoding="utf-8")
        addresses = [found for found in re.findall(r"(?:https?:)?//[\w.-]+\.\w+", text) if "//" in found]
        known = {"http://www.w3.org", "https://html.spec.whatwg.org"}
        assert set(addresses) <= known, f"{path.name}: {addresses}"
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)
    page = (STATIC / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<script(?![^>]*src=)|<style|\sstyle=|\son\w+=|javascript:", page)
    for name in re.findall(r'<(?:input|textarea)[^>]*id="([^"]+)"', page):
        assert f'<label for="{name}"' in page, f"{name} has no label"


def test_the_name_of_a_model_is_text() -> None:
    index = next(route for route in make_web_router('a"><b>').routes if getattr(route, "path", "") == "/")
    page = bytes(asyncio.run(index.endpoint()).body).decode()  # type: ignore[attr-defined]
    assert '<meta name="model" content="a&quot;&gt;&lt;b&gt;">' in page
    assert "{{" not in page
    assert "<b>" not in page


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if executable() is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is on PATH")
    with Page(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(browser: Page, client: OpenAI) -> Iterator[Page]:
    """The page, freshly opened. Afterwards: it asked nobody but its server."""
    for told in (browser.errors, browser.requests, browser.posted, browser.answers):
        told.clear()
    browser.open(root(client) + "/")
    browser.run("sessionStorage.clear()")
    browser.until("document.querySelector('#send')")
    yield browser
    hosts = {urlsplit(url).netloc for url in browser.requests if not url.startswith("data:")}
    assert hosts == {urlsplit(root(client)).netloc}


def setting(page: Page, name: str, value: object) -> None:
    page.run(f"document.getElementById({name!r}).value = {value!r}")


def ask(page: Page, text: str) -> None:
    page.run("document.getElementById('question').focus()")
    page.type(text)
    page.press("Enter")


def streamed(*deltas: dict[str, str], error: str = "") -> tuple[int, dict[str, str], str]:
    """What a server would send."""
    chunks: list[dict[str, Any]] = [
        {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas
    ]
    if error:
        chunks.append({"error": {**REFUSED, "message": error}})
    else:
        chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        chunks.append({"choices": [], "usage": {"completion_tokens": 9}})
    lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
    return 200, {"Content-Type": "text/event-stream"}, "".join([*lines, "data: [DONE]\n\n"])


@pytest.mark.slow
def test_an_answer_of_the_real_server_streams_in(page: Page) -> None:
    setting(page, "temperature", 1)
    setting(page, "max-tokens", 60)
    setting(page, "system", "be brief")
    ask(page, "hello")
    page.until("document.querySelector('.below')")
    assert re.search(r"\d+ tokens? .*first after", page.run("document.querySelector('.below').textContent"))
    assert page.run("document.querySelector('.question').textContent") == "hello"
    assert page.run("document.activeElement.id") == "question"
    body = page.posted[0]["body"]
    assert body["messages"] == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    # this model reads text alone
    assert page.run("document.getElementById('attach').hidden && !document.body.matches('.sees')")
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("tiny", 1, 60)
    assert page.errors == []


@pytest.mark.slow
def test_stop_frees_the_server(page: Page, client: OpenAI) -> None:
    setting(page, "max-tokens", 8000)
    ask(page, "hello")
    page.until("!document.querySelector('#stop').hidden")
    page.run("document.getElementById('stop').click()")
    page.until("document.querySelector('.below')?.textContent.includes('Stopped')")
    assert page.run("document.querySelector('#stop').hidden && !document.querySelector('#send').hidden")
    metrics = str(client.base_url).replace("/v1/", "/metrics")
    deadline = time.monotonic() + 10
    while "\nqwen_onnx_running_streams 0.0\n" not in (told := httpx.get(metrics, trust_env=False).text):
        assert time.monotonic() < deadline, told
        time.sleep(0.02)
    generated = re.search(r"^qwen_onnx_generated_tokens_total (\S+)$", told, re.MULTILINE)
    assert generated
    assert float(generated[1]) < 8000
    assert page.errors == []


def test_what_user_and_model_write_stays_text(page: Page) -> None:
    said = [
        ATTACK,
        f"\n\n```html\n{ATTACK}\n```\n",
        f"- **{ATTACK}** `{ATTACK}`\n",
        "[a](javascript:alert(1)) [d](javascript://x%0aalert)",
    ]
    links = "[b](https://example.org/x) [c](data:text/html,x)"
    contents = ({"content": text} for text in [*said, links])
    page.answers["completions"] = streamed({"reasoning_content": ATTACK}, *contents)
    ask(page, ATTACK)
    page.until("document.querySelector('.below')")
    assert page.run("document.querySelector('.question').textContent") == ATTACK
    assert page.run("document.querySelector('.thinking div').textContent") == ATTACK
    assert page.run("document.querySelector('.code pre').textContent") == ATTACK
    assert ATTACK in page.run("document.querySelector('.answer').textContent")
    assert page.run("document.querySelectorAll('.turn :is(script, img, iframe, [onerror])').length") == 0
    assert page.run("[...document.querySelectorAll('.turn a')].map(a => a.href)") == ["https://example.org/x"]
    assert page.run("document.title") == "tiny · chat"
    assert page.errors == []


def test_the_policy_holds_and_these_tests_would_notice(page: Page) -> None:
    script = "Object.assign(document.createElement('script'), {textContent: 'document.title = 1'})"
    page.run(f"document.body.append({script})")
    page.run("document.body.setAttribute('style', 'color: red')")
    end = time.monotonic() + 10
    while not all(any(name in error for error in page.errors) for name in ("script-src", "style-src")):
        assert time.monotonic() < end, page.errors
        time.sleep(0.02)
    assert page.run("document.title") == "tiny · chat"


def test_reasoning_is_folded_away_and_left_out_of_the_history(page: Page) -> None:
    page.answers["completions"] = streamed({"reasoning_content": "Hm."}, {"content": "A **bold** word."})
    for count in (1, 2):
        ask(page, f"question {count}")
        page.until(f"document.querySelectorAll('.below').length === {count}")
    assert page.run("document.querySelector('.thinking').open") is False
    assert page.run("document.querySelector('.answer strong').textContent") == "bold"
    assert page.posted[1]["body"]["messages"] == [
        {"role": "user", "content": "question 1"},
        {"role": "assistant", "content": "A **bold** word."},
        {"role": "user", "content": "question 2"},
    ]
    page.run("document.getElementById('new').click()")
    assert page.run("document.querySelectorAll('.turn').length") == 0
    assert page.run("document.getElementById('empty').hidden") is False


def test_a_key_is_asked_for_kept_in_the_session_and_sent(page: Page) -> None:
    page.answers["completions"] = (401, {"Content-Type": "application/json"}, json.dumps({"error": REFUSED}))
    ask(page, "hello")
    page.until("document.querySelector('.error')")
    assert "needs an API key" in page.run("document.querySelector('.error').textContent")
    assert page.run("document.activeElement.id") == "key"
    page.answers["completions"] = streamed({"content": "Welcome."})
    page.type("secret")
    page.press("Enter")
    page.until("document.querySelector('.answer').textContent === 'Welcome.'")
    assert [post["headers"].get("Authorization") for post in page.posted] == [None, "Bearer secret"]
    assert page.run("JSON.stringify(localStorage) + document.cookie") == "{}"
    assert page.run("document.querySelectorAll('.turn').length") == 1


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((429, {"Retry-After": "7"}, json.dumps({"error": REFUSED})), "key. Try again in 7 s."),
        ((502, {}, "<html>bad gateway</html>"), "status 502"),
        (streamed({"content": "Half an ans"}, error="the engine's process died"), "process died"),
        ((200, {"Content-Type": "text/event-stream"}, "data: "), "ended before the answer"),
    ],
)
def test_errors_are_told_in_words(page: Page, answer: tuple[int, dict[str, str], str], words: str) -> None:
    page.answers["completions"] = answer
    ask(page, "hello")
    page.until("document.querySelector('.error')")
    assert words in page.run("document.querySelector('.error').textContent")
    page.answers["completions"] = streamed({"content": "Now."})
    page.run("document.querySelector('.error button').click()")
    page.until("document.querySelector('.below') && !document.querySelector('.error')")
    assert page.posted[-1]["body"]["messages"] == [{"role": "user", "content": "hello"}]


def test_a_refusal_of_the_real_server_is_told(page: Page) -> None:
    ask(page, "x" * 9000)
    page.until("document.querySelector('.error')")
    assert re.search("context|characters", page.run("document.querySelector('.error').textContent"))


def test_keys_send_and_break_lines(page: Page) -> None:
    page.answers["completions"] = streamed({"content": "Yes."})
    page.run("document.getElementById('question').focus()")
    page.type("one")
    page.press("Enter", shift=True)
    page.type("two")
    assert page.posted == []
    page.press("Enter")
    page.until("document.querySelector('.below')")
    assert page.posted[0]["body"]["messages"][0]["content"] == "one\ntwo"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\nb", "<p>a<br>b</p>"),
        ("1. a\n2. b\n\nc", '<ol start="1"><li>a</li><li>b</li></ol><p>c</p>'),
        ("- a\n\n- b\n  c", "<ul><li>a</li><li>b<br>c</li></ul>"),
        ("# a\nb", "<h3>a</h3><p>b</p>"),
        ("`a < b` **c `d`**", "<p><code>a &lt; b</code> <strong>c <code>d</code></strong></p>"),
        ("2 ** 3 ** 4", "<p>2 ** 3 ** 4</p>"),
        ("[x](http://a.b/c)", '<p><a href="http://a.b/c" rel="noopener noreferrer" target="_blank">x</a></p>'),
        ("[x](vbscript:y) &amp;", "<p>[x](vbscript:y) &amp;amp;</p>"),
    ],
)
def test_the_subset_of_markdown(page: Page, text: str, expected: str) -> None:
    code = f"""import('/static/markdown.js').then(({{ render }}) => {{
        const box = document.createElement('div'); box.append(render({json.dumps(text)})); return box.innerHTML; }})"""
    assert page.run(code) == expected


@pytest.mark.slow
def test_an_answer_grows_on_the_page(browser: Page, artifact_dir: Path) -> None:
    with served(artifact_dir, "starter") as client:
        browser.answers.clear()
        browser.open(root(client) + "/")
        browser.run("window.sizes = []; document.getElementById('question').focus()")
        grown = "sizes.push(document.querySelector('.answer').textContent.length)"
        where = "document.getElementById('log'), {childList: true, subtree: true}"
        browser.run(f"void new MutationObserver(() => {grown}).observe({where})")
        # a short answer can come within four frames, which the page draws at once
        browser.type("What is the capital of France? Tell me more about it.")
        browser.press("Enter")
        browser.until("document.querySelector('.below')", seconds=120)
        sizes = browser.run("sizes")
        assert len(set(sizes)) > 4
        assert sizes == sorted(sizes)
        assert "Paris" in browser.run("document.querySelector('.answer').textContent")
