"""Artworks given by the user: one image, a folder of images, or a folder with a list of them."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from datamodules.framing import ANGLES, Crop, Edits, Framing, recipe_of
from datamodules.items import ItemsDataModule
from datamodules.labels import LABELS, camera_labels, spelled
from models.camera import Camera
from models.documents import MOST_JSON_BYTES, parse_json
from models.errors import UserError, shown
from models.files import os_errors, read_bytes, resolve
from models.image import IMAGE_SUFFIXES, MIN_SIDE, pictures_among, read_image, say_left_out
from models.names import item_id

log = logging.getLogger(__name__)

ORIGINALS = "originals"  # the folder of ``galatea align`` that holds the pictures which artworks.json lists


@dataclass
class Artwork:
    """One artwork, framed.

    Attributes:
        id: unique, from the file's name; see :func:`models.names.item_id`.
        image: (3, size, size) RGB in [-1, 1].
        label: (25,) camera label, where the exact camera is known.
        angles: yaw and pitch, radians, where these are known or the mesh shows them: the generator's rig makes the
            camera. Without either the pose is to be estimated.
        estimated: the angles are the mesh's, or the label is made of them.
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
    estimated: bool = False

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

    A folder may hold ``artworks.json``: {"items": [{"file", "yaw_deg", "pitch_deg", "crop": [x, y, w, h], "points":
    five pairs, "face", "roll_deg", "scale", "shift": [right, down], "style", "seed"}]}, all but ``file`` optional, see
    :class:`datamodules.framing.Edits`; or EG3D's ``dataset.json``: {"labels": [[name, [25 floats]]]}, whose pictures
    are framed already. ``galatea align`` writes both.

    Args:
        path: an image file or a folder.
        yaw_deg, pitch_deg: pose of every artwork that has none of its own; null for both: estimate it.
        size: side of the framed image, pixels; null for the recipe's.
        crop: "auto" looks for a face in images that are larger than ``size`` or not square, and takes the centred
            square where there is none; "face" looks in all, and refuses images without one or with several of a size;
            "centre" takes the largest centred square; "none" expects a square image that is framed already.
        recipe: how faces are framed: a name of :data:`models.faces.recipes.RECIPES`, or the folder of an artifact
            whose generator has one.
        face: which face to take where there are several, 1 for the largest.
        points: where the face is, by hand: x and y of both eyes, the nose's tip and both corners of the mouth, from the
            picture's left to its right; ten numbers, pixels.
    """

    def __init__(
        self,
        path: str,
        yaw_deg: float | None = None,
        pitch_deg: float | None = None,
        size: int | None = 128,
        crop: Crop = "auto",
        recipe: str = "embedded",
        face: int | None = None,
        points: str | None = None,
    ) -> None:
        super().__init__()
        if size is not None and size < MIN_SIDE:
            raise UserError(f"data.size is {size}: artworks are framed with at least {MIN_SIDE} pixels a side")
        self.path = path
        self.yaw_deg = yaw_deg
        self.pitch_deg = pitch_deg
        self.size = size
        self.crop: Crop = crop
        self.recipe, self.face, self.points = recipe, face, points

    def read_items(self) -> list[Artwork]:
        given = Edits(self.yaw_deg, self.pitch_deg, points=self.points, face=self.face)
        return read_artworks(self.path, given, self.size, self.crop, self.recipe)


class ArtworkSource:
    """Where artworks are, and how each is read and framed; arguments as of :func:`read_artworks`.

    Attributes:
        entries: what lists say of each artwork, by its id.

    Raises:
        UserError: when there are none, a list is wrong, or two have the same id.
    """

    def __init__(
        self,
        path: str,
        given: Edits | None = None,
        size: int | None = 128,
        crop: Crop = "auto",
        recipe: str = "embedded",
    ) -> None:
        known = recipe_of(recipe)
        self.given, self.framing = given, Framing(known, size or known.size, crop)
        self.place, listed = list_artworks(path, self.framing.recipe.name)
        if given is not None and given.points is not None and len(listed) != 1:
            raise UserError(f"points are of one picture, {path} has {len(listed)}: write them in artworks.json")
        self.entries: dict[str, dict[str, Any]] = {}
        for entry in listed:
            identity = artwork_id(entry["file"])
            if identity in self.entries:
                raise UserError(f"{self.place} has two artworks with the id {identity!r}: rename one of the files")
            self.entries[identity] = entry

    def read(self, identity: str) -> Artwork:
        """One artwork.

        Raises:
            UserError: one sentence naming the file and what is wrong with it.
        """
        entry = self.entries[identity]
        file, label = self.place / entry["file"], entry.get("label")
        image = read_image(file)
        framed = self.framing(image, str(file), edits_of(entry, self.given), framed=label is not None)
        if label is None and self.framing.recipe.view is not None and framed.camera is not None:
            label = framed.camera.label()[0]  # angles do not tell its roll, nor where it looks
        return Artwork(
            id=identity,
            image=framed.image,
            label=label,
            original_size=(image.shape[-2], image.shape[-1]),
            style=entry.get("style"),
            seed=entry.get("seed"),
            angles=framed.angles if label is None else None,
            estimated=framed.estimated and entry.get("label") is None,
        )


def read_artworks(
    path: str,
    given: Edits | None = None,
    size: int | None = 128,
    crop: Crop = "auto",
    recipe: str = "embedded",
) -> list[Artwork]:
    """Read, check and frame the artworks of ``path``, sorted by id; arguments as :class:`ArtworkDataModule`.

    Args:
        given: of every artwork, as far as it has nothing of its own.

    Raises:
        UserError: one sentence naming the file and what is wrong with it.
    """
    source = ArtworkSource(path, given, size, crop, recipe)
    return [source.read(identity) for identity in sorted(source.entries)]


def artwork_id(file: str) -> str:
    """The id of an artwork: of its own name, also where it is an original of ``galatea align``."""
    return item_id(file.removeprefix(f"{ORIGINALS}/"))


def edits_of(entry: Mapping[str, Any], given: Edits | None = None) -> Edits:
    """What a list's entry says of its artwork, and ``given`` where it says nothing."""
    said = {field.name: entry.get(field.name) for field in fields(Edits)}
    return replace(given or Edits(), **{name: value for name, value in said.items() if value is not None})


def list_artworks(path: str, recipe: str | None = None) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of artworks, and an entry for each: its ``file`` there, and what lists say of it.

    Args:
        recipe: for which they are to be framed: the angles of a list that was written for another one are left out,
            as each rig has its own. ``None`` for the list's.

    Raises:
        UserError: when there are none, or a list is wrong.
    """
    with os_errors(path, "read"):
        place = resolve(path)
        if not place.exists():
            raise UserError(f"artwork {path} does not exist")
        return (place.parent if place.is_file() else place), _entries(place, recipe)


def _entries(place: Path, recipe: str | None) -> list[dict[str, Any]]:
    if place.is_file():
        return [{"file": place.name}]
    if (place / "artworks.json").exists():
        entries = _listed(place / "artworks.json", recipe)
        with os_errors(place, "read"):
            others = _files(place) - {entry["file"] for entry in entries}
        if not all(entry["file"].startswith(f"{ORIGINALS}/") for entry in entries):  # else these are its crops
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


def _listed(file: Path, recipe: str | None) -> list[dict[str, Any]]:
    kinds = {
        "file": str,
        "yaw_deg": int | float | None,
        "pitch_deg": int | float | None,
        "roll_deg": int | float | None,
        "scale": int | float | None,
        "shift": list | None,
        "points": list | None,
        "face": int | None,
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
    before = content.get("recipe")
    if recipe is None or before is None or before == recipe:
        return entries
    log.warning("%s was written for %s: its angles are found again for %s", file, shown(before), recipe)
    return [{key: value for key, value in entry.items() if key not in ANGLES} for entry in entries]
