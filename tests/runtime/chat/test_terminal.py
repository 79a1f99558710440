"""The chat as people meet it: the real command in a pseudo-terminal, and in a pipe."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen_onnx.errors import ConfigError, PromptTooLongError, TemplateError
from qwen_onnx.runtime import GenerationConfig, QwenService
from qwen_onnx.runtime.chat.conversation import Conversation
from qwen_onnx.runtime.chat.line_input import is_complete, unwrap
from qwen_onnx.runtime.chat.terminal import Writer
from tests.conftest import REPOSITORY, run_cli

# whole control sequences, and one whose end has not come yet
ESCAPES = re.compile(r"\x1b(\[[ -?]*[@-~]|[=>]|\][^\x07]*\x07|\[?[ -?]*$)")
DONE = r"\d+ tokens? · [\d.,]+ tokens/s · first after [\d.]+ s"
PROMPT = "you>"
# Ctrl-C is a signal only to those whose controlling terminal it is typed at
LAUNCH = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.executable, sys.argv[1:])"


class Screen:
    """``qwen-onnx chat`` with a terminal of its own."""

    def __init__(self, artifact: Path, home: Path, *options: str) -> None:
        self._ours, theirs = pty.openpty()
        environment = {**os.environ, "XDG_STATE_HOME": str(home), "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm"}
        self.child = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, sys.executable, "-m", "qwen_onnx.cli.app", "chat", str(artifact), *options],
            cwd=REPOSITORY,
            env=environment,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        self.raw = b""
        self._read_to = 0
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                data = os.read(self._ours, 65536)
            except OSError:
                return
            if not data:
                return
            self.raw += data

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def expect(self, pattern: str) -> str:
        """What appears up to and with ``pattern``; what came before the last match is not seen again."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            text = ESCAPES.sub("", self.raw.decode("utf-8", "replace"))[self._read_to :]
            if match := re.search(pattern, text):
                self._read_to += match.end()
                return text[: match.end()]
            time.sleep(0.02)
        raise AssertionError(f"no {pattern!r} in {text[-3000:]!r}")

    def close(self) -> None:
        if self.child.poll() is None:
            self.child.kill()
        self.child.wait()
        os.close(self._ours)


@pytest.fixture
def screen(tiny_build: Path, tmp_path: Path) -> Iterator[Screen]:
    opened = Screen(tiny_build, tmp_path, "--max-tokens", "8")
    opened.expect(r"checkpoint · context of 8,192 tokens · /help")
    opened.expect(PROMPT)
    yield opened
    opened.close()


def saved(path: Path) -> dict:  # type: ignore[type-arg]
    return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def test_ctrl_c_stops_the_answer_and_the_chat_goes_on(screen: Screen, tmp_path: Path) -> None:
    screen.type("/set max_new_tokens 8000\r")
    screen.expect("max_new_tokens 8000")
    # the tiny model repeats itself unless it is kept from it
    screen.type("/set repetition_penalty 5\r")
    screen.expect(r"repetition_penalty 5\.0")
    # what is typed before the prompt is there is echoed, and looks like the beginning of an answer
    screen.expect(PROMPT)
    screen.type("tell me\r")
    screen.expect(r"tell me\s+\S(?s:.{40})")
    screen.type("\x03")
    screen.expect(r"stopped · \d+ tokens")
    screen.type("/set max_new_tokens 4\r")
    screen.expect("max_new_tokens 4")
    screen.type("and then?\r")
    screen.expect(r"\n4 tokens · [\d.,]+ tokens/s")
    screen.type(f"/save {tmp_path}/chat.json\r")
    screen.expect("saved 4 messages")
    messages = saved(tmp_path / "chat.json")["messages"]
    assert [message["stopped"] for message in messages] == [False, True, False, False]
    assert messages[1]["content"]
    assert screen.child.poll() is None


@pytest.mark.slow
def test_save_and_load_keep_the_whole_conversation(tiny_build: Path, screen: Screen, tmp_path: Path) -> None:
    for command, said in [
        ("/system be brief", "system message: be brief"),
        ("/set temperature 0.5", r"temperature 0\.5"),
        ("/set seed 7", "seed 7"),
        ("hello", DONE),
        (f"/save '{tmp_path}/a chat.json'", "saved 2 messages"),
        ("/reset", "begins anew"),
        ("/set temperature 0", r"temperature 0\.0"),
        ("/system -", "system message: none"),
        (f"/load '{tmp_path}/a chat.json'", "loaded 2 messages"),
        ("/system", "system message: be brief"),
        (f"/save {tmp_path}/again.json", "saved 2 messages"),
        ("/regenerate", DONE),
        (f"/save {tmp_path}/anew.json", "saved 2 messages"),
    ]:
        screen.type(command + "\r")
        screen.expect(said)
    first = saved(tmp_path / "a chat.json")
    assert first["system"] == "be brief"
    assert first["settings"]["temperature"] == 0.5
    assert first["messages"][0]["content"] == "hello"
    assert saved(tmp_path / "again.json") == first
    assert saved(tmp_path / "anew.json")["messages"][0] == first["messages"][0]
    assert (tmp_path / "a chat.json").stat().st_mode & 0o777 == 0o600
    history = tmp_path / "qwen-onnx/chat-history"
    assert history.stat().st_mode & 0o777 == 0o600
    assert "+hello" in history.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("typed", ["one\x1b\rtwo\r", "one\\\rtwo\r", '"""one\rtwo"""\r'])
def test_several_lines_are_one_question(screen: Screen, tmp_path: Path, typed: str) -> None:
    screen.type(typed)
    screen.expect(DONE)
    screen.type(f"/save {tmp_path}/chat.json\r")
    screen.expect("saved 2 messages")
    assert saved(tmp_path / "chat.json")["messages"][0]["content"] == "one\ntwo"


@pytest.mark.slow
def test_mistakes_are_told_and_end_nothing(screen: Screen, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text('{"format": "qwen-onnx-chat/1", "model": 5}')
    for command, said in [
        ("/systm x", r"/systm: no such command; there are /help, /system"),
        ("/think on", "no enable_thinking"),
        ("/think maybe", "give on or off"),
        ("/set temperatur 1", "no setting 'temperatur'; there are .*temperature"),
        ("/set temperature 9", r"temperature is 9\.0"),
        ("/set top_k x", "not a number"),
        ("/regenerate", "no answer yet"),
        ("/save", "give one file"),
        (f"/save {tmp_path}/none/x.json", "cannot be written: No such file"),
        (f"/load {tmp_path}/none.json", "cannot be read: No such file"),
        (f"/load {tmp_path}/bad.json", r"model: Input should be a valid string"),
        ("/help", "/regenerate +answer"),
        ("//etc is a folder", DONE),
    ]:
        screen.type(command + "\r")
        screen.expect(said)
    screen.expect(PROMPT)
    screen.type("half a line\x03")
    screen.type("\x04")
    assert screen.child.wait(timeout=20) == 0, "Ctrl-C clears the line, Ctrl-D ends"


@pytest.mark.slow
def test_exit_ends(screen: Screen) -> None:
    screen.type("/exit\r")
    assert screen.child.wait(timeout=20) == 0


@pytest.mark.slow
def test_pipes_hold_answers_only_and_faults_end_them(tiny_build: Path) -> None:
    done = run_cli("chat", tiny_build, "--max-tokens", "4", input='/set temperature 0\n"""a\nb"""\nhello\n\nnot read')
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    again = run_cli("chat", tiny_build, "--max-tokens", "4", input="a\\\nb\nhello\n")
    assert again.stdout == done.stdout != ""
    wrong = run_cli("chat", tiny_build, input="/nonsense\nhello\n")
    assert wrong.returncode == 2
    assert "no such command" in wrong.stderr
    assert wrong.stdout == ""


def test_what_a_model_says_does_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    Writer(colour=False, interactive=True).write("content", "a\x1b[2Jb\x9b\r\n\tc")
    assert capsys.readouterr().out == "a\ufffd[2Jb\ufffd\ufffd\n\tc"


def test_thinking_is_dim_in_a_terminal_and_apart_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    for interactive in (True, False):
        writer = Writer(colour=interactive, interactive=interactive)
        writer.write("reasoning", "hm")
        writer.write("content", "4")
    told = capsys.readouterr()
    assert told.out == "\x1b[2mhm\x1b[0m\n\n44"
    assert told.err == "hm\n\n"


@pytest.mark.parametrize(
    ("text", "complete", "plain"),
    [
        ("a", True, "a"),
        ("a\\", False, "a\\"),
        ("a\\\nb", True, "a\nb"),
        ('"""', False, '"""'),
        ('"""a', False, '"""a'),
        ('"""a\\', False, '"""a\\'),
        ('"""\na\n"""', True, "a"),
        ('""""""', True, ""),
        ('say """ aloud', True, 'say """ aloud'),
    ],
)
def test_where_an_input_ends(text: str, complete: bool, plain: str) -> None:
    assert is_complete(text) is complete
    assert unwrap(text) == plain


@pytest.fixture
def conversation(service: QwenService) -> Conversation:
    return Conversation(service, GenerationConfig(max_new_tokens=4), model="tiny", system="s")


@pytest.mark.slow
def test_the_oldest_turns_go_when_the_context_is_full(conversation: Conversation) -> None:
    for index in range(4):
        conversation.ask(f"{index}" + "x" * 2700)
        dropped, tokens = conversation.fit()
        conversation.answer(lambda *_: None, lambda: False)
        assert (dropped > 0) == (index > 2), tokens
    assert tokens > 8000
    assert conversation.system == "s"
    assert [message.content[0] for message in conversation.messages[::2]] == ["1", "2", "3"]


def test_a_question_that_never_fits_costs_nothing_of_the_conversation(conversation: Conversation) -> None:
    conversation.ask("hello")
    conversation.answer(lambda *_: None, lambda: False)
    before = list(conversation.messages)
    for size in (9_000, 1_000_000):
        conversation.ask("x" * size)
        with pytest.raises(PromptTooLongError):
            conversation.fit()
        conversation.messages.pop()
        assert conversation.messages == before


def test_a_failed_answer_takes_its_question_back(conversation: Conversation) -> None:
    def fail(*_: object) -> None:
        raise BrokenPipeError

    conversation.ask("hello")
    with pytest.raises(BrokenPipeError):
        conversation.answer(fail, lambda: False)
    assert conversation.messages == []
    conversation.ask("again")
    assert conversation.answer(lambda *_: None, lambda: False).last.completion_tokens == 4


def test_thinking_is_switched_where_the_template_can(
    conversation: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TemplateError, match="enable_thinking"):
        conversation.set_thinking(True)
    template = conversation.service.template
    assert template
    source = "{{ messages[-1].content }}{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    monkeypatch.setattr(template, "source", source)
    conversation.set_thinking(False)
    conversation.ask("why")
    assert conversation.service.format_chat(conversation.prompt()) == "why<think>\n\n</think>\n\n"


def test_after_an_opened_tag_all_is_reasoning(conversation: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    template = conversation.service.template
    assert template
    source = "{{ messages[-1].content }}<think>\n"
    monkeypatch.setattr(template, "source", source)
    heard: list[tuple[str, str]] = []
    conversation.ask("why")
    conversation.answer(lambda kind, text: heard.append((kind, text)), lambda: False)
    assert {kind for kind, _ in heard} == {"reasoning"}
    assert conversation.messages[-1].reasoning_content == "".join(text for _, text in heard)
    assert conversation.messages[-1].content == ""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": "other"}, "format"),
        ({"extra": 1}, "extra"),
        ({"settings": {"temperature": 9}}, "settings.temperature"),
        ({"settings": {"warmth": 1}}, "settings.warmth"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no answer"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "expected the user"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages.0.role"),
    ],
)
def test_a_faulty_file_changes_nothing(
    conversation: Conversation, tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    conversation.ask("hello")
    conversation.answer(lambda *_: None, lambda: False)
    path = tmp_path / "chat.json"
    conversation.save(path)
    before = (list(conversation.messages), conversation.config, conversation.system)
    path.write_text(json.dumps(saved(path) | changes))
    with pytest.raises(ConfigError, match=words):
        conversation.load(path)
    assert (conversation.messages, conversation.config, conversation.system) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["chat.json"], "nothing is left of saving"
