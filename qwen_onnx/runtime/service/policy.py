"""What one client may ask for, in one record: of a Python program's service, and of a server."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Policy:
    """Limits of what a client may ask for. The defaults are for strangers; None leaves it to the model's context.

    Args:
        max_input_characters: of all text of a request: messages, prompt, instructions, tool results, tools.
        max_tokens: the most that a request may ask for.
        rate_limit: requests of a client in an hour.
        request_seconds: time for one answer.
        sanitise: remove scripts, frames and executable URLs from input and output (``sanitise.Sanitiser``).
        log_key: of the HMAC under which prompts are logged; None: a random one for each process.
    """

    max_input_characters: int | None = 8192
    max_tokens: int | None = 1024
    rate_limit: int | None = 100
    request_seconds: float | None = 300.0
    sanitise: bool = False
    log_key: str | None = None


STRICT = Policy()
# for whoever sits at the machine itself
OPEN = Policy(max_input_characters=None, max_tokens=None, rate_limit=None, request_seconds=None)
