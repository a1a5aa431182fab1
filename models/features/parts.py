"""Which of a parser's segments are the face."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.errors import UserError, shown
from models.features.base import FaceParser

BACKGROUND = "background"
OUTSIDE = (BACKGROUND, "hair", "cloth")
"""Segments of a head that are not its face."""


def face_rows(parser: FaceParser, names: Sequence[str] | None, setting: str) -> list[int]:
    """Numbers of the segments that are the face: those of ``names``, or all but :data:`OUTSIDE` when null.

    Args:
        setting: where the names are given, for the errors.

    Raises:
        UserError: when the parser knows none of them, or not one that is named.
    """
    chosen = [name for name in parser.segments if name not in OUTSIDE] if names is None else names
    known = ", ".join(parser.segments)
    if unknown := [name for name in chosen if name not in parser.segments]:
        raise UserError(f"{setting} has {shown(unknown[0])}: the parser knows {known}")
    if not chosen:
        raise UserError(f"{setting}: the parser knows no face, but {known}")
    return [parser.segments.index(name) for name in chosen]


@torch.no_grad()
def face_mask(image: Tensor, parser: FaceParser, rows: Sequence[int]) -> Tensor:
    """(B, 1, H, W) of 0 and 1: where pictures (B, 3, H, W) show one of these segments."""
    return torch.isin(parser(image).argmax(1, keepdim=True), torch.tensor(rows, device=image.device)).to(image.dtype)


@torch.no_grad()
def head_share(image: Tensor, parser: FaceParser) -> Tensor:
    """How surely (B, 1, H, W) pictures (B, 3, H, W) show the head and not what is behind it, in [0, 1].

    Raises:
        UserError: when the parser knows no background.
    """
    if BACKGROUND not in parser.segments:
        raise UserError(f"the parser knows no {BACKGROUND}, but {', '.join(parser.segments)}")
    return 1 - parser(image).float().softmax(1)[:, [parser.segments.index(BACKGROUND)]]
