"""What a signed distance field must be at points of known heads, without a rendering of it.

Sources: StyleSDF (Or-El et al., 2022), Sec. 3.4, for the eikonal and the minimal surface terms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from models.batches import PortraitBatch
from models.camera import Camera
from models.checks import check_not_negative, check_positive
from models.generators.stylesdf import StyleSDF, camera_directions
from models.latents import Latents
from models.rendering.compositing import field_gradient
from models.rendering.output import Tensors
from models.segments import is_feature

Distances = Callable[[Tensor, Tensor], Tensor]
"""Codes z (B, z_dim), points (B, P, 3) -> distances (B, P) to the true surfaces, world units, negative inside."""


@dataclass(frozen=True)
class PointDraws(Tensors):
    """Random numbers for the points of B subjects with V pictures each."""

    pixels: Tensor
    """(B, V, P) uniform in [0, 1): which pixels of each picture, see :meth:`FieldLoss.pick`."""
    chosen: Tensor
    """(B, N) near which of a subject's V * P surface points."""
    offset: Tensor
    """(B, N, 3) how far from them, world units."""
    cube: Tensor
    """(B, U, 3) points of the cube."""


@dataclass(frozen=True)
class FieldLoss:
    """Distances, normals and colours at points of the pictures' surfaces, distances beside them, and regularity.

    A point of a surface costs one look at the field where a pixel of a rendering costs one for each sample: a field
    learns its heads from points first.

    Attributes:
        weight: of the whole, for the caller.
        alone: images for which points are all there is; pictures are rendered afterwards.
        pixels: points of surfaces, and of backgrounds, drawn on each picture.
        background, features: how often a pixel of the background, and one more often an eye, a brow or the mouth, is
            drawn, relative to another of the head.
        near: points drawn near those of each subject; near_sd: their distance's deviation, world units.
        uniform: points drawn in a cube, of each subject; extent: half its side, world units.
        distance, colour, normal: of distances, colours and normals against the truth.
        band: distances count less the farther from the surface: half at this one, world units.
        eikonal: of (|grad d| - 1)^2; StyleSDF: .1.
        minimal_surface: of exp(-100 |d|) away from surfaces; StyleSDF: .05.
    """

    weight: float = 1.0
    alone: int = 0
    pixels: int = 192
    background: float = 0.3
    features: float = 4.0
    near: int = 192
    near_sd: float = 0.1
    uniform: int = 128
    extent: float = 1.5
    distance: float = 5.0
    colour: float = 1.0
    normal: float = 0.2
    band: float = 0.2
    eikonal: float = 0.1
    minimal_surface: float = 0.05

    def __post_init__(self) -> None:
        weights = ("weight", "alone", "features", "distance", "colour", "normal", "eikonal", "minimal_surface")
        check_not_negative(self, *weights, where="field.")
        check_positive(self, "pixels", "near", "background", "near_sd", "uniform", "extent", "band", where="field.")

    def draw(self, subjects: int, views: int, draws: Generator) -> PointDraws:
        """For so many subjects with so many pictures each; on the CPU."""
        return PointDraws(
            torch.rand(subjects, views, self.pixels, generator=draws),
            torch.randint(views * self.pixels, (subjects, self.near), generator=draws),
            self.near_sd * torch.randn(subjects, self.near, 3, generator=draws),
            self.extent * (2 * torch.rand(subjects, self.uniform, 3, generator=draws) - 1),
        )

    def pick(self, batch: PortraitBatch, uniform: Tensor) -> Tensor:
        """Pixels of B * V pictures (B * V, P), row by row, for numbers ``uniform`` (B, V, P)."""
        assert "mask" in batch
        often = batch["mask"].flatten(0, 1).flatten(1).clamp_min(self.background)
        if "segmentation" in batch:
            often = often + self.features * is_feature(batch["segmentation"].flatten(0, 1).flatten(1)).to(often)
        cumulative = often.double().cumsum(1)
        wanted = uniform.flatten(0, 1).double() * cumulative[:, -1:]
        return torch.searchsorted(cumulative, wanted, right=True).clamp_max(often.shape[1] - 1)

    def __call__(
        self,
        generator: StyleSDF,
        ws: Latents,
        camera: Camera,
        batch: PortraitBatch,
        truth: Distances,
        drawn: PointDraws,
    ) -> dict[str, Tensor]:
        """The terms, and their weighted sum as ``field``; scalars.

        Args:
            ws: of the B subjects. camera: of the B * V pictures.
            batch: of which ``image``, ``z``, ``mask``, ``depth`` and ``normals`` are used.
            truth: of the batch's z.
            drawn: for the B subjects.
        """
        assert "z" in batch and "mask" in batch and "depth" in batch and "normals" in batch
        rows, side = len(batch["image"]), batch["image"].shape[-1]
        drawn = drawn.to(batch["image"].device)
        ws = ws.map(lambda t: t.to(torch.promote_types(t.dtype, torch.float32)))  # gradients of fields are
        pick = self.pick(batch, drawn.pixels)

        def at(maps: Tensor) -> Tensor:
            """Of maps (B, V, C, H, W), what is at the picked pixels: (B, V * pixels, C)."""
            values = maps.flatten(0, 1).flatten(2)
            found = values.gather(2, pick[:, None].expand(-1, values.shape[1], -1)).mT
            return found.reshape(rows, -1, values.shape[1])

        origins, directions = (t.gather(1, pick[..., None].expand(-1, -1, 3)) for t in camera.rays(side))
        solid, empty = at(batch["mask"]) > 0.99, at(batch["mask"]) == 0
        far = generator.rig.far
        depth = torch.where(solid, at(batch["depth"]), far)  # where the field shows what lies behind the head
        surface = origins.reshape(rows, -1, 3) + depth * directions.reshape(rows, -1, 3)

        count = surface.shape[1]
        near = surface.gather(1, drawn.chosen[..., None].expand(-1, -1, 3)) + drawn.offset
        points = torch.cat([surface, near, drawn.cube], 1)
        expected = truth(batch["z"], points)[..., None]

        looking = camera_directions(camera, side) if generator.static_directions else camera.rays(side)[1]
        looking = looking.gather(1, pick[..., None].expand(-1, -1, 3)).reshape(rows, -1, 3)
        views = F.pad(F.normalize(looking, dim=-1), (0, 0, 0, points.shape[1] - count))  # other colours are not asked
        found: list[Tensor] = []

        def distance(where: Tensor) -> Tensor:
            sample = generator.shade(ws, where, views)
            found.append(sample.colour)
            assert sample.sdf is not None
            return sample.sdf

        value, gradient = field_gradient(distance, points, create_graph=True)
        weight = self.band / (self.band + expected.abs())
        hit, seen = solid.float(), (solid | empty).float()
        slope = gradient.norm(dim=-1, keepdim=True)
        cosine = (F.normalize(gradient[:, :count], dim=-1) * at(batch["normals"])).sum(-1, keepdim=True)
        away = torch.cat([~solid, torch.ones_like(expected[:, count:], dtype=torch.bool)], 1) & (expected.abs() > 0.05)
        losses = {
            "distance": ((value - expected).abs() * weight).mean(),
            "colour": ((found[0][:, :count] - at(batch["image"])).abs() * seen).mean(),
            "normal": ((1 - cosine) * hit).mean(),
            "eikonal": (slope - 1).square().mean(),
            "minimal_surface": (torch.exp(-100 * value.abs()) * away).mean(),
        }
        total = torch.stack([getattr(self, name) * term for name, term in losses.items()]).sum()
        return losses | {"field": total}
