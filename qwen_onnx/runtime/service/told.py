"""What is told of a request, without a word of what people wrote or were answered."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from qwen_onnx.runtime.service.generation import ChatPrompt, Prompt
from qwen_onnx.runtime.service.monitor import Measurement


@dataclass
class RequestRecord:
    """What is told of a request; the layers that it passes fill it in.

    ``client``: the key's name, or the address where there are no keys; it is counted by, and not logged.
    """

    request_id: str
    method: str
    route: str = "unmatched"
    status: int = 0
    key: str | None = None
    client: str | None = None
    reason: str | None = None
    prompt_hash: str | None = None
    generations: list[Measurement] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Fields of the log line; what is not known is absent. Several answers (``n``) share one prompt."""
        made = self.generations
        first = [one.ttft for one in made if one.ttft is not None]
        told: dict[str, Any] = {
            "request_id": self.request_id,
            "method": self.method,
            "route": self.route,
            "status": self.status,
            "key": self.key,
            "reason": self.reason,
            "prompt_hmac": self.prompt_hash,
            "prompt_tokens": made[0].prompt_tokens if made else None,
            "cached_tokens": max(one.cached_tokens for one in made) if made else None,
            "completion_tokens": sum(one.completion_tokens for one in made) if made else None,
            "ttft": round(min(first), 6) if first else None,
            "finish_reason": ",".join(one.finish_reason or "none" for one in made) if made else None,
            "fault": next((one.fault for one in made if one.fault), None),
        }
        return {name: value for name, value in told.items() if value is not None}


current: ContextVar[RequestRecord | None] = ContextVar("qwen_onnx_request", default=None)


class PromptHash:
    """HMAC-SHA-256: the same prompt has the same hash, and without the key nobody can try out what it was.

    Args:
        key: None draws one for this process.
    """

    def __init__(self, key: str | None = None) -> None:
        self._key = key.encode() if key else secrets.token_bytes(32)

    def of(self, prompt: Prompt) -> str:
        """In hexadecimal, the first 128 bits."""
        plain: Any = prompt
        if isinstance(prompt, ChatPrompt):
            plain = [list(prompt.messages), list(prompt.tools), prompt.thinking]
        content = json.dumps(plain, sort_keys=True, default=str).encode()
        return hmac.new(self._key, content, hashlib.sha256).hexdigest()[:32]
