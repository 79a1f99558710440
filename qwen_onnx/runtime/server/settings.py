"""What a server allows: from the command line, else from the environment, else safe defaults."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from qwen_onnx.errors import ConfigError
from qwen_onnx.processes.network import is_loopback
from qwen_onnx.runtime.engines import QUEUE_SIZE, STREAMS, KvCache, Speculate
from qwen_onnx.runtime.server.keys import KEYS_FILE_VARIABLE, KEYS_VARIABLE
from qwen_onnx.runtime.service.policy import OPEN, STRICT, Policy

PREFIX = "QWEN_ONNX_"
# read by other parts of the program
OTHERS = frozenset(
    {
        KEYS_VARIABLE,
        *(f"{PREFIX}{name}" for name in ("CACHE", "TARGET_PACKAGE", "TARGET_PYTHON")),
        *(f"{PREFIX}REGISTRY_{name}" for name in ("USER", "PASSWORD")),
    }
)
HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*(:[0-9]{1,5})?")
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")


def variables(field: str) -> list[str]:
    """Of the environment, in which a setting may stand."""
    own = f"{PREFIX}{field.upper()}"
    return [KEYS_FILE_VARIABLE, own] if field == "keys" else [own]


class ServerSettings(BaseModel):
    """Limits and addresses of a server; an unknown key is an error.

    What has a description is an option of ``qwen-onnx serve`` too, the rest stands in the environment alone. What is in
    ``Policy`` and None is as ``policy`` says. Sizes are bytes.

    Args:
        header_seconds, body_seconds: time for a request's headers and for its body to arrive.
        send_seconds: how long a client may leave a piece of an answer unread.
        max_connections: open at once; more are closed. max_buffered_bytes: of all bodies in memory.
        max_concurrent, log_key: see ``Policy``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = Field(default="127.0.0.1", description="address to listen on")
    port: int = Field(default=8000, ge=0, le=65535, description="0 picks a free port")
    keys: Path | None = Field(default=None, description="key file, see `qwen-onnx keys new`")
    insecure: bool = Field(default=False, description="listen beyond loopback without API keys")
    rate_limit: int | None = Field(
        default=None, ge=1, description="requests per hour and key, or per address without keys"
    )
    max_input_characters: int | None = Field(default=None, ge=1, description="maximum characters of text in a request")
    max_tokens: int | None = Field(default=None, ge=1, description="maximum tokens a request may ask for")
    request_seconds: float | None = Field(default=None, gt=0, description="seconds for one answer")
    grace_seconds: int = Field(default=30, ge=0, description="seconds for running answers after SIGTERM")
    streams: int = Field(default=STREAMS, ge=1, description="answers generated at once")
    context: int | None = Field(
        default=None, ge=16, description="tokens of a conversation; default: the model's, or what fits in memory"
    )
    queue_size: int = Field(default=QUEUE_SIZE, ge=0, description="requests that may wait beyond them")
    speculate: Speculate = Field(
        default="auto",
        description="how tokens of a request that runs alone are guessed: where a text repeats itself, by the model",
    )
    kv_cache: KvCache = Field(
        default="float", description="int8 keeps a conversation in a quarter of the memory, if verification allows it"
    )
    allowed_hosts: tuple[str, ...] = Field(
        default=(), description="a host name of this server, say behind a proxy; * allows any; repeatable"
    )
    cors_origins: tuple[str, ...] = Field(default=(), description="let pages of this origin call the API; repeatable")
    fetch_images: tuple[str, ...] = Field(
        default=(), description="fetch pictures that requests show by URL from this host, HOST or HOST:PORT; repeatable"
    )
    sanitise: bool = Field(default=False, description="remove scripts, frames and executable URLs")
    otlp: str | None = Field(default=None, description="send traces there, e.g. http://localhost:4318/v1/traces")
    adapter_folder: Path | None = Field(
        default=None, description="folder of adapters, NAME.safetensors, that whoever has an API key may load by name"
    )
    adapter_budget: int = Field(
        default=1 << 30, ge=1, description="bytes of them in memory; the least recently used ones make room"
    )
    max_body_bytes: int = Field(default=4 << 20, ge=1024)
    max_buffered_bytes: int = Field(default=64 << 20, ge=1024)
    max_connections: int = Field(default=4096, ge=1)
    max_concurrent: int | None = Field(default=None, ge=1)
    max_json_depth: int = Field(default=64, ge=4)
    header_seconds: float = Field(default=10, gt=0)
    body_seconds: float = Field(default=30, gt=0)
    send_seconds: float = Field(default=60, gt=0)
    log_key: str | None = Field(default=None, min_length=16, repr=False)

    @field_validator("allowed_hosts", "cors_origins", "fetch_images", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """As the environment has them: names between commas."""
        parts = value.split(",") if isinstance(value, str) else [part for item in value for part in item.split(",")]
        return tuple(part.strip() for part in parts if part.strip())

    @field_validator("fetch_images")
    @classmethod
    def _hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        strange = next((host for host in value if not HOST.fullmatch(host)), None)
        if strange is not None:
            raise ValueError(f"{strange!r} is not HOST or HOST:PORT")
        return value

    @classmethod
    def read(cls, environment: Mapping[str, str], **options: Any) -> ServerSettings:
        """Options that are not None, then ``QWEN_ONNX_<FIELD>``, then the defaults; lists are comma separated.

        Raises:
            ConfigError: every value that is wrong, and every QWEN_ONNX_ variable that means nothing.
        """
        given: dict[str, Any] = {}
        faults = []
        for name, text in environment.items():
            if not name.startswith(PREFIX) or name in OTHERS:
                continue
            field = next((field for field in cls.model_fields if name in variables(field)), None)
            if field is None:
                faults.append(f"{name}: no such setting")
            else:
                given[field] = text
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

    def check_adapters(self, keyed: bool) -> None:
        """ConfigError when clients could load adapters without a key, or there is no folder of them."""
        if self.adapter_folder is None:
            return
        if not keyed:
            raise ConfigError(
                ["--adapter-folder: clients would load adapters, and there are no API keys"],
                hint="qwen-onnx keys new NAME --file keys.json, then --keys keys.json",
            )
        if not self.adapter_folder.is_dir():
            raise ConfigError([f"--adapter-folder {self.adapter_folder}: there is no such folder"])

    def check_exposure(self, keyed: bool) -> None:
        """ConfigError when strangers could use the server without a key and nobody said that they may."""
        if not (self.loopback or keyed or self.insecure):
            raise ConfigError(
                [f"--host {self.host}: reachable from other machines, and there are no API keys"],
                hint="qwen-onnx keys new NAME --file keys.json, then --keys keys.json; or --insecure",
            )
