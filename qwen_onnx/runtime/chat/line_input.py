"""What the user types: lines, several lines at once, and their history."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

BLOCK = '"""'

# the next question or command; EOFError at the end
Reader = Callable[[], str]


def is_complete(text: str) -> bool:
    """Whether Enter ends the input: not after a backslash, nor within a block of triple quotes."""
    stripped = text.strip()
    if stripped.startswith(BLOCK):
        return len(stripped) >= 2 * len(BLOCK) and stripped.endswith(BLOCK)
    return not text.endswith("\\")


def unwrap(text: str) -> str:
    """The text without the marks that joined its lines."""
    stripped = text.strip()
    if stripped.startswith(BLOCK) and is_complete(text):
        return stripped[len(BLOCK) : -len(BLOCK)].removeprefix("\n").removesuffix("\n")
    return re.sub(r"\\\n", "\n", text)


def piped() -> str:
    """The next input from a pipe or a file; its end within a block is the end of the block."""
    text = input()
    while not is_complete(text):
        try:
            text += "\n" + input()
        except EOFError:
            break
    return unwrap(text)


def state_folder() -> Path:
    """Where programs keep what they remember: of the XDG base directories, or of Windows."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    else:
        base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "qwen-onnx"


def history_file() -> Path | None:
    """The file of earlier inputs, made with mode 0600: they are private. None when the folder cannot be written."""
    path = state_folder() / "chat-history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
        path.chmod(0o600)
    except OSError:
        return None
    return path


def terminal_reader(commands: Sequence[str]) -> Reader:
    """Reads with editing, history and Tab for ``commands``. Enter sends, Alt+Enter begins a line, Ctrl-C clears."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter")
    def _enter(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if is_complete(buffer.text):
            buffer.validate_and_handle()
        else:
            buffer.insert_text("\n")

    @keys.add("escape", "enter")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    def _clear(event: KeyPressEvent) -> None:
        event.current_buffer.reset()

    path = history_file()
    session: PromptSession[str] = PromptSession(
        history=FileHistory(str(path)) if path else InMemoryHistory(),
        completer=WordCompleter(list(commands), sentence=True),
        complete_while_typing=False,
        key_bindings=keys,
        multiline=True,
        prompt_continuation="  … ",
    )
    return lambda: unwrap(session.prompt("you> "))
