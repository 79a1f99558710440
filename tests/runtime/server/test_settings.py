"""What a server is told, and what it refuses to be told."""

from __future__ import annotations

import pytest

from qwen_onnx.errors import ConfigError
from qwen_onnx.runtime.server.settings import ServerSettings


def test_options_win_over_the_environment_and_that_over_the_defaults() -> None:
    environment = {"QWEN_ONNX_PORT": "9000", "QWEN_ONNX_MAX_TOKENS": "77", "QWEN_ONNX_ALLOWED_HOSTS": "a.example, b"}
    settings = ServerSettings.read(environment, port=9001, host=None)
    assert (settings.port, settings.max_tokens, settings.host) == (9001, 77, "127.0.0.1")
    assert settings.allowed_hosts == ("a.example", "b")


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
