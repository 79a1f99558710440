"""Folders: what is refused, what is taken up again, what is replaced; and that a package serves."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest

from tests.conftest import run_cli
from tests.publish.conftest import LARGEST, files_of, leftovers, publish, pull, refused, rewrite


@pytest.mark.slow
def test_a_folder_is_a_copy_that_pulls_and_serves(passing_package: Path, tmp_path: Path) -> None:
    shelf = tmp_path / "shelf/tiny"
    sent = publish(passing_package, shelf)
    assert files_of(shelf) == files_of(passing_package)
    assert sent["sent"] == sum(map(len, files_of(shelf).values()))
    assert sent["present"] == 0
    got = pull(f"folder:{shelf}", "--output", tmp_path / "got", "--expect", sent["digest"])
    assert got["digest"] == sent["digest"]
    assert not leftovers(tmp_path)
    done = run_cli("generate", tmp_path / "got", "Hello", "--max-tokens", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Hello")


@pytest.mark.slow
def test_the_default_place_is_the_package_s_own_name(passing_package: Path, checkout: Path) -> None:
    done = run_cli("pull", passing_package, cwd=checkout)
    assert done.returncode == 0, done.stderr
    target = checkout / "artifacts/packages" / passing_package.name
    assert done.stdout.splitlines()[0] == str(target)
    assert files_of(target) == files_of(passing_package)


def test_an_altered_package_neither_leaves_nor_serves(package: Path, tmp_path: Path) -> None:
    (package / "tokenizer.json").write_text("{}")
    assert "tokenizer.json was altered" in refused("publish", package, tmp_path / "out", code=10)
    assert "tokenizer.json was altered" in refused("generate", package, "Hi", code=6)
    assert not (tmp_path / "out").exists()


def test_a_file_that_was_added_keeps_a_package_from_serving(package: Path) -> None:
    (package / "extra.txt").write_text("x")
    assert "extra.txt was added" in refused("generate", package, "Hi", code=6)


@pytest.mark.parametrize("destination", ["{0}/out", "oci:{0}/out:v1", "oci://127.0.0.1:9/a:v1", "hf://a/b", "ms://a/b"])
@pytest.mark.parametrize("records", [{"verdict": "FAIL"}, {"verdict": "UNVERIFIED"}, {"unverified": True}])
def test_only_pass_leaves(package: Path, tmp_path: Path, destination: str, records: dict[str, object]) -> None:
    said = refused("publish", rewrite(package, **records), destination.format(tmp_path))
    assert "only PASS is published" in said
    assert not (tmp_path / "out").exists()


def test_only_pass_comes_in(package: Path, tmp_path: Path) -> None:
    said = refused("pull", rewrite(package, verdict="INCONCLUSIVE"), "--output", tmp_path / "got")
    assert "INCONCLUSIVE" in said
    assert not (tmp_path / "got").exists()


def test_another_digest_than_expected_is_refused(passing_package: Path, tmp_path: Path) -> None:
    said = refused("pull", passing_package, "--output", tmp_path / "got", "--expect", "0" * 64)
    assert "not the expected 0000" in said
    assert "not a SHA-256" in refused("pull", passing_package, "--expect", "latest")


def test_an_id_that_leads_elsewhere_is_refused(package: Path, checkout: Path, tmp_path: Path) -> None:
    rewrite(package, id="../../escaped:1")
    done = run_cli("pull", package, cwd=checkout)
    assert done.returncode == 11, done.stderr
    assert "is not the id of a package" in done.stderr
    assert not list(tmp_path.rglob("escaped*"))


def test_links_and_foreign_folders_are_refused(package: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    for verb in ("publish", "pull"):
        arguments = (package, tmp_path / "mine") if verb == "publish" else (package, "--output", tmp_path / "mine")
        assert "it would be lost" in refused(verb, *arguments)
    assert (tmp_path / "mine/thesis.txt").read_text() == "years of work"
    (package / "model.onnx").unlink()
    (package / "model.onnx").symlink_to("/etc/hostname")
    assert "not a plain file" in refused("pull", package, "--output", tmp_path / "got")


@pytest.mark.slow
def test_a_new_version_replaces_the_old_one_whole(passing_package: Path, newer_package: Path, tmp_path: Path) -> None:
    for package in (passing_package, newer_package, passing_package):
        sent = publish(package, tmp_path / "out")
        assert files_of(tmp_path / "out") == files_of(package)
        assert sent["sent"] > 0
    assert publish(passing_package, tmp_path / "out")["sent"] == 0


def test_an_interrupted_copy_goes_on(passing_package: Path, tmp_path: Path) -> None:
    """What a killed run leaves: whole files under their names, and the beginning of one under its digest."""
    target, staged = tmp_path / "out", tmp_path / ".out.pull"
    publish(passing_package, tmp_path / "done")
    (staged / "files").mkdir(parents=True)
    shutil.copy(passing_package / LARGEST, staged / "files" / LARGEST)
    (staged / "files/tokenizer.json").write_text("damaged on the way")
    (staged / "files/of-an-older-version").write_text("x")
    sent = publish(passing_package, target)
    size = (passing_package / LARGEST).stat().st_size
    assert sent["present"] == size
    assert files_of(target) == files_of(passing_package)
    assert not leftovers(tmp_path)


def test_what_others_planted_is_not_written_through(passing_package: Path, tmp_path: Path) -> None:
    """In a folder that many can write into, the hidden folder of a pull may be there before it."""
    victim, staged = tmp_path / "victim", tmp_path / ".got.pull"
    victim.write_text("years of work")
    (staged / "parts").mkdir(parents=True)
    digest = hashlib.sha256((passing_package / LARGEST).read_bytes()).hexdigest()
    (staged / "parts" / digest).symlink_to(victim)
    assert "is not ours alone" in refused("pull", passing_package, "--output", tmp_path / "got")
    assert victim.read_text() == "years of work"
    assert not victim.is_symlink()
    shutil.rmtree(staged)
    staged.mkdir()
    staged.chmod(0o777)
    assert "is not ours alone" in refused("pull", passing_package, "--output", tmp_path / "got")


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("s3://bucket/x", ["is not an address"]),
        ("oci:somewhere", ["is not an address"]),
        ("oci://host/UPPER:v1", ["is not an address"]),
        ("hf://only-a-name", ["is not an address"]),
        ("oci://me:hunter2@host/a:v1", ["carries no user and no password"]),
    ],
)
def test_addresses_that_are_none(package: Path, address: str, words: list[str]) -> None:
    said = refused("publish", package, address)
    assert all(word in said for word in words)
    assert "hunter2" not in said


def test_a_package_that_is_none(tmp_path: Path) -> None:
    assert "there is no package" in refused("publish", tmp_path / "none", tmp_path / "out", code=10)
    assert "there is no package" in refused("pull", tmp_path / "none", "--output", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    assert "not a package of qwen-onnx" in refused("pull", tmp_path / "empty", "--output", tmp_path / "out")
    assert os.listdir(tmp_path / "empty") == []
