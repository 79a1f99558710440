"""What users may call a model, and the one safe name that its artifacts get."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qwen_onnx.catalog.load import Catalog, load_catalog
from qwen_onnx.catalog.reference import HubName, folder_name, id_of, parse, row_of
from qwen_onnx.catalog.sources import HubSource
from qwen_onnx.errors import ConfigError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def catalog(repository: Path) -> Catalog:
    return load_catalog(repository)


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("qwen3-0.6b", "qwen3-0.6b"),
        ("Qwen/Qwen3-4B", HubName("huggingface", "Qwen/Qwen3-4B", None)),
        ("hf:Qwen/Qwen3-4B@main", HubName("huggingface", "Qwen/Qwen3-4B", "main")),
        ("org/name@refs/pr/1", HubName("huggingface", "org/name", "refs/pr/1")),
        (f"modelscope:Qwen/Qwen3-4B@{COMMIT}", HubName("modelscope", "Qwen/Qwen3-4B", COMMIT)),
        ("./my-finetune", Path("my-finetune")),
        ("../other/folder", Path("../other/folder")),
        ("/data/model", Path("/data/model")),
        (".", Path()),
    ],
)
def test_what_a_text_means(text: str, meaning: object) -> None:
    assert parse(text) == meaning


@pytest.mark.parametrize(
    "text",
    ["a/b/c", "org/", "org/name@", "gitlab:org/name", "org/.hidden", "org/na me", "a@b", "org/name@../x", "x/" * 99],
)
def test_what_names_no_model(text: str) -> None:
    with pytest.raises(ConfigError, match="names no model") as caught:
        parse(text)
    assert "ORG/NAME" in (caught.value.hint or "")


def test_a_folder_of_the_form_of_a_repository_is_asked_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org/name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="is a folder here") as caught:
        parse("org/name")
    assert caught.value.hint == "./org/name for the folder, huggingface:org/name for the hub"
    assert parse("./org/name") == Path("org/name")
    assert parse("hf:org/name") == HubName("huggingface", "org/name", None)


def test_a_repository_of_the_catalogue_is_its_row(catalog: Catalog) -> None:
    source = catalog.row("qwen3-0.6b")[1].sources[0]
    assert isinstance(source, HubSource)
    for text in ("Qwen/Qwen3-0.6B", "qwen/qwen3-0.6b", f"Qwen/Qwen3-0.6B@{source.revision}", "ms:Qwen/Qwen3-0.6B"):
        asked = parse(text)
        assert isinstance(asked, HubName)
        row = row_of(catalog, asked)
        assert row is not None, text
        assert row.id == id_of(catalog, asked) == "qwen3-0.6b"
    other = HubName("huggingface", "Qwen/Qwen3-0.6B", COMMIT)
    assert row_of(catalog, other) is None, "another state of it is another model"
    assert id_of(catalog, other) == f"qwen--qwen3-0.6b--{COMMIT}"


def test_names_are_safe_and_tell_models_apart(catalog: Catalog, tmp_path: Path) -> None:
    texts = [
        "a/b",
        "a/b@main",
        f"a/b@{COMMIT}",
        "c/b",
        "./b",
        "a/b@refs/pr/1",
        "./Ünï cödé",
        f"a/{'n' * 90}@{'r' * 199}",
    ]
    names = [id_of(catalog, parse(text)) for text in texts]
    assert len(set(names)) == len(texts)
    for name in names:
        assert re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,119}", name), name
        assert name not in catalog.rows
    assert id_of(catalog, tmp_path / "My-Finetune") == "my-finetune"
    assert id_of(catalog, tmp_path / "Qwen3-0.6B") == "local--qwen3-0.6b", "not the catalogue's model"
    with pytest.raises(ConfigError, match="cannot be named"):
        id_of(catalog, tmp_path / "___")


def test_the_cache_of_hugging_face_has_the_name_of_its_repository(tmp_path: Path) -> None:
    folder = tmp_path / f"models--org--tiny/snapshots/{COMMIT}"
    folder.mkdir(parents=True)
    assert folder_name(folder) == "org--tiny"
