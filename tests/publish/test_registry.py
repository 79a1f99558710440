"""OCI registries: a fake that keeps to the specification, and a real one where it is installed."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.live import free_port
from qwen_onnx.errors import PublishError
from qwen_onnx.processes.network import is_loopback
from qwen_onnx.publish.addresses import RegistryAddress, parse_address
from qwen_onnx.publish.credentials import registry_login
from qwen_onnx.publish.faults import FAULTS
from qwen_onnx.sources.web import make_client
from tests.fixtures.fake_registry import PASSWORD, TOKEN, USER, digest_of
from tests.publish.conftest import LARGEST, SMALL_FILES, files_of, leftovers, publish, pull, refused


def address(port: int, tag: str = "v1") -> str:
    return f"oci://127.0.0.1:{port}/models/tiny:{tag}"


@pytest.fixture
def login(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN_ONNX_REGISTRY_USER", USER)
    monkeypatch.setenv("QWEN_ONNX_REGISTRY_PASSWORD", PASSWORD)


@pytest.mark.slow
@pytest.mark.usefixtures("login")
@pytest.mark.parametrize("kind", [None, "basic", "bearer"])
def test_push_and_pull(registry: Any, passing_package: Path, tmp_path: Path, kind: str | None) -> None:
    registry.login = kind
    sent = publish(passing_package, address(registry.port))
    assert sent["manifest"] == digest_of(registry.manifests["v1"])
    last = [(method, path) for method, path, _ in registry.log if method == "PUT"][-1]
    assert last == ("PUT", "/v2/models/tiny/manifests/v1"), "the tag comes last"
    again = publish(passing_package, address(registry.port))
    assert again["sent"] == 0
    assert again["present"] == sent["sent"] + sent["present"]
    got = pull(address(registry.port), "--output", tmp_path / "got", "--expect", sent["digest"])
    assert files_of(tmp_path / "got") == files_of(passing_package)
    assert got["received"] == again["present"]
    pinned = f"oci://127.0.0.1:{registry.port}/models/tiny@{sent['manifest']}"
    assert pull(pinned, "--output", tmp_path / "pinned")["digest"] == sent["digest"]


@pytest.mark.slow
def test_a_login_of_docker_is_found(registry: Any, passing_package: Path, tmp_path: Path) -> None:
    registry.login = "bearer"
    auth = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    (tmp_path / "home").mkdir()
    config = {"auths": {f"127.0.0.1:{registry.port}": {"auth": auth}}, "credsStore": "desktop"}
    (tmp_path / "home/config.json").write_text(json.dumps(config))
    publish(passing_package, address(registry.port))
    (tmp_path / "home/config.json").write_text(json.dumps(config).replace(auth, "%%"))
    assert "docker's configuration cannot be read" in refused("publish", passing_package, address(registry.port))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["basic", "bearer"])
def test_missing_and_wrong_logins(
    registry: Any, passing_package: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    registry.login = kind
    said = refused("publish", passing_package, address(registry.port))
    assert "QWEN_ONNX_REGISTRY_PASSWORD" in said
    monkeypatch.setenv("QWEN_ONNX_REGISTRY_USER", USER)
    assert "its other half is" in refused("publish", passing_package, address(registry.port))
    monkeypatch.setenv("QWEN_ONNX_REGISTRY_PASSWORD", "hunter2")
    said = refused("publish", passing_package, address(registry.port))
    assert "QWEN_ONNX_REGISTRY_USER" in said
    assert "hunter2" not in said
    assert base64.b64encode(f"{USER}:hunter2".encode()).decode() not in said
    assert not registry.manifests


@pytest.mark.slow
@pytest.mark.usefixtures("login")
def test_a_login_stays_with_its_host(registry: Any, passing_package: Path, tmp_path: Path) -> None:
    registry.login, registry.redirects = "bearer", True
    publish(passing_package, address(registry.port))
    pull(address(registry.port), "--output", tmp_path / "got")
    elsewhere = [sent for _, path, sent in registry.log if path.startswith("/storage/")]
    assert elsewhere
    assert set(elsewhere) == {None}
    assert f"Bearer {TOKEN}" in {sent for _, _, sent in registry.log}


@pytest.mark.slow
def test_a_pull_that_was_cut_off_goes_on(
    registry: Any, passing_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(passing_package, address(registry.port))
    # out of patience at once, as after a long outage
    monkeypatch.setattr("qwen_onnx.sources.transfer.DELAYS", ())
    registry.cut = 200_000
    said = refused("pull", address(registry.port), "--output", tmp_path / "got")
    assert "the same command goes on where this one stopped" in said
    assert not (tmp_path / "got").exists()
    before = len(registry.log)
    got = pull(address(registry.port), "--output", tmp_path / "got")
    assert files_of(tmp_path / "got") == files_of(passing_package)
    assert got["present"] > 100_000
    size = sum(path.stat().st_size for path in passing_package.iterdir())
    assert got["received"] == size - got["present"]
    fetched = [path for method, path, _ in registry.log[before:] if "/blobs/" in path]
    assert len(fetched) < len(files_of(passing_package)), "what was whole was not asked for again"
    assert not leftovers(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda data: data[:-1] + b"!" if len(data) > 100_000 else data, "digest other than"),
        (lambda data: data + b"more" if len(data) > 100_000 else data, "longer than"),
        (lambda data: data[:-1] if len(data) > 100_000 else data, "ended after"),
        (lambda data: data.replace(b'"PASS"', b'"pass"'), "digest other than"),
    ],
)
def test_bytes_that_were_changed(registry: Any, passing_package: Path, tmp_path: Path, spoil: Any, words: str) -> None:
    publish(passing_package, address(registry.port))
    registry.spoil = staticmethod(spoil)
    assert words in refused("pull", address(registry.port), "--output", tmp_path / "got")
    assert not (tmp_path / "got").exists()
    registry.spoil = staticmethod(lambda data: data)
    pull(address(registry.port), "--output", tmp_path / "got")
    assert files_of(tmp_path / "got") == files_of(passing_package)


def test_a_manifest_that_is_not_the_announced_one(registry: Any, passing_package: Path, tmp_path: Path) -> None:
    sent = publish(passing_package, address(registry.port))
    registry.manifests[sent["manifest"]] = registry.manifests["v1"].replace(b"tokenizer.json", b"tokenizer.jsom")
    pinned = f"oci://127.0.0.1:{registry.port}/models/tiny@{sent['manifest']}"
    assert "digest other than" in refused("pull", pinned, "--output", tmp_path / "got")


def test_what_is_not_there_or_not_reachable(registry: Any, passing_package: Path, tmp_path: Path) -> None:
    assert "MANIFEST_UNKNOWN" in refused("pull", address(registry.port, "v9"), "--output", tmp_path / "got")
    said = refused("publish", passing_package, address(free_port()))
    assert "cannot be reached" in said
    assert "refused" in said
    pinned = f"oci://127.0.0.1:{registry.port}/models/tiny@sha256:{'0' * 64}"
    assert "under a tag" in refused("publish", passing_package, pinned)


def test_http_beyond_this_machine_needs_a_word(registry: Any, passing_package: Path) -> None:
    """A token server on http elsewhere would be told the password."""
    assert [is_loopback(host) for host in ("127.0.0.1:5000", "localhost", "[::1]:80", "10.0.0.1", "local.host")] == [
        True,
        True,
        True,
        False,
        False,
    ]
    registry.login = "bearer"
    registry._fault = lambda self, status, code, **_: self.send(
        401, WWW_Authenticate='Bearer realm="http://192.0.2.1/token",service="x"'
    )
    said = refused("publish", passing_package, address(registry.port))
    assert "http to 192.0.2.1 is not encrypted" in said
    assert "--plain-http" in said


def test_a_token_server_elsewhere_is_encrypted_whatever_is_allowed(
    registry: Any, passing_package: Path, login: None
) -> None:
    """``--plain-http`` is for the registry; the password does not follow a realm over http."""
    registry.login = "bearer"
    realms = iter(["http://192.0.2.1/token", "ftp://127.0.0.1/token", "http://x:port/", ""])
    registry._fault = lambda self, status, code, **_: self.send(
        401, WWW_Authenticate=f'Bearer realm="{next(realms)}",service="x"'
    )
    for words in ("http to 192.0.2.1 is not encrypted", "ftp to 127.0.0.1", "a place that is none", "where to get it"):
        assert words in refused("publish", passing_package, address(registry.port), "--plain-http")


@pytest.mark.usefixtures("login")
def test_a_login_of_the_environment_is_for_one_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PublishError, match="QWEN_ONNX_REGISTRY_HOST does not say which registry"):
        registry_login("registry.example:5000")
    monkeypatch.setenv("QWEN_ONNX_REGISTRY_HOST", "registry.example:5000")
    found = registry_login("registry.example:5000")
    assert found
    assert (found[0], found[1].get_secret_value()) == (USER, PASSWORD)
    for other in ("registry.example", "registry.example:5001", "evil.example", "127.0.0.1:5000"):
        assert registry_login(other) is None


@pytest.mark.parametrize(
    ("home", "host", "allowed"),
    [
        ("https://8.8.8.8", "1.1.1.1", True),
        ("https://8.8.8.8", "127.0.0.1", False),
        ("https://8.8.8.8", "localhost", False),
        ("https://8.8.8.8", "[::1]", False),
        ("https://8.8.8.8", "[::ffff:127.0.0.1]", False),
        ("https://8.8.8.8", "2130706433", False),
        ("https://8.8.8.8", "0.0.0.0", False),
        ("https://8.8.8.8", "10.0.0.1", False),
        ("https://8.8.8.8", "169.254.169.254", False),
        ("https://10.0.0.5", "10.0.0.6", True),
        ("https://10.0.0.5", "127.0.0.1", False),
        ("https://10.0.0.5", "169.254.169.254", False),
        ("http://127.0.0.1:5000", "localhost", True),
        ("http://127.0.0.1:5000", "10.0.0.1", True),
    ],
)
def test_a_redirect_leads_no_nearer(home: str, host: str, allowed: bool) -> None:
    client = make_client(FAULTS, home)
    [guard] = client.event_hooks["request"]
    request = httpx.Request("GET", f"https://{host}/blob")
    if allowed:
        guard(request)
    else:
        with pytest.raises(PublishError, match="nearer than"):
            guard(request)


def test_a_pull_survives_dropped_connections(
    registry: Any, passing_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(passing_package, address(registry.port))
    registry.cut = 200_000
    monkeypatch.setattr("qwen_onnx.sources.transfer.time.sleep", lambda _: None)
    got = pull(address(registry.port), "--output", tmp_path / "got")
    assert files_of(tmp_path / "got") == files_of(passing_package)
    assert got["present"] == 0
    assert got["received"] == sum(path.stat().st_size for path in passing_package.iterdir()), "no byte came twice"


def test_a_manifest_that_drips_is_given_up(
    registry: Any, passing_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(passing_package, address(registry.port))
    monkeypatch.setattr("qwen_onnx.sources.web.DEADLINE", -1.0)
    assert "the manifest is not whole after" in refused("pull", address(registry.port), "--output", tmp_path / "got")


def test_addresses() -> None:
    assert parse_address("oci://ghcr.io/me/tiny:v1") == RegistryAddress("ghcr.io", "me/tiny", "v1")
    assert str(parse_address("oci://[::1]:5000/a/b:v1")) == "oci://[::1]:5000/a/b:v1"


@pytest.fixture(scope="module")
def real_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Docker's own registry, of Debian's package docker-registry, on loopback."""
    binary = shutil.which("docker-registry")
    if not binary:
        pytest.skip("docker-registry is not installed: apt-get install docker-registry")
    folder, port = tmp_path_factory.mktemp("registry"), free_port()
    config = {
        "version": 0.1,
        "log": {"level": "error"},
        "storage": {"filesystem": {"rootdirectory": str(folder / "data")}},
        "http": {"addr": f"127.0.0.1:{port}"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    command = [binary, "serve", str(folder / "config.json")]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            try:
                httpx.get(f"http://127.0.0.1:{port}/v2/")
                break
            except httpx.TransportError:
                assert server.poll() is None, "the registry ended early"
                time.sleep(0.1)
        yield port
    finally:
        server.terminate()
        server.wait(10)


@pytest.mark.slow
def test_a_real_registry(real_registry: int, passing_package: Path, newer_package: Path, tmp_path: Path) -> None:
    sent = publish(passing_package, address(real_registry))
    assert publish(passing_package, address(real_registry))["sent"] == 0
    again = publish(newer_package, address(real_registry))
    assert 0 < again["sent"] < SMALL_FILES
    assert again["digest"] != sent["digest"]
    pull(address(real_registry), "--output", tmp_path / "got", "--expect", again["digest"])
    assert files_of(tmp_path / "got") == files_of(newer_package)
    pinned = f"oci://127.0.0.1:{real_registry}/models/tiny@{sent['manifest']}"
    assert pull(pinned, "--output", tmp_path / "old")["digest"] == sent["digest"], "the old one is still there"


def test_a_real_registry_resumes_by_range(real_registry: int, passing_package: Path, tmp_path: Path) -> None:
    sent = publish(passing_package, address(real_registry))
    content = (passing_package / LARGEST).read_bytes()
    part = tmp_path / ".got.pull/parts" / digest_of(content).removeprefix("sha256:")
    part.parent.mkdir(parents=True)
    part.write_bytes(content[:100_000])
    got = pull(address(real_registry), "--output", tmp_path / "got", "--expect", sent["digest"])
    assert got["present"] == 100_000
    assert files_of(tmp_path / "got") == files_of(passing_package)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["fake", "real"])
def test_oras_pulls_what_was_pushed(
    which: str, request: pytest.FixtureRequest, passing_package: Path, tmp_path: Path
) -> None:
    """ORAS' own Python client; it reads names out of the layers' titles."""
    from oras.client import OrasClient

    port = request.getfixturevalue("registry").port if which == "fake" else request.getfixturevalue("real_registry")
    publish(passing_package, address(port))
    client = OrasClient(hostname=f"127.0.0.1:{port}", insecure=True)
    client.pull(target=f"127.0.0.1:{port}/models/tiny:v1", outdir=str(tmp_path / "oras"))
    assert files_of(tmp_path / "oras") == files_of(passing_package)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("skopeo"), reason="skopeo is not installed: apt-get install skopeo")
def test_skopeo_carries_a_layout_to_a_registry(real_registry: int, passing_package: Path, tmp_path: Path) -> None:
    sent = publish(passing_package, f"oci:{tmp_path}/layout:v1")
    target = f"docker://127.0.0.1:{real_registry}/models/carried:v1"
    command = ["skopeo", "copy", "--dest-tls-verify=false", f"oci:{tmp_path}/layout:v1", target]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
    source = f"oci://127.0.0.1:{real_registry}/models/carried:v1"
    pull(source, "--output", tmp_path / "got", "--expect", sent["digest"])
