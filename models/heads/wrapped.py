"""Generators that show one photo's head: another generator, and what its codes cannot say."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from models.camera import Camera
from models.generators.base import RadianceGenerator
from models.heads.photos import PhotoSet
from models.latents import Latents
from models.rendering.output import FieldSample


class PhotoGenerator(RadianceGenerator):
    """Base of generators that render as ``coarse`` does, with something of one photo added. Its codes are ``coarse``'s.

    Args:
        coarse: the generator that the photo was inverted with.
        photo: the photo, with its codes and camera; exactly one.

    Raises:
        ValueError: for another number of photos.
    """

    def __init__(self, coarse: RadianceGenerator, photo: PhotoSet) -> None:
        super().__init__()
        if len(photo) != 1:
            raise ValueError(f"a {type(self).__name__} shows one photo, got {len(photo)}")
        self.coarse, self.photo = coarse, photo
        self.z_dim, self.num_ws, self.w_dim = coarse.z_dim, coarse.num_ws, coarse.w_dim
        self.resolution, self.free_resolution = coarse.resolution, coarse.free_resolution
        self.rig, self.expressions = coarse.rig, coarse.expressions

    def mapping(
        self, z: Tensor, *, camera: Camera | None = None, truncation: float = 1.0, cutoff: int | None = None
    ) -> Latents:
        return self.coarse.mapping(z, camera=camera, truncation=truncation, cutoff=cutoff)

    def complete(self, ws: Latents) -> Latents:
        return self.coarse.complete(ws)

    @property
    def mean_latents(self) -> Latents:
        return self.coarse.mean_latents

    def update_mean(self, count: int = 10_000, seed: int = 0) -> None:
        self.coarse.update_mean(count, seed)

    @property
    def noise_sides(self) -> list[int]:
        return self.coarse.noise_sides

    @property
    def tap_names(self) -> tuple[str, ...]:
        return self.coarse.tap_names

    def affine_weights(self, layers: Sequence[int] | None = None) -> Tensor:
        return self.coarse.affine_weights(layers)

    def decode(self, features: Tensor, directions: Tensor | None = None) -> FieldSample:
        return self.coarse.decode(features, directions)
