"""One photo's head: codes, and what they cannot say as details on the surface manifolds.

Source: GRAMInverter (Deng et al., 2023), Sec. 3.3.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from models.camera import Camera
from models.encoders.detail import DetailReconstructor, Details
from models.generators.baked import BakedHead
from models.generators.manifold import ManifoldGenerator
from models.heads.photos import PhotoSet
from models.heads.wrapped import PhotoGenerator
from models.latents import Latents
from models.rendering.manifolds import weights_version
from models.rendering.output import Edit, Rendering


class DetailedGenerator(PhotoGenerator):
    """Renders as ``coarse`` does, with the details of one photo added to its features.

    The details are reconstructed once, before the first rendering. They lie in world space: other codes or
    expressions move the head below them.

    Args:
        coarse: the generator that the photo was inverted with.
        detail: reconstructs the details.
        photo: the photo, with its codes and camera; exactly one.

    Raises:
        ValueError: for another number of photos, or networks that do not fit.
    """

    def __init__(self, coarse: ManifoldGenerator, detail: DetailReconstructor, photo: PhotoSet) -> None:
        super().__init__(coarse, photo)
        detail.check(coarse)
        self.detail = detail
        self._details: tuple[Hashable, Details] | None = None

    @property
    def details(self) -> Details:
        """Of the photo, without gradient; reconstructed again whenever a weight has changed."""
        key = (weights_version(self), self.photo.image._version, self.photo.image.data_ptr())
        if self._details is None or self._details[0] != key:
            anchor = self.photo[self.photo.ids[0]]
            camera = anchor.camera
            assert camera is not None
            expression = anchor.expression if self.expressions else None
            with torch.no_grad():
                shown = self.coarse.synthesis(anchor.latents, camera, expression=expression).image
                self._details = key, self.detail(self.photo.image, shown, camera, self.coarse)
        return self._details[1]

    def features(self, ws: Latents, points: Tensor, expression: Tensor | None = None) -> Tensor:
        return self.details.edit(points, self.coarse.features(ws, points, expression))

    def bake(
        self,
        ws: Latents,
        size: int,
        *,
        expression: Tensor | None = None,
        edit: Edit | None = None,
        stride: int = 4,
    ) -> BakedHead | None:
        return self.coarse.bake(ws, size, expression=expression, stride=stride, **self._with_details(edit))

    def synthesis(
        self,
        ws: Latents,
        camera: Camera | None = None,
        *,
        expression: Tensor | None = None,
        edit: Edit | None = None,
        randomness: torch.Generator | Tensor | None = None,
        taps: Sequence[str] = (),
        resolution: int | None = None,
    ) -> Rendering:
        return self.coarse.synthesis(
            ws,
            camera,
            expression=expression,
            randomness=randomness,
            taps=taps,
            resolution=resolution,
            **self._with_details(edit),
        )

    def _with_details(self, edit: Edit | None) -> dict[str, Edit]:
        edits = self.details.edits
        if edit is None:
            return edits
        return edits | {"edit": lambda points, features: edit(points, self.details.edit(points, features))}
