"""Camera labels on disk: EG3D's ``dataset.json``, {"labels": [[name, [25 floats]], ...]}."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from models.camera import LABEL_SIZE, Camera
from models.errors import UserError, one_line, shown
from models.names import is_member

LABELS = "dataset.json"
_LEAST_VIEW = math.radians(1)  # that a camera sees across: less, and its focal length is in other units
_ROUNDING = 1e-3


def spelled(name: str, there: Callable[[str], bool]) -> str | None:
    """A name of a list as the file is called that it means; None when it leads out of the list's folder.

    Windows writes backslashes between folders, and macOS may part letters from their accents.

    Args:
        there: tells whether there is a file of a name.
    """
    slashed = name.replace("\\", "/")
    if not is_member(slashed):
        return None
    spellings = (name, slashed, *(unicodedata.normalize(form, slashed) for form in ("NFC", "NFD")))
    return next(filter(there, spellings), slashed)


def camera_labels(content: Any, file: str, there: Callable[[str], bool]) -> dict[str, Tensor]:
    """Labels (25,) by file name, from the parsed ``dataset.json`` that ``file`` names.

    Args:
        there: tells whether there is a file of a name, see :func:`spelled`.

    Raises:
        UserError: naming the first entry that is there twice, leads out of the folder, or is not a camera near whose
            axis the world's origin lies.
    """
    pairs = content.get("labels") if isinstance(content, Mapping) else None
    if not isinstance(pairs, list) or not pairs:
        raise UserError(f'{file} must be {{"labels": [[name, [{LABEL_SIZE} numbers]], ...]}}')
    labels: dict[str, list[float]] = {}
    for pair in pairs:
        if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], list)):
            raise UserError(f"{file}: {shown(pair, 60)} is not a pair of a file name and a list of numbers")
        name, numbers = spelled(pair[0], there), pair[1]
        if name is None:
            raise UserError(f"{file} names {shown(pair[0])}, which is not a file in its folder")
        if name in labels:
            raise UserError(f"{file} names {name} twice")
        if len(numbers) != LABEL_SIZE:
            raise UserError(f"{file}: {name}: a camera label has {LABEL_SIZE} numbers, {len(numbers)} numbers given")
        if wrong := [number for number in numbers if isinstance(number, bool) or not isinstance(number, int | float)]:
            raise UserError(f"{file}: {name}: {shown(wrong[0])} is not a number of a camera")
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
    rotation, intrinsics = camera.cam2world[:, :3, :3], camera.intrinsics
    if (torch.linalg.det(rotation) < 0).any():
        raise ValueError("camera label: not a rotation but a reflection (determinant -1)")
    if (camera.cam2world[:, 3] - torch.tensor([0.0, 0.0, 0.0, 1.0])).abs().max() > _ROUNDING:
        raise ValueError("camera label: the last row of cam2world must be 0 0 0 1: is it written column by column?")
    focal, centre = intrinsics[:, [0, 1], [0, 1]], intrinsics[:, :2, 2]
    if not (focal > 0).all():
        raise ValueError("camera label: a focal length is not positive")
    if (focal > 0.5 / math.tan(_LEAST_VIEW / 2)).any() or (centre < 0).any() or (centre > 1).any():
        raise ValueError("camera label: intrinsics must be divided by the image size, these are in pixels")
    if (intrinsics[:, 2] - torch.tensor([0.0, 0.0, 1.0])).abs().max() > _ROUNDING:
        raise ValueError("camera label: the last row of the intrinsics must be 0 0 1")
    if not (camera.project(torch.zeros(len(stacked), 1, 3))[1] > 0).all():
        raise ValueError(
            "camera label: the camera looks away from the origin, where the face is: labels have OpenCV axes "
            "(x right, y down, z forward)"
        )
    return stacked
