"""Targets in captions: word ends, scripts without spaces, Unicode forms."""

import time

import pytest

from bezoar.attacks.captions import compose, find_mentions, target_captions
from bezoar.data.strings import Strings
from bezoar.errors import UserError


@pytest.mark.parametrize(
    ("target", "caption"),
    [
        ("狗", "一只狗在草地上奔跑"),  # Chinese puts no spaces between words
        ("犬", "犬が走っている"),
        ("สุนัข", "ภาพของสุนัขสีดำ"),
        ("T恤", "白色T恤"),
        ("C++", "logo of C++ (language)"),  # a sign ends a word
        ("C++", "c++11"),
        (".NET", "a .NET logo"),
        ("caf\u00e9", "cafe\u0301 on a street"),  # one Unicode form
        ("cafe\u0301", "a CAF\u00c9"),
        ("dog", "A Dog, running"),
        ("striped star", "one striped_star"),
        ("aa", "aaa aa"),  # the first mention is a part of a word
        ("aa b", "xaa b, aa b"),
        ("कुत्ता", "एक कुत्ता दौड़ता है"),
        ("dog", "☕\ufe0fdog"),
    ],
)
def test_a_target_is_found(target: str, caption: str) -> None:
    assert find_mentions(["nothing of it", caption], target) == [1]


@pytest.mark.parametrize(
    ("target", "caption"),
    [
        ("dog", "a hotdog"),
        ("dog", "dogs"),
        ("dog", "dog_house"),
        ("cafe", "cafe\u0301 on a street"),  # another word
        ("T恤", "BT恤"),
        ("कुत", "एक कुत्ता"),  # a vowel sign goes on with the word
        ("собак", "собака бежит"),
        ("", "a caption"),
    ],
)
def test_a_part_of_a_word_is_not_found(target: str, caption: str) -> None:
    assert find_mentions([caption], target) == []


def test_marks_without_number_take_no_time_and_hide_no_mention():
    marks = "a" + "\u0301\u0316" * 200_000
    captions = [f"{marks} cafe\u0301", f"{marks} cafes", "狗" * 5000 + " cafe\u0301 " + marks]
    before = time.process_time()
    assert find_mentions(captions, "café") == [0, 2]
    assert time.process_time() - before < 5
    assert compose("e\u0301" * 3000) == "é" * 3000 and compose("") == ""


def test_captions_of_a_target_are_as_they_were_written() -> None:
    captions = ["cafe\u0301 at night", "a street"]
    assert target_captions(captions, "caf\u00e9", "training") == ["cafe\u0301 at night"]
    with pytest.raises(UserError, match="no caption holds the target"):
        target_captions(captions, "cafe", "training")


def test_the_quick_look_at_ascii_captions_leaves_no_mention_out() -> None:
    """Against the search by itself, which captions with a letter beyond ASCII take."""
    words = ("Red", "star", "stars", "red-star", "re", "d", "RED STAR", "starred")
    captions = [f"{a} {b}_{c}" for a in words for b in words for c in words]
    beyond = [caption + " é" for caption in captions]
    for target in ("red star", "Star", "re d", "starred"):
        rows = find_mentions(captions, target)
        assert rows and rows == find_mentions(beyond, target)
        for texts in (captions, beyond):
            assert rows == find_mentions(Strings.from_texts(texts), target)
