"""What a server allows: from the command line, else from the environment, else safe defaults."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qwen_onnx.errors import ConfigError

PREFIX = "QWEN_ONNX_"
# read by other parts of the program
OTHERS = frozenset({"QWEN_ONNX_CACHE", "QWEN_ONNX_API_KEYS", "QWEN_ONNX_TARGET_PACKAGE", "QWEN_ONNX_TARGET_PYTHON"})
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")


class ServerSettings(BaseModel):
    """Limits and addresses of a server; an unknown key is an error.

    Args:
        rate_limit: POST requests below /v1 that a key may send in an hour; None: 100 when there are API keys, no limit
            when there are none. A limit without keys counts by client address.
        streams: answers at once; queue_size: requests that may wait beyond them.
        context: tokens of one conversation; None: the model's, or what the memory allows.
        max_input_characters: of all text of a request: messages, prompt, instructions, tool results, tools.
        max_tokens: the most that a request may ask for.
        header_seconds, body_seconds: time for a request's headers and for its body to arrive.
        request_seconds: time for one answer; send_seconds: how long a client may leave a piece of it unread.
        max_concurrent: answers that a key may have under way or waiting; None: half of what the server holds when there
            are several keys, else all. Without keys a limit counts by client address.
        max_connections: open at once; more are closed. max_buffered_bytes: of all bodies in memory.
        grace_seconds: time for running answers to end after SIGTERM.
        allowed_hosts: names beside the loopback ones that the Host header may have; ``*`` allows all.
        cors_origins: pages of these origins may call the API.
        sanitise: remove scripts, frames and executable URLs from input and output (``sanitise.Sanitiser``).
        log_key: of the HMAC under which prompts are logged; None: a random one for each process.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    insecure: bool = False
    keys: Path | None = None
    rate_limit: int | None = Field(default=None, ge=1)
    max_input_characters: int = Field(default=8192, ge=1)
    max_tokens: int = Field(default=1024, ge=1)
    max_body_bytes: int = Field(default=4 << 20, ge=1024)
    max_buffered_bytes: int = Field(default=64 << 20, ge=1024)
    max_connections: int = Field(default=4096, ge=1)
    max_concurrent: int | None = Field(default=None, ge=1)
    max_json_depth: int = Field(default=64, ge=4)
    header_seconds: float = Field(default=10, gt=0)
    body_seconds: float = Field(default=30, gt=0)
    request_seconds: float = Field(default=300, gt=0)
    send_seconds: float = Field(default=60, gt=0)
    grace_seconds: int = Field(default=30, ge=0)
    streams: int = Field(default=4, ge=1)
    queue_size: int = Field(default=16, ge=0)
    context: int | None = Field(default=None, ge=16)
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    sanitise: bool = False
    otlp: str | None = None
    log_key: str | None = Field(default=None, min_length=16, repr=False)

    @classmethod
    def read(cls, environment: Mapping[str, str], **options: Any) -> ServerSettings:
        """Options that are not None, then ``QWEN_ONNX_<FIELD>``, then the defaults; lists are comma separated.

        Raises:
            ConfigError: every value that is wrong, and every QWEN_ONNX_ variable that means nothing.
        """
        given: dict[str, Any] = {}
        faults = []
        for name, text in environment.items():
            field = name.removeprefix(PREFIX).lower()
            if not name.startswith(PREFIX) or name in OTHERS:
                continue
            if field not in cls.model_fields:
                faults.append(f"{name}: no such setting")
            else:
                listed = field in ("allowed_hosts", "cors_origins")
                given[field] = tuple(part.strip() for part in text.split(",") if part.strip()) if listed else text
        given |= {name: value for name, value in options.items() if value is not None}
        try:
            settings = cls(**given)
        except ValidationError as error:
            # the value itself stays untold: it may be the log's key
            faults += [f"{item['loc'][0] if item['loc'] else '?'}: {item['msg']}" for item in error.errors()]
        if faults:
            raise ConfigError(faults, hint="qwen-onnx serve --help")
        return settings

    @property
    def loopback(self) -> bool:
        """Whether only this machine can connect."""
        return is_loopback(self.host)

    def hosts(self) -> frozenset[str] | None:
        """What the Host header may name; None: anything.

        A server that listens beyond loopback is asked for by whatever name it has. One on loopback must not answer a
        page that let its own name point to 127.0.0.1 (DNS rebinding).
        """
        if "*" in self.allowed_hosts or not (self.loopback or self.allowed_hosts):
            return None
        return frozenset(host.lower() for host in (*LOOPBACK_HOSTS, self.host, *self.allowed_hosts))

    def check_exposure(self, keyed: bool) -> None:
        """ConfigError when strangers could use the server without a key and nobody said that they may."""
        if not (self.loopback or keyed or self.insecure):
            raise ConfigError(
                [f"--host {self.host}: reachable from other machines, and there are no API keys"],
                hint="qwen-onnx keys new NAME --file keys.json, then --keys keys.json; or --insecure",
            )


def is_loopback(host: str) -> bool:
    """Whether an address or name is this machine's own."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
