"""Errors meant for the user, and foreign text in them."""


class UserError(Exception):
    """Something the user can put right: shown as one sentence without a traceback, exit code 2."""


def one_line(error: object) -> str:
    """``str(error)`` with every run of white space, line breaks included, turned into one space.

    What a terminal would obey instead of show (escape sequences, overrides of the writing direction) is spelled out:
    messages quote names and values of files. Of an error that a loader's worker process reports with its traceback,
    only what was wrong.
    """
    text = str(error)
    if text.startswith("Caught UserError in DataLoader worker"):
        text = text.rpartition(f"{UserError.__name__}: ")[2]
    return printable(" ".join(text.split()))


def printable(text: str) -> str:
    r"""``text`` on one line, with every character that is no letter, mark or space spelled out: ``\x1b``, ``\u202e``.

    >>> printable("red\x1b[31m")
    'red\\x1b[31m'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def shown(value: object, most: int = 80) -> str:
    """``repr(value)`` for a message: printable, and cut where it is longer than ``most`` characters.

    Of a container only as much is spelled as is shown: one from a file may be huge, or hold itself.

    >>> shown({"a": [1, 2]})
    "{'a': [1, 2]}"
    >>> shown("x" * 100, most=10)
    "'xxxxxx..."
    """
    text = printable(_spelled(value, most))
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _spelled(value: object, room: int) -> str:
    if isinstance(value, str | bytes | bytearray):
        return repr(value[: room + 1])
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 4 * room:
        return f"a number of {round(value.bit_length() * 0.30103)} digits"
    if not isinstance(value, dict | list | tuple | set | frozenset):
        return repr(value)
    opening, closing = {dict: "{}", list: "[]", tuple: "()"}.get(type(value), ("{", "}"))
    text, pairs = opening, value.items() if isinstance(value, dict) else ((None, item) for item in value)
    for number, (key, item) in enumerate(pairs):
        if len(text) > room:
            break
        text += ", " if number else ""
        text += f"{_spelled(key, room - len(text))}: " if isinstance(value, dict) else ""
        text += _spelled(item, room - len(text))
    return text + closing
