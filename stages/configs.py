"""Configuration files, and what they stand on.

A configuration may begin with ``base``: a list of files, relative to its own, which it varies. They are read first,
each on what it stands on itself, and later ones win. One without ``base`` varies ``configs/stages/STAGE.yaml``; one
with an empty list stands alone. The command line, pipelines and batch jobs all read them here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from models.documents import MOST_BYTES, parse_yaml
from models.errors import UserError, shown
from models.files import ROOT, read_bytes, resolve

BASE = "base"


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty one.

    Raises:
        UserError: when it cannot be read, or holds something else.
    """
    content = parse_yaml(read_bytes(file, MOST_BYTES), str(file))
    if not isinstance(content, dict | None):
        raise UserError(f"{file}: expected a dict, got {shown(content)}")
    return content or {}


def read_config(stage: str, files: Iterable[str | Path]) -> dict[str, Any]:
    """What configuration files of a stage say together, later ones winning.

    ``configs/stages/STAGE.yaml`` lies under them, unless one of them names its ``base``.

    Raises:
        UserError: when one cannot be read, or stands on itself.
    """
    met: set[Path] = set()
    layers = [layer for file in files for layer in _layers(resolve(file), {}, met)]
    default = ROOT / "configs" / "stages" / f"{stage}.yaml"
    if default.exists() and not any(BASE in layer for layer in layers):
        layers = [*_layers(default, {}, met), *layers]
    config: dict[str, Any] = {}
    for layer in layers:
        merge(config, layer)
    config.pop(BASE, None)
    return config


def _layers(file: Path, above: Mapping[Path, str], met: set[Path]) -> list[dict[str, Any]]:
    """The contents of the files that ``file`` stands on, and its own; ``above`` are those that stand on it.

    One that two files stand on is read once, below both: met again, it would undo what the first says.
    """
    place = file.resolve()
    if place in above:
        raise UserError(f"{file} stands on itself: {' on '.join([*above.values(), str(file)])}")
    if place in met and above:
        return []
    met.add(place)
    content = read_yaml(file)
    names = content.get(BASE, [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{file}: {BASE} is {shown(names)}, it must be a list of files")
    layers: list[dict[str, Any]] = []
    for name in names:
        if not (file.parent / name).is_file():
            raise UserError(f"{file}: {BASE} names {name}, and there is no file {file.parent / name}")
        layers += _layers(file.parent / name, {**above, place: str(file)}, met)
    return [*layers, content]


def merge(target: dict[str, Any], source: Mapping[str, Any]) -> None:
    """Set in ``target`` what ``source`` says. Another class starts anew: it has no arguments of the one before it."""
    for key, value in source.items():
        if not isinstance(value, Mapping):
            target[key] = value
            continue
        before = target.get(key)
        if not isinstance(before, dict) or _other_class(before, value):
            target[key] = {}
        merge(target[key], value)


def _other_class(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    return "class_path" in after and after["class_path"] != before.get("class_path")
