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
from models.generators.base import RadianceGenerator
from models.generators.manifold import ManifoldGenerator
from models.heads.photos import PhotoSet
from models.latents import Latents
from models.rendering.manifolds import weights_version
from models.rendering.output import Edit, FieldSample, Rendering


class DetailedGenerator(RadianceGenerator):
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
        super().__init__()
        if len(photo) != 1:
            raise ValueError(f"a detailed generator shows one photo, got {len(photo)}")
        detail.check(coarse)
        self.coarse, self.detail, self.photo = coarse, detail, photo
        self.z_dim, self.num_ws, self.w_dim = coarse.z_dim, coarse.num_ws, coarse.w_dim
        self.resolution, self.free_resolution = coarse.resolution, coarse.free_resolution
        self.rig, self.expressions = coarse.rig, coarse.expressions
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

    def mapping(
        self, z: Tensor, *, camera: Camera | None = None, truncation: float = 1.0, cutoff: int | None = None
    ) -> Latents:
        return self.coarse.mapping(z, camera=camera, truncation=truncation, cutoff=cutoff)

    @property
    def mean_latents(self) -> Latents:
        return self.coarse.mean_latents

    @property
    def tap_names(self) -> tuple[str, ...]:
        return self.coarse.tap_names

    def affine_weights(self, layers: Sequence[int] | None = None) -> Tensor:
        return self.coarse.affine_weights(layers)

    def features(self, ws: Latents, points: Tensor, expression: Tensor | None = None) -> Tensor:
        return self.details.edit(points, self.coarse.features(ws, points, expression))

    def decode(self, features: Tensor, directions: Tensor | None = None) -> FieldSample:
        return self.coarse.decode(features, directions)

    def bake(
        self,
        ws: Latents,
        size: int,
        *,
        expression: Tensor | None = None,
        edit: Edit | None = None,
        stride: int = 4,
    ) -> BakedHead:
        return self.coarse.bake(ws, size, expression=expression, edit=self._with_details(edit), stride=stride)

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
            edit=self._with_details(edit),
            randomness=randomness,
            taps=taps,
            resolution=resolution,
        )

    def _with_details(self, edit: Edit | None) -> Edit:
        def detailed(points: Tensor, features: Tensor) -> Tensor:
            features = self.details.edit(points, features)
            return features if edit is None else edit(points, features)

        return detailed
