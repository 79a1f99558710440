"""What a server is told, and what it refuses to be told."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import MagicMock

import pytest
from typer.testing import CliRunner

from qwen_onnx.cli.app import app
from qwen_onnx.errors import ConfigError
from qwen_onnx.runtime.server.app import load_service
from qwen_onnx.runtime.server.settings import ServerSettings


def test_options_win_over_the_environment_and_that_over_the_defaults() -> None:
    environment = {"QWEN_ONNX_PORT": "9000", "QWEN_ONNX_MAX_TOKENS": "77", "QWEN_ONNX_ALLOWED_HOSTS": "a.example, b"}
    settings = ServerSettings.read(environment, port=9001, host=None)
    assert (settings.port, settings.max_tokens, settings.host) == (9001, 77, "127.0.0.1")
    assert settings.allowed_hosts == ("a.example", "b")


@pytest.mark.parametrize("name", ["QWEN_ONNX_API_KEYS_FILE", "QWEN_ONNX_KEYS"])
def test_the_file_of_keys_has_a_variable(name: str) -> None:
    assert ServerSettings.read({name: "/run/keys.json"}).keys == Path("/run/keys.json")
    assert ServerSettings.read({name: "/run/keys.json"}, keys=Path("other.json")).keys == Path("other.json")


def test_variables_of_other_verbs_are_let_be() -> None:
    environment = {"QWEN_ONNX_API_KEYS": "a" * 32, "QWEN_ONNX_REGISTRY_USER": "someone", "QWEN_ONNX_CACHE": "/there"}
    assert ServerSettings.read(environment) == ServerSettings()


def test_the_command_line_has_each_setting_with_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ServerSettings] = []
    monkeypatch.setattr("qwen_onnx.runtime.server.app.serve", lambda *_, settings, **__: seen.append(settings))
    monkeypatch.setattr("qwen_onnx.artifact.manifest.read_manifest", MagicMock())
    environment = {
        "QWEN_ONNX_ALLOWED_HOSTS": "a.example, b",
        "QWEN_ONNX_MAX_TOKENS": "7",
        "QWEN_ONNX_STREAMS": "2",
        "QWEN_ONNX_INSECURE": "1",
        "QWEN_ONNX_BODY_SECONDS": "3",
    }
    options = ["--streams", "3", "--cors-origin", "https://x", "--fetch-images", "c.example"]
    done = CliRunner().invoke(app, ["serve", "folder", *options], env=environment)
    assert done.exit_code == 0, done.output
    [told] = seen
    assert (told.allowed_hosts, told.cors_origins) == (("a.example", "b"), ("https://x",))
    assert told.fetch_images == ("c.example",)
    assert (told.max_tokens, told.streams, told.insecure, told.body_seconds) == (7, 3, True, 3)
    # what was not said is as if there were no option
    assert told.model_fields_set == {
        "allowed_hosts",
        "cors_origins",
        "max_tokens",
        "streams",
        "insecure",
        "body_seconds",
        "fetch_images",
    }


def test_every_wrong_value_is_told_at_once_without_the_secret() -> None:
    environment = {
        "QWEN_ONNX_MAX_TOKEN": "5",
        "QWEN_ONNX_PORT": "70000",
        "QWEN_ONNX_LOG_KEY": "zanzibar",
        "QWEN_ONNX_CACHE": "/somewhere",
        "PATH": "/bin",
    }
    with pytest.raises(ConfigError) as caught:
        ServerSettings.read(environment)
    assert len(caught.value.faults) == 3
    for word in ("QWEN_ONNX_MAX_TOKEN", "port", "log_key"):
        assert word in str(caught.value)
    assert "zanzibar" not in str(caught.value)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False)],
)
def test_only_loopback_goes_without_keys(host: str, loopback: bool) -> None:
    settings = ServerSettings(host=host)
    assert settings.loopback == loopback
    assert (settings.hosts() is not None) == loopback
    settings.check_exposure(keyed=True)
    ServerSettings(host=host, insecure=True).check_exposure(keyed=False)
    if loopback:
        settings.check_exposure(keyed=False)
    else:
        with pytest.raises(ConfigError, match="--insecure"):
            settings.check_exposure(keyed=False)


@pytest.mark.parametrize(
    ("name", "usual", "other", "wrong"), [("speculate", "auto", "off", "draft"), ("kv_cache", "float", "int8", "int4")]
)
def test_how_the_engine_works_can_be_said(
    name: str, usual: str, other: str, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = MagicMock()
    monkeypatch.setattr("qwen_onnx.runtime.server.app.QwenService", service)
    variable, option = f"QWEN_ONNX_{name.upper()}", f"--{name.replace('_', '-')}"
    for asked, expected in (({}, usual), ({variable: other}, other)):
        load_service(Path("folder"), ServerSettings.read(asked), threads=1)
        assert service.call_args.kwargs[name] == expected
    done = CliRunner().invoke(app, ["serve", "folder", option, wrong])
    assert done.exit_code == 2
    assert option in done.output
    with pytest.raises(ConfigError, match=name):
        ServerSettings.read({variable: wrong})
