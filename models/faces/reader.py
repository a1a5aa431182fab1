"""Faces of a picture, from finding to 468 points: the whole path, and the door to its networks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import artifact
from models.configurable import Configurable
from models.faces.crop import cut
from models.faces.finder import Finder, overlaps, suppress
from models.faces.mask import PersonMask
from models.faces.mesh import FaceMesh
from models.faces.pose import CanonicalFace
from models.image import resized

EMBEDDED_FOLDER = "assets/faces"
PRESENT = 0.5
"""Presence from which the mesh's points are believed rather than the finder's."""
RIGHT_EYE = (33, 160, 158, 133, 153, 144)
LEFT_EYE = (362, 385, 387, 263, 373, 380)
"""Points of the mesh around the eyes, the person's right one and left one: corners and lids."""
OVAL = (
    10, 338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378, 400, 377,
    152, 148, 176, 149, 150, 136, 172, 58, 132, 93, 234, 127, 162, 21, 54, 103, 67, 109,
)  # fmt: skip
"""Points of the mesh around the face, from the forehead on."""
_NOSE, _MOUTH = 1, (61, 291)
_MOUTH_WIDTH = 0.76  # of the distance between the eyes: the canonical face's
_EYE_CORNERS = (33, 263)

_SURE, _LIKELY = 0.7, 0.45  # scores that need no presence, and that need to be certain of it
_CERTAIN, _ABSENT = 0.9, 0.1  # presence; what has less than the latter is no face where there is one of the former
_MOST_FACES = 16
_SMALL = 1024  # longer side at which faces are looked for, pixels
_FRAME = 1.5  # side of the mesh's square, of the longer side of the box around the face
_MOST_LOOKS, _SETTLED = 4, 0.2  # at a face with the mesh once more, and the turn in radians below which it is enough
_BATCH = 8  # squares looked at together
_NARROW = 32  # pixels across that a strip needs for a look at its parts


@dataclass(frozen=True, eq=False)
class Face:
    """One face of a picture, in its pixels: x right, y down, (0, 0) the corner of the first pixel.

    Attributes:
        points: (468, 3) of the mesh; z away from the viewer, in pixels too.
        presence: from 0 to 1, how sure the mesh is that there is a face: low on drawings.
        score: from 0 to 1, of the finder.
        keypoints: (6, 2) the finder's own: right eye, left eye (the person's), nose, mouth, right ear, left ear.
        box: (4,) the finder's left, top, right, bottom: from the brows to the chin.
    """

    points: Tensor
    presence: float
    score: float
    keypoints: Tensor
    box: Tensor

    @property
    def five(self) -> Tensor:
        """(5, 2) the middles of both eyes, the nose's tip, the mouth's corners; the person's right ones first.

        From the mesh where it is present, else from the finder's points, which know of the mouth its middle only: its
        corners are then put where the canonical face has them.
        """
        if self.presence >= PRESENT:
            return five_of(self.points)
        right, left, nose, mouth = self.keypoints[:4]
        half = (left - right) * (_MOUTH_WIDTH / 2)
        return torch.stack([right, left, nose, mouth - half, mouth + half])

    @property
    def extent(self) -> Tensor:
        """(4,) left, top, right, bottom of the mesh, pixels."""
        return torch.cat([self.points[:, :2].amin(0), self.points[:, :2].amax(0)])

    @property
    def size(self) -> float:
        """Area of the box, square pixels."""
        return float((self.box[2:] - self.box[:2]).prod())


def five_of(points: Tensor) -> Tensor:
    """(5, 2) of a mesh's points (468, 3): see :attr:`Face.five`."""
    eyes = [points[list(eye), :2].mean(0) for eye in (RIGHT_EYE, LEFT_EYE)]
    return torch.stack([*eyes, points[_NOSE, :2], *points[list(_MOUTH), :2]])


class FaceReader(Configurable):
    """Finds faces in pictures of any size and kind, and reads them.

    Args:
        short, back, full: finders for large, smaller and distant faces.
        mesh: 468 points of one face.
        mask: who is in front of the background.
        canonical: the face to which poses are relative.
    """

    def __init__(
        self, short: Finder, back: Finder, full: Finder, mesh: FaceMesh, mask: PersonMask, canonical: CanonicalFace
    ) -> None:
        super().__init__()
        self.finders = nn.ModuleDict({"short": short, "back": back, "full": full})
        self.mesher, self.masker, self.canonical = mesh, mask, canonical

    @staticmethod
    def load(weights: str = "embedded") -> FaceReader:
        """A reader with weights, frozen.

        Args:
            weights: "embedded" for those that are shipped, or an artifact of ``galatea zoo import faces``.

        Raises:
            ArtifactError: when there is none, or it is damaged or incomplete.
        """
        held = artifact.load(EMBEDDED_FOLDER if weights == "embedded" else weights)
        modules = {name: held.module(name) for name in ("short", "back", "full", "mesh", "mask", "canonical")}
        return FaceReader(**modules).eval().requires_grad_(False)  # type: ignore[arg-type]

    @torch.no_grad()
    def find(self, image: Tensor) -> list[Face]:
        """All faces, the largest first.

        The whole picture is looked at once by two finders; where they find no face that is certainly one, a second
        time, nearer, from farther away and by three; where there is none at all a third time, nearer still. Scores
        rank. The mesh's presence only keeps out what has a low score, or what is none beside a face, as it is low on
        drawings that are good faces. Very large pictures are shrunk first; points come from the picture itself.

        Args:
            image: (1, 3, H, W) in [-1, 1].
        """
        with self._exactly(image) as image:
            height, width = image.shape[-2:]
            shrink = max(1.0, max(height, width) / _SMALL)
            small = image
            if shrink > 1:
                size = [max(1, round(side / shrink)) for side in (height, width)]
                small = F.interpolate(image, size, mode="bilinear", align_corners=False, antialias=True)
            scale = image.new_tensor([width / small.shape[-1], height / small.shape[-2]])
            whole = [_whole(small)]
            finds = suppress(torch.cat([self._look(small, name, whole, 0.5) for name in ("short", "back")]))
            faces = self._read(image, finds[finds[:, -1] >= _SURE], scale)
            if not any(face.presence >= PRESENT for face in faces):
                squares = [_whole(small, zoom) for zoom in (1.0, 1.6)]
                closer = [self._look(small, name, squares, 0.4) for name in ("short", "back", "full")]
                closer.append(self._look(small, "back", _tiles(small, 2), 0.5))
                finds = torch.cat([finds[finds[:, -1] >= _SURE], *closer])
                faces = self._read(image, suppress(finds[finds[:, -1] >= _LIKELY]), scale)
            if not faces:
                finds = self._look(small, "back", _tiles(small, 4), 0.5)
                faces = self._read(image, suppress(finds), scale, sure=1.0)
            if any(face.presence >= _CERTAIN for face in faces):
                faces = [face for face in faces if face.presence >= _ABSENT]
            return sorted(faces, key=lambda face: (-face.size, -face.score, *face.box.tolist()))

    def mesh(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Points of faces that fill about two thirds of their pictures, upright; differentiable.

        Args:
            image: (B, 3, S, S) in [-1, 1].

        Returns:
            (B, 468, 3) in units of the picture's side: x and y from 0 to 1, z alike; (B,) presence from 0 to 1.
        """
        with self._exactly(image) as image:
            points, logits = self.mesher(resized(image, self.mesher.size))
            return points, logits.sigmoid()

    def person(self, image: Tensor) -> Tensor:
        """Mask of persons: (B, 3, H, W) in [-1, 1] -> (B, 1, H, W) from 0 to 1; differentiable."""
        with self._exactly(image) as image:
            mask = self.masker(resized(image, self.masker.size))
            return F.interpolate(mask, image.shape[-2:], mode="bilinear", align_corners=False)

    def read(self, image: Tensor, box: Tensor, angle: float) -> tuple[Tensor, float]:
        """The mesh of a face whose place is known, looked at again once it is known better, or until it is.

        Args:
            image: (1, 3, H, W) in [-1, 1].
            box: (4,) around the face, pixels.
            angle: by which its eyes are turned, radians, clockwise.

        Returns:
            (468, 3) pixels, and presence.
        """
        with self._exactly(image) as image:
            centre, side = (box[:2] + box[2:]) / 2, float((box[2:] - box[:2]).max())
            points, presence = self._mesh_in(image, centre, side * _FRAME, angle)
            for _ in range(_MOST_LOOKS):
                before = angle
                centre, side, angle = framed(points)
                points, presence = self._mesh_in(image, centre, side, angle)
                if abs(math.remainder(angle - before, math.tau)) < _SETTLED:
                    break
            return points, presence

    def follow(self, image: Tensor, near: Tensor) -> Tensor:
        """Points of faces whose places are roughly known, looked at once; differentiable with respect to the pictures.

        Args:
            image: (B, 3, H, W) in [-1, 1].
            near: (B, 468, 2 or 3) roughly where, pixels.

        Returns:
            (B, 468, 3) pixels.
        """
        with self._exactly(image) as image:
            squares = [framed(face) for face in near.detach().to(image.dtype)]
            cuts = [cut(one[None], *square, self.mesher.size) for one, square in zip(image, squares, strict=True)]
            points, _ = self.mesh(torch.cat(cuts))
            return torch.stack([unframed(face, *square) for face, square in zip(points, squares, strict=True)])

    @contextmanager
    def _exactly(self, image: Tensor) -> Iterator[Tensor]:
        """A picture as exact as the networks, without the caller's autocast: half precision moves points by pixels."""
        with torch.autocast(image.device.type, enabled=False):
            yield image.to(self.canonical.vertices.dtype)

    def _mesh_in(self, image: Tensor, centre: Tensor, side: float, angle: float) -> tuple[Tensor, float]:
        points, presence = self.mesh(cut(image, centre, side, angle, self.mesher.size))
        return unframed(points[0], centre, side, angle), float(presence)

    def _look(self, image: Tensor, name: str, squares: Sequence[tuple[float, float, float]], least: float) -> Tensor:
        """What one finder finds in squares (x, y, side) of a picture: (n, 17), pixels."""
        finder = self.finders[name]
        assert isinstance(finder, Finder)
        found = [image.new_zeros(0, 17)]
        for start in range(0, len(squares), _BATCH):
            batch = squares[start : start + _BATCH]
            cuts = [cut(image, torch.tensor([x, y]), side, 0.0, finder.size) for x, y, side in batch]
            for (x, y, side), finds in zip(batch, finder.find(torch.cat(cuts), least), strict=True):
                places = (finds[:, :-1].unflatten(1, (8, 2)) - 0.5) * side + finds.new_tensor([x, y])
                found.append(torch.cat([places.flatten(1), finds[:, -1:]], 1))
        return torch.cat(found)

    def _read(self, image: Tensor, finds: Tensor, scale: Tensor, sure: float = _SURE) -> list[Face]:
        """Faces of finds, best first, that are believed and are not there twice; below ``sure`` presence decides."""
        faces: list[Face] = []
        for find in finds[:_MOST_FACES]:
            places = find[:-1].unflatten(0, (8, 2)) * scale
            box, keypoints, score = places[:2].flatten(), places[2:], float(find[-1])
            points, presence = self.read(image, box, _angle(keypoints[0], keypoints[1]))
            if score < sure and presence < _CERTAIN:
                continue
            new = Face(points, presence, score, keypoints, box)
            if not any(_same(new, face) for face in faces):
                faces.append(new)
        return faces


def framed(points: Tensor) -> tuple[Tensor, float, float]:
    """The square in which a face is looked at whose points (468, 2 or 3) are known: centre (2,), side, and angle."""
    angle = _angle(*points[list(_EYE_CORNERS), :2])
    upright = points[:, :2] @ _turn(-angle, points).T
    low, high = upright.amin(0), upright.amax(0)
    return _turn(angle, points) @ ((low + high) / 2), _FRAME * float((high - low).max()), angle


def unframed(points: Tensor, centre: Tensor, side: float, angle: float) -> Tensor:
    """Points (468, 3) in units of a square's side where they are in the picture."""
    flat = (points[:, :2] - 0.5) @ _turn(angle, points).T * side + centre
    return torch.cat([flat, points[:, 2:] * side], 1)


def _same(a: Face, b: Face) -> bool:
    """Whether two finds are one face: boxes of one that stands on its head may lie apart, its meshes do not."""
    return bool(overlaps(a.box, b.box[None]) > 0.5 or overlaps(a.extent, b.extent[None]) > 0.5)


def _whole(image: Tensor, zoom: float = 1.0) -> tuple[float, float, float]:
    """The square around a picture, ``zoom`` times as large."""
    height, width = image.shape[-2:]
    return width / 2, height / 2, max(height, width) * zoom


def _tiles(image: Tensor, parts: int) -> list[tuple[float, float, float]]:
    """Squares that are ``parts`` times in the picture's longer side, each over half of the next."""
    height, width = image.shape[-2:]
    side = min(height, width, max(height, width) / parts)
    if side < _NARROW:
        return []
    return [(x, y, side) for y in _steps(height, side) for x in _steps(width, side)]


def _steps(length: int, side: float) -> Iterator[float]:
    """Middles of intervals of ``side`` that cover ``length``, each over at least half of the next."""
    count = math.ceil((length - side) / (side / 2)) + 1
    for number in range(count):
        yield side / 2 + (length - side) * (number / (count - 1) if count > 1 else 0.5)


def _angle(a: Tensor, b: Tensor) -> float:
    """By how much the line from ``a`` to ``b`` is turned from the horizontal, radians, clockwise."""
    x, y = (b - a).tolist()
    return math.atan2(y, x)


def _turn(angle: float, like: Tensor) -> Tensor:
    """(2, 2) rotation of the picture's plane, clockwise."""
    return like.new_tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
