"""How each generator's training pictures were framed: from a face's points to the square that is cut, and its camera.

Pixel coordinates are continuous: x to the right, y down, a pixel's centre at .5. Five points are, from the picture's
left to its right: both eyes' centres, the nose's tip, both corners of the mouth.

The geometry follows the preparations of FFHQ (https://github.com/NVlabs/ffhq-dataset, ``download_ffhq.py``), EG3D
(https://github.com/NVlabs/eg3d, ``dataset_preprocessing/ffhq``) and GRAM (https://github.com/microsoft/GRAM,
``preprocess_dataset.py``).
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from models.camera import Camera, Rig
from models.errors import UserError
from models.faces.pose import yaw_pitch_roll

MANNEQUIN = torch.tensor(
    [[-0.29, 0.06, 0.735], [0.29, 0.06, 0.735], [0.0, -0.185, 0.917], [-0.2275, -0.46, 0.715], [0.2275, -0.46, 0.715]]
)
"""The five points on the mean mannequin, world units: the middle of its eyes, the foremost point of its nose and the
corners of its lips, on the skin of the head whose latent is 0."""

STANDARD = torch.tensor(
    [
        [-0.31148657, 0.09036078, 0.13377953],
        [0.30979887, 0.08972035, 0.13179526],
        [0.0032535, -0.24617933, 0.55244243],
        [-0.25216928, -0.5813392, 0.22405732],
        [0.2484662, -0.5812824, 0.22235769],
    ],
    dtype=torch.float64,
)
"""The five points on the mean face of the Basel model that EG3D and GRAM fit pictures to; GRAM publishes them."""

EG3D_OFFSET = torch.tensor([0.0, 0.006, 0.161], dtype=torch.float64)
"""What EG3D's preparation adds to cameras 2.7 away, before they are put back at that distance."""

_FLIP = torch.diag(torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64))  # y down and z forward to y up and z back

Size = tuple[int, int]
Angles = tuple[float, float]
Affine = tuple[float, float]

CALIBRATION: dict[str, tuple[Affine, Affine]] = {
    # recipe: (slope, offset in radians) of yaw, and of pitch: what the rig calls the angles that the mesh shows.
    # Fitted to 90 plain mannequins of the validation split, drawn with each rig's cameras (yaw to 60, pitch to 25
    # degrees); faces are symmetric, so that yaw has no offset. GRAM's zero of pitch is that of its own mean face.
    "embedded": ((1.02, 0.0), (0.98, 0.0)),
    "ffhq": ((1.05, 0.0), (1.0, 0.008)),
    "eg3d": ((1.11, 0.0), (1.05, 0.008)),
    "eg3d-wild": ((1.11, 0.0), (1.05, 0.008)),
    "gram": ((1.08, 0.0), (1.0, 0.0)),
    "stylesdf": ((1.05, 0.0), (1.0, 0.008)),
    "anifacegan": ((1.08, 0.0), (1.0, 0.0)),
}


@dataclass(frozen=True)
class Square:
    """A turned square of a picture.

    Attributes:
        centre: x and y, pixels.
        side: pixels.
        angle: of its x axis, radians, clockwise as the picture is seen.
    """

    centre: tuple[float, float]
    side: float
    angle: float = 0.0

    def to_frame(self, points: Tensor) -> Tensor:
        """Points (..., 2) of the picture in units of the square, 0 to 1 within it."""
        x, y = (points - points.new_tensor(self.centre)).unbind(-1)
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        return torch.stack([cos * x + sin * y, cos * y - sin * x], -1) / self.side + 0.5

    def to_picture(self, points: Tensor) -> Tensor:
        """Points (..., 2) in units of the square in pixels of the picture."""
        x, y = ((points - 0.5) * self.side).unbind(-1)
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        return torch.stack([cos * x - sin * y, sin * x + cos * y], -1) + points.new_tensor(self.centre)

    def corners(self) -> Tensor:
        """(4, 2) pixels: top left, bottom left, bottom right, top right."""
        return self.to_picture(torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 0.0]], dtype=torch.float64))


Frame = Callable[[Tensor, Size, Angles], Square]


@dataclass(frozen=True)
class Recipe:
    """One way to frame faces.

    Attributes:
        name: a key of :data:`RECIPES`.
        rig: of the generators that are trained on such pictures.
        size: side of their pictures, pixels.
        frame: five points (5, 2), the picture's size and the rig's yaw and pitch to the square.
        seat: a head's yaw and pitch to where the rig's camera stands, where these are not the same.
        view: where the camera stands, and the head's roll in the crop, to the camera, where it is not the rig's own.
    """

    name: str
    rig: Rig
    size: int
    frame: Frame
    seat: Callable[[float, float], Angles] | None = None
    view: Callable[[Rig, Angles, float], Camera] | None = None

    def square(self, five: Tensor, picture: Size, angles: Angles = (0.0, 0.0)) -> Square:
        """The square that is cut.

        Args:
            five: (5, 2) points, pixels.
            picture: width and height, pixels.
            angles: yaw and pitch of the rig, radians, for recipes that ask for them.

        Raises:
            UserError: when the points are not those of a face.
        """
        return self.frame(checked(five), picture, angles)

    def angles(self, rotation: Tensor, meshed: bool = False) -> Angles:
        """The yaw and pitch, radians, at which the rig's camera sees a head that is turned by ``rotation`` (3, 3).

        Args:
            meshed: the mesh shows the rotation: :data:`CALIBRATION` is for it alone.
        """
        yaw, pitch, _ = (float(angle) for angle in yaw_pitch_roll(rotation.detach().double().cpu()[None]))
        if meshed:
            (slope, offset), (rise, lift) = CALIBRATION[self.name]
            yaw, pitch = slope * yaw + offset, rise * pitch + lift
        return self.seat(yaw, pitch) if self.seat else (yaw, pitch)

    def camera(self, angles: Angles, roll: float = 0.0) -> Camera:
        """The camera (batch of 1) at the rig's yaw and pitch; ``roll`` is what the crop leaves of the head's.

        Radians, clockwise. Only EG3D's cameras have any.
        """
        return self.view(self.rig, angles, roll) if self.view else self.rig.camera(*angles)


def checked(five: Tensor) -> Tensor:
    """Five points (5, 2) in double precision.

    Raises:
        UserError: when they cannot be a face's.
    """
    five = five.detach().double().cpu()
    if five.shape == (5, 2) and bool(five.isfinite().all()):
        across, down = five[1] - five[0], five[3:].mean(0) - five[:2].mean(0)
        if float(across[0] * down[1] - across[1] * down[0]) > 1e-3 * float(across.norm() + down.norm()):
            return five
    raise UserError(
        "the five points are not a face's: they are x and y of, from the picture's left to its right, both eyes, the "
        "nose's tip and both corners of the mouth"
    )


def head_rotation(yaw: float, pitch: float, roll: float = 0.0) -> Tensor:
    """(3, 3), double precision: the rotation of a head that a camera at these angles sees.

    The inverse of :func:`models.faces.pose.yaw_pitch_roll`.
    """
    place = [math.sin(yaw) * math.cos(pitch), math.sin(pitch), math.cos(yaw) * math.cos(pitch)]
    position = torch.tensor([place], dtype=torch.float64)
    axes = Camera.look_at(position, torch.zeros(3, dtype=torch.float64), 1.0).cam2world[0, :3, :3]
    cos, sin = math.cos(roll), math.sin(roll)
    turn = torch.tensor([[cos, sin, 0.0], [-sin, cos, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    return turn @ (_FLIP @ axes.T)


def pose_of_five(five: Tensor) -> Tensor:
    """(3, 3) rotation of a head whose five points are known, from a scaled orthographic view of the mean face."""
    rows = _fit(checked(five))[:3].T * torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    left, _, right = torch.linalg.svd(rows, full_matrices=False)
    across, up = left @ right  # the nearest two rows of a rotation
    return torch.stack([across, up, torch.linalg.cross(across, up)])


def _fit(five: Tensor) -> Tensor:
    """(4, 2): the affine map of the standard face's points to ``five``, by least squares; its last row is the shift."""
    known = torch.cat([STANDARD, torch.ones(5, 1, dtype=torch.float64)], 1)
    return torch.linalg.lstsq(known, five).solution


def _ffhq(five: Tensor, picture: Size, angles: Angles) -> Square:
    """FFHQ's alignment: turned by eyes and mouth, of twice the eyes' distance or 1.8 of the face's height."""
    eyes, mouth = five[:2].mean(0), five[3:].mean(0)
    across, down = five[1] - five[0], mouth - eyes
    turned = across + torch.stack([down[1], -down[0]])
    half = max(2.0 * float(across.norm()), 1.8 * float(down.norm()))
    x, y = (eyes + 0.1 * down).tolist()
    return Square((x, y), 2 * half, math.atan2(float(turned[1]), float(turned[0])))


def _standard(five: Tensor, picture: Size, factor: float, canvas: int, kept: int) -> Square:
    """The upright square that EG3D and GRAM cut after they fit the standard face to the points.

    The picture is resized so that one unit of the face is ``factor`` pixels, a canvas is cut around the face's origin,
    and its middle is kept. Sizes and places are whole pixels, as there; rows are counted from below the middle of
    the lowest row, but cut from its edge.
    """
    fitted = _fit(five)
    zoom = factor / float(fitted[:3].norm(dim=0).mean())
    centre, sides = [], []
    for place, length in zip((fitted[3] + torch.tensor([-0.5, 0.5])).tolist(), picture, strict=True):
        whole = max(1, int(length * zoom))
        start = int(whole / 2 - canvas / 2 + (place - length / 2) * zoom)
        centre.append((start + canvas / 2) * length / whole)
        sides.append(kept * length / whole)
    return Square((centre[0], centre[1]), sum(sides) / 2)


def _eg3d_wild(five: Tensor, picture: Size, angles: Angles) -> Square:
    return _standard(five, picture, 300, 1024, 700)


def _within_ffhq(pixels: int, factor: float, canvas: int, kept: int) -> Frame:
    """A crop that is made of FFHQ's aligned pictures, ``pixels`` wide."""

    def frame(five: Tensor, picture: Size, angles: Angles) -> Square:
        aligned = _ffhq(five, picture, angles)
        inner = _standard(aligned.to_frame(five) * pixels, (pixels, pixels), factor, canvas, kept)
        x, y = aligned.to_picture(torch.tensor(inner.centre, dtype=torch.float64) / pixels).tolist()
        return Square((x, y), inner.side / pixels * aligned.side, aligned.angle)

    return frame


def _embedded(five: Tensor, picture: Size, angles: Angles) -> Square:
    """The similarity that lays the mean mannequin's eyes and mouth, seen by the rig, on the picture's."""
    seen = Rig().camera(*angles).project(MANNEQUIN[None])[0][0].double() - 0.5
    model, face = (torch.view_as_complex(p[[0, 1, 3, 4]].contiguous()) for p in (seen, five))
    spread = model - model.mean()
    factor = complex((spread.conj() * face).sum() / spread.abs().square().sum())
    middle = complex(face.mean()) - factor * complex(model.mean())
    return Square((middle.real, middle.imag), abs(factor), cmath.phase(factor))


def _eg3d_seat(yaw: float, pitch: float) -> Angles:
    """Cameras before the head's middle, moved by an offset, are put back at their radius."""
    return _direction(EG3D.radius * head_rotation(yaw, pitch)[2] + EG3D_OFFSET)


def _eg3d_view(rig: Rig, angles: Angles, roll: float) -> Camera:
    """The cameras of EG3D's labels: turned as the head is before they are moved."""
    seat = head_rotation(*angles)[2]
    along = float(seat @ EG3D_OFFSET)
    moved = along + math.sqrt(along**2 + rig.radius**2 - float(EG3D_OFFSET.square().sum()))
    head = head_rotation(*_direction(moved * seat - EG3D_OFFSET), roll)
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[:3, :3] = head.T @ _FLIP
    matrix[:3, 3] = rig.radius * seat
    return Camera(matrix[None].float(), rig.camera(0.0).intrinsics)


def _gram_seat(yaw: float, pitch: float) -> Angles:
    """Euler angles of the head, turned about x first, less a tenth of a radian of pitch."""
    x, y, z = head_rotation(yaw, pitch)[2].tolist()
    return math.asin(x), math.atan2(y, z) - 0.1


def _direction(place: Tensor) -> Angles:
    """Yaw and pitch of a place, seen from the origin."""
    x, y, z = place.tolist()
    return math.atan2(x, z), math.atan2(y, math.hypot(x, z))


_NARROW = math.radians(12)  # field of view of GRAM, AniFaceGAN and StyleSDF
EG3D = Rig(radius=2.7, focal=4.2647, pivot=(0.0, 0.0, 0.2), centre=(0.0, 0.0, 0.0), near=2.25, far=3.3)
GRAM = Rig(radius=1.0, focal=0.5 * 255 / 256 / math.tan(_NARROW / 2), pivot=(0.0, 0.0, 0.0), near=0.88, far=1.12)
STYLESDF = Rig(
    radius=1.0, focal=0.5 / math.tan(_NARROW / 2), pivot=(0.0, 0.0, 0.0), near=0.88, far=1.12, pitch_std=0.15
)

_in_gram = _within_ffhq(1024, 95 * 256 / 224, 256, 256)

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("embedded", Rig(), 128, _embedded),
        Recipe("ffhq", STYLESDF, 1024, _ffhq),
        Recipe("eg3d", EG3D, 512, _within_ffhq(1500, 300, 1024, 700), _eg3d_seat, _eg3d_view),
        Recipe("eg3d-wild", EG3D, 512, _eg3d_wild, _eg3d_seat, _eg3d_view),
        Recipe("gram", GRAM, 256, _in_gram, _gram_seat),
        Recipe("stylesdf", STYLESDF, 1024, _ffhq),
        # Its preparation is not published; its loader and authors are GRAM's.
        Recipe("anifacegan", GRAM, 256, _in_gram, _gram_seat),
    )
}
"""By name. FFHQ's alignment alone serves 2D generators: its camera is StyleSDF's, which takes the same pictures."""


def find_recipe(name: str) -> Recipe:
    """The recipe of a name.

    Raises:
        UserError: when there is none.
    """
    if name not in RECIPES:
        raise UserError(f"there is no recipe {name!r} to frame faces by, there are: {', '.join(RECIPES)}")
    return RECIPES[name]
