"""What the inversion stages share that take photos to heads in one pass."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from datamodules.artworks import Artwork
from datamodules.items import ItemsDataModule
from datamodules.poses import check_camera, find_camera
from models.artifact import Export
from models.batches import PortraitBatch, some_views
from models.camera import Camera
from models.features.base import FacePoints, Frozen
from models.generators.base import RadianceGenerator
from models.generators.views import render_views
from models.heads.codes import HeadCode
from models.heads.index import Entry, subject_index
from models.heads.photos import PhotoSet
from models.heads.subjects import Details, invert
from models.image import write_image
from models.names import item_id
from models.rendering.sheets import normal_colours, pose_overlay, sheet
from stages.base.foreign import warn_of_embedded
from stages.base.inversion import InversionStage, items_of
from stages.base.ranks import collect

VIEWS = 5  # of a predicted head, on its picture


class PhotoStage(InversionStage):
    """Base of the stages whose ``predict`` takes photos (:class:`datamodules.artworks.ArtworkDataModule`) to heads.

    It hands on the generator, the networks of the details and the photos with their codes and cameras, of which
    ``present`` and ``view`` make the heads that a subclass's :meth:`entry` names.

    Args:
        pose: estimates the camera of photos that have none; null refuses such photos.
        landmarks: chooses between the cameras that the face and the pose network tell; null takes the face's.
        options: of :class:`InversionStage`.

    Attributes:
        shows_normals: whether the pictures of a head show its normals too.
    """

    shows_normals: ClassVar[bool] = False
    generator: RadianceGenerator

    def __init__(self, pose: nn.Module | None = None, landmarks: nn.Module | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.pose = None if pose is None else Frozen(pose)
        self.landmarks = None if landmarks is None else Frozen(landmarks)
        self._photos: dict[str, Tensor] = {}  # of predict, by id

    # -- for subclasses ------------------------------------------------------------------------------------------------

    @abstractmethod
    def details(self) -> dict[str, Details]:
        """The networks of what codes cannot say, by their name in the artifact; none where codes are all."""

    @abstractmethod
    def entry(self, identity: str, artwork: str) -> Entry:
        """What a head is made of in the artifact."""

    # -- predict -------------------------------------------------------------------------------------------------------

    def on_predict_start(self) -> None:
        super().on_predict_start()
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        items: Sequence[Artwork] = data.items if isinstance(data, ItemsDataModule) else ()
        for item in items:
            check_camera(item, self.generator.rig, self.pose is not None)  # before anything is computed
        if any(item.label is None and (item.angles is None or item.estimated) for item in items):
            warn_of_embedded(self.generator, self.pose)

    @torch.no_grad()
    def predict_step(self, batch: PortraitBatch | Sequence[Artwork], batch_idx: int) -> None:
        if isinstance(batch, dict):
            portraits = cast(PortraitBatch, batch)
            if not self.details():
                super().predict_step(portraits, batch_idx)
                return
            image, camera = self.pictures(some_views(portraits, slice(1)))
            assert camera is not None
            for row, item in enumerate(items_of(portraits)):
                self._predict(item_id(item), image[row : row + 1], camera[row])
            return
        side = next((network.resolution for network in self.details().values()), self.generator.resolution)
        for item in cast(Sequence[Artwork], batch):
            faces = None if self.landmarks is None else cast(FacePoints, self.landmarks.module)
            camera = find_camera(item, self.generator, self.pose, faces, self.device)
            self._predict(item.id, item.at(side)[None].to(self.device), camera.to(self.device))

    def _predict(self, name: str, image: Tensor, camera: Camera) -> None:
        """One photo (1, 3, H, W) to a head, its pictures in ``OUT/pictures/NAME``."""
        generator, folder = self.generator, self.out / "pictures" / name
        subject = invert(name, image, camera, generator, self.encoder, *self.details().values())
        photo = subject.artwork
        assert photo is not None
        cameras = Camera.cat([camera, generator.rig.orbit(VIEWS).to(camera.device)])
        coarse = final = render_views(generator, subject.latents, cameras, subject.expression)
        if subject.generator is not generator:
            final = render_views(subject.generator, subject.latents, cameras, subject.expression)
        yaws = (round(yaw) for yaw in torch.rad2deg(cameras.yaw[1:]).tolist())
        captions = ["photo's view", *(f"{yaw:+d}°" if yaw else "front" for yaw in yaws)]
        rows: list[list[tuple[str, Tensor | None]]] = [
            [("photo", photo), *zip(captions, final.image, strict=True)],
            [("", None), *zip(captions, coarse.image, strict=True)],
        ]
        labels = ["With details", "Codes alone"]
        if subject.generator is generator:
            rows, labels = rows[:1], ["Codes alone"]
        if self.shows_normals and final.normals is not None and final.alpha is not None:
            rows.append([("", None), *zip(captions, normal_colours(final.normals, final.alpha, cameras), strict=True)])
            labels.append("Normals")
        outline = None if final.alpha is None else final.alpha[0]
        pictures = {
            "reference": photo,
            "coarse": coarse.image[0],
            "views": sheet(rows, labels=labels),
            "camera": pose_overlay(photo.cpu(), generator.rig, camera.to("cpu"), outline),
        }
        if subject.generator is not generator:
            pictures["detailed"] = final.image[0]
        for kind, picture in pictures.items():
            write_image(folder / f"{kind}.png", picture)
        head = HeadCode(subject.latents.to("cpu"), None, subject.expression.cpu(), camera.label().cpu())
        self._heads[name], self._photos[name] = head, photo.cpu()

    def on_predict_epoch_end(self) -> None:
        super().on_predict_epoch_end()
        self._photos = dict(collect(list(self._photos.items())))

    def export_heads(self) -> Export:
        if not self._photos:
            return super().export_heads()
        photos = PhotoSet.collect(self._heads, self._photos, self.generator)
        media = {
            f"{picture.stem}_{name}.png": picture
            for name in photos.ids
            for picture in sorted((self.out / "pictures" / name).iterdir())
        }
        modules: dict[str, nn.Module] = {"generator": self.generator, **self.details(), "anchors": photos}
        entries = [self.entry(name, f"reference_{name}.png") for name in photos.ids]
        return Export(modules, media=media, extra=subject_index(entries), delta_of=self.unchanged(modules))
