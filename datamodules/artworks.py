"""Artworks given by the user: one image, a folder of images, or a folder with a list of them."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from torch.nn import functional as F

from datamodules.items import ItemsDataModule
from datamodules.labels import LABELS, camera_labels, spelled
from models.camera import Camera
from models.documents import MOST_JSON_BYTES, parse_json
from models.errors import UserError, shown
from models.files import os_errors, read_bytes, resolve
from models.image import IMAGE_SUFFIXES, MIN_SIDE, pictures_among, read_image, say_left_out, to_uint8
from models.names import item_id

log = logging.getLogger(__name__)

SMALLEST_FACE = 24  # pixels that the face finder needs
FACE_FRACTION = 0.45  # of the frame's width that a face box takes in the embedded rig
Box = tuple[int, int, int, int]  # x, y, width, height in pixels
Crop = Literal["auto", "face", "centre", "none"]


@dataclass
class Artwork:
    """One artwork, framed.

    Attributes:
        id: unique, from the file's name; see :func:`models.names.item_id`.
        image: (3, size, size) RGB in [-1, 1].
        label: (25,) camera label, where the exact camera is known.
        angles: yaw and pitch, radians, where these are known: the generator's rig makes the camera. Without either
            the pose is to be estimated.
        original_size: (height, width) of the file in pixels.
        style: name of the style, where the list gives one.
        seed: for this artwork's draws, where the list gives one.
    """

    id: str
    image: Tensor
    label: Tensor | None = None
    original_size: tuple[int, int] = (0, 0)
    style: str | None = None
    seed: int | None = None
    angles: tuple[float, float] | None = None

    @property
    def camera(self) -> Camera | None:
        """The known camera (batch of 1), or ``None``."""
        return None if self.label is None else Camera.from_label(self.label[None])

    def at(self, side: int) -> Tensor:
        """The image as (3, side, side), antialiased."""
        if self.image.shape[-2:] == (side, side):
            return self.image
        resized = F.interpolate(self.image[None], (side, side), mode="bicubic", antialias=True, align_corners=False)
        return resized[0].clamp(-1, 1)


class ArtworkDataModule(ItemsDataModule[Artwork]):
    """Artworks given as files.

    A folder may hold ``artworks.json``: {"items": [{"file", "yaw_deg", "pitch_deg", "crop": [x, y, w, h],
    "style", "seed"}]}, all but ``file`` optional; or EG3D's ``dataset.json``: {"labels": [[name, [25 floats]]]}.

    Args:
        path: an image file or a folder.
        yaw_deg, pitch_deg: pose of every artwork that has none of its own; null for both: estimate it.
        size: side of the framed image, pixels.
        crop: "auto" looks for a face in images larger than ``size`` and frames it as the rig frames heads, "face" does
            so too and refuses images that do not show exactly one;
            "centre" takes the largest centred square; "none" expects a square image that is framed already.
    """

    def __init__(
        self,
        path: str,
        yaw_deg: float | None = None,
        pitch_deg: float | None = None,
        size: int = 128,
        crop: Crop = "auto",
    ) -> None:
        super().__init__()
        if size < MIN_SIDE:
            raise UserError(f"data.size is {size}: artworks are framed with at least {MIN_SIDE} pixels a side")
        self.path = path
        self.yaw_deg = yaw_deg
        self.pitch_deg = pitch_deg
        self.size = size
        self.crop: Crop = crop

    def read_items(self) -> list[Artwork]:
        return read_artworks(self.path, self.yaw_deg, self.pitch_deg, self.size, self.crop)


def read_artworks(
    path: str,
    yaw_deg: float | None = None,
    pitch_deg: float | None = None,
    size: int = 128,
    crop: Crop = "auto",
) -> list[Artwork]:
    """Read, check and frame the artworks of ``path``, sorted by id; arguments as :class:`ArtworkDataModule`.

    Raises:
        UserError: one sentence naming the file and what is wrong with it.
    """
    with os_errors(path, "read"):
        place = resolve(path)
        if not place.exists():
            raise UserError(f"artwork {path} does not exist")
    entries = _entries(place)
    artworks: dict[str, Artwork] = {}
    for entry in entries:
        file = place.parent / entry["file"] if place.is_file() else place / entry["file"]
        identity = item_id(entry["file"])
        if identity in artworks:
            raise UserError(f"{place} has two artworks with the id {identity!r}: rename one of the files")
        given = {"yaw_deg": yaw_deg, "pitch_deg": pitch_deg}
        given |= {key: entry[key] for key in given if entry.get(key) is not None}
        label = entry.get("label")
        image = read_image(file)
        height, width = image.shape[-2:]
        artworks[identity] = Artwork(
            id=identity,
            image=frame(image, size, _box(image, entry.get("crop"), crop, size, str(file))),
            label=label,
            angles=None if label is not None else pose_angles(given["yaw_deg"], given["pitch_deg"], str(file)),
            original_size=(height, width),
            style=entry.get("style"),
            seed=entry.get("seed"),
        )
    return [artworks[identity] for identity in sorted(artworks)]


def pose_angles(yaw_deg: float | None, pitch_deg: float | None, what: str) -> tuple[float, float] | None:
    """Yaw and pitch in radians of a pose in degrees, ``None`` when both are; one missing angle is 0.

    What a generator was trained for is for :func:`datamodules.poses.check_camera` to know.

    Raises:
        UserError: when an angle is none; ``what`` names the artwork.
    """
    if yaw_deg is None and pitch_deg is None:
        return None
    angles = []
    for name, value, limit in (("yaw_deg", yaw_deg, 180), ("pitch_deg", pitch_deg, 90)):
        value = 0.0 if value is None else value
        if not abs(value) <= limit:
            raise UserError(f"{what}: {name} is {value:g}, it must be between +-{limit} degrees")
        angles.append(math.radians(value))
    return angles[0], angles[1]


def frame(image: Tensor, size: int, box: Box) -> Tensor:
    """Cut ``box`` out of (1, 3, H, W) and resize it to (3, size, size), antialiased."""
    x, y, width, height = box
    cut = image[..., y : y + height, x : x + width]
    if cut.shape[-2:] != (size, size):
        cut = F.interpolate(cut, (size, size), mode="bicubic", antialias=True, align_corners=False)
    return cut[0].clamp(-1, 1)


def find_faces(image: Tensor) -> list[Box]:
    """The frontal faces in (1, 3, H, W), by scikit-image's LBP cascade, largest first."""
    from skimage.data import lbp_frontal_face_cascade_filename  # here: heavy, and only foreign photos need it
    from skimage.feature import Cascade

    shrink = max(1.0, max(image.shape[-2:]) / 512)
    side = int(min(image.shape[-2:]) / shrink)
    smallest, largest = max(side // 6, SMALLEST_FACE), int(side * 0.95)
    if largest < smallest:  # a strip, or tiny
        return []
    small = F.interpolate(image, scale_factor=1 / shrink, mode="bicubic", antialias=True) if shrink > 1 else image
    found = Cascade(lbp_frontal_face_cascade_filename()).detect_multi_scale(
        to_uint8(small[0]), 1.2, 1, min_size=(smallest, smallest), max_size=(largest, largest)
    )
    found.sort(key=lambda box: (-box["width"] * box["height"], box["r"], box["c"]))
    return [tuple(round(face[key] * shrink) for key in ("c", "r", "width", "height")) for face in found]


def _box(image: Tensor, given: Any, crop: Crop, size: int, what: str) -> Box:
    height, width = image.shape[-2:]
    centre = _square(width / 2, height / 2, min(width, height), width, height)
    if given is not None:
        if not (isinstance(given, list) and len(given) == 4 and all(type(v) is int for v in given)):
            raise UserError(f"{what}: crop must be [x, y, width, height] in whole pixels, got {shown(given)}")
        x, y, w, h = given
        if x < 0 or y < 0 or min(w, h) < MIN_SIDE or x + w > width or y + h > height:
            raise UserError(f"{what}: crop {given} is not inside the image of {width} x {height}, or too small")
        return _square(x + w / 2, y + h / 2, min(w, h), width, height)
    if crop == "none":
        if width != height:
            raise UserError(f"{what} is {width} x {height}: crop 'none' needs a square image, use 'auto' or 'centre'")
        return centre
    if crop == "centre" or min(width, height) <= size:
        return centre
    faces = find_faces(image)
    if crop == "face" and len(faces) != 1:
        number = f"{len(faces)} faces, the largest at {list(faces[0])}" if faces else "no face"
        raise UserError(
            f"{what}: found {number}, where one is needed: give its crop [x, y, width, height] in artworks.json, "
            "or take crop 'centre' or 'none'"
        )
    if not faces:
        log.info("%s: no face found, taking the centred square", what)
        return centre
    x, y, w, h = faces[0]
    others = f", the largest of {len(faces)}" if len(faces) > 1 else ""
    log.info("%s: face found at x=%d y=%d, %d x %d pixels%s", what, *faces[0], others)
    return _square(x + w / 2, y + h / 2, round(w / FACE_FRACTION), width, height)


def _square(cx: float, cy: float, side: int, width: int, height: int) -> Box:
    """The square around a point, made smaller and moved where it would leave the image."""
    side = min(side, width, height)
    x = min(max(round(cx - side / 2), 0), width - side)
    y = min(max(round(cy - side / 2), 0), height - side)
    return x, y, side, side


def _entries(place: Path) -> list[dict[str, Any]]:
    if place.is_file():
        return [{"file": place.name}]
    if (place / "artworks.json").exists():
        entries = _listed(place / "artworks.json")
        with os_errors(place, "read"):
            others = _files(place) - {entry["file"] for entry in entries}
        say_left_out(pictures_among(sorted(others), place), place, "artworks.json does not list them")
        return entries
    with os_errors(place, "read"):
        names = pictures_among(sorted(_files(place)), place)
    if (file := place / LABELS).exists():
        labels = camera_labels(_json(file), str(file), lambda name: os.path.lexists(place / name))
        say_left_out(sorted(set(names) - labels.keys()), place, f"{LABELS} does not list them")
        return [{"file": name, "label": labels[name]} for name in sorted(labels)]
    if not names:
        raise UserError(f"no images found in {place} ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return [{"file": name} for name in names]


def _files(place: Path) -> set[str]:
    """Names of what is in a folder but folders; links to nothing are among them, so that they are told of."""
    return {path.name for path in place.iterdir() if not path.is_dir()}


def _json(file: Path) -> Any:
    return parse_json(read_bytes(file, MOST_JSON_BYTES), str(file))


def _listed(file: Path) -> list[dict[str, Any]]:
    kinds = {
        "file": str,
        "yaw_deg": int | float | None,
        "pitch_deg": int | float | None,
        "crop": list | None,
        "style": str | None,
        "seed": int | None,
    }
    content = _json(file)
    entries = content.get("items") if isinstance(content, Mapping) else None
    if not isinstance(entries, list) or not entries:
        raise UserError(f'{file} must be {{"items": [{{"file": ...}}, ...]}} with at least one item')
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict) or "file" not in entry:
            raise UserError(f"{file}: item {i} has no file")
        for key, value in entry.items():
            if key not in kinds:
                raise UserError(f"{file}: item {i} has the unknown key {shown(key)}, known are: {', '.join(kinds)}")
            if not isinstance(value, kinds[key]) or isinstance(value, bool):
                raise UserError(f"{file}: item {i}: {key} is {shown(value)}, which has the wrong type")
        name = spelled(entry["file"], lambda name: os.path.lexists(file.parent / name))
        if name is None:
            raise UserError(f"{file}: item {i}: {shown(entry['file'])} is not a file in its folder")
        entry["file"] = name
    return entries
