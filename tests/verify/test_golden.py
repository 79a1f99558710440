"""The golden file: what it keeps, how near it is, and what is refused of a stranger's."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_onnx.errors import ArtifactError
from qwen_onnx.verify.golden import GOLDEN, MOST_BYTES, TOP, About, Golden, Stretch, compare_coarse, kept
from qwen_onnx.verify.keeping import preferred
from qwen_onnx.verify.scoring import compare

VOCABULARY, TOKENS = 500, 70
RANDOM = np.random.default_rng(5)
IDS = RANDOM.integers(0, VOCABULARY, TOKENS).tolist()
LOGITS = (3 * RANDOM.standard_normal((TOKENS, VOCABULARY))).astype(np.float32)
NOISY = LOGITS + (0.3 * RANDOM.standard_normal(LOGITS.shape)).astype(np.float32)


def golden(**changes: Any) -> Golden:
    stretches = (Stretch(domain="prose", source="a", tokens=TOKENS), Stretch(domain="code", source="b", tokens=40))
    fields = {"model": "tiny", "weights": "0" * 64, "vocabulary": VOCABULARY, "stretches": stretches}
    return Golden(About(**{**fields, **changes}), (kept(LOGITS, IDS), kept(LOGITS[:40], IDS[:40])))


def test_it_comes_back_as_it_was_written(tmp_path: Path) -> None:
    made = golden()
    made.save(tmp_path)
    found = Golden.read(tmp_path / GOLDEN)
    assert found.about == made.about
    for one, other in zip(found.parts, made.parts, strict=True):
        for name in vars(one):
            assert np.array_equal(getattr(one, name), getattr(other, name)), name


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    one, other = golden().save(tmp_path), golden().save(tmp_path / "other")
    assert one.read_bytes() == other.read_bytes()


def test_the_teacher_itself_has_no_divergence() -> None:
    found = compare_coarse(kept(LOGITS, IDS), LOGITS)
    assert abs(found.kld).max() < 1e-6
    assert found.agree.all()
    assert np.allclose(found.nll_baseline, found.nll_candidate, atol=1e-5)


def test_the_coarse_divergence_is_a_near_lower_bound() -> None:
    full = compare(LOGITS, NOISY, IDS)
    coarse = compare_coarse(kept(LOGITS, IDS), NOISY)
    assert (coarse.kld <= full.kld + 1e-6).all()
    assert coarse.kld.mean() > 0.75 * full.kld.mean()
    assert np.array_equal(coarse.agree, full.agree)
    assert np.allclose(coarse.nll_candidate, full.nll_candidate)
    assert np.allclose(coarse.nll_baseline, full.nll_baseline, atol=1e-5)


def test_mass_and_order_are_those_of_the_softmax() -> None:
    found = kept(LOGITS, IDS)
    exact = np.exp(LOGITS[:-1].astype(np.float64))
    exact /= exact.sum(-1, keepdims=True)
    assert np.allclose(np.exp(found.top_logp).sum(-1) + np.exp(found.rest_logp), 1, atol=1e-5)
    assert np.array_equal(found.top_ids, np.argsort(-exact, axis=-1)[:, :TOP])


def test_a_certain_teacher_leaves_no_mass() -> None:
    certain = np.zeros((3, 10), np.float32)
    certain[:, 4] = 3000
    found = kept(certain, [4, 4, 4])
    assert np.isfinite(found.rest_logp).all()
    assert compare_coarse(found, certain).kld.max() == pytest.approx(0, abs=1e-6)


def test_a_vocabulary_smaller_than_the_top(tmp_path: Path) -> None:
    small = kept(LOGITS[:5, :8], [1, 2, 3, 4, 5])
    assert small.top_ids.shape == (4, 7)
    about = About(model="tiny", weights="0" * 64, vocabulary=8, stretches=(Stretch(domain="a", source="b", tokens=5),))
    Golden(about, (small,)).save(tmp_path)
    assert np.array_equal(Golden.read(tmp_path / GOLDEN).parts[0].top_ids, small.top_ids)


def rewritten(folder: Path, change: Callable[[dict[str, np.ndarray[Any, Any]]], None]) -> Path:
    """``folder`` with a golden file whose arrays were changed."""
    path = golden().save(folder)
    with np.load(path) as archive:
        arrays = {name: archive[name].copy() for name in archive.files}
    change(arrays)
    np.savez(path, **arrays)
    return folder


def _not_a_number(arrays: dict[str, Any]) -> None:
    arrays["top_logp"][0, 0] = np.nan


def _above_one(arrays: dict[str, Any]) -> None:
    arrays["next_logp"][0] = 2.0


def _unknown_token(arrays: dict[str, Any]) -> None:
    arrays["top_ids"][0, 0] = VOCABULARY


def _short(arrays: dict[str, Any]) -> None:
    arrays["rest_logp"] = arrays["rest_logp"][1:]


def _wide(arrays: dict[str, Any]) -> None:
    arrays["rest_logp"] = arrays["rest_logp"].astype(np.float64)


def _pickled(arrays: dict[str, Any]) -> None:
    arrays["ids"] = np.array([{"a": 1}], dtype=object)


def _more(arrays: dict[str, Any]) -> None:
    arrays["more"] = np.zeros(3)


def _no_json(arrays: dict[str, Any]) -> None:
    arrays["about"] = np.frombuffer(b"[1]", np.uint8)


def _no_stretch(arrays: dict[str, Any]) -> None:
    told = bytes(arrays["about"]).replace(b'"tokens":40', b'"tokens":1')
    arrays["about"] = np.frombuffer(told, np.uint8)


@pytest.mark.parametrize(
    "change",
    [_not_a_number, _above_one, _unknown_token, _short, _wide, _pickled, _more, _no_json, _no_stretch],
)
def test_what_is_not_one_of_ours_is_refused(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    with pytest.raises(ArtifactError, match=GOLDEN.replace(".", r"\.")):
        Golden.read(rewritten(tmp_path, change) / GOLDEN)


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / GOLDEN, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("about", "ids", "top_ids", "top_logp", "rest_logp", "next_logp"):
            archive.writestr(f"{name}.npy", b"\0" * (MOST_BYTES // 4))
    with pytest.raises(ArtifactError, match="unpacks to more"):
        Golden.read(tmp_path / GOLDEN)


def test_a_header_that_promises_more_than_there_is(tmp_path: Path) -> None:
    golden().save(tmp_path)
    with np.load(tmp_path / GOLDEN) as archive:
        arrays = {name: archive[name] for name in archive.files}
    with zipfile.ZipFile(tmp_path / GOLDEN, "w") as archive:
        for name, array in arrays.items():
            out = io.BytesIO()
            np.save(out, array)
            content = out.getvalue()
            if name == "top_logp":
                assert b"(108, 192)" in content
                content = content.replace(b"(108, 192)", b"(999, 192)")
            archive.writestr(f"{name}.npy", content)
    with pytest.raises(ArtifactError, match="damaged"):
        Golden.read(tmp_path / GOLDEN)


def test_none_at_all_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"golden\.npz is missing"):
        Golden.read(tmp_path / GOLDEN)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255))
def test_a_changed_byte_is_refused_or_changes_nothing_that_matters(
    tmp_path_factory: pytest.TempPathFactory, place: float, byte: int
) -> None:
    folder = tmp_path_factory.getbasetemp() / "golden-bytes"
    folder.mkdir(exist_ok=True)
    content = bytearray(golden().save(folder).read_bytes())
    content[int(place * len(content))] = byte
    (folder / GOLDEN).write_bytes(content)
    try:
        found = Golden.read(folder / GOLDEN)
    except ArtifactError:
        return
    assert all(np.isfinite(part.top_logp).all() for part in found.parts)


def test_a_token_that_stands_for_a_medium_is_in_no_continuation() -> None:
    """Where the teacher likes it most, its second choice counts."""
    first, second = LOGITS.argsort(-1)[:, :-3:-1].T
    never = int(first[7])
    wanted = np.where(first == never, second, first).tolist()
    assert preferred(LOGITS, never) == wanted
    assert wanted[7] != never
    assert preferred(LOGITS, None) == first.tolist()
