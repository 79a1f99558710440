"""What a server allows: from the command line, else from the environment, else safe defaults."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qwen_onnx.errors import ConfigError
from qwen_onnx.runtime.engines import QUEUE_SIZE, STREAMS
from qwen_onnx.runtime.service.policy import OPEN, STRICT, Policy

PREFIX = "QWEN_ONNX_"
# read by other parts of the program
OTHERS = frozenset({"QWEN_ONNX_CACHE", "QWEN_ONNX_API_KEYS", "QWEN_ONNX_TARGET_PACKAGE", "QWEN_ONNX_TARGET_PYTHON"})
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")


class ServerSettings(BaseModel):
    """Limits and addresses of a server; an unknown key is an error.

    Args:
        rate_limit, max_input_characters, max_tokens, request_seconds, sanitise, log_key: see ``Policy``; None: as
            ``policy`` says. A rate counts the POST requests below /v1 of a key or, without keys, of an address.
        streams: answers at once; queue_size: requests that may wait beyond them.
        context: tokens of one conversation; None: the model's, or what the memory allows.
        header_seconds, body_seconds: time for a request's headers and for its body to arrive.
        send_seconds: how long a client may leave a piece of an answer unread.
        grace_seconds: time for running answers to end after SIGTERM.
        allowed_hosts: names beside the loopback ones that the Host header may have; ``*`` allows all.
        cors_origins: pages of these origins may call the API.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    insecure: bool = False
    keys: Path | None = None
    rate_limit: int | None = Field(default=None, ge=1)
    max_input_characters: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_body_bytes: int = Field(default=4 << 20, ge=1024)
    max_json_depth: int = Field(default=64, ge=4)
    header_seconds: float = Field(default=10, gt=0)
    body_seconds: float = Field(default=30, gt=0)
    request_seconds: float | None = Field(default=None, gt=0)
    send_seconds: float = Field(default=60, gt=0)
    grace_seconds: int = Field(default=30, ge=0)
    streams: int = Field(default=STREAMS, ge=1)
    queue_size: int = Field(default=QUEUE_SIZE, ge=0)
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

    def policy(self, keyed: bool) -> Policy:
        """What a client may ask for: what was set; else the strict numbers, or, where only this machine's users come
        and without keys, what the model's context holds. A server with another name has a proxy before it.
        """
        own = self.loopback and not keyed and not self.allowed_hosts
        given = {field.name: getattr(self, field.name) for field in fields(Policy)}
        return replace(OPEN if own else STRICT, **{name: value for name, value in given.items() if value is not None})

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
