"""YAML and JSON from outside."""

from __future__ import annotations

import pytest

from models.documents import MOST_DEPTH, parse_json, parse_yaml
from models.errors import UserError

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "x is not valid YAML: its aliases unfold to more than anybody would write"),
        ("a: &a [*a]", "x is not valid YAML: an alias in it holds itself"),
        ("a: &a {b: &b {c: *a}}", "x is not valid YAML: an alias in it holds itself"),
        ("[" * 100 + "]" * 100, "x is not valid YAML: it is nested too deep"),
        ("[" * 5000 + "]" * 5000, "x is not valid YAML: it is nested too deep"),
        ("a: " + "9" * 400, "x is not valid YAML: a number in it has 400 digits"),
        ("a: " + "9" * 10_000, "x is not valid YAML: a number in it has 10000 digits"),
        ("a: [unclosed", "x is not valid YAML: expected ',' or ']', but got '<stream end>', line 1"),
        ("a: 2020-13-45", "x is not valid YAML: month must be in 1..12"),
        ("? [a]\n: b\n", "x is not valid YAML: found unhashable key, line 1"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a: \x1b[31m", "x is not valid YAML: unacceptable character #x001b"),
        (b"\xff\xfe\xff", "x is not valid YAML:"),
        ("#" * (2 << 20), "x is larger than 1 MB, which no configuration is"),
    ],
)
def test_yaml_that_is_refused(text, message):
    with pytest.raises(UserError) as error:
        parse_yaml(text, "x")
    assert message in str(error.value) and len(str(error.value)) < 300 and "\n" not in str(error.value)


def test_yaml_that_is_read():
    assert parse_yaml("a: &a {b: 1}\nc: *a\nd: {<<: *a, e: [1, 2.5, x]}\n", "x") == {
        "a": {"b": 1},
        "c": {"b": 1},
        "d": {"b": 1, "e": [1, 2.5, "x"]},
    }
    assert parse_yaml("", "x") is None and parse_yaml(b"\xef\xbb\xbfa: 1", "x") == {"a": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "x is not valid JSON: it is nested too deep"),
        ("[" * (MOST_DEPTH + 1) + "]" * (MOST_DEPTH + 1), "x is not valid JSON: it is nested too deep"),
        ("9" * 400, "x is not valid JSON: a number in it has 400 digits"),
        ("9" * 10_000, "x is not valid JSON: a number in it has 10000 digits"),
        ("{", "x is not valid JSON: Expecting property name"),
        (b"\xff", "x is not valid JSON: 'utf-8' codec can't decode"),
    ],
)
def test_json_that_is_refused(text, message):
    with pytest.raises(UserError) as error:
        parse_json(text, "x")
    assert str(error.value).startswith(message)


def test_json_that_is_read():
    deep = "[" * MOST_DEPTH + "]" * MOST_DEPTH
    assert parse_json(deep, "x") and parse_json(b'\xef\xbb\xbf{"a": NaN}', "x")["a"] != 0
    with pytest.raises(UserError, match="NaN is not JSON"):
        parse_json("[NaN]", "x", constants=False)
    with pytest.raises(UserError, match="larger than"):
        parse_json("[" + " " * (1 << 20) + "]", "x", most=1 << 20)
