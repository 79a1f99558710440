"""Where the tokens of pictures stand: as transformers counts them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qwen_onnx.errors import RequestError
from qwen_onnx.runtime.engines.media import Picture, keys_of, places_of, positions_of

IMAGE = 9


def picture(down: int, across: int, digest: str = "a1") -> Picture:
    """Of so many merged patches."""
    return Picture(np.zeros((4 * down * across, 8), np.float32), (1, 2 * down, 2 * across), 2, digest)


def prompt(*parts: int | Picture) -> list[int]:
    """So many tokens of text, or a picture."""
    return [token for part in parts for token in ([1] * part if isinstance(part, int) else [IMAGE] * part.tokens)]


def test_positions_of_a_picture_between_text() -> None:
    """Rows and columns count from where the text had come; text goes on behind the longer side."""
    wide = picture(2, 3)
    ids = prompt(2, wide, 2)
    positions, moved = positions_of(len(ids), [wide], places_of(ids, [wide], IMAGE))
    assert positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]
    assert moved == 7 - len(ids)


def film(down: int, across: int, *moments: int) -> list[Picture]:
    """Patches in time of one video."""
    return [replace(picture(down, across, f"{at:x}"), joined=bool(at), moment=m) for at, m in enumerate(moments)]


def test_positions_of_a_video_count_from_its_beginning() -> None:
    """Time by its moments; text goes on behind the longer side, although a moment is later."""
    shots = film(1, 2, 0, 1, 8)
    ids = prompt(2, *shots, 2)
    positions, moved = positions_of(len(ids), shots, places_of(ids, shots, IMAGE))
    assert positions.tolist() == [
        [0, 1, 2, 2, 3, 3, 10, 10, 4, 5],
        [0, 1, 2, 2, 2, 2, 2, 2, 4, 5],
        [0, 1, 2, 3, 2, 3, 2, 3, 4, 5],
    ]
    assert moved == 6 - len(ids)


def test_a_video_has_no_gap() -> None:
    shots = film(1, 2, 0, 1)
    with pytest.raises(RequestError, match="no room for picture 2 of 2"):
        places_of(prompt(1, shots[0], 1, shots[1]), shots, IMAGE)
    with pytest.raises(RequestError, match="no room for picture 1 of 1"):
        places_of(prompt(1, shots[1]), shots[1:], IMAGE)


def test_keys_tell_speeds_and_beginnings_apart() -> None:
    """The same frames elsewhere in time have other keys and values."""
    one = picture(1, 2)
    found = [
        keys_of(prompt(other), [other], [0])[0]
        for other in (one, replace(one, moment=1), replace(one, joined=True), replace(one, moment=1, joined=True))
    ]
    assert len(set(found)) == 4


def test_positions_of_text_are_its_places() -> None:
    positions, moved = positions_of(5, [], [])
    assert positions.tolist() == [[0, 1, 2, 3, 4]] * 3
    assert moved == 0


def test_keys_tell_pictures_apart_and_text_stays() -> None:
    one, other = picture(1, 2, "a1"), picture(1, 2, "b2")
    ids = prompt(1, one, 2, other)
    keys = keys_of(ids, [one, other], places_of(ids, [one, other], IMAGE))
    assert [key for key in keys if key >= 0] == [1, 1, 1]
    assert len(set(keys)) == 3
    again = keys_of(ids, [one, one], places_of(ids, [one, one], IMAGE))
    assert again[:5] == keys[:5]
    assert again[5:] != keys[5:]


@pytest.mark.parametrize(
    ("ids", "pictures", "message"),
    [
        ([1, IMAGE], [], "room for more than 0"),
        (prompt(picture(2, 2), picture(1, 1)), [picture(2, 2)], "room for more than 1"),
        (prompt(3), [picture(1, 1)], "no room for picture 1 of 1"),
        (prompt(1, picture(1, 2)), [picture(2, 2)], "no room for picture 1 of 1"),
        (prompt(picture(2, 2), 1), [picture(2, 2), picture(1, 1)], "no room for picture 2 of 2"),
    ],
)
def test_other_pictures_than_there_is_room_for_are_refused(
    ids: list[int], pictures: list[Picture], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        places_of(ids, pictures, IMAGE)


def test_a_model_that_reads_text_alone_takes_any_token_and_no_picture() -> None:
    assert places_of([1, IMAGE], [], None) == []
    with pytest.raises(RequestError, match="takes no pictures"):
        places_of([1], [picture(1, 1)], None)
