"""How a picture of a face becomes the square that a generator knows: found, turned, cut, and its pose estimated."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from models.artifact import Artifact
from models.camera import Camera
from models.errors import UserError, shown
from models.faces.crop import cut
from models.faces.pose import yaw_pitch_roll
from models.faces.reader import PRESENT, Face, FaceReader, five_of
from models.faces.recipes import RECIPES, STANDARD, Angles, Recipe, Square, checked, find_recipe, pose_of_five
from models.files import resolve
from models.image import MIN_SIDE
from models.manifest import MANIFEST, read_manifest

log = logging.getLogger(__name__)

Crop = Literal["auto", "face", "centre", "none"]
Box = tuple[int, int, int, int]  # x, y, width, height in pixels
ALIKE = 0.8  # of the largest face's area: another one as large, and neither is the one that is meant
SMALL = 32  # pixels between the eyes of a face that a frame can be sharp with
SIDE = math.radians(55)  # yaw from which the mesh, which has few profiles in it, is not to be relied on
ANGLES = {"yaw_deg": 180.0, "pitch_deg": 90.0, "roll_deg": 180.0}  # and the most that each may be


@dataclass(frozen=True)
class Edits:
    """What a person says of one picture; None is for the computer to find.

    Attributes:
        yaw_deg, pitch_deg: where the rig's camera is.
        crop: x, y, width and height of a box around the head, whole pixels.
        points: (5, 2) pixels: eyes, nose tip and corners of the mouth, see :mod:`models.faces.recipes`.
        face: which one, 1 for the largest.
        roll_deg: by which the square is turned, clockwise.
        scale: of the head in its frame: 1.1 makes it a tenth larger.
        shift: of the head, to the right and down, in units of the frame.
    """

    yaw_deg: float | None = None
    pitch_deg: float | None = None
    crop: Any = None
    points: Any = None
    face: int | None = None
    roll_deg: float | None = None
    scale: float | None = None
    shift: Any = None


@dataclass(frozen=True)
class Framed:
    """A framed picture.

    Attributes:
        image: (3, size, size) in [-1, 1].
        square: the square of the picture that it shows.
        angles: yaw and pitch of the rig's camera, radians; None when nothing tells them.
        estimated: no person gave them.
        camera: the recipe's camera at these angles (batch of 1): EG3D's has what the square leaves of the roll.
        five: (5, 2) pixels of the picture.
        points: (468, 2) of the mesh in units of the frame, where the mesh is present.
        presence: of the mesh, 0 to 1.
        boxed: the square is a box that was given, or the centred one.
        faces: how many were found, 0 where none was looked for.
        warnings: each a sentence.
    """

    image: Tensor
    square: Square
    angles: Angles | None = None
    estimated: bool = False
    camera: Camera | None = None
    five: Tensor | None = None
    points: Tensor | None = None
    presence: float = 0.0
    boxed: bool = False
    faces: int = 0
    warnings: tuple[str, ...] = ()


@functools.cache
def reader() -> FaceReader:
    """The shipped networks, loaded once."""
    return FaceReader.load()


def recipe_of(name: str) -> Recipe:
    """A recipe by its name, or that of the generator in an artifact's folder.

    An imported generator's manifest names it, and is among the ancestors of what was made from it; else it is one of
    our own worlds'.

    Raises:
        UserError: when the artifact does not say.
    """
    if name in RECIPES:
        return RECIPES[name]
    places = [place for place in (resolve(name), resolve(name) / "artifact") if (place / MANIFEST).exists()]
    if not places:
        raise UserError(f"{shown(name)} is neither a recipe ({', '.join(RECIPES)}) nor the folder of an artifact")
    held = Artifact(places[0], read_manifest(places[0]))  # its files are for whoever loads them to verify
    manifests = [held.manifest, *held.ancestors.values()]
    for manifest in manifests:
        if isinstance(said := manifest.get("extra", {}).get("recipe"), str):
            return find_recipe(said)
    if imported := [manifest for manifest in manifests if manifest.get("stage") == "zoo"]:
        family = shown(imported[0].get("extra", {}).get("family"))
        raise UserError(f"{name}: its generator ({family}) does not say how faces are framed for it: name a recipe")
    return RECIPES["embedded"]


@dataclass(frozen=True)
class Framing:
    """One way to frame pictures.

    Attributes:
        recipe: the generator's.
        size: of the frame, pixels.
        crop: "auto", "face", "centre" or "none", see :class:`datamodules.artworks.ArtworkDataModule`.
    """

    recipe: Recipe
    size: int
    crop: Crop = "auto"

    @torch.no_grad()
    def __call__(self, image: Tensor, what: str, edits: Edits | None = None, framed: bool = False) -> Framed:
        """Frame one picture.

        Args:
            image: (1, 3, H, W) in [-1, 1].
            what: its name, for what is said of it.
            edits: what is known of it.
            framed: it is framed already, as its camera is known.

        Raises:
            UserError: when it cannot be framed as is asked.
        """
        edits = edits or Edits()
        yaw, pitch, roll = (_angle(getattr(edits, name), name, what) for name in ANGLES)
        head, faces, notes = self._head(image, what, edits, framed)
        angles = self._angles(head, yaw, pitch)
        square = _given_square(image, edits.crop, what)
        if square is None:
            square = _centre(image) if head is None else self._square(head, image, angles, what)
        boxed = edits.crop is not None or head is None
        square = _edited(square, roll, edits, what)
        frame = cut_square(image, square, self.size)
        if head is None:
            head = self._head_in(frame, square)
            angles = self._angles(head, yaw, pitch)
        estimated = angles is not None and yaw is None and pitch is None
        left = 0.0 if head is None else float(yaw_pitch_roll(head.rotation[None])[2]) - square.angle
        return Framed(
            image=frame,
            square=square,
            angles=angles,
            estimated=estimated,
            camera=None if angles is None else self.recipe.camera(angles, left),
            five=None if head is None else head.five,
            points=square.to_frame(head.points[:, :2]) if head is not None and head.meshed else None,
            presence=0.0 if head is None else head.presence,
            boxed=boxed,
            faces=faces,
            warnings=(*notes, *_doubts(head, square, image)),
        )

    def _head(self, image: Tensor, what: str, edits: Edits, framed: bool) -> tuple[_Head | None, int, list[str]]:
        """What is known of the head before the picture is framed, how many faces there are, and what is to be said."""
        height, width = image.shape[-2:]
        if edits.points is not None:
            five = five_points(edits.points, what)
            if bool((five - torch.tensor([width, height]) / 2).abs().gt(torch.tensor([width, height])).any()):
                raise UserError(f"{what}: points {shown(edits.points)} are not in the image of {width} x {height}")
            return _read_at(image, five), 0, []
        if edits.crop is not None or framed or self.crop == "centre":
            return None, 0, []
        if self.crop == "none":
            if width != height:
                raise UserError(
                    f"{what} is {width} x {height}: crop 'none' needs a square image, use 'auto' or 'centre'"
                )
            return None, 0, []
        faces = reader().find(image)
        number = 1 if edits.face is None else edits.face
        if self.crop == "auto" and edits.face is None:
            if width == height <= self.size and all(self._is_framed(face, width) for face in faces[:1]):
                return None, len(faces), []
            if not faces:
                note = f"no face found, taking the centred square: {BY_HAND}"
                log.warning("%s: %s", what, note)
                return None, 0, [note]
        if not 1 <= number <= len(faces):
            found = "no face" if not faces else "one face" if len(faces) == 1 else f"{len(faces)} faces"
            wanted = "one is needed" if edits.face is None else f"number {number} is asked for"
            raise UserError(f"{what}: found {found}, where {wanted}: {BY_HAND}")
        face, notes = faces[number - 1], []
        alike = [n for n, other in enumerate(faces, 1) if other.size > ALIKE * faces[0].size]
        places = ", ".join(f"{n} at {_place(faces[n - 1])}" for n in alike)
        if edits.face is None and len(alike) > 1:
            if self.crop == "face":
                raise UserError(f"{what}: found {len(alike)} faces of about one size ({places}): choose with --face")
            notes.append(f"{len(alike)} faces are of about one size ({places}), taking the first: choose with --face")
            log.warning("%s: %s", what, notes[0])
        which = "" if len(faces) == 1 else f", number {number} of {len(faces)} by size"
        log.info("%s: face found at %s%s", what, _place(face), which)
        with _named(what):
            return _head_of(face), len(faces), notes

    def _is_framed(self, face: Face, side: int) -> bool:
        """Whether a face is about where a picture of this side, were it framed already, has it."""
        try:
            head = _head_of(face)
            square = self.recipe.square(head.five, (side, side), self.recipe.angles(head.rotation, head.meshed))
        except UserError:  # its points are not a face's
            return False
        middle = math.dist(square.centre, (side / 2, side / 2)) / side
        return 1 / 1.3 < square.side / side < 1.3 and middle < 0.15 and abs(square.angle) < math.radians(12)

    def _square(self, head: _Head, image: Tensor, angles: Angles | None, what: str) -> Square:
        height, width = image.shape[-2:]
        with _named(what):
            return self.recipe.square(head.five, (width, height), angles or (0.0, 0.0))

    def _head_in(self, frame: Tensor, square: Square) -> _Head | None:
        """The head in a picture that is framed already, where the mesh sees it."""
        front = STANDARD[:, :2] * torch.tensor([100.0, -100.0]) + 500
        expected = self.recipe.square(front, (1000, 1000)).to_frame(front) * self.size
        points, presence = reader().read(frame[None], *_around(expected.float()))
        if presence < PRESENT:
            return None
        points = torch.cat([square.to_picture(points[:, :2] / self.size), points[:, 2:] / self.size * square.side], 1)
        rotation = reader().canonical.head_pose(points[None])[0]
        return _Head(five_of(points), rotation, points, presence)

    def _angles(self, head: _Head | None, yaw: float | None, pitch: float | None) -> Angles | None:
        """Those that are given, else the rig's nearest to those seen, and 0 where only the other is known."""
        if head is None and yaw is None and pitch is None:
            return None
        seen = (0.0, 0.0) if head is None else self.recipe.angles(head.rotation, head.meshed)
        nearest = [float(angle) for angle in self.recipe.rig.within(*torch.tensor(seen, dtype=torch.float64))]
        return nearest[0] if yaw is None else yaw, nearest[1] if pitch is None else pitch


BY_HAND = (
    "say where it is with --points (x and y of both eyes, the nose's tip and both corners of the mouth) or a crop box "
    "in artworks.json, or take --crop centre"
)


@contextmanager
def _named(what: str) -> Iterator[None]:
    """What is wrong with the face that was found is said of its picture, and what to do."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}: {BY_HAND}") from error


@dataclass(frozen=True)
class _Head:
    five: Tensor
    rotation: Tensor
    points: Tensor
    presence: float

    @property
    def meshed(self) -> bool:
        """The rotation is the mesh's, else that of the five points."""
        return self.presence >= PRESENT


def cut_square(image: Tensor, square: Square, size: int) -> Tensor:
    """(3, size, size): a square of (1, 3, H, W); one of whole pixels is resized, and else as it is."""
    corner = [middle - square.side / 2 for middle in square.centre]
    whole = all(abs(value - round(value)) < 1e-6 for value in (*corner, square.side))
    within = all(
        start >= 0 and start + square.side <= length for start, length in zip(corner, image.shape[:1:-1], strict=True)
    )
    if square.angle == 0 and whole and within:
        x, y, side = (round(value) for value in (*corner, square.side))
        return frame(image, size, (x, y, side, side))
    return cut(image, torch.tensor(square.centre), square.side, square.angle, size, "blurred")[0]


def frame(image: Tensor, size: int, box: Box) -> Tensor:
    """Cut ``box`` out of (1, 3, H, W) and resize it to (3, size, size), antialiased."""
    x, y, width, height = box
    inside = image[..., y : y + height, x : x + width]
    if inside.shape[-2:] != (size, size):
        inside = F.interpolate(inside, (size, size), mode="bicubic", antialias=True, align_corners=False)
    return inside[0].clamp(-1, 1)


def five_points(given: Any, what: str) -> Tensor:
    """(5, 2) points from a list of five pairs, or a text of ten numbers.

    Raises:
        UserError: when they are none.
    """
    numbers = given
    if isinstance(given, str):
        numbers = [part for part in given.replace(",", " ").split() if part]
        numbers = [numbers[start : start + 2] for start in range(0, len(numbers), 2)]
    try:
        five = torch.tensor([[float(value) for value in pair] for pair in numbers], dtype=torch.float32)
        if five.shape != (5, 2):
            raise ValueError
    except (TypeError, ValueError):
        raise UserError(
            f"{what}: points must be five pairs of numbers, x and y of both eyes, the nose's tip and both corners of "
            f"the mouth, got {shown(given)}"
        ) from None
    try:
        return checked(five).float()
    except UserError as error:
        raise UserError(f"{what}: {error}") from None


def _head_of(face: Face) -> _Head:
    """Turned as the mesh is, where it is present, else as the five points."""
    present = face.presence >= PRESENT
    rotation = reader().canonical.head_pose(face.points[None])[0] if present else pose_of_five(face.five)
    return _Head(face.five, rotation, face.points, face.presence)


def _read_at(image: Tensor, five: Tensor) -> _Head:
    """The head whose five points are given: the mesh tells its pose where it is present."""
    points, presence = reader().read(image, *_around(five))
    near = float((five_of(points) - five).norm(dim=1).mean()) < 0.5 * float((five[1] - five[0]).norm())
    if presence >= PRESENT and near:
        return _Head(five, reader().canonical.head_pose(points[None])[0], points, presence)
    return _Head(five, pose_of_five(five), points, 0.0)


def _around(five: Tensor) -> tuple[Tensor, float]:
    """The finder's box, from brows to chin, around a face's five points, and the angle of its eyes."""
    eyes, mouth = five[:2].mean(0), five[3:].mean(0)
    across, down = five[1] - five[0], mouth - eyes
    half = 1.1 * max(float(across.norm()), float(down.norm()))
    centre = eyes + 0.6 * down
    return torch.cat([centre - half, centre + half]), math.atan2(float(across[1]), float(across[0]))


def _doubts(head: _Head | None, square: Square, image: Tensor) -> list[str]:
    """Sentences on a frame that may not be good."""
    doubts = []
    if head is not None:
        yaw = float(yaw_pitch_roll(head.rotation[None])[0])
        apart = float((head.five[1] - head.five[0]).norm()) / max(math.cos(yaw), 0.3)
        if apart < SMALL:
            doubts.append(f"the face is small: its eyes are {apart:.0f} pixels apart")
        if abs(yaw) > SIDE:
            doubts.append(f"a profile ({math.degrees(yaw):.0f} degrees): points and pose are rough")
        elif not head.meshed:
            doubts.append("the mesh sees no human face here, as with animals and some drawings: the pose is rough")
    corners, (height, width) = square.corners(), image.shape[-2:]
    beyond = torch.maximum(-corners, corners - torch.tensor([width, height])).amax(0) / square.side
    if float(beyond.max()) > 0.25:
        doubts.append(f"{float(beyond.max()):.0%} of the frame are beyond the picture")
    return doubts


def _place(face: Face) -> str:
    left, top, right, bottom = face.box.round().int().tolist()
    return f"x={left} y={top}, {right - left} x {bottom - top} pixels"


def _angle(value: Any, name: str, what: str) -> float | None:
    """Radians of an angle in degrees."""
    if value is None:
        return None
    if not abs(value) <= ANGLES[name]:
        raise UserError(f"{what}: {name} is {value:g}, it must be between +-{ANGLES[name]:g} degrees")
    return math.radians(value)


def _edited(square: Square, roll: float | None, edits: Edits, what: str) -> Square:
    """A square after roll, scale and shift."""
    scale = 1.0 if edits.scale is None else edits.scale
    if not 0.1 <= scale <= 10:
        raise UserError(f"{what}: scale is {scale:g}, it must be between 0.1 and 10")
    shift = [0.0, 0.0] if edits.shift is None else edits.shift
    if not (len(shift) == 2 and all(isinstance(v, int | float) and abs(v) <= 1 for v in shift)):
        raise UserError(f"{what}: shift must be [right, down] in units of the frame, at most 1, got {shown(shift)}")
    square = replace(square, angle=square.angle if roll is None else roll, side=square.side / scale)
    if not any(shift):
        return square
    x, y = square.to_picture(torch.tensor([0.5 - shift[0], 0.5 - shift[1]], dtype=torch.float64)).tolist()
    return replace(square, centre=(x, y))


def _given_square(image: Tensor, box: Any, what: str) -> Square | None:
    """The largest square in the middle of a box, inside the picture."""
    if box is None:
        return None
    height, width = image.shape[-2:]
    if not (isinstance(box, list) and len(box) == 4 and all(type(v) is int for v in box)):
        raise UserError(f"{what}: crop must be [x, y, width, height] in whole pixels, got {shown(box)}")
    x, y, w, h = box
    if x < 0 or y < 0 or min(w, h) < MIN_SIDE or x + w > width or y + h > height:
        raise UserError(f"{what}: crop {box} is not inside the image of {width} x {height}, or too small")
    return _square_in(x, y, w, h)


def _centre(image: Tensor) -> Square:
    height, width = image.shape[-2:]
    return _square_in(0, 0, width, height)


def _square_in(x: int, y: int, width: int, height: int) -> Square:
    side = min(width, height)
    return Square((x + (width - side) // 2 + side / 2, y + (height - side) // 2 + side / 2), float(side))
