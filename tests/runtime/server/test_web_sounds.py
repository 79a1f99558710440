"""Sounds in the chat page, in headless Chromium where there is one, with a model that hears."""

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
from tests.fixtures.hearing import SECONDS
from tests.fixtures.servers import ROOMY
from tests.fixtures.sounds import as_sound, hiss, tone

# a browser, and an engine
pytestmark = pytest.mark.slow
SHOWN = "[...document.querySelectorAll('#media figcaption')].map(caption => caption.textContent)"
# a player that the policy blocks has an error and knows no length
PLAYABLE = "[...document.querySelectorAll('audio')].every(player => !player.error && player.duration > 0)"


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory, hearing_artifact: Path) -> Iterator[tuple[Page, str]]:
    """A browser, and the address of a server with the tiny model that hears."""
    with chatting(hearing_artifact, tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files by name."""
    folder = tmp_path_factory.mktemp("sounds")
    made = {
        "bell.wav": as_sound(tone(440, 1.5)),
        "rain.flac": as_sound(hiss(1), form="FLAC"),
        "rain.mp3": as_sound(hiss(2), form="MP3"),
        "long.wav": as_sound(tone(440, SECONDS + 1)),
        "half.wav": as_sound(tone(440, 1))[:-900],
        "empty.wav": b"",
        "words.txt": b"words",
    }
    for name, content in made.items():
        (folder / name).write_bytes(content)
    return {name: folder / name for name in made}


def sent(path: Path) -> dict[str, Any]:
    """The part of a message."""
    return {"type": "input_audio", "input_audio": {"data": encoded(path), "format": path.suffix[1:]}}


def test_sounds_are_played_taken_away_and_sent_with_every_question(page: Page, files: dict[str, Path]) -> None:
    bell, rain = files["bell.wav"], files["rain.flac"]
    page.choose("#files", rain, bell)
    page.until(f"{SHOWN}.length === 2 && {PLAYABLE}")
    assert page.run(SHOWN) == ["rain.flac · 1.0 s", "bell.wav · 1.5 s"]
    # by keyboard alone
    page.run("document.getElementById('question').focus()")
    page.press("Tab", shift=True)
    assert page.run("document.activeElement.ariaLabel") == "Remove bell.wav"
    page.press("Tab", shift=True)
    assert page.run("document.activeElement.tagName") == "AUDIO"
    page.run("[...document.querySelectorAll('#media button')][0].focus()")
    page.press("Enter")
    assert page.run(SHOWN) == ["bell.wav · 1.5 s"]
    assert page.run("document.activeElement.ariaLabel") == "Remove bell.wav"
    page.ask("What is it?", 1)
    assert page.run(SHOWN) == []
    assert page.run("document.querySelector('.shown figcaption').textContent") == "bell.wav · 1.5 s"
    page.until(PLAYABLE)
    first = {"role": "user", "content": [sent(bell), {"type": "text", "text": "What is it?"}]}
    assert_alone_is_a_question(page, rain, SHOWN, first, sent(rain))


def test_sounds_can_be_dropped_and_pasted(page: Page, files: dict[str, Path]) -> None:
    page.drop(files["rain.mp3"])
    page.until(f"{SHOWN}.length === 1 && {PLAYABLE}")
    assert page.paste(files["bell.wav"], "audio/x-wav")
    page.until(f"{SHOWN}.length === 2 && {PLAYABLE}")
    assert page.run(SHOWN)[1] == "pasted.wav · 1.5 s"
    page.ask("", 1)
    content = page.posted[0]["body"]["messages"][0]["content"]
    assert [part["input_audio"]["format"] for part in content] == ["mp3", "wav"]
    assert page.run("document.querySelectorAll('.below').length") == 1


@pytest.mark.parametrize(
    ("limits", "name", "words"),
    [
        ({}, "words.txt", "words.txt is no sound of a kind that is read: WAV, FLAC, MP3."),
        ({}, "empty.wav", "empty.wav is empty."),
        ({}, "long.wav", f"long.wav lasts {SECONDS + 1}.0 s, the model hears {SECONDS} s."),
        ({"most": 0}, "bell.wav", "A conversation may have 0 sounds."),
        ({"body": 100}, "bell.wav", "all sounds of a conversation may have 0.0 MiB together."),
    ],
)
def test_what_the_server_would_refuse_is_refused_before(
    page: Page, files: dict[str, Path], limits: dict[str, int], name: str, words: str
) -> None:
    assert_refused(page, limits, [files[name]], words)
    assert page.run(f"{SHOWN}.length") == 0


def test_the_page_has_the_limits_of_the_server(page: Page) -> None:
    told = page.run("import('/static/media.js').then(({ limits }) => limits)")
    assert (told["kind"], told["most"], told["bytes"], told["seconds"]) == ("sound", 8, 20 << 20, SECONDS)
    assert told["body"] == ROOMY.max_body_bytes
    assert page.run("document.getElementById('attach').ariaLabel") == "Add sounds"


def test_a_refusal_of_the_server_is_told_and_the_sound_stays(page: Page, files: dict[str, Path]) -> None:
    assert_the_server_refuses(page, files["half.wav"], SHOWN, "audio")
