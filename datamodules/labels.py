"""Camera labels on disk: EG3D's ``dataset.json``, {"labels": [[name, [25 floats]], ...]}."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from models.camera import LABEL_SIZE, Camera
from models.errors import UserError, one_line

LABELS = "dataset.json"


def parse_json(content: bytes, file: str) -> Any:
    """The value that ``content`` spells.

    Raises:
        UserError: when it is not JSON; ``file`` names it.
    """
    try:
        return json.loads(content.decode("utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON: {one_line(error)}") from error


def camera_labels(content: Any, file: str) -> dict[str, Tensor]:
    """Labels (25,) by file name, from the parsed ``dataset.json`` that ``file`` names.

    Raises:
        UserError: naming the first entry that is not a camera, or is there twice.
    """
    pairs = content.get("labels") if isinstance(content, Mapping) else None
    if not isinstance(pairs, list) or not pairs:
        raise UserError(f'{file} must be {{"labels": [[name, [{LABEL_SIZE} numbers]], ...]}}')
    labels: dict[str, list[float]] = {}
    for pair in pairs:
        if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], list)):
            raise UserError(f"{file}: {str(pair)[:60]} is not a pair of a file name and a list of numbers")
        name, numbers = pair
        if name in labels:
            raise UserError(f"{file} names {name} twice")
        if len(numbers) != LABEL_SIZE:
            raise UserError(f"{file}: {name}: a camera label has {LABEL_SIZE} numbers, {len(numbers)} numbers given")
        labels[name] = numbers
    try:
        stacked = _cameras(list(labels.values()))
    except (ValueError, TypeError):
        for name, numbers in labels.items():  # some hundred times slower: only to say which one it is
            try:
                _cameras([numbers])
            except (ValueError, TypeError) as error:
                raise UserError(f"{file}: {name}: {one_line(error)}") from error
        raise
    return dict(zip(labels, stacked, strict=True))


def _cameras(labels: list[list[float]]) -> Tensor:
    """(N, 25), every one of them a camera.

    Raises:
        ValueError, TypeError: when one is not.
    """
    stacked = torch.tensor(labels, dtype=torch.float32)
    if not stacked.isfinite().all():
        raise ValueError("camera label: a number is not finite")
    camera = Camera.from_label(stacked)
    if (torch.linalg.det(camera.cam2world[:, :3, :3]) < 0).any():
        raise ValueError("camera label: not a rotation but a reflection (determinant -1)")
    if not (camera.intrinsics[:, [0, 1], [0, 1]] > 0).all():
        raise ValueError("camera label: a focal length is not positive")
    return stacked
