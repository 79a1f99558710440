"""How Qwen3-ASR is asked for a language, and how its answers are read: ``language English<asr_text>What was said.``"""

from __future__ import annotations

from qwen_onnx.errors import RequestError

MARK, LANGUAGE, NONE = "<asr_text>", "language ", "none"
# characters before the mark: a language's name and more; an answer whose mark comes later has none
MOST_PREFIX = 64
# as transformers' processor has them: the names are those that the model was trained with
LANGUAGES = {
    "ar": "Arabic",
    "yue": "Cantonese",
    "zh": "Chinese",
    "cs": "Czech",
    "da": "Danish",
    "nl": "Dutch",
    "en": "English",
    "fil": "Filipino",
    "fi": "Finnish",
    "fr": "French",
    "de": "German",
    "el": "Greek",
    "hi": "Hindi",
    "hu": "Hungarian",
    "id": "Indonesian",
    "it": "Italian",
    "ja": "Japanese",
    "ko": "Korean",
    "mk": "Macedonian",
    "ms": "Malay",
    "fa": "Persian",
    "pl": "Polish",
    "pt": "Portuguese",
    "ro": "Romanian",
    "ru": "Russian",
    "es": "Spanish",
    "sv": "Swedish",
    "th": "Thai",
    "tr": "Turkish",
    "vi": "Vietnamese",
}


def language_of(asked: str, *, where: str) -> str:
    """The model's name of a language that is asked for by its code or by its name; RequestError for others."""
    plain = asked.strip().lower()
    found = LANGUAGES.get(plain) or next((name for name in LANGUAGES.values() if name.lower() == plain), None)
    if found is None:
        known = ", ".join(f"{code} ({name})" for code, name in LANGUAGES.items())
        raise RequestError(f"the language {asked[:40]!r} is not one of {known}", where=where)
    return found


def prefill(language: str) -> str:
    """How an answer in ``language`` begins: the model goes on with the text alone."""
    return f"{LANGUAGE}{language}{MARK}"


class Transcript:
    """An answer on its way: what the model says before its text is held back.

    Args:
        language: that the answer was begun with; None: the model says which it heard.

    Attributes:
        language: None: it heard none, or did not say.
    """

    def __init__(self, language: str | None) -> None:
        self.language, self._text = language, ""
        self._held: str | None = None if language else ""

    @property
    def text(self) -> str:
        """All of it so far."""
        return self._text.strip()

    def push(self, piece: str) -> str:
        """What of the text became certain with a piece of the answer."""
        if self._held is None:
            return self._add(piece)
        self._held += piece
        if MARK not in self._held:
            return self.flush() if len(self._held) > MOST_PREFIX else ""
        said, rest = self._held.split(MARK, 1)
        self.language, self._held = _said(said), None
        return self._add(rest)

    def flush(self) -> str:
        """What is left at the end: an answer without the mark is text."""
        held, self._held = self._held or "", None
        return self._add(held)

    def _add(self, piece: str) -> str:
        fresh = piece if self._text else piece.lstrip()
        self._text += fresh
        return fresh


def _said(prefix: str) -> str | None:
    """The language in what stands before the mark."""
    line = next(filter(None, map(str.strip, prefix.splitlines())), "")
    told = line[len(LANGUAGE) :].strip() if line.lower().startswith(LANGUAGE) else line
    return None if told.lower() in ("", NONE, LANGUAGE.strip()) else told
