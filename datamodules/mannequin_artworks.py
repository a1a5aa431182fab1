"""Artworks of the embedded world, with the truth from every view.

``python -m datamodules.mannequin_artworks --out FOLDER SUBJECT:STYLE ...`` writes artworks as files. The samples of
the repository were made with::

    python -m datamodules.mannequin_artworks --out assets/artworks 3:toon 13:watercolour 22:ukiyoe
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from datamodules.artworks import Artwork
from datamodules.items import ItemsDataModule
from datamodules.mannequins.dataset import SPLITS, CacheConfig, MannequinImages, build_cache
from datamodules.mannequins.render import RIG, Truth, render
from datamodules.mannequins.scene import EXAGGERATIONS, EXPRESSIONS, Scene, subject_z, subjects_of
from datamodules.mannequins.styles import ART_STYLES, PLAIN, STYLES
from models.camera import Camera
from models.errors import UserError
from models.files import atomic_write
from models.image import write_image

_VIEW_SEED = 40_000_003
_ERROR_SEED = 50_000_017


@dataclass(frozen=True)
class Portrayal:
    """Who is portrayed how: a subject of a split in a style, from one view.

    Attributes:
        seed: the subject's, of ``SPLITS``.
        style: one of ``STYLES``.
        yaw, pitch: of the view, radians.
        exaggeration: a geometric one, of ``EXAGGERATIONS``, or "". strength: of it.
    """

    seed: int
    style: str
    yaw: float
    pitch: float
    exaggeration: str = ""
    strength: float = 1.0

    @staticmethod
    def draw(seed: int, style: str, yaw_max_deg: float, pitch_max_deg: float, salt: int = 0) -> Portrayal:
        """A view drawn uniformly, in whole degrees; it depends on the arguments only."""
        if style not in STYLES:
            raise UserError(f"unknown style {style!r}, choose from {', '.join(STYLES)}")
        generator = torch.Generator().manual_seed(_VIEW_SEED + 97 * seed + STYLES.index(style) + 7_919 * salt)
        yaw, pitch = (2 * torch.rand(2, dtype=torch.float64, generator=generator) - 1).tolist()
        return Portrayal(
            seed, style, math.radians(round(yaw * yaw_max_deg)), math.radians(round(pitch * pitch_max_deg))
        )

    @property
    def id(self) -> str:
        """Of the artwork."""
        return f"{self.style}-{self.seed}"

    @property
    def camera(self) -> Camera:
        """Of the artwork, a batch of one."""
        return RIG.camera(self.yaw, self.pitch)

    @property
    def scene(self) -> Scene:
        """The neutral head, a batch of one."""
        scene = Scene.from_z(subject_z([self.seed]))
        return scene.exaggerate(self.exaggeration, self.strength) if self.exaggeration else scene

    def render(self, camera: Camera, size: int, supersample: int = 2, expression: Tensor | None = None) -> Truth:
        """The stylised head from ``camera`` (B,), with expressions (B, E) or neutral."""
        scene = self.scene.repeat_interleave(len(camera))
        if expression is not None:
            scene = scene.with_expression(expression)
        return render(scene, camera, size, self.style, supersample)


@dataclass(frozen=True)
class PortraitTruth:
    """What a stylised head must look like.

    Attributes:
        input: at the artwork's own view, a batch of one.
        views: at the evaluated views.
        faces: frontal: the neutral head, then each of ``EXPRESSIONS`` at full strength.
        subject: whose head it is.
    """

    input: Truth
    views: Truth
    faces: Truth
    subject: str

    def to(self, device: torch.device) -> PortraitTruth:
        """On another device."""
        return PortraitTruth(self.input.to(device), self.views.to(device), self.faces.to(device), self.subject)


class MannequinArtworks(ItemsDataModule[Artwork]):
    """Subjects x styles of the embedded world, each seen from one view; ids are ``STYLE-SEED``.

    Args:
        split: of the subjects: tune on "val", report on "test".
        subjects: how many, from number ``first`` of the split on.
        styles: every subject is portrayed in each of them; one by itself is a style.
        rotate_styles: every subject is portrayed in one of them instead, by turns.
        size: side of the pictures, pixels.
        yaw_max_deg, pitch_max_deg: the views are drawn uniformly within these.
        frontal: artworks are seen from the front instead, which is no view of the truth then (3DArtmator, Sec. 4.3.4).
        exaggeration, strength: a caricature of every head, of ``EXAGGERATIONS``; "" for none.
        camera_error_deg: by so much the yaw that artworks are given with is wrong, to a side that is drawn.
        views: yaws of the truth, uniform over +-``yaw_max_deg`` at the artwork's pitch, end points included.
        supersample: samples per pixel and axis.
        seed: of the views.
        photos: the pictures are photos of the heads, seen alike; the truth is what a style makes of them.
    """

    def __init__(
        self,
        split: str = "val",
        subjects: int = 8,
        first: int = 0,
        styles: Sequence[str] | str = ART_STYLES,
        size: int = 64,
        yaw_max_deg: float = 36.0,
        pitch_max_deg: float = 12.0,
        views: int = 7,
        supersample: int = 2,
        seed: int = 0,
        rotate_styles: bool = False,
        frontal: bool = False,
        exaggeration: str = "",
        strength: float = 1.0,
        camera_error_deg: float = 0.0,
        photos: bool = False,
    ) -> None:
        super().__init__()
        if exaggeration and exaggeration not in EXAGGERATIONS:
            raise UserError(f"unknown exaggeration {exaggeration!r}, choose from {', '.join(EXAGGERATIONS)}")
        self.camera_error = math.radians(camera_error_deg)
        if min(subjects, size, views, supersample) < 1:
            raise UserError("subjects, size, views and supersample must be at least 1")
        numbers = subjects_of(split, first, subjects)
        self.split, self.size, self.supersample = split, size, supersample
        self.photos = photos
        styles = (styles,) if isinstance(styles, str) else styles
        limit = math.radians(yaw_max_deg)
        yaws = torch.linspace(-limit, limit, views)
        self.yaws = yaws[yaws.abs() > 1e-4] if frontal else yaws
        if not len(self.yaws):
            raise UserError("frontal artworks leave no view to compare: give more views, or a yaw_max_deg above 0")
        limits = (0.0, 0.0) if frontal else (yaw_max_deg, pitch_max_deg)
        self.portrayals = {
            portrayal.id: portrayal
            for place, number in enumerate(numbers)
            for style in ([styles[place % len(styles)]] if rotate_styles else styles)
            for portrayal in [
                replace(Portrayal.draw(number, style, *limits, seed), exaggeration=exaggeration, strength=strength)
            ]
        }

    def given(self, portrayal: Portrayal) -> Camera:
        """The camera that an artwork is given with, a batch of one."""
        if not self.camera_error:
            return portrayal.camera
        draws = torch.Generator().manual_seed(_ERROR_SEED + 97 * portrayal.seed + STYLES.index(portrayal.style))
        side = 1 - 2 * int(torch.randint(2, (), generator=draws))
        return RIG.camera(portrayal.yaw + side * self.camera_error, portrayal.pitch)

    def read_items(self) -> list[Artwork]:
        return [
            Artwork(
                id=identity,
                image=self._shown(p).render(p.camera, self.size, self.supersample).image[0],
                label=self.given(p).label()[0],
                original_size=(self.size, self.size),
                style=p.style,
            )
            for identity, p in sorted(self.portrayals.items())
        ]

    def _shown(self, portrayal: Portrayal) -> Portrayal:
        return replace(portrayal, style=PLAIN, exaggeration="") if self.photos else portrayal

    def item_truth(self, identity: str) -> PortraitTruth:
        """The truth of one artwork; drawn at each call (a second or two at 64 px)."""
        portrayal = self.portrayals[identity]
        faces = torch.cat([torch.zeros(1, len(EXPRESSIONS)), torch.eye(len(EXPRESSIONS))])
        front = RIG.camera(0.0, portrayal.pitch).repeat_interleave(len(faces))
        return PortraitTruth(
            input=portrayal.render(portrayal.camera, self.size, self.supersample),
            views=portrayal.render(RIG.camera(self.yaws, portrayal.pitch), self.size, self.supersample),
            faces=portrayal.render(front, self.size, self.supersample, faces),
            subject=str(portrayal.seed),
        )


class MannequinStyleSet(ItemsDataModule[Artwork]):
    """The training pictures of :class:`datamodules.mannequins.MannequinDataModule` in one style, one by one: a style
    set that ``pairs`` looks through. Whose photographs they are is known for tests alone. Ids are ``STYLE-SEED``.

    Args:
        style: one of ``STYLES``.
        subjects: how many, from number ``first`` of the split ``train`` on.
        exaggerate, size, pose_step, coded, posed, seed: as there.
        supersample, compiled, draw_workers, cache_dir: as there, of the drawing.
    """

    def __init__(
        self,
        style: str = "toon",
        subjects: int = 40,
        first: int = 0,
        exaggerate: dict[str, float] | None = None,
        size: int = 64,
        pose_step: float = 0.0,
        coded: bool = True,
        posed: bool = True,
        supersample: int = 2,
        compiled: bool = False,
        draw_workers: int = 2,
        cache_dir: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if style not in STYLES:
            raise UserError(f"unknown style {style!r}, choose from {', '.join(STYLES)}")
        self.style, self.compiled, self.draw_workers, self.cache_dir = style, compiled, draw_workers, cache_dir
        try:
            self.config = CacheConfig(
                "train",
                subjects,
                first,
                1,
                size,
                (style,),
                supersample,
                seed,
                pose_step,
                coded,
                exaggerate or {},
                posed,
            )
        except ValueError as error:
            raise UserError(str(error)) from error
        self._rows: dict[str, int] = {}

    @cached_property
    def images(self) -> MannequinImages:
        """The pictures, drawn where they are not there yet."""
        return MannequinImages(build_cache(self.config, self.cache_dir, self.draw_workers, self.compiled))

    def read_items(self) -> list[Artwork]:
        self._rows = {f"{self.style}-{seed}": row for row, seed in enumerate(self.config.seeds)}
        size = (self.config.size, self.config.size)
        return [
            Artwork(name, (sample := self.images[row])["image"][0], sample["label"][0], size, self.style)
            for name, row in self._rows.items()
        ]

    def twin(self, identity: str) -> Truth:
        """The photograph of the same head, with the same face and from the same view, that no style has changed."""
        sample, config = self.images[self._rows[identity]], self.config
        code, camera = sample["z"][None], Camera.from_label(sample["label"])
        scene = Scene.from_code(code) if config.coded else Scene.from_z(code, sample["expression"])
        return render(scene, camera, config.size, PLAIN, config.supersample)


def write_artworks(out: Path, portrayals: Sequence[Portrayal], size: int, supersample: int = 2) -> None:
    """Write the artworks as PNG files with an ``artworks.json`` that ``ArtworkDataModule`` reads."""
    entries = []
    for portrayal in portrayals:
        file = f"{portrayal.id}.png"
        write_image(out / file, portrayal.render(portrayal.camera, size, supersample).image)
        angles = {"yaw_deg": math.degrees(portrayal.yaw), "pitch_deg": math.degrees(portrayal.pitch)}
        # The picture is framed as the rig frames heads: no face needs to be looked for.
        entries.append(
            {
                "file": file,
                **{k: round(v, 3) for k, v in angles.items()},
                "crop": [0, 0, size, size],
                "style": portrayal.style,
            }
        )
    with atomic_write(out / "artworks.json") as file:
        file.write_text(json.dumps({"items": entries}, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and write the artworks."""
    parser = argparse.ArgumentParser(prog="python -m datamodules.mannequin_artworks", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--split", default="test", choices=tuple(SPLITS), help="of the subjects (default: test)")
    parser.add_argument("--size", type=int, default=256, help="pixels (default: 256)")
    parser.add_argument("--yaw_max_deg", type=float, default=36.0, help="of the random views (default: 36)")
    parser.add_argument("--pitch_max_deg", type=float, default=12.0, help="of the random views (default: 12)")
    parser.add_argument("items", nargs="+", metavar="SUBJECT:STYLE", help="number in the split, and style")
    options = parser.parse_args(arguments)
    if options.size < 1:
        parser.error(f"--size is {options.size}, it must be at least 1")
    portrayals = []
    for text in options.items:
        number, _, style = text.partition(":")
        if not number.isdigit() or int(number) >= len(SPLITS[options.split]):
            parser.error(f"{text!r} is not SUBJECT:STYLE, for example 3:toon")
        seed = SPLITS[options.split][int(number)]
        portrayals.append(Portrayal.draw(seed, style, options.yaw_max_deg, options.pitch_max_deg))
    write_artworks(options.out, portrayals, options.size)


if __name__ == "__main__":
    main()
