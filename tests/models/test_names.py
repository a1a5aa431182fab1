"""Ids, names of files and what messages show of foreign text."""

from __future__ import annotations

import unicodedata

import pytest

from models.errors import one_line, shown
from models.names import MOST_ID_BYTES, is_id, is_member, is_plain, item_id


@pytest.mark.parametrize("name", ["ann", "00012", "蒙娜丽莎", "Ольга", "été", "हिन्दी", "a.b-c_d", "reference_ann.png"])
def test_plain_names(name):
    assert is_plain(name) and item_id(f"{name}.png") == name


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", ".hidden", "-x", "_x", "a/b", "a\\b", "/etc", "C:x", "a b"),
        *("a\0b", "a\nb", "a\x1b[1m", "a\u202eb", "e\u0301te", "\u0301a", "\ud800", "x" * 201, None, 3, ["a"]),
    ],
)
def test_names_that_are_not_plain(name):
    assert not is_plain(name)


def test_ids():
    long = "someone_by_candlelight_" * 10
    names = [
        "a b",
        "a_b",
        "a(b",
        "(1)",
        "(2)",
        "../a",
        ".a",
        "",
        "...",
        long,
        f"{long}x",
        "戴珍珠 1",
        "戴珍珠_1",
        "a/b",
    ]
    ids = [item_id(f"{name}.png") for name in names]
    assert len(set(ids)) == len(names)
    assert all(is_id(i) and len(i.encode()) <= MOST_ID_BYTES for i in ids)
    assert [item_id(f"{name}.png") for name in names] == ids
    assert item_id("ann.b.png") == "ann.b"
    assert item_id("été.png") == item_id(unicodedata.normalize("NFD", "été") + ".png") == "été"
    assert is_id(item_id("\udcff.png"))  # bytes of a file system that are no UTF-8
    assert is_id(item_id("म" * 200 + ".png")) and is_id(item_id("e\u0316\u0301" * 90 + ".png"))


@pytest.mark.parametrize("name", ["a.png", "b/a.png", "深/a b.png", "a..png", "3.00\u202fPM.png", "👩\u200d🎨.png"])
def test_members(name):
    assert is_member(name)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../a", "a/../../b", "/a", "C:\\a", "C:a", "a\nb", "a\0", None, 1, "a\x1b"]
)
def test_members_that_lead_elsewhere(name):
    assert not is_member(name)


def test_foreign_text_in_messages():
    assert one_line("a\x1b[31m\r\n b\u202ec\x07") == r"a\x1b[31m b\u202ec\x07"
    assert one_line("Ольга 蒙娜丽莎 é") == "Ольга 蒙娜丽莎 é"
    itself: list = []
    itself.append(itself)
    for value in ("x" * 10**6, ["x"] * 10**6, {"k": "v" * 10**6}, 10**5000, itself, {1: {2: itself}}):
        assert len(shown(value)) <= 80
    assert shown([1, "a", None]) == "[1, 'a', None]" and shown((1,)) == "(1)" and shown({"a": {}}) == "{'a': {}}"
    assert shown("\x1b") == r"'\x1b'"
