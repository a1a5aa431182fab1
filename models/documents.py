"""YAML and JSON from outside: bounded in size, depth and what aliases unfold to, with errors in one sentence.

Every configuration, pipeline, cluster file, list and manifest is read here. A few hundred bytes of YAML can spell a
value that fills the memory, or one that holds itself; deep nesting overflows the stack of whoever walks it.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NoReturn

from models.errors import UserError, one_line

if TYPE_CHECKING:
    import yaml

MOST_BYTES = 1 << 20  # of YAML, which people write: a configuration takes some thousand
MOST_JSON_BYTES = 1 << 28  # of JSON, which programs write: the labels of FFHQ take some ten million
MOST_DEPTH = 64
MOST_VALUES = 100_000  # of YAML, aliases unfolded
_MOST_DIGITS = 30


def parse_yaml(content: bytes | str, name: str) -> Any:
    """The value that YAML spells; ``name`` is what errors call it.

    Raises:
        UserError: when it is not YAML, or larger, deeper or more repetitive than anything that people write.
    """
    import yaml  # here: what only reads JSON starts without it

    _check_size(content, name)
    try:
        parser = yaml.SafeLoader(content.decode("utf-8-sig") if isinstance(content, bytes) else content)
        try:
            node = parser.get_single_node()
            _measure(node, {})
            return None if node is None else parser.construct_document(node)  # type: ignore[no-untyped-call]
        finally:
            parser.dispose()
    except yaml.MarkedYAMLError as error:
        where = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise UserError(f"{name} is not valid YAML: {one_line(error.problem or error)}{where}") from error
    # Dates that are none, numbers of thousands of digits, keys that cannot be keys, other encodings.
    except (yaml.YAMLError, ValueError, TypeError, ArithmeticError) as error:
        raise UserError(f"{name} is not valid YAML: {one_line(error)}") from error
    except RecursionError:
        raise UserError(f"{name} is not valid YAML: it is nested too deep") from None


def check_yaml(content: str, name: str) -> None:
    """Refuse YAML that :func:`parse_yaml` would find too large; for readers with rules of their own for plain words.

    Raises:
        UserError: when it is larger, deeper or more repetitive than anything that people write.
        yaml.YAMLError: when it is not YAML.
    """
    import yaml

    _check_size(content, name)
    try:
        _measure(yaml.compose(content, yaml.SafeLoader), {})
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else one_line(error)
        raise UserError(f"{name} is not valid YAML: {reason}") from None


def _check_size(content: bytes | str, name: str) -> None:
    if len(content) > MOST_BYTES:
        raise UserError(f"{name} is larger than {MOST_BYTES >> 20} MB, which no configuration is")


def _measure(node: yaml.Node | None, sizes: dict[int, int | None], depth: int = 0) -> int:
    """How many values a node unfolds to; ``sizes`` are those of nodes met before, ``None`` of those around it.

    Raises:
        ValueError: when that is too much, or without end.
    """
    if node is None:
        return 0
    if depth > MOST_DEPTH:
        raise ValueError("it is nested too deep")
    if id(node) in sizes:
        known = sizes[id(node)]
        if known is None:
            raise ValueError("an alias in it holds itself")
        return known
    sizes[id(node)] = None
    total = 1
    kind = getattr(node, "id", "scalar")  # which is that of its class
    if kind == "sequence":
        total += sum(_measure(child, sizes, depth + 1) for child in node.value)
    elif kind == "mapping":
        total += sum(_measure(part, sizes, depth + 1) for pair in node.value for part in pair)
    elif len(str(node.value)) > _MOST_DIGITS and node.tag.endswith((":int", ":float")):
        raise ValueError(f"a number in it has {len(node.value)} digits")
    if total > MOST_VALUES:
        raise ValueError("its aliases unfold to more than anybody would write")
    sizes[id(node)] = total
    return total


def parse_json(
    content: bytes | str,
    name: str,
    most: int = MOST_JSON_BYTES,
    constants: bool = True,
    deepest: int = MOST_DEPTH,
) -> Any:
    """The value that JSON spells, with or without a byte order mark; ``name`` is what errors call it.

    Args:
        most: bytes that are read.
        constants: whether NaN and Infinity, which are not JSON but which Python writes, are read.
        deepest: levels of objects and lists that are read.

    Raises:
        UserError: when it is not JSON, too large, or nested too deep.
    """
    if len(content) > most:
        raise UserError(f"{name} is larger than {most >> 20} MB")
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        if constants:
            value = json.loads(text, parse_int=_integer)
        else:
            value = json.loads(text, parse_int=_integer, parse_constant=_refuse_constant)
        _check_depth(value, deepest)
        return value
    except RecursionError:
        raise UserError(f"{name} is not valid JSON: it is nested too deep") from None
    except ValueError as error:
        raise UserError(f"{name} is not valid JSON: {one_line(error)}") from error


def _integer(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"a number in it has {len(text)} digits")
    return int(text)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _check_depth(value: Any, deepest: int) -> None:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(deepest):
        children = (child for outer in level for child in (outer.values() if isinstance(outer, dict) else outer))
        level = [child for child in children if isinstance(child, dict | list)]
        if not level:
            return
    raise ValueError("it is nested too deep")
