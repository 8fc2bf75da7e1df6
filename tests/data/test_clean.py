"""One form for every text, and the rules that drop some."""

from __future__ import annotations

import pytest

from fastlm.data import DataError
from fastlm.data.clean import Cleaning


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("a\r\nb\rc\u2028d\x0ce", "a\nb\nc\nd\ne"),
        ("a\0b\x1b[1m\x7f\x9fc\ufeff\ufffe", "ab[1mc"),
        ("tab\tstays\n\n  ", "tab\tstays\n\n  "),
        ("e\u0301 \ufb01", "\u00e9 \ufb01"),
        ("👩\u200d👧 \u00ad", "👩\u200d👧 \u00ad"),
    ],
)
def test_clean(before, after):
    assert Cleaning().clean(before) == after
    assert Cleaning().clean(after) == after


def test_forms_and_case():
    assert Cleaning(normalize="nfkc").clean("\ufb01 \uff21") == "fi A"
    assert Cleaning(normalize="none").clean("e\u0301") == "e\u0301"
    assert Cleaning(lowercase=True).clean("ÀB") == "àb"


@pytest.mark.parametrize(
    ("text", "options", "rule"),
    [
        (" \n", {}, "empty"),
        ("abc ", {"min_chars": 4}, "min_chars"),
        ("abc", {"min_chars": 3}, None),
        ("abcd", {"max_chars": 3}, "max_chars"),
        ("ab 12 34", {"min_letters": 0.34}, "min_letters"),
        ("äb 12 34", {"min_letters": 0.33}, None),
        ("___ 123", {"min_letters": 0.01}, "min_letters"),
        ("a\na\nb\n\n\n", {"max_repeated_lines": 0.3}, "max_repeated_lines"),
        ("a\na\nb\n\n\n", {"max_repeated_lines": 0.34}, None),
        ("see aGVsbG8gd29ybGQ= there", {"max_word": 15}, "max_word"),
        ("123 #!?", {}, None),
    ],
)
def test_objections(text, options, rule):
    objection = Cleaning(**options).objection(text)
    assert (objection and objection[0]) == rule


def test_what_was_measured_is_said():
    assert Cleaning(min_chars=9).objection("abc")[1] == "3 characters, fewer than 9"
    assert Cleaning(min_letters=0.9).objection("ab12")[1] == "letters 0.50, less than 0.9"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"normalize": "nfd"}, "normalize must be one of nfc, nfkc, none"),
        ({"min_letters": 2}, r"min_letters must be in \[0, 1\], got 2"),
        ({"min_chars": 5, "max_chars": 4}, "max_chars 4 is below min_chars 5"),
    ],
)
def test_wrong_options(options, match):
    with pytest.raises(DataError, match=match):
        Cleaning(**options)
