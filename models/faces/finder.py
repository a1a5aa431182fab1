"""Finding faces: boxes, six points and scores by MediaPipe's BlazeFace networks, and what is kept of them.

Bazarevsky et al., "BlazeFace: sub-millisecond neural face detection on mobile GPUs", 2019.

Shape suffixes: B batch, N anchors.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.configurable import Configurable
from models.faces.layers import BlazeBlock, Convolution, Separable

VALUES = 17
"""Of a find: a box (left, top, right, bottom), six points (x, y), a score."""


class Finder(Configurable):
    """What the finders share: anchors in the middle of each cell of a grid, and the reading of the outputs.

    Attributes:
        size: side of the input, pixels.
        anchors: (N, 2) x and y, in units of the side.
    """

    size: int
    anchors: Tensor

    def _set_anchors(self, size: int, grids: tuple[tuple[int, int], ...]) -> None:
        """``grids``: for each grid, how many cells a side has, and how many anchors a cell."""
        self.size = size
        found = []
        for cells, each in grids:
            middle = (torch.arange(cells) + 0.5) / cells
            y, x = torch.meshgrid(middle, middle, indexing="ij")
            found.append(torch.stack([x, y], -1).reshape(-1, 2).repeat_interleave(each, 0))
        self.register_buffer("anchors", torch.cat(found), persistent=False)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, size, size) in [-1, 1] -> (B, N, 16) box and points about the anchors, pixels; (B, N) logits."""
        raise NotImplementedError

    def find(self, image: Tensor, least: float = 0.5) -> list[Tensor]:
        """Faces, several times each.

        Args:
            image: (B, 3, size, size) in [-1, 1].
            least: score that a find needs.

        Returns:
            For each picture (n, 17) as :data:`VALUES`, in units of the picture's side, from 0 to 1.
        """
        values, logits = self(image)
        scores = logits.clamp(-100, 100).sigmoid()
        values = values / self.size
        centre, half = values[..., :2] + self.anchors, values[..., 2:4] / 2
        points = (values[..., 4:].unflatten(-1, (6, 2)) + self.anchors[:, None]).flatten(-2)
        finds = torch.cat([centre - half, centre + half, points, scores[..., None]], -1)
        return [found[score > least] for found, score in zip(finds, scores, strict=True)]


class BlazeFace(Finder):
    """The finders with two grids of anchors.

    Args:
        kind: "short" for faces up to two metres from a phone (128 px), "back" for those that its back camera sees
            (256 px).
    """

    def __init__(self, kind: Literal["short", "back"] = "short") -> None:
        super().__init__()
        if kind not in ("short", "back"):
            raise ValueError(f"kind is short or back, not {kind!r}")
        self._set_anchors(128 if kind == "short" else 256, ((16, 2), (8, 6)))
        self.stem = Convolution(3, 24, 5, 2)
        if kind == "short":
            widths = (24, 24, 28, 32, 36, 42, 48, 56, 64, 72, 80, 88)
            halved = (2, 5)
            coarse = [BlazeBlock(88, 96, 2), *(BlazeBlock(96, 96) for _ in range(4))]
        else:
            widths = (24,) * 16 + (48,) * 8 + (96,) * 8
            halved = (7, 15, 23)
            coarse = [Separable(96, 96, 2), nn.ReLU()]
        self.fine = nn.Sequential(
            *(BlazeBlock(a, b, 2 if number in halved else 1) for number, (a, b) in enumerate(pairwise(widths)))
        )
        self.coarse = nn.Sequential(*coarse)
        self.score_heads = nn.ModuleList([Convolution(widths[-1], 2), Convolution(96, 6)])
        self.value_heads = nn.ModuleList([Convolution(widths[-1], 2 * 16), Convolution(96, 6 * 16)])

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        fine = self.fine(F.relu(self.stem(image)))
        maps = (fine, self.coarse(fine))
        logits = [_rows(head(x), 1) for head, x in zip(self.score_heads, maps, strict=True)]
        values = [_rows(head(x), 16) for head, x in zip(self.value_heads, maps, strict=True)]
        return torch.cat(values, 1), torch.cat(logits, 1)[..., 0]


class FullRangeFinder(Finder):
    """The finder for faces up to five metres away (192 px): double blocks, then back up to a fine grid."""

    def __init__(self) -> None:
        super().__init__()
        self._set_anchors(192, ((48, 1),))
        self.stem = Convolution(3, 32, 3, 2)
        self.down = nn.ModuleList(
            [
                _doubles((32, 32, 32, 48, 48, 64), (8, 8, 12, 12, 16), halved=2),
                _doubles((64, 96, 128, 128), (24, 32, 32), halved=0),
                _doubles((128, 144, 192, 256), (36, 48, 64), halved=0),
                _doubles((256, 384, 384, 384, 384), (96, 96, 96, 96), halved=0),
            ]
        )
        self.up = nn.ModuleList([_Up(384, 256, 96, 2), _Up(96, 128, 64, 2), _Up(64, 64, 48, 1)])
        self.score_head = Convolution(48, 1)
        self.value_head = Convolution(48, 16)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.stem(image))
        maps = []
        for down in self.down:
            maps.append(x := down(x))
        for up, beside in zip(self.up, reversed(maps[:-1]), strict=True):
            x = up(x, beside)
        return _rows(self.value_head(x), 16), _rows(self.score_head(x), 1)[..., 0]


class _Up(nn.Module):
    """A coarse map, enlarged and added to a finer one."""

    def __init__(self, coarse: int, fine: int, outputs: int, blocks: int) -> None:
        super().__init__()
        self.coarse = Convolution(coarse, outputs)
        self.fine = Convolution(fine, outputs)
        self.blocks = nn.Sequential(*(BlazeBlock(outputs, outputs, middle=outputs // 2) for _ in range(blocks)))

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        coarse, fine = F.relu(self.coarse(coarse)), F.relu(self.fine(fine))
        return self.blocks(fine + F.interpolate(coarse, fine.shape[-2:], mode="bilinear", align_corners=False))


def _doubles(widths: tuple[int, ...], middles: tuple[int, ...], halved: int) -> nn.Sequential:
    """Double blocks, the one of number ``halved`` with a stride of 2."""
    pairs = zip(pairwise(widths), middles, strict=True)
    return nn.Sequential(*(BlazeBlock(a, b, 2 if n == halved else 1, m) for n, ((a, b), m) in enumerate(pairs)))


def _rows(maps: Tensor, each: int) -> Tensor:
    """(B, k * each, h, w) -> (B, h * w * k, each): the anchors of a cell follow one another."""
    return maps.permute(0, 2, 3, 1).reshape(len(maps), -1, each)


def suppress(finds: Tensor, overlap: float = 0.3) -> Tensor:
    """Weighted non-maximum suppression: what overlaps the best find becomes one with it, by scores.

    Args:
        finds: (n, 17) as :data:`VALUES`.
        overlap: intersection over union above which two boxes are of one face.

    Returns:
        (m, 17), best first: means weighted by score, and the best score.
    """
    finds = finds[finds[:, -1].argsort(descending=True, stable=True)]
    kept = []
    while len(finds):
        same = overlaps(finds[0, :4], finds[:, :4]) > overlap
        same[0] = True  # of a box without an area too
        weights = finds[same, -1:]
        mean = (finds[same, :-1] * weights).sum(0) / weights.sum()
        kept.append(torch.cat([mean, finds[0, -1:]]))
        finds = finds[~same]
    return torch.stack(kept) if kept else finds


def overlaps(box: Tensor, boxes: Tensor) -> Tensor:
    """Intersection over union of a box (4,) with boxes (n, 4), each left, top, right, bottom -> (n,)."""
    sides = (torch.minimum(box[2:], boxes[:, 2:]) - torch.maximum(box[:2], boxes[:, :2])).clamp(min=0)
    common = sides.prod(1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return common / (areas + (box[2:] - box[:2]).prod() - common).clamp(min=torch.finfo(boxes.dtype).tiny)
