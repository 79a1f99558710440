"""The chat in the terminal: commands, answers as they come, Ctrl-C that stops the answer and not the program."""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from qwen_onnx.errors import ConfigError, QwenOnnxError
from qwen_onnx.runtime.chat.conversation import AUDIO, IMAGE, SETTINGS, VIDEO, Conversation, Outcome
from qwen_onnx.runtime.chat.line_input import piped, terminal_reader
from qwen_onnx.runtime.processing.reasoning import Kind

DIM, RED, PLAIN = "\x1b[2m", "\x1b[31m", "\x1b[0m"
# a model's text must not steer the terminal: no escape sequences, only newlines and tabs
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
KEYS = """
Alt+Enter, or a backslash at the end of a line, begins a new line; a text that stands
between triple quotes may have several. Begin with // to send a text that begins with /.
Ctrl-C stops an answer or clears the line; Ctrl-D ends."""


class Terminal:
    """Reads questions and commands until the input ends.

    In a terminal, errors are told and the chat goes on; in a pipe the first one ends the program, so that scripts
    notice.
    """

    def __init__(self, conversation: Conversation) -> None:
        self.conversation = conversation
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self._colour = self.interactive and "NO_COLOR" not in os.environ
        self._commands: dict[str, tuple[str, str, Callable[[str], None]]] = {
            "/help": ("", "this list", self._help),
            "/system": ("TEXT", "set the system message; - removes it; without TEXT show it", self._system),
            "/think": ("on|off", "have the model think before it answers", self._think),
            IMAGE: ("FILE", "show a picture with the next question", partial(self._attach, IMAGE)),
            AUDIO: ("FILE", "play a sound with the next question", partial(self._attach, AUDIO)),
            VIDEO: ("FILE", "show a video, an animated GIF, APNG or WebP", partial(self._attach, VIDEO)),
            "/set": ("NAME VALUE", "change a setting, e.g. temperature 0.7; alone: show all", self._set),
            "/regenerate": ("", "answer the last question anew", self._regenerate),
            "/reset": ("", "forget the conversation, keep system message and settings", self._reset),
            "/save": ("FILE", "write the conversation as JSON", self._save),
            "/load": ("FILE", "go on with a saved conversation", self._load),
            "/exit": ("", "end", self._exit),
        }

    def run(self) -> None:
        """Until the input ends; in a pipe an empty line ends it too."""
        read = terminal_reader(list(self._commands)) if self.interactive else piped
        if self.interactive:
            context = f"context of {self.conversation.context_length:,} tokens"
            self._note(f"{self.conversation.model} · {context} · /help lists the commands, Ctrl-D ends")
        while True:
            try:
                try:
                    said = read()
                except EOFError:
                    return
                if said.strip():
                    self._take(said)
                elif not self.interactive:
                    return
            except QwenOnnxError as error:
                if not self.interactive:
                    raise
                self._say(_words(error), RED)
            except KeyboardInterrupt:
                # between two answers, e.g. while a file is read or before the prompt is there
                if not self.interactive:
                    raise
            except StopIteration:
                return

    def _take(self, said: str) -> None:
        if not said.startswith("/"):
            self._ask(said)
            return
        if said.startswith("//"):
            self._ask(said[1:])
            return
        name, _, rest = said.partition(" ")
        if name not in self._commands:
            known = ", ".join(self._commands)
            raise ConfigError(
                [f"{name}: no such command; there are {known}"], hint="begin with // to send a text that begins with /"
            )
        self._commands[name][2](rest.strip())

    def _ask(self, text: str) -> None:
        self.conversation.ask(text)
        self._answer()

    def _answer(self) -> None:
        with _interrupts(self.interactive) as stopped:
            self._make_room()
            writer = Writer(self._colour, self.interactive)
            try:
                outcome = self.conversation.answer(writer.write, stopped)
            finally:
                writer.end()
        self._tell(outcome)

    def _make_room(self) -> None:
        conversation = self.conversation
        try:
            dropped, tokens = conversation.fit()
        except QwenOnnxError:
            conversation.messages.pop()
            raise
        if dropped:
            self._say(
                f"the context is full ({tokens:,} of {conversation.context_length:,} tokens): "
                f"the oldest {dropped} messages are dropped",
                DIM,
            )

    def _tell(self, outcome: Outcome) -> None:
        if not self.interactive:
            return
        last = outcome.last
        parts = ["stopped"] if outcome.stopped else []
        parts.append(f"{last.completion_tokens} token{'s' if last.completion_tokens != 1 else ''}")
        if outcome.tokens_per_second:
            parts.append(f"{outcome.tokens_per_second:.1f} tokens/s")
        if outcome.first_token_seconds is not None:
            parts.append(f"first after {outcome.first_token_seconds:.2f} s")
        if last.finish_reason == "length" and not outcome.stopped:
            used, most = last.prompt_tokens + last.completion_tokens, self.conversation.context_length
            full = f"cut: the context is full ({used:,} tokens)"
            parts.append(full if used >= most else "cut at max_new_tokens: /set max_new_tokens N")
        self._note(" · ".join(parts) + "\n")

    def _help(self, _: str) -> None:
        rows = [(f"{name} {usage}".strip(), text) for name, (usage, text, _) in self._commands.items()]
        width = max(len(left) for left, _ in rows)
        self._say("\n".join(f"{left:{width}}  {text}" for left, text in rows) + f"\n{KEYS}")

    def _system(self, text: str) -> None:
        if text:
            self.conversation.system = None if text == "-" else text
        self._note(f"system message: {self.conversation.system or 'none'}")

    def _think(self, text: str) -> None:
        if text not in ("on", "off"):
            raise ConfigError([f"/think {text}: give on or off"])
        self.conversation.set_thinking(text == "on")
        self._note(f"thinking is {text}")

    def _attach(self, command: str, text: str) -> None:
        path = _path(command, text)
        self.conversation.attach(path, command)
        self._note(f"attached {path.name}: it goes with the next question")

    def _set(self, text: str) -> None:
        words = text.split()
        if len(words) not in (0, 2):
            raise ConfigError([f"/set {text}: give a name and a value; names are {', '.join(SETTINGS)}"])
        if words:
            self.conversation.set(*words)
        values = {name: getattr(self.conversation.config, name) for name in SETTINGS}
        self._note(" · ".join(f"{name} {'none' if value is None else value}" for name, value in values.items()))

    def _regenerate(self, _: str) -> None:
        self.conversation.forget_answer()
        self._answer()

    def _reset(self, _: str) -> None:
        self.conversation.messages.clear()
        self.conversation.attached.clear()
        self._note("the conversation begins anew")

    def _save(self, text: str) -> None:
        path = _path("/save", text)
        self.conversation.save(path)
        self._note(f"saved {len(self.conversation.messages)} messages to {path}")

    def _load(self, text: str) -> None:
        path = _path("/load", text)
        other = self.conversation.load(path)
        held = f", held with {other}" if other else ""
        self._note(f"loaded {len(self.conversation.messages)} messages from {path}{held}")

    def _exit(self, _: str) -> None:
        raise StopIteration

    def _note(self, text: str) -> None:
        """What only people at a terminal want to know."""
        if self.interactive:
            self._say(text, DIM)

    def _say(self, text: str, style: str = "") -> None:
        """On standard error: standard output is for answers."""
        coloured = f"{style}{text}{PLAIN}" if self._colour and style else text
        print(coloured, file=sys.stderr, flush=True)


class Writer:
    """Writes an answer as it comes; what the model thinks is dim, and in a pipe apart, on standard error."""

    def __init__(self, colour: bool, interactive: bool) -> None:
        self._colour, self._interactive = colour, interactive
        self._kind: Kind = "content"

    def write(self, kind: Kind, text: str) -> None:
        """One piece."""
        if self._interactive:
            text = CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
        file = sys.stderr if kind == "reasoning" and not self._interactive else sys.stdout
        if kind != self._kind and kind == "content":
            print("\n", file=sys.stderr if not self._interactive else sys.stdout)
        self._kind = kind
        dim = self._colour and kind == "reasoning"
        file.write(f"{DIM}{text}{PLAIN}" if dim else text)
        file.flush()

    def end(self) -> None:
        """After the last piece."""
        sys.stdout.write("\n")
        sys.stdout.flush()


def _words(error: QwenOnnxError) -> str:
    """Without the headings that an error has on a command line."""
    lines = error.faults if isinstance(error, ConfigError) else [error.what]
    return "\n".join([*lines, *([error.hint] if error.hint else [])])


@contextmanager
def _interrupts(catch: bool) -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed in the block; it raises nothing, so that the engine is left in order."""
    pressed = threading.Event()
    if not catch:
        yield pressed.is_set
        return
    previous = signal.signal(signal.SIGINT, lambda *_: pressed.set())
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, previous)


def _path(command: str, text: str) -> Path:
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError([f"{command} {text}: {error}"]) from error
    if len(words) != 1:
        raise ConfigError([f"{command}: give one file; quote a name with spaces"])
    return Path(words[0]).expanduser()
