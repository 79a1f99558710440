"""Pictures in the chat page, in headless Chromium where there is one, with a model that sees."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.attaching import (
    assert_alone_is_a_question,
    assert_refused,
    assert_the_server_refuses,
    encoded,
)
from tests.fixtures.browser import Page, chatting
from tests.fixtures.pictures import as_file, chart, noise
from tests.fixtures.servers import ROOMY

# a second browser, and an engine
pytestmark = pytest.mark.slow
SHOWN = "[...document.querySelectorAll('#media img')].map(image => image.alt)"
LOADED = "[...document.querySelectorAll('img')].every(image => image.complete && image.naturalWidth > 0)"


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory, seeing_artifact: Path) -> Iterator[tuple[Page, str]]:
    """A browser, and the address of a server with the tiny model that sees."""
    with chatting(seeing_artifact, tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("one") / "chart.png"
    path.write_bytes(as_file(chart(160, 90)))
    return path


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("other") / "noise.jpg"
    path.write_bytes(as_file(noise(60, 80), "JPEG"))
    return path


def sent(path: Path, kind: str) -> dict[str, Any]:
    """The part of a message."""
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{encoded(path)}"}}


def test_pictures_are_shown_taken_away_and_sent_with_every_question(page: Page, one: Path, other: Path) -> None:
    page.choose("#files", other, one)
    page.until(f"{SHOWN}.length === 2 && {LOADED}")
    assert page.run(SHOWN) == ["noise.jpg", "chart.png"]
    # by keyboard alone
    page.run("document.getElementById('question').focus()")
    page.press("Tab", shift=True)
    assert page.run("document.activeElement.ariaLabel") == "Remove chart.png"
    page.press("Tab", shift=True)
    page.press("Enter")
    assert page.run(SHOWN) == ["chart.png"]
    assert page.run("document.activeElement.ariaLabel") == "Remove chart.png"
    page.ask("What is it?", 1)
    assert page.run(SHOWN) == []
    assert page.run("document.querySelector('.shown img').alt") == "chart.png"
    assert page.run(LOADED)
    first = {"role": "user", "content": [sent(one, "png"), {"type": "text", "text": "What is it?"}]}
    assert_alone_is_a_question(page, other, SHOWN, first, sent(other, "jpeg"))


def test_pictures_can_be_dropped_and_pasted(page: Page, one: Path, other: Path) -> None:
    page.drop(one)
    page.until(f"{SHOWN}.length === 1 && {LOADED}")
    assert page.run("document.body.matches('.dropping')") is False
    assert page.paste(other, "image/jpeg")
    page.until(f"{SHOWN}.length === 2 && {LOADED}")
    assert page.run(SHOWN) == ["chart.png", "pasted.jpg"]
    # a copied table has a picture of itself beside its text
    assert not page.paste(other, "image/jpeg", "a table")
    assert page.run("document.getElementById('send').disabled") is False


@pytest.mark.parametrize(
    ("limits", "name", "words"),
    [
        ({}, "page.svg", "page.svg is no picture of a kind that is read: PNG, JPEG, WEBP, GIF, BMP."),
        ({}, "empty.png", "empty.png is empty."),
        ({"bytes": 100}, "chart.png", "chart.png has 0.0 MiB, the most is 0.0 MiB."),
        ({"most": 1}, "chart.png", "A conversation may have 1 pictures."),
        ({"body": 100}, "chart.png", "all pictures of a conversation may have 0.0 MiB together."),
    ],
)
def test_what_the_server_would_refuse_is_refused_before(
    page: Page, one: Path, tmp_path: Path, limits: dict[str, int], name: str, words: str
) -> None:
    path = tmp_path / name
    path.write_bytes({"page.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>", "empty.png": b""}.get(name, b""))
    if name == one.name:
        path = one
    assert_refused(page, limits, [one, path] if "most" in limits else [path], words)
    assert page.run(f"{SHOWN}.length") == ("most" in limits)


def test_the_page_has_the_limits_of_the_server(page: Page) -> None:
    told = page.run("import('/static/media.js').then(({ limits }) => limits)")
    assert told["most"] == 16
    assert told["bytes"] == 20 << 20
    assert told["body"] == ROOMY.max_body_bytes
    assert page.run("document.getElementById('files').accept") == ",".join(told["types"])


def test_a_refusal_of_the_server_is_told_and_the_picture_stays(page: Page, one: Path, tmp_path: Path) -> None:
    path = tmp_path / "half.png"
    path.write_bytes(one.read_bytes()[:200])
    assert_the_server_refuses(page, path, SHOWN, "img")
