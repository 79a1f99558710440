"""Models by their address on a hub, faked at the HTTP level: what is asked, what is kept, what is refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen_onnx.build.estimate import estimate
from qwen_onnx.catalog.load import Catalog, load_catalog
from qwen_onnx.catalog.plan import Plan, make_plan
from qwen_onnx.catalog.reference import HubName
from qwen_onnx.errors import ChecksumError, QwenOnnxError, SourceError
from qwen_onnx.sources.facts import LARGEST_SMALL, of_hub
from qwen_onnx.sources.fetch import checkpoint_at_hand, expected_revisions, fetch
from qwen_onnx.sources.own import choose
from tests.fixtures.fake_hubs import FakeHuggingFace, FakeModelScope
from tests.fixtures.fake_server import running

FIRST, SECOND = f"{1:040x}", f"{2:040x}"
CARD = b"---\nlicense: mit\n---\n# Tiny\n"


class Hub(FakeHuggingFace):
    """With branches and tags, repositories that are gated, and the errors of the real hub."""

    tags: dict[str, str]
    gated: set[str]

    def answer(self, path: str, query: dict[str, str]) -> None:
        asked = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)", path)
        if asked and asked[1] not in self.repositories:
            self.send_json({"error": "Invalid username or password."}, 401, X_Error_Code="RepoNotFound")
        elif asked and asked[2] == "revision":
            revision = {"main": self._sha(asked[1]), **self.tags}.get(asked[3], asked[3])
            if re.fullmatch("[0-9a-f]{40}", revision):
                self.send_json({"id": asked[1], "sha": revision, "siblings": []})
            else:
                self.send_json({"error": "Invalid rev id"}, 404, X_Error_Code="RevisionNotFound")
        elif "/resolve/" in path and path.split("/resolve/", maxsplit=1)[0].strip("/") in self.gated:
            self.send_json({"error": "Access is restricted"}, 403, X_Error_Code="GatedRepo")
        else:
            super().answer(path, query)


@pytest.fixture
def hub(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    files = {path.name: path.read_bytes() for path in tiny_checkpoint.iterdir()} | {"README.md": CARD}
    # of the same sizes, so that only bytes tell the two states apart
    other = files | {"model.safetensors": files["model.safetensors"][:-4] + b"\0\0\0\0"}
    repositories = {"Org/Tiny": [files, other]}
    with running(Hub, repositories=repositories, stored={}, puts=[], private=set(), tags={}, gated=set()) as fake:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{fake.port}")
        yield fake


@pytest.fixture(scope="module")
def catalog(repository: Path) -> Catalog:
    return load_catalog(repository)


def plan_of(catalog: Catalog, text: str, cache: Path) -> Plan:
    found = choose(catalog, text, cache, lambda _: None)
    assert found.folder is None
    return make_plan(found.catalog, found.model, "cpu")


def refused(catalog: Catalog, text: str, cache: Path, words: str, kind: type[QwenOnnxError] = SourceError) -> str:
    with pytest.raises(kind, match=words) as caught:
        choose(catalog, text, cache, lambda _: None)
    return caught.value.hint or ""


def test_a_repository_is_pinned_to_the_commit_of_its_branch(hub: Any, catalog: Catalog, tmp_path: Path) -> None:
    plan = plan_of(catalog, "Org/Tiny", tmp_path)
    assert plan.model == "org--tiny"
    assert plan.title == f"Org/Tiny@{SECOND}"
    assert plan.asked == f"Org/Tiny@{SECOND}"
    assert plan.license == "MIT"
    assert plan.about
    assert plan.about.kind == "chat"
    assert [(source.kind, getattr(source, "revision", None)) for source in plan.sources] == [("huggingface", SECOND)]
    assert not any("safetensors" in path for _, path, _ in hub.log), "a plan needs no weights"


def test_two_revisions_are_two_models(hub: Any, catalog: Catalog, tmp_path: Path) -> None:
    hub.tags["v1.0"] = FIRST
    texts = [f"Org/Tiny@{FIRST}", f"Org/Tiny@{SECOND}", "Org/Tiny@v1.0", "Org/Tiny"]
    plans = [plan_of(catalog, text, tmp_path) for text in texts]
    assert len({plan.name for plan in plans}) == len({plan.digest for plan in plans}) == 4
    found = [fetch(plan, tmp_path, progress=lambda _: None) for plan in plans]
    assert found[0].files == found[2].files != found[1].files == found[3].files
    assert [each.revision for each in found] == [FIRST, SECOND, FIRST, SECOND]
    assert found[0].path != found[1].path
    assert [expected_revisions(plan, tmp_path, None) for plan in plans] == [[each.revision] for each in found]


def test_a_branch_that_moved_is_another_state_of_the_same_model(hub: Any, catalog: Catalog, tmp_path: Path) -> None:
    before = plan_of(catalog, "Org/Tiny", tmp_path)
    hub.repositories["Org/Tiny"].append(hub.repositories["Org/Tiny"][0])
    after = plan_of(catalog, "Org/Tiny", tmp_path)
    assert after.name == before.name
    assert expected_revisions(after, tmp_path, None) != expected_revisions(before, tmp_path, None)


def test_a_commit_is_asked_about_once(hub: Any, catalog: Catalog, tmp_path: Path) -> None:
    text = f"Org/Tiny@{FIRST}"
    plan = plan_of(catalog, text, tmp_path)
    count = len(hub.log)
    assert plan_of(catalog, text, tmp_path) == plan
    assert len(hub.log) == count
    hub.log.clear()


def test_a_repository_of_the_catalogue_is_not_asked_about(catalog: Catalog, tmp_path: Path) -> None:
    found = choose(catalog, "Qwen/Qwen3-0.6B", tmp_path, lambda _: None)
    assert (found.model, found.catalog) == ("qwen3-0.6b", catalog)
    assert make_plan(found.catalog, found.model, "cpu").catalogued


def test_what_a_hub_has_not(hub: Any, catalog: Catalog, tmp_path: Path) -> None:
    assert "check its spelling" in refused(catalog, "Org/Tyni", tmp_path, "Org/Tyni@main: no such repository")
    assert "a branch, a tag or a commit" in refused(catalog, "Org/Tiny@v9", tmp_path, "Org/Tiny has none of that name")
    hub.gated.add("Org/Tiny")
    hint = refused(catalog, "Org/Tiny", tmp_path, "the repository is gated")
    assert re.search(r"accept its terms at http.*/Org/Tiny, then: export HF_TOKEN=", hint)


@pytest.mark.parametrize(
    ("kept", "added", "words"),
    [
        ("README.md", {"model-Q4_K_M.gguf": b""}, "only GGUF files"),
        ("config.json", {"pytorch_model.bin": b""}, "only pickled weights"),
        (
            "README.md",
            {"adapter_config.json": b'{"base_model_name_or_path": "a/b"}', "a.safetensors": b""},
            "belongs to a/b",
        ),
        ("README.md", {}, "it holds no weights"),
    ],
)
def test_a_repository_without_a_model(
    hub: Any, catalog: Catalog, tmp_path: Path, kept: str, added: dict[str, bytes], words: str
) -> None:
    files = hub.repositories["Org/Tiny"][0]
    hub.repositories["Org/Other"] = [{kept: files[kept], **added}]
    assert refused(catalog, "Org/Other", tmp_path, words)


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("config.json", b"\xff", "config.json is not UTF-8"),
        ("config.json", b"[" * 1000, "nested deeper"),
        ("config.json", b" " * (LARGEST_SMALL + 1), "config.json is longer than"),
    ],
)
def test_a_small_file_is_bounded(
    hub: Any, catalog: Catalog, tmp_path: Path, name: str, data: bytes, words: str
) -> None:
    hub.repositories["Org/Tiny"][1] = hub.repositories["Org/Tiny"][1] | {name: data}
    refused(catalog, "Org/Tiny", tmp_path, words)


def test_a_small_file_is_what_was_announced(
    hub: Any, catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = hub.repositories["Org/Tiny"][1]
    changed = files["config.json"].replace(b"8192", b"4096")
    original = Hub.answer

    def lies(self: Hub, path: str, query: dict[str, str]) -> None:
        if path.endswith("/config.json"):
            self.send(200, changed)
        else:
            original(self, path, query)

    hub.answer = lies
    refused(catalog, "Org/Tiny", tmp_path, "config.json is not what the hub announced", ChecksumError)


def test_a_commit_that_is_none_is_not_believed(hub: Any, catalog: Catalog, tmp_path: Path) -> None:
    hub.answer = lambda self, path, query: self.send_json({"sha": "../../x"})
    refused(catalog, "Org/Tiny", tmp_path, "the hub's answer makes no sense: sha")


def test_what_was_kept_is_read_with_care(hub: Any, catalog: Catalog, tmp_path: Path) -> None:
    text = f"Org/Tiny@{FIRST}"
    plan_of(catalog, text, tmp_path)
    [kept] = (tmp_path / "facts").iterdir()
    kept.write_text(kept.read_text()[:-20])
    assert f"rm {kept}" in refused(catalog, text, tmp_path, "is not JSON")


@pytest.fixture
def modelscope(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    files = {path.name: path.read_bytes() for path in tiny_checkpoint.iterdir()}
    other = files | {"model.safetensors": files["model.safetensors"][:-4] + b"\0\0\0\0"}
    repositories = {"Org/Tiny": [files, other]}
    with running(FakeModelScope, repositories=repositories, stored={}, puts=[], private=set()) as fake:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", f"http://127.0.0.1:{fake.port}")
        yield fake


def test_modelscope_is_pinned_to_a_commit_as_hugging_face_is(modelscope: Any, catalog: Catalog, tmp_path: Path) -> None:
    plan = plan_of(catalog, "modelscope:Org/Tiny", tmp_path)
    assert (plan.model, plan.asked, plan.license) == ("org--tiny", f"modelscope:Org/Tiny@{SECOND}", "Apache-2.0")
    # the branch moves on; what was planned is what is fetched
    modelscope.repositories["Org/Tiny"].append({"config.json": b"{}"})
    found = fetch(plan, tmp_path, progress=lambda _: None)
    assert (found.origin, found.revision) == ("modelscope:Org/Tiny", SECOND)
    assert expected_revisions(plan, tmp_path, None) == [SECOND]
    asked = {revision for _, path, _ in modelscope.log for revision in re.findall(r"Revision=([^&]*)", path)}
    assert asked == {SECOND}, "neither the listing nor a file was asked for by a name that moves"
    refused(catalog, "modelscope:Org/Tiny", tmp_path, "it holds no weights")


def test_tags_and_branches_of_modelscope(modelscope: Any, catalog: Catalog, tmp_path: Path) -> None:
    modelscope.tags = {
        "refs/heads/dev": FIRST,
        # an annotated tag is an object of its own
        "refs/tags/v1.0": "f" * 40,
        "refs/tags/v1.0^{}": FIRST,
        "refs/tags/dev": SECOND,
    }
    plan = plan_of(catalog, "modelscope:Org/Tiny@v1.0", tmp_path)
    assert (plan.model, plan.asked) == ("org--tiny--v1.0", f"modelscope:Org/Tiny@{FIRST}")
    assert fetch(plan, tmp_path, progress=lambda _: None).revision == FIRST
    assert refused(catalog, "modelscope:Org/Tiny@dev", tmp_path, "'dev' is a branch and a tag")
    refused(catalog, "modelscope:Org/Tiny@v9", tmp_path, "no branch or tag 'v9'")
    assert "spelling" in refused(catalog, "modelscope:Org/Nothing", tmp_path, "Org/Nothing@master: no such repository")
    modelscope.log.clear()
    assert plan_of(catalog, f"modelscope:Org/Tiny@{FIRST}", tmp_path).sources == plan.sources
    assert modelscope.log == [], "what a hub said of a commit is kept"


def test_facts_without_a_hub(catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SourceError, match="cannot be reached"):
        of_hub(HubName("huggingface", "Org/Tiny", None), tmp_path, lambda _: None)


def test_an_estimate_needs_no_weights(hub: Any, catalog: Catalog, tmp_path: Path) -> None:
    plan = plan_of(catalog, "Org/Tiny", tmp_path)
    found = estimate(plan, checkpoint_at_hand(plan, tmp_path, None))
    assert found.exact
    assert found.download > found.artifact / 2 > 0
    assert not any("safetensors" in path for _, path, _ in hub.log)
