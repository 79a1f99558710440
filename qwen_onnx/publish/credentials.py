"""Tokens and passwords: read from the environment or docker's configuration, never from an address or an argument.

None of them is ever part of a message: errors name the variable, not what is in it.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from pathlib import Path

from pydantic import SecretStr

from qwen_onnx.errors import PublishError
from qwen_onnx.publish.faults import FAULTS
from qwen_onnx.sources.web import clean, secret

USER, PASSWORD = "QWEN_ONNX_REGISTRY_USER", "QWEN_ONNX_REGISTRY_PASSWORD"
HF_TOKEN, MODELSCOPE_TOKEN = "HF_TOKEN", "MODELSCOPE_API_TOKEN"
# how docker writes its own registry in config.json
DOCKER_HUB = {"docker.io": "https://index.docker.io/v1/", "registry-1.docker.io": "https://index.docker.io/v1/"}


def missing(variable: str, where: str) -> PublishError:
    """The error for a token that must be there to publish."""
    return PublishError(
        f"publishing needs a token and {variable} is not set",
        where=where,
        hint=f"export {variable}=…, then the same command again",
    )


def registry_login(host: str) -> tuple[str, SecretStr] | None:
    """User and password for a registry: from the environment, else from docker's configuration; None for neither.

    Raises:
        PublishError: one of the two variables is missing, or docker's configuration is damaged.
    """
    user, password = os.environ.get(USER, ""), secret(PASSWORD, FAULTS)
    if bool(user) != (password is not None):
        raise PublishError(
            f"{USER if password else PASSWORD} is not set, its other half is",
            where=host,
            hint=f"export both {USER} and {PASSWORD}",
        )
    if password:
        if ":" in user or not user.isprintable():
            raise PublishError(f"{USER} holds a colon or an unprintable character", where=host, hint=f"set {USER}")
        return user, password
    return _docker_login(host)


def _docker_login(host: str) -> tuple[str, SecretStr] | None:
    """``auths`` of docker's config.json: https://docs.docker.com/reference/cli/docker/login/. Helpers are not run."""
    path = Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker") / "config.json"
    try:
        auths = json.loads(path.read_bytes()).get("auths") or {}
        entry = next((auths[key] for key in (host, f"https://{host}", DOCKER_HUB.get(host)) if key in auths), None)
        if not entry or not entry.get("auth"):
            return None
        user, colon, password = base64.b64decode(entry["auth"], validate=True).decode("utf-8").partition(":")
    except FileNotFoundError:
        return None
    # ``from None``: what could not be decoded is part of these errors
    except (OSError, AttributeError, TypeError, ValueError, binascii.Error):
        raise PublishError(
            f"docker's configuration cannot be read for {host}", where=str(path), hint=f"docker login {host}"
        ) from None
    if not colon or not password:
        return None
    return user, clean(password, f"the password in {path}", FAULTS)
