"""Basic and Bearer authentication of OCI registries.

The token challenge: https://distribution.github.io/distribution/spec/auth/token/.
"""

from __future__ import annotations

import base64
import re

import httpx
from pydantic import SecretStr
from pydantic_core import from_json

from qwen_onnx.errors import PublishError
from qwen_onnx.publish.credentials import PASSWORD, USER, registry_login
from qwen_onnx.publish.faults import FAULTS
from qwen_onnx.sources.web import bounded, require_encrypted

PARAMETER = re.compile(r'([a-zA-Z]+)="([^"]*)"')


class Login:
    """The Authorization header of one registry, which its challenges renew."""

    def __init__(self, client: httpx.Client, base: httpx.URL, host: str, scope: str) -> None:
        self._client, self._base, self._host, self._scope = client, base, host, scope
        self._login = registry_login(host)
        self._header: SecretStr | None = None

    def headers(self) -> dict[str, str]:
        """What to send with a request to the registry itself; for no other host."""
        return {"Authorization": self._header.get_secret_value()} if self._header else {}

    def answer(self, challenge: str) -> None:
        """Do what ``WWW-Authenticate`` asks for.

        Raises:
            PublishError: it wants credentials that are not there or are wrong, or asks for something else.
        """
        scheme, _, rest = challenge.partition(" ")
        if scheme.lower() == "basic":
            if not self._login:
                raise self.refused("needs a user and a password")
            self._header = self._basic()
        elif scheme.lower() == "bearer":
            self._header = self._token(dict(PARAMETER.findall(rest)))
        else:
            raise PublishError("asks for an unknown kind of login", where=self._host)

    def refused(self, what: str) -> PublishError:
        """The error when a login is missing or wrong."""
        return PublishError(what, where=self._host, hint=f"export {USER}=… {PASSWORD}=…, or docker login {self._host}")

    def _basic(self) -> SecretStr:
        assert self._login
        user, password = self._login
        pair = base64.b64encode(f"{user}:{password.get_secret_value()}".encode()).decode()
        return SecretStr(f"Basic {pair}")

    def _require_safe(self, realm: str) -> None:
        """A token server is told the password: it is the registry itself, or encrypted."""
        try:
            url = httpx.URL(realm)
        except httpx.InvalidURL:
            raise PublishError("asks for a token at a place that is none", where=self._host) from None
        if (url.scheme, url.host, url.port) != (self._base.scheme, self._base.host, self._base.port):
            require_encrypted(url, "--plain-http allows it for the registry itself, not for its token server", FAULTS)

    def _token(self, given: dict[str, str]) -> SecretStr:
        if not given.get("realm"):
            raise PublishError("asks for a token and does not say where to get it", where=self._host)
        self._require_safe(given["realm"])
        wanted = {"service": given.get("service", ""), "scope": given.get("scope") or self._scope}
        headers = {"Authorization": self._basic().get_secret_value()} if self._login else {}
        parameters = {key: value for key, value in wanted.items() if value}
        with self._client.stream("GET", given["realm"], params=parameters, headers=headers) as response:
            if response.status_code in (401, 403):
                raise self.refused("the user or the password is wrong" if self._login else "needs a login")
            if response.status_code != httpx.codes.OK:
                raise PublishError(f"its token server answered {response.status_code}", where=self._host)
            body = bounded(response, 1 << 18, "the token", FAULTS)
        try:
            answer = from_json(body)
            token = answer.get("token") or answer["access_token"]
        # ``from None``: the body may hold a token
        except (ValueError, AttributeError, KeyError):
            raise PublishError("its token server gave no token", where=self._host) from None
        if not isinstance(token, str) or not re.fullmatch(r"[\x21-\x7e]+", token):
            raise PublishError("its token server gave no token", where=self._host)
        return SecretStr(f"Bearer {token}")
