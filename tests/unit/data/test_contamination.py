"""Overlap by runs of words: what counts as seen, and what does not."""

from __future__ import annotations

import pytest

from llmcompress.data.contamination import RunIndex, words

TEXT = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
INDEX = RunIndex([TEXT, "another text that has nothing to do with it at all, or so it seems to me"])


@pytest.mark.parametrize(
    ("item", "found"),
    [
        (TEXT, 1),
        ("Zero, ONE two three four five - six seven eight nine ten eleven; twelve thirteen!", 1),
        ("one two three four five six seven eight nine ten eleven twelve and thirteen fourteen fifteen", 0),
        ("three four five six seven eight nine ten", 1),
        ("three four five six seven eight nine eleven", 0),
        ("fourteen fifteen another text that has nothing to do with it at", 0),
        ("", 0),
    ],
    ids=["all of it", "13 words, other case", "12 words and a break", "short and whole", "short and changed", "across texts", "nothing"],
)  # fmt: skip
def test_an_item_is_seen_when_13_words_or_all_of_a_short_one_are(item: str, found: int) -> None:
    assert INDEX.look_up([item]).num_contaminated == found


def test_seven_words_are_too_short_to_tell() -> None:
    seen = INDEX.look_up(["one two three four five six seven", TEXT])
    assert (seen.num_items, seen.num_too_short, seen.num_contaminated, seen.share) == (2, 1, 1, 1.0)
    assert seen.example == " ".join(TEXT.split()[:13])


def test_every_character_is_a_word_where_there_are_no_spaces() -> None:
    assert RunIndex(["天地玄黄宇宙洪荒日月盈昃辰宿列张"]).look_up(["玄黄宇宙洪荒日月"]).num_contaminated == 1
    assert words("日本 2026") == ["日", "本", "2026"]


def test_against_a_plain_search_on_random_words() -> None:
    import random

    draw = random.Random(0)
    text = [draw.choice("abc") for _ in range(4000)]
    items = [[draw.choice("abc") for _ in range(draw.randrange(8, 15))] for _ in range(300)]
    joined = " " + " ".join(text) + " "

    def plainly(item: list[str]) -> bool:
        n = min(13, len(item))
        return any(f" {' '.join(item[i : i + n])} " in joined for i in range(len(item) - n + 1))

    expected = sum(map(plainly, items))
    assert 0 < expected < 300
    assert RunIndex([" ".join(text)]).look_up([" ".join(item) for item in items]).num_contaminated == expected
